"""A node: its control socket, its ports, its applications, from the start to the end."""

from __future__ import annotations

import errno
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
from nsnd.fabric import FabricError
from nsnd.logs import Log
from nsnd.loop import Loop, Timer
from nsnd.processes import Process, Processes
from nsnd.protocol import VERSION_MAX, VERSION_MIN, ProtocolError
from nsnd.runtime import BY_AUTOSTART, RuntimeDirectory
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
        for application_id in self.runtime.applications():
            try:
                application = self._add(application_id)
            except FabricError as error:
                self.log.error("files of an application ID cannot be taken over", application=application_id,
                               directory=self.runtime.application(application_id), error=error.strerror)
                continue
            application.take_over()
            if not application:
                self._remove(application)
                continue
            self.log.info("sessions taken over", application=application_id, sessions=len(application))
            if application_id != self.config.port:
                try:
                    self.arbiter.open(application_id, self.config.addr)
                except OSError as error:
                    self.log.warn("port of sessions that live cannot be bound", port=application_id, error=error.strerror)

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
                application = self._add(application_id)
            except FabricError:
                self.arbiter.close(application_id)
                raise
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

    def _add(self, application_id: int) -> Application:
        application = Application(application_id, self.runtime.application(application_id), self.loop, self.processes,
                                  self.descriptors, self.log, self._sessions_changed, shared=bool(self.config.users))
        self.applications[application_id] = application
        return application

    def _remove(self, application: Application) -> None:
        del self.applications[application.application_id]
        timer = self._idle.pop(application.application_id, None)
        if timer is not None:
            timer.cancel()
        self.arbiter.close(application.application_id)
        application.close()
        try:
            self.runtime.remove_application(application.application_id)
        except OSError as error:
            self.log.warn("files of an application ID were not removed", application=application.application_id, error=error)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def next_client_id(self) -> int:
        """NATS's client_id: never twice, also not over the restarts that keep the node's identity."""
        self._clients += 1
        return (self.record.starts << 32) + self._clients

    def end_session(self, session: Session, why: str) -> None:
        application = self.applications.get(session.application_id)
        if application is not None:
            application.end(session, why)

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
        if application is not None and not application and not self._stays(application_id):
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
        sessions = (session for application in self.applications.values() for session in application.sessions)
        if monotonic() < self._ends_at and any(session.holds_the_last() for session in sessions):
            self.loop.call_later(LAST_TAKEN_POLL_S, self._end_when_taken)
            return
        self._leave(deciding=False)
        self._listening = False
        self.loop.stop()

    def _leave(self, *, deciding: bool) -> None:
        """Everything is let go of; where sessions live, their files stay for the next node."""
        if self._listening:
            self.control.close()
        self.arbiter.close_all()
        sessions = 0
        for application in list(self.applications.values()):
            if application:
                sessions += len(application)
                application.close()
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
            for application in self.applications.values():
                application.share(bool(self.config.users))
        except (ControlError, OSError) as error:
            self.log.error("who may use this node cannot be changed", error=error)
        for application in self.applications.values():
            for session in application.sessions:
                if session.other and session.uid not in self.config.users:
                    application.end(session, "its user may not use this node any more")

    def _info(self, application_id: int, host: str, client_ip: str) -> dict[str, object]:
        node = self.record.node_id
        return {
            "server_id": node.upper(), "server_name": f"nsnd-{node[:8]}", "version": NATS_VERSION, "proto": 1,
            "host": host if host else LOOPBACK, "port": application_id, "headers": True, "max_payload": self.config.max_payload,
            "client_id": self.next_client_id(), "client_ip": client_ip,
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
