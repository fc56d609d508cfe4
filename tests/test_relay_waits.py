"""What a relay does when the fabric cannot take what its client publishes, and that it sleeps while it waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

import insane_nats as nats
from insane_nats.shim.attach import NOT_DELIVERED
from nsnd._relay import ffi, lib
from tests import nsnd_client
from tests.auth_node import LIMITED_USERS, AuthNode, Raw, auth_node
from tests.nsnd_client import RawNode

BUDGET = 16 << 20
DEADLINE_S = 0.2


class Client(Raw):
    """Of a relay of this process, with little memory and little patience."""

    def __init__(self, node: RawNode) -> None:
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self._texts = [ffi.new("char[]", text.encode()) for text in (str(node.socket), "relay", "{}")]
        self._permissions = ffi.gc(lib.nsn_permissions_new(), lib.nsn_permissions_free)
        self._options = ffi.new("struct nsn_relay_options *", {
            "socket_path": self._texts[0], "name": self._texts[1], "info": self._texts[2], "lame_duck": self._texts[2],
            "application_id": node.port, "subscriptions_max": 10, "max_payload": BUDGET, "budget": BUDGET,
            "write_deadline_ns": int(DEADLINE_S * 1e9), "relays": lib.nsn_relays_new(), "permissions": self._permissions,
        })
        self._thread = Thread(target=lib.nsn_relay_run, args=(ours.detach(), self._options))
        self._thread.start()
        self.data = b""
        self.sock.settimeout(10)
        self.line()

    def close(self) -> None:
        self.sock.close()
        self._thread.join()


def message(subject: str, size: int) -> bytes:
    return b"PUB %s %d\r\n%s\r\n" % (subject.encode(), size, bytes(size))


def dropped(node: RawNode) -> int:
    return next(int(one["counters"]["dropped"]) for one in node.application()["sessions"] if one["name"] == "relay")


@pytest.mark.parametrize("verbose", ["false", "true"])
def test_what_cannot_be_delivered_is_told_and_counted(verbose: str) -> None:
    """A subscriber that was given up holds the memory; another one could be served, but for that."""
    async def run(node: RawNode) -> None:
        client = await asyncio.to_thread(Client, node)
        await asyncio.to_thread(client.says, f'CONNECT {{"verbose":{verbose},"pedantic":false}}\r\n')
        stops, reads = [await nats.connect(f"nats://127.0.0.1:{node.port}") for _ in range(2)]
        await stops.subscribe("stops")
        heard = await reads.subscribe("reads")
        await stops.flush()
        await reads.flush()
        for _ in range(12):  # the loop of `stops` does not run meanwhile
            client.says(message("stops", 1 << 20))
        before = dropped(node)
        ok = ["+OK"] if verbose == "true" else []
        (line,) = client.says(message("reads", 12 << 20))
        assert line == ("-ERR 'Message Not Delivered to \"reads\": subscribers that do not read hold the 16 MiB which the node "
                        "keeps for this connection, until they read or end'")
        assert line.lower().startswith(f"-err {NOT_DELIVERED}")
        assert dropped(node) == before + 1
        assert client.says(message("reads", 10)) == ok
        assert len((await heard.next_msg(5)).data) == 10
        await asyncio.to_thread(client.close)
        await stops.close()
        await reads.close()

    with nsnd_client.node() as node:
        asyncio.run(run(node))


def test_it_is_told_to_the_program_and_the_connection_goes_on() -> None:
    told: list[Exception] = []

    async def note(error: Exception) -> None:
        told.append(error)

    async def run() -> None:
        client = nats.NATS()
        client._relayed, client._error_cb, client._status = True, note, client.CONNECTED
        await client._process_err("'message not delivered to \"a\": no memory'")
        await asyncio.sleep(0)
        assert client.is_connected
        assert [(type(error), str(error)) for error in told] == [
            (nats.errors.NotDeliveredError, 'nats: message not delivered to "a": no memory')]
        client._relayed = False
        await client._process_err("'message not delivered to \"a\": no memory'")
        await asyncio.sleep(0)
        assert client.is_closed

    asyncio.run(run())


# --- sleep ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def node() -> Iterator[AuthNode]:
    with auth_node(LIMITED_USERS) as running:
        yield running


def sleeps(node: RawNode, seconds: float) -> float:
    """How often a second threads of the node have gone to sleep."""
    assert node.process is not None
    tasks = Path(f"/proc/{node.process.pid}/task")

    def count() -> int:
        lines = [line for task in tasks.iterdir() for line in (task / "status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    before = count()
    time.sleep(seconds)
    return (count() - before) / seconds


def fill(raw: Raw, line: bytes) -> None:
    """Until nobody takes more."""
    raw.sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        for _ in range(10_000):
            raw.sock.sendall(line)


def test_a_relay_sleeps_while_it_waits_for_room(node: AuthNode) -> None:
    async def run() -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        await free.subscribe("may.>")
        await free.flush()
        raw = Raw(node)
        raw.says("")
        fill(raw, message("may.x", 60_000))  # the loop of the subscriber does not run meanwhile
        assert sleeps(node, 1) < 60
        raw.sock.close()
        await free.close()

    asyncio.run(run())


def test_a_relay_sleeps_while_its_client_does_not_read(node: AuthNode) -> None:
    raw = Raw(node)
    raw.says("")
    fill(raw, b"PUB not 0\r\n\r\n" * 1000)
    assert sleeps(node, 1) < 60


def test_a_relay_that_is_idle_does_nothing(node: AuthNode) -> None:
    raw = Raw(node)
    raw.says("SUB hear.> group 1\r\nPUB may.x 1\r\nx\r\nUNSUB 1\r\n")
    time.sleep(2.5)
    assert sleeps(node, 2) <= 1
