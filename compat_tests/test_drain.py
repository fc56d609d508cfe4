"""Drain of subscriptions and of connections, at rest and under load."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from compat_tests.backend import arrived, counted, payloads, sync, taken, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

covers = pytest.mark.covers
NATS_PY_LOSES = "nats-py flushes ahead of its own UNSUB, so that messages which follow are lost"


def counting(got: Counter[int]) -> Callable[[Msg], Awaitable[None]]:
    async def handler(message: Msg) -> None:
        got[int(message.data)] += 1

    return handler


@covers("2.8/subscription")
async def test_drained_subscription_gets_all_before_and_nothing_after(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: Counter[int] = Counter()
    subscription = await nc.subscribe(backend.subject, cb=counting(got))
    await sync(nc)
    for number in range(500):
        await publisher.publish(backend.subject, b"%d" % number)
    await sync(publisher)
    await subscription.drain()
    await sync(nc)
    for number in range(500, 600):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, nc)
    assert got == Counter(range(500))


@covers("2.8/subscription-waits")
async def test_drain_waits_for_the_callback(backend: Backend) -> None:
    nc = await backend.connect()
    gate = asyncio.Event()
    entered = asyncio.Event()
    finished: list[int] = []

    async def handler(message: Msg) -> None:
        entered.set()
        await gate.wait()
        finished.append(int(message.data))

    subscription = await nc.subscribe(backend.subject, cb=handler)
    for number in range(5):
        await nc.publish(backend.subject, b"%d" % number)
    await arrived(nc, nc)
    await entered.wait()
    drain = asyncio.create_task(subscription.drain())
    await sync(nc)
    assert not drain.done() and not finished
    gate.set()
    await drain
    assert finished == [0, 1, 2, 3, 4]


@covers("2.8/subscription-pull")
async def test_drain_waits_until_messages_are_taken(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    for number in range(3):
        await nc.publish(backend.subject, b"%d" % number)
    await arrived(nc, nc)
    drain = asyncio.create_task(subscription.drain())
    await sync(nc)
    for number in range(3):
        assert not drain.done()
        assert int((await subscription.next_msg(5)).data) == number
    await drain


@covers("2.8/subscription-pull", "api/iterate")
async def test_drain_ends_an_iteration(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    for number in range(10):
        await nc.publish(backend.subject, b"%d" % number)
    await arrived(nc, nc)
    got: list[int] = []

    async def iterate() -> None:
        async for message in subscription.messages:
            got.append(int(message.data))

    iteration = asyncio.create_task(iterate())
    await subscription.drain()
    await iteration
    assert got == list(range(10))


@covers("2.8/subscription")
async def test_drain_of_one_leaves_the_others(backend: Backend) -> None:
    nc = await backend.connect()
    drained, kept = await nc.subscribe(backend.subject), await nc.subscribe(backend.subject)
    await drained.drain()
    await nc.publish(backend.subject, b"x")
    await arrived(nc, nc)
    assert (drained.pending_msgs, await payloads(kept)) == (0, [b"x"])


@covers("2.8/subscription")
async def test_drain_with_a_maximum(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: Counter[int] = Counter()
    subscription = await nc.subscribe(backend.subject, cb=counting(got))
    await subscription.unsubscribe(limit=5)
    await sync(nc)
    for number in range(3):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, nc)
    await subscription.drain()
    await sync(nc)
    await publisher.publish(backend.subject, b"9")
    await arrived(publisher, nc)
    assert got == Counter(range(3))


@covers("2.8/connection", "2.8/callbacks", "4.2/states")
async def test_drain_connection(backend: Backend) -> None:
    calls: list[str] = []

    async def disconnected() -> None:
        calls.append("disconnected")

    async def closed() -> None:
        calls.append("closed")

    publisher = await backend.connect()
    nc = await backend.connect(disconnected_cb=disconnected, closed_cb=closed)
    got: Counter[int] = Counter()
    for suffix in ("a", "b", "*"):
        await nc.subscribe(f"{backend.subject}.{suffix}", cb=counting(got))
    await sync(nc)
    for number in range(200):
        await publisher.publish(f"{backend.subject}.{'ab'[number % 2]}", b"%d" % number)
    await sync(publisher)
    await nc.drain()
    assert got == Counter(dict.fromkeys(range(200), 2))
    assert nc.is_closed and not nc.is_connected and not nc.is_draining
    assert calls == ["disconnected", "closed"]


@covers("2.8/connection", "4.2/states", "2.8/no-new", "2.8/twice")
async def test_while_draining(backend: Backend) -> None:
    nc = await backend.connect()
    gate = asyncio.Event()
    entered = asyncio.Event()

    async def handler(message: Msg) -> None:
        entered.set()
        await gate.wait()

    subscription = await nc.subscribe(backend.subject, cb=handler)
    await nc.publish(backend.subject, b"x")
    await entered.wait()
    drain = asyncio.create_task(nc.drain())
    await until(lambda: nc.is_draining)
    assert nc.is_connected and not nc.is_closed and not nc.is_draining_pubs
    refused = backend.nats.errors.ConnectionDrainingError
    with pytest.raises(refused):
        await nc.subscribe(backend.subject)
    with pytest.raises(refused):
        await subscription.unsubscribe()
    with pytest.raises(refused):
        await subscription.drain()
    await nc.drain()  # is under way already
    assert not drain.done()
    gate.set()
    await drain
    assert nc.is_closed


@covers("2.8/connection", "api/subscribe-reentrant")
async def test_callbacks_publish_while_draining(backend: Backend) -> None:
    nc, other = await backend.connect(), await backend.connect()
    answers = await other.subscribe(f"{backend.subject}.answer")
    await sync(other)

    async def handler(message: Msg) -> None:
        await asyncio.sleep(0)
        await nc.publish(f"{backend.subject}.answer", message.data)

    await nc.subscribe(backend.subject, cb=handler)
    await sync(nc)
    for number in range(100):
        await other.publish(backend.subject, b"%d" % number)
    await sync(other)
    await nc.drain()
    await until(lambda: answers.pending_msgs == 100, what="all answers")
    assert [int(data) for data in await payloads(answers)] == list(range(100))


@covers("2.8/connection-publishes", "4.2/close-sends")
@pytest.mark.parametrize("way", ["drain", "close"])
@pytest.mark.parametrize("size", [10, 50_000])
async def test_publishes_before_the_end_arrive(backend: Backend, way: str, size: int) -> None:
    nc, other = await backend.connect(), await backend.connect()
    subscription = await other.subscribe(backend.subject)
    await sync(other)
    for number in range(200):
        await nc.publish(backend.subject, b"%d" % number + b" " * size)
    await (nc.drain() if way == "drain" else nc.close())
    await until(lambda: subscription.pending_msgs == 200, what="all messages")
    assert [int(data) for data in await payloads(subscription)] == list(range(200))


@covers("2.8/twice")
@pytest.mark.parametrize("way", ["drain", "close"])
async def test_drain_after_the_end(backend: Backend, way: str) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await (nc.drain() if way == "drain" else nc.close())
    with pytest.raises(backend.nats.errors.ConnectionClosedError):
        await nc.drain()
    with pytest.raises(backend.nats.errors.ConnectionClosedError):
        await subscription.drain()
    with pytest.raises(backend.nats.errors.ConnectionClosedError):
        await subscription.unsubscribe()


@covers("2.8/timeout")
async def test_drain_timeout(backend: Backend) -> None:
    nc = await backend.connect(drain_timeout=0.2)
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"nobody takes this")
    await arrived(nc, nc)
    assert subscription.pending_msgs == 1
    await nc.drain()
    assert nc.is_closed
    assert len(backend.take_errors(backend.nats.errors.DrainTimeoutError)) == 1


@covers("2.8/connection")
async def test_drain_with_no_subscriptions(backend: Backend) -> None:
    nc = await backend.connect()
    await nc.drain()
    assert nc.is_closed


@covers("2.8/connection")
async def test_drain_after_requests(backend: Backend) -> None:
    """The connection's own inbox subscription is drained with the rest."""
    nc = await backend.connect()
    with pytest.raises(backend.nats.errors.NoRespondersError):
        await nc.request(backend.subject, timeout=5)
    await nc.drain()
    assert nc.is_closed


async def publish_until(publisher: Client, subject: str, enough: asyncio.Event) -> int:
    """Publishes numbers at full speed, sharing the loop every hundred; returns how many."""
    number = 0
    while not enough.is_set():
        for _ in range(100):
            await publisher.publish(subject, b"%d" % number)
            number += 1
        await publisher.flush()
    return number


@covers("2.8/under-load", "2.4/exact")
@pytest.mark.stricter(NATS_PY_LOSES)
@pytest.mark.parametrize("publishers", [1, 3])
async def test_draining_a_member_under_load_loses_nothing(backend: Backend, publishers: int) -> None:
    keeper, leaver = await backend.connect(), await backend.connect()
    got: Counter[int] = Counter()
    await keeper.subscribe(f"{backend.subject}.*", queue="q", cb=counting(got))
    leaving = await leaver.subscribe(f"{backend.subject}.*", queue="q", cb=counting(got))
    await sync(keeper, leaver)
    enough = asyncio.Event()
    clients = [await backend.connect() for _ in range(publishers)]
    tasks = [asyncio.create_task(publish_until(nc, f"{backend.subject}.{index}", enough)) for index, nc in enumerate(clients)]
    await counted(got, 1000)
    await leaving.drain()
    await counted(got, got.total() + 1000)  # the other member goes on
    enough.set()
    expected: Counter[int] = Counter()
    for task in tasks:
        expected.update(range(await task))
    for nc in clients:
        await arrived(nc, keeper, leaver)
    await until(lambda: got.total() >= expected.total(), what="every message has been delivered", timeout_s=3)
    assert got == expected


@covers("2.8/rolling", "2.4/exact")
@pytest.mark.stricter(NATS_PY_LOSES)
async def test_sixty_rolling_drains(backend: Backend) -> None:
    publisher = await backend.connect()
    members = [await backend.connect() for _ in range(3)]
    got: Counter[int] = Counter()
    subscriptions = [await nc.subscribe(backend.subject, queue="q", cb=counting(got)) for nc in members]
    await sync(*members)
    enough = asyncio.Event()
    load = asyncio.create_task(publish_until(publisher, backend.subject, enough))
    for turn in range(60):
        index = turn % len(members)
        old = subscriptions[index]
        subscriptions[index] = await members[index].subscribe(backend.subject, queue="q", cb=counting(got))
        await old.drain()
        await counted(got, got.total() + 1)
    enough.set()
    expected = Counter(range(await load))
    await arrived(publisher, *members)
    await until(lambda: got.total() >= expected.total(), what="every message has been delivered", timeout_s=3)
    assert got == expected


@covers("2.8/under-load", "2.8/subscription")
@pytest.mark.stricter(NATS_PY_LOSES)
async def test_drain_of_a_plain_subscription_under_load_is_a_clean_cut(backend: Backend) -> None:
    """What a drained subscription got is a prefix of what was published: no gap at its end."""
    publisher, nc = await backend.connect(), await backend.connect()
    counts: Counter[int] = Counter()
    for _ in range(10):
        got: list[int] = []

        async def handler(message: Msg, got: list[int] = got) -> None:
            got.append(int(message.data))
            counts[0] += 1

        subscription = await nc.subscribe(backend.subject, cb=handler)
        await sync(nc)
        enough = asyncio.Event()
        load = asyncio.create_task(publish_until(publisher, backend.subject, enough))
        await counted(counts, counts.total() + 300)
        await subscription.drain()
        taken_at_drain = len(got)
        enough.set()
        await load
        await arrived(publisher, nc)
        assert got == list(range(len(got))) and len(got) == taken_at_drain


@covers("2.8/connection", "2.8/under-load")
@pytest.mark.stricter(NATS_PY_LOSES)
async def test_draining_a_connection_under_load_loses_nothing(backend: Backend) -> None:
    publisher, keeper, leaver = await backend.connect(), await backend.connect(), await backend.connect()
    got: Counter[int] = Counter()
    await keeper.subscribe(backend.subject, queue="q", cb=counting(got))
    await leaver.subscribe(backend.subject, queue="q", cb=counting(got))
    await sync(keeper, leaver)
    enough = asyncio.Event()
    load = asyncio.create_task(publish_until(publisher, backend.subject, enough))
    await counted(got, 500)
    await leaver.drain()
    await counted(got, got.total() + 500)
    enough.set()
    expected = Counter(range(await load))
    await arrived(publisher, keeper)
    await until(lambda: got.total() >= expected.total(), what="every message has been delivered", timeout_s=3)
    assert got == expected


@covers("2.8/subscription")
async def test_concurrent_drains(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: Counter[int] = Counter()
    subscriptions = [await nc.subscribe(f"{backend.subject}.{index}", cb=counting(got)) for index in range(50)]
    await sync(nc)
    for index in range(50):
        await publisher.publish(f"{backend.subject}.{index}", b"%d" % index)
    await sync(publisher)
    await asyncio.gather(*(subscription.drain() for subscription in subscriptions))
    assert got == Counter(range(50))
    assert await taken(await nc.subscribe(f"{backend.subject}.x")) == []
