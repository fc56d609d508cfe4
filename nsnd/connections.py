"""One connection on the control socket: packets in, packets out, never blocking, everything it holds bounded."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from array import array
from collections import deque
from typing import TYPE_CHECKING, Protocol

from nsnd.loop import Loop
from nsnd.protocol import INTEREST_DONE, MAGIC, PACKET_MAX, VERSION_MAX, PacketType

if TYPE_CHECKING:
    from nsnd.protocol import Hello
    from nsnd.sessions import Session

OUT_MAX = 1024  # packets that wait for a peer that does not read; above, nothing more is read from it
BURST = 64  # packets taken from one connection before the others have their turn
DRAIN_MAX = 8192  # more than a socket buffer holds
FDS_MAX = 4

_ANCILLARY = socket.CMSG_SPACE(FDS_MAX * 4)
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_CREDENTIALS = struct.Struct("3i")


class Receiver(Protocol):
    """Who deals with what a connection reads."""

    def received(self, connection: Connection, packet: memoryview, fds: list[int], flags: int) -> None:
        """A packet; the descriptors are the receiver's. The memory is used again after the call."""

    def serve(self, connection: Connection) -> None:
        """The short way for what comes most, before packets are read one by one."""

    def disconnected(self, connection: Connection) -> None:
        """The other end has closed, or broke off."""

    def may_read(self, connection: Connection) -> bool:
        """Whether more may be read from it now."""

    def failed(self, connection: Connection, error: Exception) -> None:
        """Something that cannot happen did: the connection is to be given up, the others are not."""


class Login:
    """A session that says who it is, and has not been let in yet."""

    __slots__ = ("answered", "hello", "nonce")

    def __init__(self, hello: Hello, nonce: str) -> None:
        self.hello = hello
        self.nonce = nonce
        self.answered = False


class Connection:
    """`pid`, `uid`: of the peer, from the kernel. `version`: of the protocol, known from its HELLO on."""

    __slots__ = ("_buffer", "_done", "_events", "_loop", "_out", "_receiver", "closed", "login", "pid", "session", "sock",
                 "uid", "version")

    def __init__(self, loop: Loop, sock: socket.socket, receiver: Receiver, buffer: memoryview) -> None:
        self._loop = loop
        self._receiver = receiver
        self._buffer = buffer
        self._out: deque[tuple[bytes, int]] = deque()
        self._done = 0
        self._events = select.EPOLLIN
        self.sock = sock
        self.pid, self.uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        self.version = VERSION_MAX
        self.login: Login | None = None
        self.session: Session | None = None
        self.closed = False
        loop.add(sock.fileno(), self._events, self._ready)

    # --- in ---------------------------------------------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                self._flush()
            if events & select.EPOLLHUP:
                self.drain()
            elif events & ~select.EPOLLOUT:
                self._loop.stay_awake()
                if self.session is not None and not self._out and self.reads():
                    self._receiver.serve(self)
                self._read(BURST)
                self.update()
        except Exception as error:
            self._receiver.failed(self, error)

    def drain(self) -> None:
        """Takes all that the peer has sent, whether or not it may be read now."""
        try:
            self._read(DRAIN_MAX, everything=True)
        except Exception as error:
            self._receiver.failed(self, error)

    def hang_up(self) -> None:
        """Ends it from this side."""
        self._receiver.disconnected(self)

    def _read(self, most: int, *, everything: bool = False) -> None:
        receive, received, buffer = self.sock.recvmsg_into, self._receiver.received, self._buffer
        for _ in range(most):
            if self.closed or not (everything or self.reads()):
                break
            try:
                length, ancillary, flags, _ = receive((buffer,), _ANCILLARY, _FLAGS)
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # it closed without having read all that was sent to it; what it sent itself is still there
            fds = _descriptors(ancillary) if ancillary else []
            if length == 0:
                _close_all(fds)
                self._receiver.disconnected(self)
                return
            received(self, buffer[:length], fds, flags)
        self._answer_interest()

    def reads(self) -> bool:
        """Whether more may be read: not while the peer itself reads nothing, nor while it is far ahead of others."""
        return len(self._out) < OUT_MAX and self._receiver.may_read(self)

    # --- out --------------------------------------------------------------------------------------------------------

    def interest_done(self, sequence: int) -> None:
        """Answered once for all packets of a burst, before anything else is sent: this and all before it are done."""
        self._done = sequence

    def _answer_interest(self) -> None:
        if self._done:
            sequence, self._done = self._done, 0
            self.send(INTEREST_DONE.pack(MAGIC, PacketType.INTEREST_DONE, self.version, sequence, 0, 0))

    def send(self, packet: bytes, fd: int = -1) -> None:
        """In order; what the peer cannot take yet waits. `fd` stays the caller's and open until the peer has it."""
        if self.closed:
            return
        if self._done:
            self._answer_interest()
        if self._out or not self._send_now(packet, fd):
            self._out.append((packet, fd))
            self.update()

    def _send_now(self, packet: bytes, fd: int) -> bool:
        try:
            if fd < 0:
                self.sock.send(packet, _SEND_FLAGS)
            else:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
                self.sock.sendmsg([packet], rights, _SEND_FLAGS)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            return True  # it has closed: the loop will read to the end of what it sent, and see that
        except OSError as error:
            self._receiver.failed(self, error)
        return True

    def _flush(self) -> None:
        while self._out and self._send_now(*self._out[0]):
            if self._out:  # not given up meanwhile
                self._out.popleft()
        self.update()

    def update(self) -> None:
        """Watches for what can be done now."""
        if self.closed:
            return
        events = (select.EPOLLIN if self.reads() else 0) | (select.EPOLLOUT if self._out else 0)
        if events != self._events:
            self._events = events
            self._loop.change(self.sock.fileno(), events)

    def close(self) -> None:
        """What was sent can still be read by the peer. Idempotent."""
        if self.closed:
            return
        self._answer_interest()
        if self.closed:  # it could not be sent
            return
        self.closed = True
        self._out.clear()
        self._discard()
        self._loop.remove(self.sock.fileno(), self.sock)

    def _discard(self) -> None:
        """Unread packets would make the kernel say "reset" to the peer, before it has read what was sent last."""
        try:
            self.sock.shutdown(socket.SHUT_RD)
            for _ in range(DRAIN_MAX):
                length, ancillary, _, _ = self.sock.recvmsg_into((self._buffer,), _ANCILLARY, _FLAGS)
                _close_all(_descriptors(ancillary))
                if length == 0:
                    break
        except OSError:
            return  # it has closed as well


def receive_buffer() -> memoryview:
    """One for all connections of a thread."""
    return memoryview(bytearray(PACKET_MAX))


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def is_memory(fd: int) -> bool:
    """Whether it is a memory file, which is closed in no time. A socket that lingers, or a file of FUSE, may take for ever."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def close_elsewhere(fds: list[int]) -> None:
    """Closes what may take for ever in a thread of its own."""
    from threading import Thread  # not on the way to a quick start

    Thread(target=_close_all, args=(fds,), daemon=True).start()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
