"""Who is at a URL: an insane_nats node, a NATS server, nobody, or something else; and starting a node where nobody is."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import ParseResult

from insane_nats.shim.errors import AutostartError

AUTOSTART_ENVIRONMENT = "INSANE_NATS_AUTOSTART"
LOOPBACK = "127.0.0.1"
INFO_MAX = 1 << 16  # bytes of an INFO line
AT_ONCE_MS = 1
PARTIAL_WAIT_S = 0.001  # between looks at a line that has come in part
AUTOSTART_POLL_S = 0.01
AUTOSTART_EXTRA_S = 5.0  # beyond connect_timeout: starting an interpreter takes its time on a loaded machine
STDERR_MAX = 4096

Address = tuple[Any, ...]


class Found(Enum):
    NODE = "an insane_nats node"
    SERVER = "a NATS server"
    NOBODY = "nobody at an address of this host"
    ELSE = "something else"


@dataclass
class Probe:
    """What was found at one URL. connection: a socket that has an unread INFO, or nothing yet, in its buffer; the taker
    closes it. error: why it is ELSE or NOBODY. own: the address is one of this host. silent: it takes connections, and sends
    no INFO in time. peer: the address that answered."""

    found: Found
    info: dict[str, Any] | None = None
    connection: socket.socket | None = None
    error: Exception | None = None
    own: bool = False
    silent: bool = False
    peer: str = ""

    @property
    def node(self) -> dict[str, Any]:
        """The `insane` part of a node's INFO."""
        assert self.info is not None
        node: dict[str, Any] = self.info["insane"]
        return node

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def place(uri: ParseResult) -> str:
    """Host and port of a URL, without the credentials that may stand in it: for texts."""
    return uri.netloc.rpartition("@")[2]


def is_own_address(host: str) -> bool:
    """True for a loopback address or one of this host's interfaces (a literal address)."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


async def _addresses(host: str, port: int) -> list[tuple[int, Address]]:
    """(family, address) pairs. Literal addresses and localhost need no resolver, whose thread costs half a millisecond."""
    if host == "localhost":
        return [(socket.AF_INET, (LOOPBACK, port)), (socket.AF_INET6, ("::1", port))]
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(family, address) for family, _, _, _, address in found]
    return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]


async def probe(uri: ParseResult, timeout_s: float) -> Probe:
    """Connects, and reads an INFO line without taking it out of the socket. Never raises for what the network does."""
    host, port = uri.hostname or LOOPBACK, uri.port or 4222
    deadline = asyncio.get_running_loop().time() + timeout_s
    try:
        found = await _probe_host(host, port, deadline)
        if found.found is Found.NOBODY and host != LOOPBACK:
            # A node that was started by itself listens on 127.0.0.1 alone, and is this host's node all the same.
            again = await _probe_host(LOOPBACK, port, deadline)
            return again if again.found in (Found.NODE, Found.SERVER) else found
        return found
    except TimeoutError:
        return Probe(Found.ELSE, error=TimeoutError(f"no connection to {host}:{port} within {timeout_s} s"))


async def _probe_host(host: str, port: int, deadline: float) -> Probe:
    try:
        async with asyncio.timeout_at(deadline):
            addresses = await _addresses(host, port)
    except TimeoutError:
        raise
    except OSError as error:
        return Probe(Found.ELSE, error=error)
    failure: Exception = OSError(errno.EADDRNOTAVAIL, f"no address for {host}")
    nobody = bool(addresses)
    for family, address in addresses:
        try:
            return await _probe_address(family, address, deadline)
        except TimeoutError:
            raise
        except OSError as error:
            failure = error
            unavailable = host == "localhost" and family == socket.AF_INET6  # this host may have no IPv6
            refused = isinstance(error, ConnectionRefusedError) and is_own_address(address[0])
            nobody = nobody and (refused or unavailable)
    return Probe(Found.NOBODY if nobody else Found.ELSE, error=failure)


async def _probe_address(family: int, address: Address, deadline: float) -> Probe:
    """OSError when no connection is made, TimeoutError when that takes too long."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        if not _connected_at_once(connection, address):
            async with asyncio.timeout_at(deadline):
                await loop.sock_connect(connection, address)
        peer = connection.getpeername()[0]
        own = is_own_address(peer)
        try:
            line = _line_at_once(connection) if own else None
            if line is None:
                async with asyncio.timeout_at(deadline):
                    line = await _peek_line(loop, connection)
        except TimeoutError:
            connection.close()
            return Probe(Found.ELSE, error=TimeoutError(f"{address[0]}:{address[1]} says nothing"), own=own, silent=True)
    except BaseException:
        connection.close()
        raise
    info = _parse_info(line)
    if info is None:
        return Probe(Found.ELSE, connection=connection, own=own)
    return Probe(Found.NODE if isinstance(info.get("insane"), dict) else Found.SERVER, info, connection, own=own, peer=peer)


def _connected_at_once(connection: socket.socket, address: Address) -> bool:
    """A loopback connection is made, or refused with an OSError, before connect() returns."""
    number = connection.connect_ex(address)
    if number == errno.EINPROGRESS:
        if not _poll(connection, select.POLLOUT, 0):
            return False
        number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, f"connect to {address[0]}:{address[1]}: {os.strerror(number)}")
    return True


def _line_at_once(connection: socket.socket) -> bytes | None:
    """A node of this host answers sooner than an event loop goes round."""
    if not _poll(connection, select.POLLIN, AT_ONCE_MS):
        return None
    try:
        data = connection.recv(INFO_MAX, socket.MSG_PEEK)
    except (BlockingIOError, ConnectionResetError):
        return None
    return data if b"\n" in data else None


def _poll(connection: socket.socket, event: int, timeout_ms: int) -> bool:
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(timeout_ms))


async def _peek_line(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> bytes:
    """The first line, left in the socket; less when the peer ends before it is whole."""
    seen = -1
    while True:
        try:
            data = connection.recv(INFO_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            await _readable(loop, connection)
            continue
        except ConnectionResetError:
            return b""
        if b"\n" in data or not data or len(data) == INFO_MAX:
            return data
        if len(data) == seen and _ended(connection):
            return data
        seen = len(data)
        await asyncio.sleep(PARTIAL_WAIT_S)


def _ended(connection: socket.socket) -> bool:
    """True when the peer has sent all that it will (a half-closed socket stays readable, so peeking does not tell)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    established = 1
    return info[0] != established


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection.fileno(), _wake, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _parse_info(line: bytes) -> dict[str, Any] | None:
    verb, _, rest = line.partition(b"\n")[0].partition(b" ")
    if verb.upper() != b"INFO":
        return None
    try:
        info = json.loads(rest)
    except ValueError:
        return None
    return info if isinstance(info, dict) else None


def autostart_allowed() -> bool:
    return os.environ.get(AUTOSTART_ENVIRONMENT, "1").strip().lower() not in ("0", "no", "false", "off")


def autostart_command(port: int) -> list[str]:
    return [sys.executable, "-P", "-m", "nsnd", "--autostart", "--port", str(port)]


def waited_for() -> str:
    """Why no node is to be started now: one that somebody started by hand is gone, and is waited for. Empty when one may be."""
    from nsnd.autostart import waited_for  # not needed where a node is there

    return waited_for(os.environ)


async def autostart(uri: ParseResult, command: Sequence[str], timeout_s: float) -> Probe:
    """Runs the command, which starts exactly one nsnd whoever else does the same, until a node or server answers at the URL.

    Raises AutostartError with the command's last words when it ends without success, or nobody answers in time.
    """
    try:
        process = subprocess.Popen(  # noqa: ASYNC220  (returns as soon as it has forked, and needs no child watcher)
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise AutostartError(f"nsnd cannot be started ({' '.join(command)}): {error.strerror}") from error
    deadline = time.monotonic() + timeout_s + AUTOSTART_EXTRA_S
    assert process.stderr is not None
    with process.stderr as words:
        os.set_blocking(words.fileno(), False)
        while True:
            status = process.poll()
            found = await probe(uri, timeout_s)
            if found.found in (Found.NODE, Found.SERVER):
                _leave(process)
                return found
            found.close()
            if status is not None and status != 0:
                raise AutostartError(_last_words(words.read(STDERR_MAX), command, f"ended with status {status}"))
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise AutostartError(_last_words(words.read(STDERR_MAX), command, "did not listen in time"))
            await asyncio.sleep(AUTOSTART_POLL_S)


def _leave(process: subprocess.Popen[bytes]) -> None:
    """The starter ends by itself when its nsnd listens; a thread reaps it where that takes a moment longer."""
    if process.poll() is None:
        threading.Thread(target=process.wait, name="insane_nats autostart", daemon=True).start()


def _last_words(stderr: bytes | None, command: Sequence[str], otherwise: str) -> str:
    lines = [line.strip() for line in (stderr or b"").decode(errors="replace").splitlines() if line.strip()]
    reason = lines[-1] if lines else f"it {otherwise} and said nothing"
    return f"nsnd could not be started ({' '.join(command)}): {reason}"
