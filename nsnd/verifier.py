"""Looks at credentials in a thread of its own where that takes long: bcrypt does on purpose, and nobody else is to wait."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread

from nsnd.credentials import User
from nsnd.loop import Loop

Work = Callable[[], User | None]
Done = Callable[[User | None], None]


class Verifier:
    """One piece of work at a time, the users of the host in turn: one that asks much does not make another wait for all that.

    The work may not touch anything of the loop's; `done` is called in the loop.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: dict[int, deque[tuple[Work, Done]]] = {}  # by user ID, next first
        self._finished: deque[tuple[Done, User | None]] = deque()
        self._changed = Condition()
        self._bell = -1  # an eventfd, from the first piece of work on

    def check(self, uid: int, work: Work, done: Done) -> None:
        """`uid`: for whom."""
        if self._bell < 0:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._loop.add(self._bell, select.EPOLLIN, self._report)
            Thread(target=self._run, name="credentials", daemon=True).start()
        with self._changed:
            self._waiting.setdefault(uid, deque()).append((work, done))
            self._changed.notify()

    def _next(self) -> tuple[Work, Done]:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting))
            uid = next(iter(self._waiting))
            queue = self._waiting.pop(uid)
            one = queue.popleft()
            if queue:
                self._waiting[uid] = queue  # behind the others
            return one

    def _run(self) -> None:
        while True:
            work, done = self._next()
            try:
                user = work()
            except Exception:  # whatever it is, nobody gets in by it
                user = None
            self._finished.append((done, user))
            os.eventfd_write(self._bell, 1)

    def _report(self, events: int) -> None:
        os.eventfd_read(self._bell)
        while self._finished:
            done, user = self._finished.popleft()
            done(user)
