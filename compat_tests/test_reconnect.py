"""What programs see when the server goes away and comes back: a nats-server, or nsnd."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest

from compat_tests.backend import arrived, payloads, sync, until
from compat_tests.test_lifecycle import Calls

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

covers = pytest.mark.covers


class Errors:
    """Collects what error_cb reports: while a server is away there is something, which the tests do not pin."""

    def __init__(self) -> None:
        self.reported: list[Exception] = []

    async def report(self, error: Exception) -> None:
        self.reported.append(error)


async def connect(backend: Backend, **options: Any) -> Client:
    options.setdefault("error_cb", Errors().report)
    options.setdefault("max_reconnect_attempts", -1)
    return await backend.connect(**options)


@covers("4.2/reconnect", "4.2/states")
@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_restart(own_backend: Backend, way: str) -> None:
    calls = Calls()
    nc = await connect(own_backend, **calls.options)
    for turn in range(1, 3):
        await (own_backend.stop_server() if way == "stop" else own_backend.kill_server())
        await until(lambda: nc.is_reconnecting, what="the client notices")
        assert not nc.is_connected and not nc.is_closed and nc.connected_url is None
        await own_backend.start_server()
        await until(lambda: calls.order[-1] == "reconnected", what="reconnected_cb")
        assert nc.is_connected
        assert calls.order == ["disconnected", "reconnected"] * turn
        assert nc.stats["reconnects"] == turn
    await nc.close()
    assert calls.order[-2:] == ["disconnected", "closed"]


@covers("4.2/reconnect-replay")
async def test_subscriptions_are_back(own_backend: Backend) -> None:
    publisher, nc = await connect(own_backend), await connect(own_backend)
    called: list[int] = []

    async def handler(message: Msg) -> None:
        called.append(int(message.data))

    plain = await nc.subscribe("a.b")
    wild = await nc.subscribe("a.>")
    await nc.subscribe("a.*", cb=handler)
    members = [await nc.subscribe("a.b", queue="q") for _ in range(2)]
    gone = await nc.subscribe("a.b")
    await gone.unsubscribe()
    await sync(nc)
    await restart(own_backend, publisher, nc)
    for number in range(100):
        await publisher.publish("a.b", b"%d" % number)
    await arrived(publisher, nc)
    await until(lambda: len(called) == 100)
    expected = list(range(100))
    assert [int(data) for data in await payloads(plain)] == expected
    assert [int(data) for data in await payloads(wild)] == expected
    assert called == expected
    counts = [await payloads(member) for member in members]
    assert sorted(int(data) for got in counts for data in got) == expected
    assert gone.pending_msgs == 0


async def restart(backend: Backend, *clients: Client) -> None:
    before = [nc.stats["reconnects"] for nc in clients]
    await backend.stop_server()
    await until(lambda: all(nc.is_reconnecting for nc in clients), what="the clients notice")
    await backend.start_server()
    await until(lambda: all(nc.is_connected for nc in clients), what="the clients reconnect")
    await until(lambda: [nc.stats["reconnects"] for nc in clients] == [count + 1 for count in before])
    await sync(*clients)


@covers("4.2/reconnect-replay", "api/request")
async def test_requests_after_a_restart(own_backend: Backend) -> None:
    nc, responder = await connect(own_backend), await connect(own_backend)

    async def handler(message: Msg) -> None:
        await message.respond(b"re " + message.data)

    await responder.subscribe("service", cb=handler)
    await sync(responder)
    assert (await nc.request("service", b"1", timeout=5)).data == b"re 1"
    await restart(own_backend, nc, responder)
    assert (await nc.request("service", b"2", timeout=5)).data == b"re 2"
    assert (await nc.request("service", b"3", timeout=5, old_style=True)).data == b"re 3"
    with pytest.raises(nats.errors.NoRespondersError):
        await nc.request("nobody", timeout=5)


@covers("4.2/reconnect-max", "2.5/remaining")
async def test_maximum_counts_on(own_backend: Backend) -> None:
    publisher, nc = await connect(own_backend), await connect(own_backend)
    subscription = await nc.subscribe("a")
    await subscription.unsubscribe(limit=5)
    finished = await nc.subscribe("a")
    await finished.unsubscribe(limit=2)
    await sync(nc)
    for number in range(3):
        await publisher.publish("a", b"%d" % number)
    await arrived(publisher, nc)
    await restart(own_backend, publisher, nc)
    for number in range(3, 9):
        await publisher.publish("a", b"%d" % number)
    await arrived(publisher, nc)
    assert [int(data) for data in await payloads(subscription)] == [0, 1, 2, 3, 4]
    assert [int(data) for data in await payloads(finished)] == [0, 1]


@covers("4.2/reconnect-buffer")
async def test_publishes_meanwhile_arrive(own_backend: Backend) -> None:
    """From a connection that already had published to the subscriber, and from one that had not."""
    subscriber_is_back = asyncio.Event()
    nc = await connect(own_backend)
    # A publisher that is back before the subscriber would find nobody; the callback is awaited before the first attempt.
    known, fresh = [await connect(own_backend, disconnected_cb=subscriber_is_back.wait) for _ in range(2)]
    subscription = await nc.subscribe("a.*")
    await sync(nc)
    await known.publish("a.known", b"0")
    await arrived(known, nc)
    await own_backend.stop_server()
    await until(lambda: all(client.is_reconnecting for client in (known, fresh, nc)))
    for number in range(1, 50):
        await known.publish("a.known", b"%d" % number)
        await fresh.publish("a.fresh", b"%d" % number)
    await own_backend.start_server()
    await until(lambda: nc.is_connected)
    await sync(nc)
    subscriber_is_back.set()
    await until(lambda: subscription.pending_msgs == 99, what="all that was published meanwhile")
    messages = [await subscription.next_msg(1) for _ in range(99)]
    assert [int(message.data) for message in messages if message.subject == "a.known"] == list(range(50))
    assert [int(message.data) for message in messages if message.subject == "a.fresh"] == list(range(1, 50))


@covers("4.2/reconnect-buffer-limit", "4.2/reconnect-buffer")
@pytest.mark.parametrize("pending_size", [0, -1, 500])
@pytest.mark.stricter("messages between programs of one host need no server, so that there may be nothing to buffer")
async def test_buffer_that_is_full(own_backend: Backend, pending_size: int) -> None:
    """What was not refused is not lost; a client that can only buffer refuses."""
    nc = await connect(own_backend, pending_size=pending_size)
    subscription = await nc.subscribe("a")
    await sync(nc)
    await own_backend.stop_server()
    await until(lambda: nc.is_reconnecting)
    accepted = []
    for number in range(3):
        with contextlib.suppress(nats.errors.OutboundBufferLimitError):
            await nc.publish("a", b"%d" % number * 400)
            accepted.append(number)
    await own_backend.start_server()
    await until(lambda: nc.is_connected)
    await arrived(nc, nc)
    assert [data[:1] for data in await payloads(subscription)] == [b"%d" % number for number in accepted]
    if own_backend.name == "nats":
        assert accepted == ([0] if pending_size == 500 else [])


@covers("4.2/reconnect-changes")
async def test_subscribing_meanwhile(own_backend: Backend) -> None:
    publisher, nc = await connect(own_backend), await connect(own_backend)
    old = await nc.subscribe("a")
    limited = await nc.subscribe("a")
    await sync(nc)
    await own_backend.stop_server()
    await until(lambda: publisher.is_reconnecting and nc.is_reconnecting)
    new = await nc.subscribe("a")
    await old.unsubscribe()
    await limited.unsubscribe(limit=2)
    await own_backend.start_server()
    await until(lambda: publisher.is_connected and nc.is_connected)
    await sync(publisher, nc)
    for number in range(4):
        await publisher.publish("a", b"%d" % number)
    await arrived(publisher, nc)
    assert [int(data) for data in await payloads(new)] == [0, 1, 2, 3]
    assert [int(data) for data in await payloads(limited)] == [0, 1]
    assert old.pending_msgs == 0


@covers("4.2/reconnect-drain")
async def test_draining_meanwhile(own_backend: Backend) -> None:
    nc = await connect(own_backend)
    await own_backend.stop_server()
    await until(lambda: nc.is_reconnecting)
    with pytest.raises(nats.errors.ConnectionReconnectingError):
        await nc.drain()
    await own_backend.start_server()
    await until(lambda: nc.is_connected)
    await nc.drain()


@covers("4.2/reconnect-close")
async def test_closing_meanwhile(own_backend: Backend) -> None:
    calls = Calls()
    nc = await connect(own_backend, **calls.options)
    await own_backend.stop_server()
    await until(lambda: nc.is_reconnecting and "disconnected" in calls.order)
    await nc.close()
    assert nc.is_closed and calls.order[-1] == "closed"
    await own_backend.start_server()
    later = await connect(own_backend)
    await later.flush()
    assert nc.is_closed and "reconnected" not in calls.order


@covers("4.2/reconnect-off")
async def test_reconnect_not_allowed(own_backend: Backend) -> None:
    calls = Calls()
    nc = await connect(own_backend, allow_reconnect=False, **calls.options)
    subscription = await nc.subscribe("a")
    waiter = asyncio.create_task(subscription.next_msg(timeout=10))
    await sync(nc)
    await own_backend.stop_server()
    await until(lambda: nc.is_closed and "closed" in calls.order)
    assert calls.order == ["disconnected", "closed"]
    with pytest.raises(nats.errors.ConnectionClosedError):
        await waiter


@covers("4.2/reconnect-exhausted")
async def test_reconnect_attempts_are_limited(own_backend: Backend) -> None:
    calls = Calls()
    nc = await connect(own_backend, max_reconnect_attempts=2, reconnect_time_wait=0.01, **calls.options)
    await own_backend.stop_server()
    await until(lambda: nc.is_closed and "closed" in calls.order)
    assert isinstance(nc.last_error, nats.errors.NoServersError)
    assert "reconnected" not in calls.order


@covers("4.2/reconnect-force", "4.2/reconnect-replay")
async def test_force_reconnect(own_backend: Backend) -> None:
    calls = Calls()
    publisher, nc = await connect(own_backend), await connect(own_backend, **calls.options)
    subscription = await nc.subscribe("a")
    await sync(nc)
    await nc.force_reconnect()
    await until(lambda: "reconnected" in calls.order)
    await sync(nc)
    assert calls.order == ["disconnected", "reconnected"] and nc.stats["reconnects"] == 1
    await publisher.publish("a", b"x")
    await arrived(publisher, nc)
    assert await payloads(subscription) == [b"x"]


@covers("1.10/stale", "4.2/reconnect")
async def test_server_that_does_not_answer(own_backend: Backend) -> None:
    calls = Calls()
    nc = await connect(own_backend, ping_interval=0.05, max_outstanding_pings=2, connect_timeout=0.5, **calls.options)
    subscription = await nc.subscribe("a")
    await sync(nc)
    await own_backend.pause_server()
    try:
        await until(lambda: "disconnected" in calls.order, what="the silent server is given up")
    finally:
        await own_backend.resume_server()
    await until(lambda: "reconnected" in calls.order and nc.is_connected, what="it is back")
    await sync(nc)
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"


@covers("4.2/calls-bounded")
async def test_calls_end_while_the_server_does_not_answer(own_backend: Backend) -> None:
    nc = await connect(own_backend)
    subscription = await nc.subscribe("a")
    await sync(nc)
    await own_backend.pause_server()
    try:
        start = asyncio.get_running_loop().time()
        for call in (
            lambda: nc.flush(timeout=1),
            lambda: nc.request("nobody", timeout=0.2),
            lambda: nc.publish("a.b", b"x"),
            lambda: nc.subscribe("b"),
            lambda: subscription.next_msg(timeout=0.2),
        ):
            with contextlib.suppress(nats.errors.TimeoutError, nats.errors.NoRespondersError):
                await call()
        assert asyncio.get_running_loop().time() - start < 5
    finally:
        await own_backend.resume_server()


@covers("4.2/calls-bounded", "api/flush")
@pytest.mark.stricter("in nats-py the PONG that comes after a flush has timed out ends the reading of the connection")
async def test_connection_is_well_after_a_flush_that_timed_out(own_backend: Backend) -> None:
    nc = await connect(own_backend)
    subscription = await nc.subscribe("a")
    await sync(nc)
    await own_backend.pause_server()
    try:
        with contextlib.suppress(nats.errors.FlushTimeoutError):
            await nc.flush(timeout=1)
    finally:
        await own_backend.resume_server()
    await nc.flush(timeout=2)
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"
