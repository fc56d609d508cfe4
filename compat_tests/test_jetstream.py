"""JetStream, key-value and object store: on a nats-server through either import, and where nothing is persistent."""

from __future__ import annotations

import asyncio
import importlib
import logging
from typing import TYPE_CHECKING, Any

import nats.errors
import nats.js.errors
import pytest
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig

from compat_tests.backend import Backend, sync, until
from compat_tests.test_options import Calls, restart

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

    from compat_tests.conftest import OwnServers

covers = pytest.mark.covers


async def stream_of(plain: Backend, count: int = 0) -> tuple[JetStreamContext, str]:
    """A stream of the test's own, which is also its subject, with that many messages."""
    nc = await plain.connect()
    js = nc.jetstream()
    await js.add_stream(StreamConfig(name=plain.subject, subjects=[plain.subject]))
    for number in range(count):
        await js.publish(plain.subject, b"%d" % number)
    return js, plain.subject


@covers("jetstream/publish")
async def test_publish(plain: Backend) -> None:
    js, subject = await stream_of(plain)
    for number in range(1, 4):
        ack = await js.publish(subject, b"x", headers={"Nats-Msg-Id": str(number)})
        assert (ack.stream, ack.seq, ack.duplicate) == (subject, number, None)
    assert (await js.publish(subject, b"x", headers={"Nats-Msg-Id": "3"})).duplicate
    futures = [await js.publish_async(subject, b"%d" % number) for number in range(20)]
    await js.publish_async_completed()
    assert [future.result().seq for future in futures] == list(range(4, 24))
    info = await js.stream_info(subject)
    assert info.state.messages == 23
    with pytest.raises(nats.js.errors.NoStreamResponseError):
        await js.publish(f"{subject}.none", b"x")
    with pytest.raises(nats.js.errors.NotFoundError):
        await js.stream_info("none")


@covers("jetstream/pull")
async def test_pull_consumer(plain: Backend) -> None:
    js, subject = await stream_of(plain, 25)
    pull = await js.pull_subscribe(subject, durable="worker")
    got: list[int] = []
    while len(got) < 25:
        for message in await pull.fetch(10, timeout=5):
            got.append(int(message.data))
            assert message.metadata.sequence.stream == len(got)
            await message.ack_sync()
    assert got == list(range(25))
    with pytest.raises(nats.errors.TimeoutError):
        await pull.fetch(1, timeout=0.1)
    info = await pull.consumer_info()
    assert info.delivered and (info.num_pending, info.num_ack_pending, info.delivered.stream_seq) == (0, 0, 25)


@covers("jetstream/pull")
async def test_message_that_is_refused_comes_again(plain: Backend) -> None:
    js, subject = await stream_of(plain, 1)
    pull = await js.pull_subscribe(subject, durable="worker")
    (message,) = await pull.fetch(1, timeout=5)
    await message.nak()
    (message,) = await pull.fetch(1, timeout=5)
    assert message.metadata.num_delivered == 2
    await message.term()


@covers("jetstream/push")
@pytest.mark.parametrize("queue", ["", "workers"])
async def test_push_consumer_with_a_callback(plain: Backend, queue: str) -> None:
    js, subject = await stream_of(plain, 10)
    got: list[int] = []

    async def callback(message: Msg) -> None:
        got.append(int(message.data))

    subscription = await js.subscribe(subject, queue=queue, durable=queue or "worker", cb=callback)
    await js.publish(subject, b"10")
    await until(lambda: len(got) == 11)
    assert got == list(range(11))
    info = await subscription.consumer_info()
    assert info.delivered and info.delivered.stream_seq == 11
    await subscription.unsubscribe()


@covers("jetstream/push")
async def test_push_consumer_that_is_pulled_from(plain: Backend) -> None:
    """next_msg and iteration, flow control and heartbeats: none of its messages is a program's."""
    js, subject = await stream_of(plain, 300)
    config = ConsumerConfig(ack_policy=AckPolicy.NONE, flow_control=True, idle_heartbeat=0.1)
    subscription = await js.subscribe(subject, config=config)
    got = [int((await subscription.next_msg(5)).data) for _ in range(150)]
    async for message in subscription.messages:
        got.append(int(message.data))
        if len(got) == 300:
            break
    assert got == list(range(300))
    with pytest.raises(nats.errors.TimeoutError):  # while heartbeats come
        await subscription.next_msg(0.35)
    assert subscription.pending_msgs == 0


@covers("jetstream/ordered")
async def test_ordered_consumer(plain: Backend) -> None:
    js, subject = await stream_of(plain, 200)
    subscription = await js.subscribe(subject, ordered_consumer=True)
    assert [int((await subscription.next_msg(5)).data) for _ in range(200)] == list(range(200))


@covers("jetstream/ordered")
async def test_ordered_consumer_that_missed_a_message(plain: Backend) -> None:
    """It makes a new consumer where it was; its subscription has another id from then on."""
    js, subject = await stream_of(plain, 10)
    nc = js._nc
    build = nc._build_message
    lost: list[bytes] = []

    def lose_one(sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> Any:
        if data == b"5" and not lost:
            lost.append(data)
            return None
        return build(sid, subject, reply, data, headers)

    nc._build_message = lose_one  # type: ignore[method-assign]
    ids = set(nc._subs)
    subscription = await js.subscribe(subject, ordered_consumer=True)
    (before,) = set(nc._subs) - ids
    assert [int((await subscription.next_msg(5)).data) for _ in range(10)] == list(range(10))
    assert lost and before not in nc._subs
    await js.publish(subject, b"10")
    assert (await subscription.next_msg(5)).data == b"10"


@covers("jetstream/restart")
async def test_consumers_over_a_restart(new_plain: OwnServers) -> None:
    backend = new_plain()
    nc = await backend.connect(**Calls().options)
    js = nc.jetstream()
    await js.add_stream(StreamConfig(name="s", subjects=["s"]))
    push = await js.subscribe("s", durable="push", config=ConsumerConfig(deliver_policy=DeliverPolicy.ALL))
    pull = await js.pull_subscribe("s", durable="pull")
    await js.publish("s", b"1")
    assert (await push.next_msg(5)).data == b"1"
    await restart(backend, nc)
    await until_jetstream(js)
    await js.publish("s", b"2")
    assert (await push.next_msg(10)).data == b"2"
    assert [message.data for message in await pull.fetch(2, timeout=5)] == [b"1", b"2"]


async def until_jetstream(js: JetStreamContext) -> None:
    """A server that has just started takes a moment until JetStream answers."""
    async with asyncio.timeout(10):
        while True:
            try:
                await js.account_info()
                return
            except (nats.errors.Error, nats.js.errors.Error):
                await asyncio.sleep(0.02)


@covers("jetstream/key-value")
async def test_key_value(plain: Backend) -> None:
    js = (await plain.connect()).jetstream()
    kv = await js.create_key_value(bucket=plain.subject, history=5)
    watcher = await kv.watchall()
    assert await watcher.updates(timeout=5) is None  # there was nothing
    first = await kv.put("a", b"1")
    assert await kv.update("a", b"2", last=first) == first + 1
    with pytest.raises(nats.js.errors.KeyWrongLastSequenceError):
        await kv.update("a", b"3", last=first)
    await kv.create("b", b"x")
    entry = await kv.get("a")
    assert (entry.key, entry.value, entry.revision) == ("a", b"2", first + 1)
    assert [entry.value for entry in await kv.history("a")] == [b"1", b"2"]
    assert sorted(await kv.keys()) == ["a", "b"]
    await kv.delete("b")
    with pytest.raises(nats.js.errors.KeyNotFoundError):
        await kv.get("b")
    seen = [await watcher.updates(timeout=5) for _ in range(4)]
    assert [(entry.key, entry.operation) for entry in seen if entry] == [("a", None), ("a", None), ("b", None), ("b", "DEL")]
    await watcher.stop()
    assert (await (await js.key_value(plain.subject)).get("a")).value == b"2"


@covers("jetstream/object-store")
async def test_object_store(plain: Backend) -> None:
    js = (await plain.connect()).jetstream()
    store = await js.create_object_store(plain.subject)
    content = bytes(range(256)) * 2000  # several chunks
    info = await store.put("picture", content)
    assert (info.size, info.chunks) == (len(content), 4)
    assert (await store.get("picture")).data == content
    assert [entry.name for entry in await store.list()] == ["picture"]
    await store.delete("picture")
    with pytest.raises(nats.js.errors.ObjectNotFoundError):
        await store.get("picture")


# --- where nothing is persistent: a node, and a server without JetStream


@pytest.fixture
def without_jetstream(backend: Backend, new_plain: OwnServers) -> Backend:
    return backend if backend.name == "insane" else new_plain(jetstream=False)


UNAVAILABLE: dict[str, Callable[[Any, str], Awaitable[object]]] = {
    "account_info": lambda js, name: js.account_info(),
    "add_stream": lambda js, name: js.add_stream(name=name, subjects=[name]),
    "stream_info": lambda js, name: js.stream_info(name),
    "streams_info": lambda js, name: js.streams_info(),
    "add_consumer": lambda js, name: js.add_consumer(name, durable_name="d"),
    "subscribe": lambda js, name: js.subscribe(name),
    "pull_subscribe": lambda js, name: js.pull_subscribe(name, durable="d"),
    "pull_subscribe_bind": lambda js, name: js.pull_subscribe(name, durable="d", stream=name),
    "create_key_value": lambda js, name: js.create_key_value(bucket=name),
    "key_value": lambda js, name: js.key_value(name),
    "create_object_store": lambda js, name: js.create_object_store(name),
    "object_store": lambda js, name: js.object_store(name),
    "delete_stream": lambda js, name: js.delete_stream(name),
}


@covers("jetstream/unavailable")
@pytest.mark.parametrize("call", UNAVAILABLE)
async def test_calls_fail_at_once(without_jetstream: Backend, call: str) -> None:
    js = (await without_jetstream.connect()).jetstream(timeout=10)
    start = asyncio.get_running_loop().time()
    with pytest.raises(nats.js.errors.ServiceUnavailableError):
        await UNAVAILABLE[call](js, without_jetstream.subject)
    assert asyncio.get_running_loop().time() - start < 5


@covers("jetstream/unavailable")
async def test_publishes_fail_at_once(without_jetstream: Backend) -> None:
    js = (await without_jetstream.connect()).jetstream(timeout=10)
    with pytest.raises(nats.js.errors.NoStreamResponseError):
        await js.publish(without_jetstream.subject, b"x")
    future = await js.publish_async(without_jetstream.subject, b"x")
    with pytest.raises(nats.js.errors.NoStreamResponseError):
        await asyncio.wait_for(future, 5)
    assert js.publish_async_pending() == 0


@covers("jetstream/unavailable", "jetstream/way-out")
@pytest.mark.parametrize("call", ["account_info", "publish", "publish_async"])
async def test_the_log_names_the_way_out_once(without_jetstream: Backend, call: str, caplog: pytest.LogCaptureFixture) -> None:
    """A server without JetStream is its administrator's choice, and says nothing."""
    nc = await without_jetstream.connect()
    with caplog.at_level(logging.WARNING, "insane_nats"):
        for _ in range(2):
            js = nc.jetstream()
            if call == "account_info":
                with pytest.raises(nats.js.errors.ServiceUnavailableError):
                    await js.account_info()
            elif call == "publish":
                with pytest.raises(nats.js.errors.NoStreamResponseError):
                    await js.publish(without_jetstream.subject)
            else:
                with pytest.raises(nats.js.errors.NoStreamResponseError):
                    await (await js.publish_async(without_jetstream.subject))
    lines = [record.getMessage() for record in caplog.records if "JetStream" in record.getMessage()]
    if without_jetstream.name != "insane":
        assert lines == []
    else:
        (line,) = lines
        assert without_jetstream.url in line and "nats-server -js" in line


@covers("jetstream/unavailable")
async def test_an_ordinary_request_that_nobody_takes_says_nothing(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    nc = await backend.connect()
    nc.jetstream()
    with pytest.raises(nats.errors.NoRespondersError):
        await nc.request(backend.subject, timeout=5)
    await sync(nc)
    assert not [record for record in caplog.records if "JetStream" in record.getMessage()]


@covers("api/modules")
async def test_classes_are_nats_pys(backend: Backend) -> None:
    nc = await backend.connect()
    assert isinstance(nc.jetstream(), importlib.import_module(f"{backend.nats.__name__}.js").JetStreamContext)
    assert isinstance(nc.jetstream(prefix="p"), importlib.import_module("nats.js").JetStreamContext)
    assert nc.jetstream(domain="d")._prefix == "$JS.d.API"
