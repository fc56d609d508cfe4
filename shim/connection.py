"""A NATS connection that is a session of the fabric: its interest, its events, its end. The kinds are told apart by _pump:
none for plain NATS, whose every method is nats-py's own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import itertools
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from nats import errors
from nats.aio.client import Client as NatsClient
from nats.aio.client import Srv
from nats.aio.errors import ErrStaleConnection
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from insane_nats.shim import native, qos
from insane_nats.shim import session as nsn
from insane_nats.shim.errors import (
    InheritedConnectionError,
    SessionError,
    SessionSlowConsumerError,
    SubscriptionRefusedError,
    UnreadError,
)
from insane_nats.shim.node import Probe
from insane_nats.shim.pump import Pump, start_later
from insane_nats.shim.spin import Spin
from insane_nats.shim.subjects import RESERVED_QUEUE
from insane_nats.shim.subscription import one_pass

if TYPE_CHECKING:
    from insane_nats._fast import Connection as FastConnection

_logger = logging.getLogger("insane_nats")

WRITE_DEADLINE_S = 10.0
SETTLE_S = 2.0  # longest wait of subscribe() for nsnd
CLOSE_S = 2.0  # longest wait of close() until all subscribers can read what was published
CLOSE_POLL_S = 0.01  # between looks for an nsnd that has gone meanwhile
ERRORS_KEPT = 8192  # that wait for the error callback

if native.lib is not None:
    lib = native.lib
    ffi = native.ffi


def _post_nothing(subject: str, payload: bytes, reply: str | None) -> bool:
    """Where there is no session to publish by."""
    return False


class World(Enum):
    """What a connection is, decided once and for all at its first connect."""

    UNDECIDED = "undecided"
    INSANE = "a session of an insane_nats node"
    NATS = "a NATS connection"


class Early(NamedTuple):
    """A session with a node that is known, made while looking around: for when connect() comes to that server."""

    server: Srv
    found: Probe
    session: nsn.Session


class Connection(NatsClient):
    """What Client is made of, below connecting and publishing."""

    def __init__(self) -> None:
        super().__init__()
        self._reset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._roundabout = cls._process_msg is not NatsClient._process_msg
        cls._builds_plainly = cls._build_message is NatsClient._build_message

    # Whether a subclass has its own delivery, through which every message then goes; and nats-py's way to make messages.
    _roundabout = False
    _builds_plainly = True

    def _reset(self) -> None:
        self._world = World.UNDECIDED
        self._session: nsn.Session | None = None
        self._handle: Any = None
        self._fast: FastConnection | None = None
        self._post: Callable[[str, bytes, str | None], bool] = _post_nothing
        self._pump: Pump | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # asking for it costs a system call in Python 3.11
        self._forked = False
        self._qos = qos.QoS()
        self._qos_argument: object = None
        self._application_id = 0
        self._write_deadline = WRITE_DEADLINE_S
        self._probes: dict[int, Probe] = {}
        self._looked_around = False
        self._early: Early | None = None
        self._home: int | None = None  # port of the node that this connection was attached to last
        self._silent = False
        self._relayed = False  # nsnd speaks NATS's protocol with this connection: its user has permissions
        self._unauthorized = False  # found while attaching, to be told where nats-py tells it
        self._found_info: dict[str, Any] = {}
        self._pedantic = False
        self._removed = False  # interest that publishers may still see: it must be gone before this connection says more
        self._hung_up = False
        self._failed = False
        self._burst = 0
        self._yield_at = 0.0
        self._prefix = ""
        self._tokens = itertools.count(secrets.randbits(40))
        self._ping_tokens = itertools.count(1)
        self._rtt_waits: dict[int, asyncio.Future[None]] = {}
        self._reports: collections.deque[Exception] = collections.deque()
        self._reports_lost = 0
        self._report_task: asyncio.Task[None] | None = None
        self._settle_spin = Spin("adaptive")
        self._gave_up = 0
        self._jetstream_explained = False

    @property
    def is_insane(self) -> bool:
        """True when messages travel through the shared-memory fabric."""
        return self._world is World.INSANE and not self._relayed

    @property
    def qos(self) -> qos.QoS:
        """The QoS policies of what this connection publishes."""
        return self._qos

    @property
    def session_counters(self) -> dict[str, int]:
        """What libnsn counted for this connection's session; empty for plain NATS and when it is closed."""
        return self._session.counters() if self._session is not None and self._session.handle is not None else {}

    # --- interest -----------------------------------------------------------------------------------------------------

    async def _send_subscribe(self, sub: NatsSubscription) -> None:
        if self._pump is None:
            await super()._send_subscribe(sub)
            return
        if not self._add_interest(sub):
            # nats-server says so and keeps the connection; nats-py closes it over every such error.
            await self._process_err("'invalid subject'")
            return
        await self._settle()

    def _add_interest(self, sub: NatsSubscription) -> bool:
        """False when the subject cannot be subscribed. SessionError for anything else that libnsn does not like."""
        if sub._queue == RESERVED_QUEUE:
            self._violation(f'subscription to "{sub._subject}" using queue "{sub._queue}"')
            return True
        pattern = sub._subject.encode("utf-8", "surrogateescape")
        queue = (sub._queue or "").encode("utf-8", "surrogateescape")
        result = lib.nsn_subscribe(self._handle, sub._id, pattern, len(pattern), queue, len(queue))
        if result == -errno.EINVAL:
            return False
        if result < 0:
            raise self._session_error(result)
        return True

    async def _settle(self) -> None:
        """Until every publisher on this host sees this connection's interest. Not while nsnd is away: what it has to know is
        told at the reconnect. One that does not answer is given up, as a NATS client gives a silent server up."""
        pump = self._pump
        self._removed = False
        if pump is None or not self.is_connected:
            return
        spin = self._settle_spin if self._qos.consumption != "low" else None
        if not await pump.settled(spin, SETTLE_S):
            _logger.warning("nsnd has not taken a subscription within %s s: is it stopped or overloaded?", SETTLE_S)
            await self._process_op_err(ErrStaleConnection())
        if pump.pass_due():
            await one_pass()
            pump.passed()

    def _subscribe_again(self) -> None:
        """The node has forgotten this session: everything that is still wanted is subscribed anew."""
        for sid, sub in list(self._subs.items()):
            left = sub._max_msgs - sub._received
            if sub._max_msgs > 0 and left <= 0:
                self._subs.pop(sid)
                continue
            self._add_interest(sub)
            if sub._max_msgs > 0:
                lib.nsn_unsubscribe(self._handle, sid, left)
        assert self._pump is not None
        self._pump.send()

    async def _send_unsubscribe(self, sid: int, limit: int = 0) -> None:
        if self._pump is None:
            await super()._send_unsubscribe(sid, limit)
            return
        result = lib.nsn_unsubscribe(self._handle, sid, max(0, limit))  # below 0 it is now, as for a server
        if result < 0 and result != -errno.ENOENT:  # as in NATS, to unsubscribe what is gone is no error
            raise self._session_error(result)
        self._removed = True
        self._pump.again()

    async def _send_drain(self, sid: int) -> None:
        """Ends the interest; what has been published before still comes."""
        result = lib.nsn_drain(self._handle, sid)
        if result < 0 and result != -errno.ENOENT:
            raise self._session_error(result)

    # --- nsnd ---------------------------------------------------------------------------------------------------------

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        """From nats-py's _ping_interval: the answer sets _pings_outstanding to 0."""
        if self._pump is None:
            await super()._send_ping(future)
        elif lib.nsn_ping(self._handle, 0) == 0:
            self._pump.send()

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """There is no buffer between publish() and the subscribers."""
        if self._pump is None:
            return await super()._flush_pending(force_flush)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def _on_detached(self) -> None:
        """nsnd is gone, or has let go of this session."""
        if self.is_closed or self.is_reconnecting or self._pump is None or not self.is_connected:
            return
        error = errors.UnexpectedEOF()
        if not self._hung_up:
            self._report(error)
        self._hung_up = False
        loop = asyncio.get_running_loop()
        if self._ping_interval_task is not None:
            self._ping_interval_task.cancel()
        if self.options["allow_reconnect"]:
            self._status = NatsClient.RECONNECTING
            self._reconnection_task = start_later(loop, self._attempt_reconnect())
        else:
            self._process_disconnect()
            self._err = error
            self._run(self._close(NatsClient.CLOSED, True))

    async def force_reconnect(self) -> None:
        """Lets go of nsnd and attaches again. Messages between programs go on meanwhile."""
        if self._pump is None:
            await super().force_reconnect()
            return
        if self.is_connected and self.options["allow_reconnect"]:
            self._hang_up()

    def _answer_challenge(self, session: nsn.Session, server: Srv | None) -> None:
        """Where nsnd asks who this is: what nats-py would say to a NATS server at that URL."""
        nonce = session.challenge()
        if nonce is None:
            return
        before = self._server_info, self._current_server
        asked = {"auth_required": True, **({"nonce": nonce} if nonce else {})}
        self._server_info, self._current_server = {**self._found_info, **asked}, server
        self._auth_configured = True
        try:
            command = self._connect_command()
        finally:
            self._server_info, self._current_server = before
        session.answer(command.partition(b" ")[2].strip())

    def _on_refused(self) -> None:
        """nsnd has let go of this session for good."""
        assert self._session is not None
        if self.is_closed or not self._session.unauthorized:
            return
        self._err = errors.AuthorizationError()
        self._run(self._close(NatsClient.CLOSED, True))

    async def _process_op_err(self, e: Exception) -> None:
        """nsnd is silent."""
        if self._pump is None:
            await super()._process_op_err(e)
        elif self.is_connected:
            self._report(e)
            self._hang_up()

    def _hang_up(self) -> None:
        """Ends the conversation with nsnd, as if it had gone away."""
        assert self._session is not None and self._pump is not None
        if self._session.state == nsn.READY:
            self._hung_up = True
            with socket.socket(fileno=os.dup(self._session.control_fd)) as control:
                control.shutdown(socket.SHUT_RDWR)
            self._pump.attend()

    # --- close --------------------------------------------------------------------------------------------------------

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if self._pump is None:
            await super()._close(status, do_cbs)
            return
        if self.is_closed:
            self._status = status
            return
        self._status = NatsClient.CLOSED
        await self._end_reconnecting()
        await self._hand_over()
        await asyncio.sleep(0)  # background tasks wrap up
        self._end_subscriptions()
        self._detach_all()
        if do_cbs:
            if self._disconnected_cb is not None:
                await self._disconnected_cb()
            if self._closed_cb is not None:
                await self._closed_cb()
        self._client_id = None
        self._client_ip = None
        self._resp_sub_prefix = None

    async def _end_reconnecting(self) -> None:
        if self._ping_interval_task is not None and self._ping_interval_task is not asyncio.current_task():
            self._ping_interval_task.cancel()
        task = self._reconnection_task
        if task is not None and not task.done() and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task], timeout=self.options["reconnect_time_wait"])

    async def _hand_over(self) -> None:
        """The subscribers can read what was published: they have mapped its links. Until then nsnd has these for them; if it
        ends before, nobody else has, and the next one is waited for. CLOSE_S in all; then what is wrong is reported."""
        pump, session = self._pump, self._session
        if pump is None or session is None or session.unauthorized:  # nobody would hand it on
            return

        def taken() -> bool:
            return bool(lib.nsn_links_taken(session.handle))

        deadline = monotonic() + CLOSE_S
        try:
            if session.state == nsn.READY:
                await pump.barrier(CLOSE_S)
            while not taken() and (left := deadline - monotonic()) > 0:
                if session.state != nsn.READY:
                    await self._find_node(session, pump)
                else:
                    await pump.until(lambda: taken() or session.state != nsn.READY, left)
        except SessionError as error:
            self._report(error)
        if taken():
            return
        if session.state == nsn.READY:
            _logger.warning("closed before every subscriber had taken its link: nsnd keeps it for them as long as it runs")
        else:
            self._report(UnreadError(CLOSE_S))

    async def _find_node(self, session: nsn.Session, pump: Pump) -> None:
        """Attaches again to whoever listens at the node's socket, and hands over what has not been taken. SessionError when
        that one refuses."""
        if session.state == nsn.DETACHED:
            with contextlib.suppress(SessionError):
                session.reattach(self._found_info["insane"]["socket"])
        elif session.state == nsn.CONNECTING:
            session.process()
            self._answer_challenge(session, self._current_server)
            pump.watch_control()
        else:
            raise SessionError(errno.ECONNREFUSED, session.error())
        if session.state != nsn.READY:
            await asyncio.sleep(CLOSE_POLL_S)

    def _end_subscriptions(self) -> None:
        current = asyncio.current_task()
        for sub in self._subs.values():
            task = sub._wait_for_msgs_task
            if task is current and task is not None:
                sub._pending_queue._queue.clear()  # close() in a callback: it is the last
            elif task and not task.done():
                task.cancel()
            if sub._message_iterator:
                sub._message_iterator._cancel()
            if sub._pending_next_msgs_calls:
                for waiter in list(sub._pending_next_msgs_calls.values()):
                    waiter.cancel()
                sub._pending_next_msgs_calls.clear()
            if self._fast is not None and self._fast.lender.lent:  # the session stays until that is back
                lib.nsn_unsubscribe(self._handle, sub._id, 0)
        self._subs.clear()

    def _detach_all(self) -> None:
        pump, session = self._pump, self._session
        if pump is not None:
            pump.send()
        self._let_go()
        if pump is not None:
            pump.stop()
        for answer in self._rtt_waits.values():
            answer.cancel()
        if session is not None:
            self._say_goodbye(session)
            session.close()
            self._session = None

    def _say_goodbye(self, session: nsn.Session) -> None:
        """Closing says so to nsnd; where that has let go of a session it is told by way of a new conversation, since it would
        wait for a live process to come back."""
        if session.state == nsn.DETACHED and self._found_info:
            try:
                session.reattach(self._found_info["insane"]["socket"])
            except SessionError as error:
                _logger.debug("closed while nsnd is away: %s", error)

    def _closed_error(self) -> Exception:
        return InheritedConnectionError() if self._forked else errors.ConnectionClosedError()

    def _session_error(self, number: int) -> Exception:
        return SessionError(abs(number), self._session.error() if self._session is not None else "")

    def _inherited(self) -> None:
        """This is a forked child of the process that made the connection."""
        self._forked = True
        self._exiting()

    def _exiting(self) -> None:
        """Whatever still runs finds the connection closed."""
        self._status = NatsClient.CLOSED
        if self._pump is not None:
            self._pump.forget()
        self._let_go()
        self._session = None

    def _let_go(self) -> None:
        """Nothing is sent or received by the session from now on."""
        if self._fast is not None:
            self._fast.close()
            self._fast = None
        self.__dict__.pop("publish", None)
        self._post = _post_nothing
        self._handle = None
        self._pump = None

    # --- what delivery in C leaves to Python --------------------------------------------------------------------------

    def _deliver_slowly(
        self, sub: NatsSubscription, sid: int, subject: bytes, reply: bytes, block: bytes, data: bytes, last: bool
    ) -> None:
        if self._pump is not None:
            self._pump.deliver(sub, sid, subject, reply, block, data, last)

    def _too_slow(self, sub: NatsSubscription, msg: Msg) -> None:
        """A message that the subscription has no room for."""
        self._report(errors.SlowConsumerError(subject=msg.subject, reply=msg.reply, sid=sub._id, sub=sub))

    def _drop_interest(self, sid: int) -> None:
        if self._pump is not None:
            self._pump.drop_interest(sid)

    def _start_trim(self) -> None:
        if self._pump is not None:
            self._pump.start_trim()

    # --- events and errors --------------------------------------------------------------------------------------------

    def _on_event(self, event: Any) -> None:
        kind = event.kind
        if kind == lib.NSN_EVENT_SLOW_CONSUMER:
            self._report(SessionSlowConsumerError(event.number))
        elif kind == lib.NSN_EVENT_INTEREST:
            sub = self._subs.pop(event.sid, None)
            if sub is not None:
                sub._stop_processing()
            words = bytes(ffi.string(event.text)).decode(errors="replace") or os.strerror(abs(event.error))
            self._report(SubscriptionRefusedError(sub._subject if sub is not None else f"sid {event.sid}", words))
        elif kind == lib.NSN_EVENT_PONG:
            self._pongs_received += 1
            self._pings_outstanding = 0
            answer = self._rtt_waits.get(event.number)
            if answer is not None and not answer.done():
                answer.set_result(None)
        elif kind == lib.NSN_EVENT_LAME_DUCK:
            if self._lame_duck_mode_cb is not None:
                self._run(self._lame_duck_mode_cb())
        elif kind == lib.NSN_EVENT_LINK_BROKEN:
            words = bytes(ffi.string(event.text)).decode(errors="replace")
            self._report(SessionError(errno.EPROTO, f"the link of session {event.slot} was dropped: {words or 'damaged'}"))
        elif kind == lib.NSN_EVENT_VERSIONS:
            words = bytes(ffi.string(event.text)).decode(errors="replace")
            self._report(SessionError(errno.EPROTONOSUPPORT, words))
        elif kind == lib.NSN_EVENT_HELD_UP:
            _logger.warning("%s", bytes(ffi.string(event.text)).decode(errors="replace"))
        elif kind == lib.NSN_EVENT_GAVE_UP:
            _logger.info("session %d is a slow consumer: it gets nothing more until it runs again", event.slot)

    def _on_failure(self, error: Exception) -> None:
        """Nothing can be received any more: the connection ends."""
        if not self._failed:
            self._failed = True
            self._err = error
            self._report(error)
            self._run(self._close(NatsClient.CLOSED))

    def _run(self, callback: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await callback
            except Exception:
                _logger.exception("nats: a callback failed")

        task = start_later(asyncio.get_running_loop(), run())
        self._tasks().add(task)
        task.add_done_callback(self._tasks().discard)

    def _tasks(self) -> set[asyncio.Task[None]]:
        """Keeps tasks that nobody awaits alive."""
        tasks: set[asyncio.Task[None]] = self.__dict__.setdefault("_running_tasks", set())
        return tasks

    def _violation(self, what: str) -> None:
        """What a NATS server says to a client that does what it may not, in nats-py's lower case; the connection stays."""
        self._err = errors.Error(f"nats: permissions violation for {what.lower()}")
        self._report(self._err)

    def _report(self, error: Exception) -> None:
        """Hands an error to the error callback: one after the other, behind what happens now."""
        if len(self._reports) >= ERRORS_KEPT:
            self._reports_lost += 1
            return
        self._reports.append(error)
        if self._report_task is None:
            self._report_task = start_later(asyncio.get_running_loop(), self._report_all())

    async def _report_all(self) -> None:
        try:
            while self._reports:
                error = self._reports.popleft()
                try:
                    await self._error_cb(error)
                except Exception:
                    _logger.exception("nats: the error callback failed over %r", error)
            if self._reports_lost:
                _logger.error("nats: %d errors came faster than the error callback took them", self._reports_lost)
                self._reports_lost = 0
        finally:
            self._report_task = None
