"""Time-outs of waits that are mostly over soon. The event loop's own timers cost more than a whole request."""

from __future__ import annotations

import asyncio
import collections
from typing import Any

from nats import errors

MOST_LENGTHS = 64  # different time-outs that are looked after here; others get a timer each
SWEPT_FROM = 1024  # waits; with more of them, those that are over are dropped from between the others

_Waits = collections.deque[tuple[float, "asyncio.Future[Any]"]]


class Deadlines:
    """Waits of one length end in the order in which they began, so that one timer a length is enough."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waits: dict[float, _Waits] = {}
        self._swept_at = SWEPT_FROM

    def add(self, future: asyncio.Future[Any], timeout_s: float) -> None:
        """The future gets nats-py's TimeoutError in so many seconds, unless it is done by then."""
        when = self._loop.time() + timeout_s
        waits = self._waits.get(timeout_s)
        if waits is None:
            if len(self._waits) >= MOST_LENGTHS:
                self._loop.call_at(when, expire, future)
                return
            waits = self._waits[timeout_s] = collections.deque()
            self._loop.call_at(when, self._expire_due, timeout_s, waits)
        while waits and waits[0][1].done():
            waits.popleft()
        waits.append((when, future))
        if len(waits) > self._swept_at:
            self._sweep(waits)

    def _sweep(self, waits: _Waits) -> None:
        """One that takes long must not keep all that came after it."""
        left = [wait for wait in waits if not wait[1].done()]
        waits.clear()
        waits.extend(left)
        self._swept_at = max(SWEPT_FROM, 2 * len(left))

    def _expire_due(self, timeout_s: float, waits: _Waits) -> None:
        now = self._loop.time()
        while waits:
            when, future = waits[0]
            if not future.done():
                if when > now:
                    self._loop.call_at(when, self._expire_due, timeout_s, waits)
                    return
                expire(future)
            waits.popleft()
        del self._waits[timeout_s]


def expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(errors.TimeoutError())
