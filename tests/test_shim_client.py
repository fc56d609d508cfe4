"""A connection on a session: what the conformance suite cannot ask of both kinds, or does not ask of one client."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import nats.aio.client
import nats.aio.msg
import nats.aio.subscription
import pytest

import insane_nats
from insane_nats.shim import connection as shim_connection
from insane_nats.shim.errors import InheritedConnectionError, SessionSlowConsumerError
from insane_nats.shim.pump import PASS_DUE
from tools.servers import ROOT, Server

Client = Any
Main = Callable[[], Awaitable[None]]

pytestmark = pytest.mark.timeout(60)


def run(main: Main, loops: str = "asyncio") -> None:
    if loops == "asyncio":
        asyncio.run(main())  # type: ignore[arg-type]
        return
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())  # type: ignore[arg-type]


async def until(condition: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (there is nothing that could be waited for)
            await asyncio.sleep(0.002)


async def connect(server: Server, **options: Any) -> Client:
    return await insane_nats.connect(server.url, **options)


@pytest.fixture(params=["low", "adaptive", "poll"])
def consumption(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["asyncio", "uvloop"])
def loops(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def program(nsnd: Server) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a program's text with the node's URL as its argument; it says one line when it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(text), nsnd.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline(), "it ended before it was ready"
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("debug", [False, True])
def test_who_is_woken_runs_in_order_and_before_what_it_schedules(nsnd: Server, debug: bool) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(debug)
        publisher, subscriber = await connect(nsnd), await connect(nsnd, qos={"consumption": "low"})
        ran: list[str] = []

        async def wait(name: str) -> None:
            subscription = await subscriber.subscribe(name)
            await subscriber.flush()
            await subscription.next_msg(10)
            ran.append(name)
            loop.call_soon(ran.append, f"then {name}")
            assert asyncio.current_task() is tasks[name]

        tasks = {name: asyncio.ensure_future(wait(name)) for name in ("a", "b", "c")}
        await asyncio.sleep(0.05)  # it sleeps
        for name in tasks:
            await publisher.publish(name)
        await asyncio.gather(*tasks.values())
        await asyncio.sleep(0)
        assert [name for name in ran if name in tasks] == ["a", "b", "c"]
        assert [name for name in ran if name not in tasks] == ["then a", "then b", "then c"]
        assert ran.index("then c") == 5
        await publisher.close()
        await subscriber.close()

    run(main)


def test_a_pass_may_run_inside_another(nsnd: Server, consumption: str) -> None:
    """As with nest_asyncio, when who is woken runs the loop."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ready = loop._ready  # type: ignore[attr-defined]
        troubles: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: troubles.append(context))
        publisher, subscriber = await connect(nsnd), await connect(nsnd, qos={"consumption": consumption})
        subscription = await subscriber.subscribe("a")
        await subscriber.flush()
        passes = 0

        def run_pass(waiter: asyncio.Future[None]) -> None:
            nonlocal passes
            for handle in [handle for handle in ready if handle._callback is subscriber._pump._pass_callback]:
                ready.remove(handle)
                loop.call_soon(int)  # in its place: the loop has counted them
                handle._run()
                passes += 1

        for _ in range(10):
            task = asyncio.ensure_future(subscription.next_msg(10))
            await asyncio.sleep(0.02)  # it sleeps
            subscription._pending_queue._getters[0].add_done_callback(run_pass)
            await publisher.publish("a")
            await task
        assert passes
        assert troubles == []
        await publisher.close()
        await subscriber.close()

    run(main)


def test_a_callback_that_the_doorbell_runs_may_close_its_connection(nsnd: Server) -> None:
    async def main() -> None:
        publisher, subscriber = await connect(nsnd), await connect(nsnd, qos={"consumption": "low"})

        async def close(message: Any) -> None:
            await subscriber.close()

        await subscriber.subscribe("close", cb=close)
        await subscriber.flush()
        await asyncio.sleep(0.05)
        await publisher.publish("close")
        await until(lambda: subscriber.is_closed)
        await publisher.close()

    run(main)


def test_classes_are_nats_pys(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        subscription = await nc.subscribe("a")
        await nc.publish("a", b"x", headers={"A": "b"})
        message = await subscription.next_msg(5)
        assert isinstance(nc, nats.aio.client.Client)
        assert isinstance(subscription, nats.aio.subscription.Subscription)
        assert isinstance(message, nats.aio.msg.Msg)
        assert message == nats.aio.msg.Msg(nc, "a", "", b"x", {"A": "b"}, _sid=subscription._id)
        await nc.close()

    run(main)


def test_ways_of_waiting_and_loops(nsnd: Server, consumption: str, loops: str) -> None:
    async def main() -> None:
        one, two = await connect(nsnd, qos={"consumption": consumption}), await connect(nsnd, qos={"consumption": consumption})

        async def answer(message: Any) -> None:
            await message.respond(message.data)

        await two.subscribe("service", cb=answer)
        subscription = await two.subscribe("stream")
        for number in range(50):
            assert (await one.request("service", b"%d" % number, timeout=5)).data == b"%d" % number
            await one.publish("stream", b"%d" % number)
        assert [int((await subscription.next_msg(5)).data) for _ in range(50)] == list(range(50))
        with pytest.raises(nats.errors.TimeoutError):
            await subscription.next_msg(0.05)
        await one.close()
        await two.close()

    run(main, loops)


@pytest.mark.parametrize("consumption", ["adaptive", "poll"])
def test_spinning_starves_nobody(nsnd: Server, consumption: str) -> None:
    async def main() -> None:
        nc = await connect(nsnd, qos={"consumption": consumption})
        subscription = await nc.subscribe("a")
        rounds, gaps = 0, [0.0]

        async def other() -> None:
            nonlocal rounds
            last = time.monotonic()
            while True:
                await asyncio.sleep(0.001)
                rounds += 1
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

        task = asyncio.create_task(other())
        end = time.monotonic() + 0.5
        while time.monotonic() < end:  # messages to itself: every next_msg finds one without sleeping
            await nc.publish("a", b"x")
            await subscription.next_msg(1)
        task.cancel()
        assert rounds > 30
        start = time.monotonic()
        with pytest.raises(nats.errors.TimeoutError):
            await subscription.next_msg(0.05)
        assert 0.04 < time.monotonic() - start < 2
        await nc.close()

    run(main)


@pytest.mark.parametrize("consumption", ["adaptive", "poll"])
def test_messages_that_come_one_by_one_hold_up_nobody_else(
    nsnd: Server, program: Callable[[str], subprocess.Popen[str]], consumption: str
) -> None:
    program("""
        import asyncio, sys, insane_nats

        async def main():
            nc = await insane_nats.connect(sys.argv[1])
            print("ready", flush=True)
            while True:
                try:
                    await nc.request("service", b"x", timeout=20)
                except insane_nats.errors.NoRespondersError:
                    await asyncio.sleep(0.01)

        asyncio.run(main())
    """)

    async def main() -> None:
        nc = await connect(nsnd, qos={"consumption": consumption})
        loop = asyncio.get_running_loop()
        here, there = socket.socketpair()
        here.setblocking(False)
        answered = ticks = received = soon = 0
        closing = False

        async def answer(message: Any) -> None:
            nonlocal answered
            answered += 1
            await message.respond(b"y")
            if closing:
                await nc.close()

        def received_one() -> None:
            nonlocal received
            received += len(here.recv(1))

        def called_soon() -> None:
            nonlocal soon
            soon += 1

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        def elsewhere() -> None:
            for _ in range(100):
                there.send(b"z")
                loop.call_soon_threadsafe(called_soon)
                time.sleep(0.002)

        await nc.subscribe("service", cb=answer)
        await until(lambda: answered)
        loop.add_reader(here, received_one)
        task = asyncio.create_task(tick())
        before = answered
        await asyncio.to_thread(elsewhere)
        assert answered > before + 100 and ticks > 20
        await until(lambda: received == soon == 100, 2)
        closing = True
        await until(lambda: nc.is_closed)
        task.cancel()
        loop.remove_reader(here)
        here.close()
        there.close()

    run(main)


def test_a_request_that_was_answered_while_the_loop_went_round_spins_no_more(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd, qos={"consumption": "poll"})
        done: list[bool] = []

        def look(timeout: float | None) -> int:
            done.extend(answer.done() for answer in nc._resp_map.values())
            return PASS_DUE

        async def answer(message: Any) -> None:
            await message.respond(message.data)

        await nc.subscribe("service", cb=answer)
        assert (await nc.request("service", b"first")).data == b"first"
        nc._pump.look = look
        for number in range(20):
            assert (await nc.request("service", b"%d" % number)).data == b"%d" % number
        assert done
        assert not any(done)
        await nc.close()

    run(main)


def test_on_a_loop_that_shows_no_tasks_one_request_does_not_hold_up_the_others(
    nsnd: Server, program: Callable[[str], subprocess.Popen[str]], consumption: str
) -> None:
    program("""
        import asyncio, sys, insane_nats

        async def main():
            nc = await insane_nats.connect(sys.argv[1])
            async def answer(message):
                await message.respond(message.data)
            await nc.subscribe("service", cb=answer)
            await nc.flush()
            print("ready", flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
    """)

    async def main() -> None:
        nc = await connect(nsnd, qos={"consumption": consumption})
        look, in_flight = nc._pump.look, []

        def noted(timeout: float | None) -> int:
            in_flight.append(len(nc._resp_map))
            return int(look(timeout))

        async def ask() -> None:
            for number in range(100):
                assert (await nc.request("service", b"%d" % number, timeout=20)).data == b"%d" % number

        nc._pump.look = noted
        await asyncio.gather(*[ask() for _ in range(8)])
        assert set(in_flight) <= {1}  # who spins is alone
        await ask()
        assert in_flight or consumption != "poll"
        await nc.close()

    run(main, "uvloop")


def test_idle_connection_uses_no_cpu(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        subscription = await nc.subscribe("a")
        await nc.publish("a", b"x")
        await subscription.next_msg(5)
        waiting = asyncio.create_task(subscription.next_msg(60))
        await asyncio.sleep(2.5)  # idle memory has been given back
        before = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - before < 0.01
        waiting.cancel()
        await nc.close()

    run(main)


def test_publish_lets_the_loop_go_round(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        sent = 0
        turns: list[tuple[int, float]] = []  # of the loop: what was sent by then, and the processor's time that it took

        async def other() -> None:
            while True:
                turns.append((sent, time.thread_time()))
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        await asyncio.sleep(0)
        for size in (64, 1 << 20):
            turns.clear()
            start = time.monotonic()
            while len(turns) < 10 and time.monotonic() - start < 10:
                await nc.publish("nobody", b"x" * size)
                sent += size
            assert len(turns) == 10
            for (bytes_before, before), (bytes_then, then) in itertools.pairwise(turns):
                assert bytes_then - bytes_before <= (2 << 20) + size
                assert then - before < 0.05  # seconds, for 0.005
        task.cancel()
        await nc.close()

    run(main)


def test_cancelling_next_msg_at_any_moment_loses_nothing(nsnd: Server) -> None:
    async def main() -> None:
        sender, nc = await connect(nsnd), await connect(nsnd)
        subscription = await nc.subscribe("a")
        got: list[int] = []

        async def take() -> None:
            got.append(int((await subscription.next_msg(5)).data))

        for number in range(300):
            waiting = asyncio.create_task(take())
            for _ in range(number % 4):
                await asyncio.sleep(0)
            await sender.publish("a", b"%d" % number)
            for _ in range(number % 7):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        while len(got) < 300:
            await take()
        assert got == list(range(300))
        await sender.close()
        await nc.close()

    run(main)


def test_callbacks_come_one_after_the_other(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        got: list[int] = []
        inside = 0

        async def take(message: Any) -> None:
            nonlocal inside
            inside += 1
            assert inside == 1
            if len(got) % 3 == 0:
                await asyncio.sleep(0)
            got.append(int(message.data))
            inside -= 1

        await nc.subscribe("a", cb=take)
        for number in range(3000):
            await nc.publish("a", b"%d" % number)
        await until(lambda: len(got) == 3000)
        assert got == list(range(3000))
        await nc.close()

    run(main)


# --- what nats-py does in its own delivery


def test_msg_class_is_honoured(nsnd: Server) -> None:
    class Own(nats.aio.msg.Msg):
        pass

    class OwnClient(insane_nats.NATS):
        msg_class = Own

    async def main() -> None:
        nc = OwnClient()
        await nc.connect(nsnd.url)
        subscription = await nc.subscribe("a")
        await nc.publish("a", b"x", reply="b")
        message = await subscription.next_msg(5)
        assert (type(message), message.subject, message.reply, message.data) == (Own, "a", "b", b"x")
        await nc.close()

    run(main)


def test_own_process_msg_sees_every_message(nsnd: Server) -> None:
    seen: list[bytes] = []

    class OwnClient(insane_nats.NATS):
        async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
            await asyncio.sleep(0)
            seen.append(data)
            await super()._process_msg(sid, subject, reply, data, headers)

    async def main() -> None:
        nc = OwnClient()
        await nc.connect(nsnd.url)
        subscription = await nc.subscribe("a")
        for number in range(100):
            await nc.publish("a", b"%d" % number, headers={"A": "b"})
        await nc.flush()
        assert subscription.pending_msgs == 100
        messages = [await subscription.next_msg(5) for _ in range(100)]
        assert [message.data for message in messages] == seen == [b"%d" % number for number in range(100)]
        assert messages[0].headers == {"A": "b"}
        assert (nc.stats["in_msgs"], nc.stats["in_bytes"]) == (100, sum(map(len, seen)))
        await nc.close()

    run(main)


def test_jetstream_subscription_goes_through_nats_pys_delivery(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        subscription = await nc.subscribe("deliver")
        tracked: list[str] = []
        subscription._jsi = types.SimpleNamespace(
            _active=False, _ordered=False, track_sequences=tracked.append, get_js_delivered=lambda: 0, _fciseq=0
        )
        flow = await nc.subscribe("flow")
        await nc.publish("deliver", b"x", reply="tracked.s.c.1.1.1.1.0")
        # A flow control request, as a server sends it, is answered and not delivered.
        nc._pump.deliver_status(subscription, "deliver", b"NATS/1.0 100 FlowControl Request\r\n\r\n")
        await nc.flush()
        assert subscription._jsi._active
        assert tracked == ["tracked.s.c.1.1.1.1.0"]
        assert (await subscription.next_msg(5)).data == b"x"
        assert subscription.pending_msgs == 0
        await flow.unsubscribe()
        await nc.close()

    run(main)


def test_sid_can_change_as_ordered_consumers_do(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        subscription = await nc.subscribe("old")
        old = subscription._id
        nc._remove_sub(old)
        nc._sid += 1
        nc._subs[nc._sid] = subscription
        subscription._id = nc._sid
        await nc._send_unsubscribe(old)
        subscription._subject = "new"
        await nc._send_subscribe(subscription)
        await nc.publish("old", b"1")
        await nc.publish("new", b"2")
        assert (await subscription.next_msg(5)).data == b"2"
        assert subscription.pending_msgs == 0
        await nc.close()

    run(main)


# --- loops, threads, processes


def test_connections_on_loops_of_several_threads(nsnd: Server) -> None:
    results: list[int] = []

    def work(name: str) -> None:
        async def main() -> None:
            nc = await connect(nsnd)

            async def answer(message: Any) -> None:
                await message.respond(message.data)

            await nc.subscribe(name, cb=answer)
            results.append(sum([int((await nc.request(name, b"1", timeout=10)).data) for _ in range(100)]))
            await nc.close()

        run(main)

    threads = [threading.Thread(target=work, args=(f"service.{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [100] * 4


def test_after_fork_the_connection_says_what_to_do_and_a_new_one_works(nsnd: Server) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        subscription = await nc.subscribe("a")
        child = await asyncio.to_thread(fork, nc, subscription)
        await nc.publish("a", b"x")
        assert (await subscription.next_msg(5)).data == b"x"
        assert child == "ok"
        await nc.close()

    def fork(nc: Client, subscription: Any) -> str:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            words = "?"
            try:
                words = in_child(nc, subscription)
            except BaseException as error:
                words = repr(error)
            finally:
                os.write(writing, words.encode())
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            words = pipe.read()
        os.waitpid(pid, 0)
        return words

    def target(fd: str) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # that by which they are listed
            return ""

    def in_child(nc: Client, subscription: Any) -> str:
        async def inherited() -> None:
            assert nc.is_closed
            assert not [name for name in map(target, os.listdir("/proc/self/fd")) if "/log." in name or "/nsnd.sock" in name]
            for call in (
                lambda: nc.publish("a", b"x"),
                lambda: nc.subscribe("a"),
                lambda: nc.request("a", b"x"),
                nc.flush,
                nc.drain,
                subscription.next_msg,
                subscription.unsubscribe,
            ):
                with pytest.raises(nats.errors.ConnectionClosedError, match="before fork") as caught:
                    await call()
                assert isinstance(caught.value, InheritedConnectionError)
            await nc.close()
            fresh = await connect(nsnd)
            mine = await fresh.subscribe("b")
            await fresh.publish("b", b"x")
            assert (await mine.next_msg(5)).data == b"x"
            await fresh.close()

        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        asyncio._set_running_loop(None)
        loop.run_until_complete(inherited())
        return "ok"

    run(main)


def test_connection_that_is_dropped_is_closed(nsnd: Server) -> None:
    async def main() -> Any:
        nc = await connect(nsnd)
        return weakref.ref(nc._session)

    session = asyncio.run(main())
    gc.collect()
    assert session() is None


def test_program_that_ends_without_close_has_published(nsnd: Server, program: Callable[[str], subprocess.Popen[str]]) -> None:
    async def main() -> None:
        nc = await connect(nsnd)
        subscription = await nc.subscribe("a")
        program(
            """
            import asyncio, sys, insane_nats
            async def main():
                nc = await insane_nats.connect(sys.argv[1])
                for number in range(100):
                    await nc.publish("a", b"%d" % number)
                print("published", flush=True)
            asyncio.run(main())
            """
        )
        assert [int((await subscription.next_msg(5)).data) for _ in range(100)] == list(range(100))
        await nc.close()

    run(main)


# --- a subscriber that does not run

STOPPED = """
    import asyncio, sys, insane_nats
    async def main():
        async def report(error):
            print("error", type(error).__name__, getattr(error, "dropped", ""), flush=True)
        numbers = []
        async def take(message):
            if message.subject == "big.end":
                print("end" if numbers == sorted(numbers) else "disorder", flush=True)
            else:
                numbers.append(int.from_bytes(message.data[:4], "big"))
        nc = await insane_nats.connect(sys.argv[1], error_cb=report)
        await nc.subscribe("big.*", cb=take)
        print("ready", flush=True)
        await asyncio.sleep(60)
    asyncio.run(main())
"""
CHUNK = 512 << 10


def test_publisher_waits_for_a_full_link_and_goes_on_when_there_is_room(
    nsnd: Server, program: Callable[[str], subprocess.Popen[str]]
) -> None:
    async def main() -> None:
        slow = program(STOPPED)
        nc = await connect(nsnd, write_deadline=30)
        own = await nc.subscribe("own")
        slow.send_signal(signal.SIGSTOP)
        finished: list[int] = []

        async def publish(number: int) -> None:
            await nc.publish("big.data", number.to_bytes(4, "big") + b"x" * CHUNK)
            finished.append(number)

        publishing = [asyncio.create_task(publish(number)) for number in range(160)]  # 80 MiB
        await until(lambda: nc._pump.space_waiters)
        # Who publishes to somebody else waits behind those who were first; own links are drained meanwhile.
        last = asyncio.create_task(nc.publish("own", b"x"))
        await asyncio.sleep(0.1)
        assert not last.done()
        slow.send_signal(signal.SIGCONT)
        await asyncio.gather(*publishing, last)
        assert sorted(finished) == list(range(160))
        assert (await own.next_msg(5)).data == b"x"
        await nc.publish("big.end")
        assert slow.stdout is not None
        assert await asyncio.to_thread(slow.stdout.readline) == "end\n"
        await nc.close()

    run(main)


def test_past_the_write_deadline_the_subscriber_is_given_up_and_told(
    nsnd: Server, program: Callable[[str], subprocess.Popen[str]]
) -> None:
    async def main() -> None:
        reported: list[Exception] = []

        async def report(error: Exception) -> None:
            reported.append(error)

        slow = program(STOPPED)
        nc = await connect(nsnd, write_deadline=0.3, error_cb=report)
        slow.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        waits = 0
        for _ in range(200):  # 100 MiB
            before = time.monotonic()
            await nc.publish("big.data", b"x" * CHUNK)
            waits += time.monotonic() - before > 0.25
        assert waits == 1
        assert time.monotonic() - start < 20
        assert not reported
        slow.send_signal(signal.SIGCONT)
        assert slow.stdout is not None
        words = (await asyncio.to_thread(slow.stdout.readline)).split()
        assert words[:2] == ["error", SessionSlowConsumerError.__name__]
        assert int(words[2]) == 200
        await nc.publish("big.end")
        assert await asyncio.to_thread(slow.stdout.readline) == "end\n"
        await nc.close()

    run(main)


def test_close_ends_a_publisher_that_waits(nsnd: Server, program: Callable[[str], subprocess.Popen[str]]) -> None:
    async def main() -> None:
        slow = program(STOPPED)
        nc = await connect(nsnd)
        slow.send_signal(signal.SIGSTOP)

        async def publish() -> None:
            while True:
                await nc.publish("big.data", b"x" * CHUNK)

        publishing = asyncio.create_task(publish())
        await until(lambda: nc._pump.space_waiters)
        start = time.monotonic()
        await nc.close()
        assert time.monotonic() - start < shim_connection.CLOSE_S + 2
        with pytest.raises(nats.errors.ConnectionClosedError):
            await publishing

    run(main)


def test_unreliable_publisher_never_waits(nsnd: Server, program: Callable[[str], subprocess.Popen[str]]) -> None:
    async def main() -> None:
        slow = program(STOPPED)
        nc = await insane_nats.connect(f"{nsnd.url}?reliability=unreliable")
        slow.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        for _ in range(200):
            await nc.publish("big.data", b"x" * CHUNK)
        assert time.monotonic() - start < 8
        assert nc.session_counters["dropped"] > 0
        await nc.close()

    run(main)
