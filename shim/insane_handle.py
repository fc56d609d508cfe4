"""libnsn's handle of an INSANE session, shared by those who use it: closed when the last of them has gone."""

from __future__ import annotations

import collections
import errno
import os
import threading
import weakref
from typing import Any

from insane_nats.shim.native import ffi, lib, missing

CLOSE_NS = 2_000_000_000  # longest wait for those who have not taken what was emitted
FOR_EVER_NS = 2**64 - 1


class InsaneError(OSError):
    """Something that libnsn or nsnd cannot do: errno, and the reason with the way out."""


class ClosedError(InsaneError):
    """The session, stream, source or sink is closed."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.ESHUTDOWN, f"the {what} is closed")


def failure(number: int) -> InsaneError:
    """The error that libnsn has just returned (a negative errno) in this thread."""
    return InsaneError(-number, ffi.string(lib.nsn_insane_error()).decode(errors="replace"))


def checked(number: int) -> int:
    """The number, unless it is negative: then its InsaneError."""
    if number < 0:
        raise failure(number)
    return number


class Handle:
    """An open session. Its memory stays as long as a call is inside it (a with block), or a buffer of it is out."""

    def __init__(self, application_id: int, name: str, echo: bool, command: list[str], credentials: dict[str, str]) -> None:
        if lib is None:
            raise InsaneError(errno.ENOSYS, f"INSANE's primitives are not available: {missing}")
        words = [ffi.new("char[]", os.fsencode(word)) for word in command]
        argv = ffi.new("char *[]", [*words, ffi.NULL])
        shown = ffi.new("char[]", name.encode())
        texts = {key: ffi.new("char[]", text.encode()) for key, text in credentials.items()}
        given = {"application_id": application_id, "name": shown, "echo": echo, "nsnd": argv, **texts}
        options = ffi.new("struct nsn_insane_options *", given)
        self._keep = (words, argv)  # an nsnd may have to be started again
        self._lock = threading.Lock()
        self._unused = threading.Condition(self._lock)
        self._users = 0
        self._held = 0
        self._returned: collections.deque[None] = collections.deque()  # buffers that came back by collection
        self.closed = False
        self.inherited = False
        session = lib.nsn_insane_open(options)
        if session == ffi.NULL:
            raise failure(-ffi.errno)
        self.session: Any = session
        _open.add(self)

    def __enter__(self) -> Any:
        """What the functions of libnsn take, until the block ends. ClosedError."""
        with self._lock:
            if self.closed:
                raise ClosedError("session")
            self._users += 1
        return self.session

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
        if self.closed or self._returned:
            self._end_if_unused()

    def lent(self) -> None:
        """In a with block: a buffer is out now."""
        with self._lock:
            self._held += 1

    def gave_back(self) -> None:
        """A buffer is out no more."""
        with self._lock:
            self._held -= 1
        if self.closed or self._returned:
            self._end_if_unused()

    def collected(self) -> None:
        """As gave_back(), where the lock may be held by this very thread."""
        self._returned.append(None)
        self._end_if_unused()

    def close(self) -> None:
        """Calls that wait fail with ClosedError. Returns when they have, and, unless buffers are out, the session has ended."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._users += 1
        lib.nsn_insane_shut_down(self.session)
        with self._lock:
            self._users -= 1
            self._unused.wait_for(lambda: not self._users)
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        """Everybody who has held the lock asks this behind it, so who finds it taken need not wait."""
        if not self._lock.acquire(blocking=False):
            return
        ending = None
        try:
            while self._returned:
                self._returned.popleft()
                self._held -= 1
            if self.closed and not self._users:
                self._unused.notify_all()
                if not self._held:
                    ending, self.session = self.session, None
        finally:
            self._lock.release()
        if ending is not None:
            lib.nsn_insane_close(ending, CLOSE_NS)

    def _inherit(self) -> None:
        """In a forked child: locks may be held by threads that are not there. libnsn itself knows."""
        self._lock = threading.Lock()
        self._unused = threading.Condition(self._lock)
        self._users = 0
        self.inherited = True


_open: weakref.WeakSet[Handle] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for handle in list(_open):
        handle._inherit()


os.register_at_fork(after_in_child=_after_fork_in_child)
