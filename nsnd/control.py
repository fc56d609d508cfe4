"""The control socket: who may speak, in which order, and what each packet does."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nsnd import __version__
from nsnd.connections import Connection, Login, close_elsewhere, is_memory, receive_buffer
from nsnd.credentials import VIOLATION, Answer, User, answer_from
from nsnd.fabric import FabricError
from nsnd.processes import Process
from nsnd.protocol import (
    CREDENTIALS,
    HELLO,
    INTEREST,
    INTEREST_DONE,
    LINK,
    MAGIC,
    OPEN,
    PACKET,
    PING,
    SEGMENT,
    VERSION_MAX,
    VERSION_MIN,
    Hello,
    PacketType,
    ProtocolError,
    Welcome,
    pack_challenge,
    pack_refused,
    pack_status_answer,
    pack_welcome,
    unpack_credentials,
    unpack_hello,
)
from nsnd.runtime import SOCKET_PATH_MAX
from nsnd.sessions import Session
from nsnd.verifier import Verifier

if TYPE_CHECKING:
    from nsnd.relays import Relays
    from nsnd.server import Node

ACCEPT_BURST = 64
ACCEPT_RETRY_S = 0.1
STRANGERS_MAX = 1024  # connections that have said no HELLO, or half of what sessions may hand over; above, the oldest is closed
STRANGE_MAX = 32  # threads that close what cannot be closed, of one user
OTHERS_MAX = 512  # connections of one user that is not nsnd's
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_TRUNCATED = int(socket.MSG_TRUNC)  # as plain numbers: an enum's operators cost more than a packet
_CONTROL_TRUNCATED = int(socket.MSG_CTRUNC)

Handler = Callable[[Connection, memoryview, list[int]], None]


class ControlError(Exception):
    """The control socket cannot be had. The text says why, and the way out."""


class Control:
    """Listens at `path`. Refuses what is not the protocol; everybody else is served on."""

    def __init__(self, node: Node, path: Path) -> None:
        self._node = node
        self._loop = node.loop
        self._log = node.log
        self.path = path
        self._buffer = receive_buffer()
        self._verifier = Verifier(node.loop)
        self._relays: Relays | None = None
        self._strangers: dict[Connection, None] = {}
        self._others: dict[int, int] = {}  # connections of each user that is not nsnd's
        self._attached: set[Connection] = set()
        self._strange: dict[int, int] = {}  # how often each of them handed over a descriptor of another kind
        self._listener = _listen(path)
        self.share(bool(node.config.users))
        self._loop.add(self._listener.fileno(), select.EPOLLIN, self._accept)
        # type -> what deals with it, bytes of the packet, whether it may be longer, descriptors, whether only in a session
        self._handlers: dict[int, tuple[Handler, int, bool, int, bool]] = {
            PacketType.HELLO: (self._hello, HELLO.size, True, 0, False),
            PacketType.CREDENTIALS: (self._credentials, CREDENTIALS.size, True, 0, False),
            PacketType.INTEREST: (self._interest, INTEREST.size, True, 0, True),
            PacketType.LINK: (self._link, LINK.size, False, 1, True),
            PacketType.SEGMENT: (self._segment, SEGMENT.size, False, 1, True),
            PacketType.TAKEN: (self._taken, PACKET.size, False, 0, True),
            PacketType.PING: (self._ping, PING.size, False, 0, False),
            PacketType.GOODBYE: (self._goodbye, PACKET.size, False, 0, False),
            PacketType.STATUS: (self._status, PACKET.size, False, 0, False),
            PacketType.OPEN: (self._open, OPEN.size, False, 0, False),
        }

    def share(self, shared: bool) -> None:
        """Lets other users connect, or not: who may stay is looked at then."""
        try:
            self.path.chmod(0o666 if shared else 0o600)
        except OSError as error:
            raise ControlError(f"control socket {self.path}: its mode cannot be changed: {error.strerror}") from error

    # --- connections ------------------------------------------------------------------------------------------------

    def _accept(self, events: int) -> None:
        for _ in range(ACCEPT_BURST):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    self._pause(error)
                    return
                if error.errno != errno.ECONNABORTED:
                    raise
                continue
            sock.setblocking(False)
            connection = Connection(self._loop, sock, self, self._buffer)
            self._strangers[connection] = None
            if connection.uid != os.getuid():
                self._others[connection.uid] = self._others.get(connection.uid, 0) + 1
            if connection.uid not in (os.getuid(), *self._node.config.users):
                self._refuse_user(connection)
            elif self._strange.get(connection.uid, 0) > STRANGE_MAX:
                self._refuse(connection, errno.EACCES, f"programs of uid {connection.uid} have handed over descriptors that "
                             f"are no memory files: this node (pid {os.getpid()}) does not serve them until it is started anew")
            elif self._others.get(connection.uid, 0) > OTHERS_MAX:
                self._refuse(connection, errno.EDQUOT, f"uid {connection.uid} has {OTHERS_MAX} connections to this node (pid "
                             f"{os.getpid()}) already, and another user than the node's has no more: end some programs")
            elif sock.fileno() >= self._node.descriptors.most * 3 // 2:
                self._refuse_full(connection)
            elif len(self._strangers) > min(STRANGERS_MAX, self._node.descriptors.most // 2):
                self._drop(next(iter(self._strangers)))

    def _pause(self, error: OSError) -> None:
        """Nobody can be let in: the listener stays readable, and must not be looked at all the time."""
        self._log.error("no connection can be accepted, trying again", error=error.strerror)
        self._loop.change(self._listener.fileno(), 0)
        self._loop.call_later(ACCEPT_RETRY_S, self._resume)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.change(self._listener.fileno(), select.EPOLLIN)

    def _refuse_user(self, connection: Connection) -> None:
        own = os.getuid()
        served = ", ".join(map(str, sorted(self._node.config.users)))
        whom = f"uid {own} and those that its nsnd.cfg names ({served})" if served else f"uid {own} alone"
        self._refuse(connection, errno.EACCES, f"this node (pid {os.getpid()}) serves {whom}, and you are uid "
                     f"{connection.uid}: run the program as uid {own}, or have the node's nsnd.cfg name you ([access] users = "
                     f"[{connection.uid}]), or run a node of your own on another port")

    def _refuse_full(self, connection: Connection) -> None:
        """While the last quarter of the descriptors is left to those who are there: without any, nsnd could serve nobody."""
        self._refuse(connection, errno.EMFILE, f"this node (pid {os.getpid()}) is near its limit of open files, and takes no "
                     f"more sessions: end some programs, or start it anew with a higher limit (ulimit -Hn)")

    def _drop(self, connection: Connection) -> None:
        if connection.uid in self._others and not connection.closed:
            self._others[connection.uid] -= 1
            if not self._others[connection.uid]:
                del self._others[connection.uid]
        self._strangers.pop(connection, None)
        self._attached.discard(connection)
        connection.close()

    def _refuse(self, connection: Connection, number: int, text: str) -> None:
        """Says why, and ends the connection. A session that breaks the protocol ends with it."""
        self._log.warn("refused", pid=connection.pid, uid=connection.uid, errno=errno.errorcode.get(number, number), text=text)
        session = connection.session
        connection.send(pack_refused(connection.version, number, text))
        self._drop(connection)
        if session is not None:
            self._node.end_session(session, "it was refused: " + text)

    def disconnected(self, connection: Connection) -> None:
        """A session whose connection ends without GOODBYE stays until its process is gone: it may come back. Idempotent."""
        session = connection.session
        if session is not None:
            session.detach()
            session.application.look_for_abandoned()
            self._log.debug("session detached", application=session.application.application_id, slot=session.slot,
                            pid=session.process.pid)
        self._drop(connection)

    def failed(self, connection: Connection, error: Exception) -> None:
        """A fault of ours, or of the kernel's: the session may come back."""
        self._log.exception("connection given up", pid=connection.pid, error=repr(error))
        self.disconnected(connection)

    def may_read(self, connection: Connection) -> bool:
        return connection.session is None or connection.session.may_read()

    def lame_duck(self) -> int:
        """Tells all sessions; returns how many there were."""
        attached = list(self._attached)
        for connection in attached:
            connection.send(PACKET.pack(MAGIC, PacketType.LAME_DUCK, connection.version))
        return len(attached)

    def close(self) -> None:
        """Sessions see the end of their connection, and go on without a node."""
        for connection in [*self._strangers, *self._attached]:
            if connection.session is not None:
                connection.session.detach()
            self._drop(connection)
        self._loop.remove(self._listener.fileno(), self._listener)
        self.path.unlink(missing_ok=True)

    # --- packets ----------------------------------------------------------------------------------------------------

    def received(self, connection: Connection, packet: memoryview, fds: list[int], flags: int) -> None:
        """Checks the packet as a whole. Handlers take descriptors out of `fds`; what is left there is closed."""
        try:
            if fds and connection.uid != os.getuid():
                self._check_descriptors(connection, fds)
            handler = self._check(connection, packet, fds, flags)
            if handler is not None:
                handler(connection, packet, fds)
        except ProtocolError as error:
            self._refuse(connection, error.errno, str(error))
        finally:
            for fd in fds:
                os.close(fd)

    def _check_descriptors(self, connection: Connection, fds: list[int]) -> None:
        """Another user could stop the node, or a session, by a descriptor that cannot be closed."""
        strange = [fd for fd in fds if not is_memory(fd)]
        if strange:
            fds[:] = [fd for fd in fds if fd not in strange]
            close_elsewhere(strange)
            self._strange[connection.uid] = self._strange.get(connection.uid, 0) + 1
            raise ProtocolError(errno.EPROTO, "a descriptor came that is no memory file")

    def _check(self, connection: Connection, packet: memoryview, fds: list[int], flags: int) -> Handler | None:
        if flags & _TRUNCATED:
            raise ProtocolError(errno.EPROTO, f"a packet was longer than {len(packet)} bytes")
        if len(packet) < PACKET.size:
            raise ProtocolError(errno.EPROTO, f"a packet of {len(packet)} bytes is too short")
        magic, kind, _ = PACKET.unpack_from(packet)
        if magic != MAGIC:
            raise ProtocolError(errno.EPROTO, f"a packet began with {magic:#010x}: this is not the control protocol of nsnd")
        known = self._handlers.get(kind)
        if known is None:
            raise ProtocolError(errno.EPROTO, f"packet type {kind} is unknown or is not for nsnd to receive")
        handler, size, longer, descriptors, in_session = known
        if in_session and connection.session is None:
            raise ProtocolError(errno.EPROTO, f"{PacketType(kind).name} came before HELLO")
        if len(packet) != size and not (longer and len(packet) > size):
            raise ProtocolError(errno.EPROTO, f"{PacketType(kind).name} has {len(packet)} bytes, not {size}")
        if flags & _CONTROL_TRUNCATED and len(fds) < descriptors:
            # The kernel could not give us its descriptor. It hands over again what was not taken, once it is back.
            self._log.error("a descriptor was lost: the limit of open files is reached", pid=connection.pid)
            self.disconnected(connection)
            return None
        if len(fds) != descriptors:
            raise ProtocolError(errno.EPROTO, f"{PacketType(kind).name} came with {len(fds)} descriptors, not {descriptors}")
        return handler

    def _hello(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        if connection.session is not None or connection.login is not None:
            raise ProtocolError(errno.EPROTO, "HELLO came twice on one connection")
        hello = unpack_hello(packet)
        if hello.version_min > VERSION_MAX or hello.version_max < VERSION_MIN:
            raise ProtocolError(errno.EPROTONOSUPPORT,
                                f"nsnd {__version__} speaks versions {VERSION_MIN} to {VERSION_MAX} of the control protocol, "
                                f"this session {hello.version_min} to {hello.version_max}: {_way_out(hello.version_min)}")
        connection.version = min(hello.version_max, VERSION_MAX)
        relayed = self._relays.claim(hello.name) if self._relays is not None and connection.pid == os.getpid() else None
        if relayed is not None:
            known = self._node.config.auth.get(hello.application_id)
            if known is None or known.namesake(relayed.user) != relayed.user:  # the configuration was reread meanwhile
                raise ProtocolError(errno.EKEYREJECTED, VIOLATION)
            session = self._let_in(connection, hello._replace(name=relayed.name), relayed.user)
            if session is not None:
                session.relayed = relayed
            return
        authentication = self._node.config.auth.get(hello.application_id)
        if authentication is None:
            self._let_in(connection, hello, None)
            return
        if not hello.answers:
            raise ProtocolError(errno.EACCES, f"application ID {hello.application_id} asks for credentials, and this program "
                                f"gives none: give them (insane.Session(…, user=, password=), user and password under [app] of "
                                f"nsn-app.cfg, or nats.connect() of insane_nats {__version__}), or use an application ID that "
                                f"is in no [auth.*] of nsnd.cfg")
        connection.login = Login(hello, authentication.nonce())
        connection.send(pack_challenge(connection.version, connection.login.nonce))

    def _credentials(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        login = connection.login
        if login is None or login.answered:
            raise ProtocolError(errno.EPROTO, "CREDENTIALS came, and nobody had asked for them")
        login.answered = True
        try:
            answer = answer_from(unpack_credentials(packet))
        except ValueError as error:
            raise ProtocolError(errno.EPROTO, f"CREDENTIALS cannot be read: {error}") from None
        self._verify(connection, login, answer)

    def _verify(self, connection: Connection, login: Login, answer: Answer) -> None:
        """By what nsnd.cfg says when it is done: that may be reread meanwhile."""
        application_id = login.hello.application_id
        authentication = self._node.config.auth.get(application_id)
        if authentication is None:
            self._logged_in(connection, login, None)
            return

        def done(user: User | None) -> None:
            if connection.closed:
                return
            if self._node.config.auth.get(application_id) is not authentication:
                self._verify(connection, login, answer)
            elif user is None:
                self._turn_away(connection, login)
            else:
                self._logged_in(connection, login, user)

        if authentication.slow:
            self._verifier.check(connection.uid, lambda: authentication.find(answer, login.nonce), done)
        else:
            done(authentication.find(answer, login.nonce))

    def _turn_away(self, connection: Connection, login: Login) -> None:
        """Who comes back and is not let in again has ended: nobody is to hear it, or be heard by it, any more."""
        session = self._before(connection, login)
        if session is not None:
            self._node.end_session(session, "its credentials are not known any more")
        self._refuse(connection, errno.EKEYREJECTED, VIOLATION)

    def _before(self, connection: Connection, login: Login) -> Session | None:
        process = self._process(connection)
        return None if process is None else self._node.find_session(login.hello, process, connection.uid)

    def _logged_in(self, connection: Connection, login: Login, user: User | None) -> None:
        """Not always within a packet's handling, so what is wrong is said here."""
        try:
            if user is not None and (user.permissions is not None or login.hello.relay):
                self._relay(connection, login, user)
            else:
                self._let_in(connection, login.hello, user)
        except ProtocolError as error:
            self._refuse(connection, error.errno, str(error))

    def _relay(self, connection: Connection, login: Login, user: User) -> None:
        """Its user may not do everything, or might not before: it gets no part in the fabric, but a relay's other end."""
        hello = login.hello
        if hello.generation:
            session = self._before(connection, login)
            if session is not None:
                self._node.end_session(session, "its user has permissions now")
            raise ProtocolError(errno.EACCES, "its user has permissions now, and had none when it connected: connect anew")
        if self._relays is None:
            from nsnd.relays import Relays  # most nodes need none

            self._relays = Relays(str(self.path))
        from nsnd.relays import Relayed

        relayed = Relayed(user, hello.name, connection.pid, connection.uid)
        info, lame_duck = self._node.relay_info(hello.application_id)
        with self._relays.start(relayed, hello.application_id, self._node.config.max_payload, info, lame_duck) as end:
            connection.send(PACKET.pack(MAGIC, PacketType.RELAYED, connection.version), end.fileno())
        self._log.debug("client relayed", application=hello.application_id, pid=connection.pid, name=hello.name)

    def permit(self, session: Session, user: User) -> None:
        """A relay's session goes on with what its user may do by now. Whatever it is told, it wakes."""
        if session.relayed is not None and self._relays is not None and session.connection is not None:
            self._relays.permit(session.relayed, user.permissions)
            session.connection.send(PING.pack(MAGIC, PacketType.PONG, session.connection.version, 0))

    def revoke(self, session: Session) -> None:
        """Its user is not known any more."""
        if session.connection is not None:
            self._refuse(session.connection, errno.EKEYREJECTED, VIOLATION)
        else:
            self._node.end_session(session, "its credentials are not known any more")

    def _let_in(self, connection: Connection, hello: Hello, user: User | None) -> Session | None:
        """None when its process has gone."""
        connection.login = None
        process = self._process(connection)
        if process is None:
            self._drop(connection)
            return None
        try:
            application = self._node.application_of(hello.application_id, user)
            self._node.leave_others(hello, process, connection.uid, application)
            session, reattached = application.attach(connection, process, hello, user)
        except FabricError as error:
            raise ProtocolError(error.errno or errno.EIO, f"application ID {hello.application_id}: {error.strerror}") from error
        self._strangers.pop(connection, None)
        self._attached.add(connection)
        connection.send(pack_welcome(connection.version, Welcome(
            session.slot, session.generation, self._node.next_client_id(), self._node.config.max_payload, session.settled,
            reattached, application.fabric.directory, __version__)))
        session.resume()
        self._log.debug("session reattached" if reattached else "session attached", application=hello.application_id,
                       slot=session.slot, generation=session.generation, pid=connection.pid, name=hello.name)
        return session

    def _process(self, connection: Connection) -> Process | None:
        if connection.pid <= 0:
            raise ProtocolError(errno.EACCES, "the process of this session cannot be seen from the node's PID namespace: "
                                              "run both in one, or a node of its own in the container")
        return self._node.processes.peer(connection.sock, connection.pid)

    def _interest(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        session = _session(connection)
        _, _, _, sequence, count, length = INTEREST.unpack_from(packet)
        if length != len(packet) - INTEREST.size:
            raise ProtocolError(errno.EPROTO, f"INTEREST says {length} bytes, and {len(packet) - INTEREST.size} came")
        try:
            error, failed = session.application.interest(session, sequence, count, packet[INTEREST.size :])
        except FabricError as fault:
            self._log.error("the log of interest cannot be written, and a session has to come back: make room in its directory",
                            directory=session.application.fabric.directory, slot=session.slot, error=fault.strerror)
            self.disconnected(connection)
            return
        if not error:
            connection.interest_done(session.settled)
            return
        connection.send(INTEREST_DONE.pack(MAGIC, PacketType.INTEREST_DONE, connection.version, sequence, error, failed))
        self._log.warn("interest was not applied", slot=session.slot, pid=connection.pid, error=os.strerror(-error))

    def serve(self, connection: Connection) -> None:
        session = _session(connection)
        if session.application.serve(session, connection.sock.fileno()):
            connection.interest_done(session.settled)

    def _link(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        _, _, _, slot, generation, link_id, _, _ = LINK.unpack(packet)
        session = self._producer(connection)
        consumer = self._consumer(session, slot, generation)
        if consumer is not None:
            consumer.link(session, link_id, fds.pop())

    def _segment(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        _, _, _, slot, generation, number, _, size = SEGMENT.unpack(packet)
        session = self._producer(connection)
        consumer = self._consumer(session, slot, generation)
        if consumer is not None and consumer.uid != session.uid:
            raise ProtocolError(errno.EPERM, f"a session of uid {session.uid} hands memory over to one of uid {consumer.uid}")
        if consumer is not None:
            consumer.segment(session, number, size, fds.pop())

    def _producer(self, connection: Connection) -> Session:
        """The session that hands something over; refused when nsnd holds too many descriptors already, and many of its."""
        session = _session(connection)
        if self._node.descriptors.refuses(session):
            text = (f"{session.undelivered} descriptors of this session wait to be taken, and the node is at its limit of open "
                    f"files: sessions must take what they are handed (TAKEN), or the node needs a higher limit (ulimit -Hn)")
            session.withdraw()
            raise ProtocolError(errno.EMFILE, text)
        return session

    def _consumer(self, session: Session, slot: int, generation: int) -> Session | None:
        consumer = session.application.find(slot, generation)
        if consumer is None:
            session.peer_gone(slot, generation)
        return consumer

    def _taken(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        if not _session(connection).taken():
            raise ProtocolError(errno.EPROTO, "TAKEN came, and no descriptor had been sent")

    def _ping(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        token = PING.unpack(packet)[3]
        connection.send(PING.pack(MAGIC, PacketType.PONG, connection.version, token))

    def _goodbye(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        session = connection.session
        if connection.login is not None:  # to leave needs no credentials
            session = self._before(connection, connection.login)
        elif session is None:
            raise ProtocolError(errno.EPROTO, "GOODBYE came before HELLO")
        self._drop(connection)
        if session is not None:
            if session.connection is connection:
                session.detach()
            self._node.end_session(session, "it said goodbye")

    def _status(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        from nsnd.status import document  # not on the way to a quick start

        for part in pack_status_answer(connection.version, document(self._node)):
            connection.send(part)

    def _open(self, connection: Connection, packet: memoryview, fds: list[int]) -> None:
        application_id = OPEN.unpack(packet)[3]
        try:
            self._node.open_application(application_id)
        except FabricError as error:
            raise ProtocolError(error.errno or errno.EIO, f"application ID {application_id}: {error.strerror}") from error
        connection.send(OPEN.pack(MAGIC, PacketType.OPENED, connection.version, application_id, 0))


def _way_out(version_min: int) -> str:
    if version_min > VERSION_MAX:
        return f"nsnd is older; end it (kill {os.getpid()}) and start that of the program's insane_nats"
    return "the program is older; upgrade its insane_nats and start it again"


def _session(connection: Connection) -> Session:
    assert connection.session is not None  # _check has looked
    return connection.session


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise ControlError(f"control socket {path}: a socket's path has at most {SOCKET_PATH_MAX} bytes; name a shorter one "
                           f"with --socket, or a shorter --runtime-dir")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise ControlError(f"control socket {path}: {error.strerror}; name another with --socket") from error
    finally:
        os.umask(before)
    return listener


def _remove_stale(path: Path) -> None:
    """The socket that an ended node left; never anything else, and not one that somebody listens on."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ControlError(f"control socket {path}: something else is there; name another with --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise ControlError(f"control socket {path}: {error.strerror or error}; name another with --socket") from error
    raise ControlError(f"control socket {path}: another process listens there; end it, or name another with --socket")
