"""What a connection is, is decided once: neither kind becomes the other over a reconnect, whoever takes the port meanwhile."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import insane_nats
from compat_tests.backend import NatsServer, Nsnd, Server, until

Start = Callable[[type[Server]], Server]


@pytest.fixture
def take(runtime_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a server of a kind on the test's port, where nobody listens at the moment."""
    monkeypatch.setenv("INSANE_NATS_AUTOSTART", "0")
    servers: dict[type[Server], Server] = {}

    def start(kind: type[Server]) -> Server:
        if kind not in servers:
            servers[kind] = kind(runtime_dir / kind.__name__)
            servers[kind].port = next(iter(servers.values())).port
        servers[kind].start()
        return servers[kind]

    yield start
    for server in servers.values():
        server.remove()


class Errors(list[str]):
    async def __call__(self, error: Exception) -> None:
        self.append(str(error))


async def connect(server: Server, errors: Errors, **options: Any) -> Any:
    async def error_cb(error: Exception) -> None:
        await errors(error)

    url = options.pop("url", f"nats://127.0.0.1:{server.port}")
    return await insane_nats.connect(
        url, error_cb=error_cb, reconnect_time_wait=0.02, max_reconnect_attempts=-1, **options
    )


async def works(nc: Any) -> None:
    subscription = await nc.subscribe("a")
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"
    await subscription.unsubscribe()


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [(NatsServer, Nsnd, "This is an insane_nats node"), (Nsnd, NatsServer, "needs the insane_nats node")],
    ids=["plain NATS", "a session"],
)
def test_kind_stays_over_reconnects(take: Start, first: type[Server], second: type[Server], words: str) -> None:
    async def main() -> None:
        errors = Errors()
        own = await asyncio.to_thread(take, first)
        nc = await connect(own, errors)
        insane = nc.is_insane
        assert insane is (first is Nsnd)
        await works(nc)
        await asyncio.to_thread(own.stop)
        await until(lambda: nc.is_reconnecting)
        other = await asyncio.to_thread(take, second)
        await until(lambda: any(words in error for error in errors), what=f"{words}: {errors}")
        assert nc.is_reconnecting and nc.is_insane is insane
        await asyncio.to_thread(other.stop)
        await asyncio.to_thread(take, first)
        await until(lambda: nc.is_connected, what=str(errors[-3:]))
        assert nc.is_insane is insane
        await works(nc)
        await nc.close()

    asyncio.run(main())


def test_connection_that_was_closed_may_become_the_other_kind(take: Start) -> None:
    async def main() -> None:
        nc = insane_nats.NATS()
        for kind in (Nsnd, NatsServer, Nsnd, NatsServer):
            server = await asyncio.to_thread(take, kind)
            await nc.connect(f"nats://127.0.0.1:{server.port}")
            assert nc.is_insane is (kind is Nsnd)
            await works(nc)
            await nc.close()
            await asyncio.to_thread(server.stop)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("tls", {}),
        ("tls", {"tls": ssl.create_default_context()}),
        ("nats", {"tls": ssl.create_default_context(), "tls_hostname": "a.host"}),
        ("nats", {"user": "me", "password": "secret"}),
        ("nats", {"token": "secret"}),
    ],
    ids=["tls://", "tls:// and a context", "context", "user", "token"],
)
def test_within_a_host_encryption_and_credentials_mean_nothing(
    take: Start, scheme: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = await asyncio.to_thread(take, Nsnd)
        errors = Errors()
        nc = await connect(server, errors, url=f"{scheme}://127.0.0.1:{server.port}", **options)
        assert nc.is_insane and not errors
        await works(nc)
        await nc.close()

    with caplog.at_level(logging.INFO, "insane_nats"):
        asyncio.run(main())
    assert not caplog.records
