"""Proof that a test's messages crossed the shared-memory fabric, and that no NATS socket carried them."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client

SETTLE_TIMEOUT_S = 5.0
POLL_S = 0.01
ESTABLISHED = "01"


def own_tcp_inodes(port: int) -> set[str]:
    """Inodes of established IPv4 and IPv6 connections of this network namespace to a remote port."""
    inodes = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if int(columns[2].rpartition(":")[2], 16) == port and columns[3] == ESTABLISHED:
                inodes.add(columns[9])
    return inodes


def own_socket_inodes() -> set[str]:
    """Inodes of all sockets that this process holds open."""
    inodes = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # closed since it was listed
            continue
        if match := re.fullmatch(r"socket:\[(\d+)\]", target):
            inodes.add(match[1])
    return inodes


class Evidence:
    """Watches the connections of one test to the node on `port`, which keeps its files in `runtime_directory`."""

    def __init__(self, port: int, runtime_directory: Path) -> None:
        self._port = port
        self._socket = runtime_directory / "nsnd.sock"
        self._clients: list[Client] = []

    def watch(self, client: Client) -> None:
        self._clients.append(client)

    async def check(self) -> None:
        """Fails unless each open connection is a session of the node, and what they received came from its fabric.

        The node knows: it reads the counters that sessions keep in shared memory. Only a no-responders message is made by
        the session that hears it, and for each of those it counts a publish that found nobody.
        """
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:  # a connection may be on its way back, a closed one on its way out
            # Read first: what arrives while the node answers is on its side of the comparison alone.
            so_far = {client: client.stats["in_msgs"] for client in self._clients}
            sessions = await asyncio.to_thread(self._own_sessions)
            connected = [client for client in self._clients if client.is_connected]
            if len(sessions) == len(connected):
                break
            assert time.monotonic() < deadline, f"{len(connected)} connections, but the node has {sessions}"
            await asyncio.sleep(POLL_S)
        received = sum(so_far[client] for client in connected)
        crossed = sum(session["counters"]["messages_in"] for session in sessions)
        unroutable = sum(session["counters"]["unroutable"] for session in sessions)
        if any(client.stats["reconnects"] for client in connected):  # a new session counts from zero
            assert not received or crossed or unroutable, sessions
        else:
            assert received <= crossed + unroutable, f"{received} messages received, {crossed} crossed the fabric: {sessions}"

    def names(self) -> list[str]:
        """Of this process's sessions."""
        return [session["name"] for session in self._own_sessions()]

    def _own_sessions(self) -> list[dict[str, Any]]:
        """This process's sessions, as the node reports them."""
        query: Callable[[Path], dict[str, Any]] = importlib.import_module("nsnd.status").query
        return [
            session
            for application in query(self._socket)["applications"]
            for session in application["sessions"]
            if session["pid"] == os.getpid()
        ]

    async def check_sockets(self) -> None:
        """Fails when this process keeps a TCP connection to the node; one that is about to close has time to do so."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while own_tcp_inodes(self._port) & own_socket_inodes():
            assert time.monotonic() < deadline, f"a TCP connection to port {self._port} stays open"
            await asyncio.sleep(POLL_S)
