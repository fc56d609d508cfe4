"""Connecting again where this process has attached before: the node is asked at once, and what is there now decides."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from nats import errors

import insane_nats as nats
from insane_nats.shim import known_nodes, node
from tools import servers
from tools.servers import Server


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_nodes, "_nodes", {})
    monkeypatch.setenv("INSANE_NATS_AUTOSTART", "0")


def nsnd_at(port: int, folder: Path) -> AbstractContextManager[Server]:
    """In the test's runtime directory (the fixture runtime_dir)."""
    return servers.serving([sys.executable, "-m", "nsnd", "--port", str(port)], port, folder)


def meet(port: int, **options: Any) -> nats.NATS:
    """Connects, sends itself a message, and closes."""

    async def main() -> nats.NATS:
        client = await nats.connect(f"nats://127.0.0.1:{port}", **options)
        subscription = await client.subscribe("a")
        await client.publish("a", b"x")
        assert (await subscription.next_msg(5)).data == b"x"
        await client.close()
        return client

    return asyncio.run(main())


def node_of(client: nats.NATS) -> int:
    return int(client._server_info["insane"]["pid"])


def test_second_connection_does_not_ask_at_the_port(nsnd: Server) -> None:
    first = meet(nsnd.port)
    with mock.patch.object(node, "probe", side_effect=AssertionError("asked")):
        second = meet(nsnd.port)
    assert first.is_insane and second.is_insane
    assert {**first._server_info, "client_id": 0} == {**second._server_info, "client_id": 0}
    assert first._server_info["client_id"] != second._server_info["client_id"]


@pytest.mark.parametrize("ends_by", [signal.SIGTERM, signal.SIGKILL])
def test_another_node_has_taken_its_place(runtime_dir: Path, free_port: int, tmp_path: Path, ends_by: signal.Signals) -> None:
    with nsnd_at(free_port, tmp_path) as before:
        assert node_of(meet(free_port)) == before.pid
        before.process.send_signal(ends_by)
        before.process.wait()
        with nsnd_at(free_port, tmp_path) as after:
            assert node_of(meet(free_port)) == after.pid


def test_a_nats_server_has_taken_the_port(runtime_dir: Path, free_port: int, tmp_path: Path) -> None:
    with nsnd_at(free_port, tmp_path):
        assert meet(free_port).is_insane
    command = [servers.command_path("nats-server"), "-a", "127.0.0.1", "-p", str(free_port)]
    with servers.serving(command, free_port, tmp_path):
        assert not meet(free_port).is_insane


def test_a_nats_server_has_the_port_and_the_node_lives(runtime_dir: Path, free_port: int, nsnd: Server, tmp_path: Path) -> None:
    """The node's control socket takes connections; whose port it is, is asked all the same."""
    meet(nsnd.port)
    known_nodes._nodes[("127.0.0.1", free_port)] = known_nodes._nodes[("127.0.0.1", nsnd.port)]
    command = [servers.command_path("nats-server"), "-a", "127.0.0.1", "-p", str(free_port)]
    with servers.serving(command, free_port, tmp_path):
        assert not meet(free_port).is_insane


def test_nobody_is_there_any_more(runtime_dir: Path, free_port: int, tmp_path: Path) -> None:
    with nsnd_at(free_port, tmp_path):
        meet(free_port)
    with pytest.raises(errors.NoServersError, match="nobody listens"):
        meet(free_port, allow_reconnect=False)


def test_the_node_is_stopped(nsnd: Server) -> None:
    async def quiet(_: Exception) -> None:
        pass

    meet(nsnd.port)
    os.kill(nsnd.pid, signal.SIGSTOP)
    try:
        with pytest.raises((asyncio.TimeoutError, errors.NoServersError)):
            meet(nsnd.port, connect_timeout=0.3, allow_reconnect=False, error_cb=quiet)
    finally:
        os.kill(nsnd.pid, signal.SIGCONT)
    assert node_of(meet(nsnd.port)) == nsnd.pid


def test_only_what_cannot_be_another_ones_is_known(nsnd: Server) -> None:
    """127.0.0.1 is the node's as long as it lives. At another address of this host somebody else may listen meanwhile."""

    async def main() -> None:
        for host in ("127.0.0.7", "localhost"):
            client = await nats.connect(f"nats://{host}:{nsnd.port}")
            assert client.is_insane
            await client.close()

    asyncio.run(main())
    assert list(known_nodes._nodes) == [("localhost", nsnd.port)]


def test_connect_that_does_not_come_to_the_known_node_leaves_nothing(nsnd: Server, nats_server: Server) -> None:
    """It is cancelled while a server before that one in the pool is waited for. The next one decides anew."""
    meet(nsnd.port)

    async def main() -> None:
        client = nats.NATS()
        entered = asyncio.Event()

        async def wait(_: Exception) -> None:
            entered.set()
            await asyncio.sleep(60)

        dead = servers.free_port()
        pool = [f"nats://127.0.0.1:{dead}", f"nats://127.0.0.1:{nsnd.port}"]
        connecting = asyncio.create_task(client.connect(pool, dont_randomize=True, error_cb=wait))
        await entered.wait()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert not client.is_insane
        assert client._session is None and client._early is None
        client._server_pool.clear()
        await client.connect(nats_server.url, error_cb=wait)
        assert not client.is_insane
        await client.close()

    asyncio.run(main())
