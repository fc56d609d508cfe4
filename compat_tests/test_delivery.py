"""What arrives where, in which order and how often: copies, order, echo, payloads."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from compat_tests.backend import arrived, payloads, sync, taken, until

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

covers = pytest.mark.covers

MEBIBYTE = 1024 * 1024
SIZES = [0, 1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 1023, 1024, 4095, 4096, 4097, 16384, 32767, 32768, 32769, 65535, 65536, 65537]
LARGE_SIZES = [131072, 262143, 262144, 524288, MEBIBYTE - 1, MEBIBYTE]


@covers("2.3/overlap")
async def test_overlapping_subscriptions_each_get_a_copy(backend: Backend) -> None:
    nc = await backend.connect()
    prefix = backend.subject
    subscriptions = [await nc.subscribe(f"{prefix}.{pattern}") for pattern in ("a.b", "a.*", ">", "a.b")]
    await nc.publish(f"{prefix}.a.b", b"x")
    await arrived(nc, nc)
    assert [await payloads(subscription) for subscription in subscriptions] == [[b"x"]] * 4


@covers("2.3/overlap")
async def test_overlapping_callbacks_each_get_a_copy(backend: Backend) -> None:
    nc = await backend.connect()
    sids: list[int] = []

    async def handler(message: Msg) -> None:
        sids.append(message.sid)

    for pattern in ("x.y", "x.*", ">", "x.y", "*.y"):
        await nc.subscribe(f"{backend.subject}.{pattern}", cb=handler)
    await nc.publish(f"{backend.subject}.x.y", b"x")
    await until(lambda: len(sids) >= 5)
    await arrived(nc, nc)
    assert len(sids) == len(set(sids)) == 5


@covers("2.3/fan-out", "2.3/overlap")
@pytest.mark.parametrize("size", [5, 70_000])
async def test_fan_out_over_connections(backend: Backend, size: int) -> None:
    publisher = await backend.connect()
    subscribers = [await backend.connect() for _ in range(8)]
    subscriptions = [await nc.subscribe(backend.subject) for nc in subscribers]
    await sync(*subscribers)
    sent = [bytes([number]) * size for number in range(20)]
    for payload in sent:
        await publisher.publish(backend.subject, payload)
    await arrived(publisher, *subscribers)
    for subscription in subscriptions:
        assert await payloads(subscription) == sent


@covers("2.3/order")
async def test_order_across_subjects(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: list[int] = []

    async def handler(message: Msg) -> None:
        got.append(int(message.data))

    await nc.subscribe(f"{backend.subject}.*", cb=handler)
    await sync(nc)
    for number in range(5000):
        await publisher.publish(f"{backend.subject}.{number % 7}", b"%d" % number)
    await until(lambda: len(got) >= 5000)
    assert got == list(range(5000))


@covers("2.3/order")
async def test_order_across_sizes(backend: Backend) -> None:
    """Small and large payloads may take different ways, but not overtake each other."""
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(f"{backend.subject}.>")
    await sync(nc)
    dice = random.Random(3)
    sizes = [dice.choice([8, 100, 5000, 40_000, 70_000, 300_000]) for _ in range(300)]
    for number, size in enumerate(sizes):
        await publisher.publish(f"{backend.subject}.{dice.choice('abc')}", number.to_bytes(4, "big").ljust(size, b"."))
    for number, size in enumerate(sizes):
        message = await subscription.next_msg(5)
        assert (int.from_bytes(bytes(message.data)[:4], "big"), len(message.data)) == (number, size)


@covers("2.3/order-overlap", "2.3/at-most-once")
async def test_order_in_overlapping_subscriptions(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    patterns = ["a.x", "a.*", ">", "*.x", "b.>"]
    subscriptions = [await nc.subscribe(f"{backend.subject}.{pattern}") for pattern in patterns]
    await sync(nc)
    sent = [(f"{backend.subject}.{'ab'[number % 2]}.{'xyz'[number % 3]}", number) for number in range(1200)]
    for subject, number in sent:
        await publisher.publish(subject, b"%d" % number)
    await arrived(publisher, nc)
    expected = [
        [number for subject, number in sent if accept(subject.removeprefix(f"{backend.subject}."))]
        for accept in (
            lambda rest: rest == "a.x",
            lambda rest: rest.startswith("a."),
            lambda rest: True,
            lambda rest: rest.endswith(".x"),
            lambda rest: rest.startswith("b."),
        )
    ]
    assert [[int(data) for data in await payloads(subscription)] for subscription in subscriptions] == expected


@covers("2.3/order", "api/many-connections")
async def test_order_per_publisher_with_several_publishers(backend: Backend) -> None:
    nc = await backend.connect()
    publishers = [await backend.connect() for _ in range(4)]
    got: dict[int, list[int]] = {index: [] for index in range(4)}

    async def handler(message: Msg) -> None:
        index, number = map(int, message.data.split())
        got[index].append(number)

    await nc.subscribe(f"{backend.subject}.>", cb=handler)
    await sync(nc)

    async def publish(index: int) -> None:
        for number in range(500):
            await publishers[index].publish(f"{backend.subject}.{index}.{number % 3}", b"%d %d" % (index, number))
            if number % 50 == 0:
                await asyncio.sleep(0)

    await asyncio.gather(*(publish(index) for index in range(4)))
    await until(lambda: all(len(numbers) >= 500 for numbers in got.values()))
    assert all(numbers == list(range(500)) for numbers in got.values())


@covers("2.3/at-most-once", "api/volume")
async def test_ten_thousand_messages_once_each(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    for number in range(10_000):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, nc)
    assert [int(data) for data in await payloads(subscription)] == list(range(10_000))


@covers("2.3/no-past")
async def test_nothing_from_before_the_subscription(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    await publisher.publish(backend.subject, b"before")
    await sync(publisher)
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    await publisher.publish(backend.subject, b"after")
    await arrived(publisher, nc)
    assert await payloads(subscription) == [b"after"]


@covers("2.3/own-interest-first")
async def test_own_subscription_sees_the_next_publish(backend: Backend) -> None:
    nc = await backend.connect()
    for number in range(50):
        subscription = await nc.subscribe(f"{backend.subject}.{number}")
        await nc.publish(f"{backend.subject}.{number}", b"x")
        assert (await subscription.next_msg(5)).data == b"x"


@covers("2.3/own-interest-first")
async def test_inbox_is_known_before_the_answer(backend: Backend) -> None:
    """Subscribe an inbox, then ask another connection to publish to it, without any flush in between."""
    nc, responder = await backend.connect(), await backend.connect()

    async def handler(message: Msg) -> None:
        await responder.publish(message.reply, message.data)

    await responder.subscribe(backend.subject, cb=handler)
    await sync(responder)
    for number in range(100):
        inbox = nc.new_inbox()
        subscription = await nc.subscribe(inbox)
        await nc.publish(backend.subject, b"%d" % number, reply=inbox)
        assert (await subscription.next_msg(5)).data == b"%d" % number
        await subscription.unsubscribe()


@covers("2.3/flush-processed", "2.3/own-interest-first")
async def test_subscription_is_in_effect_after_flush(backend: Backend) -> None:
    nc, publisher = await backend.connect(), await backend.connect()
    for number in range(50):
        subscription = await nc.subscribe(f"{backend.subject}.{number}")
        await sync(nc)
        await publisher.publish(f"{backend.subject}.{number}", b"x")
        assert (await subscription.next_msg(5)).data == b"x"


@covers("2.3/flush-processed", "api/flush-covers")
@pytest.mark.stricter("nats-py's flush sends its PING ahead of what was published just before")
async def test_one_flush_covers_publishes(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    for turn in range(1, 21):
        for _ in range(100):
            await publisher.publish(backend.subject, b"x" * 100)
        await publisher.flush()
        await nc.flush()
        assert subscription.pending_msgs == 100 * turn


@covers("api/flush-covers", "2.3/own-interest-first")
@pytest.mark.stricter("nats-py's flush sends its PING ahead of what was subscribed just before")
async def test_one_flush_covers_subscriptions(backend: Backend) -> None:
    nc, publisher = await backend.connect(), await backend.connect()
    for number in range(50):
        subscription = await nc.subscribe(f"{backend.subject}.{number}")
        await nc.flush()
        await publisher.publish(f"{backend.subject}.{number}", b"x")
        assert (await subscription.next_msg(1)).data == b"x"


@covers("2.3/echo")
async def test_echo_is_the_default(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x")
    assert (await subscription.next_msg(5)).data == b"x"


@covers("2.3/no-echo")
async def test_no_echo(backend: Backend) -> None:
    nc, other = await backend.connect(no_echo=True), await backend.connect()
    own = await nc.subscribe(backend.subject)
    own_wild = await nc.subscribe(f"{backend.subject}.>")
    own_queue = await nc.subscribe(backend.subject, queue="q")
    others = await other.subscribe(backend.subject)
    await sync(nc, other)
    await nc.publish(backend.subject, b"own")
    await nc.publish(f"{backend.subject}.a", b"own")
    await arrived(nc, other)
    await other.publish(backend.subject, b"other")
    await arrived(other, nc, other)
    assert await payloads(own) == await payloads(own_queue) == [b"other"]
    assert await payloads(own_wild) == []
    assert await payloads(others) == [b"own", b"other"]


@covers("2.3/no-echo-503")
@pytest.mark.parametrize("queue", ["", "q"], ids=["plain", "queue"])
async def test_no_echo_and_nobody_else_is_no_responders(backend: Backend, queue: str) -> None:
    nc = await backend.connect(no_echo=True)
    await nc.subscribe(backend.subject, queue=queue)
    with pytest.raises(backend.nats.errors.NoRespondersError):
        await nc.request(backend.subject, b"x", timeout=5)


@covers("api/publish", "1.9/max-payload-exact", "api/message")
@pytest.mark.parametrize("where", ["own", "other"])
@pytest.mark.parametrize("size", [*SIZES, *LARGE_SIZES])
async def test_payload_sizes(backend: Backend, size: int, where: str) -> None:
    publisher = await backend.connect()
    nc = publisher if where == "own" else await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    sent = [random.Random(seed).randbytes(size) for seed in range(3)]
    for payload in sent:
        await publisher.publish(backend.subject, payload)
    for payload in sent:
        data = (await subscription.next_msg(5)).data
        assert len(data) == size
        assert hashlib.sha256(data).digest() == hashlib.sha256(payload).digest()


@covers("api/publish")
@pytest.mark.parametrize("kind", [bytes, bytearray], ids=["bytes", "bytearray"])
@pytest.mark.parametrize("headers", [None, {"A": "b"}], ids=["plain", "headers"])
async def test_payload_types(backend: Backend, kind: Any, headers: dict[str, str] | None) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    payload = bytes(range(256))
    await nc.publish(backend.subject, kind(payload), headers=headers)
    message = await subscription.next_msg(5)
    assert (message.data, message.headers) == (payload, headers)


@covers("api/publish")
async def test_publisher_may_reuse_its_buffer(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    for size in (16, 5000, 200_000):
        buffer = bytearray(b"a" * size)
        await publisher.publish(backend.subject, buffer)  # type: ignore[arg-type]
        buffer[:] = b"b" * size
        assert (await subscription.next_msg(5)).data == b"a" * size


@covers("api/message")
@pytest.mark.parametrize("size", [0, 20, 4096, 100_000, MEBIBYTE])
async def test_data_behaves_as_bytes(backend: Backend, size: int) -> None:
    """What programs do with a payload: compare, decode, hash, slice, join, parse, keep."""
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    payload = json.dumps("a" * size).encode()[: max(size, 2)] if size else b""
    await publisher.publish(backend.subject, payload)
    data = (await subscription.next_msg(5)).data
    assert isinstance(data, bytes)
    assert data == payload and payload == data and hash(data) == hash(payload)
    assert data.decode() == payload.decode()
    assert data[:3] + b"!" == payload[:3] + b"!" and data.startswith(payload[:5])
    for number in range(20):  # whatever memory it lies in must not be used again
        await publisher.publish(backend.subject, bytes([number]) * size)
        await subscription.next_msg(5)
    assert data == payload


@covers("api/message")
async def test_message_fields(backend: Backend) -> None:
    nc = await backend.connect()
    wild = await nc.subscribe(f"{backend.subject}.*")
    await nc.subscribe("answer.here")
    await nc.publish(f"{backend.subject}.a", b"data", reply="answer.here", headers={"K": "v"})
    await nc.publish(f"{backend.subject}.b")
    first, second = await wild.next_msg(5), await wild.next_msg(5)
    assert (first.subject, first.reply, first.data) == (f"{backend.subject}.a", "answer.here", b"data")
    assert first.headers == first.header == {"K": "v"}
    assert (second.subject, second.reply, second.data, second.headers) == (f"{backend.subject}.b", "", b"", None)
    assert first.sid == second.sid == wild._id
    assert not first.is_acked
    assert "answer.here" in repr(first)


@covers("api/volume")
async def test_a_thousand_subscriptions(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscriptions = [await nc.subscribe(f"{backend.subject}.{number}") for number in range(1000)]
    await sync(nc)
    for number in range(1000):
        await publisher.publish(f"{backend.subject}.{number}", b"%d" % number)
    await arrived(publisher, nc)
    assert [await payloads(subscription) for subscription in subscriptions] == [[b"%d" % number] for number in range(1000)]


@covers("api/volume")
async def test_ten_thousand_subjects(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(f"{backend.subject}.>")
    await sync(nc)
    for number in range(10_000):
        await publisher.publish(f"{backend.subject}.{number}.x", b"%d" % number)
    await arrived(publisher, nc)
    messages = await taken(subscription)
    assert [message.subject for message in messages] == [f"{backend.subject}.{number}.x" for number in range(10_000)]


@covers("api/volume", "2.3/order")
async def test_thirty_two_mebibytes_in_flight(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    for number in range(32):
        await publisher.publish(backend.subject, bytes([number]) * MEBIBYTE)
    for number in range(32):
        data = (await subscription.next_msg(10)).data
        assert len(data) == MEBIBYTE and data[0] == data[-1] == number
