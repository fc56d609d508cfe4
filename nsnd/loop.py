"""A small event loop: epoll, timers and signals in one thread. No CPU when nothing happens; cheap per event."""

from __future__ import annotations

import heapq
import select
import signal
import socket
from collections.abc import Callable
from itertools import count
from time import monotonic
from typing import Protocol

SPIN_S = 50e-6  # a session that waits for an answer mostly has its next question ready within this time
EVENTS_MAX = 256


class Closable(Protocol):
    """A socket or anything else that owns a descriptor."""

    def close(self) -> object: ...


class Timer:
    """One call in the future; cancel() is idempotent."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Watches descriptors until stop(). Callbacks get the epoll event mask; what they raise ends run()."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._closing: list[Closable] = []
        self._running = False
        self._spin_until = 0.0
        self._signals: dict[int, Callable[[], None]] = {}
        self._signal_sockets: tuple[socket.socket, socket.socket] | None = None

    def add(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        self._handlers[fd] = callback
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def remove(self, fd: int, owner: Closable | None = None) -> None:
        """Stops watching. `owner` is closed once the events at hand are dealt with: no number is used again before."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        if owner is not None:
            self._closing.append(owner)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(monotonic() + delay_s, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def stay_awake(self, seconds: float = SPIN_S) -> None:
        """A session was active, or comes soon: the next waits within so many seconds do not sleep."""
        self._spin_until = max(self._spin_until, monotonic() + seconds)

    def on_signal(self, signum: int, callback: Callable[[], None]) -> None:
        """Calls back from the loop, not from the signal handler."""
        if self._signal_sockets is None:
            self._signal_sockets = socket.socketpair()
            for end in self._signal_sockets:
                end.setblocking(False)
            signal.set_wakeup_fd(self._signal_sockets[1].fileno(), warn_on_full_buffer=False)
            self.add(self._signal_sockets[0].fileno(), select.EPOLLIN, self._signalled)
        self._signals[signum] = callback
        signal.signal(signum, lambda number, frame: None)

    def _signalled(self, events: int) -> None:
        assert self._signal_sockets is not None
        for signum in self._signal_sockets[0].recv(256):
            if signum in self._signals:
                self._signals[signum]()

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        self._running = True
        handlers = self._handlers
        poll = self._epoll.poll
        while self._running:
            for fd, events in poll(self._timeout(), EVENTS_MAX):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
            if self._timers:
                self._run_timers()
            if self._closing:
                self._close_now()

    def close(self) -> None:
        """Closes what the loop itself opened, and what was removed with an owner."""
        self._close_now()
        if self._signal_sockets is not None:
            signal.set_wakeup_fd(-1)
            for end in self._signal_sockets:
                end.close()
            self._signal_sockets = None
        self._epoll.close()

    def _close_now(self) -> None:
        closing, self._closing = self._closing, []
        for owner in closing:
            owner.close()

    def _timeout(self) -> float:
        if self._spin_until:
            if monotonic() < self._spin_until:
                return 0.0
            self._spin_until = 0.0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return -1.0
        return max(0.0, self._timers[0][0] - monotonic())

    def _run_timers(self) -> None:
        now = monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()
