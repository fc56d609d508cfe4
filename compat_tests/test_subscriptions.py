"""The subscription object: callbacks, next_msg, iteration, futures, and its limits."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest

from compat_tests.backend import arrived, payloads, sync, taken, until

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

covers = pytest.mark.covers


async def publish(publisher: Client, subject: str, numbers: range) -> None:
    for number in numbers:
        await publisher.publish(subject, b"%d" % number)


@covers("api/subscribe-callback")
async def test_callback_gets_one_message_after_another(backend: Backend) -> None:
    nc = await backend.connect()
    inside = 0
    got: list[int] = []

    async def handler(message: Msg) -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        got.append(int(message.data))
        inside -= 1

    await nc.subscribe(backend.subject, cb=handler)
    await publish(nc, backend.subject, range(100))
    await until(lambda: len(got) == 100)
    assert got == list(range(100))


@covers("api/subscribe-callback")
async def test_waiting_callback_holds_up_no_other_subscription(backend: Backend) -> None:
    nc = await backend.connect()
    gate = asyncio.Event()
    blocked: list[int] = []
    free: list[int] = []

    async def waits(message: Msg) -> None:
        await gate.wait()
        blocked.append(int(message.data))

    async def runs(message: Msg) -> None:
        free.append(int(message.data))

    await nc.subscribe(backend.subject, cb=waits)
    await nc.subscribe(backend.subject, cb=runs)
    await publish(nc, backend.subject, range(20))
    await until(lambda: len(free) == 20)
    assert blocked == []
    gate.set()
    await until(lambda: len(blocked) == 20)
    assert blocked == free == list(range(20))


@covers("api/subscribe-callback-error")
async def test_exception_in_a_callback(backend: Backend) -> None:
    nc = await backend.connect()
    got: list[int] = []

    async def handler(message: Msg) -> None:
        got.append(int(message.data))
        if len(got) == 2:
            raise ZeroDivisionError("in the callback")

    await nc.subscribe(backend.subject, cb=handler)
    await publish(nc, backend.subject, range(4))
    await until(lambda: len(got) == 4)
    assert len(backend.take_errors(ZeroDivisionError)) == 1
    assert nc.is_connected


class Receiver:
    def __init__(self) -> None:
        self.got: list[bytes] = []

    async def method(self, message: Msg) -> None:
        self.got.append(bytes(message.data))

    async def with_argument(self, extra: int, message: Msg) -> None:
        assert extra == 7
        self.got.append(bytes(message.data))


@covers("api/subscribe-callback-kinds")
@pytest.mark.parametrize("kind", ["method", "partial"])
async def test_kinds_of_callbacks(backend: Backend, kind: str) -> None:
    nc = await backend.connect()
    receiver = Receiver()
    callback: Any = receiver.method if kind == "method" else functools.partial(receiver.with_argument, 7)
    await nc.subscribe(backend.subject, cb=callback)
    await nc.publish(backend.subject, b"x")
    await until(lambda: receiver.got)
    assert receiver.got == [b"x"]


@covers("api/subscribe-callback-kinds")
async def test_plain_functions_are_refused(backend: Backend) -> None:
    nc = await backend.connect()

    def handler(message: Msg) -> None:
        pass

    with pytest.raises(backend.nats.errors.Error, match="must use coroutine"):
        await nc.subscribe(backend.subject, cb=handler)  # type: ignore[arg-type]
    with pytest.raises(backend.nats.errors.Error, match="must use coroutine"):
        await nc.subscribe(backend.subject, cb=lambda message: handler(message))  # type: ignore[arg-type,return-value]


@covers("api/subscribe-reentrant")
async def test_callback_that_subscribes_and_unsubscribes(backend: Backend) -> None:
    nc = await backend.connect()
    got: list[bytes] = []

    async def second(message: Msg) -> None:
        got.append(bytes(message.data))

    async def first(message: Msg) -> None:
        await nc.subscribe(f"{backend.subject}.second", cb=second)
        await subscription.unsubscribe()
        await nc.publish(f"{backend.subject}.second", b"from the callback")

    subscription = await nc.subscribe(f"{backend.subject}.first", cb=first)
    await nc.publish(f"{backend.subject}.first", b"x")
    await until(lambda: got)
    await nc.publish(f"{backend.subject}.first", b"x")
    await arrived(nc, nc)
    assert got == [b"from the callback"]


@covers("api/subscribe-reentrant")
async def test_callback_that_flushes_and_requests(backend: Backend) -> None:
    nc = await backend.connect()
    got: list[bytes] = []

    async def answer(message: Msg) -> None:
        await message.respond(b"answer")

    async def handler(message: Msg) -> None:
        await nc.flush()
        got.append(bytes((await nc.request(f"{backend.subject}.answer", timeout=5)).data))

    await nc.subscribe(f"{backend.subject}.answer", cb=answer)
    await nc.subscribe(backend.subject, cb=handler)
    await publish(nc, backend.subject, range(5))
    await until(lambda: len(got) == 5)
    assert got == [b"answer"] * 5


@covers("api/subscribe-reentrant", "4.2/close-order")
async def test_callback_that_closes(backend: Backend) -> None:
    nc = await backend.connect()
    calls: list[int] = []

    async def handler(message: Msg) -> None:
        calls.append(1)
        await nc.close()

    await nc.subscribe(backend.subject, cb=handler)
    await publish(nc, backend.subject, range(3))
    await until(lambda: nc.is_closed)
    assert calls == [1]


@covers("api/subscribe-reentrant", "2.3/order")
async def test_ping_pong_in_callbacks(backend: Backend) -> None:
    one, two = await backend.connect(), await backend.connect()
    got: list[int] = []

    async def ping(message: Msg) -> None:
        await two.publish(f"{backend.subject}.pong", message.data)

    async def pong(message: Msg) -> None:
        got.append(int(message.data))
        if got[-1] < 500:
            await one.publish(f"{backend.subject}.ping", b"%d" % (got[-1] + 1))

    await two.subscribe(f"{backend.subject}.ping", cb=ping)
    await one.subscribe(f"{backend.subject}.pong", cb=pong)
    await sync(one, two)
    await one.publish(f"{backend.subject}.ping", b"0")
    await until(lambda: got and got[-1] == 500)
    assert got == list(range(501))


@covers("api/next-msg")
async def test_next_msg_in_order(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await publish(nc, backend.subject, range(100))
    assert [int((await subscription.next_msg(timeout=5)).data) for _ in range(100)] == list(range(100))


@covers("api/next-msg", "api/exceptions")
@pytest.mark.parametrize("timeout", [0.05, 0])
async def test_next_msg_timeout(backend: Backend, timeout: float) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    start = asyncio.get_running_loop().time()
    with pytest.raises(nats.errors.TimeoutError) as caught:
        await subscription.next_msg(timeout=timeout)
    assert timeout * 0.9 <= asyncio.get_running_loop().time() - start < 5
    assert isinstance(caught.value, asyncio.TimeoutError)
    assert isinstance(caught.value, backend.nats.errors.TimeoutError)


@covers("api/next-msg")
async def test_next_msg_without_timeout(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    waiter = asyncio.create_task(subscription.next_msg(timeout=None))
    await sync(nc)
    assert not waiter.done()
    await publisher.publish(backend.subject, b"x")
    assert (await waiter).data == b"x"


@covers("api/next-msg-cancel")
@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "at once"])
async def test_cancelled_next_msg_loses_nothing(backend: Backend, waits: bool) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    for number in range(20):
        task = asyncio.create_task(subscription.next_msg(timeout=5))
        if waits:
            await sync(nc)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nc.publish(backend.subject, b"%d" % number)
        assert int((await subscription.next_msg(timeout=5)).data) == number
    assert (subscription.pending_msgs, subscription.pending_bytes) == (0, 0)


@covers("api/next-msg-cancel")
async def test_timed_out_next_msg_loses_nothing(backend: Backend) -> None:
    """Timeouts that fall together with arrivals; each message is returned by one of the calls."""
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    got: list[int] = []
    sent = 0
    while sent < 200:
        await publisher.publish(backend.subject, b"%d" % sent)
        sent += 1
        with contextlib.suppress(nats.errors.TimeoutError):
            got.append(int((await subscription.next_msg(timeout=0.0002)).data))
    await arrived(publisher, nc)
    got += [int(data) for data in await payloads(subscription)]
    assert got == list(range(200))


@covers("api/next-msg-close")
async def test_next_msg_while_the_connection_closes(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    waiters = [asyncio.create_task(subscription.next_msg(timeout=timeout)) for timeout in (10, None)]
    await sync(nc)
    await nc.close()
    for waiter in waiters:
        with pytest.raises(backend.nats.errors.ConnectionClosedError):
            await waiter
    with pytest.raises(backend.nats.errors.ConnectionClosedError):
        await subscription.next_msg(timeout=1)


@covers("api/next-msg-concurrent")
async def test_several_waiters(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    waiters = [asyncio.create_task(subscription.next_msg(timeout=10)) for _ in range(10)]
    await sync(nc)
    await publish(nc, backend.subject, range(10))
    messages = await asyncio.gather(*waiters)
    assert [int(message.data) for message in messages] == list(range(10))


@covers("api/next-msg-concurrent", "api/next-msg-cancel")
async def test_one_of_several_waiters_is_cancelled(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    waiters = [asyncio.create_task(subscription.next_msg(timeout=10)) for _ in range(3)]
    await sync(nc)
    waiters[0].cancel()
    await publish(nc, backend.subject, range(2))
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert [int(message.data) for message in results[1:] if not isinstance(message, BaseException)] == [0, 1]


@covers("api/next-msg-callback", "api/iterate-callback")
async def test_pulling_from_a_subscription_with_a_callback(backend: Backend) -> None:
    nc = await backend.connect()

    async def handler(message: Msg) -> None:
        pass

    subscription = await nc.subscribe(backend.subject, cb=handler)
    with pytest.raises(backend.nats.errors.Error, match="next_msg cannot be used"):
        await subscription.next_msg()
    with pytest.raises(backend.nats.errors.Error, match="cannot iterate"):
        _ = subscription.messages


@covers("api/next-msg", "2.5/max")
async def test_next_msg_after_the_maximum(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await subscription.unsubscribe(limit=2)
    await publish(nc, backend.subject, range(5))
    assert [int((await subscription.next_msg(5)).data) for _ in range(2)] == [0, 1]
    with pytest.raises(backend.nats.errors.TimeoutError):
        await subscription.next_msg(timeout=0.02)


@covers("api/iterate")
async def test_iterate(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await publish(nc, backend.subject, range(50))
    got = []
    async for message in subscription.messages:
        got.append(int(message.data))
        if len(got) == 50:
            break
    assert got == list(range(50))
    await publish(nc, backend.subject, range(50, 53))
    async for message in subscription.messages:  # goes on where it was left
        got.append(int(message.data))
        if len(got) == 53:
            break
    assert got == list(range(53))
    assert subscription.pending_bytes == 0


@covers("api/iterate")
@pytest.mark.parametrize("way", ["unsubscribe", "close", "drain connection"])
async def test_iteration_that_waits_ends(backend: Backend, way: str) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    got: list[bytes] = []

    async def iterate() -> None:
        async for message in subscription.messages:
            got.append(bytes(message.data))

    iteration = asyncio.create_task(iterate())
    await nc.publish(backend.subject, b"x")
    await until(lambda: got)
    assert not iteration.done()
    await {"unsubscribe": subscription.unsubscribe, "close": nc.close, "drain connection": nc.drain}[way]()
    await iteration
    assert got == [b"x"]


@covers("api/iterate", "2.5/max")
async def test_iteration_ends_at_the_maximum(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await subscription.unsubscribe(limit=3)
    await sync(nc)
    await publish(publisher, backend.subject, range(6))
    assert [int(message.data) async for message in subscription.messages] == [0, 1, 2]


@covers("api/iterate")
async def test_unsubscribing_inside_an_iteration(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"last")
    async for message in subscription.messages:
        assert message.data == b"last"
        await subscription.unsubscribe()
    assert nc.is_connected


@covers("api/iterate", "api/next-msg-cancel")
async def test_cancelled_iteration_loses_nothing(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)

    async def iterate() -> None:
        async for _ in subscription.messages:
            pytest.fail("nothing was published yet")

    iteration = asyncio.create_task(iterate())
    await sync(nc)
    iteration.cancel()
    with pytest.raises(asyncio.CancelledError):
        await iteration
    await nc.publish(backend.subject, b"x")
    assert (await subscription.next_msg(5)).data == b"x"


@covers("api/subscribe-future")
async def test_future(backend: Backend) -> None:
    nc = await backend.connect()
    future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
    subscription = await nc.subscribe(backend.subject, future=future, max_msgs=1)
    await subscription.unsubscribe(limit=1)
    await nc.publish(backend.subject, b"first", reply="r")
    await nc.publish(backend.subject, b"second")
    message = await future
    assert (message.data, message.reply, message.sid) == (b"first", "r", subscription._id)
    await sync(nc)
    assert nc.is_connected


@covers("api/subscribe-future")
async def test_cancelled_future(backend: Backend) -> None:
    nc = await backend.connect()
    future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
    await nc.subscribe(backend.subject, future=future)
    future.cancel()
    await nc.publish(backend.subject, b"x")
    await arrived(nc, nc)
    assert nc.is_connected


@covers("api/subscription-properties")
async def test_properties(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject, queue="q")
    await sync(nc)
    assert (subscription.subject, subscription.queue) == (backend.subject, "q")
    assert (subscription.pending_msgs, subscription.pending_bytes, subscription.delivered) == (0, 0, 0)
    for size in (10, 0, 5):
        await publisher.publish(backend.subject, b"x" * size, headers={"A": "b"})
    await arrived(publisher, nc)
    assert (subscription.pending_msgs, subscription.pending_bytes, subscription.delivered) == (3, 15, 3)
    await subscription.next_msg(5)
    assert (subscription.pending_msgs, subscription.pending_bytes, subscription.delivered) == (2, 5, 3)
    await taken(subscription)
    assert (subscription.pending_msgs, subscription.pending_bytes, subscription.delivered) == (0, 0, 3)


@covers("api/subscription-properties", "api/exceptions")
async def test_classes(backend: Backend) -> None:
    import nats.aio.msg
    import nats.aio.subscription

    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject)
    message = await subscription.next_msg(5)
    assert isinstance(subscription, nats.aio.subscription.Subscription)
    assert isinstance(subscription, backend.nats.aio.subscription.Subscription)
    assert isinstance(message, nats.aio.msg.Msg)
    assert isinstance(message, backend.nats.aio.msg.Msg)


@covers("2.7/client-messages", "2.7/client-recovers", "2.7/client-alone", "api/exceptions")
async def test_pending_messages_limit(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    slow = await nc.subscribe(backend.subject, pending_msgs_limit=5)
    fast = await nc.subscribe(backend.subject)
    await sync(nc)
    for number in range(8):
        await publisher.publish(backend.subject, b"%d" % number, reply="a.reply")
    await arrived(publisher, nc)
    errors = backend.take_errors(nats.errors.SlowConsumerError)
    assert len(errors) == 3
    for error in errors:
        assert isinstance(error, nats.errors.SlowConsumerError)
        assert (error.subject, error.reply, error.sid, error.sub) == (backend.subject, "a.reply", slow._id, slow)
    assert (slow.pending_msgs, slow.pending_bytes, slow.delivered) == (5, 5, 8)
    assert [int(data) for data in await payloads(slow)] == [0, 1, 2, 3, 4]
    assert [int(data) for data in await payloads(fast)] == list(range(8))
    await publisher.publish(backend.subject, b"8")
    await arrived(publisher, nc)
    assert await payloads(slow) == [b"8"]
    assert nc.is_connected


@covers("2.7/client-bytes", "2.7/client-recovers")
async def test_pending_bytes_limit(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    slow = await nc.subscribe(backend.subject, pending_bytes_limit=1000)
    await sync(nc)
    for number in range(10):
        await publisher.publish(backend.subject, b"%d" % number * 300)
    await arrived(publisher, nc)
    assert len(backend.take_errors(backend.nats.errors.SlowConsumerError)) == 7
    assert (slow.pending_msgs, slow.pending_bytes) == (3, 900)
    assert [data[:1] for data in await payloads(slow)] == [b"0", b"1", b"2"]
    await publisher.publish(backend.subject, b"n" * 300)
    await arrived(publisher, nc)
    assert await payloads(slow) == [b"n" * 300]


@covers("2.7/client-bytes", "2.7/client-messages")
async def test_limits_that_are_off(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject, pending_msgs_limit=0, pending_bytes_limit=0)
    await sync(nc)
    for _ in range(1000):
        await publisher.publish(backend.subject, b"x" * 1000)
    await arrived(publisher, nc)
    assert (subscription.pending_msgs, subscription.pending_bytes) == (1000, 1_000_000)


@covers("2.7/client-messages", "2.7/client-recovers")
async def test_slow_callback(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    gate = asyncio.Event()
    got: list[int] = []

    async def handler(message: Msg) -> None:
        await gate.wait()
        got.append(int(message.data))

    await nc.subscribe(backend.subject, cb=handler, pending_msgs_limit=3)
    await sync(nc)
    await publisher.publish(backend.subject, b"0")
    await arrived(publisher, nc)
    await publish(publisher, backend.subject, range(1, 8))
    await arrived(publisher, nc)
    assert len(backend.take_errors(backend.nats.errors.SlowConsumerError)) == 4
    gate.set()
    await until(lambda: len(got) == 4)
    await publisher.publish(backend.subject, b"8")
    await until(lambda: len(got) == 5)
    assert got == [0, 1, 2, 3, 8]
