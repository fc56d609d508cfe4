"""Session, Stream, Source and Sink: INSANE's primitives as Python objects."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
import time
import warnings
from types import TracebackType
from typing import Any, Self

from insane_nats.shim import qos
from insane_nats.shim.insane_buffer import Buffer
from insane_nats.shim.insane_handle import FOR_EVER_NS, ClosedError, Handle, InsaneError, checked, failure
from insane_nats.shim.insane_watch import Watch
from insane_nats.shim.native import ffi, lib, missing

_logger = logging.getLogger("insane_nats")

if lib is not None:
    _send = lib.nsn_insane_send

CHANNEL_MAX = 2**32 - 2
SLICE_NS = 1_000_000_000  # a call that sleeps comes back that often, for signals that arrived just before it slept
POLL_SLICE_NS = 20_000_000  # and one that polls, which notices no signal
WORDS = 512
_POLICIES = {
    "datapath": {"default": 0, "fast": 1},
    "consumption": {"poll": 0, "low": 1, "adaptive": 2},
    "determinism": {"default": 0, "timesensitive": 1},
    "reliability": {"unreliable": 0, "reliable": 1},
}


class _Closing:
    """What can be closed, by hand or by a with block."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Session(_Closing):
    """A program's (or a thread's) attachment to the fabric of one application ID of this host.

    Messages go between sessions, also of one process; a session does not hear itself unless echo is set. Any thread may use it.
    """

    def __init__(
        self,
        application_id: int | None = None,
        *,
        name: str = "",
        echo: bool | None = None,
        config: str | os.PathLike[str] | None = None,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
    ) -> None:
        """application_id: 1 to 65535, the port of a NATS URL; None: what nsn-app.cfg says, which is looked for at config,
        else where INSANE_APP_CONFIG says, else in the working directory. name: shown by `insane-nats status`. echo: own sinks
        get what own sources emit; None: as that file says, else not. user and password, or token: where the application ID
        asks for credentials; None, all of them: as that file says, when it was asked for the application ID.

        Starts an nsnd where nobody serves the application ID, unless INSANE_NATS_AUTOSTART=0, and waits up to some 20 seconds
        for it. InsaneError when there is no node to attach to, or a mistake in the configuration; ValueError.
        """
        configured = None
        if application_id is None:
            configured = _configured(config)
            application_id = int(configured.application_id)
            echo = bool(configured.echo) if echo is None else echo
        elif not 1 <= application_id <= 65535:
            raise ValueError(f"an application ID is a number from 1 to 65535, not {application_id}")
        self.application_id = application_id
        named = {"user": user, "password": password, "token": token}
        credentials = {key: text for key, text in named.items() if text is not None}
        if configured is not None and not credentials:
            read = {key: ffi.string(getattr(configured, key)).decode() for key in named}
            credentials = {key: text for key, text in read.items() if text}
        self._handle = Handle(application_id, name, bool(echo), [sys.executable, "-m", "nsnd"], credentials)
        self._watch: Watch | None = None
        self._streams: set[int] = set()

    @property
    def closed(self) -> bool:
        return self._handle.closed

    @property
    def attached(self) -> bool:
        """False while nsnd is gone. Sessions that have met exchange messages all the same."""
        with self._handle as session:
            return bool(lib.nsn_insane_attached(session))

    @property
    def max_payload(self) -> int:
        """Bytes that a message may have."""
        with self._handle as session:
            return int(lib.nsn_insane_max_payload(session))

    def create_stream(self, qos: object = None, **policies: str) -> Stream:
        """A stream with these policies: a QoS, a dict, a text as "consumption=poll,reliability=unreliable", or keywords.
        ValueError names what a policy may be."""
        return Stream(self, _resolved(qos, policies))

    def close(self) -> None:
        """Ends all of its streams. Threads and tasks that wait get ClosedError. Buffers that are still held stay valid; the
        session's memory goes back with the last of them. What was emitted is still received by others."""
        if not self._handle.closed:
            with self._handle as session:
                for stream in list(self._streams):
                    lib.nsn_insane_destroy_stream(session, stream)
                if self._watch is not None:
                    self._watch.stop()
        self._handle.close()

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and not handle.closed and not handle.inherited:
            text = f"the INSANE session of application ID {self.application_id} was not closed"
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)
            self.close()

    def _watched(self) -> Watch:
        loop = asyncio.get_running_loop()
        if self._watch is None or self._watch.loop is not loop:
            if self._watch is not None and not self._watch.loop.is_closed() and self._watch.waiting:
                raise RuntimeError("this session's sinks are awaited in another event loop: use one session a loop")
            if self._watch is not None:
                self._watch.stop()
            self._watch = Watch(self._handle, loop)
        return self._watch

    def _pass_warning_on(self, session: Any) -> None:
        text = ffi.new("char[]", WORDS)
        if lib.nsn_insane_warning(session, text, WORDS):
            _logger.warning("%s", ffi.string(text).decode(errors="replace"))


class Stream(_Closing):
    """Sources and sinks with one quality of service."""

    def __init__(self, session: Session, qos: qos.QoS) -> None:
        self.session = session
        self.qos = qos
        options = ffi.new("struct nsn_options *", {name: values[getattr(qos, name)] for name, values in _POLICIES.items()})
        number = ffi.new("uint32_t *")
        with session._handle as opened:
            checked(lib.nsn_insane_create_stream(opened, options, number))
        self._number = int(number[0])
        session._streams.add(self._number)

    def create_source(self, channel: int) -> Source:
        """The sending end of a channel, 0 to 4294967294."""
        return Source(self, channel)

    def create_sink(self, channel: int) -> Sink:
        """The receiving end of a channel. Every emission of this host that begins after it was created reaches it."""
        return Sink(self, channel)

    def close(self) -> None:
        """Ends its sources and sinks too."""
        session = self.session
        if session.closed or self._number not in session._streams:
            return
        session._streams.discard(self._number)
        with session._handle as opened:
            checked(lib.nsn_insane_destroy_stream(opened, self._number))


class _End(_Closing):
    """A source or a sink."""

    def __init__(self, stream: Stream, channel: int, create: Any, destroy: Any) -> None:
        if not 0 <= channel <= CHANNEL_MAX:
            raise ValueError(f"a channel is a number from 0 to {CHANNEL_MAX}, not {channel}")
        self.stream = stream
        self.channel = channel
        self._handle = stream.session._handle
        self._destroy = destroy
        number = ffi.new("uint32_t *")
        arguments = (number,) if create is lib.nsn_insane_create_source else (ffi.NULL, number)
        with self._handle as session:
            checked(create(session, stream._number, channel, *arguments))
        self._number = int(number[0])
        self._closed = False

    def close(self) -> None:
        if self._closed or self._handle.closed:
            return
        self._closed = True
        with self._handle as session:
            self._destroy(session, self._number)  # it may have gone with its stream

    def _failure(self, number: int) -> InsaneError:
        """The error of a call that returned this."""
        if self._handle.closed:
            return ClosedError("session")
        if number in (-errno.EBADF, -errno.ESHUTDOWN):
            return ClosedError(type(self).__name__.lower())
        return failure(number)


class Source(_End):
    """The sending end of a channel."""

    def __init__(self, stream: Stream, channel: int) -> None:
        super().__init__(stream, channel, lib.nsn_insane_create_source, lib.nsn_insane_destroy_source)

    def get_buffer(self, size: int, timeout: float | None = None) -> Buffer:
        """A writable buffer of that many bytes.

        timeout: seconds to wait while readers have the memory for large ones (None: the write deadline, 10 s; 0: not at all).
        InsaneError: EMSGSIZE above max_payload, EAGAIN no memory in time, ENOBUFS this session holds all of it."""
        if size < 0:
            raise ValueError(f"a buffer cannot have {size} bytes")
        taken = ffi.new("struct nsn_buffer **")
        with self._handle as session:
            wait_ns = lib.nsn_insane_write_deadline(session) if timeout is None else _nanoseconds(timeout)
            deadline = time.monotonic_ns() + wait_ns
            while True:
                left_ns = max(0, deadline - time.monotonic_ns())
                result = lib.nsn_insane_get_buffer(session, size, min(left_ns, SLICE_NS), taken)
                if result == 0:
                    self._handle.lent()
                    return Buffer(self._handle, taken[0], writable=True)
                if result not in (-errno.EAGAIN, -errno.EINTR) or left_ns == 0:
                    raise self._failure(result)

    def emit(self, buffer: Buffer, length: int | None = None) -> int:
        """Emits the buffer's first bytes (None: all), also of one that was consumed, which releases it. Returns a token for
        outcome(). On a reliable stream it waits while a sink has no room, up to the write deadline (10 seconds, or those of
        INSANE_NATS_WRITE_DEADLINE); then that sink loses messages until it reads again.

        ReleasedError; ValueError for a length that it has not; BufferError while another object views its memory; InsaneError.
        After an error the buffer is still the caller's."""
        size = len(buffer)
        if length is not None and not 0 <= length <= size:
            raise ValueError(f"length is {length}, and the buffer has {size} bytes")
        if buffer._handle is not self._handle:
            raise ValueError("the buffer is another session's: copy its bytes into one of this session")
        with self._handle as session:
            given = buffer.give_away()
            given.len = size if length is None else length
            result = -1
            try:
                result = self._emit(session, given)
                if result < 0:
                    raise self._failure(result)
            finally:
                if result < 0:  # also when a signal handler raises
                    given.len = size
                    buffer.take_back()
            self._handle.gave_back()
            return result

    def _emit(self, session: Any, given: Any) -> int:
        deadline = 0
        while (result := int(lib.nsn_insane_emit(session, self._number, given, deadline))) == -errno.EINTR:
            deadline = deadline or time.monotonic_ns() + lib.nsn_insane_write_deadline(session)
        return result

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Emits a copy of the bytes, waiting as emit() does. Returns a token for outcome(). InsaneError: EMSGSIZE above
        max_payload."""
        given = ffi.from_buffer("uint8_t[]", data)
        deadline = 0
        with self._handle as session:
            while (result := int(_send(session, self._number, given, len(given), deadline))) == -errno.EINTR:
                deadline = deadline or time.monotonic_ns() + lib.nsn_insane_write_deadline(session)
            if result < 0:
                raise self._failure(result)
            return result

    def outcome(self, token: int) -> int:
        """To how many sinks and subscriptions it went: 0, nobody listens. InsaneError: ENOBUFS, at least one had no room and
        lost it; ENOENT, it is none of the source's last 256 emissions."""
        with self._handle as session:
            result = int(lib.nsn_insane_outcome(session, self._number, token))
            if result < 0:
                raise self._failure(result)
            return result


class Sink(_End):
    """The receiving end of a channel."""

    def __init__(self, stream: Stream, channel: int) -> None:
        super().__init__(stream, channel, lib.nsn_insane_create_sink, lib.nsn_insane_destroy_sink)
        self._slice_ns = POLL_SLICE_NS if stream.qos.consumption == "poll" else SLICE_NS

    def consume(self, timeout: float | None = None) -> Buffer:
        """The next message; waits for it as the stream's consumption policy says, other threads running meanwhile.

        timeout: seconds; None: for ever. TimeoutError; ClosedError; InsaneError with ENOTCONN when nsnd has been gone for five
        seconds of the call and nothing came (calling again is right: it attaches again by itself)."""
        wait_ns = FOR_EVER_NS if timeout is None else _nanoseconds(timeout)
        since = time.monotonic_ns()
        while True:
            left_ns = max(0, since + wait_ns - time.monotonic_ns())
            buffer, result = self._consume(min(left_ns, self._slice_ns), since)
            if buffer is not None:
                return buffer
            if result not in (-errno.EAGAIN, -errno.ETIMEDOUT, -errno.EINTR):
                raise self._failure(result)
            if left_ns == 0:
                raise TimeoutError(f"no message on channel {self.channel} within {timeout} s")

    def consume_nowait(self) -> Buffer | None:
        """The next message, or None."""
        buffer, result = self._consume(0, 0)
        if buffer is None and result not in (-errno.EAGAIN, -errno.EINTR):
            raise self._failure(result)
        return buffer

    async def consume_async(self, timeout: float | None = None) -> Buffer:
        """As consume(), in an event loop. One loop at a time may wait for a session's sinks, in any number of tasks."""
        async with asyncio.timeout(timeout):
            while True:
                buffer = self.consume_nowait()
                if buffer is not None:
                    return buffer
                await self.stream.session._watched().message(self._number)

    def __aiter__(self) -> Sink:
        return self

    async def __anext__(self) -> Buffer:
        """The next message; ends when the sink or its session is closed."""
        try:
            return await self.consume_async()
        except ClosedError:
            raise StopAsyncIteration from None

    def available(self) -> int:
        """How many messages can be consumed without waiting."""
        with self._handle as session:
            result = int(lib.nsn_insane_available(session, self._number, 0))
            if result < 0:
                raise self._failure(result)
            return result

    @property
    def dropped(self) -> int:
        """Messages that were lost because the program consumed from other sinks and not from this one."""
        with self._handle as session:
            return int(lib.nsn_insane_dropped(session, self._number))

    def _consume(self, wait_ns: int, since_ns: int) -> tuple[Buffer | None, int]:
        taken = ffi.new("struct nsn_buffer **")
        with self._handle as session:
            result = int(lib.nsn_insane_consume(session, self._number, wait_ns, since_ns, taken))
            if result == 0:
                self._handle.lent()
                return Buffer(self._handle, taken[0], writable=False), 0
            self.stream.session._pass_warning_on(session)
            return None, result


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))


def _configured(path: str | os.PathLike[str] | None) -> Any:
    """struct nsn_app_config."""
    if lib is None:
        raise InsaneError(errno.ENOSYS, f"INSANE's primitives are not available: {missing}")
    config = ffi.new("struct nsn_app_config *")
    checked(lib.nsn_app_config_read(ffi.NULL if path is None else ffi.new("char[]", os.fsencode(path)), config))
    return config


def _resolved(given: object, policies: dict[str, str]) -> qos.QoS:
    named = qos.parse(given, "the argument qos")
    named.update(qos.parse(policies, "a keyword"))
    return qos.QoS(**named)
