"""nats-py's Client whose connection is a session of the shared-memory fabric, where there is a node at the URL: what a program
calls, and what is on the path of every message."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from nats import errors
from nats.aio.client import DEFAULT_FLUSH_TIMEOUT, NO_RESPONDERS_STATUS, _validate_queue, _validate_subject
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import DEFAULT_SUB_PENDING_BYTES_LIMIT, DEFAULT_SUB_PENDING_MSGS_LIMIT
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import JetStreamContext

from insane_nats.shim import headers as nats_headers
from insane_nats.shim import jetstream, native
from insane_nats.shim.attach import Attaching
from insane_nats.shim.connection import World
from insane_nats.shim.errors import SessionError, ZeroCopyError
from insane_nats.shim.pump import PASS_DUE, SPACE_POLL_S, Pump
from insane_nats.shim.session import Session
from insane_nats.shim.subjects import check, first_plain, is_literal, reserved
from insane_nats.shim.subscription import SPINS, Subscription, one_pass

if TYPE_CHECKING:
    from insane_nats._fast import Block
    from insane_nats._fast import Connection as FastConnection

CANCELLED_SETTLE_NS = 100_000_000  # for which a cancelled task holds its event loop up, at most, until its interest is known
EVERY_MESSAGE = ("publish", "request", "_request_new_style", "_flush_pending", "_send_ping", "flush")

if native.lib is not None:
    _publish = native.lib.nsn_publish
    lib = native.lib


class Client(Attaching):
    """Asyncio client. Everything that nats-py's Client has, and connect(qos=…, write_deadline=…)."""

    def _adopt(self, session: Session) -> None:
        super()._adopt(session)
        if type(self).publish is Client.publish:  # and not a subclass's
            assert self._fast is not None
            self.publish = self._fast.publish  # type: ignore[method-assign]
            self._post = self._fast.post

    def _be_nats(self, why: str) -> None:
        """From now on what is called for every message is nats-py's own, without the way through ours."""
        super()._be_nats(why)
        for name in EVERY_MESSAGE:
            if getattr(type(self), name) is getattr(Client, name):  # not where a program's subclass has its own
                setattr(self, name, getattr(NatsClient, name).__get__(self))

    def _reset(self) -> None:
        super()._reset()
        for name in EVERY_MESSAGE:
            self.__dict__.pop(name, None)

    # --- publish ------------------------------------------------------------------------------------------------------

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Publishes a message. Waits while a subscriber has no room, up to the write deadline.

        This is the whole of it; a connection on a session has publish() in C (shim/fast/publish.c), which comes here with what
        is not plain.
        """
        if self._handle is None:
            await self._publish_elsewhere(subject, payload, reply, headers)
            return
        raw = self._bytes_of(subject)
        raw_reply = self._bytes_of(reply) if reply else b""
        if words := reserved(subject, reply):
            self._refuse(len(payload), words)
            return
        if self._status != 1:
            self._check_publishing()
        size = len(payload)
        if size > self._max_payload:
            raise errors.MaxPayloadError
        if type(payload) is not bytes:
            payload = b"" + payload
        block = b""
        if headers is not None:
            block = nats_headers.encode(headers)
            if size + len(block) > self._max_payload:
                await self._process_err("'maximum payload violation'")  # as a server says, at which nats-py closes
                return
        pump = self._pump
        assert pump is not None
        if self._removed:
            await self._settle_first()
            if self._handle is None:
                raise self._closed_error()
        reached = -errno.EAGAIN if pump.space_waiters else self._publish_now(raw, raw_reply, block, payload)
        if reached < 0:
            reached = await self._publish_when_possible(
                reached, lambda: self._publish_now(raw, raw_reply, block, payload)
            )
        await self._published(reached, subject, reply, size)

    def _publish_slowly(
        self, subject: str, payload: bytes, reply: str | None, headers: dict[str, str] | None
    ) -> Awaitable[None]:
        """What publish() in C leaves to us."""
        return Client.publish(self, subject, payload, reply or "", headers)

    async def _publish_rest(self, number: int, subject: str, payload: bytes, reply: str | None) -> None:
        """As _publish_slowly, after libnsn has not taken it at once and said that number."""
        raw, raw_reply = self._bytes_of(subject), self._bytes_of(reply) if reply else b""
        reached = await self._publish_when_possible(number, lambda: self._publish_now(raw, raw_reply, b"", payload))
        await self._published(reached, subject, reply or "", len(payload))

    async def _published(self, reached: int, subject: str, reply: str, size: int) -> None:
        """After a message went out the slow way, to so many subscriptions."""
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += size
        if reached == 0 and reply:
            self._no_responders(subject, reply)
        if self._pedantic and not is_literal(subject):
            await self._process_err("'invalid publish subject'")
        if self._fast is not None and not self._fast.trimming:
            self._start_trim()
        self._burst += size
        if monotonic() > self._yield_at or self._burst > native.fast.YIELD_BYTES:
            await one_pass()
            self._burst = 0
            self._yield_at = monotonic() + native.fast.YIELD_S

    async def _publish_elsewhere(self, subject: str, payload: bytes, reply: str, headers: dict[str, str] | None) -> None:
        """On plain NATS, and on a connection that is closed or was never made."""
        if self._forked:
            raise self._closed_error()
        await super().publish(subject, payload, reply, headers)

    def _bytes_of(self, subject: str) -> bytes:
        """A subject's bytes, checked as nats-py does before a publish."""
        if not self._skip_subject_validation:
            check(subject)
        raw = subject.encode("utf-8", "surrogateescape")
        if not raw:
            raise errors.BadSubjectError
        return raw

    def _refuse(self, size: int, what: str) -> None:
        """A publish that only a server may make: it is dropped, and error_cb told, as by a server."""
        if self._status != 1:
            self._check_publishing()
        if size > self._max_payload:
            raise errors.MaxPayloadError
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += size
        self._violation(what)

    def _check_publishing(self) -> None:
        if self.is_closed:
            raise self._closed_error()
        if self.is_draining_pubs:
            raise errors.ConnectionDrainingError

    async def _publish_when_possible(self, number: int, publish: Callable[[], int]) -> int:
        """What libnsn did not take at once: waits until this connection's own interest is known, or for room."""
        if number == -errno.EALREADY:
            await self._settle_first()
            number = publish()
        if number == -errno.EAGAIN:
            number = await self._publish_in_turn(publish)
        if number < 0:
            raise self._publish_error(number)
        return number

    async def _settle_first(self) -> None:
        """Before a publish. nats-py's does not wait there: a callback that has just unsubscribed itself, and so cancelled its
        own task, still publishes."""
        task = asyncio.current_task()
        if task is not None and task.cancelling() and self._pump is not None:
            self._removed = False
            self._pump.send()
            if lib.nsn_interest_settled(self._handle, CANCELLED_SETTLE_NS):
                return
        await self._settle()

    async def _publish_in_turn(self, publish: Callable[[], int]) -> int:
        """Waits for room, first come first served, while the pump goes on. Past the write deadline the subscribers that have
        none are given up as slow consumers, and the message goes to the others."""
        pump = self._pump
        assert pump is not None
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._write_deadline
        first = True
        waiter: asyncio.Future[None] = loop.create_future()
        pump.space_waiters.append(waiter)
        fast = self._fast
        assert fast is not None
        fast.waiting += 1
        try:
            while True:
                if pump.space_waiters[0] is waiter and not first:
                    number = publish()
                    if number == -errno.EAGAIN and loop.time() >= deadline:
                        self._gave_up += lib.nsn_publish_give_up(self._handle)
                        number = publish()
                    if number != -errno.EAGAIN:
                        return number
                first = False
                if waiter.done():
                    fresh = loop.create_future()
                    pump.space_waiters[pump.space_waiters.index(waiter)] = fresh
                    waiter = fresh
                pump.again()
                timer = loop.call_later(min(SPACE_POLL_S, max(0.0, deadline - loop.time())), _wake, waiter)
                try:
                    await waiter
                except asyncio.CancelledError:
                    if self.is_closed and not _being_cancelled():
                        raise self._closed_error() from None
                    raise
                finally:
                    timer.cancel()
        finally:
            fast.waiting -= 1
            if waiter in pump.space_waiters:
                pump.space_waiters.remove(waiter)
            pump.wake_publisher()

    def _publish_now(self, raw: bytes, reply: bytes, block: bytes, payload: bytes) -> int:
        if self._handle is None:
            raise self._closed_error()
        return int(_publish(self._handle, raw, len(raw), reply, len(reply), block, len(block), payload, len(payload)))

    def _publish_error(self, number: int) -> Exception:
        if number == -errno.EMSGSIZE:
            return errors.MaxPayloadError()
        if number == -errno.ENOBUFS:
            return errors.OutboundBufferLimitError()
        if number == -errno.EINVAL:
            return errors.BadSubjectError()
        return self._session_error(number)

    def _no_responders(self, subject: str, reply: str) -> None:
        """A request that nobody got is answered with status 503, on the first plain subscription that hears the reply."""
        if subject.startswith(jetstream.SUBJECTS):
            jetstream.explain(self)
        sub = first_plain(self._subs.values(), reply)
        if sub is not None:
            assert self._pump is not None
            self._pump.deliver_status(sub, reply, nats_headers.no_responders(subject))

    # --- zero copy ----------------------------------------------------------------------------------------------------

    def borrow(self, size: int) -> Block:
        """Memory of the fabric for the payload of one message, to be written in place and given to emit(). Its contents are
        undefined at first. It supports the buffer protocol (memoryview, numpy.frombuffer), and goes back by emit(), release(),
        or the end of a with block; one that is forgotten goes back when it is collected, with a ResourceWarning.

        MaxPayloadError when that is more than a message may have; OutboundBufferLimitError when too much is borrowed or waits
        for slow subscribers; ZeroCopyError on plain NATS.
        """
        fast = self._lender()
        if not 0 <= size <= self._max_payload:
            raise errors.MaxPayloadError if size > 0 else ValueError(f"a buffer cannot have {size} bytes")
        block = fast.borrow(size)
        if isinstance(block, int):
            raise errors.OutboundBufferLimitError if block == -errno.EAGAIN else self._publish_error(block)
        return block

    async def emit(self, subject: str, buffer: Block, reply: str = "", *, length: int | None = None) -> None:
        """Publishes a buffer that was borrowed from this connection, without copying it, with its first `length` bytes as the
        payload (None: all). The buffer cannot be used afterwards, unless this raises.

        Waits as publish() does. BufferError while a slice or an array views the buffer; ValueError when it was released or
        emitted, or is another connection's.
        """
        fast = self._lender()
        raw, raw_reply = self._bytes_of(subject), self._bytes_of(reply) if reply else b""
        self._check_publishing()
        pump = self._pump
        assert pump is not None
        size = len(buffer) if length is None else length
        if words := reserved(subject, reply):
            buffer.release()
            self._refuse(size, words)
            return
        if self._removed:
            await self._settle_first()
        reached = -errno.EAGAIN if pump.space_waiters else fast.emit(raw, raw_reply, buffer, size)
        if reached < 0:
            reached = await self._publish_when_possible(reached, lambda: fast.emit(raw, raw_reply, buffer, size))
        await self._published(reached, subject, reply, size)

    def _lender(self) -> FastConnection:
        if self._fast is None or self._pump is None:
            if self.is_closed or self._forked:
                raise self._closed_error()
            raise ZeroCopyError
        return self._fast

    # --- subscribe ----------------------------------------------------------------------------------------------------

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        cb: Callable[[Msg], Awaitable[None]] | None = None,
        future: asyncio.Future[Msg] | None = None,
        max_msgs: int = 0,
        pending_msgs_limit: int = DEFAULT_SUB_PENDING_MSGS_LIMIT,
        pending_bytes_limit: int = DEFAULT_SUB_PENDING_BYTES_LIMIT,
        *,
        zero_copy: bool = False,
    ) -> NatsSubscription:
        """As nats-py's. When it returns, every publish on this host that begins later reaches the subscription.

        zero_copy: the payload of a message is a memoryview, of large ones over the memory that the publisher wrote, without a
        copy. It ends when the callback returns, or by msg.release(). ZeroCopyError on plain NATS.
        """
        if self._pump is None:
            if self._forked:
                raise self._closed_error()
            if zero_copy and not self.is_closed:
                raise ZeroCopyError
            return await super().subscribe(subject, queue, cb, future, max_msgs, pending_msgs_limit, pending_bytes_limit)
        if self._skip_subject_validation:
            if not subject:
                raise errors.BadSubjectError
        else:
            _validate_subject(subject, strict=True)
            _validate_queue(queue)
        if self.is_closed:
            raise self._closed_error()
        if self.is_draining:
            raise errors.ConnectionDrainingError
        self._sid += 1
        sub = Subscription(self, self._sid, subject, queue, cb, future, max_msgs, pending_msgs_limit, pending_bytes_limit)
        sub._zero_copy = zero_copy
        sub._start(self._error_cb)
        self._subs[sub._id] = sub
        try:
            await self._send_subscribe(sub)
        except SessionError:
            self._subs.pop(sub._id, None)
            sub._stop_processing()
            raise
        return sub

    # --- request ------------------------------------------------------------------------------------------------------

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        """Publishes a request and returns the first answer. NoRespondersError when nobody is subscribed."""
        if self._pump is None or old_style:
            if self._forked:
                raise self._closed_error()
            return await super().request(subject, payload, timeout, old_style, headers)
        msg = await self._request_new_style(subject, payload, timeout=timeout, headers=headers)
        if msg.headers and msg.headers.get(nats_headers.STATUS) == NO_RESPONDERS_STATUS:
            raise errors.NoRespondersError
        return msg

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1, headers: dict[str, Any] | None = None
    ) -> Msg:
        if self._pump is None:
            return await super()._request_new_style(subject, payload, timeout, headers)
        if self.is_draining_pubs:
            raise errors.ConnectionDrainingError
        if not self._resp_sub_prefix:
            await self._init_request_sub()
        loop = self._loop
        assert loop is not None
        token = f"{next(self._tokens):x}"
        answer: asyncio.Future[Msg] = loop.create_future()
        self._resp_map[token] = answer
        try:
            if headers is not None or not self._post(subject, payload, self._prefix + token):
                await self.publish(subject, payload, reply=self._prefix + token, headers=headers)
            pump = self._pump
            if pump is not None and pump.spin.budget_ns and not answer.done() and self._may_spin(pump):
                await self._spin_for(answer, timeout)
            if answer.done():
                return answer.result()
            pump = self._pump
            if pump is None:
                raise self._closed_error()
            if timeout is not None:
                pump.deadlines.add(answer, timeout)
            pump.begin_wait()
            try:
                return await answer
            finally:
                pump.end_wait()
        finally:
            self._resp_map.pop(token, None)

    def _may_spin(self, pump: Pump) -> bool:
        """On a loop that does not show its tasks, those of other requests would have to wait for the one that spins."""
        return not pump.is_blind or len(self._resp_map) == 1

    async def _spin_for(self, answer: asyncio.Future[Msg], timeout: float) -> None:
        for _ in range(SPINS):
            pump = self._pump
            if answer.done() or pump is None or not self._may_spin(pump):
                return
            found = pump.look(timeout)
            if not found:
                return
            if found == PASS_DUE:
                await one_pass()
                pump.passed()

    async def _init_request_sub(self) -> None:
        if self._pump is None:
            await super()._init_request_sub()
            return
        self._resp_map = {}
        prefix = self._inbox_prefix + b"." + self._nuid.next() + b"."
        self._resp_sub_prefix = prefix
        self._prefix = prefix.decode()
        if self.is_closed:
            raise self._closed_error()
        if self.is_draining:
            self._resp_sub_prefix = None
            raise errors.ConnectionDrainingError
        self._sid += 1
        sub = Subscription(self, self._sid, self._prefix + "*", cb=self._request_sub_callback)
        sub._sink = self._answer  # at once, without the task of a callback
        self._subs[sub._id] = sub
        await self._send_subscribe(sub)

    def _answer(self, msg: Msg) -> None:
        future = self._resp_map.get(msg.subject[len(self._prefix) :])
        if future is not None and not future.done():
            future.set_result(msg)

    # --- JetStream ----------------------------------------------------------------------------------------------------

    def jetstream(self, **opts: Any) -> JetStreamContext:
        """nats-py's JetStream. On a node that keeps nothing its calls fail at once with nats-py's errors; the log says why."""
        if self._world is World.NATS:
            return super().jetstream(**opts)
        return jetstream.JetStream(self, **opts)

    # --- flush and rtt ------------------------------------------------------------------------------------------------

    async def flush(self, timeout: int = DEFAULT_FLUSH_TIMEOUT) -> None:
        """When it returns, everything published before has been handed over to its subscribers, and everything that lay here
        for this connection has been dispatched to its subscriptions. FlushTimeoutError after timeout seconds."""
        if self._pump is None:
            if self._forked:
                raise self._closed_error()
            await super().flush(timeout)
            return
        if timeout <= 0:
            raise errors.BadTimeoutError
        if self.is_closed:
            raise self._closed_error()
        if not await self._pump.barrier(timeout):
            raise errors.FlushTimeoutError

    async def drain(self) -> None:
        """Drains all subscriptions, then publishers, then closes, as nats-py does."""
        if self._forked:
            raise self._closed_error()
        await super().drain()

    async def rtt(self, timeout: int = DEFAULT_FLUSH_TIMEOUT) -> float:
        """Seconds that nsnd takes to answer a ping. nats.errors.TimeoutError after timeout seconds."""
        if self._pump is None:
            if self._forked:
                raise self._closed_error()
            return await super().rtt(timeout)
        if timeout <= 0:
            raise errors.BadTimeoutError
        if self.is_closed:
            raise self._closed_error()
        token = next(self._ping_tokens)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        self._rtt_waits[token] = answer
        start = loop.time()
        try:
            if lib.nsn_ping(self._handle, token) == 0:  # while nsnd is away there is no answer, as from a server
                self._pump.send()
            async with asyncio.timeout(timeout):
                await answer
        except TimeoutError:
            raise errors.TimeoutError from None
        finally:
            self._rtt_waits.pop(token, None)
        return loop.time() - start


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
