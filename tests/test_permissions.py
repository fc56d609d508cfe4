"""Permissions of users: what nsnd.cfg may say, what the lists mean, and that a client that keeps to no rule gains nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

import insane_nats as nats
from benchmarks.run import cpu_seconds
from insane_nats import _nsn as native
from nsnd import protocol as p
from nsnd._relay import ffi, lib
from nsnd.config import ConfigError, load_config
from nsnd.credentials import User
from nsnd.permissions import Permissions, Rule
from nsnd.relays import Relayed, Relays
from tests.auth_node import LIMITED_USERS, AuthNode, Raw, auth_node, write
from tests.nsnd_client import RawSession, until


@pytest.fixture
def node() -> Iterator[AuthNode]:
    with auth_node(LIMITED_USERS) as running:
        yield running


def permissions(text: str) -> str:
    return f"[auth.4222]\nusers = [{{user = 'a', password = 'b', permissions = {text}}}]\n"


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "words"), [
    ("'x'", ": must be a table"),
    ("{pub = 'x'}", ".pub: unknown key; allowed are publish, subscribe, allow_responses"),
    ("{publish = 1}", ".publish: must be a subject in quotes, or a list"),
    ("{publish = [1]}", ".publish: must be a subject"),
    ("{publish = ['a..b']}", ".publish: must be a subject"),
    ("{publish = ['>.a']}", ".publish: must be a subject"),
    ("{publish = ['a queue']}", ".publish: must be a subject"),
    ("{publish = []}", ".publish: is empty"),
    ("{publish = {allow = []}}", ".publish.allow: is empty"),
    ("{publish = {alow = 'x'}}", ".publish.alow: unknown key; allowed are allow, deny"),
    ("{subscribe = {deny = ['a b c']}}", ".subscribe.deny: must be a subject"),
    ("{subscribe = {deny = 7}}", ".subscribe.deny: must be a subject"),
    ("{allow_responses = 1}", ".allow_responses: must be true, false, or"),
    ("{allow_responses = {max = 0}}", ".allow_responses: must be"),
    ("{allow_responses = {expires = 'soon'}}", ".allow_responses: must be"),
    ("{allow_responses = {expires = nan}}", ".allow_responses: must be"),
    ("{allow_responses = {most = 1}}", ".allow_responses: must be"),
])
def test_errors_name_the_place_and_what_is_allowed(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "nsnd.cfg", permissions(text))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: auth.4222.users[0].permissions{words}")):
        load_config(path)


@pytest.mark.parametrize(("text", "expected"), [
    ("{}", Permissions()),
    ("{publish = 'a'}", Permissions(Rule((("a", ""),)))),
    ("{publish = {deny = ['a', 'b.>']}}", Permissions(Rule(None, (("a", ""), ("b.>", ""))))),
    ("{subscribe = ['a', 'b q.*']}", Permissions(subscribe=Rule((("a", ""), ("b", "q.*"))))),
    ("{allow_responses = true}", Permissions(Rule(()), responses=(1, 120.0))),
    ("{publish = 'a', allow_responses = {max = 3, expires = 0.5}}", Permissions(Rule((("a", ""),)), responses=(3, 0.5))),
    ("{allow_responses = false}", Permissions()),
])
def test_what_is_written_is_what_holds(tmp_path: Path, text: str, expected: Permissions) -> None:
    (user,) = load_config(write(tmp_path / "nsnd.cfg", permissions(text))).auth[4222].users.values()
    assert user.permissions == expected


# --- lists ------------------------------------------------------------------------------------------------------------


def made(**lists: list[str]) -> object:
    one = ffi.gc(lib.nsn_permissions_new(), lib.nsn_permissions_free)
    for name, patterns in lists.items():
        number = getattr(lib, f"NSN_{name.upper()}")
        for pattern in patterns:
            subject, _, queue = pattern.partition(" ")
            assert lib.nsn_permissions_add(one, number, subject.encode(), len(subject), queue.encode(), len(queue)) == 0
    return one


@pytest.mark.parametrize(("allow", "pattern", "expected"), [
    ("*", ">", False), ("a.*", "a.>", False), ("*.*", "*.>", False), ("a.>", "a.>", True), (">", ">", True), (">", "a.>", True),
    ("a.*", "a.*", True), ("a.>", "a.*.b", True), ("a.b", "a.*", False), ("*", "a.>", False), ("*.b", "*.*", False),
    ("a.>", ">", False), ("a.>", "*.>", False), (">", "*", True), ("a>", "a>", True), ("*", "a>", True),
])
def test_a_subscription_gets_no_more_than_what_is_allowed(allow: str, pattern: str, expected: bool) -> None:
    one = made(subscribe_allow=[allow])
    assert lib.nsn_may_subscribe(one, pattern.encode(), len(pattern), b"", 0) == expected


def test_a_subject_with_an_empty_token_is_in_no_list() -> None:
    def may(one: Any, subject: str) -> bool:
        return bool(lib.nsn_may_publish(one, subject.encode(), len(subject)))

    both = made(publish_allow=["may.>"], publish_deny=["may.no.>"])
    assert [may(both, subject) for subject in ("may.x", "may.no.x", "may..x", "may.no..x", "may.")] == [True] + [False] * 4
    assert may(made(publish_deny=["no.>"]), "no..x")  # and nobody receives it


def test_no_allowed_subscription_hears_what_is_not() -> None:
    """Whatever a subscription that is let through matches, the list matches."""
    rng = random.Random(5)
    tokens = ["a", "b", "*", ">"]

    def pattern(kinds: list[str]) -> str:
        words = [rng.choice(kinds) for _ in range(rng.randint(1, 3))]
        return ".".join(word if word != ">" or place == len(words) - 1 else "*" for place, word in enumerate(words))

    def matches(one: str, subject: str) -> bool:
        listed = made(publish_allow=[one])
        return bool(lib.nsn_may_publish(listed, subject.encode(), len(subject)))

    subjects = ["a", "b", "a.a", "a.b", "b.a", "a.b.a", "b.b.b", "a.a.a.a"]
    for _ in range(2000):
        allow, asked = pattern(tokens), pattern(tokens)
        one = made(subscribe_allow=[allow])
        if lib.nsn_may_subscribe(one, asked.encode(), len(asked), b"", 0):
            assert all(matches(allow, subject) for subject in subjects if matches(asked, subject)), (allow, asked)


def test_replies_are_counted_and_end() -> None:
    one = made(publish_allow=["may"])
    lib.nsn_permissions_responses(one, 2, 1000)
    replies = ffi.gc(lib.nsn_replies_new(), lib.nsn_replies_free)

    def answer(subject: str, now: int) -> bool:
        return bool(lib.nsn_replies_answer(replies, one, subject.encode(), len(subject), now))

    def heard(subject: str, now: int) -> None:
        lib.nsn_replies_heard(replies, one, subject.encode(), len(subject), now)

    assert not answer("r", 0)
    heard("r", 0)
    assert [answer("r", 10), answer("r", 1000), answer("r", 1000)] == [True, True, False]
    heard("r", 0)
    assert not answer("r", 1001)
    for number in range(5000):
        heard(f"r.{number}", 0)
    assert not answer("r.0", 0)
    assert answer("r.4999", 0)
    assert answer("r.904", 0)
    heard("may", 0)
    assert not answer("may", 0)


# --- a client that keeps to no rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    "PUB not 1\r\nx\r\n", "pub\tnot\t1\r\nx\r\n", "PUB  not  reply  1\r\nx\r\n", "HPUB not 12 13\r\nNATS/1.0\r\n\r\nx\r\n",
    "PUB may 1\r\nx\r\n", "PUB may.\x00 1\r\nx\r\nPUB not 1\r\nx\r\n", "PUB * 1\r\nx\r\n", "PUB > 1\r\nx\r\n",
    "PUB Not 1\r\nx\r\n", "PUB not 0001\nx\r\n", "PUB not 1\r\nx\r\n" * 50,
])
def test_it_can_say_nothing_that_it_may_not(node: AuthNode, line: str) -> None:
    async def run() -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        heard = await free.subscribe(">")
        await free.flush()
        raw = Raw(node)
        answers = await asyncio.to_thread(raw.says, line)
        assert answers
        assert all(answer.startswith("-ERR 'Permissions Violation for Publish to ") for answer in answers)
        assert await asyncio.to_thread(raw.says, "PUB may.x 4\r\nlast\r\n") == []
        while (message := await heard.next_msg(5)).data != b"last":
            assert message.subject.startswith("may.")
        await free.close()

    asyncio.run(run())


@pytest.mark.parametrize("pattern", [">", "*", "*.>", "hear.*.>", "hear", "hear.not.x", "hear.>", "*.x", "Hear.x", "hear.*"])
def test_it_can_hear_nothing_that_it_may_not(node: AuthNode, pattern: str) -> None:
    async def run() -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        raw = Raw(node)
        await asyncio.to_thread(raw.says, f"SUB {pattern} 1\r\nSUB {pattern} group 2\r\nUNSUB 3 1\r\nSUB hear.last 4\r\n")
        for subject in ("x", "hear", "not.x", "hear.not.x", "hear.not.y.z", "Hear.x", "hear.x", "hear.last"):
            await free.publish(subject, b"secret" if not re.match(r"hear\.(?!not\.)", subject) else b"open")
        await free.flush()
        lines = await asyncio.to_thread(raw.says, "PING\r\n")
        text = "\n".join(lines)
        assert "open" in text
        assert "secret" not in text
        await free.close()

    asyncio.run(run())


@pytest.mark.parametrize("text", [
    b"\xff\xfe\r\n", b"PUB may.x 1\r\nxyz\r\n", b"PUB may.x -1\r\n", b"PUB may.x 9999999999\r\n", b"PUB\r\n", b"SUB\r\n",
    b"SUB hear.x x\r\n", b"HPUB may.x 9 3\r\nabc\r\n", b"MSG a 1 1\r\nx\r\n", b"A" * 5000, b"PUB " + b"a" * 5000 + b" 1\r\n",
    b"UNSUB\r\n", b"\r\n", b"SUB a b c d\r\n", b"PUB may.x 1048577\r\n", b"INFO {}\r\n", b"\x00" * 100 + b"\r\n",
])
def test_what_is_not_the_protocol_ends_it_and_nothing_else(node: AuthNode, text: bytes) -> None:
    other, raw = Raw(node), Raw(node)
    raw.ends(text)
    assert other.says("PUB may.x 1\r\nx\r\n") == []


def test_a_carriage_return_ends_a_word(node: AuthNode) -> None:
    """Else a client that reads the line, and takes it for a space, sees other words than those that were checked."""
    raw = Raw(node, "all")
    assert raw.says(b"SUB a 1\r\nPUB a\r7\t0\r\n\r\n") == ["MSG a 1 7 0", ""]


def test_what_is_no_word_is_not_written_into_a_line(node: AuthNode) -> None:
    """Whoever is a part of the fabric can publish any bytes as a subject."""
    async def run() -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        raw = Raw(node, "all")
        await asyncio.to_thread(raw.says, "SUB a.> 1\r\n")
        assert free._session is not None
        for subject, reply in ((b"a.b\r\nMSG x 1 0\r\n", b""), (b"a.b", b"r 1"), (b"a.b\tc", b""), (b"a.last", b"r")):
            assert native.lib.nsn_publish(free._session.handle, subject, len(subject), reply, len(reply), b"", 0, b"x", 1) == 1
        assert await asyncio.to_thread(raw.line) == "MSG a.last 1 r 1"
        await free.close()

    asyncio.run(run())


def memory(pid: int) -> int:
    """Resident, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("line", ["PUB not 0\r\n\r\n", "SUB not 1\r\n"])
def test_what_it_is_told_and_does_not_read_is_bounded(node: AuthNode, line: str) -> None:
    """It could speak for ever, and let the node keep all answers."""
    assert node.process is not None
    raw = Raw(node)
    raw.says("")
    before = memory(node.process.pid)
    raw.sock.settimeout(1)
    text = line.encode() * 20000
    with contextlib.suppress(TimeoutError):
        for _ in range(200):
            raw.sock.sendall(text)
    assert memory(node.process.pid) - before < 64 << 20


def test_a_large_message_for_many_subscriptions_is_not_kept_for_each(node: AuthNode) -> None:
    assert node.process is not None
    raw = Raw(node, "all")
    raw.says("".join(f"SUB a {sid}\r\n" for sid in range(60)))
    before = memory(node.process.pid)
    payload = bytes(1 << 20)
    raw.send(b"PUB a %d\r\n%s\r\nPING\r\n" % (len(payload), payload))
    grown = 0
    for _ in range(20):
        grown = max(grown, memory(node.process.pid) - before)
        time.sleep(0.02)
    assert grown < 48 << 20
    for _ in range(60):
        assert raw.line().startswith("MSG a ")
        while len(raw.data) < len(payload) + 2:
            raw.data += raw.sock.recv(1 << 20)
        raw.data = raw.data[len(payload) + 2:]
    assert raw.line() == "PONG"


def test_the_largest_message_comes_through() -> None:
    most = 64 << 20

    async def run(node: AuthNode) -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        heard = await free.subscribe("may.>")
        await free.flush()
        raw = Raw(node)
        for _ in range(2):
            assert await asyncio.to_thread(raw.says, b"PUB may.x %d\r\n%s\r\n" % (most, bytes(most))) == []
            assert len((await heard.next_msg(10)).data) == most
        await free.close()

    with auth_node(f"[global]\nmax_payload = {most}\n" + LIMITED_USERS) as node:
        asyncio.run(run(node))


def test_a_relay_without_a_thread_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Thread) -> None:
        raise RuntimeError("can't start new thread")

    relays = Relays("/nowhere")
    relayed = Relayed(User("a", "", None, Permissions()), "", os.getpid(), os.getuid())
    monkeypatch.setattr(Thread, "start", start)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(p.ProtocolError, match="can't start new thread"):
            relays.start(relayed, 4222, 1 << 20, "{}", "{}")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert not relays._running


def test_thousands_of_subscriptions_do_not_slow_it_down(node: AuthNode) -> None:
    assert node.process is not None
    pid = node.process.pid

    def seconds(raw: Raw) -> float:
        """Of the node's processor time, the least of several."""
        times = []
        for _ in range(5):
            begin = cpu_seconds(pid)
            for _ in range(5):
                lines = raw.says("PUB a.7 1\r\nx\r\n" * 500)
                assert lines.count("x") == 500
            times.append(cpu_seconds(pid) - begin)
        return min(times)

    many = Raw(node, "all")
    many.says("".join(f"SUB a.{sid} {sid}\r\n" for sid in range(8, 16_000)) + "SUB a.7 7\r\n")
    among_many = seconds(many)
    many.says("".join(f"UNSUB {sid}\r\n" for sid in range(8, 16_000)))
    assert among_many < 3 * seconds(many)


def test_without_a_connect_there_is_nothing(node: AuthNode) -> None:
    assert Raw(node, connect="").ends("SUB hear.x 1\r\n") == ["-ERR 'Authorization Violation'"]


def test_lines_may_come_in_pieces(node: AuthNode) -> None:
    raw, rng = Raw(node, "all"), random.Random(1)
    text = b"SUB a 1\r\n" + b"".join(b"PUB a %d\r\n%s\r\n" % (size, b"x" * size) for size in (0, 1, 100, 5000)) + b"PING\r\n"
    while text:
        size = rng.randint(1, 300)
        raw.send(text[:size])
        text = text[size:]
    sizes = []
    while (line := raw.line()) != "PONG":
        if line.startswith("MSG a 1 "):
            sizes.append(int(line.split()[3]))
    assert sizes == [0, 1, 100, 5000]


def test_it_gets_no_part_of_the_fabric(node: AuthNode) -> None:
    """No place, no directory, no link: what it was sent names none, and nsnd takes nothing of it."""
    free = node.stranger("free")
    welcome = free.log_in(user="free", password="p")
    raw = Raw(node)
    assert raw.packet.raw == p.PACKET.pack(p.MAGIC, p.PacketType.RELAYED, 1)
    assert Path(welcome.directory).name not in json.dumps(raw.info)
    assert Path(welcome.directory).name not in str(node.status()["applications"])
    raw.session.slot, raw.session.generation = free.slot, free.generation
    raw.session.link(free, 1)
    assert "LINK came before HELLO" in raw.session.refused().text
    for kind in (p.PacketType.INTEREST, p.PacketType.SEGMENT, p.PacketType.TAKEN):
        again = Raw(node)
        size = {p.PacketType.INTEREST: p.INTEREST.size, p.PacketType.SEGMENT: p.SEGMENT.size}.get(kind, p.PACKET.size)
        again.session.send(kind, bytes(size - p.PACKET.size))
        assert "came before HELLO" in again.session.refused().text
    again = Raw(node)
    again.session.say_hello(answers=True)
    assert "HELLO came twice" in again.session.refused().text


def test_it_cannot_take_the_place_of_a_relay(node: AuthNode) -> None:
    """Relays are known by their process; their names help nobody else, also those that are on their way."""
    raw = Raw(node, connect="")
    names = [f"relay {'0' * 32}", raw.session.name, ""]
    for name in names:
        session = RawSession(node.socket, node.port, name)
        session.connect()
        session.say_hello()
        assert session.refused().errno == errno.EACCES


def test_who_gets_permissions_while_connected_has_to_connect_anew(node: AuthNode) -> None:
    session = node.stranger()
    session.log_in(user="free", password="p")
    free = 'user = "free", password = "p"'
    node.configure(LIMITED_USERS.replace(free, free + ', permissions = {{publish = "x"}}'))
    node.reread()
    assert session.receive() is None
    session.challenged()
    session.answer(user="free", password="p")
    assert "connect anew" in session.refused().text
    assert sum(len(one["sessions"]) for one in node.status()["applications"]) == 0


def test_status_shows_the_client_and_not_its_relay(node: AuthNode) -> None:
    raw = Raw(node)
    raw.says("SUB hear.x 1\r\n")
    (application,) = node.status()["applications"]
    (session,) = application["sessions"]
    assert (session["pid"], session["uid"], session["user"], session["name"]) == (os.getpid(), os.getuid(), "me", "me")
    assert (session["relayed"], session["subscriptions"]) == (True, 1)
    raw.sock.close()
    until(lambda: not any(one["sessions"] for one in node.status()["applications"]), "its session ends with it")


def dropped(node: AuthNode) -> int:
    (application,) = node.status()["applications"]
    return sum(session["counters"]["dropped"] for session in application["sessions"])


def test_what_nobody_of_a_queue_group_may_have_is_counted(node: AuthNode) -> None:
    members = [Raw(node, "me") for _ in range(2)]
    for raw in members:
        assert raw.says("SUB hear.> group 1\r\n") == []
    speaker = Raw(node, "all")
    speaker.says("PUB hear.not.x 1\r\nx\r\n" * 7)
    until(lambda: dropped(node) == 7, "they are counted")
    assert [raw.says("") for raw in members] == [[], []]


def test_a_subject_that_no_line_can_carry_is_counted(node: AuthNode) -> None:
    async def run() -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}", skip_subject_validation=True)
        await free.publish("hear.a b", b"x")
        await free.publish("hear.a", b"x")
        await free.close()

    raw = Raw(node)
    assert raw.says("SUB hear.> 1\r\n") == []
    asyncio.run(run())
    assert raw.line() == "MSG hear.a 1 1"
    until(lambda: dropped(node) == 1, "it is counted")


def test_a_node_that_ends_ends_its_relays(node: AuthNode) -> None:
    raw = Raw(node)
    raw.says("SUB hear.x 1\r\n")
    assert node.kill(signal.SIGTERM) == 0
    with pytest.raises((EOFError, ConnectionResetError)):
        raw.line()
    assert not [entry for entry in node.directory.iterdir() if entry.is_dir()]
    node.start()


def test_a_client_that_does_not_read_disturbs_nobody_and_has_all_once_it_does(node: AuthNode) -> None:
    async def run() -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        other = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        heard = await other.subscribe("hear.x")
        raw = Raw(node)
        await asyncio.to_thread(raw.says, "SUB hear.x 1\r\n")
        payload = bytes(1 << 16)
        for _ in range(600):
            await free.publish("hear.x", payload)
            await heard.next_msg(5)
        assert len(await asyncio.to_thread(raw.says, "")) >= 600
        await free.close()
        await other.close()

    asyncio.run(run())
