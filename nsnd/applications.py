"""One application ID, or one account of it: its sessions, what they want, and what they hand to each other."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from nsnd.connections import Connection
from nsnd.credentials import User
from nsnd.fabric import NOTHING_COMMITTED, Fabric, FabricError, Slot
from nsnd.logs import Log
from nsnd.loop import Loop
from nsnd.processes import Process, Processes
from nsnd.protocol import Hello, ProtocolError, fitting
from nsnd.runtime import Place
from nsnd.sessions import Descriptors, Session

RETRY_S = 1.0
OTHERS_SESSIONS_MAX = 128  # of one user that is not nsnd's
OTHERS_SUBSCRIPTIONS_MAX = 16384  # the same
ABANDONED_AFTER_S = 2.0  # sessions without a connection are looked at after this long, then less and less often
ABANDONED_EVERY_S = 60.0


class Application:
    """`changed` is called when a session came or went. `shared`: users besides nsnd's own may be let in. `account`: None for
    the sessions of an application ID that has no users."""

    def __init__(self, place: Place, loop: Loop, processes: Processes, descriptors: Descriptors, log: Log,
                 changed: Callable[[Application], None], *, shared: bool = False) -> None:
        try:
            place.path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise FabricError(error.errno, f"{place.path} cannot be made: {error.strerror}") from error
        self.place = place
        self.application_id = place.application_id
        self.account = place.account
        self.fabric = Fabric(place.path)
        try:
            self.share(shared)
        except FabricError:
            self.fabric.close()
            raise
        self._loop = loop
        self._processes = processes
        self._descriptors = descriptors
        self._log = log
        self._changed = changed
        self._by_slot: dict[int, Session] = {}
        self._by_identity: dict[tuple[int, int], Session] = {}
        self._closed = False
        self._abandoned_after_s = 0.0  # 0: nobody is to be looked at

    @property
    def sessions(self) -> list[Session]:
        """All that live, attached or not, by slot."""
        return sorted(self._by_slot.values(), key=lambda session: session.slot)

    def __len__(self) -> int:
        return len(self._by_slot)

    def share(self, shared: bool) -> None:
        """Lets other users in, or not. Who is in already stays."""
        try:
            self.fabric.share(shared)
        except OSError as error:
            words = f"{self.fabric.directory}: who may read cannot be changed: {error.strerror}"
            raise FabricError(error.errno, words) from error

    def close(self) -> None:
        """Lets go of the files; the sessions go on without a node."""
        self._closed = True
        for session in self._by_slot.values():
            session.drop_handovers()
        self.fabric.close()

    # --- coming -----------------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Sessions that an earlier node left: those whose process lives are waited for, the others are gone."""
        for slot in self.fabric.living():
            process = self._processes.find(slot.pid, slot.start_time)
            session = Session(self, slot, process or Process(slot.pid, slot.start_time, -1), self._descriptors,
                              carried_over=True)
            session.name = self.fabric.name(slot.slot)
            self._enter(session)
        for session in self.sessions:
            if session.process.pidfd < 0:
                self.end(session, "its process is gone")
            elif not self.fabric.has_place(session.slot):
                self.end(session, "its place is gone")
        if self._by_slot:
            self.look_for_abandoned()

    def look_for_abandoned(self) -> None:
        """A session has no connection, and its process lives: it comes back, or it was closed where it could not say so."""
        if not self._abandoned_after_s:
            self._abandoned_after_s = ABANDONED_AFTER_S
            self._loop.call_later(ABANDONED_AFTER_S, self._end_abandoned)

    def _end_abandoned(self) -> None:
        """Closed without a node, or its process has become another program: its doorbell has gone with it."""
        if self._closed:
            return
        detached = [session for session in self.sessions if session.connection is None]
        for session in detached:
            if not self.fabric.bell_is_bound(session.slot):
                self.end(session, "it was closed without a word")
        if all(session.ended for session in detached):
            self._abandoned_after_s = 0.0
            return
        self._abandoned_after_s = min(2 * self._abandoned_after_s, ABANDONED_EVERY_S)
        self._loop.call_later(self._abandoned_after_s, self._end_abandoned)

    def attach(self, connection: Connection, process: Process, hello: Hello, user: User | None) -> tuple[Session, bool]:
        """The session of this HELLO, and whether it is the one it was before. FabricError when there is no place."""
        session = self._by_identity.get(hello.identity)
        if session is not None and (session.process is not process or session.uid != connection.uid):
            raise ProtocolError(errno.EEXIST, f"this identity belongs to a session of pid {session.process.pid}: "
                                              f"each session needs one of its own")
        if session is not None:
            if session.connection is not None:
                self._replace_connection(session)
            if (hello.slot, hello.generation) != (session.slot, session.generation):
                self.end(session, "it started over")
        reattached = session is not None and not session.ended
        if session is None or session.ended:
            session = self._claim(process, connection.uid, hello)
        self.fabric.speaks(session.slot, hello.version_min, hello.version_max)
        session.name = hello.name
        session.user = user
        session.attach(connection)
        return session, reattached

    def _replace_connection(self, session: Session) -> None:
        old = session.connection
        assert old is not None
        old.drain()
        old.hang_up()

    def _claim(self, process: Process, uid: int, hello: Hello) -> Session:
        if uid == os.getuid():
            slot = self.fabric.claim(hello.identity, process.pid, process.start_time, uid)
        else:
            slot = self._claim_other(process, uid, hello)
        session = Session(self, slot, process, self._descriptors)
        self._enter(session)
        return session

    def _claim_other(self, process: Process, uid: int, hello: Hello) -> Slot:
        """Another user gets no more than its share of what all need."""
        if sum(session.uid == uid for session in self._by_slot.values()) >= OTHERS_SESSIONS_MAX:
            raise ProtocolError(errno.EDQUOT, f"uid {uid} has {OTHERS_SESSIONS_MAX} sessions of this application ID already, "
                                              f"and users other than the node's have no more: end some of them")
        return self.fabric.claim_other(hello.identity, process.pid, process.start_time, uid, hello.segment)

    def _enter(self, session: Session) -> None:
        self._by_slot[session.slot] = session
        self._by_identity[session.identity] = session
        session.process.sessions.add(session)
        self._changed(self)

    # --- going ------------------------------------------------------------------------------------------------------

    def end(self, session: Session, why: str) -> None:
        """Its interest goes first, then its place, then all that were linked with it hear of it."""
        if session.ended:
            return
        session.ended = True
        if session.connection is not None:
            connection = session.connection
            session.detach()
            connection.hang_up()
        del self._by_slot[session.slot]
        del self._by_identity[session.identity]
        session.process.sessions.discard(session)
        if not session.process.sessions:
            self._processes.forget(session.process)
        self._remove(session)
        self._tell_peers(session)
        session.drop_handovers()
        self._log.debug("session ended", application=self.application_id, slot=session.slot, generation=session.generation,
                       pid=session.process.pid, name=session.name, because=why)
        self._changed(self)

    def _remove(self, session: Session) -> None:
        if self._closed:
            return
        try:
            self.fabric.session_gone(session.slot, session.generation)
        except FabricError as error:
            # The place stays taken until its interest is out: nobody else may get it with that.
            self._log.error("interest of a session that ended cannot be removed, trying again", slot=session.slot,
                            error=error.strerror)
            self._loop.call_later(RETRY_S, lambda: self._remove(session))
            return
        if not session.other:
            self.fabric.bell(session.slot).unlink(missing_ok=True)
        self.fabric.free(session.slot)

    def _tell_peers(self, session: Session) -> None:
        peers = session.peers
        if session.carried_over:
            peers = peers | {other for other in self._by_slot.values() if other.carried_over}
        if session.other:
            peers = peers | set(self._by_slot.values())  # all have its place
        for peer in peers:
            peer.peers.discard(session)
            peer.consumers.discard(session)
            if not peer.peer_gone(session.slot, session.generation):
                self._log.warn("a session does not read, and is not told of a peer's end", slot=peer.slot, pid=peer.process.pid)
        session.peers = set()
        session.consumers = set()

    # --- between sessions -------------------------------------------------------------------------------------------

    def known(self, identity: tuple[int, int], process: Process, uid: int) -> Session | None:
        """The living session of this identity, if it is that process's."""
        session = self._by_identity.get(identity)
        return session if session is not None and session.process is process and session.uid == uid else None

    def find(self, slot: int, generation: int) -> Session | None:
        """The living session in this place."""
        session = self._by_slot.get(slot)
        return session if session is not None and session.generation == generation else None

    def serve(self, session: Session, fd: int) -> bool:
        """The short way for changes of interest that lie in a session's socket; True when there were any."""
        if session.other:
            return False  # what it wants is counted
        settled = session.settled
        session.settled = self.fabric.serve(session.slot, session.generation, settled, fd)
        return session.settled != settled

    def _apply(self, session: Session, batch: memoryview, count: int) -> tuple[int, int]:
        """(0, 0), or (negative errno, index of the change that failed). Another user gets its share of the log."""
        if not session.other:
            return self.fabric.apply(session.slot, session.generation, batch, count)
        used = sum(self.fabric.session_subscriptions(one.slot, one.generation) for one in self._by_slot.values()
                   if one.uid == session.uid)
        length, fit = fitting(batch, count, OTHERS_SUBSCRIPTIONS_MAX - used)
        result, failed = self.fabric.apply(session.slot, session.generation, batch[:length], fit)
        return (result, failed) if result or fit == count else (-errno.EDQUOT, fit)

    def interest(self, session: Session, sequence: int, count: int, batch: memoryview) -> tuple[int, int]:
        """Applies a batch and acknowledges it. (0, 0), or (negative errno, index of the change that failed). FabricError when
        the log cannot be written: it is to be sent again."""
        if sequence <= session.settled:
            return 0, 0
        if sequence != session.settled + 1:
            raise ProtocolError(errno.EPROTO, f"interest number {sequence} came after {session.settled}")
        result, failed = self._apply(session, batch, count)
        if result == -errno.EBADMSG:
            raise ProtocolError(errno.EPROTO, f"interest number {sequence} is malformed")
        if failed == NOTHING_COMMITTED:
            raise FabricError(-result, os.strerror(-result))
        session.settled = sequence
        self.fabric.acknowledge(session.slot, sequence)
        return result, failed
