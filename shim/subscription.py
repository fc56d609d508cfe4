"""Subscriptions on a session: nats-py's, with a next_msg, an iteration and a callback task that cost little per message."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Generator
from time import monotonic
from types import coroutine
from typing import TYPE_CHECKING

from nats import errors
from nats.aio.msg import Msg
from nats.aio.subscription import (
    DEFAULT_SUB_PENDING_BYTES_LIMIT,
    DEFAULT_SUB_PENDING_MSGS_LIMIT,
    _SubscriptionMessageIterator,
)
from nats.aio.subscription import Subscription as NatsSubscription

from insane_nats.shim.deadlines import expire
from insane_nats.shim.msg import Msg as Ours
from insane_nats.shim.native import fast
from insane_nats.shim.pump import PASS_DUE

if TYPE_CHECKING:
    from insane_nats.shim.connection import Connection

_logger = logging.getLogger("insane_nats")

CALLBACK_TURN_S = 0.005  # a subscription's callbacks give way to other tasks at least this often
CALLBACK_CHUNK = 64  # messages between looks at the clock
MOST = 2**63 - 1  # of what is counted in C
SPINS = 8  # of one next_msg, when what they find is for others

ErrorCallback = Callable[[Exception], Awaitable[None]]


@coroutine
def one_pass() -> Generator[None, None, None]:
    """Lets the event loop go round once."""
    yield


class PendingQueue(fast.Queue, asyncio.Queue[Msg]):
    """asyncio.Queue's interface over a ring that delivery appends to. Unfinished are what is queued and what was taken
    without task_done(); the fast paths take and finish in one step."""

    _is_shutdown = False  # of Python 3.13's Queue
    _putters: list[asyncio.Future[None]]

    def __init__(self, maxsize: int = 0) -> None:
        self._maxsize = maxsize
        self._getters = []  # a deque is ten times as large, and mostly nobody waits
        self._putters = []
        self._joiners = []
        self._taken = 0

    @property
    def _unfinished_tasks(self) -> int:
        return len(self._queue) + self._taken

    def put_nowait(self, item: Msg) -> None:
        if 0 < self._maxsize <= len(self._queue):
            raise asyncio.QueueFull
        self._queue.append(item)
        if self._getters:
            self.wake_one()

    def get_nowait(self) -> Msg:
        if not self._queue:
            raise asyncio.QueueEmpty
        item: Msg = self._queue.popleft()
        self._taken += 1
        self._wakeup_next(self._putters)
        return item

    def task_done(self) -> None:
        if self._unfinished_tasks <= 0:
            raise ValueError("task_done() called too many times")
        self._taken -= 1
        self.settle()

    async def join(self) -> None:
        while self._unfinished_tasks > 0:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._joiners.append(done)
            await done

    def settle(self) -> None:
        """Something was finished: joiners look again when nothing is left."""
        if self._joiners and self._unfinished_tasks <= 0:
            for joiner in self._joiners:
                if not joiner.done():
                    joiner.set_result(None)
            self._joiners.clear()

    def wake_one(self) -> None:
        """Wakes the first of those who wait for a message."""
        self._wakeup_next(self._getters)

    def _wakeup_next(self, waiters: list[asyncio.Future[None]]) -> None:
        while waiters:
            waiter = waiters.pop(0)
            if not waiter.done():
                waiter.set_result(None)
                return

    def forget(self, getter: asyncio.Future[None]) -> None:
        """The getter has given up; if it was woken, its message is the next one's."""
        if getter.done() and not getter.cancelled() and getter.exception() is None:
            if self._queue:
                self.wake_one()
        else:
            try:
                self._getters.remove(getter)
            except ValueError:
                return  # it has been skipped already


class Subscription(fast.Subscription, NatsSubscription):
    """A subscription of a connection that lives on a session."""

    _conn: Connection
    _pending_queue: PendingQueue
    _pending_next_msgs_calls: dict[asyncio.Future[None], asyncio.Future[None]]
    _wait_for_msgs_task: asyncio.Task[None] | None  # type: ignore[assignment]
    _message_iterator: MessageIterator | None  # type: ignore[assignment]

    def __init__(
        self,
        conn: Connection,
        id: int = 0,
        subject: str = "",
        queue: str = "",
        cb: Callable[[Msg], Awaitable[None]] | None = None,
        future: asyncio.Future[Msg] | None = None,
        max_msgs: int = 0,
        pending_msgs_limit: int = DEFAULT_SUB_PENDING_MSGS_LIMIT,
        pending_bytes_limit: int = DEFAULT_SUB_PENDING_BYTES_LIMIT,
    ) -> None:
        self._conn = conn
        self._fast = conn._fast
        self._id = id
        self._subject = subject
        self._queue = queue
        self._max_msgs = _limit(max_msgs)
        self._received = 0
        self._cb = cb
        self._future = future
        self._closed = False
        self._pending_msgs_limit = pending_msgs_limit or 0  # None, too, is no limit
        self._pending_bytes_limit = _limit(pending_bytes_limit)
        self._pending_queue = PendingQueue(_limit(pending_msgs_limit))
        self._pending_next_msgs_calls = {} if cb is None else None  # type: ignore[assignment]
        self._pending_size = 0
        self._wait_for_msgs_task = None
        self._message_iterator = None
        self._jsi = None
        self._spinning = False
        # Where a message goes instead of into the queue: the future of an old-style request, the answers of requests.
        self._sink = None if future is None else self._resolve

    def _resolve(self, msg: Msg) -> None:
        future = self._future
        if future is not None and not future.done():
            future.set_result(msg)

    def _start(self, error_cb: ErrorCallback | None) -> None:
        if self._cb is not None or self._future is not None:
            super()._start(error_cb)  # type: ignore[no-untyped-call]
        else:
            self._message_iterator = MessageIterator(self)

    async def next_msg(self, timeout: float | None = 1.0) -> Msg:
        """The next message, or nats.errors.TimeoutError after timeout seconds (None: never)."""
        if self._cb is None:
            self.next_msg = self._next_quickly  # type: ignore[method-assign]
        return await self._next_slowly(timeout)

    async def _next_slowly(self, timeout: float | None) -> Msg:
        """Whether or not there is a message at once."""
        conn = self._conn
        if conn.is_closed:
            raise conn._closed_error()
        if self._cb is not None:
            raise errors.Error("nats: next_msg cannot be used in async subscriptions")
        items = self._pending_queue._queue
        if not items:
            pump = conn._pump
            if pump is None or not pump.spin.budget_ns or self._spinning or self._pending_queue._getters:
                await self._wait(timeout)
            elif not await self._spin(timeout):
                await self._wait(timeout, first=True)
        return self._take()

    def _take(self) -> Msg:
        """The first message of the queue, finished with."""
        queue = self._pending_queue
        msg: Msg = queue._queue.popleft()
        self._pending_size -= len(msg.data)
        if queue._joiners:
            queue.settle()
        return msg

    async def _spin(self, timeout: float | None) -> bool:
        """True when there is a message, found without sleeping."""
        pump = self._conn._pump
        assert pump is not None
        items = self._pending_queue._queue
        for _ in range(SPINS):
            found = pump.look(timeout)
            if items:
                return True
            if found == PASS_DUE:
                self._spinning = True  # who calls meanwhile is behind this caller
                try:
                    await one_pass()
                finally:
                    self._spinning = False
                pump.passed()
                if items:
                    return True
            elif not found:
                return False
        return False

    async def _wait(self, timeout: float | None, first: bool = False) -> None:
        """Until there is a message. A message that came while the caller was being cancelled stays in the queue.

        first: the caller was there before those who wait already.
        """
        queue = self._pending_queue
        conn = self._conn
        loop = conn._loop or asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while not queue._queue:
            waiter: asyncio.Future[None] = loop.create_future()
            if first:
                queue._getters.insert(0, waiter)
            else:
                queue._getters.append(waiter)
            first = True  # when somebody else took the message
            self._pending_next_msgs_calls[waiter] = waiter
            timer = None if deadline is None else loop.call_at(deadline, expire, waiter)
            pump = conn._pump
            try:
                if pump is not None:
                    pump.begin_wait()
                await waiter
            except errors.TimeoutError:
                queue.forget(waiter)
                if conn.is_closed:
                    raise conn._closed_error() from None
                raise
            except asyncio.CancelledError:
                queue.forget(waiter)
                if conn.is_closed:
                    raise conn._closed_error() from None
                raise
            finally:
                self._pending_next_msgs_calls.pop(waiter, None)
                if timer is not None:
                    timer.cancel()
                if pump is not None:
                    pump.end_wait()

    async def drain(self) -> None:
        """Removes interest in the subject; what was published before is still processed."""
        if self._conn.is_closed:
            raise self._conn._closed_error()
        await super().drain()  # type: ignore[no-untyped-call]

    async def _drain(self) -> None:
        try:
            await self._conn._send_drain(self._id)
            await self._conn.flush()
            await self._pending_queue.join()
            self._stop_processing()
            self._conn._remove_sub(self._id)
            await self._conn._send_unsubscribe(self._id)
        finally:
            self._closed = True

    async def unsubscribe(self, limit: int = 0) -> None:
        """Removes interest in the subject: now, or after limit messages in all."""
        if self._conn.is_closed:
            raise self._conn._closed_error()
        limit = min(limit, MOST)
        await super().unsubscribe(limit)
        if self._conn.is_reconnecting:  # nats-py leaves it to the replay at the reconnect; libnsn keeps what is due
            await self._conn._send_unsubscribe(self._id, limit=limit)

    async def _wait_for_msgs(self, error_cb: ErrorCallback | None) -> None:
        """The task of a callback: one message after the other, in order."""
        queue = self._pending_queue
        loop = asyncio.get_running_loop()
        while not (self._max_msgs > 0 and self._received >= self._max_msgs):
            while not queue._queue:
                waiter: asyncio.Future[None] = loop.create_future()
                queue._getters.append(waiter)
                pump = self._conn._pump
                try:
                    if pump is not None:
                        pump.begin_wait()
                    await waiter
                except asyncio.CancelledError:
                    return
                finally:
                    if pump is not None:
                        pump.end_wait()
            queue._taken += 1
            try:
                await self._call_back(error_cb)
            except asyncio.CancelledError:
                return  # by close, drain or unsubscribe; or the callback itself, which ends a subscription in nats-py too
            finally:
                queue._taken -= 1
                queue.settle()
            if self._conn.is_closed:
                return

    async def _call_back(self, error_cb: ErrorCallback | None) -> None:
        """Everything that is queued."""
        items = self._pending_queue._queue
        callback = self._cb
        assert callback is not None
        started = monotonic()
        while items:
            for _ in range(min(len(items), CALLBACK_CHUNK)):
                if not items:
                    break
                msg = items.popleft()
                self._pending_size -= len(msg.data)
                try:
                    await callback(msg)
                except Exception as error:
                    await _report(error_cb, error)
                if self._zero_copy and isinstance(msg, Ours):  # and not a class of the program's, which has a copy
                    msg.end()
            if monotonic() - started > CALLBACK_TURN_S:
                await one_pass()
                started = monotonic()


def _limit(given: float | None) -> int:
    """Of any number that nats-py would compare with, one that C can keep. None is no limit."""
    if given is None or given != given:
        return 0
    bounded = max(-1, min(given, MOST))
    return math.ceil(bounded)


async def _report(error_cb: ErrorCallback | None, error: Exception) -> None:
    if error_cb is None:
        _logger.error("nats: encountered error", exc_info=error)
        return
    try:
        await error_cb(error)
    except Exception:
        _logger.exception("nats: the error callback failed over %r", error)


class MessageIterator(fast.Iterator, _SubscriptionMessageIterator):
    """`async for msg in sub.messages`, without tasks."""

    _sub: Subscription
    _queue: PendingQueue

    def __init__(self, sub: Subscription) -> None:
        self._sub = sub
        self._queue = sub._pending_queue
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def _unsubscribed_future(self) -> asyncio.Future[bool]:  # type: ignore[override]
        """As nats-py's, for whoever looks at it: done when the subscription has ended."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._ended:
            future.set_result(True)
        return future

    def _cancel(self) -> None:
        self._ended = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _next_slowly(self) -> Msg:
        """The next step, whether or not there is a message at once."""
        sub = self._sub
        items = self._queue._queue
        pump = sub._conn._pump
        if not items and not self._ended and pump is not None and pump.spin.budget_ns:
            await sub._spin(None)
        while not items:
            if self._ended:
                raise StopAsyncIteration
            await self._wait()
        msg = sub._take()
        if 0 < sub._max_msgs <= sub._received:
            self._cancel()
        return msg

    async def _wait(self) -> None:
        loop = self._sub._conn._loop or asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiter = waiter
        self._queue._getters.append(waiter)
        pump = self._sub._conn._pump
        try:
            if pump is not None:
                pump.begin_wait()
            await waiter
        except asyncio.CancelledError:
            self._queue.forget(waiter)
            raise
        finally:
            self._waiter = None
            if pump is not None:
                pump.end_wait()
