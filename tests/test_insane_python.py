"""INSANE's primitives in Python: buffers and their lifetime, waiting in every way, threads, deaths of nsnd."""

from __future__ import annotations

import asyncio
import errno
import gc
import operator
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import insane_nats
from insane_nats import insane
from tests import insane as programs
from tools import servers

CHANNEL = 7


class Pair:
    """Two sessions: one emits on a channel that the other consumes from."""

    def __init__(self, port: int, **policies: str) -> None:
        self.a, self.b = insane.Session(port, name="a"), insane.Session(port, name="b")
        self.sink = self.b.create_stream(**policies).create_sink(CHANNEL)
        self.source = self.a.create_stream(**policies).create_source(CHANNEL)

    def close(self) -> None:
        self.a.close()
        self.b.close()


@pytest.fixture
def pair(nsnd: servers.Server) -> Iterator[Pair]:
    made = Pair(nsnd.port)
    yield made
    made.close()


@pytest.mark.parametrize("consumption", ["low", "adaptive", "poll"])
@pytest.mark.parametrize("size", [0, 1, 64, 8192, 8193, 1_000_000])
def test_message_arrives_as_it_was_written(nsnd: servers.Server, consumption: str, size: int) -> None:
    pair = Pair(nsnd.port, consumption=consumption)
    expected = os.urandom(size)
    buffer = pair.source.get_buffer(size)
    assert len(buffer) == size
    buffer.data[:] = expected
    assert pair.source.outcome(pair.source.emit(buffer)) == 1
    with pair.sink.consume(timeout=10) as got:
        assert bytes(got) == expected
        assert got.data.readonly
    pair.close()


def test_length_cuts_and_order_is_kept(pair: Pair) -> None:
    for number in range(1000):
        buffer = pair.source.get_buffer(100)
        buffer[:4] = number.to_bytes(4, "big")
        pair.source.emit(buffer, length=4)
    assert pair.sink.available() > 0
    for number in range(1000):
        with pair.sink.consume(timeout=10) as got:
            assert bytes(got) == number.to_bytes(4, "big")
    assert pair.sink.consume_nowait() is None
    assert pair.sink.available() == 0


def test_used_after_release_or_emission_raises(pair: Pair) -> None:
    buffer = pair.source.get_buffer(10)
    view = buffer.data
    pair.source.emit(buffer)
    assert buffer.released
    for use in (len, bytes, pair.source.emit, operator.itemgetter(0), operator.attrgetter("data")):
        with pytest.raises(insane.ReleasedError, match="released or emitted"):
            use(buffer)
    with pytest.raises(ValueError, match="released memoryview"):
        bytes(view)
    with pair.sink.consume(timeout=10) as got:
        pass
    with pytest.raises(insane.ReleasedError):
        got.data  # noqa: B018
    got.release()  # twice is no error


def test_forgotten_buffer_comes_back_with_a_warning(pair: Pair) -> None:
    with pytest.warns(ResourceWarning, match="neither released nor emitted"):
        pair.source.get_buffer(200_000)
    pair.source.send(b"x")
    with pytest.warns(ResourceWarning, match="neither released nor emitted"):
        pair.sink.consume(timeout=10)


def test_forgotten_buffers_memory_is_used_again(pair: Pair) -> None:
    """256 MiB are all that a session may have out; ten times that many are taken and forgotten."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(2560):
            pair.source.get_buffer(1_000_000)


def test_all_memory_held_is_an_error_that_says_so(pair: Pair) -> None:
    held: list[insane.Buffer] = []
    with pytest.raises(insane.InsaneError, match="budget") as caught:
        held.extend(pair.source.get_buffer(1_000_000) for _ in range(1000))
    assert caught.value.errno == errno.ENOBUFS
    assert len(held) > 200
    for buffer in held:
        buffer.release()
    pair.source.get_buffer(1_000_000).release()


def test_view_keeps_a_buffer_from_being_given_away(pair: Pair) -> None:
    buffer = pair.source.get_buffer(10)
    part = buffer.data[2:4]
    with pytest.raises(BufferError, match="emitted while a slice or an array views it"):
        pair.source.emit(buffer)
    with pytest.raises(BufferError, match="released while"):
        buffer.release()
    part[:] = b"ab"
    assert bytes(buffer)[2:4] == b"ab"  # it is still the caller's
    part.release()
    assert pair.source.outcome(pair.source.emit(buffer)) == 1
    pair.sink.consume(timeout=10).release()


def test_view_that_outlives_its_with_block_stays_valid(pair: Pair) -> None:
    pair.source.send(b"x" * 100_000)
    with pytest.warns(ResourceWarning, match="still viewed behind its with block"), pair.sink.consume(timeout=10) as got:
        part = got.data[10:20]
    assert got.released
    pair.close()
    assert bytes(part) == b"x" * 10  # also when the session is closed
    del part
    gc.collect()


def test_buffer_outlives_its_session(pair: Pair) -> None:
    pair.source.send(b"y" * 100_000)
    got = pair.sink.consume(timeout=10)
    pair.close()
    assert bytes(got[:3]) == b"yyy"
    got.release()
    with pytest.raises(insane.ClosedError, match="session is closed"):
        pair.sink.consume(timeout=1)


def test_consumed_buffer_can_be_emitted(nsnd: servers.Server) -> None:
    """As INSANE's echo does, small and large."""
    a, b = insane.Session(nsnd.port), insane.Session(nsnd.port)
    forth, back = a.create_stream().create_source(1), a.create_stream().create_sink(1)
    stream = b.create_stream()
    sink, source = stream.create_sink(1), stream.create_source(1)
    for size in (64, 300_000):
        forth.send(b"z" * size)
        source.emit(sink.consume(timeout=10))
        with back.consume(timeout=10) as got:
            assert bytes(got) == b"z" * size
    assert sink.consume_nowait() is None  # a session does not hear itself
    a.close()
    b.close()


def test_any_number_of_buffers_may_be_held(pair: Pair) -> None:
    held = [pair.source.get_buffer(64) for _ in range(20_000)]
    for number, buffer in enumerate(held):
        buffer[:4] = number.to_bytes(4, "big")
    for buffer in held:
        pair.source.emit(buffer, length=4)
    got = [pair.sink.consume(timeout=10) for _ in range(20_000)]
    assert [int.from_bytes(one, "big") for one in map(bytes, got)] == list(range(20_000))
    for one in got:
        one.release()


def test_wrong_arguments_are_named(nsnd: servers.Server, pair: Pair) -> None:
    with pytest.raises(ValueError, match="1 to 65535, not 70000"):
        insane.Session(70000)
    with pytest.raises(ValueError, match="QoS policy consumption cannot be 'fast'"):
        pair.a.create_stream(consumption="fast")
    with pytest.raises(ValueError, match="0 to 4294967294"):
        pair.a.create_stream().create_sink(2**32 - 1)
    buffer = pair.source.get_buffer(10)
    with pytest.raises(ValueError, match="length is 11, and the buffer has 10 bytes"):
        pair.source.emit(buffer, length=11)
    other = pair.b.create_stream().create_source(1)
    with pytest.raises(ValueError, match="another session's"):
        other.emit(buffer)
    buffer.release()
    with pytest.raises(insane.InsaneError, match="more than the node's max_payload") as caught:
        pair.source.get_buffer(pair.a.max_payload + 1)
    assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(insane.InsaneError, match="last 256 emissions"):
        pair.source.outcome(12345)


def test_timeout_is_kept(pair: Pair) -> None:
    for wait in (0.0, 0.2):
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match="channel 7"):
            pair.sink.consume(timeout=wait)
        assert wait <= time.monotonic() - begin < wait + 5


def test_blocking_call_releases_the_gil_and_close_ends_it(pair: Pair) -> None:
    caught: list[BaseException] = []
    waits = threading.Event()

    def wait() -> None:
        waits.set()
        try:
            pair.sink.consume()
        except insane.ClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(10)
    pair.b.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(caught) == 1


def test_each_thread_with_a_session_of_its_own(nsnd: servers.Server) -> None:
    """A ring of threads hands a number on, each to the next channel."""
    count, rounds = 4, 100
    ready = threading.Barrier(count)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with insane.Session(nsnd.port, name=f"thread {number}") as session:
                stream = session.create_stream(consumption="low")
                sink, source = stream.create_sink(number), stream.create_source((number + 1) % count)
                ready.wait(30)
                if number == 0:
                    source.send((0).to_bytes(4, "big"))
                for turn in range(rounds):
                    with sink.consume(timeout=30) as got:
                        value = int.from_bytes(bytes(got), "big")
                    assert value == (turn * count + (number - 1) % count if number else turn * count + count - 1)
                    if not (number == 0 and turn == rounds - 1):
                        source.send((value + 1).to_bytes(4, "big"))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


@pytest.mark.parametrize("consumption", ["low", "poll"])
def test_threads_share_a_session(nsnd: servers.Server, consumption: str) -> None:
    """Each waits for a sink of its own; whoever of them receives hands the others their messages."""
    with insane.Session(nsnd.port) as a, insane.Session(nsnd.port) as b:
        stream = b.create_stream(consumption=consumption)
        sinks = [stream.create_sink(channel) for channel in range(4)]
        sources = [a.create_stream().create_source(channel) for channel in range(4)]
        got: list[list[int]] = [[] for _ in sinks]

        def take(number: int) -> None:
            for _ in range(200):
                with sinks[number].consume(timeout=30) as buffer:
                    got[number].append(int.from_bytes(bytes(buffer), "big"))

        threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for value in range(200):
            for source in sources:
                source.send(value.to_bytes(4, "big"))
        for thread in threads:
            thread.join(60)
        assert got == [list(range(200))] * 4


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_awaited_from_several_tasks(nsnd: servers.Server, loop: str) -> None:
    async def run() -> None:
        with insane.Session(nsnd.port) as a, insane.Session(nsnd.port) as b:
            stream = b.create_stream(consumption="low")
            sinks = [stream.create_sink(channel) for channel in range(3)]
            sources = [a.create_stream().create_source(channel) for channel in range(3)]

            async def take(sink: insane.Sink) -> list[bytes]:
                taken = []
                for _ in range(50):
                    with await sink.consume_async(timeout=30) as buffer:
                        taken.append(bytes(buffer))
                return taken

            tasks = [asyncio.create_task(take(sink)) for sink in sinks]
            for value in range(50):
                for source in sources:
                    source.send(str(value).encode())
                await asyncio.sleep(0)
            for task in tasks:
                assert await task == [str(value).encode() for value in range(50)]

    if loop == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        uvloop.run(run())
    else:
        asyncio.run(run())


def test_await_ends_at_timeout_cancellation_and_close(nsnd: servers.Server) -> None:
    async def run() -> None:
        with insane.Session(nsnd.port) as a, insane.Session(nsnd.port) as b:
            sink = b.create_stream(consumption="low").create_sink(CHANNEL)
            source = a.create_stream().create_source(CHANNEL)
            with pytest.raises(TimeoutError):
                await sink.consume_async(timeout=0.05)
            cancelled = asyncio.create_task(sink.consume_async())
            other = asyncio.create_task(sink.consume_async())
            await asyncio.sleep(0.01)
            source.send(b"one")
            cancelled.cancel()
            with await asyncio.wait_for(other, 30) as got:  # the message is not lost with the task
                assert bytes(got) == b"one"
            waits = asyncio.create_task(anext(aiter(sink)))
            await asyncio.sleep(0.01)
            b.close()
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(waits, 30)

    asyncio.run(run())


def test_a_blocked_thread_and_an_awaiting_task_on_one_session(nsnd: servers.Server) -> None:
    async def run() -> None:
        with insane.Session(nsnd.port) as a, insane.Session(nsnd.port) as b:
            stream = b.create_stream(consumption="low")
            awaited, blocked = stream.create_sink(1), stream.create_sink(2)
            to_awaited, to_blocked = (a.create_stream().create_source(channel) for channel in (1, 2))
            loop = asyncio.get_running_loop()
            for _ in range(30):
                task = asyncio.create_task(awaited.consume_async(timeout=30))
                future = loop.run_in_executor(None, blocked.consume, 30)
                await asyncio.sleep(0)
                to_awaited.send(b"a")
                to_blocked.send(b"b")
                (await task).release()
                (await future).release()

    asyncio.run(run())


def test_insane_and_nats_hear_each_other(nsnd: servers.Server) -> None:
    async def run() -> None:
        client = await insane_nats.connect(nsnd.url)
        subscription = await client.subscribe(f"$INSANE.{CHANNEL}")
        with insane.Session(nsnd.port) as session:
            stream = session.create_stream()
            sink, source = stream.create_sink(CHANNEL), stream.create_source(CHANNEL)
            source.send(b"from INSANE")
            message = await subscription.next_msg(timeout=10)
            assert (message.subject, message.data) == (f"$INSANE.{CHANNEL}", b"from INSANE")
            await subscription.unsubscribe()
            await client.publish(f"$INSANE.{CHANNEL}", b"from NATS", headers={"a": "b"})
            with await sink.consume_async(timeout=10) as got:
                assert bytes(got) == b"from NATS"
        await client.close()

    asyncio.run(run())


def was_lost(source: insane.Source, token: int) -> bool:
    try:
        return source.outcome(token) != 1
    except insane.InsaneError as error:
        return error.errno == errno.ENOBUFS


def test_unreliable_stream_drops_and_says_so(nsnd: servers.Server, tmp_path: Path) -> None:
    with insane.Session(nsnd.port) as a, insane.Session(nsnd.port) as b:
        sink = b.create_stream().create_sink(CHANNEL)
        source = a.create_stream(reliability="unreliable").create_source(CHANNEL)
        lost = 0
        for _ in range(100):  # 64 MiB are what a link holds
            token = source.send(bytes(1_000_000))
            lost += was_lost(source, token)
        assert 20 < lost < 60
        for _ in range(100 - lost):
            sink.consume(timeout=10).release()
        assert sink.consume_nowait() is None


def test_reliable_stream_waits_and_loses_nothing(nsnd: servers.Server) -> None:
    with insane.Session(nsnd.port) as a, insane.Session(nsnd.port) as b:
        sink = b.create_stream(consumption="low").create_sink(CHANNEL)
        source = a.create_stream().create_source(CHANNEL)
        seen = []

        def take() -> None:
            for _ in range(200):
                with sink.consume(timeout=30) as buffer:
                    seen.append(int.from_bytes(bytes(buffer[:4]), "big"))

        thread = threading.Thread(target=take)
        for number in range(60):
            source.send(number.to_bytes(4, "big") + bytes(999_996))
        thread.start()
        for number in range(60, 200):
            assert source.outcome(source.send(number.to_bytes(4, "big") + bytes(999_996))) == 1
        thread.join(60)
        assert seen == list(range(200))


def test_application_id_from_the_configuration(nsnd: servers.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INSANE_APP_CONFIG", raising=False)
    with pytest.raises(insane.InsaneError, match=r"there is no nsn-app.cfg: write one .* INSANE_APP_CONFIG"):
        insane.Session()
    programs.configure(tmp_path, nsnd.port, "echo = true\n")
    with insane.Session() as session:
        assert session.application_id == nsnd.port
        stream = session.create_stream()
        sink = stream.create_sink(1)
        stream.create_source(1).send(b"to myself")
        with sink.consume(timeout=10) as got:
            assert bytes(got) == b"to myself"
    elsewhere = tmp_path / "other.cfg"
    elsewhere.write_text("[app]\nl4_port = many\n")
    monkeypatch.setenv("INSANE_APP_CONFIG", str(elsewhere))
    with pytest.raises(insane.InsaneError, match=r"other.cfg:2: l4_port = many: allowed is a whole number from 1 to 65535"):
        insane.Session()


def test_autostart_and_what_forbids_it(runtime_dir: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSANE_NATS_AUTOSTART", "0")
    with pytest.raises(insane.InsaneError, match=rf"nobody serves application ID {free_port}.*INSANE_NATS_AUTOSTART=0 forbids"):
        insane.Session(free_port)
    monkeypatch.delenv("INSANE_NATS_AUTOSTART")
    with insane.Session(free_port) as session:
        assert session.attached
    assert (runtime_dir / "nsnd.sock").is_socket()


def test_a_nats_server_at_the_port_is_told_from_a_node(nats_server: servers.Server) -> None:
    with pytest.raises(insane.InsaneError, match="belongs to a NATS server") as caught:
        insane.Session(nats_server.port)
    assert caught.value.errno == errno.EADDRINUSE


def test_nothing_is_lost_while_nsnd_is_replaced(runtime_dir: Path, tmp_path: Path) -> None:
    with servers.nsnd(tmp_path, runtime_dir) as first:
        pair = Pair(first.port, consumption="low")
        pair.source.send(b"before")
        pair.sink.consume(timeout=10).release()
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait()
        pair.source.send(b"between")
        with pair.sink.consume(timeout=4) as got:
            assert bytes(got) == b"between"
        port = first.port
    command = [sys.executable, "-m", "nsnd", "--port", str(port)]
    with servers.serving(command, port, tmp_path, {**os.environ}):
        deadline = time.monotonic() + 20
        while not (pair.a.attached and pair.b.attached):
            assert time.monotonic() < deadline
            pair.source.send(b"after")
            pair.sink.consume(timeout=10).release()
        fresh = pair.a.create_stream().create_source(99)
        sink = pair.b.create_stream().create_sink(99)
        assert fresh.outcome(fresh.send(b"new channel")) == 1
        sink.consume(timeout=10).release()
        pair.close()


def test_blocking_call_ends_when_nsnd_is_gone(runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSANE_NATS_AUTOSTART", "0")
    with servers.nsnd(tmp_path, runtime_dir) as server:
        session = insane.Session(server.port)
        sink = session.create_stream(consumption="low").create_sink(CHANNEL)
    begin = time.monotonic()
    with pytest.raises(insane.InsaneError, match="nsnd is gone") as caught:
        sink.consume()
    assert caught.value.errno == errno.ENOTCONN
    assert 4 < time.monotonic() - begin < 15

    async def wait() -> None:
        with pytest.raises(insane.InsaneError, match="nsnd is gone"):
            await sink.consume_async()

    asyncio.run(wait())
    session.close()


def test_child_of_fork_cannot_use_the_session(pair: Pair) -> None:
    pair.source.send(bytes(100_000))
    held = pair.sink.consume(timeout=10)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            try:
                pair.source.send(b"x")
            except insane.InsaneError as error:
                status = 0 if error.errno == errno.ECHILD else 2
            try:
                held.data  # noqa: B018
            except insane.ReleasedError:
                pass
            else:
                status = 3
            held.release()
            pair.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.release()
    pair.source.send(b"still here")
    with pair.sink.consume(timeout=10) as got:
        assert bytes(got) == b"still here"


def test_interrupt_ends_a_wait(nsnd: servers.Server) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupt

    with insane.Session(nsnd.port) as session:
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for consumption in ("low", "poll"):
                sink = session.create_stream(consumption=consumption).create_sink(CHANNEL)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(Interrupt):
                    sink.consume(timeout=30)
        finally:
            signal.signal(signal.SIGALRM, before)


def test_session_that_is_forgotten_is_closed_with_a_warning(nsnd: servers.Server) -> None:
    with pytest.warns(ResourceWarning, match="was not closed"):
        insane.Session(nsnd.port)


def test_many_sessions_leave_no_descriptor(nsnd: servers.Server) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with insane.Session(nsnd.port):
        pass
    before = descriptors()
    for _ in range(30):
        pair = Pair(nsnd.port)
        pair.source.send(b"x")
        pair.sink.consume(timeout=10).release()
        pair.close()
    assert descriptors() == before


@pytest.mark.parametrize("other", ["python", "c"])
def test_ping_pong_example(nsnd: servers.Server, tmp_path: Path, other: str) -> None:
    programs.configure(tmp_path, nsnd.port)
    python = [sys.executable, str(programs.EXAMPLES / "pingpong.py")]
    peer = python if other == "python" else [str(programs.build(programs.EXAMPLES / "pingpong.c", tmp_path / "pingpong"))]
    pong = programs.start([*peer, "pong"], tmp_path)
    assert "100 round trips of 64 bytes" in programs.run([*python, "ping", "100"], tmp_path)
    programs.finish(pong)


@pytest.mark.parametrize("publisher", ["python", "c"])
@pytest.mark.parametrize("subscriber", ["python", "c"])
def test_pub_sub_examples(nsnd: servers.Server, tmp_path: Path, publisher: str, subscriber: str) -> None:
    programs.configure(tmp_path, nsnd.port)

    def command(name: str, language: str) -> list[str]:
        source = programs.EXAMPLES / name
        if language == "c":
            return [str(programs.build(source.with_suffix(".c"), tmp_path / name)), "20"]
        return [sys.executable, str(source.with_suffix(".py")), "20"]

    sub = programs.start(command("sub", subscriber), tmp_path)
    programs.run(command("pub", publisher), tmp_path)
    assert programs.finish(sub).splitlines() == [f"reading {number}" for number in range(20)]
