"""Connecting: what kind of connection it is to be, attaching to a node, and attaching again when nsnd was away."""

from __future__ import annotations

import asyncio
import errno
import inspect
import logging
import os
import random
import socket
from time import monotonic
from typing import Any
from urllib.parse import ParseResult

from nats import errors
from nats.aio.client import DEFAULT_BUFFER_SIZE, Server, Srv
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg as NatsMsg
from nats.aio.transport import TcpTransport

from insane_nats.shim import known_nodes, native, node, qos
from insane_nats.shim import session as nsn
from insane_nats.shim.connection import WRITE_DEADLINE_S, Connection, Early, World
from insane_nats.shim.errors import (
    AttachRefusedError,
    NoNodeError,
    NotDeliveredError,
    NotEncryptedError,
    SessionError,
    WrongKindError,
)
from insane_nats.shim.msg import Msg
from insane_nats.shim.native import fast
from insane_nats.shim.node import Found, Probe
from insane_nats.shim.pump import Pump
from insane_nats.shim.spin import Spin

_logger = logging.getLogger("insane_nats")

MODE_ENVIRONMENT = "INSANE_NATS_MODE"
WRITE_DEADLINE_ENVIRONMENT = "INSANE_NATS_WRITE_DEADLINE"
ATTACH_SPIN_NS = 200_000
NOT_DELIVERED = "'message not delivered to "  # how a relay begins to tell, in nats-py's small letters
KNOWN_TIMEOUT_S = 0.2  # for a node that was there before; after it, its port is asked


class _Abort(BaseException):
    """Ends nats-py's connect loop, which goes on after every Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _plain(uri: ParseResult) -> bool:
    return uri.scheme == "nats"


def _at(server: Srv) -> str:
    """Where the server is, for texts."""
    return node.place(server.uri)


def _greets(uri: ParseResult) -> bool:
    """True where whoever is there says so in clear text before anything else."""
    return uri.scheme in ("nats", "tls")


class _UnauthorizedError(Exception):
    """nsnd does not know the credentials."""


class _RelayedError(Exception):
    """nsnd has a relay for this connection: the descriptor of its other end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.descriptor = descriptor


class Attaching(Connection):
    """A connection that finds its node, and comes back to it."""

    async def connect(
        self,
        servers: str | list[str] = "nats://localhost:4222",
        *arguments: Any,
        qos: object = None,
        write_deadline: float | None = None,
        **options: Any,
    ) -> None:
        """nats-py's connect(), with all of its arguments, and:

        qos: policies of what is published: a QoS, a dict, or "consumption=low,datapath=fast".
        write_deadline: seconds that publish() waits for a subscriber whose link is full, before it is a slow consumer.

        Raises ValueError for a policy that does not exist, NoServersError with the way out when there is no node to attach to.
        """
        if self._session is None and self._looked_around:
            self._reset()
        self._qos_argument = qos
        self._write_deadline = _write_deadline(write_deadline)
        try:
            await super().connect(servers, *arguments, **options)
        except _Abort as abort:
            self._err = abort.error
            self._status = NatsClient.DISCONNECTED
            await self._error_cb(abort.error)
            raise abort.error from abort.error.__cause__
        finally:
            for found in self._probes.values():
                found.close()
            self._probes.clear()
            self._drop_early()

    # What help() and editors show: every argument of nats-py's, and ours behind them.
    connect.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(NatsClient.connect).parameters.values(),
            *(p for p in inspect.signature(connect).parameters.values() if p.kind is p.KEYWORD_ONLY),
        ],
        return_annotation="None",
    )

    # --- what kind of connection --------------------------------------------------------------------------------------

    def _setup_server_pool(self, connect_url: str | list[str]) -> None:
        before = len(self._server_pool)
        super()._setup_server_pool(connect_url)  # type: ignore[arg-type]
        new = self._server_pool[before:]
        if new:
            self._application_id = new[0].uri.port or 4222
        queries = [(server.uri.query, f"nats://{_at(server)}") for server in new if _plain(server.uri)]
        self._qos = qos.resolve(self._qos_argument, queries, os.environ.get(qos.ENVIRONMENT))

    async def _select_next_server(self) -> None:
        if self._world is World.UNDECIDED and not self._looked_around:
            await self._look_around()
        await super()._select_next_server()

    async def _look_around(self) -> None:
        """At the first connect: asks every URL of the pool who is there, until one of them decides."""
        self._looked_around = True
        mode = _mode()
        if mode == "nats" or native.missing:
            if mode == "insane":
                raise _Abort(NoNodeError(f"{MODE_ENVIRONMENT}=insane, but {native.missing}"))
            self._be_nats(f"{MODE_ENVIRONMENT}=nats" if mode == "nats" else str(native.missing))
            return
        pool = [server for server in self._server_pool if _greets(server.uri) and not self.options["tls_handshake_first"]]
        nobody = bool(pool) and all(_plain(server.uri) for server in self._server_pool)
        for server in pool:
            if await self._attach_to_known(server):
                return
            found = await node.probe(server.uri, self.options["connect_timeout"])
            self._probes[id(server)] = found
            if found.found in (Found.NODE, Found.SERVER):
                return  # nats-py's loop comes here when it has told error_cb of those before
            nobody = nobody and found.found is Found.NOBODY
        if nobody:
            await self._start_node()
        elif mode == "insane":
            why = next((str(found.error) for found in self._probes.values() if found.error), "it has no nats:// URL")
            raise _Abort(WrongKindError(f"{MODE_ENVIRONMENT}=insane, and no insane_nats node answers: {why}"))

    def _put_first(self, server: Srv) -> None:
        self._server_pool.remove(server)
        self._server_pool.insert(0, server)

    async def _start_node(self) -> None:
        """Nobody listens at any URL, and all are this host's: starts an nsnd for the application ID."""
        while True:
            try:
                server = self._server_of_application()
                found = await self._autostart(server)
            except NoNodeError as error:
                if self.options["max_reconnect_attempts"] >= 0:
                    raise _Abort(error) from error.__cause__
                await self._error_cb(error)  # never stop trying
                await asyncio.sleep(self.options["reconnect_time_wait"])
            else:
                self._probes[id(server)] = found
                self._put_first(server)
                return

    def _server_of_application(self) -> Srv:
        for server in self._server_pool:
            if server.uri.port == self._application_id:
                return server
        return self._server_pool[0]

    async def _autostart(self, server: Srv) -> Probe:
        """NoNodeError when that is forbidden, and when it fails."""
        port = server.uri.port or 4222
        if not node.autostart_allowed():
            found = await node.probe(server.uri, self.options["connect_timeout"])
            if found.found in (Found.NODE, Found.SERVER):
                return found
            found.close()
            raise NoNodeError(
                f"nobody listens on {_at(server)}, and {node.AUTOSTART_ENVIRONMENT}="
                f"{os.environ.get(node.AUTOSTART_ENVIRONMENT)} forbids to start an nsnd. Start one (nsnd --port {port}) or a "
                f"nats-server, or unset {node.AUTOSTART_ENVIRONMENT}"
            )
        waits = node.waited_for()
        if waits:
            raise NoNodeError(waits)
        return await node.autostart(server.uri, node.autostart_command(port), self.options["connect_timeout"])

    def _decide(self, server: Srv, found: Probe) -> None:
        if found.found is Found.NODE:
            self._world = World.INSANE
        elif found.found is Found.SERVER:
            if _mode() == "insane":
                text = f"{MODE_ENVIRONMENT}=insane, and at {_at(server)} is a NATS server: stop it, or use another port"
                raise _Abort(WrongKindError(text))
            self._be_nats(f"at {_at(server)} is a NATS server")

    def _be_nats(self, why: str) -> None:
        self._world = World.NATS
        level = logging.INFO if _mode() == "nats" else logging.WARNING
        _logger.log(level, "plain NATS, no shared memory: %s", why)

    async def _connect_to_server(self, s: Srv) -> None:
        if self._world is World.NATS or not _greets(s.uri) or self.options["tls_handshake_first"]:
            if self._world is World.INSANE:
                raise WrongKindError(f"this connection is a session of this host's node, and at {_at(s)} there is none")
            await super()._connect_to_server(s)
            return
        s.last_attempt = monotonic()
        if self._adopt_early(s):
            return
        found = self._probes.pop(id(s), None) or await node.probe(s.uri, self.options["connect_timeout"])
        try:
            if self._world is World.UNDECIDED:
                self._decide(s, found)
            somebody = found.connection is not None
            if self._world is World.INSANE and (somebody or (found.found is Found.NOBODY and self._is_home(s))):
                try:
                    await self._attach(s, found)
                except _UnauthorizedError:
                    self._unauthorized = True
                except _RelayedError as relayed:
                    await self._be_relayed(relayed.descriptor)
                    self._home = s.uri.port
            elif somebody:
                await self._take_over(found)
            elif found.silent and self._world is not World.INSANE:
                self._silent = True
            else:
                raise found.error or errors.NoServersError()
        finally:
            found.close()

    def _is_home(self, server: Srv) -> bool:
        """True for the port at which this connection has its node: only there another may be started, when nobody is there."""
        return self._home in (None, server.uri.port)

    async def _take_over(self, found: Probe) -> None:
        """Hands the connection that was asked who it is, its INFO still unread, to nats-py."""
        reader, writer = await asyncio.open_connection(sock=found.connection, limit=DEFAULT_BUFFER_SIZE)
        found.connection = None
        self._speak_by(reader, writer)

    async def _be_relayed(self, descriptor: int) -> None:
        """Hands the relay's connection to nats-py, whose protocol it speaks: from here on this is nats-py's connection."""
        relay = socket.socket(fileno=descriptor)
        reader, writer = await asyncio.open_unix_connection(sock=relay, limit=DEFAULT_BUFFER_SIZE)
        self._relayed = True
        self._speak_by(reader, writer)

    def _speak_by(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport = TcpTransport()
        transport._bare_io_reader = transport._io_reader = reader
        transport._bare_io_writer = transport._io_writer = writer
        self._transport = transport

    async def _process_err(self, err_msg: str) -> None:
        if not (self._relayed and err_msg.startswith(NOT_DELIVERED)):
            await super()._process_err(err_msg)
            return
        self._err = NotDeliveredError("nats: " + err_msg.strip("'"))  # nats-py would end the connection
        await self._error_cb(self._err)

    # --- attaching ----------------------------------------------------------------------------------------------------

    async def _attach(self, server: Srv, found: Probe) -> None:
        """Makes the session, or attaches it again. At the first connect a refusal ends connect()."""
        first = self._session is None and not self._relayed
        try:
            if found.found is Found.NOBODY:
                if found.error is not None and not first and not node.autostart_allowed():
                    raise found.error  # the node is waited for
                found = await self._autostart(server)
            await self._attach_to(server, found)
        except (NoNodeError, SessionError) as error:
            if first:
                raise _Abort(error) from error.__cause__
            raise
        finally:
            found.close()

    async def _attach_to_known(self, server: Srv) -> bool:
        """Attaches to the node that this process knows at the URL; False when there is none, or it does not let us in."""
        known = known_nodes.find(server.uri)
        if known is None or known.info.get("auth_required"):  # who is let in is told in connect()'s own order
            return False
        found = Probe(Found.NODE, known.info, own=True)
        try:
            session = await self._open(server, found, monotonic() + min(KNOWN_TIMEOUT_S, self.options["connect_timeout"]))
        except (SessionError, _UnauthorizedError):
            known_nodes.forget(server.uri)
            return False
        except _RelayedError as relayed:
            os.close(relayed.descriptor)
            known_nodes.forget(server.uri)
            return False
        if session.info().node_pid != known.node_pid:  # another one has taken its place, whose INFO says other things
            session.close()
            known_nodes.forget(server.uri)
            return False
        self._early = Early(server, found, session)
        return True

    def _adopt_early(self, server: Srv) -> bool:
        """Takes the session that was made for the server while looking around, unless it ended since: what came before that
        server in the pool, and cancellation, leave this connection undecided."""
        early = self._early
        if early is None or early.server is not server:
            return False
        early.session.process()
        if self._world is not World.UNDECIDED or early.session.state != nsn.READY:
            self._drop_early()
            return False
        self._early = None
        self._adopt(early.session)
        self._found_info = early.found.info or {}
        self._world = World.INSANE
        self._home = server.uri.port
        return True

    def _drop_early(self) -> None:
        if self._early is not None:
            self._early.session.close()
            self._early = None

    async def _attach_to(self, server: Srv, found: Probe) -> None:
        if found.found is not Found.NODE:
            what = found.error or found.found.value
            raise WrongKindError(f"this connection needs the insane_nats node at {_at(server)}, and there is: {what}")
        if not found.own:
            self._refuse_unencrypted(server)
            raise AttachRefusedError(
                f"the insane_nats node at {_at(server)} is on another host, and nodes of several hosts cannot be joined "
                f"yet. For programs of one host use nats://127.0.0.1:{server.uri.port}; across hosts use a nats-server"
            )
        found.close()
        self._found_info = found.info or {}
        deadline = monotonic() + self.options["connect_timeout"]
        try:
            if self._session is None:
                session = await self._open(server, found, deadline)
                if self._relayed:  # nats-py has this connection, and cannot give it back
                    session.close()
                    raise SessionError(errno.EACCES, "it asks for credentials no more, and did before: connect anew")
                self._adopt(session)
                known_nodes.remember(server.uri, found.peer, self._found_info, session.info().node_pid)
            else:
                await self._reattach(server, found, deadline)
        except SessionError as error:
            raise AttachRefusedError(_refusal(server, found, str(error))) from error
        self._home = server.uri.port

    def _refuse_unencrypted(self, server: Srv) -> None:
        """What was meant to be secret must not go to another host in clear text. NotEncryptedError."""
        asked = [
            words
            for words, given in (
                ("tls://", server.uri.scheme == "tls"),
                ("a TLS context", self.options.get("tls") is not None),
                ("credentials", self._auth_configured),
            )
            if given
        ]
        if asked:
            raise NotEncryptedError(
                f"the insane_nats node at {_at(server)} is on another host, and what goes there is not encrypted yet, "
                f"but {' and '.join(asked)} asked for that. Use a nats-server with TLS between these hosts; within one host "
                f"nothing leaves its memory (nats://127.0.0.1:{server.uri.port})"
            )

    async def _open(self, server: Srv, found: Probe, deadline: float) -> nsn.Session:
        """A session that the node has let in. SessionError."""
        session = nsn.Session(
            nsn.SessionOptions(
                socket_path=found.node["socket"],
                application_id=self._application_id,
                name=self.options["name"] or "",
                no_echo=bool(self.options["no_echo"]),
                unreliable=self._qos.reliability == "unreliable",
                pending_size=max(1, self._max_pending_size),
                write_deadline_ns=max(1, int(min(self._write_deadline, 1e9) * 1e9)),
                relay=self._relayed,
            )
        )
        try:
            await self._until_attached(session, server, deadline)
        except BaseException:
            session.close()
            raise
        return session

    def _adopt(self, session: nsn.Session) -> None:
        """This connection's session from now on."""
        loop = asyncio.get_running_loop()
        session.when_inherited = self._inherited
        session.when_exiting = self._exiting
        self._session = session
        self._handle = session.handle
        self._loop = loop
        plain = self._builds_plainly and not self._roundabout
        self._fast = fast.Connection(self, session.address, session.handle, Msg, NatsMsg, plain)
        session.lends_by(self._fast.lender)
        self._pump = Pump(self, session, self._fast, loop, Spin(self._qos.consumption))

    async def _reattach(self, server: Srv, found: Probe, deadline: float) -> None:
        session = self._session
        assert session is not None and self._pump is not None
        if session.unauthorized:
            session.process()  # to the end of the conversation that it was said in
        if session.state == nsn.DETACHED or session.unauthorized:
            session.reattach(found.node["socket"])
        await self._until_attached(session, server, deadline)
        if session.state == nsn.LOST:
            native.lib.nsn_session_accept_loss(session.handle)
            self._subscribe_again()
        self._pump.watch_control()

    async def _until_attached(self, session: nsn.Session, server: Srv, deadline: float) -> None:
        """SessionError when nsnd refuses, goes away, or does not answer in time."""
        loop = asyncio.get_running_loop()
        session.process(0 if self._qos.consumption == "low" else ATTACH_SPIN_NS)
        while session.state == nsn.CONNECTING:
            descriptor = session.relay()
            if descriptor >= 0:
                raise _RelayedError(descriptor)
            self._answer_challenge(session, server)
            left = deadline - monotonic()
            if left <= 0:
                raise SessionError(errno.ETIMEDOUT, "nsnd does not answer: is it stopped or overloaded?")
            await _readable(loop, session.control_fd, left)
            session.process()
        if session.unauthorized:
            raise _UnauthorizedError
        if session.state not in (nsn.READY, nsn.LOST):
            raise SessionError(errno.ECONNREFUSED, session.error())

    async def _process_connect_init(self) -> None:
        if self._silent:
            self._silent = False
            raise TimeoutError
        if self._world is not World.INSANE or (self._relayed and not self._unauthorized):
            await super()._process_connect_init()
            return
        if self._unauthorized:
            self._unauthorized = False
            raise errors.Error("nats: 'Authorization Violation'")  # as nats-py does with what a server says to CONNECT
        assert self._session is not None and self._fast is not None
        assert self._pump is not None and self._current_server is not None
        info = self._session.info()
        self._server_info = {**self._found_info, "client_id": info.client_id, "max_payload": info.max_payload}
        self._current_server.server_version = self._server_info.get("version")
        self._max_payload = self._fast.max_payload = info.max_payload
        self._client_id = info.client_id
        self._client_ip = self._server_info.get("client_ip", node.LOOPBACK)
        if not self.is_reconnecting:
            self._pump.start()
            self._pedantic = self._fast.pedantic = bool(self.options["pedantic"])
        self._status = NatsClient.CONNECTED
        self._pings_outstanding = 0
        self._ping_interval_task = asyncio.get_running_loop().create_task(self._ping_interval())

    # --- reconnect ----------------------------------------------------------------------------------------------------

    async def _attempt_reconnect(self) -> None:
        if self._pump is None:
            await super()._attempt_reconnect()
            return
        self._err = None
        if self._disconnected_cb is not None:
            await self._disconnected_cb()
        if self.is_closed:
            return
        if not self.options["dont_randomize"]:
            random.shuffle(self._server_pool)
        self._reconnection_task_future = asyncio.get_running_loop().create_future()
        try:
            while not await self._reconnect_once():
                pass
        except errors.NoServersError as error:
            self._err = error
            self._run(self.close())
        except asyncio.CancelledError:
            return
        finally:
            if not self._reconnection_task_future.done():
                self._reconnection_task_future.set_result(True)

    async def _reconnect_once(self) -> bool:
        """One attempt, as nats-py makes them. True when the connection is there again."""
        try:
            if self._reconnect_to_server_handler is None:
                await self._select_next_server()
            elif not await self._select_by_handler():
                return False
            await self._process_connect_init()
            assert self._current_server is not None and self._pump is not None
            self.stats["reconnects"] += 1
            self._current_server.did_connect = True
            self._current_server.reconnects = 0
            self._pump.attend()
            await self._settle()
            if self._reconnected_cb is not None:
                await self._reconnected_cb()
            return True
        except errors.NoServersError as error:
            if not isinstance(error, NoNodeError):
                raise
            await self._count_failure(error)
        except (OSError, errors.Error) as error:
            await self._count_failure(error)
        return False

    async def _count_failure(self, error: Exception) -> None:
        self._err = error
        await self._error_cb(error)
        self._status = NatsClient.RECONNECTING
        if self._current_server is not None:
            self._current_server.last_attempt = monotonic()
            self._current_server.reconnects += 1

    async def _select_by_handler(self) -> bool:
        """The user's reconnect_to_server_handler chooses; False when it failed."""
        most = self.options["max_reconnect_attempts"]
        eligible = [server for server in self._server_pool if most <= 0 or server.reconnects <= most]
        if not eligible:
            raise errors.NoServersError
        snapshot = [Server(uri=server.uri, reconnects=server.reconnects) for server in eligible]
        assert self._reconnect_to_server_handler is not None
        try:
            selected, delay_s = self._reconnect_to_server_handler(snapshot, self._server_info.copy())
        except Exception as error:
            await self._error_cb(error)
            await asyncio.sleep(0)
            return False
        chosen = eligible[0]
        if selected is not None:
            matching = [server for server in eligible if server.uri.netloc == selected.uri.netloc]
            if matching:
                chosen = matching[0]
            else:
                await self._error_cb(errors.ServerNotInPoolError())
        self._current_server = chosen
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        await self._connect_to_server(chosen)
        return True


def _mode() -> str:
    mode = os.environ.get(MODE_ENVIRONMENT, "auto").strip().lower() or "auto"
    if mode not in ("auto", "insane", "nats"):
        raise _Abort(ValueError(f"{MODE_ENVIRONMENT} cannot be {mode!r}: it is one of auto, insane, nats"))
    return mode


def _write_deadline(argument: float | None) -> float:
    """Seconds; from the argument, else the environment."""
    given = os.environ.get(WRITE_DEADLINE_ENVIRONMENT) if argument is None else argument
    if given is None or given == "":
        return WRITE_DEADLINE_S
    source = WRITE_DEADLINE_ENVIRONMENT if argument is None else "the argument write_deadline"
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        raise ValueError(f"{source} cannot be {given!r}: it is a number of seconds") from None
    if not seconds >= 0:
        raise ValueError(f"{source} cannot be {given!r}: it is 0 or more seconds")
    return seconds


def _refusal(server: Srv, found: Probe, words: str) -> str:
    """Why this program cannot attach to the node, whose that is, and the way out."""
    uid, pid = found.node.get("uid"), found.node.get("pid")
    words = words.removeprefix("nats: ")
    text = f"the insane_nats node at {_at(server)} (user {uid}, process {pid}) cannot be used: {words}"
    if uid != os.getuid():
        return (
            f"{text}. This program runs as user {os.getuid()}: run it as the node's user, or have the node's nsnd.cfg name "
            f"this one ([access] users = [{os.getuid()}]), or use another port (nats://127.0.0.1:PORT), where a node of its "
            f"own is started"
        )
    return f"{text}. If that nsnd is not in order, stop it (kill {pid}); the next connect starts another"


async def _readable(loop: asyncio.AbstractEventLoop, fd: int, timeout_s: float) -> None:
    """Until the descriptor can be read, or the time is over."""
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _wake, ready)
    timer = loop.call_later(timeout_s, _wake, ready)
    try:
        await ready
    finally:
        timer.cancel()
        loop.remove_reader(fd)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
