"""Lies on nsnd's control socket: garbage, truncated and misordered packets, descriptors by the dozen, floods. Each is answered
with an error or the end of the connection, another session is served all the while, and nsnd keeps no descriptor of it.

A failing seed is printed; NSN_SEED=number runs that one alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator

import pytest

from nsnd import protocol as p
from nsnd.connections import OUT_MAX
from nsnd.control import STRANGERS_MAX
from tests.nsnd_client import PATIENCE_S, Packet, RawNode, RawSession, add, child, remove, runtime_directory, until

SEEDS = 400
SEEDS_S = 5.0
DESCRIPTORS = 256  # that nsnd may have in the tests of floods


class Witness:
    """A session that does everything right, in a thread of its own, and is served at every moment."""

    def __init__(self, node: RawNode) -> None:
        self.session = node.session("witness")
        self.rounds = 0
        self.longest_s = 0.0
        self.error: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.wait(0.002):
                began = time.monotonic()
                self.session.send(p.PacketType.PING, self.rounds.to_bytes(8, "little"))
                assert p.PING.unpack(self.session.expect(p.PacketType.PONG).raw)[3] == self.rounds
                self.session.subscribe(self.rounds + 1, f"witness.{self.rounds % 7}.*")
                number = self.session.interest(remove(self.rounds + 1))
                assert self.session.interest_done() == (number, 0, 0)
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                self.rounds += 1
        except BaseException as error:
            self.error = error

    def still_served(self) -> None:
        """From now on: some more rounds."""
        wanted = self.rounds + 3
        until(lambda: self.rounds >= wanted or self.error, "the witness is served")
        assert self.error is None, repr(self.error)

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        assert self.error is None, repr(self.error)
        self.session.goodbye()


class FewDescriptors(RawNode):
    """nsnd with a low limit of open files, hard as well as soft."""

    def command(self, *arguments: str) -> list[str]:
        return ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", *super().command(*arguments)]


def descriptors(node: RawNode) -> int:
    assert node.process is not None
    return len(os.listdir(f"/proc/{node.process.pid}/fd"))


@contextlib.contextmanager
def unharmed(kind: type[RawNode] = RawNode) -> Iterator[RawNode]:
    """A node that serves a witness all the while; afterwards it has the descriptors that it had before."""
    with runtime_directory() as directory:
        running = kind(directory).start("--log-level", "error")
        try:
            witness = Witness(running)
            witness.still_served()
            before = descriptors(running)
            yield running
            witness.still_served()
            until(lambda: descriptors(running) <= before, f"nsnd has {before} descriptors again, not {descriptors(running)}")
            newcomer = running.session("newcomer")
            newcomer.subscribe(1, "still.alive")
            newcomer.goodbye()
            witness.end()
            assert running.process is not None
            assert running.process.poll() is None
            assert "Traceback" not in running.log(), running.log()
        finally:
            if running.process is not None and running.process.poll() is None:
                running.kill()


@pytest.fixture(scope="module")
def shared() -> Iterator[RawNode]:
    """For what leaves nothing behind."""
    with unharmed() as running:
        yield running


def stranger(node: RawNode) -> RawSession:
    session = RawSession(node.socket, node.port, "liar")
    session.connect()
    return session


def send_with(session: RawSession, packet: bytes, fds: list[int]) -> bool:
    """Whether it could be sent; not when nsnd has hung up or does not read."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    session.sock.setblocking(False)
    try:
        session.sock.sendmsg([packet], rights)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOTCONN):
            raise
        return False
    finally:
        session.sock.settimeout(PATIENCE_S)
    return True


def ended(session: RawSession) -> list[Packet]:
    """What comes until nsnd ends the connection."""
    packets = []
    while (packet := session.receive()) is not None:
        for fd in packet.fds:
            os.close(fd)
        packets.append(packet)
    return packets


def hello(node: RawNode, identity: int = 1) -> bytes:
    return p.pack_hello(p.Hello(1, node.port, 1, (identity, 2), p.NO_SLOT, 0, 0, "liar"))


def interest(sequence: int, count: int, body: bytes, length: int | None = None) -> bytes:
    return p.INTEREST.pack(p.MAGIC, p.PacketType.INTEREST, 1, sequence, count, len(body) if length is None else length) + body


def packets(node: RawNode) -> list[bytes]:
    """One good packet of each kind."""
    front = (p.MAGIC,)
    return [
        hello(node),
        interest(1, 1, add(1, "a.b")),
        p.LINK.pack(*front, p.PacketType.LINK, 1, 0, 1, 1, 0, 0),
        p.SEGMENT.pack(*front, p.PacketType.SEGMENT, 1, 0, 1, 256, 0, 1 << 20),
        p.PACKET.pack(*front, p.PacketType.TAKEN, 1),
        p.PING.pack(*front, p.PacketType.PING, 1, 7),
        p.PACKET.pack(*front, p.PacketType.GOODBYE, 1),
        p.PACKET.pack(*front, p.PacketType.STATUS, 1),
        p.OPEN.pack(*front, p.PacketType.OPEN, 1, node.port, 0),
    ]


# --- packets ---------------------------------------------------------------------------------------------------------


def test_every_truncated_packet_ends_the_connection(shared: RawNode) -> None:
    for whole in packets(shared):
        for length in range(len(whole)):
            session = stranger(shared)
            session.sock.send(whole[:length])
            last = ended(session)
            assert [packet.kind for packet in last] == ([p.PacketType.REFUSED] if length else []), (whole[:8], length)


def test_every_packet_that_is_too_long_ends_the_connection(shared: RawNode) -> None:
    for whole in packets(shared)[2:]:
        session = stranger(shared)
        session.sock.send(whole + b"\0")
        assert session.refused().errno == errno.EPROTO


def test_packets_in_any_wrong_order(shared: RawNode) -> None:
    """Each pair of packets on one connection; the first may be refused already."""
    every = packets(shared)
    for first in every:
        for second in every:
            session = stranger(shared)
            send_with(session, first, [])
            send_with(session, second, [])
            session.sock.shutdown(socket.SHUT_WR)
            ended(session)
    forget_liars(shared, [1])


@pytest.mark.parametrize("version", [0, 2, 7, 0xFFFF])
def test_versions_in_packets_and_in_hello(shared: RawNode, version: int) -> None:
    session = stranger(shared)
    session.sock.send(p.pack_hello(p.Hello(version, shared.port, version, (5, version), p.NO_SLOT, 0, 0, "")))
    assert session.refused().errno == errno.EPROTONOSUPPORT
    for kind in range(40):
        session = stranger(shared)
        send_with(session, p.PACKET.pack(p.MAGIC, kind, version) + bytes(8), [])
        session.sock.shutdown(socket.SHUT_WR)
        ended(session)


@pytest.mark.parametrize("packet", [
    interest(1, 0xFFFFFFFF, b""),
    interest(1, 0xFFFFFFFF, add(1, "a")),
    interest(1, 1, add(1, "a"), 0xFFFFFFFF),
    interest(1, 1, add(1, "a"), 0),
    interest(0xFFFFFFFFFFFFFFFF, 1, add(1, "a")),
    interest(1, 1000, bytes(16 * 1000)),
    interest(1, 1, p.INTEREST_CHANGE.pack(1, 0, 0xFFFF, 0xFFFF, 0, 1, 0)),
    interest(1, 1, p.INTEREST_CHANGE.pack(1, 0, 4097, 4095, 0, 1, 0) + b"a" * 8192),
    interest(1, 1, p.INTEREST_CHANGE.pack(2, 0, 8, 0, 0, 1, 0) + bytes(8)),
    interest(1, 1, b""),
    struct.pack("<IHH", p.MAGIC, p.PacketType.PING, 1) * 4000,
])
def test_huge_numbers_in_a_session(shared: RawNode, packet: bytes) -> None:
    session = shared.session("liar")
    session.sock.send(packet)
    answer = session.receive()
    assert answer is not None
    if answer.kind == p.PacketType.REFUSED:
        assert ended(session) == []
    else:
        assert answer.kind == p.PacketType.INTEREST_DONE
        assert p.INTEREST_DONE.unpack(answer.raw)[4] < 0
        session.goodbye()


def test_sequence_zero_is_old_news_and_changes_nothing(shared: RawNode) -> None:
    session = shared.session("liar")
    session.sock.send(interest(0, 1, add(1, "a")))
    session.subscribe(1, "b")
    assert shared.application()["subscriptions"] <= 2  # this one, and the witness's
    session.leave()


# --- at random -------------------------------------------------------------------------------------------------------


def a_descriptor(choose: random.Random) -> int:
    kind = choose.randrange(5)
    if kind == 0:
        return os.memfd_create("lie")
    if kind == 1:
        return os.open("/dev/null", os.O_RDWR)
    if kind == 2:
        return os.open("/", os.O_PATH)
    if kind == 3:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()
    return os.eventfd(0)


def mutated(choose: random.Random, whole: bytes) -> bytes:
    raw = bytearray(whole)
    for _ in range(choose.choice((0, 0, 1, 1, 2, 8))):
        if not raw:
            break
        at = choose.randrange(len(raw))
        how = choose.randrange(5)
        if how == 0:
            raw[at] = choose.randrange(256)
        elif how == 1:
            raw[at : at + 4] = choose.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 4096)).to_bytes(4, "little")
        elif how == 2:
            del raw[at:]
        elif how == 3:
            raw += choose.randbytes(choose.randrange(64))
        else:
            raw[at:at] = choose.randbytes(1)
    return bytes(raw)


def lie(node: RawNode, others: list[RawSession], seed: int) -> None:
    """A connection, or a session, that says things at random for a while."""
    choose = random.Random(seed)
    session = stranger(node)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if choose.randrange(3):
            session.sock.send(hello(node, seed))
        every = packets(node)
        for _ in range(choose.randrange(1, 30)):
            peer = choose.choice(others)
            every[2] = p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, peer.slot, peer.generation, choose.randrange(4), 0, 0)
            every[3] = p.SEGMENT.pack(p.MAGIC, p.PacketType.SEGMENT, 1, peer.slot, peer.generation, choose.randrange(9), 0, 99)
            every[1] = interest(choose.randrange(4), 2, add(choose.randrange(4), "a.*") + remove(choose.randrange(4)))
            packet = choose.choice(every[1:] if choose.randrange(4) else every)
            right = int(packet in every[2:4])
            fds = [a_descriptor(choose) for _ in range(right if choose.randrange(4) else choose.randrange(6))]
            sent = send_with(session, packet if choose.randrange(3) else mutated(choose, packet), fds)
            for fd in fds:
                os.close(fd)
            if not sent:
                break
            if choose.randrange(8) == 0:
                with contextlib.suppress(TimeoutError):
                    session.receive(0.001)
        if choose.randrange(2):
            session.sock.shutdown(socket.SHUT_WR)
            ended(session)
    with contextlib.suppress(OSError):
        session.send(p.PacketType.GOODBYE)
    session.sock.close()


def take_all(session: RawSession) -> None:
    """Takes the links and segments that the liars hand over."""
    with contextlib.suppress(TimeoutError, BlockingIOError):
        while True:
            packet = session.receive(0.0001)
            assert packet is not None
            for fd in packet.fds:
                os.close(fd)
                session.send(p.PacketType.TAKEN)


def test_anything_at_random() -> None:
    asked = os.environ.get("NSN_SEED")
    deadline = time.monotonic() + SEEDS_S
    with unharmed() as node:
        others = [node.session("one"), node.session("two")]
        seeds = [int(asked)] if asked else range(1, SEEDS + 1)
        for seed in seeds:
            try:
                lie(node, others, seed)
                for other in others:
                    take_all(other)
                assert node.process is not None
                assert node.process.poll() is None, node.log()
            except BaseException:
                print(f"NSN_SEED={seed}")
                raise
            if time.monotonic() > deadline:
                break
        for other in others:
            take_all(other)
            other.leave()
        forget_liars(node, [one for one in seeds if one <= seed])


def forget_liars(node: RawNode, seeds: list[int]) -> None:
    """Their sessions are this process's, which goes on: each says goodbye under its name."""
    for seed in seeds:
        session = stranger(node)
        session.sock.send(hello(node, seed))
        session.expect(p.PacketType.WELCOME)
        session.goodbye()


# --- descriptors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4, 5, 64, 253])
def test_more_descriptors_in_a_packet_than_belong_there(count: int) -> None:
    with unharmed() as node:
        consumer = node.session("consumer")
        for kind in (p.PacketType.LINK, p.PacketType.SEGMENT, p.PacketType.PING, p.PacketType.TAKEN):
            liar = node.session("liar")
            read_end, write_end = os.pipe()
            body = {p.PacketType.LINK: p.LINK.pack(p.MAGIC, kind, 1, consumer.slot, consumer.generation, 1, 0, 0),
                    p.PacketType.SEGMENT: p.SEGMENT.pack(p.MAGIC, kind, 1, consumer.slot, consumer.generation, 1, 0, 4096),
                    p.PacketType.PING: p.PING.pack(p.MAGIC, kind, 1, 1),
                    p.PacketType.TAKEN: p.PACKET.pack(p.MAGIC, kind, 1)}[kind]
            assert send_with(liar, body, [write_end] * count)
            os.close(write_end)
            assert ended(liar)[-1].kind == p.PacketType.REFUSED
            assert os.read(read_end, 1) == b""  # all copies are closed
            os.close(read_end)
        consumer.leave()


def test_its_own_connection_as_a_link() -> None:
    """Descriptors that hold each other up in sockets' queues."""
    with unharmed() as node:
        for _ in range(20):
            one, two = node.session("one"), node.session("two")
            for number in range(4):
                one.link(two, number, one.sock.fileno())
                two.link(one, number, two.sock.fileno())
            one.sock.close()
            two.sock.close()
            forget(node, one)
            forget(node, two)


def forget(node: RawNode, session: RawSession) -> None:
    session.attach()
    session.leave()


def flood_links(producer: RawSession, consumer: RawSession, most: int) -> int:
    """Until nsnd does not read it any more, or ends it; returns how many were sent."""
    body = p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, consumer.slot, consumer.generation, 1, 0, 0)
    fd = os.open("/dev/null", os.O_RDWR)
    sent = refused = 0
    while sent < most and refused < 20:
        if send_with(producer, body, [fd]):
            sent += 1
            refused = 0
        else:
            refused += 1
            time.sleep(0.005)
    os.close(fd)
    return sent


@pytest.mark.parametrize("to_itself", [False, True])
def test_a_flood_of_descriptors_that_nobody_takes(to_itself: bool) -> None:
    """nsnd has few descriptors, and several sessions that would have it hold thousands for each other."""
    with unharmed(FewDescriptors) as node:
        liars = [node.session("liar") for _ in range(4)]
        deaf = liars[0] if to_itself else node.session("deaf")
        for liar in liars:
            flood_links(liar, liar if to_itself else deaf, 1000)
            newcomer = node.session("newcomer")  # is let in, served, and has its links brought over
            other = node.session("other")
            newcomer.link(other, 5)
            assert other.take_link() == (newcomer.slot, newcomer.generation, 5)
            newcomer.leave()
            other.leave()
        for liar in [*liars, deaf]:
            liar.sock.close()
            forget(node, liar)


# --- floods ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    """This process may open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this process may open {hard} files, and {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect_without_waiting(node: RawNode) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setblocking(False)
    try:
        sock.connect(str(node.socket))
    except BlockingIOError:
        sock.close()
        return None
    return sock


@pytest.mark.parametrize("kind", [RawNode, FewDescriptors])
def test_a_flood_of_connections_that_say_nothing(kind: type[RawNode]) -> None:
    with many_descriptors(STRANGERS_MAX + 1200), unharmed(kind) as node:
        silent: list[socket.socket] = []
        deadline = time.monotonic() + 5.0
        while len(silent) < STRANGERS_MAX + 500 and time.monotonic() < deadline:
            sock = connect_without_waiting(node)
            if sock is None:
                time.sleep(0.001)
            else:
                silent.append(sock)
            if len(silent) % 200 == 0:
                newcomer = node.session("newcomer")
                newcomer.subscribe(1, "served")
                newcomer.goodbye()
        for sock in silent:
            sock.close()


def test_connections_that_come_and_go() -> None:
    with unharmed() as node:
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline:
            for _ in range(20):
                sock = connect_without_waiting(node)
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.send(hello(node)[: 8 * (sock.fileno() % 30)])
                    sock.close()
        forget_liars(node, [1])


@pytest.mark.parametrize("packet", [
    p.PACKET.pack(p.MAGIC, p.PacketType.STATUS, 1),
    p.PING.pack(p.MAGIC, p.PacketType.PING, 1, 1),
    p.OPEN.pack(p.MAGIC, p.PacketType.OPEN, 1, 0, 0),
], ids=["STATUS", "PING", "OPEN"])
def test_questions_without_listening_to_the_answers(packet: bytes) -> None:
    """What waits for who does not read is bounded."""
    with unharmed() as node:
        liars = [stranger(node) for _ in range(4)]
        sent, deadline = 0, time.monotonic() + 1.5
        while time.monotonic() < deadline:
            for liar in liars:
                sent += send_with(liar, packet, [])
            if sent > len(liars) * 20 * OUT_MAX:
                pytest.fail("nsnd reads on, and keeps the answers")
        for liar in liars:
            liar.sock.close()


def test_sessions_until_there_is_no_place() -> None:
    """A process that takes every place; what it is told, and that the places come back with its end."""
    def take_places(node: RawNode) -> Callable[[], bool]:
        def work() -> bool:
            with many_descriptors(6000):
                kept = []
                while True:
                    session = stranger(node)
                    session.say_hello()
                    packet = session.receive(PATIENCE_S)
                    assert packet is not None
                    kept.append(session)
                    if packet.kind == p.PacketType.REFUSED:
                        return p.unpack_refused(packet.raw).errno == errno.ENOSPC and len(kept) > 4000
        return work

    with unharmed() as node:
        with child(take_places(node)):
            full = stranger(node)
            full.say_hello()
            assert full.refused().errno == errno.ENOSPC
        until(lambda: len(node.application()["sessions"]) <= 1, "the places come back")
