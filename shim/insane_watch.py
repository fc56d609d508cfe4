"""Sinks that are awaited in an event loop: one descriptor of the session wakes whoever has a message."""

from __future__ import annotations

import asyncio
import collections
import errno
from time import monotonic

from insane_nats.shim.insane_handle import ClosedError, Handle, InsaneError, checked
from insane_nats.shim.native import lib

LOOKS = 16  # before the loop goes round, when messages keep coming for sinks that nobody awaits
DETACHED_POLL_S = 0.1
GONE_S = 5.0  # as libnsn's blocking calls


class Watch:
    """One session in one loop."""

    def __init__(self, handle: Handle, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._handle = handle
        self._waiters: dict[int, collections.deque[asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._detached_at: float | None = None
        with handle as session:
            self._fd = checked(lib.nsn_insane_watch(session))
        loop.add_reader(self._fd, self._on_ready)

    @property
    def waiting(self) -> bool:
        return bool(self._waiters)

    async def message(self, sink: int) -> None:
        """Returns when the sink may have a message. ClosedError; InsaneError with ENOTCONN."""
        waiter: asyncio.Future[None] = self.loop.create_future()
        waiters = self._waiters.setdefault(sink, collections.deque())
        waiters.append(waiter)
        try:
            self._wake()
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._wake()  # the message that it was told of is another's now
            raise
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters and self._waiters.get(sink) is waiters:
                del self._waiters[sink]

    def stop(self) -> None:
        """Before the session is closed, or used in another loop."""
        if not self.loop.is_closed():
            self.loop.remove_reader(self._fd)
        if self._timer is not None:
            self._timer.cancel()
        self._fail(ClosedError("session"))
        with self._handle as session:
            lib.nsn_insane_watch_end(session)

    def _fail(self, error: InsaneError) -> None:
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
            waiters.clear()

    def _on_ready(self) -> None:
        try:
            with self._handle as session:
                lib.nsn_insane_look(session)
        except ClosedError as error:
            self._fail(error)
        else:
            self._wake()

    def _wake(self) -> None:
        """Wakes as many waiters of each sink as it has messages, then arms the session."""
        try:
            with self._handle as session:
                for _ in range(LOOKS):
                    for sink, waiters in self._waiters.items():
                        self._wake_some(waiters, lib.nsn_insane_available(session, sink, 0))
                    if lib.nsn_insane_watch_arm(session):
                        break
                else:
                    self.loop.call_soon(self._wake)
                self._look_after_node(bool(lib.nsn_insane_attached(session)))
        except ClosedError as error:
            self._fail(error)

    @staticmethod
    def _wake_some(waiters: collections.deque[asyncio.Future[None]], available: int) -> None:
        """A negative number is an error, which each of them meets when it consumes."""
        left = len(waiters) if available < 0 else available
        while left and waiters:
            waiter = waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                left -= 1

    def _look_after_node(self, attached: bool) -> None:
        """Nobody rings when an nsnd has come back."""
        if attached or not self._waiters:
            self._detached_at = None
            return
        now = monotonic()
        if self._detached_at is None:
            self._detached_at = now
        if now - self._detached_at > GONE_S:
            self._detached_at = None
            self._fail(InsaneError(errno.ENOTCONN, "nsnd is gone: start it again (nsnd); the session attaches to it by itself"))
        elif self._timer is None:
            self._timer = self.loop.call_later(DETACHED_POLL_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._on_ready()
