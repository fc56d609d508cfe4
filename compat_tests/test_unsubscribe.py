"""UNSUB with and without a maximum, in all its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


@covers("2.5/max")
@pytest.mark.parametrize("where", ["own", "other"])
@pytest.mark.parametrize("maximum", [1, 2, 4, 7])
async def test_maximum(backend: Backend, maximum: int, where: str) -> None:
    nc = await backend.connect()
    publisher = nc if where == "own" else await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await subscription.unsubscribe(limit=maximum)
    await sync(nc)
    await publish(publisher, backend.subject, range(4))
    await arrived(publisher, nc)
    assert [int(data) for data in await payloads(subscription)] == list(range(min(maximum, 4)))


@covers("2.5/counts-delivered")
@pytest.mark.parametrize("maximum", [2, 3])
async def test_maximum_that_was_reached_already(backend: Backend, maximum: int) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    await publish(publisher, backend.subject, range(3))
    await arrived(publisher, nc)
    await taken(subscription)
    await subscription.unsubscribe(limit=maximum)
    await sync(nc)
    await publish(publisher, backend.subject, range(3, 6))
    await arrived(publisher, nc)
    assert await payloads(subscription) == []


@covers("2.5/remaining")
@pytest.mark.parametrize("taken_before", [True, False], ids=["taken", "pending"])
async def test_only_the_rest_is_delivered(backend: Backend, taken_before: bool) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    await publish(publisher, backend.subject, range(2))
    await arrived(publisher, nc)
    received = await payloads(subscription) if taken_before else []
    await subscription.unsubscribe(limit=4)
    await sync(nc)
    await publish(publisher, backend.subject, range(2, 8))
    await arrived(publisher, nc)
    received += await payloads(subscription)
    assert [int(data) for data in received] == [0, 1, 2, 3]


@covers("2.5/zero", "api/unsubscribe")
@pytest.mark.parametrize("arguments", [{}, {"limit": 0}, {"limit": -1}], ids=["none", "zero", "negative"])
async def test_without_maximum_it_ends_now(backend: Backend, arguments: dict[str, int]) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: list[bytes] = []

    async def handler(message: Msg) -> None:
        got.append(bytes(message.data))

    subscription = await nc.subscribe(backend.subject, cb=handler)
    await sync(nc)
    await publisher.publish(backend.subject, b"before")
    await until(lambda: got)
    await subscription.unsubscribe(**arguments)
    await sync(nc)
    await publisher.publish(backend.subject, b"after")
    await arrived(publisher, nc)
    assert got == [b"before"]


@covers("2.5/override")
@pytest.mark.parametrize(("first", "second", "expected"), [(5, 2, 2), (2, 5, 5), (3, 3, 3)])
async def test_later_maximum_replaces_the_earlier(backend: Backend, first: int, second: int, expected: int) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await subscription.unsubscribe(limit=first)
    await subscription.unsubscribe(limit=second)
    await sync(nc)
    await publish(publisher, backend.subject, range(8))
    await arrived(publisher, nc)
    assert [int(data) for data in await payloads(subscription)] == list(range(expected))


@covers("2.5/override", "2.5/counts-delivered")
async def test_later_smaller_maximum_counts_what_came(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await subscription.unsubscribe(limit=10)
    await sync(nc)
    await publish(publisher, backend.subject, range(4))
    await arrived(publisher, nc)
    assert len(await taken(subscription)) == 4
    await subscription.unsubscribe(limit=3)
    await sync(nc)
    await publish(publisher, backend.subject, range(4, 8))
    await arrived(publisher, nc)
    assert await payloads(subscription) == []


@covers("2.5/cancel")
async def test_unsubscribe_after_a_maximum(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await subscription.unsubscribe(limit=10)
    await sync(nc)
    await publish(publisher, backend.subject, range(2))
    await arrived(publisher, nc)
    assert len(await taken(subscription)) == 2
    await subscription.unsubscribe()
    await sync(nc)
    await publish(publisher, backend.subject, range(2, 4))
    await arrived(publisher, nc)
    assert subscription.pending_msgs == 0


@covers("2.5/queue", "2.4/fall-through-gone")
@pytest.mark.parametrize("where", ["one connection", "two connections"])
async def test_queue_member_with_a_maximum(backend: Backend, where: str) -> None:
    publisher, one = await backend.connect(), await backend.connect()
    two = one if where == "one connection" else await backend.connect()
    limited = await one.subscribe(backend.subject, queue="q")
    await limited.unsubscribe(limit=2)
    other = await two.subscribe(backend.subject, queue="q")
    await sync(one, two)
    await publish(publisher, backend.subject, range(40))
    await arrived(publisher, one, two)
    await arrived(one, two)  # what the limited member had to pass on came by way of its connection
    counts = [await payloads(limited), await payloads(other)]
    assert [len(got) for got in counts] == [2, 38]
    assert sorted(int(data) for got in counts for data in got) == list(range(40))


@covers("2.5/queue")
async def test_all_members_with_maxima(backend: Backend) -> None:
    publisher = await backend.connect()
    clients = [await backend.connect() for _ in range(4)]
    members = [await nc.subscribe(backend.subject, queue="q") for nc in clients]
    for member in members:
        await member.unsubscribe(limit=5)
    await sync(*clients)
    await publish(publisher, backend.subject, range(60))
    await arrived(publisher, *clients)
    for nc in clients:
        await arrived(nc, *clients)
    assert [len(await taken(member)) for member in members] == [5] * 4


@covers("2.5/max")
async def test_maxima_of_overlapping_subscriptions_are_their_own(backend: Backend) -> None:
    nc = await backend.connect()
    subscriptions = [await nc.subscribe(pattern) for pattern in (backend.subject, backend.subject, "*")]
    for maximum, subscription in enumerate(subscriptions, 1):
        await subscription.unsubscribe(limit=maximum)
    await publish(nc, backend.subject, range(5))
    await arrived(nc, nc)
    assert [len(await taken(subscription)) for subscription in subscriptions] == [1, 2, 3]


@covers("2.5/max")
async def test_maximum_with_a_callback(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: list[int] = []

    async def handler(message: Msg) -> None:
        got.append(int(message.data))

    subscription = await nc.subscribe(backend.subject, cb=handler)
    await subscription.unsubscribe(limit=3)
    await sync(nc)
    await publish(publisher, backend.subject, range(9))
    await arrived(publisher, nc)
    await until(lambda: len(got) >= 3)
    assert got == [0, 1, 2]


@covers("2.5/max", "2.5/counts-delivered")
async def test_maximum_set_from_within_the_callback(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: list[int] = []

    async def handler(message: Msg) -> None:
        got.append(int(message.data))
        if len(got) == 3:
            await subscription.unsubscribe(limit=3)

    subscription = await nc.subscribe(backend.subject, cb=handler)
    await sync(nc)
    for number in range(6):
        await publisher.publish(backend.subject, b"%d" % number)
        await arrived(publisher, nc)
        await sync(nc)
    assert got == [0, 1, 2]


@covers("2.5/after-max", "2.6/interest-gone")
async def test_no_interest_left_after_the_maximum(backend: Backend) -> None:
    nc, responder = await backend.connect(), await backend.connect()

    async def handler(message: Msg) -> None:
        await message.respond(b"answer")

    subscription = await responder.subscribe(backend.subject, cb=handler)
    await subscription.unsubscribe(limit=2)
    await sync(responder)
    for _ in range(2):
        assert (await nc.request(backend.subject, b"x", timeout=5)).data == b"answer"
    with pytest.raises(backend.nats.errors.NoRespondersError):
        await nc.request(backend.subject, b"x", timeout=5)


@covers("2.5/status-not-counted", "2.6/status-message")
async def test_no_responders_and_a_maximum(backend: Backend) -> None:
    """The client counts the status message towards its own limit: it and one message more are seen."""
    nc, other = await backend.connect(), await backend.connect()
    inbox = await nc.subscribe(backend.subject)
    await inbox.unsubscribe(limit=2)
    await nc.publish(f"{backend.subject}.nobody", b"x", reply=backend.subject)
    await arrived(nc, nc)
    await publish(other, backend.subject, range(3))
    await arrived(other, nc)
    messages = await taken(inbox)
    assert [message.headers and message.headers["Status"] for message in messages] == ["503", None]


@covers("2.5/unknown", "api/unsubscribe")
@pytest.mark.parametrize("way", ["unsubscribe", "drain"])
async def test_ending_a_subscription_twice(backend: Backend, way: str) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await (subscription.unsubscribe() if way == "unsubscribe" else subscription.drain())
    with pytest.raises(backend.nats.errors.BadSubscriptionError):
        await subscription.unsubscribe()
    with pytest.raises(backend.nats.errors.BadSubscriptionError):
        await subscription.drain()
    await sync(nc)
    assert nc.is_connected


@covers("2.5/unknown")
async def test_unsubscribe_after_the_maximum_was_reached(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await subscription.unsubscribe(limit=1)
    await nc.publish(backend.subject)
    await arrived(nc, nc)
    assert len(await taken(subscription)) == 1
    await subscription.unsubscribe()
    await sync(nc)
    assert nc.is_connected


@covers("api/subscribe-max-msgs")
async def test_max_msgs_of_subscribe(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject, max_msgs=2)
    await sync(nc)
    await publish(publisher, backend.subject, range(5))
    await arrived(publisher, nc)
    assert [int(data) for data in await payloads(subscription)] == [0, 1]


@covers("api/unsubscribe")
async def test_unsubscribing_one_of_several(backend: Backend) -> None:
    nc = await backend.connect()
    subscriptions = [await nc.subscribe(backend.subject) for _ in range(4)]
    await subscriptions[1].unsubscribe()
    await nc.publish(backend.subject, b"x")
    await arrived(nc, nc)
    assert [subscription.pending_msgs for subscription in subscriptions] == [1, 0, 1, 1]
