"""A node: its control socket, its ports, its applications, from the start to the end."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from nsnd import __version__
from nsnd.applications import Application
from nsnd.arbiter import LOOPBACK, Arbiter
from nsnd.config import Config, ConfigError
from nsnd.control import Control, ControlError
from nsnd.credentials import User
from nsnd.fabric import FabricError
from nsnd.logs import Log
from nsnd.loop import Loop, Timer
from nsnd.processes import Process, Processes
from nsnd.protocol import VERSION_MAX, VERSION_MIN, Hello, ProtocolError
from nsnd.runtime import BY_AUTOSTART, Place, RuntimeDirectory
from nsnd.sessions import Descriptors, Session

NATS_VERSION = "2.15.1"  # what INFO says: the server whose behaviour this is meant to be
APPLICATIONS_MAX = 1024
LINGER_S = 30.0
END_RETRY_S = 1.0
LAST_TAKEN_S = 2.0  # longest wait at the end for sessions to take what nobody could hand over again
LAST_TAKEN_POLL_S = 0.01


class PortError(Exception):
    """The node's own port cannot be had."""

    def __init__(self, port: int, error: ProtocolError) -> None:
        super().__init__(str(error))
        self.port = port
        self.in_use = error.errno == errno.EADDRINUSE


class Options(NamedTuple):
    """How a node was started. `linger_s`: how long an application ID (and a node started by itself) stays without sessions."""

    started_by: str
    socket: Path | None = None
    linger_s: float = LINGER_S
    reread: Callable[[], Config] | None = None


class Node:
    """Takes the runtime directory over, with the sessions in it; then run() until it is stopped.

    Made while the directory's file `lock` is held. RuntimeDirectoryError, ControlError or PortError when it cannot start.
    """

    def __init__(self, runtime: RuntimeDirectory, config: Config, options: Options, log: Log) -> None:
        self.started_at = monotonic()
        self.runtime = runtime
        self.config = config
        self.options = options
        self.log = log
        self.loop = Loop()
        self.processes = Processes(self.loop, self._process_died)
        self.applications: dict[int, Application] = {}
        self.accounts: dict[tuple[int, str], Application] = {}  # those that have been used, of those that have users
        self._idle: dict[int, Timer] = {}
        self._clients = 0
        self._listening = False
        self._ends_at = 0.0
        self.descriptors = Descriptors(_raise_descriptor_limit() // 2)
        socket = options.socket or runtime.socket
        self.record = runtime.become_node(os.urandom(16).hex(), options.started_by, config.path, socket, __version__)
        self._share_directory()
        self.arbiter = Arbiter(self.loop, log, self._info, self._visited)
        try:
            self._take_over()
            self._open_own_port()
            self.control = Control(self, socket)
        except BaseException:
            self._leave(deciding=True)
            raise
        self._listening = True

    # --- applications -----------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        for place in self.runtime.places():
            try:
                application = self._take_over_place(place)
            except FabricError as error:
                self.log.error("files of an application ID cannot be taken over", application=place.application_id,
                               directory=place.path, error=error.strerror)
                continue
            if application:
                self.log.info("sessions taken over", application=place.application_id, sessions=len(application))
        for application_id, application in list(self.applications.items()):
            if not self._is_used(application_id):
                self._remove(application)
            elif application_id != self.config.port:
                try:
                    self.arbiter.open(application_id, self.config.addr)
                except OSError as error:
                    self.log.warn("port of sessions that live cannot be bound", port=application_id, error=error.strerror)

    def _take_over_place(self, place: Place) -> Application:
        if place.application_id not in self.applications:  # an account is always one of these
            self.applications[place.application_id] = self._make(self.runtime.application(place.application_id))
        if place.account is None:
            application = self.applications[place.application_id]
        else:
            application = self.accounts[place.application_id, place.account] = self._make(place)
        application.take_over()
        return application

    def _open_own_port(self) -> None:
        try:
            self.open_application(self.config.port)
        except ProtocolError as error:
            raise PortError(self.config.port, error) from error

    def open_application(self, application_id: int) -> Application:
        """The application of this ID, and its port. ProtocolError when the port cannot be had, FabricError for the files."""
        if not 1 <= application_id <= 65535:
            raise ProtocolError(errno.EINVAL, f"application ID {application_id} is not a port number, 1 to 65535")
        if not self.arbiter.owns(application_id):
            self._open_port(application_id)
        application = self.applications.get(application_id)
        if application is None:
            try:
                application = self._make(self.runtime.application(application_id))
            except FabricError:
                self.arbiter.close(application_id)
                raise
            self.applications[application_id] = application
        self._visited(application_id)
        return application

    def _open_port(self, application_id: int) -> None:
        if len(self.applications) >= APPLICATIONS_MAX and application_id not in self.applications:
            raise ProtocolError(errno.ENOSPC, f"this node serves {APPLICATIONS_MAX} application IDs already, and no more")
        try:
            self.arbiter.open(application_id, self.config.addr)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ProtocolError(errno.EADDRINUSE, f"port {application_id} belongs to another program on this host: "
                                                      f"end that one, or choose another port") from error
            raise ProtocolError(error.errno or errno.EIO, f"port {application_id} cannot be bound: {error.strerror}") from error

    def application_of(self, application_id: int, user: User | None) -> Application:
        """Where that user's sessions meet. ProtocolError, FabricError as open_application()."""
        application = self.open_application(application_id)
        if user is None:
            return application
        account = self.accounts.get((application_id, user.account))
        if account is None:
            try:
                place = self.runtime.new_account(application_id, user.account)
            except OSError as error:
                raise FabricError(error.errno, f"a directory for an account cannot be made: {error.strerror}") from error
            account = self.accounts[application_id, user.account] = self._make(place)
        return account

    def everywhere(self) -> list[Application]:
        """By application ID, the sessions of no account first."""
        return [one for application_id in sorted(self.applications) for one in self._all_of(application_id)]

    def _all_of(self, application_id: int) -> list[Application]:
        accounts = [one for (number, _), one in sorted(self.accounts.items()) if number == application_id]
        return [self.applications[application_id], *accounts] if application_id in self.applications else []

    def _is_used(self, application_id: int) -> bool:
        return any(len(one) for one in self._all_of(application_id))

    def _make(self, place: Place) -> Application:
        return Application(place, self.loop, self.processes, self.descriptors, self.log, self._sessions_changed,
                           shared=bool(self.config.users))

    def _remove(self, application: Application) -> None:
        """An application ID, with its accounts."""
        application_id = application.application_id
        timer = self._idle.pop(application_id, None)
        if timer is not None:
            timer.cancel()
        self.arbiter.close(application_id)
        for one in self._all_of(application_id):
            one.close()
            try:
                self.runtime.remove_place(one.place)
            except OSError as error:
                self.log.warn("files of an application ID were not removed", application=application_id, error=error)
            if one.account is not None:
                del self.accounts[application_id, one.account]
        del self.applications[application_id]

    # --- sessions ---------------------------------------------------------------------------------------------------

    def next_client_id(self) -> int:
        """NATS's client_id: never twice, also not over the restarts that keep the node's identity."""
        self._clients += 1
        return (self.record.starts << 32) + self._clients

    def end_session(self, session: Session, why: str) -> None:
        session.application.end(session, why)

    def find_session(self, hello: Hello, process: Process, uid: int) -> Session | None:
        """That process's living session of this HELLO's identity, in whichever account."""
        found = (one.known(hello.identity, process, uid) for one in self._all_of(hello.application_id))
        return next((session for session in found if session is not None), None)

    def leave_others(self, hello: Hello, process: Process, uid: int, application: Application) -> None:
        """A session that was in another account is no more."""
        session = self.find_session(hello, process, uid)
        if session is not None and session.application is not application:
            self.end_session(session, "it has changed its account")

    def _process_died(self, process: Process) -> None:
        """What its sessions had sent before counts, whoever else holds the sockets open; then they end."""
        sessions = list(process.sessions)
        for session in sessions:
            if session.connection is not None:
                session.connection.drain()
        for session in sessions:
            self.end_session(session, "its process is gone")

    def _sessions_changed(self, application: Application) -> None:
        self._visited(application.application_id)

    def _visited(self, application_id: int) -> None:
        """Without sessions, an application ID is served on for a while after each sign of somebody who may want it."""
        timer = self._idle.pop(application_id, None)
        if timer is not None:
            timer.cancel()
        application = self.applications.get(application_id)
        if application is not None and not self._is_used(application_id) and not self._stays(application_id):
            self._idle[application_id] = self.loop.call_later(self.options.linger_s, lambda: self._end_idle(application))

    def _stays(self, application_id: int) -> bool:
        return application_id == self.config.port and self.options.started_by != BY_AUTOSTART

    def _end_idle(self, application: Application) -> None:
        self._remove(application)
        self.log.info("application ID is not used any more", application=application.application_id)
        self._end_unused()

    def _end_unused(self) -> None:
        """A node that was started by itself ends so, unless somebody is about to ask it for something."""
        if self.applications or self.options.started_by != BY_AUTOSTART:
            return
        try:
            # When somebody removed the directory, nobody can be deciding in it.
            with self.runtime.deciding(0) if self.runtime.path.exists() else nullcontext():
                self.log.info("no sessions any more, ending")
                self._leave(deciding=True)
        except TimeoutError:
            self.loop.call_later(END_RETRY_S, self._end_unused)
            return
        self.loop.stop()

    # --- from start to end ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until a signal, or until an autostarted node is not needed any more."""
        self.loop.on_signal(signal.SIGTERM, self._stop)
        self.loop.on_signal(signal.SIGINT, self._stop)
        self.loop.on_signal(signal.SIGHUP, self._reread)
        self.loop.on_signal(signal.SIGUSR2, self._lame_duck)
        self.log.info("ready", version=__version__, pid=os.getpid(), node=self.record.node_id, port=self.config.port,
                      addr=self.config.addr, socket=self.control.path, runtime=self.runtime.path,
                      config=self.config.path or "none")
        self.loop.run()
        self.loop.close()

    def _stop(self) -> None:
        """At a signal. What ended producers left behind is taken first, if that is soon; a second signal does not wait."""
        waits = not self._ends_at
        self._ends_at = monotonic() + LAST_TAKEN_S if waits else monotonic()
        self.log.info("ending")
        self._end_when_taken()

    def _end_when_taken(self) -> None:
        if not self._listening:
            return
        sessions = (session for application in self.everywhere() for session in application.sessions)
        if monotonic() < self._ends_at and any(session.holds_the_last() for session in sessions):
            self.loop.call_later(LAST_TAKEN_POLL_S, self._end_when_taken)
            return
        self._leave(deciding=False)
        self._listening = False
        self.loop.stop()

    def _leave(self, *, deciding: bool) -> None:
        """Everything is let go of; where sessions live, their files stay for the next node. Relays end with this one."""
        for application in self.everywhere():
            for session in application.sessions:
                if session.relayed is not None:
                    application.end(session, "the node ends")
        if self._listening:
            self.control.close()
        self.arbiter.close_all()
        sessions = 0
        for application_id, application in list(self.applications.items()):
            if self._is_used(application_id):
                for one in self._all_of(application_id):
                    sessions += len(one)
                    one.close()
            else:
                self._remove(application)
        self.runtime.leave(sessions=bool(sessions), deciding=deciding)
        if sessions:
            self.log.info("sessions go on without a node", sessions=sessions)

    def _lame_duck(self) -> None:
        self.log.info("lame duck", sessions=self.control.lame_duck())

    def _reread(self) -> None:
        if self.options.reread is None:
            self.log.warn("there is no configuration to reread")
            return
        try:
            config = self.options.reread()
        except ConfigError as error:
            self.log.error("configuration was not reread", error=error)
            return
        for warning in config.warnings:
            self.log.warn(warning)
        for key in ("port", "addr"):
            if getattr(config, key) != getattr(self.config, key):
                self.log.warn("this cannot change while the node runs", key=key, now=getattr(self.config, key),
                              file=getattr(config, key))
        self.config = config._replace(port=self.config.port, addr=self.config.addr)
        self.log.set_level(config.log_level)
        self._share()
        self._authorize()
        self.log.info("configuration reread", config=config.path or "none", max_payload=config.max_payload,
                      log_level=config.log_level)

    def _share_directory(self) -> None:
        """Lets other users through to what they may use, or nobody."""
        self.runtime.share(bool(self.config.users))
        closed = self.runtime.closed_above() if self.config.users else None
        if closed is not None:
            self.log.warn("other users cannot reach this node: a directory above its own is closed to them", directory=closed)

    def _share(self) -> None:
        """After a change of who may use the node. Sessions of users that are not named any more end."""
        try:
            self._share_directory()
            self.control.share(bool(self.config.users))
            for application in self.everywhere():
                application.share(bool(self.config.users))
        except (ControlError, OSError) as error:
            self.log.error("who may use this node cannot be changed", error=error)
        for application in self.everywhere():
            for session in application.sessions:
                uid = session.uid if session.relayed is None else session.relayed.uid
                if uid != os.getuid() and uid not in self.config.users:
                    application.end(session, "its user may not use this node any more")

    def _authorize(self) -> None:
        """After a change of who may attach, as a NATS server does it: who has other credentials now is told so, and goes; who
        is not there any more, or in another account, is only disconnected, and comes back to hear more. A session that this
        nsnd does not know yet, since it was started anew, is asked when it comes back."""
        for application in self.everywhere():
            authentication = self.config.auth.get(application.application_id)
            for session in application.sessions:
                if authentication is None:
                    if application.account is not None:
                        application.end(session, "its application ID has no users any more")
                elif session.user is None:
                    if application.account is None:
                        self.control.revoke(session)
                else:
                    user = authentication.namesake(session.user)
                    if user is None or user.account != application.account:
                        application.end(session, "its user is no more, or in another account")
                    elif user.secret != session.user.secret:
                        self.control.revoke(session)
                    elif session.relayed is None and user.permissions is not None:
                        application.end(session, "its user has permissions now")
                    else:
                        if user.permissions != session.user.permissions:
                            self.control.permit(session, user)
                        session.user = user

    def relay_info(self, application_id: int) -> tuple[str, str]:
        """What a relay says in its first INFO, and as a lame duck."""
        info = self._info(application_id, LOOPBACK, LOOPBACK)
        return json.dumps(info), json.dumps({**info, "ldm": True})

    def _info(self, application_id: int, host: str, client_ip: str) -> dict[str, object]:
        node = self.record.node_id
        required: dict[str, object] = {"auth_required": True} if application_id in self.config.auth else {}
        return {
            "server_id": node.upper(), "server_name": f"nsnd-{node[:8]}", "version": NATS_VERSION, "proto": 1,
            "host": host if host else LOOPBACK, "port": application_id, "headers": True, "max_payload": self.config.max_payload,
            "client_id": self.next_client_id(), "client_ip": client_ip, **required,
            "insane": {
                "version": __version__, "node": node, "domain": node, "uid": os.getuid(), "pid": os.getpid(),
                "socket": str(self.control.path), "protocol": [VERSION_MIN, VERSION_MAX],
            },
        }


def _raise_descriptor_limit() -> int:
    """A node holds a descriptor a session, and those on their way between them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
