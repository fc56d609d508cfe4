"""Programs of different users on one node: that they can talk, that whoever is not named is refused, and that one without
manners harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import secrets
import signal
import socket
import stat
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nats import errors

from nsnd import protocol as p
from nsnd._fabric import ffi
from tests.nsnd_client import RawSession, SharedTable, add, until
from tests.users import ALICE, BOB, OWNER, PLACE_SIZE, SharedNode, Stage, fork_as, outcome, places, shared_memory, shared_node

if os.getuid() != 0:
    pytest.skip("only root can be several users", allow_module_level=True)

BIG = 8 << 20
LINGER_S = 10
LARGEST = 64 << 20


@pytest.fixture
def node() -> Iterator[SharedNode]:
    with shared_node() as running:
        yield running


# --- what a program does --------------------------------------------------------------------------------------------


async def echo(stage: Stage) -> None:
    """Answers every request with what it says, until told to end."""
    nc = await stage.connect(name="echo")

    async def answer(msg: Any) -> None:
        await msg.respond(msg.data)

    await nc.subscribe("echo", cb=answer)
    await nc.flush()
    stage.say("ready")
    await stage.hear()
    await nc.close()


async def asks(stage: Stage) -> None:
    """Requests of all sizes, each answered with itself."""
    nc = await stage.connect(name="asks")
    for _ in range(200):
        assert (await nc.request("echo", b"small", timeout=10)).data == b"small"
    for size in (8193, 100_000, BIG, BIG, 20 << 20):
        payload = os.urandom(1 << 16) * (size // (1 << 16)) + os.urandom(size % (1 << 16))
        assert (await nc.request("echo", payload, timeout=20)).data == payload
    await nc.close()


async def counts(stage: Stage) -> None:
    """Takes numbered messages of a queue group; says how many when told "count", drains when told "drain"."""
    nc = await stage.connect(name="counts")
    numbers: list[int] = []

    async def take(msg: Any) -> None:
        numbers.append(int(msg.data[:8]))

    sub = await nc.subscribe("work", "group", cb=take, pending_bytes_limit=-1, pending_msgs_limit=-1)
    await nc.flush()
    stage.say("ready")
    while (told := await stage.hear()) != "end":
        if told == "drain":
            await sub.drain()
        else:
            await nc.flush()
        stage.say(numbers)
    await nc.close()


def numbered(number: int) -> bytes:
    return b"%08d" % number + bytes(20000 if number % 10 == 0 else 0)


async def publishes(stage: Stage) -> None:
    """Numbered messages, as many as it is told; every tenth is large."""
    nc = await stage.connect(name="publishes")
    stage.say("ready")
    number = 0
    while (count := await stage.hear()) != "end":
        for _ in range(count):
            await nc.publish("work", numbered(number))
            number += 1
        await nc.flush()
        stage.say(number)
    await nc.close()


# --- with manners ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), [(OWNER, ALICE), (ALICE, OWNER), (ALICE, BOB), (ALICE, ALICE)])
def test_programs_of_two_users_ask_and_answer_small_and_large(node: SharedNode, one: int, other: int) -> None:
    server = node.act(one, echo)
    assert server.hear() == "ready"
    node.act(other, asks).end()
    server.tell("end")
    server.end()


def test_a_node_of_root_serves_other_users() -> None:
    with shared_node(uid=0, users=(ALICE, BOB)) as node:
        server = node.act(ALICE, echo)
        assert server.hear() == "ready"
        node.act(BOB, asks).end()
        node.act(0, asks).end()
        node.act(ALICE, asks).end()
        server.tell("end")
        server.end()


async def _sends_the_largest(stage: Stage) -> None:
    nc = await stage.connect()
    assert nc.max_payload == LARGEST
    await nc.publish("before", b"x")
    await nc.publish("largest", bytes(range(256)) * (LARGEST // 256))
    await nc.publish("after", b"y")
    await nc.flush()
    await nc.close()


async def _takes_the_largest(stage: Stage) -> None:
    nc = await stage.connect()
    sub = await nc.subscribe(">", pending_bytes_limit=-1)
    await nc.flush()
    stage.say("ready")
    before, largest, after = [await sub.next_msg(timeout=20) for _ in range(3)]
    assert (before.subject, largest.subject, after.subject) == ("before", "largest", "after")
    assert largest.data == bytes(range(256)) * (LARGEST // 256)
    await nc.close()


def test_the_largest_payload_arrives_in_order(node: SharedNode) -> None:
    reader = node.act(BOB, _takes_the_largest)
    assert reader.hear() == "ready"
    node.act(ALICE, _sends_the_largest).end()
    reader.end()


def test_a_queue_group_of_three_users_gets_each_message_once_also_while_members_leave(node: SharedNode) -> None:
    members = [node.act(uid, counts) for uid in (OWNER, ALICE, BOB, ALICE)]
    assert [member.hear() for member in members] == ["ready"] * 4
    publisher = node.act(BOB, publishes)
    assert publisher.hear() == "ready"
    assert publisher.ask(1000) == 1000
    publisher.tell(1000)
    for member in members[:2]:
        member.tell("drain")  # in the middle of what is published
    drained = [member.hear() for member in members[:2]]
    assert publisher.hear() == 2000

    def taken() -> list[int]:
        numbers = [*drained, *(member.ask("count") for member in members[2:])]
        return sorted(number for some in numbers for number in some)

    until(lambda: len(taken()) >= 2000, "all messages have been taken")
    assert taken() == list(range(2000))
    assert all(member.ask("count") for member in members)
    for program in [publisher, *members]:
        program.tell("end")
        program.end()


async def _idle_member(stage: Stage) -> None:
    nc = await stage.connect(name="idle")

    async def take(msg: Any) -> None:
        await asyncio.sleep(0)

    await nc.subscribe("work", "group", cb=take)
    await nc.flush()
    stage.say("ready")
    await stage.hear()


def test_what_a_killed_member_did_not_read_goes_to_members_of_other_users(node: SharedNode) -> None:
    victim = node.act(ALICE, _idle_member)
    assert victim.hear() == "ready"
    os.kill(victim.pid, signal.SIGSTOP)
    publisher = node.act(BOB, publishes)
    assert publisher.hear() == "ready"
    assert publisher.ask(500) == 500
    heir = node.act(OWNER, counts)
    assert heir.hear() == "ready"
    victim.kill()
    until(lambda: len(heir.ask("count")) >= 500, "the other member has them")
    assert sorted(heir.ask("count")) == list(range(500))
    publisher.tell("end")
    heir.tell("end")


async def _rolling_subscriptions(stage: Stage) -> None:
    """Each subscription in turn: what is published between subscribe() and drain() is there, and nothing afterwards."""
    nc = await stage.connect()
    for _ in range(100):
        seen: list[bytes] = []

        async def take(msg: Any, seen: list[bytes] = seen) -> None:
            seen.append(msg.data)

        sub = await nc.subscribe("ticks", cb=take)
        await nc.request("tick", b"", timeout=10)
        await sub.drain()
        assert seen == [b"tick"], seen
        await nc.request("tick", b"", timeout=10)
        await nc.flush()
        assert seen == [b"tick"], seen
    await nc.close()


async def _ticks(stage: Stage) -> None:
    nc = await stage.connect()

    async def tick(msg: Any) -> None:
        await nc.publish("ticks", b"tick")
        await msg.respond(b"")

    await nc.subscribe("tick", cb=tick)
    await nc.flush()
    stage.say("ready")
    await stage.hear()


def test_drain_and_unsubscribe_are_exact_between_users(node: SharedNode) -> None:
    clock = node.act(ALICE, _ticks)
    assert clock.hear() == "ready"
    node.act(BOB, _rolling_subscriptions).end()
    node.act(OWNER, _rolling_subscriptions).end()


def test_status_shows_each_session_with_its_user(node: SharedNode) -> None:
    for uid in (OWNER, ALICE, BOB):
        program = node.act(uid, publishes)
        assert program.hear() == "ready"
        assert program.ask(7) == 7
    shown = {session["uid"]: session for session in node.sessions()}
    assert set(shown) == {OWNER, ALICE, BOB}
    for session in shown.values():
        assert (session["name"], session["counters"]["messages_out"]) == ("publishes", 7)


# --- death and restart ----------------------------------------------------------------------------------------------


def test_a_killed_program_of_another_user_leaves_nothing_and_disturbs_nobody(node: SharedNode) -> None:
    server = node.act(OWNER, echo)
    assert server.hear() == "ready"
    for uid in (ALICE, BOB, ALICE):
        victim = node.act(uid, _idle_member)
        assert victim.hear() == "ready"
        assert len(places()) == 1
        victim.kill()
        until(lambda: len(node.sessions()) == 1, "its session has ended")
        until(lambda: not places(), "its shared memory has gone")
    node.act(BOB, asks).end()
    server.tell("end")
    server.end()


async def _goes_on(stage: Stage) -> None:
    """Numbered requests, one after the other, whatever happens to nsnd."""
    reconnected = asyncio.Event()

    async def note() -> None:
        reconnected.set()

    nc = await stage.connect(name="goes on", reconnected_cb=note)
    await nc.request("echo", b"first", timeout=10)
    stage.say("ready")
    assert await stage.hear() == "without"
    for number in range(100):
        assert (await nc.request("echo", b"%d" % number, timeout=10)).data == b"%d" % number
    assert (await nc.request("echo", bytes(BIG), timeout=10)).data == bytes(BIG)
    stage.say("went on")
    assert await stage.hear() == "again"
    await asyncio.wait_for(reconnected.wait(), 20)
    sub = await nc.subscribe("new")
    await nc.publish("new", b"x")
    assert (await sub.next_msg(timeout=10)).data == b"x"
    assert (await nc.request("echo", b"last", timeout=10)).data == b"last"
    stage.say("reconnected")
    await stage.hear()
    await nc.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_programs_of_several_users_go_on_without_nsnd_and_come_back_to_the_next(node: SharedNode, number: int) -> None:
    server = node.act(ALICE, echo)
    assert server.hear() == "ready"
    programs = [node.act(uid, _goes_on) for uid in (OWNER, BOB)]
    assert [program.hear() for program in programs] == ["ready"] * 2
    before = {(session["slot"], session["generation"], session["uid"]) for session in node.sessions()}
    node.kill(number)
    for program in programs:
        assert program.ask("without") == "went on"
    node.start()
    for program in programs:
        assert program.ask("again") == "reconnected"
    until(lambda: all(session["attached"] for session in node.sessions()), "all are attached again")
    assert {(session["slot"], session["generation"], session["uid"]) for session in node.sessions()} == before
    for program in [server, *programs]:
        program.tell("end")
        program.end()


def test_a_program_that_dies_while_nsnd_is_away_is_gone_for_the_next(node: SharedNode) -> None:
    victim, other = node.act(ALICE, _idle_member), node.act(BOB, echo)
    assert [victim.hear(), other.hear()] == ["ready", "ready"]
    node.kill()
    victim.kill()
    node.start()
    until(lambda: [session["name"] for session in node.sessions() if session["attached"]] == ["echo"], "one is left")
    until(lambda: len(places()) == 1, "the other's shared memory has gone")


# --- who is let in --------------------------------------------------------------------------------------------------


async def _is_refused(stage: Stage) -> None:
    with pytest.raises(errors.NoServersError) as refusal:
        await stage.connect(max_reconnect_attempts=0)
    stage.say(str(refusal.value))


def test_users_that_are_not_named_are_refused_with_the_way_out() -> None:
    with shared_node(users=(ALICE,)) as node:
        for uid in (BOB, 0):
            words = node.act(uid, _is_refused).hear()
            for part in (f"process {node.pid}", f"user {OWNER}", f"you are uid {uid}", f"names ({ALICE})",
                         f"[access] users = [{uid}]", "another port"):
                assert part in words


def test_a_node_that_names_nobody_is_closed() -> None:
    with shared_node(users=()) as node:
        assert stat.S_IMODE(node.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((node.directory / str(node.port)).stat().st_mode) == 0o700
        assert stat.S_IMODE(node.socket.stat().st_mode) == 0o600
        words = node.act(ALICE, _is_refused).hear()
        assert f"[access] users = [{ALICE}]" in words


def test_modes_let_others_read_and_nobody_else_write(node: SharedNode) -> None:
    program = node.act(OWNER, echo)
    assert program.hear() == "ready"
    application = node.directory / str(node.port)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (node.directory, node.socket, *application.iterdir())}
    assert modes == {node.directory.name: 0o711, "nsnd.sock": 0o666, "slots": 0o644, "log.1": 0o644, "bell.0": 0o666}
    assert stat.S_IMODE(application.stat().st_mode) == 0o711
    assert stat.S_IMODE((node.directory / "node").stat().st_mode) == 0o600


def test_shared_memory_is_closed_to_others_until_one_of_them_is_let_in(node: SharedNode) -> None:
    program = node.act(OWNER, echo)
    assert program.hear() == "ready"

    def modes() -> set[int]:
        return {one.mode for one in shared_memory() if one not in places()}

    assert modes() == {0o600}
    other = node.act(BOB, _idle_member)
    assert other.hear() == "ready"
    assert modes() == {0o644}
    node.kill()
    node.start()
    until(lambda: all(session["attached"] for session in node.sessions()), "they are back")
    assert modes() == {0o644}
    node.allow()
    node.reread()
    until(lambda: modes() == {0o600}, "nobody else may")


def test_rereading_the_configuration_lets_users_in_and_out(node: SharedNode) -> None:
    node.allow(ALICE)
    inside = node.act(BOB, _idle_member)
    stays = node.act(ALICE, echo)
    assert [inside.hear(), stays.hear()] == ["ready", "ready"]
    node.reread()
    until(lambda: [session["uid"] for session in node.sessions()] == [ALICE], "whoever is not named any more has gone")
    assert "you are uid" in node.act(BOB, _is_refused).hear()
    node.allow(ALICE, BOB)
    node.reread()
    node.act(BOB, asks).end()
    node.allow()
    node.reread()
    assert stat.S_IMODE(node.directory.stat().st_mode) == 0o700


# --- without manners ------------------------------------------------------------------------------------------------


libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
IPC_RMID = 0
NO_MEMORY = ctypes.c_void_p(-1).value


class Place:
    """A System V segment made by hand."""

    def __init__(self, size: int = PLACE_SIZE, mode: int = 0o644) -> None:
        self.number = libc.shmget(0, size, 0o1000 | mode)
        assert self.number >= 0
        self.memory = (ctypes.c_uint8 * size).from_address(libc.shmat(self.number, None, 0))
        libc.shmctl(self.number, IPC_RMID, None)


def raw(node: SharedNode, segment: int, identity: tuple[int, int] | None = None) -> RawSession:
    """A session that has said HELLO."""
    session = RawSession(node.socket, node.port, "bad")
    session.connect()
    session.sock.send(p.pack_hello(p.Hello(1, node.port, 1, identity or session.identity, p.NO_SLOT, 0, 0, "bad", segment)))
    return session


def attached(node: SharedNode) -> RawSession:
    session = raw(node, Place().number)
    session.welcomed()
    return session


def test_what_is_not_its_place_is_refused(node: SharedNode) -> None:
    assert ffi.sizeof("struct nsn_place") == PLACE_SIZE
    bobs = node.act(BOB, _idle_member)
    assert bobs.hear() == "ready"
    of_bob = places()[0].number

    def lie() -> None:
        for segment, words in ((Place(4096).number, "4096 bytes"), (Place(1 << 24).number, "16777216 bytes"),
                               (Place(mode=0o666).number, "mode 666"), (of_bob, f"user {BOB}"), (-1, "segment -1"),
                               (2**31 - 1, "is not there")):
            assert words in raw(node, segment).refused().text
        attached(node)  # and one that is right is let in

    outcome(ALICE, lie)


def test_nobody_takes_the_session_of_another_user(node: SharedNode) -> None:
    program = node.act(BOB, echo)
    assert program.hear() == "ready"

    def steal() -> None:
        table = SharedTable(str(node.directory / str(node.port)))
        assert table.slot[0].alive
        refused = raw(node, Place().number, table.identity(0)).refused()
        assert refused.errno == errno.EEXIST

    outcome(ALICE, steal)
    node.act(ALICE, asks).end()


def test_files_of_others_cannot_be_written_cut_or_removed(node: SharedNode) -> None:
    program = node.act(OWNER, echo)
    assert program.hear() == "ready"
    application = node.directory / str(node.port)
    files = [node.directory / "node", node.directory / "lock", *application.iterdir()]

    def denied(act: Callable[[Path], object], path: Path) -> bool:
        try:
            act(path)
        except OSError as error:  # a socket is not opened at all: ENXIO, EINVAL
            return error.errno in (errno.EACCES, errno.EPERM, errno.ENXIO, errno.EINVAL)
        return False

    def harm() -> None:
        for path in files:
            assert denied(lambda path: os.truncate(path, 0), path)
            assert denied(lambda path: os.open(path, os.O_RDWR), path)
            assert denied(lambda path: path.unlink(), path)
            assert denied(lambda path: path.chmod(0o777), path)
            assert denied(lambda path: path.rename(path.with_name("x")), path)
        for segment in shared_memory():
            assert libc.shmat(segment.number, None, 0) == NO_MEMORY
            assert ctypes.get_errno() == errno.EACCES
            assert libc.shmctl(segment.number, IPC_RMID, None) < 0
        with pytest.raises(PermissionError):
            (application / "new").touch()
        with pytest.raises(PermissionError):
            os.listdir(node.directory)
        with pytest.raises(PermissionError):
            os.kill(node.pid, signal.SIGTERM)

    outcome(ALICE, harm)
    node.act(BOB, asks).end()


def test_memory_is_not_handed_over_between_users(node: SharedNode) -> None:
    program = node.act(OWNER, echo)
    assert program.hear() == "ready"
    (consumer,) = node.sessions()

    def hand_over() -> None:
        session = attached(node)
        body = p.SEGMENT.pack(p.MAGIC, p.PacketType.SEGMENT, 1, consumer["slot"], consumer["generation"], 1, 0, 4096)
        session.send(p.PacketType.SEGMENT, body[p.PACKET.size :], os.memfd_create("pool"))
        refused = session.refused()
        assert refused.errno == errno.EPERM
        assert f"uid {ALICE}" in refused.text
        assert f"uid {OWNER}" in refused.text

    outcome(ALICE, hand_over)
    node.act(BOB, asks).end()


def test_links_of_any_kind_and_floods_of_rings_harm_nobody(node: SharedNode) -> None:
    program = node.act(OWNER, echo)
    assert program.hear() == "ready"
    (consumer,) = node.sessions()
    bell = str(node.directory / str(node.port) / f"bell.{consumer['slot']}")

    def flood(seconds: float) -> None:
        session = attached(node)
        place = Place()
        for number in range(20):
            fd = os.memfd_create("link")
            os.ftruncate(fd, number * 4096)
            body = p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, consumer["slot"], consumer["generation"], number, 0, 0)
            session.send(p.PacketType.LINK, body[p.PACKET.size :], fd)
            os.ftruncate(fd, 0)
            os.close(fd)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ringer:
            ringer.setblocking(False)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                try:
                    ringer.sendto(secrets.token_bytes(64), bell)
                except BlockingIOError:
                    place.memory[secrets.randbelow(20480)] = 255

    bad = fork_as(ALICE, lambda: flood(3))
    node.act(BOB, asks).end()
    assert os.waitpid(bad, 0)[1] == 0
    node.act(BOB, asks).end()


def lingering_socket() -> socket.socket:
    """To close it takes LINGER_S."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array("i", [1, LINGER_S]).tobytes())
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
    peer.detach()  # and nobody reads it
    return sock


async def _hands_sockets_over(stage: Stage) -> None:
    node = SharedNode(stage.directory, OWNER, stage.port)
    sessions, sockets = [attached(node) for _ in range(3)], [lingering_socket() for _ in range(3)]
    stage.say("ready")
    await stage.hear()
    for session, sock in zip(sessions, sockets, strict=True):
        body = p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, 0, 1, 1, 0, 0)
        session.send(p.PacketType.LINK, body[p.PACKET.size :], sock.fileno())
        sock.close()  # at once: it is under way
    stage.say("sent")
    await stage.hear()


def test_descriptors_that_cannot_be_closed_do_not_stop_the_node(node: SharedNode) -> None:
    program = node.act(OWNER, echo)
    bad = node.act(ALICE, _hands_sockets_over)
    assert [program.hear(), bad.hear()] == ["ready", "ready"]
    os.kill(node.pid, signal.SIGSTOP)  # so that it is the last one who closes them
    assert bad.ask("send") == "sent"
    began = time.monotonic()
    os.kill(node.pid, signal.SIGCONT)
    until(lambda: node.log().count("warn refused") == 3, "they have been refused")
    node.act(BOB, asks).end()
    assert time.monotonic() - began < LINGER_S


def test_who_hands_such_descriptors_over_again_and_again_is_not_served_any_more(node: SharedNode) -> None:
    def hand_over() -> None:
        body = p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, 0, 1, 1, 0, 0)
        for _ in range(33):
            session = attached(node)
            session.send(p.PacketType.LINK, body[p.PACKET.size :], session.sock.fileno())
            assert "no memory file" in session.refused().text
        session = RawSession(node.socket, node.port)
        session.connect()
        assert f"programs of uid {ALICE}" in session.refused().text

    outcome(ALICE, hand_over)
    program = node.act(OWNER, echo)
    assert program.hear() == "ready"
    node.act(BOB, asks).end()


def kernel_version() -> tuple[int, ...]:
    return tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))


@pytest.mark.skipif(kernel_version() < (6, 16), reason="this kernel takes descriptors on every Unix socket (before 6.16)")
@pytest.mark.parametrize("uid", [OWNER, BOB])
def test_nobody_sends_descriptors_with_a_ring(node: SharedNode, uid: int) -> None:
    program = node.act(uid, echo)
    assert program.hear() == "ready"

    def ring() -> None:
        bell = str(node.directory / str(node.port) / "bell.0")
        if uid != OWNER:
            bell = "\0insane_nats/{:016x}{:016x}".format(*SharedTable(str(node.directory / str(node.port))).identity(0))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ringer:
            ringer.connect(bell)
            ringer.send(b"x")
            with pytest.raises(PermissionError):
                ringer.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [0]))])

    outcome(ALICE, ring)


def test_another_user_gets_its_share_of_sessions_and_subscriptions(node: SharedNode) -> None:
    program = node.act(OWNER, echo)
    assert program.hear() == "ready"

    def take_all() -> None:
        sessions = [attached(node) for _ in range(128)]
        refused = raw(node, Place().number).refused()
        assert refused.errno == errno.EDQUOT
        assert f"uid {ALICE} has 128 sessions" in refused.text
        for session in sessions[:-1]:
            session.leave()
        session = sessions[-1]
        assert len({session.peer_gone() for _ in sessions[:-1]}) == 127  # all have its place, and hear of it
        for first in range(0, 16384, 512):
            number = session.interest(*(add(sid, "s") for sid in range(first, first + 512)))
            assert session.interest_done() == (number, 0, 0)
        number = session.interest(add(100_000, "s"))
        assert session.interest_done() == (number, -errno.EDQUOT, 0)
        number = session.interest(p.INTEREST_CHANGE.pack(2, 0, 0, 0, 0, 0, 0))
        assert session.interest_done() == (number, 0, 0)
        session.subscribe(100_001, "s")

    outcome(ALICE, take_all)
    node.act(BOB, asks).end()


async def _stopped_inside(stage: Stage) -> None:
    """Is linked with everybody, and then does nothing any more."""
    nc = await stage.connect()
    await nc.subscribe("all")
    await nc.publish("all", b"x")
    await nc.flush()
    stage.say("ready")
    await stage.hear()


def test_a_stopped_program_of_another_user_does_not_hold_up_the_others(node: SharedNode) -> None:
    server = node.act(OWNER, echo)
    bad = node.act(ALICE, _stopped_inside)
    assert [server.hear(), bad.hear()] == ["ready", "ready"]
    os.kill(bad.pid, signal.SIGSTOP)
    node.act(BOB, asks).end()
    node.act(BOB, _rolling_alone).end()


async def _rolling_alone(stage: Stage) -> None:
    nc = await stage.connect()
    for number in range(50):
        sub = await nc.subscribe("all")
        await nc.publish("all", b"%d" % number)
        assert (await sub.next_msg(timeout=10)).data == b"%d" % number
        await sub.drain()
    await nc.close()

