"""The loopback TCP ports: who has port N has application ID N, as with nats-server. Whoever connects reads an INFO."""

from __future__ import annotations

import errno
import json
import select
import socket
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import NamedTuple

from nsnd.logs import Log
from nsnd.loop import Loop, Timer

LOOPBACK = "127.0.0.1"
OPEN_MAX = 1024  # connections at a time; above, the oldest is closed
ATTACH_SOON_S = 300e-6  # who has read INFO mostly says HELLO within this time
IDLE_S = 5.0
ACCEPT_BURST = 64
ACCEPT_RETRY_S = 0.1
INFO_MAX = 65536
NOT_A_SERVER = b"-ERR 'This is an insane_nats node; use insane_nats, or point this client at a nats-server'\r\n"

InfoFor = Callable[[int, str, str], dict[str, object]]


class Visitor:
    """One TCP connection: INFO was sent, and what it says to that is waited for."""

    __slots__ = ("answered", "deadline", "line", "sock")

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.line = b""
        self.answered = False


class Arbiter:
    """Ports by application ID. `info(application_id, host, client_ip)` is what INFO says; `visited` hears of each visit."""

    def __init__(self, loop: Loop, log: Log, info: InfoFor, visited: Callable[[int], None]) -> None:
        self._loop = loop
        self._log = log
        self._info = info
        self._visited = visited
        self._listeners: dict[int, list[socket.socket]] = {}
        self._visitors: dict[int, Visitor] = {}  # by descriptor, oldest first
        self._timer: Timer | None = None

    def owns(self, application_id: int) -> bool:
        return application_id in self._listeners

    def open(self, application_id: int, addr: str = LOOPBACK) -> None:
        """Binds the port, on loopback and on `addr`. OSError when it cannot be had; then nothing was bound."""
        listeners: list[socket.socket] = []
        try:
            for host in _hosts(addr):
                listeners.append(_listen(host, application_id))
        except OSError:
            for listener in listeners:
                listener.close()
            raise
        self._listeners[application_id] = listeners
        for listener in listeners:
            self._loop.add(listener.fileno(), select.EPOLLIN, partial(self._accept, listener, application_id))

    def close(self, application_id: int) -> None:
        for listener in self._listeners.pop(application_id, []):
            self._loop.remove(listener.fileno(), listener)

    def close_all(self) -> None:
        for application_id in list(self._listeners):
            self.close(application_id)
        for visitor in list(self._visitors.values()):
            self._leave(visitor)

    # --- visitors ---------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, application_id: int, events: int) -> None:
        for _ in range(ACCEPT_BURST):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                self._log.error("no TCP connection can be accepted, trying again", port=application_id, error=error.strerror)
                self._loop.change(listener.fileno(), 0)
                self._loop.call_later(ACCEPT_RETRY_S, partial(self._accept_again, listener))
                return
            self._welcome(sock, application_id, address[0])

    def _accept_again(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            self._loop.change(listener.fileno(), select.EPOLLIN)

    def _welcome(self, sock: socket.socket, application_id: int, client_ip: str) -> None:
        self._visited(application_id)
        sock.setblocking(False)
        info = self._info(application_id, _plain(sock.getsockname()[0]), _plain(client_ip))
        try:
            sock.send(b"INFO " + json.dumps(info, separators=(",", ":")).encode() + b" \r\n", socket.MSG_NOSIGNAL)
        except OSError:
            sock.close()  # it has gone already
            return
        self._loop.stay_awake(ATTACH_SOON_S)
        if len(self._visitors) >= OPEN_MAX:
            self._leave(next(iter(self._visitors.values())))
        visitor = Visitor(sock, monotonic() + IDLE_S)
        self._visitors[sock.fileno()] = visitor
        self._loop.add(sock.fileno(), select.EPOLLIN, lambda events: self._read(visitor))
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE_S, self._end_idle)

    def _read(self, visitor: Visitor) -> None:
        try:
            data = visitor.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._leave(visitor)
        elif not visitor.answered:
            visitor.line += data
            if b"\n" in visitor.line or len(visitor.line) > 4096:
                self._answer(visitor)

    def _answer(self, visitor: Visitor) -> None:
        """Our own clients say nothing: this one means to speak NATS. Closing at once would reset the answer away."""
        visitor.answered = True
        try:
            visitor.sock.send(NOT_A_SERVER, socket.MSG_NOSIGNAL)
            visitor.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._leave(visitor)

    def _leave(self, visitor: Visitor) -> None:
        if self._visitors.pop(visitor.sock.fileno(), None) is not None:
            self._loop.remove(visitor.sock.fileno(), visitor.sock)

    def _end_idle(self) -> None:
        self._timer = None
        now = monotonic()
        for visitor in list(self._visitors.values()):
            if visitor.deadline > now:
                self._timer = self._loop.call_later(visitor.deadline - now, self._end_idle)
                return
            self._leave(visitor)


class Listener(NamedTuple):
    """Who listens on a port: what its INFO says. `uid`, `pid`, `socket` are None for a nats-server."""

    version: str
    server_name: str
    uid: int | None
    pid: int | None
    socket: str | None

    @property
    def is_node(self) -> bool:
        return self.uid is not None

    def __str__(self) -> str:
        if self.is_node:
            return f"an insane_nats node of uid {self.uid} (pid {self.pid}, control socket {self.socket})"
        return f"a NATS server (version {self.version}, name {self.server_name})"


def who_listens(port: int, host: str = LOOPBACK, timeout_s: float = 1.0) -> Listener | None:
    """Reads the INFO at an IP address's port. None when nobody listens there who speaks NATS. Blocks for at most timeout_s."""
    deadline = monotonic() + timeout_s
    line = b""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.settimeout(timeout_s)
            sock.connect((host, port))
            while b"\n" not in line and len(line) < INFO_MAX:
                sock.settimeout(max(0.001, deadline - monotonic()))
                data = sock.recv(4096)
                if not data:
                    return None
                line += data
    except OSError:
        return None
    return _listener(line)


def _listener(line: bytes) -> Listener | None:
    if not line.startswith(b"INFO "):
        return None
    try:
        info = json.loads(line[5 : line.index(b"\n")])
    except ValueError:
        return None
    if not isinstance(info, dict):
        return None
    node = info.get("insane")
    if not isinstance(node, dict):
        return Listener(str(info.get("version")), str(info.get("server_name")), None, None, None)
    name = str(info.get("server_name"))
    return Listener(str(node.get("version")), name, node.get("uid"), node.get("pid"), node.get("socket"))


def _plain(host: str) -> str:
    """An IPv4 address as such, also where it came through an IPv6 socket."""
    return host.removeprefix("::ffff:")


def _hosts(addr: str) -> list[str]:
    """A node is found at the loopback address always; "any address" contains it."""
    if addr == LOOPBACK:
        return [addr]
    from ipaddress import ip_address  # not on the way to a quick start

    return [addr] if ip_address(addr).is_unspecified else [LOOPBACK, addr]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        listener.bind((host, port))
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener
