"""A session as nsnd sees it: its place, its process, its connection, and what others have for it."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

from nsnd.protocol import LINK, MAGIC, PEER_GONE, SEGMENT, PacketType

if TYPE_CHECKING:
    from nsnd.applications import Application
    from nsnd.connections import Connection
    from nsnd.credentials import User
    from nsnd.fabric import Slot
    from nsnd.processes import Process
    from nsnd.relays import Relayed

UNDELIVERED_MAX = 4096  # descriptors of one producer that wait here; above, it is not read until some are taken
UNDELIVERED_LIMIT = 4 * UNDELIVERED_MAX  # never more, also while its own TAKEN is waited for
OTHERS_UNDELIVERED_MAX = 64  # the same of a session of another user
NOTICES_MAX = 65536  # packets that wait for one session that is not there or does not read


class Handover:
    """A link or a segment on its way to a session, or, without a descriptor, the news that a peer is gone."""

    __slots__ = ("fd", "packet", "producer")

    def __init__(self, packet: bytes, fd: int, producer: Session | None) -> None:
        self.packet = packet
        self.fd = fd
        self.producer = producer


class Descriptors:
    """How many descriptors of sessions nsnd holds, and may hold; who is not read because it has some of too many."""

    __slots__ = ("held", "most", "waiting")

    def __init__(self, most: int) -> None:
        self.held = 0
        self.most = most
        self.waiting: set[Session] = set()

    def refuses(self, session: Session) -> bool:
        """More than `most` come from sessions that are read for their TAKEN. Who has much of that is to end."""
        return self.held >= self.most + self.most // 2 and session.undelivered > self.most // 8

    def released(self) -> None:
        self.held -= 1
        if self.waiting and self.held < self.most:
            waiting, self.waiting = self.waiting, set()
            for session in waiting:
                session.wake()


class Session:
    """Attached while it has a connection. It lives until its GOODBYE or the death of its process.

    `carried_over`: it was there when this nsnd started, which does not know whom it is linked with. `other`: its user is not
    nsnd's. `user`: who it has proved to be, where its application ID has users. `relayed`: the client
    in whose place it is, when it is a relay's.
    """

    __slots__ = ("_descriptors", "_handovers", "_in_flight", "application", "carried_over", "connection", "consumers", "ended",
                 "generation", "identity", "name", "other", "peers", "process", "relayed", "settled", "slot", "uid",
                 "undelivered", "user")

    def __init__(self, application: Application, slot: Slot, process: Process, descriptors: Descriptors, *,
                 carried_over: bool = False) -> None:
        self.application = application
        self.slot = slot.slot
        self.generation = slot.generation
        self.identity = slot.identity
        self.uid = slot.uid
        self.other = slot.other
        self.process = process
        self.settled = slot.acknowledged
        self.carried_over = carried_over
        self.name = ""
        self.connection: Connection | None = None
        self.user: User | None = None
        self.relayed: Relayed | None = None
        self.ended = False
        self.peers: set[Session] = set()
        self.consumers: set[Session] = set()
        self.undelivered = 0
        self._descriptors = descriptors
        self._handovers: deque[Handover] = deque()
        self._in_flight: Handover | None = None

    # --- what others have for it ------------------------------------------------------------------------------------

    def link(self, producer: Session, link_id: int, fd: int) -> None:
        """Takes the descriptor over."""
        self._descriptor(producer, LINK.pack(MAGIC, PacketType.LINK, 1, producer.slot, producer.generation, link_id,
                                             producer.uid, 0), fd)

    def segment(self, producer: Session, number: int, size: int, fd: int) -> None:
        """Takes the descriptor over."""
        packet = SEGMENT.pack(MAGIC, PacketType.SEGMENT, 1, producer.slot, producer.generation, number, 0, size)
        self._descriptor(producer, packet, fd)

    def _descriptor(self, producer: Session, packet: bytes, fd: int) -> None:
        if producer is not self:
            producer.peers.add(self)
            self.peers.add(producer)
        producer.consumers.add(self)
        producer.undelivered += 1
        self._descriptors.held += 1
        self._handovers.append(Handover(packet, fd, producer))
        self.advance()

    def peer_gone(self, slot: int, generation: int) -> bool:
        """Behind everything that the peer handed over. False when it was dropped because too much waits."""
        if len(self._handovers) >= NOTICES_MAX:
            return False
        self._handovers.append(Handover(PEER_GONE.pack(MAGIC, PacketType.PEER_GONE, 1, slot, generation), -1, None))
        self.advance()
        return True

    def advance(self) -> None:
        """Sends what is due: one descriptor at a time, the next when that one was taken."""
        while self._handovers and self.connection is not None:
            if self._handovers[0].fd < 0:
                self.connection.send(self._handovers.popleft().packet)
            elif self._in_flight is None:
                self._in_flight = self._handovers.popleft()
                self.connection.send(self._in_flight.packet, self._in_flight.fd)
                self.wake()
            else:
                break

    def taken(self) -> bool:
        """It has the descriptor that was sent last. False when none was."""
        if self._in_flight is None:
            return False
        delivered, self._in_flight = self._in_flight, None
        self._release(delivered)
        self.advance()
        return True

    def _release(self, handover: Handover) -> None:
        os.close(handover.fd)
        producer = handover.producer
        if producer is not None:
            producer.undelivered -= 1
            producer.wake()
        self._descriptors.released()

    # --- its connection ---------------------------------------------------------------------------------------------

    def attach(self, connection: Connection) -> None:
        """What was sent on an earlier connection and not confirmed is sent again: to take a link twice is harmless."""
        self.connection = connection
        connection.session = self

    def resume(self) -> None:
        """Behind WELCOME: what waits for it."""
        if self._in_flight is not None:
            self._handovers.appendleft(self._in_flight)
            self._in_flight = None
        self.advance()

    def detach(self) -> None:
        if self.connection is not None:
            self.connection.session = None
        self.connection = None

    def wake(self) -> None:
        """What may_read() says may have changed."""
        if self.connection is not None:
            self.connection.update()

    def may_read(self) -> bool:
        """While it has too much under way to others it is not read, but for the TAKEN that others may wait for."""
        if self.other and self.undelivered >= OTHERS_UNDELIVERED_MAX:
            return False
        if self._in_flight is not None:
            return self.undelivered < UNDELIVERED_LIMIT
        if self.undelivered and self._descriptors.held >= self._descriptors.most:  # who has none of them is served on
            self._descriptors.waiting.add(self)
            return False
        return self.undelivered < UNDELIVERED_MAX

    def withdraw(self) -> None:
        """What it has handed over and nobody has taken yet is not for anybody any more."""
        for consumer in self.consumers:
            consumer.forget(self)

    def forget(self, producer: Session) -> None:
        """What waits for it from that producer; what is in flight will be answered."""
        waiting, self._handovers = self._handovers, deque()
        for handover in waiting:
            if handover.producer is producer:
                self._release(handover)
            else:
                self._handovers.append(handover)

    def holds_the_last(self) -> bool:
        """Whether something waits for it whose producer has ended: no node after this one would get that again."""
        waiting = [*self._handovers] if self._in_flight is None else [self._in_flight, *self._handovers]
        return any(one.producer is not None and one.producer.ended for one in waiting)

    def drop_handovers(self) -> None:
        """It is gone, and so is what waited for it."""
        waiting = list(self._handovers)
        if self._in_flight is not None:
            waiting.append(self._in_flight)
        self._in_flight = None
        self._handovers.clear()
        for handover in waiting:
            if handover.fd >= 0:
                self._release(handover)
