"""Delivery: takes what lies in a session's links and gives it to the connection's subscriptions, spins or sleeps when nothing
does, and looks after everybody who waits for the session: for room, for interest to be known, for a barrier."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import errno
import logging
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any

from nats.aio.msg import Msg

from insane_nats.shim import headers, native
from insane_nats.shim.deadlines import Deadlines
from insane_nats.shim.native import ffi, lib
from insane_nats.shim.session import DETACHED, REFUSED, Session
from insane_nats.shim.spin import Spin

if TYPE_CHECKING:
    from insane_nats._fast import Connection as FastConnection
    from insane_nats.shim.connection import Connection

_logger = logging.getLogger("insane_nats")

MALLOC_BYTES = 8 << 20  # see _keep_heap
TURN_S = 0.002  # of one pass of the event loop, while there is a backlog
FEW = 16  # messages of one pass, behind which the next are worth a look at once: more take longer than going round
PASS_S = 0.001  # who spins goes through the event loop at least this often
SLICE_NS = 5_000  # of a spin in an event loop that does not show whether it has work,
BLIND_NS = 20_000  # of one before the caller waits in such a loop,
BLIND_PASS_S = 0.00025  # and how often who spins there goes through it
POLL_S = (0.0002, 0.005)  # first and longest wait between looks at what nobody rings for
HELD_PASSES = 16  # of the loop, before messages that are held back are looked for with a timer
TRIM_S = 1.0  # after the last traffic
SPACE_POLL_S = 0.05  # a waiting publisher tries again that often, rung or not

NOTHING, FOUND, PASS_DUE = range(3)  # what look() says

if lib is not None:
    _uncleared = ffi.new_allocator(should_clear_after_alloc=False)


def _keep_heap() -> None:
    """glibc gives freed memory back at once, and each page of the next payload is then faulted in anew, which takes longer than
    copying it. It keeps up to twice the largest block that was ever freed, so one is."""
    _uncleared("char[]", MALLOC_BYTES)


if lib is not None:
    _keep_heap()


def start_later(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task whose first step comes behind what runs now: also with asyncio.eager_task_factory, by which it would come in the
    middle of a delivery, and be over before its caller knows of it."""
    return asyncio.Task(coroutine, loop=loop)


class Pump:
    """One session's delivery on one event loop. At every moment it has either a pass scheduled, or is armed: whoever writes
    to the session then rings its bell."""

    def __init__(
        self, client: Connection, session: Session, fast: FastConnection, loop: asyncio.AbstractEventLoop, spin: Spin
    ) -> None:
        self.spin = spin
        self.deadlines = Deadlines(loop)
        self.waiters = 0  # who waits for a message in the event loop: for nobody it is not worth to spin
        self._trim_timer: asyncio.TimerHandle | None = None
        self.space_waiters: collections.deque[asyncio.Future[None]] = collections.deque()
        self._client = client
        self._session = session
        self._handle = session.handle
        self._fast = fast
        self._receive = fast.receive
        self._loop = loop
        # asyncio's own loops show whether anything else wants to run; others (uvloop) are spun in, a slice a pass.
        self._ready: collections.deque[Any] | None = getattr(loop, "_ready", None)
        self.is_blind = self._ready is None
        self._timers: list[asyncio.TimerHandle] = getattr(loop, "_scheduled", [])
        self._pass_callback = self._pass
        self._event = ffi.new("struct nsn_event *")
        self._queued = 0  # 1: a pass is scheduled
        self._armed = False
        self._wait_from = 0.0  # the last waiter
        self._spin_from = 0.0
        self._spinning = False
        self._held_passes = 0
        self._bell = -1
        self._control = -1
        self._writing = False
        self._stopped = False
        self._poll_timer: asyncio.TimerHandle | None = None
        self._poll_s = POLL_S[0]
        self._waits: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._barriers = 0  # under way
        self._joining: list[tuple[asyncio.Future[bool], float]] = []  # who waits for the next, and how long
        self._joining_task: asyncio.Task[None] | None = None
        self._traffic_at_trim = -1
        self._indirect: collections.deque[tuple[int, bytes, bytes, bytes, bytes]] = collections.deque()
        self._indirect_task: asyncio.Task[None] | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The session is READY: from now on its descriptors are watched."""
        self._bell = self._session.bell_fd
        self._loop.add_reader(self._bell, self._on_bell)
        self.watch_control()
        self._settle_down()

    def stop(self) -> None:
        """Before the session is closed. Nobody waits any more."""
        if self._stopped:
            return
        self._stopped = True
        if not self._loop.is_closed():
            if self._bell >= 0:
                self._loop.remove_reader(self._bell)
            self.unwatch_control()
        for timer in (self._trim_timer, self._poll_timer):
            if timer is not None:
                timer.cancel()
        for _, waiter in self._waits:
            waiter.cancel()
        for waiter in self.space_waiters:
            waiter.cancel()
        for joined, _ in self._joining:
            joined.cancel()
        if self._indirect_task is not None:
            self._indirect_task.cancel()

    def forget(self) -> None:
        """As stop(), in a forked child: the loop's descriptors are shared with the parent, so nothing is taken back. And at
        exit."""
        self._stopped = True

    def watch_control(self) -> None:
        control = self._session.control_fd
        if control != self._control:
            self.unwatch_control()
            self._control = control
            if control >= 0:
                self._loop.add_reader(control, self.attend)
        unsent = control >= 0 and bool(lib.nsn_session_unsent(self._handle))
        if unsent and not self._writing:
            self._loop.add_writer(control, self.attend)
        elif self._writing and not unsent:
            self._loop.remove_writer(control)
        self._writing = unsent

    def unwatch_control(self) -> None:
        if self._control >= 0:
            self._loop.remove_reader(self._control)
            if self._writing:
                self._loop.remove_writer(self._control)
        self._control = -1
        self._writing = False

    # --- passes -----------------------------------------------------------------------------------------------------

    def again(self) -> None:
        """Schedules a pass."""
        if not self._queued:
            self._queued = 1
            self._loop.call_soon(self._pass_callback, context=contextvars.Context())  # a pass may run inside another

    def passed(self) -> None:
        self._fast.last_pass = monotonic()

    def _pass(self) -> None:
        self._queued = 0
        if self._stopped:
            return
        self._fast.last_pass = now = monotonic()
        alone = not self._ready
        count = self._take(0)
        if count:
            last = count
            while last == native.fast.BATCH and monotonic() - now < TURN_S:
                last = self._take(0)
            if self._spinning:
                self._spinning = False
                self.spin.hit((now - self._spin_from) * 1e9)
            self._spin_from = now
            self._chores()
            self.again()
        else:
            count = self._idle(now)
        if count and alone:
            self._linger(count, now + PASS_S)

    def _idle(self, now: float) -> int:
        """A pass found nothing: spins while somebody waits and that is worth it, then sleeps. The number of messages found."""
        self._attend()
        if self._stopped or self._queued:
            return 0
        left_ns = self.spin.budget_ns
        if left_ns and not self.spin.polls:
            left_ns -= int((now - self._spin_from) * 1e9)
        if left_ns <= 0 or not (self.waiters or self.spin.polls):
            if self._spinning and self.waiters:
                self.spin.miss()
            self._spinning = False
            self._settle_down()
            return 0
        self._spinning = True
        if self._ready is None:
            spin_ns = min(left_ns, SLICE_NS)
        elif self._ready:
            spin_ns = 0
        else:
            spin_ns = self._until_timer(now, left_ns)
        count = self._take(spin_ns) if spin_ns > 0 else 0
        if count:
            self._spinning = False
            self._found(now)
        self.again()
        return count

    def _found(self, spin_from: float) -> None:
        """A spin has found something."""
        self._spin_from = monotonic()
        self.spin.hit((self._spin_from - spin_from) * 1e9)

    def _linger(self, count: int, until: float) -> None:
        """A pass, which is scheduled again, has found so many messages, and nobody else wanted to run: what the event loop
        would find next, when it has gone round and asked the kernel, are those whom it woke. They are run here. As long as
        they take what comes a few at a time, the next are taken here too."""
        while self._run_woken() and count <= FEW and not (self._stopped or self._waits or self.space_waiters):
            now = monotonic()
            left_ns = self._until_timer(now, int((until - now) * 1e9))
            if left_ns <= 0:
                return
            spin_ns = min(left_ns, self.spin.budget_ns) if self.waiters or self.spin.polls else 0
            count = self._take(spin_ns)
            if not count:
                self._spinning = spin_ns > 0
                return
            if spin_ns:
                self._found(now)

    def _run_woken(self) -> bool:
        """Runs what was scheduled since nothing was, but for this session's pass. True when they have scheduled nothing. In
        debug mode, where it measures each, all are left to the event loop."""
        ready = self._ready
        if ready is None or self._loop.get_debug():
            return False
        left = len(ready)
        while ready and left:  # one of them may let the loop go round itself, as nest_asyncio does
            left -= 1
            handle = ready.popleft()
            if handle._callback is self._pass_callback:
                ready.append(handle)
            elif not handle._cancelled:
                handle._run()
        return len(ready) == self._queued

    def begin_wait(self) -> None:
        """Somebody waits for a message in the event loop."""
        self.waiters += 1
        self._wait_from = now = monotonic()
        if self._ready is None and self.spin.budget_ns:
            self._spin_from = now
            self.again()

    def end_wait(self) -> None:
        self.waiters -= 1

    def _until_timer(self, now: float, most_ns: int) -> int:
        """Nanoseconds until the loop's first timer is due, at most that many."""
        timers = self._timers
        if timers:
            return min(most_ns, int((timers[0].when() - now) * 1e9))
        return most_ns

    def look(self, timeout_s: float | None) -> int:
        """Spins on behalf of a caller that has nothing else to do, without going through the event loop.

        FOUND: messages were dispatched, to the caller or others. PASS_DUE: the loop must go round first. NOTHING: the caller
        must wait in the loop, because nothing came or because others want to run.
        """
        ready = self._ready
        if self._stopped or (ready is not None and len(ready) > self._queued):
            return NOTHING
        now = monotonic()
        if now - self._fast.last_pass > (PASS_S if ready is not None else BLIND_PASS_S):
            return PASS_DUE
        spin_ns = self._until_timer(now, self.spin.budget_ns if ready is not None else BLIND_NS)
        if timeout_s is not None and timeout_s * 1e9 < spin_ns:
            spin_ns = int(timeout_s * 1e9)
        if spin_ns <= 0:
            return NOTHING
        if self._take(spin_ns):
            self._found(now)
            if not self._queued:
                self.again()
            return FOUND
        self._attend()
        if self._stopped:
            return NOTHING
        if ready is None:
            self.again()  # goes on spinning there
            return NOTHING
        self.spin.miss()
        if not self._queued:
            self._settle_down()
        return NOTHING

    def _settle_down(self) -> None:
        """Nothing to do: sleeps, so that the next writer rings."""
        if self.spin.polls:
            self.again()
        elif lib.nsn_receive_held(self._handle):
            self._held_passes += 1
            if self._held_passes < HELD_PASSES:
                self.again()
            else:
                self._poll_later()
        elif lib.nsn_arm(self._handle):
            self._held_passes = 0
            self._armed = True
            if self._waits or self.space_waiters:
                self._poll_later()
        else:
            self.again()

    def _on_bell(self) -> None:
        """Delivers first, and runs those who were woken, who may let the loop go round: the bell is silent then."""
        alone = not self._ready
        slept = self._armed and self.waiters
        count = self._take(0)
        if count:
            self._spin_from = now = monotonic()
            if slept:
                self.spin.woken((now - self._wait_from) * 1e9)
        if self._stopped:
            return
        lib.nsn_disarm(self._handle)
        self.again()
        if count and alone:
            self._run_woken()

    def _poll_later(self) -> None:
        if self._poll_timer is None:
            self._poll_timer = self._loop.call_later(self._poll_s, self._poll)
            self._poll_s = min(self._poll_s * 2, POLL_S[1])

    def _poll(self) -> None:
        self._poll_timer = None
        if not self._stopped:
            self.again()

    # --- nsnd -------------------------------------------------------------------------------------------------------

    def attend(self) -> None:
        """nsnd has said something, or something is to be sent to it."""
        self._attend()
        if not self._stopped and not self._queued:
            self.again()

    def _attend(self) -> None:
        session = self._session
        result = session.process()
        if result == -errno.ECHILD:
            self._client._inherited()
            return
        if result or self._writing:
            self.watch_control()
        self._chores()
        if session.state == DETACHED and not self._stopped:
            self._client._on_detached()
        elif session.state == REFUSED and not self._stopped:
            self._client._on_refused()

    def send(self) -> None:
        """Sends what was queued for nsnd."""
        if self._session.process():
            self.again()
        if lib.nsn_session_unsent(self._handle) or self._writing:
            self.watch_control()

    def _chores(self) -> None:
        event = self._event
        while lib.nsn_next_event(self._handle, event):
            self._client._on_event(event)
            if self._stopped:
                return
        if self.space_waiters and lib.nsn_space(self._handle):
            self.wake_publisher()
        if self._waits:
            self._check_waits()

    def wake_publisher(self) -> None:
        """The first of the publishers that wait for room tries again."""
        if self.space_waiters and not self.space_waiters[0].done():
            self.space_waiters[0].set_result(None)

    # --- waiting for the session --------------------------------------------------------------------------------------

    async def until(self, true: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until the condition, which the session's progress brings about, is true. False at the timeout."""
        if true():
            return True
        waiter: asyncio.Future[None] = self._loop.create_future()
        entry = (true, waiter)
        self._waits.append(entry)
        self._poll_s = POLL_S[0]
        self.again()
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            self._raise_if_stopped()
            raise
        finally:
            if entry in self._waits:
                self._waits.remove(entry)
        return True

    def _check_waits(self) -> None:
        for entry in list(self._waits):
            true, waiter = entry
            if waiter.done() or true():
                self._waits.remove(entry)
                if not waiter.done():
                    waiter.set_result(None)

    def pass_due(self) -> bool:
        """True when the event loop has not gone round for a while."""
        return monotonic() - self._fast.last_pass > PASS_S

    async def settled(self, spin: Spin | None, timeout_s: float) -> bool:
        """Sends changes of interest, and waits until every publisher on this host sees them. False at the timeout."""
        self.send()
        handle = self._handle
        budget_ns = 0 if spin is None else spin.budget_ns
        if lib.nsn_interest_settled(handle, budget_ns):
            if spin is not None and budget_ns:
                spin.hit(0)
            return True
        if spin is not None and budget_ns:
            spin.miss()
        started = monotonic()
        done = await self.until(lambda: bool(lib.nsn_interest_settled(handle, 0)), timeout_s)
        if spin is not None:
            spin.woken((monotonic() - started) * 1e9)
        return done

    async def barrier(self, timeout_s: float) -> bool:
        """Until everything published before has been handed over, and what lay in the links has been dispatched. False at the
        timeout. Those who ask while one is under way share the next."""
        if not self._barriers:
            return await self._barrier(timeout_s)
        waiter: asyncio.Future[bool] = self._loop.create_future()
        if not self._joining:
            self._joining_task = start_later(self._loop, self._barrier_for_joined())
        self._joining.append((waiter, timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            return False
        except asyncio.CancelledError:
            self._raise_if_stopped()
            raise

    async def _barrier_for_joined(self) -> None:
        joined = self._joining
        self._joining = []
        try:
            passed = await self._barrier(max(timeout_s for _, timeout_s in joined))
        except Exception as error:
            for waiter, _ in joined:
                if not waiter.done():
                    waiter.set_exception(error)
        else:
            for waiter, _ in joined:
                if not waiter.done():
                    waiter.set_result(passed)

    def _raise_if_stopped(self) -> None:
        """A wait that stop() has cancelled ends with the connection, not with the caller's task."""
        task = asyncio.current_task()
        if self._stopped and not (task is not None and task.cancelling()):
            raise self._client._closed_error() from None

    async def _barrier(self, timeout_s: float) -> bool:
        handle = self._handle
        token = lib.nsn_barrier_begin(handle)
        if token < 0:
            raise self._client._session_error(token)
        self._barriers += 1
        try:
            self.send()
            self._take(0)
            self.again()
            if lib.nsn_barrier_done(handle, token) and not self._indirect:
                token = 0
                return True
            reached = False

            def done() -> bool:
                nonlocal reached
                reached = reached or lib.nsn_barrier_done(handle, token) != 0
                return reached and not self._indirect and self._indirect_task is None

            if self.spin.budget_ns:
                self._session.process(self.spin.budget_ns)
                self._take(0)
            passed = await self.until(done, timeout_s)
            if reached:
                token = 0
            return passed
        finally:
            self._barriers -= 1
            if token and not self._stopped:
                lib.nsn_barrier_cancel(handle, token)

    # --- delivery -----------------------------------------------------------------------------------------------------

    def _take(self, spin_ns: int) -> int:
        """Takes a batch and dispatches it. Returns the number of messages. The session is awake now: the caller sees to it
        that a pass follows or it sleeps again."""
        self._armed = False
        count = self._receive(spin_ns)
        if count > 0:
            if not self._fast.trimming:
                self.start_trim()
        elif count < 0:
            self._trouble(count)
            return 0
        return count

    def _trouble(self, number: int) -> None:
        if number == -errno.ECHILD:
            self._client._inherited()
        else:
            self._client._on_failure(self._client._session_error(number))

    def deliver(self, sub: Any, sid: int, subject: bytes, reply: bytes, block: bytes, data: bytes, last: bool) -> None:
        """A message that needs nats-py's own delivery, a subclass's, or another class of messages."""
        client = self._client
        if client._roundabout or sub._jsi is not None:
            self._go_round((sid, subject, reply, data, block))
            return
        sub._received += 1
        if 0 < sub._max_msgs <= sub._received:
            client._subs.pop(sid, None)
            if not last:
                self.drop_interest(sid)
        msg = client._build_message(sid, subject, reply, data, headers.decode(block) if block else None)
        if msg:
            self._hand_over(sub, msg)

    def _hand_over(self, sub: Any, msg: Msg) -> None:
        if sub._sink is not None:
            sub._sink(msg)
            return
        pending = sub._pending_size + len(msg.data)
        queue = sub._pending_queue
        if (0 < sub._pending_bytes_limit <= pending) or queue.full():
            self._client._too_slow(sub, msg)
            return
        sub._pending_size = pending
        queue.put_nowait(msg)

    def deliver_status(self, sub: Any, subject: str, block: bytes) -> None:
        """A status message to one subscription of this connection. It does not come by a link, and libnsn's maxima do not
        count it; nats-py's do."""
        self._client.stats["in_msgs"] += 1
        self.deliver(sub, sub._id, subject.encode("utf-8", "surrogateescape"), b"", block, b"", False)

    def drop_interest(self, sid: int) -> None:
        """nats-py forgets a subscription whose maximum it has counted; libnsn did not count that far (status messages)."""
        if lib.nsn_unsubscribe(self._handle, sid, 0) == 0:
            self._client._removed = True
            self.again()

    def _go_round(self, message: tuple[int, bytes, bytes, bytes, bytes]) -> None:
        """By way of nats-py's own _process_msg, which awaits: one after the other, in a task of their own."""
        self._indirect.append(message)
        if self._indirect_task is None:
            self._indirect_task = start_later(self._loop, self._process_indirect())

    async def _process_indirect(self) -> None:
        client = self._client
        stats = client.stats
        try:
            while self._indirect:
                sid, subject, reply, data, block = self._indirect.popleft()
                stats["in_msgs"] -= 1  # _process_msg counts it again
                stats["in_bytes"] -= len(data)
                sub = client._subs.get(sid)
                try:
                    await client._process_msg(sid, subject, reply, data, block)
                except Exception as error:
                    client._report(error)
                if sub is not None and client._subs.get(sid) is not sub and 0 < sub._max_msgs <= sub._received:
                    self.drop_interest(sid)
        finally:
            self._indirect_task = None
            if not self._stopped:
                self.again()

    # --- memory -------------------------------------------------------------------------------------------------------

    def start_trim(self) -> None:
        """There is traffic: a while after the last of it, idle memory is given back."""
        self._fast.trimming = True
        self._trim_timer = self._loop.call_later(TRIM_S, self._trim)

    def _trim(self) -> None:
        self._fast.trimming = False
        self._trim_timer = None
        if self._stopped:
            return
        stats = self._client.stats
        traffic = stats["in_msgs"] + stats["out_msgs"]
        if traffic != self._traffic_at_trim:
            self._traffic_at_trim = traffic
            self.start_trim()
        elif lib.nsn_trim(self._handle):
            self.start_trim()
