"""The hot path in C: its awaitables are coroutines, its messages nats-py's, nothing leaks, what is odd goes the slow way."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import gc
import inspect
import pickle
import sys
import weakref
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

import nats.aio.msg
import pytest
from nats import errors

import insane_nats
from insane_nats._fast import Ring
from insane_nats.shim.deadlines import MOST_LENGTHS, SWEPT_FROM, Deadlines
from insane_nats.shim.msg import Msg
from tools.servers import Server


def run(server: Server, body: Callable[[Any], Awaitable[None]], loops: str = "asyncio") -> None:
    async def main() -> None:
        client = await insane_nats.connect(server.url)
        try:
            await body(client)
        finally:
            await client.close()

    factory = pytest.importorskip("uvloop").new_event_loop if loops == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


# --- calls


@pytest.mark.parametrize("loops", ["asyncio", "uvloop"])
def test_publish_and_next_msg_are_coroutines_for_asyncio(nsnd: Server, loops: str) -> None:
    async def body(client: Any) -> None:
        sub = await client.subscribe("a")
        await asyncio.create_task(client.publish("a", b"1"))
        await asyncio.gather(client.publish("a", b"2"), client.publish(subject="a", payload=b"3", reply="", headers=None))
        await asyncio.wait_for(client.publish("a", payload=b"4"), 5)
        await asyncio.shield(client.publish("a", b"5", headers={"A": "b"}))
        first = await asyncio.create_task(sub.next_msg())
        rest = [await asyncio.create_task(sub.next_msg(timeout=5)) for _ in range(3)]
        rest.append(await asyncio.wait_for(sub.next_msg(5), 5))
        assert [message.data for message in (first, *rest)] == [b"1", b"2", b"3", b"4", b"5"]
        assert rest[-1].headers == {"A": "b"}
        call = client.publish("a", b"")
        assert asyncio.iscoroutine(call) and inspect.isawaitable(call)
        await call
        assert inspect.iscoroutinefunction(type(client).publish) and inspect.iscoroutinefunction(type(sub).next_msg)

    run(nsnd, body, loops)


def test_nothing_happens_before_it_is_awaited_and_that_is_warned_about(nsnd: Server) -> None:
    async def body(client: Any) -> None:
        sub = await client.subscribe("a")
        call = client.publish("a", b"x")
        await client.flush()
        assert sub.pending_msgs == 0
        with pytest.warns(RuntimeWarning, match=r"'Client\.publish' was never awaited"):
            del call
        call = client.publish("a", b"x")
        call.close()
        with pytest.raises(RuntimeError, match="already awaited"):
            await call
        call = client.publish("a", b"y")
        await call
        with pytest.raises(RuntimeError, match="already awaited"):
            await call
        with pytest.raises(RuntimeError, match="already awaited"):
            call.throw(KeyError())
        call.close()
        assert (call.__name__, call.__qualname__) == ("publish", "Client.publish")
        assert (await sub.next_msg()).data == b"y"

    run(nsnd, body)


def test_a_call_that_waits_can_be_cancelled_and_thrown_into(nsnd: Server) -> None:
    async def body(client: Any) -> None:
        sub = await client.subscribe("a")
        with pytest.raises(errors.TimeoutError):
            await sub.next_msg(timeout=0.01)  # from here on by way of C
        waiting = asyncio.create_task(sub.next_msg(timeout=None))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        call = sub.next_msg(timeout=None)
        with pytest.raises(KeyError, match="thrown"):
            call.throw(KeyError("thrown"))
        call = sub.next_msg(timeout=None)
        call.send(None)
        with pytest.raises(KeyError, match="thrown"):
            call.throw(KeyError("thrown"))
        await client.publish("a", b"x")
        assert (await sub.next_msg(5)).data == b"x"

    run(nsnd, body)


@pytest.mark.parametrize(
    ("arguments", "names", "words"),
    [
        ((), {}, "missing 1 required positional argument: 'subject'"),
        (("a", b"", "", None, 1), {}, "takes from 1 to 4"),
        (("a",), {"subject": "b"}, "multiple values for argument 'subject'"),
        (("a",), {"nonsense": 1}, "unexpected argument 'nonsense'"),
    ],
)
def test_wrong_arguments_are_type_errors(nsnd: Server, arguments: Any, names: Any, words: str) -> None:
    async def body(client: Any) -> None:
        with pytest.raises(TypeError, match=words):
            client.publish(*arguments, **names)
        with pytest.raises(TypeError, match="takes one argument: timeout"):
            (await client.subscribe("a"))._next_quickly(1, 2)

    run(nsnd, body)


def test_what_is_odd_goes_the_slow_way_and_arrives(nsnd: Server) -> None:
    class Text(str):
        pass

    async def body(client: Any) -> None:
        sub = await client.subscribe(">")
        sent: list[tuple[str, Any, dict[str, Any]]] = [
            (Text("a"), b"1", {}),
            ("ä.日本", b"2", {}),
            ("b", bytearray(b"3"), {}),
            ("b", memoryview(b"4"), {}),
            ("c", b"5", {"reply": Text("inbox")}),
            ("d", b"6", {"headers": {"K": "v"}}),
            ("e", b"7" * (1 << 20), {}),
        ]
        for subject, payload, more in sent:
            await client.publish(subject, payload, **more)
        for subject, payload, more in sent:
            message = await sub.next_msg(5)
            assert (message.subject, message.data) == (subject, bytes(payload))
            assert (message.reply, message.headers) == (more.get("reply", ""), more.get("headers"))
        for subject in ("", "a b", "a\tb", "a\r\n"):
            with pytest.raises(errors.BadSubjectError):
                await client.publish(subject)
        with pytest.raises(errors.MaxPayloadError):
            await client.publish("a", bytes((1 << 20) + 1))
        assert client.stats["out_msgs"] == client.stats["in_msgs"] == len(sent)

    run(nsnd, body)


def test_a_subclass_that_publishes_itself_is_asked(nsnd: Server) -> None:
    class Counting(insane_nats.NATS):
        published = 0

        async def publish(self, *arguments: Any, **names: Any) -> None:
            self.published += 1
            await super().publish(*arguments, **names)

    async def main() -> None:
        client = Counting()
        await client.connect(nsnd.url)

        async def answer(message: Any) -> None:
            await message.respond(b"pong")

        await client.subscribe("a", cb=answer)
        assert (await client.request("a", b"ping", timeout=5)).data == b"pong"
        assert client.published == 2
        await client.close()

    asyncio.run(main())


def test_closed_connection_publishes_no_more(nsnd: Server) -> None:
    async def main() -> None:
        client = await insane_nats.connect(nsnd.url)
        sub = await client.subscribe("a")
        publish, call, waiting = client.publish, client.publish("a"), sub.next_msg()
        await client.publish("a", b"x")
        assert (await waiting).data == b"x"
        await client.close()
        for late in (call, client.publish("a"), sub.next_msg(1), publish("a")):
            with pytest.raises(errors.ConnectionClosedError):
                await late
        await client.connect(nsnd.url)
        sub = await client.subscribe("a")
        await publish("a", b"again")  # as nats-py's bound method
        assert (await sub.next_msg()).data == b"again"
        await client.close()

    asyncio.run(main())


def test_limits_are_any_numbers(nsnd: Server) -> None:
    async def body(client: Any) -> None:
        limits: dict[str, Any]
        for limits in ({"pending_bytes_limit": 1.5}, {"pending_msgs_limit": 0.5}):
            lost: asyncio.Queue[Exception] = asyncio.Queue()
            client._error_cb = lost.put
            sub = await client.subscribe("a", **limits)
            for _ in range(2):
                await client.publish("a", b"x")
            await client.flush()
            assert sub.pending_msgs == 1 and isinstance(await lost.get(), errors.SlowConsumerError)
            await sub.unsubscribe()
        for limits in (
            {"pending_bytes_limit": float("inf"), "pending_msgs_limit": 1e300},
            {"pending_bytes_limit": 2**70, "pending_msgs_limit": 2**70},
            {"pending_bytes_limit": -1e300, "pending_msgs_limit": float("nan"), "max_msgs": 2**70},
        ):
            sub = await client.subscribe("a", **limits)
            await client.publish("a", b"x")
            assert (await sub.next_msg()).data == b"x"
            await sub.unsubscribe()

    run(nsnd, body)


def test_counters_may_be_replaced(nsnd: Server) -> None:
    async def body(client: Any) -> None:
        sub = await client.subscribe("a")
        client.stats = collections.Counter()
        await client.publish("a", b"x")
        assert (await sub.next_msg()).data == b"x"
        assert client.stats["out_msgs"] == client.stats["in_msgs"] == 1
        raised: list[Any] = []
        client.stats = {}
        with pytest.raises(KeyError, match="out_msgs"):
            await client.publish("a", b"y")
        with mock.patch("sys.unraisablehook", raised.append):
            assert (await sub.next_msg()).data == b"y"  # and delivery goes on
        assert [type(seen.exc_value) for seen in raised] == [KeyError]
        client.stats = {"in_msgs": 0, "out_msgs": 0, "in_bytes": 0, "out_bytes": 0}

    run(nsnd, body)


# --- messages


def test_message_is_nats_pys_dataclass() -> None:
    message = Msg("client", "a", "r", b"x", {"A": "b"}, _sid=7)  # type: ignore[arg-type]
    theirs = nats.aio.msg.Msg("client", "a", "r", b"x", {"A": "b"}, _sid=7)  # type: ignore[arg-type]
    assert message == theirs and theirs == message and repr(message) == repr(theirs)
    assert dataclasses.replace(message, data=b"y").data == b"y"
    assert dataclasses.asdict(message) == dataclasses.asdict(theirs)
    assert copy.copy(message) == message == pickle.loads(pickle.dumps(message))
    message.data, message.headers, message._ackd, message.own = b"z", None, True, "attribute"  # type: ignore[attr-defined]
    assert (message.data, message.headers, message.is_acked) == (b"z", None, True)
    assert message != theirs
    assert Msg("client") == nats.aio.msg.Msg("client")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unhashable"):
        hash(message)


def test_backlog_is_seen_by_the_garbage_collector(nsnd: Server) -> None:
    """Messages that only the queue knows of are not tracked one by one; a cycle through them is found all the same."""

    async def main() -> weakref.ref[Any]:
        client = await insane_nats.connect(nsnd.url)
        sub = await client.subscribe("a")
        for _ in range(100):
            await client.publish("a", b"x")
        await client.flush()
        assert sub.pending_msgs == 100
        assert not any(isinstance(one, Msg) and one._client is client for one in gc.get_objects())
        message = await sub.next_msg()
        assert gc.is_tracked(message)
        ring: Any = sub._pending_queue._queue  # type: ignore[attr-defined]
        assert sum(1 for _ in ring) == 99
        await client.close()
        return weakref.ref(client)

    client = asyncio.run(main())
    gc.collect()
    assert client() is None


@pytest.mark.parametrize("way", ["callback", "next_msg", "iterator", "request"])
def test_nothing_is_left_of_messages_that_went_through(nsnd: Server, way: str) -> None:
    async def body(client: Any) -> None:
        async def take(message: Any) -> None:
            if message.reply:
                await message.respond(message.data)

        sub = await client.subscribe("a", cb=take if way in ("callback", "request") else None)

        async def send(count: int) -> None:
            for _ in range(count):
                if way == "request":
                    await client.request("a", b"x", timeout=5)
                    continue
                await client.publish("a", b"x", headers={"A": "b"} if way == "callback" else None)
                if way == "next_msg":
                    await sub.next_msg(timeout=5)
                elif way == "iterator":
                    async for _message in sub.messages:
                        break
            await client.flush()
            await sub._pending_queue.join()

        await send(300)
        gc.collect()
        before = sys.getallocatedblocks()
        await send(2000)
        gc.collect()
        assert sys.getallocatedblocks() - before < 200

    run(nsnd, body)


# --- ring


def test_ring_is_a_queue() -> None:
    ring: Ring[int] = Ring()
    for turn in range(5):
        for number in range(3000):
            ring.append(number)
            if number % 3 == 0:
                assert ring.popleft() == number // 3
        assert len(ring) == 2000 and list(ring) == list(range(1000, 3000))
        if turn % 2:
            ring.clear()
        else:
            assert [ring.popleft() for _ in range(2000)] == list(range(1000, 3000))
        assert not ring
        with pytest.raises(IndexError):
            ring.popleft()


# --- deadlines


def test_waits_end_in_time_each_by_its_own_length() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop)
        began = loop.time()
        lengths = [0.01 * (index % 7 + 1) for index in range(40)] + [0.1 + index / 10_000 for index in range(2 * MOST_LENGTHS)]
        futures = [loop.create_future() for _ in lengths]
        ended: dict[int, float] = {}
        for index, (future, length) in enumerate(zip(futures, lengths, strict=True)):
            future.add_done_callback(lambda _, index=index: ended.setdefault(index, loop.time() - began))  # type: ignore[misc]
            deadlines.add(future, length)
        futures[3].set_result("in time")
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert results[3] == "in time"
        assert all(isinstance(result, errors.TimeoutError) for index, result in enumerate(results) if index != 3)
        assert all(ended[index] >= length for index, length in enumerate(lengths) if index != 3)
        assert not deadlines._waits

    asyncio.run(main())


def test_one_long_wait_keeps_nothing_of_those_that_are_over() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop)
        deadlines.add(loop.create_future(), 60)
        for _ in range(10 * SWEPT_FROM):
            future = loop.create_future()
            deadlines.add(future, 60)
            future.set_result(None)
        assert len(deadlines._waits[60]) <= SWEPT_FROM + 1

    asyncio.run(main())


# --- event loops


if sys.version_info >= (3, 12):  # before, asyncio has no eager tasks

    def test_eager_tasks_do_not_run_in_the_middle_of_a_delivery(nsnd: Server) -> None:
        async def body(client: Any) -> None:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
            other, slow = await client.subscribe("b"), await client.subscribe("a", pending_msgs_limit=1)
            seen: list[bytes] = []
            all_seen = asyncio.Event()

            async def receive(_: Exception) -> None:
                seen.append((await other.next_msg(1)).data)
                if len(seen) == 99:
                    all_seen.set()

            client._error_cb = receive
            for number in range(100):
                await client.publish("a", b"")
                await client.publish("b", str(number).encode())
            await asyncio.gather(client.flush(), client.flush(), client.flush())
            await asyncio.wait_for(all_seen.wait(), 10)
            assert seen == [str(number).encode() for number in range(99)] and slow.pending_msgs == 1

        run(nsnd, body)
