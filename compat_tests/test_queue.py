"""Queue groups: one member gets it, at random, and never nobody while somebody could."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from compat_tests.backend import arrived, counted, payloads, sync, taken, until_nobody_hears

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

covers = pytest.mark.covers


@covers("2.4/one-member", "2.4/other-names")
async def test_one_member_over_all_patterns_of_a_group(backend: Backend) -> None:
    publisher = await backend.connect()
    clients = [await backend.connect() for _ in range(3)]
    prefix = backend.subject
    members = [
        await clients[0].subscribe(f"{prefix}.*", queue="grp"),
        await clients[1].subscribe(f"{prefix}.*", queue="grp"),
        await clients[2].subscribe(f"{prefix}.*", queue="grp"),
        await clients[0].subscribe(f"{prefix}.a", queue="grp"),
        await clients[1].subscribe(f"{prefix}.>", queue="grp"),
    ]
    other = await clients[2].subscribe(f"{prefix}.a", queue="other")
    plain = await clients[2].subscribe(f"{prefix}.a")
    await sync(*clients)
    for number in range(300):
        await publisher.publish(f"{prefix}.a", b"%d" % number)
    await arrived(publisher, *clients)
    received = [await payloads(member) for member in members]
    assert sorted(int(data) for got in received for data in got) == list(range(300))
    assert len(await taken(other)) == len(await taken(plain)) == 300


@covers("2.4/one-member")
async def test_only_the_patterns_that_match_take_part(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    prefix = backend.subject
    a = await nc.subscribe(f"{prefix}.a", queue="q")
    b = await nc.subscribe(f"{prefix}.b", queue="q")
    deep = await nc.subscribe(f"{prefix}.a.>", queue="q")
    await sync(nc)
    for _ in range(50):
        await publisher.publish(f"{prefix}.a")
        await publisher.publish(f"{prefix}.b")
        await publisher.publish(f"{prefix}.a.x")
    await arrived(publisher, nc)
    assert [len(await taken(member)) for member in (a, b, deep)] == [50, 50, 50]


@covers("2.4/other-names")
async def test_several_groups_and_plain_subscriptions(backend: Backend) -> None:
    publisher = await backend.connect()
    clients = [await backend.connect() for _ in range(2)]
    groups = {name: [await nc.subscribe(backend.subject, queue=name) for nc in clients * 2] for name in ("a", "b", "c")}
    plain = [await nc.subscribe(backend.subject) for nc in clients]
    await sync(*clients)
    for number in range(100):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, *clients)
    for members in groups.values():
        received = [await payloads(member) for member in members]
        assert sorted(int(data) for got in received for data in got) == list(range(100))
    for subscription in plain:
        assert [int(data) for data in await payloads(subscription)] == list(range(100))


@covers("2.4/random")
@pytest.mark.parametrize("where", ["one connection", "a connection each", "own connection"])
async def test_members_are_chosen_at_random(backend: Backend, where: str) -> None:
    publisher = await backend.connect()
    shared = publisher if where == "own connection" else await backend.connect()
    clients = [await backend.connect() for _ in range(3)] if where == "a connection each" else [shared] * 3
    members = [await nc.subscribe(backend.subject, queue="q") for nc in clients]
    await sync(*clients)
    for number in range(3000):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, *set(clients))
    received = [[int(data) for data in await payloads(member)] for member in members]
    assert sorted(number for numbers in received for number in numbers) == list(range(3000))
    for numbers in received:
        assert numbers == sorted(numbers)
        assert 800 < len(numbers) < 1200  # seven standard deviations about the mean
    winners = {number: index for index, numbers in enumerate(received) for number in numbers}
    repeats = sum(winners[number] == winners[number + 1] for number in range(2999))
    assert 800 < repeats < 1200  # taking turns would give 0


@covers("2.4/random", "2.4/one-member")
async def test_every_subscription_is_a_member_of_its_own(backend: Backend) -> None:
    """Two of three members on one connection get two thirds."""
    publisher, one, two = await backend.connect(), await backend.connect(), await backend.connect()
    single = await one.subscribe(backend.subject, queue="q")
    doubled = [await two.subscribe(f"{backend.subject}", queue="q"), await two.subscribe("*", queue="q")]
    await sync(one, two)
    for _ in range(3000):
        await publisher.publish(backend.subject, b"x")
    await arrived(publisher, one, two)
    assert 800 < len(await taken(single)) < 1200
    for member in doubled:
        assert 800 < len([message for message in await taken(member) if message.data]) < 1200


@covers("2.4/one-connection")
async def test_members_on_one_connection(backend: Backend) -> None:
    nc = await backend.connect()
    members = [await nc.subscribe(backend.subject, queue="q") for _ in range(5)]
    for number in range(200):
        await nc.publish(backend.subject, b"%d" % number)
    await arrived(nc, nc)
    received = [await payloads(member) for member in members]
    assert sorted(int(data) for got in received for data in got) == list(range(200))
    assert all(received)


@covers("2.4/fall-through-no-echo")
@pytest.mark.parametrize("own_members", [1, 5])
async def test_own_member_without_echo_is_passed_over(backend: Backend, own_members: int) -> None:
    publisher, other = await backend.connect(no_echo=True), await backend.connect()
    own = [await publisher.subscribe(backend.subject, queue="q") for _ in range(own_members)]
    member = await other.subscribe(backend.subject, queue="q")
    await sync(publisher, other)
    for number in range(100):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, other)
    await arrived(other, publisher)
    assert [int(data) for data in await payloads(member)] == list(range(100))
    assert [len(await taken(subscription)) for subscription in own] == [0] * own_members


@covers("2.4/fall-through-gone")
@pytest.mark.parametrize("way", ["unsubscribe", "drain", "close", "max"])
async def test_member_that_left_is_passed_over(backend: Backend, way: str) -> None:
    publisher, leaver, stayer = await backend.connect(), await backend.connect(), await backend.connect()
    leaving = await leaver.subscribe(backend.subject, queue="q")
    await leaver.subscribe(f"{backend.subject}.leaver")
    staying = await stayer.subscribe(backend.subject, queue="q")
    if way == "max":
        await leaving.unsubscribe(limit=1)
    await sync(leaver, stayer)
    before = 0
    if way == "max":
        while leaving.pending_msgs == 0:
            await publisher.publish(backend.subject, b"before")
            await arrived(publisher, leaver)
            before += 1
        before -= 1
    elif way == "close":
        await leaver.close()
        await until_nobody_hears(publisher, f"{backend.subject}.leaver")
    elif way == "drain":
        await leaving.drain()
        await sync(leaver)
    else:
        await leaving.unsubscribe()
        await sync(leaver)
    for number in range(100):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, stayer)
    assert len(await taken(staying)) == 100 + before


@covers("2.4/names", "api/subscription-properties")
@pytest.mark.parametrize(
    "name", ["y.*.>", "a..b", "*", ">", ".", "größe", "q" * 500, "a,b;c", "_x"], ids=lambda name: ascii(name)[:20]
)
async def test_queue_names(backend: Backend, name: str) -> None:
    publisher, one, two = await backend.connect(), await backend.connect(), await backend.connect()
    members = [await nc.subscribe(backend.subject, queue=name) for nc in (one, two)]
    assert members[0].queue == name
    await sync(one, two)
    for _ in range(40):
        await publisher.publish(backend.subject)
    await arrived(publisher, one, two)
    counts = [len(await taken(member)) for member in members]
    assert sum(counts) == 40 and all(counts)


@covers("2.4/other-names")
async def test_queue_names_are_compared_by_bytes(backend: Backend) -> None:
    nc = await backend.connect()
    members = [await nc.subscribe(backend.subject, queue=name) for name in ("q", "Q", "q.", "q1")]
    for _ in range(10):
        await nc.publish(backend.subject)
    await arrived(nc, nc)
    assert [len(await taken(member)) for member in members] == [10] * 4


@covers("2.4/one-member", "2.4/fall-through-gone")
async def test_members_come_and_go(backend: Backend) -> None:
    """Callbacks in a group whose members change between the messages: each message once."""
    publisher, nc = await backend.connect(), await backend.connect()
    got: Counter[int] = Counter()

    async def handler(message: Msg) -> None:
        got[int(message.data)] += 1

    members = [await nc.subscribe(backend.subject, queue="q", cb=handler) for _ in range(3)]
    for turn in range(20):
        await sync(nc)
        for number in range(20):
            await publisher.publish(backend.subject, b"%d" % (turn * 20 + number))
        await arrived(publisher, nc)
        await counted(got, 20 * (turn + 1))
        await members.pop(0).unsubscribe()
        members.append(await nc.subscribe(backend.subject, queue="q", cb=handler))
    assert got == Counter(range(400))


@covers("2.4/one-member")
async def test_queue_group_answers_requests_once(backend: Backend) -> None:
    nc = await backend.connect()
    answered: list[int] = []
    for index in range(3):
        worker = await backend.connect()

        async def handler(message: Msg, index: int = index) -> None:
            answered.append(index)
            await message.respond(message.data)

        await worker.subscribe(backend.subject, queue="workers", cb=handler)
        await sync(worker)
    answers = await asyncio.gather(*(nc.request(backend.subject, b"%d" % number, timeout=5) for number in range(60)))
    assert [int(answer.data) for answer in answers] == list(range(60))
    assert len(answered) == 60 and set(answered) == {0, 1, 2}
