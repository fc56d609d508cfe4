"""What the tests of nsnd share: a node in a process of its own, and a session in plain Python sockets."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nsnd import protocol as p
from nsnd._fabric import ffi, lib
from nsnd.runtime import RuntimeDirectory
from nsnd.status import StatusError, query
from tools.servers import free_port

PATIENCE_S = 10.0


def until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """The first true value of the condition; fails after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.002)


@contextlib.contextmanager
def runtime_directory() -> Iterator[Path]:
    """A private one, in shared memory; whoever runs in it at the end is ended."""
    path = Path(tempfile.mkdtemp(prefix="nsnd-test-", dir="/dev/shm"))
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.chmod(0o700)
            runtime = RuntimeDirectory(path)
            record = runtime.record()
            if record is not None and runtime.node_runs():
                os.kill(record.pid, signal.SIGKILL)
        shutil.rmtree(path, ignore_errors=True)


class Packet(NamedTuple):
    kind: p.PacketType
    raw: bytes
    fds: list[int]


@dataclass
class RawNode:
    """nsnd in the foreground, as a child of the test."""

    directory: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.directory / "nsnd.sock"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "nsnd", "--runtime-dir", str(self.directory), "--port", str(self.port), *arguments]

    def start(self, *arguments: str) -> RawNode:
        with (self.directory / "stderr").open("ab") as log:
            self.process = subprocess.Popen(self.command("--log-level", "debug", *arguments), stderr=log)
        until(self._answers, "nsnd answers")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(StatusError):
            return bool(self.status()["node"]["pid"] == self.process.pid)
        return False

    def kill(self, signum: int = signal.SIGKILL) -> int:
        """Ends it, and returns its exit status."""
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(PATIENCE_S)

    def signal(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    def log(self) -> str:
        return (self.directory / "stderr").read_text()

    def status(self) -> dict[str, Any]:
        return query(self.socket)

    def application(self) -> dict[str, Any]:
        """Of this node's own port."""
        found = [one for one in self.status()["applications"] if one["application_id"] == self.port]
        return found[0] if found else {"sessions": [], "links": [], "subscriptions": 0}

    def session(self, name: str = "", **more: int) -> RawSession:
        session = RawSession(self.socket, self.port, name)
        session.attach(**more)
        return session


@contextlib.contextmanager
def node(*arguments: str) -> Iterator[RawNode]:
    """A node that has started, in a directory of its own."""
    with runtime_directory() as directory:
        running = RawNode(directory)
        try:
            yield running.start(*arguments)
        finally:
            if running.process is not None and running.process.poll() is None:
                running.kill()


class SharedTable:
    """The table of sessions as a session of any user sees it. It outlives nsnd for as long as one is open."""

    def __init__(self, directory: str) -> None:
        self._map: Any = ffi.gc(ffi.new("struct nsn_slots_map *"), lib.nsn_slots_unmap)
        error = ffi.new("char[]", 256)
        assert lib.nsn_slots_map(self._map, directory.encode(), True, error, 256) == 0, ffi.string(error)

    @property
    def slot(self) -> Any:
        return self._map.slots.slot

    def identity(self, slot: int) -> tuple[int, int]:
        first, second = self.slot[slot].identity
        return first, second

    def close(self) -> None:
        ffi.release(self._map)


class RawSession:
    """A session that speaks the control protocol, and has the shared table open; nothing else of the fabric."""

    def __init__(self, path: Path, application_id: int, name: str = "") -> None:
        self.path = path
        self.application_id = application_id
        self.name = name
        self.identity = (secrets.randbits(64), secrets.randbits(64))
        self.slot = p.NO_SLOT
        self.generation = 0
        self.sequence = 0
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.welcome: p.Welcome | None = None
        self.bell: socket.socket | None = None
        self.table: SharedTable | None = None

    def bind_bell(self) -> None:
        """A session has a doorbell; nobody rings it here."""
        assert self.welcome is not None
        self.bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bell.bind(f"{self.welcome.directory}/bell.{self.slot}")

    def connect(self) -> None:
        self.sock.close()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(str(self.path))  # waits while nsnd has more to accept than there is room for
        self.sock.settimeout(PATIENCE_S)

    def say_hello(self, version_max: int = 1, version_min: int = 1, *, answers: bool = False) -> None:
        self.sock.send(p.pack_hello(p.Hello(version_max, self.application_id, version_min, self.identity, self.slot,
                                            self.generation, self.sequence, self.name, answers=answers)))

    def attach(self, version_max: int = 1, version_min: int = 1) -> p.Welcome:
        self.connect()
        self.say_hello(version_max, version_min)
        return self.welcomed()

    def challenged(self) -> str:
        """Says HELLO to a node that asks for credentials; the nonce."""
        self.connect()
        self.say_hello(answers=True)
        return p.unpack_challenge(self.expect(p.PacketType.CHALLENGE).raw)

    def log_in(self, **credentials: str) -> p.Welcome:
        """Under the names that CONNECT has for them; "password" is "pass" there."""
        self.challenged()
        self.answer(**credentials)
        return self.welcomed()

    def answer(self, **credentials: str) -> None:
        names = {"password": "pass"}
        document = json.dumps({names.get(name, name): value for name, value in credentials.items()})
        self.sock.send(p.pack_credentials(document.encode()))

    def welcomed(self) -> p.Welcome:
        welcome = p.unpack_welcome(self.expect(p.PacketType.WELCOME).raw)
        self.slot, self.generation, self.welcome = welcome.slot, welcome.generation, welcome
        before, self.table = self.table, SharedTable(welcome.directory)
        if before:
            before.close()
        return welcome

    def receive(self, timeout_s: float = PATIENCE_S) -> Packet | None:
        """The next packet, None at the end of the connection; TimeoutError."""
        self.sock.settimeout(timeout_s)
        try:
            raw, ancillary, _, _ = self.sock.recvmsg(p.PACKET_MAX, socket.CMSG_SPACE(16))
        except ConnectionResetError:
            return None
        fds = array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        return Packet(p.PacketType(p.PACKET.unpack_from(raw)[1]), raw, fds.tolist()) if raw else None

    def expect(self, kind: p.PacketType) -> Packet:
        packet = self.receive()
        assert packet is not None, f"the connection ended, and {kind.name} was expected"
        assert packet.kind == kind, f"{packet.kind.name} came, {kind.name} was expected: {packet.raw[:200]!r}"
        return packet

    def refused(self) -> p.Refused:
        """What a REFUSED says; the connection ends behind it."""
        answer = p.unpack_refused(self.expect(p.PacketType.REFUSED).raw)
        assert self.receive() is None
        return answer

    def nothing_comes(self, for_s: float = 0.05) -> bool:
        try:
            self.receive(for_s)
        except TimeoutError:
            return True
        return False

    def send(self, kind: p.PacketType, body: bytes = b"", fd: int | None = None) -> None:
        packet = p.PACKET.pack(p.MAGIC, kind, 1) + body
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        self.sock.sendmsg([packet], rights)

    def interest(self, *changes: bytes, sequence: int | None = None) -> int:
        """Sends a batch, and returns its number."""
        self.sequence += 1
        number = self.sequence if sequence is None else sequence
        body = b"".join(changes)
        self.sock.send(p.INTEREST.pack(p.MAGIC, p.PacketType.INTEREST, 1, number, len(changes), len(body)) + body)
        return number

    def interest_done(self) -> tuple[int, int, int]:
        """(sequence, error, failed) of the next INTEREST_DONE."""
        fields = p.INTEREST_DONE.unpack(self.expect(p.PacketType.INTEREST_DONE).raw)
        return fields[3], fields[4], fields[5]

    def subscribe(self, sid: int, pattern: str, queue: str = "") -> None:
        """And waits until it is in the log."""
        number = self.interest(add(sid, pattern, queue))
        assert self.interest_done() == (number, 0, 0)

    def link(self, to: RawSession, link_id: int, fd: int | None = None) -> None:
        """Hands a descriptor over to a session: the given one, or a memfd of its own."""
        own = os.memfd_create(f"link-{link_id}") if fd is None else fd
        body = p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, to.slot, to.generation, link_id, 0, 0)
        self.send(p.PacketType.LINK, body[p.PACKET.size :], own)
        if fd is None:
            os.close(own)

    def take_link(self) -> tuple[int, int, int]:
        """(producer's slot, generation, link's number) of the next LINK, which is taken."""
        packet = self.expect(p.PacketType.LINK)
        assert len(packet.fds) == 1
        os.close(packet.fds[0])
        self.send(p.PacketType.TAKEN)
        fields = p.LINK.unpack(packet.raw)
        return fields[3], fields[4], fields[5]

    def peer_gone(self) -> tuple[int, int]:
        """(slot, generation) of the next PEER_GONE."""
        fields = p.PEER_GONE.unpack(self.expect(p.PacketType.PEER_GONE).raw)
        return fields[3], fields[4]

    def goodbye(self) -> None:
        self.send(p.PacketType.GOODBYE)
        assert self.receive() is None
        self.close()

    def close(self) -> None:
        """As one that dies: without a word."""
        self.sock.close()
        if self.table:
            self.table.close()

    def leave(self) -> None:
        """Whatever state it is in."""
        with contextlib.suppress(OSError):
            self.send(p.PacketType.GOODBYE)
            while self.receive() is not None:
                pass
        self.close()


def add(sid: int, pattern: str, queue: str = "") -> bytes:
    """A struct nsn_interest_change, padded to 8 bytes."""
    strings = pattern.encode() + queue.encode()
    raw = p.INTEREST_CHANGE.pack(1, 0, len(pattern.encode()), len(queue.encode()), 0, sid, 0) + strings
    return raw + b"\0" * (-len(raw) % 8)


def remove(sid: int) -> bytes:
    return p.INTEREST_CHANGE.pack(2, 0, 0, 0, 0, sid, 0)


@dataclass
class Child:
    """A forked process that did something and now waits to be killed."""

    pid: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextlib.contextmanager
def child(work: Callable[[], object]) -> Iterator[Child]:
    """Runs work() in a forked process, and goes on when it has done that; it is killed at the end at the latest."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = work()
            os.write(write_end, b"." if kept is not False else b"!")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(write_end)
    try:
        assert os.read(read_end, 1) == b".", "the child's work failed"
        yield Child(pid)
    finally:
        os.close(read_end)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
