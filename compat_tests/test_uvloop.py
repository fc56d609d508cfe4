"""The main paths once more, on uvloop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import nats.errors
import pytest

from compat_tests.backend import arrived, payloads, sync, until

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

pytestmark = [pytest.mark.uvloop, pytest.mark.covers("api/uvloop")]


async def test_the_loop_is_uvloop(backend: Backend) -> None:
    assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")


async def test_publish_and_subscribe(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    called: list[int] = []

    async def handler(message: Msg) -> None:
        called.append(int(message.data))

    subscription = await nc.subscribe(backend.subject)
    await nc.subscribe(backend.subject, cb=handler)
    await sync(nc)
    for number in range(2000):
        await publisher.publish(backend.subject, b"%d" % number)
    await arrived(publisher, nc)
    await until(lambda: len(called) == 2000)
    assert called == [int(data) for data in await payloads(subscription)] == list(range(2000))


async def test_idle_subscriber_wakes(backend: Backend) -> None:
    """One message at a time, so that each of them finds the other side waiting."""
    one, two = await backend.connect(), await backend.connect()

    async def handler(message: Msg) -> None:
        await message.respond(message.data)

    await two.subscribe(backend.subject, cb=handler)
    await sync(two)
    for number in range(200):
        assert (await one.request(backend.subject, b"%d" % number, timeout=5)).data == b"%d" % number


async def test_large_payloads(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    for number in range(20):
        await publisher.publish(backend.subject, bytes([number]) * 1024 * 1024)
    for number in range(20):
        assert (await subscription.next_msg(5)).data == bytes([number]) * 1024 * 1024


async def test_timeouts_and_no_responders(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    with pytest.raises(nats.errors.TimeoutError):
        await subscription.next_msg(timeout=0.05)
    with pytest.raises(nats.errors.TimeoutError):
        await nc.request(backend.subject, timeout=0.05)
    with pytest.raises(nats.errors.NoRespondersError):
        await nc.request(f"{backend.subject}.nobody", timeout=5)


async def test_drain(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    got: list[int] = []

    async def handler(message: Msg) -> None:
        got.append(int(message.data))

    await nc.subscribe(backend.subject, cb=handler)
    await sync(nc)
    for number in range(500):
        await publisher.publish(backend.subject, b"%d" % number)
    await sync(publisher)
    await nc.drain()
    assert got == list(range(500)) and nc.is_closed


async def test_restart(own_backend: Backend) -> None:
    async def ignore(_: Exception) -> None:
        pass

    nc = await own_backend.connect(error_cb=ignore, max_reconnect_attempts=-1)
    subscription = await nc.subscribe("a")
    await sync(nc)
    await own_backend.stop_server()
    await until(lambda: nc.is_reconnecting)
    await own_backend.start_server()
    await until(lambda: nc.is_connected)
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"
