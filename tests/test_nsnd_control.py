"""The control protocol: what nsnd answers to sessions, to those that break the rules, and to those that do not read."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsnd import protocol as p
from nsnd._fabric import ffi
from nsnd.status import query
from tests.nsnd_client import RawNode, RawSession, add, child, node, remove, until
from tools.servers import free_port


@pytest.fixture(scope="module")
def shared_node() -> Iterator[RawNode]:
    """One for all tests here that leave nothing behind in it."""
    with node() as running:
        yield running


@pytest.fixture
def one(shared_node: RawNode) -> Iterator[RawSession]:
    session = shared_node.session("one")
    yield session
    session.leave()
    shared_node_is_unharmed(shared_node)


@pytest.fixture
def two(shared_node: RawNode) -> Iterator[RawSession]:
    session = shared_node.session("two")
    yield session
    session.leave()


def shared_node_is_unharmed(running: RawNode) -> None:
    session = running.session("afterwards")
    session.subscribe(1, "still.alive")
    session.goodbye()


# --- HELLO -----------------------------------------------------------------------------------------------------------


def test_a_session_is_welcomed_and_finds_its_place_in_the_table(shared_node: RawNode, one: RawSession) -> None:
    welcome = one.welcome
    assert welcome is not None
    assert welcome.directory == str(shared_node.directory / str(shared_node.port))
    assert (welcome.max_payload, welcome.acknowledged, welcome.reattached) == (1 << 20, 0, False)
    assert one.table is not None
    slot = one.table.slot[one.slot]
    assert slot.alive == one.generation > 0
    assert one.table.identity(one.slot) == one.identity
    assert (slot.pid, slot.uid) == (os.getpid(), os.getuid())


def test_client_ids_are_unique(one: RawSession, two: RawSession) -> None:
    assert one.welcome is not None
    assert two.welcome is not None
    assert one.welcome.client_id != two.welcome.client_id


@pytest.mark.parametrize(("lowest", "highest"), [(2, 3), (0, 0)])
def test_versions_that_have_nothing_in_common_are_refused_naming_both(shared_node: RawNode, lowest: int, highest: int) -> None:
    session = RawSession(shared_node.socket, shared_node.port)
    session.connect()
    session.say_hello(version_max=highest, version_min=lowest)
    refused = session.refused()
    assert refused.errno == errno.EPROTONOSUPPORT
    assert "speaks versions 1 to 1" in refused.text
    assert f"this session {lowest} to {highest}" in refused.text


def test_the_highest_common_version_is_spoken(shared_node: RawNode) -> None:
    session = shared_node.session(version_max=9, version_min=1)
    session.send(p.PacketType.PING, bytes(8))
    assert p.PACKET.unpack_from(session.expect(p.PacketType.PONG).raw)[2] == 1
    session.goodbye()


@pytest.mark.parametrize("number", [0, 65536, 2**32 - 1])
def test_an_application_id_is_a_port_number(shared_node: RawNode, number: int) -> None:
    session = RawSession(shared_node.socket, number)
    session.connect()
    session.say_hello()
    refused = session.refused()
    assert refused.errno == errno.EINVAL
    assert str(number) in refused.text


def test_an_application_id_whose_port_is_taken_is_refused(shared_node: RawNode) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        session = RawSession(shared_node.socket, port)
        session.connect()
        session.say_hello()
        refused = session.refused()
    assert refused.errno == errno.EADDRINUSE
    assert str(port) in refused.text
    assert not (shared_node.directory / str(port)).exists()


def test_the_first_session_of_an_application_id_opens_its_port(shared_node: RawNode) -> None:
    session = RawSession(shared_node.socket, free_port())
    session.attach()
    with socket.create_connection(("127.0.0.1", session.application_id)) as visitor:
        assert visitor.recv(4096).startswith(b"INFO {")
    session.goodbye()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_naming_both_and_the_way_out(shared_node: RawNode) -> None:
    with node() as running:
        os.chmod(running.directory, 0o755)
        os.chmod(running.socket, 0o666)

        def attach() -> bool:
            os.setuid(65534)
            session = RawSession(running.socket, running.port)
            session.connect()
            refused = session.refused()
            return refused.errno == errno.EACCES and "uid 65534" in refused.text and "another port" in refused.text

        with child(attach):
            pass


def test_the_socket_is_its_users_alone(shared_node: RawNode) -> None:
    assert shared_node.socket.stat().st_mode & 0o777 == 0o600


def test_reattaching_gives_the_same_place_and_closes_the_earlier_connection(one: RawSession) -> None:
    one.subscribe(1, "a.b")
    earlier, one.sock = one.sock, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place = (one.slot, one.generation)
    welcome = one.attach()
    assert welcome.reattached
    assert (one.slot, one.generation) == place
    assert welcome.acknowledged == 1
    assert earlier.recv(100) == b""
    earlier.close()
    one.subscribe(2, "a.c")


def test_an_unknown_session_starts_anew_when_it_reattaches(shared_node: RawNode) -> None:
    session = RawSession(shared_node.socket, shared_node.port)
    session.slot, session.generation, session.sequence = 3, 77, 12
    welcome = session.attach()
    assert not welcome.reattached
    assert welcome.acknowledged == 0
    session.goodbye()


def test_a_session_that_lost_its_welcome_leaves_no_second_place(shared_node: RawNode, one: RawSession) -> None:
    one.subscribe(1, "left.behind")
    before = one.slot, one.generation
    one.slot, one.generation = p.NO_SLOT, 0
    welcome = one.attach()
    assert not welcome.reattached
    assert (one.slot, one.generation) != before
    assert [session["pid"] for session in shared_node.application()["sessions"]].count(os.getpid()) == 1


def test_an_identity_belongs_to_one_process(shared_node: RawNode, one: RawSession) -> None:
    def steal() -> bool:
        session = RawSession(shared_node.socket, shared_node.port)
        session.identity, session.slot, session.generation = one.identity, one.slot, one.generation
        session.connect()
        session.say_hello()
        refused = session.refused()
        return refused.errno == errno.EEXIST and f"pid {os.getppid()}" in refused.text

    with child(steal):
        pass
    one.subscribe(1, "mine.still")


# --- interest ---------------------------------------------------------------------------------------------------------


def test_interest_is_in_the_log_before_it_is_answered(shared_node: RawNode, one: RawSession) -> None:
    assert one.table is not None
    number = one.interest(add(1, "a.*"), add(2, "b.>", "workers"), remove(1), add(3, "c"))
    assert one.interest_done() == (number, 0, 0)
    assert one.table.slot[one.slot].acknowledged == number
    assert mine(shared_node, one)["subscriptions"] == 2


def test_a_batch_that_comes_again_is_answered_and_not_applied(shared_node: RawNode, one: RawSession) -> None:
    one.subscribe(1, "a")
    one.interest(add(2, "b"), sequence=1)
    assert one.interest_done() == (1, 0, 0)
    assert mine(shared_node, one)["subscriptions"] == 1


def test_what_cannot_be_subscribed_is_reported_with_its_place_in_the_batch(shared_node: RawNode, one: RawSession) -> None:
    number = one.interest(add(1, "good"), add(2, "bad..pattern"), add(3, "behind.it"))
    assert one.interest_done() == (number, -errno.EINVAL, 1)
    assert mine(shared_node, one)["subscriptions"] == 1
    one.subscribe(3, "behind.it")


def test_more_than_fifty_thousand_changes_a_second(shared_node: RawNode, one: RawSession) -> None:
    rounds, fastest = 0, 0.0
    while fastest < 50000 and rounds < 10:  # the machine may be busy with other things for a moment
        first = rounds * 50
        batches = [b"".join(add(i * 400 + j, f"speed.{i}.{j}") for j in range(400)) for i in range(first, first + 50)]
        started = time.perf_counter()
        for sequence, body in enumerate(batches, first + 1):
            one.sock.send(p.INTEREST.pack(p.MAGIC, p.PacketType.INTEREST, 1, sequence, 400, len(body)) + body)
        while one.interest_done()[0] != first + 50:
            pass
        fastest = max(fastest, 20000 / (time.perf_counter() - started))
        rounds += 1
    assert mine(shared_node, one)["subscriptions"] == rounds * 20000
    assert fastest > 50000


# --- links ------------------------------------------------------------------------------------------------------------


def test_a_link_reaches_its_consumer_with_the_producers_place(shared_node: RawNode, one: RawSession, two: RawSession) -> None:
    fd = os.memfd_create("link")
    os.write(fd, b"payload")
    one.link(two, 5, fd)
    os.close(fd)
    packet = two.expect(p.PacketType.LINK)
    assert p.LINK.unpack(packet.raw)[3:] == (one.slot, one.generation, 5, os.getuid(), 0)
    assert os.pread(packet.fds[0], 10, 0) == b"payload"
    os.close(packet.fds[0])
    two.send(p.PacketType.TAKEN)
    assert {"from_slot": one.slot, "to_slot": two.slot} in shared_node.application()["links"]


def test_a_segment_reaches_its_consumer_with_number_and_size(one: RawSession, two: RawSession) -> None:
    fd = os.memfd_create("segment")
    body = p.SEGMENT.pack(p.MAGIC, p.PacketType.SEGMENT, 1, two.slot, two.generation, 3, 0, 1 << 22)
    one.send(p.PacketType.SEGMENT, body[p.PACKET.size :], fd)
    os.close(fd)
    packet = two.expect(p.PacketType.SEGMENT)
    assert p.SEGMENT.unpack(packet.raw)[3:] == (one.slot, one.generation, 3, 0, 1 << 22)
    os.close(packet.fds[0])
    two.send(p.PacketType.TAKEN)


def test_descriptors_come_one_at_a_time(one: RawSession, two: RawSession) -> None:
    for number in range(1, 51):
        one.link(two, number)
    for number in range(1, 51):
        packet = two.expect(p.PacketType.LINK)
        assert p.LINK.unpack(packet.raw)[5] == number
        os.close(packet.fds[0])
        if number == 1:
            assert two.nothing_comes()
        two.send(p.PacketType.TAKEN)


def test_a_link_to_nobody_is_answered_with_peer_gone(one: RawSession, two: RawSession) -> None:
    two.goodbye()
    one.link(two, 1)
    assert one.peer_gone() == (two.slot, two.generation)


def test_goodbye_is_heard_of_behind_the_links_that_were_handed_over(one: RawSession, two: RawSession) -> None:
    for number in (1, 2, 3):
        one.link(two, number)
    one.goodbye()
    for number in (1, 2, 3):
        assert two.take_link() == (one.slot, one.generation, number)
    assert two.peer_gone() == (one.slot, one.generation)


def test_what_waits_for_a_detached_session_comes_when_it_is_back(one: RawSession, two: RawSession) -> None:
    one.link(two, 1)
    one.link(two, 2)
    os.close(two.expect(p.PacketType.LINK).fds[0])  # seen, and not taken
    two.sock.close()
    one.link(two, 3)
    assert two.attach().reattached
    for number in (1, 2, 3):
        assert two.take_link()[2] == number


def test_a_producer_far_ahead_of_a_stopped_consumer_is_not_read_and_harms_nobody() -> None:
    with node() as running:
        one, two, three = running.session("one"), running.session("two"), running.session("three")
        sent = link_many(one, two, 6000)
        assert 4096 < sent < 6000
        three.subscribe(1, "others.are.served")
        for number in range(1, sent + 1):
            assert two.take_link()[2] == number
        one.subscribe(1, "read.again")


def test_two_producers_far_ahead_of_each_other_do_not_lock_each_other_up() -> None:
    with node() as running:
        sessions = [running.session("left"), running.session("right")]
        sent = [link_many(sessions[0], sessions[1], 4200), link_many(sessions[1], sessions[0], 4200)]
        assert min(sent) > 4096
        for session, count in zip(sessions, reversed(sent), strict=True):
            for number in range(1, count + 1):
                assert session.take_link()[2] == number


def link_many(producer: RawSession, consumer: RawSession, most: int) -> int:
    """Hands links over until nsnd does not read on for a while; returns how many it took or has in its socket."""
    fd = os.memfd_create("link")
    producer.sock.settimeout(0.3)
    try:
        for number in range(1, most + 1):
            try:
                producer.link(consumer, number, fd)
            except TimeoutError:
                return number - 1
        return most
    finally:
        os.close(fd)


# --- breaking the rules -----------------------------------------------------------------------------------------------


def hello_first(kind: p.PacketType, size: int) -> tuple[bytes, str]:
    return p.PACKET.pack(p.MAGIC, kind, 1) + bytes(size - p.PACKET.size), f"{kind.name} came before HELLO"


@pytest.mark.parametrize(("packet", "words"), [
    (b"x", "1 bytes is too short"),
    (b"GET / HTTP/1.1\r\n\r\n", "not the control protocol"),
    (p.PACKET.pack(p.MAGIC, 99, 1), "packet type 99 is unknown"),
    (p.PACKET.pack(p.MAGIC, p.PacketType.WELCOME, 1), "packet type 2"),
    (p.PACKET.pack(p.MAGIC, p.PacketType.HELLO, 1) + bytes(20), "HELLO has 28 bytes, not 184"),
    (p.PACKET.pack(p.MAGIC, p.PacketType.STATUS, 1) + bytes(1), "STATUS has 9 bytes, not 8"),
    (p.PACKET.pack(p.MAGIC, p.PacketType.STATUS, 1) + bytes(p.PACKET_MAX), "longer than 32768 bytes"),
    hello_first(p.PacketType.INTEREST, p.INTEREST.size),
    hello_first(p.PacketType.LINK, p.LINK.size),
    hello_first(p.PacketType.TAKEN, p.PACKET.size),
    hello_first(p.PacketType.GOODBYE, p.PACKET.size),
])
def test_a_stranger_that_breaks_the_protocol_is_refused(shared_node: RawNode, packet: bytes, words: str) -> None:
    session = RawSession(shared_node.socket, shared_node.port)
    session.connect()
    session.sock.send(packet)
    refused = session.refused()
    assert refused.errno == errno.EPROTO
    assert words in refused.text
    shared_node_is_unharmed(shared_node)


def interest(sequence: int, count: int, body: bytes, length: int | None = None) -> bytes:
    return p.INTEREST.pack(p.MAGIC, p.PacketType.INTEREST, 1, sequence, count, len(body) if length is None else length) + body


@pytest.mark.parametrize(("packet", "words"), [
    (interest(5, 1, add(1, "a")), "interest number 5 came after 0"),
    (interest(1, 2, add(1, "a")), "interest number 1 is malformed"),
    (interest(1, 1, add(1, "a") + bytes(8)), "interest number 1 is malformed"),
    (interest(1, 1, b"\x07" + add(1, "a")[1:]), "interest number 1 is malformed"),
    (interest(1, 1, add(1, "a"), 4000), "INTEREST says 4000 bytes"),
    (p.PACKET.pack(p.MAGIC, p.PacketType.TAKEN, 1), "no descriptor had been sent"),
    (p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, 0, 1, 1, 0, 0), "LINK came with 0 descriptors, not 1"),
    (p.pack_hello(p.Hello(1, 1, 1, (1, 2), 0, 0, 0, "")), "HELLO came twice"),
])
def test_a_session_that_breaks_the_protocol_ends(shared_node: RawNode, one: RawSession, two: RawSession, packet: bytes,
                                                 words: str) -> None:
    one.link(two, 1)
    two.take_link()
    one.sock.send(packet)
    refused = one.refused()
    assert refused.errno == errno.EPROTO
    assert words in refused.text
    assert two.peer_gone() == (one.slot, one.generation)
    assert one.slot not in [session["slot"] for session in shared_node.application()["sessions"]]


def test_a_descriptor_where_none_belongs_is_refused_and_closed(shared_node: RawNode, one: RawSession) -> None:
    read_end, write_end = os.pipe()
    one.send(p.PacketType.PING, bytes(8), write_end)
    os.close(write_end)
    assert "PING came with 1 descriptors, not 0" in one.refused().text
    assert os.read(read_end, 1) == b""  # the last writer has gone
    os.close(read_end)


# --- not reading, observing -------------------------------------------------------------------------------------------


def test_a_session_that_does_not_read_stops_nobody(one: RawSession, two: RawSession) -> None:
    one.sock.setblocking(False)
    sent = 0
    while sent < 20000:
        try:
            one.send(p.PacketType.PING, sent.to_bytes(8, "little"))
            sent += 1
        except BlockingIOError:
            break
    else:
        pytest.fail("nsnd reads a session that does not read its answers")
    two.subscribe(1, "served")
    one.sock.setblocking(True)
    for token in range(sent):
        assert p.PING.unpack(one.expect(p.PacketType.PONG).raw)[3] == token


def test_a_lame_duck_says_so_to_all(shared_node: RawNode, one: RawSession, two: RawSession) -> None:
    shared_node.signal(signal.SIGUSR2)
    one.expect(p.PacketType.LAME_DUCK)
    two.expect(p.PacketType.LAME_DUCK)


def test_status_names_sessions_with_their_counters(shared_node: RawNode, one: RawSession, two: RawSession) -> None:
    one.subscribe(1, "seen")
    status = shared_node.status()
    assert shared_node.process is not None
    assert status["node"] | {"id": "", "uptime_s": 0} == {
        "id": "", "pid": shared_node.process.pid, "version": "0.1.0", "uptime_s": 0, "started_by": "hand",
        "runtime_dir": str(shared_node.directory)}
    session = mine(shared_node, one)
    assert (session["name"], session["attached"], session["generation"], session["subscriptions"]) == ("one", True,
                                                                                                      one.generation, 1)
    assert set(session["counters"]) == {name for name, _ in ffi.typeof("struct nsn_counters").fields}
    assert all(number == 0 for number in session["counters"].values())


def test_a_status_larger_than_a_packet_comes_in_parts(shared_node: RawNode) -> None:
    sessions = [shared_node.session(f"session number {i}") for i in range(150)]
    status = query(shared_node.socket)
    names = {session["name"] for one in status["applications"] for session in one["sessions"]}
    assert {session.name for session in sessions} <= names
    for session in sessions:
        session.goodbye()
    until(lambda: not shared_node.application()["sessions"], "all have gone")


def test_an_application_id_can_be_opened_without_a_session(shared_node: RawNode) -> None:
    port = free_port()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asker:
        asker.connect(str(shared_node.socket))
        asker.send(p.OPEN.pack(p.MAGIC, p.PacketType.OPEN, 1, port, 0))
        assert p.OPEN.unpack(asker.recv(100))[1:] == (p.PacketType.OPENED, 1, port, 0)
    with socket.create_connection(("127.0.0.1", port)) as visitor:
        assert visitor.recv(4096).startswith(b"INFO {")


def test_an_idle_node_uses_no_cpu(shared_node: RawNode, one: RawSession) -> None:
    one.subscribe(1, "a")
    assert shared_node.process is not None
    stat = Path(f"/proc/{shared_node.process.pid}/schedstat")
    time.sleep(0.05)
    before = int(stat.read_text().split()[0])
    time.sleep(0.5)
    assert int(stat.read_text().split()[0]) - before < 1_000_000  # ns


# --- helpers ----------------------------------------------------------------------------------------------------------


def mine(running: RawNode, session: RawSession) -> dict[str, Any]:
    found: list[dict[str, Any]] = [one for one in running.application()["sessions"] if one["slot"] == session.slot]
    return found[0]
