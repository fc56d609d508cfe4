"""One session of libnsn as a Python object: opened, closed exactly once, and given up in a forked child.

It is not closed while anything could still call libnsn with it: the collector runs the finalizers of garbage (coroutines and
programs' __del__) in any order, and a thread's event loop may go on until the process ends."""

from __future__ import annotations

import atexit
import errno
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from insane_nats.shim.errors import SessionError
from insane_nats.shim.native import ffi, lib

if TYPE_CHECKING:
    from insane_nats._fast import Lender

ERROR_SIZE = 512  # bytes, as libnsn keeps
NONCE_SIZE = 64
NAME_MAX = 127  # bytes of UTF-8

CONNECTING, READY, DETACHED, REFUSED, CLOSED, LOST = range(6)  # enum nsn_session_state


@dataclass(frozen=True)
class SessionOptions:
    """What a session is opened with. pending_size: bytes kept while nsnd is gone for what needs it;
    write_deadline_ns: how long a queue message that is passed on waits for a member that is full; 0: libnsn's defaults.
    relay: it was relayed before."""

    socket_path: str
    application_id: int
    name: str = ""
    no_echo: bool = False
    unreliable: bool = False
    pending_size: int = 0
    write_deadline_ns: int = 0
    relay: bool = False


@dataclass(frozen=True)
class SessionInfo:
    """What nsnd answered."""

    client_id: int
    max_payload: int  # bytes
    node_pid: int  # nsnd's process
    version: str


class Session:
    """A session that is being attached. handle is what the functions of libnsn take; None when closed."""

    def __init__(self, options: SessionOptions) -> None:
        """SessionError when nsnd's socket does not take the connection. What nsnd says comes later, by process()."""
        path = ffi.new("char[]", os.fsencode(options.socket_path))
        name = ffi.new("char[]", options.name.encode()[:NAME_MAX])
        given = ffi.new(
            "struct nsn_session_options *",
            {
                "socket_path": path,
                "name": name,
                "application_id": options.application_id,
                "no_echo": options.no_echo,
                "unreliable": options.unreliable,
                "pending_size": options.pending_size,
                "write_deadline_ns": options.write_deadline_ns,
                "answers": True,
                "relay": options.relay,
            },
        )
        error = ffi.new("char[]", ERROR_SIZE)
        handle = lib.nsn_session_open(given, error, ERROR_SIZE)
        if handle == ffi.NULL:
            raise SessionError(ffi.errno, _text(error))
        self._keeper = ffi.gc(handle, lib.nsn_session_close)  # with the last reference to it the session ends
        self.handle: Any = self._keeper
        self.when_inherited: Callable[[], None] | None = None
        self.when_exiting: Callable[[], None] | None = None
        self._lenders: list[Lender] = []
        self._thread = threading.get_ident()
        _open.add(self)

    @property
    def state(self) -> int:
        return CLOSED if self.handle is None else int(lib.nsn_session_state(self.handle))

    @property
    def address(self) -> int:
        """For insane_nats._fast, which must let go of it before close(), and refer to `handle` as its keeper."""
        return int(ffi.cast("uintptr_t", self.handle))

    @property
    def is_open(self) -> bool:
        """False when its memory is gone."""
        return self._keeper is not None

    @property
    def control_fd(self) -> int:
        return int(lib.nsn_session_control_fd(self.handle))

    @property
    def bell_fd(self) -> int:
        return int(lib.nsn_session_bell_fd(self.handle))

    def process(self, spin_ns: int = 0) -> int:
        """Talks to nsnd: 1 when something changed, 0, or a negative errno."""
        return int(lib.nsn_session_process(self.handle, spin_ns))

    def error(self) -> str:
        """The words of the last error."""
        return "" if self.handle is None else _text(lib.nsn_session_error(self.handle))

    @property
    def unauthorized(self) -> bool:
        """Whether nsnd does not know the credentials that were given, or knows them no more."""
        return self.handle is not None and int(lib.nsn_session_refusal(self.handle)) == errno.EKEYREJECTED

    def challenge(self) -> str | None:
        """What is to be signed, "" where nobody can do that, when nsnd waits for credentials."""
        nonce = ffi.new("char[]", NONCE_SIZE)
        return _text(nonce) if lib.nsn_session_challenge(self.handle, nonce, NONCE_SIZE) else None

    def relay(self) -> int:
        """The descriptor of nsnd's relay, which is the caller's, when that is to be talked to in place of this; or -1."""
        return int(lib.nsn_session_relay(self.handle))

    def answer(self, connect: bytes) -> None:
        """To the challenge: the JSON of a CONNECT. SessionError."""
        result = lib.nsn_session_answer(self.handle, connect, len(connect))
        if result < 0:
            raise SessionError(-result, self.error())

    def info(self) -> SessionInfo:
        info = ffi.new("struct nsn_session_info *")
        lib.nsn_session_info(self.handle, info)
        return SessionInfo(info.client_id, info.max_payload, info.node_pid, _text(info.version))

    def counters(self) -> dict[str, int]:
        """The session's counters (struct nsn_counters), by name."""
        counters = ffi.new("struct nsn_counters *")
        lib.nsn_session_counters(self.handle, counters)
        return {name: int(getattr(counters, name)) for name, _ in ffi.typeof("struct nsn_counters").fields}

    def reattach(self, socket_path: str) -> None:
        """After DETACHED or REFUSED; SessionError when nsnd's socket does not take the connection."""
        result = lib.nsn_session_reattach(self.handle, os.fsencode(socket_path))
        if result < 0:
            raise SessionError(-result, self.error())

    def lends_by(self, lender: Lender) -> None:
        """Memory is lent by it: the session may not be closed before that is back."""
        self._lenders.append(lender)

    def close(self) -> None:
        """Now, or when the last view of what was lent is gone."""
        self.handle = None
        self.when_inherited = self.when_exiting = None  # the collector does not see that what is lent refers to here
        for lender in self._lenders:
            if lender.lent:
                lender.when_returned = self._end
                return
        self._end()

    def _end(self) -> None:
        if self._keeper is not None:
            ffi.release(self._keeper)
            self._keeper = None

    def _inherited(self) -> None:
        """In a forked child: the memory and the sockets' other ends are the parent's."""
        if self._keeper is None:
            return
        ffi.gc(self._keeper, None)
        lib.nsn_session_abandon(self._keeper)
        self.handle = self._keeper = None
        if self.when_inherited is not None:
            self.when_inherited()

    def _exiting(self, running: set[int | None]) -> None:
        if self.handle is None or (self._thread != threading.get_ident() and self._thread in running):
            return
        if self.when_exiting is not None:
            self.when_exiting()
        self.close()


def _text(words: Any) -> str:
    return bytes(ffi.string(words)).decode(errors="replace")


_open: weakref.WeakSet[Session] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for session in list(_open):
        session._inherited()


os.register_at_fork(after_in_child=_after_fork_in_child)


@atexit.register
def _at_exit() -> None:
    """Says goodbye for what was never closed. Not for what a daemon thread may be using, nor while memory is lent, whose views
    must stay good to the last: the kernel takes that back."""
    running = {thread.ident for thread in threading.enumerate()}
    for session in list(_open):
        session._exiting(running)
