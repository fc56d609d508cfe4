"""Several users in one test, which runs as root: a node of one of them, and programs of others, each a forked process that
has given root up and does what the test tells it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import insane_nats as nats
import nsnd.command
from nsnd.status import StatusError, query
from tests.nsnd_client import until
from tests.segments import Segment, segments
from tools.servers import free_port

# Imported here, and not when they are needed: another user may not be able to read the interpreter's files.
for _name in ("encodings.ascii", "encodings.idna", "encodings.latin_1", "tomllib", "pwd", "shutil", "difflib", "ipaddress",
              "traceback", "asyncio.staggered", "nsnd.server",
              "nsnd.auth_config", "nsnd.relays", "nats.errors", "multiprocessing.connection"):
    import_module(_name)

OWNER, ALICE, BOB = 61000, 61001, 61002
PLACE_SIZE = 20480  # bytes of a struct nsn_place
PATIENCE_S = 30.0

Play = Callable[["Stage"], Coroutine[Any, Any, object]]


class Stage:
    """A program's side: its connections, and its way to talk with the test."""

    def __init__(self, url: str, directory: Path, port: int, pipe: Connection) -> None:
        self.url = url
        self.directory = directory
        self.port = port
        self._pipe = pipe

    async def connect(self, **options: Any) -> nats.NATS:
        return await nats.connect(self.url, **{"reconnect_time_wait": 0.05, "max_reconnect_attempts": -1, **options})

    def say(self, what: object) -> None:
        self._pipe.send(what)

    async def hear(self) -> Any:
        """What the test tells next."""
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._pipe.fileno())
        return self._pipe.recv()


@dataclass
class Actor:
    """The test's side of a program of another user."""

    pid: int
    pipe: Connection
    ended: bool = False

    def tell(self, what: object) -> None:
        self.pipe.send(what)

    def hear(self) -> Any:
        """What the program says next. AssertionError with its traceback when it failed."""
        assert self.pipe.poll(PATIENCE_S), f"the program of pid {self.pid} says nothing"
        try:
            what = self.pipe.recv()
        except EOFError:
            what = RuntimeError(f"the program of pid {self.pid} has ended")
        if isinstance(what, RuntimeError):
            raise AssertionError(str(what))
        return what

    def ask(self, what: object) -> Any:
        self.tell(what)
        return self.hear()

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended:
            os.kill(self.pid, number)
            os.waitpid(self.pid, 0)
            self.ended = True

    def end(self) -> None:
        """Waits until it has done its part."""
        done, status = until(lambda: _wait(self.pid), "the program ends", PATIENCE_S)
        self.ended = True
        assert done == self.pid
        assert os.waitstatus_to_exitcode(status) == 0, self.hear()


def _wait(pid: int) -> tuple[int, int] | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return (done, status) if done else None


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def fork_as(uid: int, work: Callable[[], object]) -> int:
    """The process that does it, and then ends: with 0 when that went well."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir("/")
        become(uid)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@dataclass
class SharedNode:
    """nsnd of one user, that others may use; over several of its lives."""

    directory: Path
    uid: int
    port: int = field(default_factory=free_port)
    pid: int = 0
    actors: list[Actor] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def socket(self) -> Path:
        return self.directory / "nsnd.sock"

    def allow(self, *users: int, more: str = "") -> None:
        """What nsnd.cfg says, for the next start, or SIGHUP."""
        text = f"[global]\nmax_payload = {64 << 20}\n[access]\nusers = {list(users)}\n{more}"
        (self.directory / "nsnd.cfg").write_text(text)

    def start(self) -> SharedNode:
        log = os.open(self.directory / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

        def run() -> None:
            os.dup2(log, 1)
            os.dup2(log, 2)
            nsnd.command.nsnd(["--runtime-dir", str(self.directory), "--port", str(self.port), "--log-level", "debug",
                               "--config", str(self.directory / "nsnd.cfg")], prog_name="nsnd")

        self.pid = fork_as(self.uid, run)
        os.close(log)
        until(self._answers, "nsnd answers")
        return self

    def _answers(self) -> bool:
        assert not _wait(self.pid), self.log()
        with contextlib.suppress(StatusError):
            return bool(self.status()["node"]["pid"] == self.pid)
        return False

    def status(self) -> dict[str, Any]:
        """Asked as the node's own user: root is another one."""
        os.seteuid(self.uid)
        try:
            return query(self.socket)
        finally:
            os.seteuid(0)

    def sessions(self) -> list[dict[str, Any]]:
        found = [one for one in self.status()["applications"] if one["application_id"] == self.port]
        return list(found[0]["sessions"]) if found else []

    def log(self) -> str:
        return (self.directory / "stderr").read_text(errors="replace")

    def reread(self) -> None:
        before = self.log().count("configuration reread")
        os.kill(self.pid, signal.SIGHUP)
        until(lambda: self.log().count("configuration reread") > before, "it has read its configuration again")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        os.waitpid(self.pid, 0)
        self.pid = 0

    def act(self, uid: int, play: Play) -> Actor:
        """Starts a program of that user."""
        here, there = Pipe()

        def run() -> None:
            here.close()
            try:
                asyncio.run(_play(play, Stage(self.url, self.directory, self.port, there)))
            except BaseException:
                there.send(RuntimeError(traceback.format_exc()))
                raise

        actor = Actor(fork_as(uid, run), here)
        there.close()
        self.actors.append(actor)
        return actor


async def _play(play: Play, stage: Stage) -> None:
    await play(stage)


@contextlib.contextmanager
def shared_node(uid: int = OWNER, users: tuple[int, ...] = (ALICE, BOB)) -> Iterator[SharedNode]:
    """A node that has started. At its end nothing of it, nor of the programs, is left."""
    directory = Path(tempfile.mkdtemp(prefix="nsnd-users-", dir="/dev/shm"))
    os.chown(directory, uid, uid)
    node = SharedNode(directory, uid)
    node.allow(*users)
    try:
        yield node.start()
        for actor in node.actors:
            actor.kill()
        if node.pid:
            until(lambda: not node.sessions(), "all sessions have ended")
            node.kill(signal.SIGTERM)
            assert sorted(os.listdir(directory)) == ["nsnd.cfg", "stderr"], node.log()
        until(lambda: not shared_memory(), "no shared memory segment is left")
    finally:
        for actor in node.actors:
            actor.kill()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it did not start, or has ended
            if node.pid:
                node.kill()
        shutil.rmtree(directory, ignore_errors=True)


def shared_memory() -> list[Segment]:
    """Segments of the users here."""
    return [one for one in segments() if one.uid in (OWNER, ALICE, BOB)]


def places() -> list[Segment]:
    """Those of them that are the place of one session."""
    return [one for one in shared_memory() if one.size == PLACE_SIZE]


def outcome(uid: int, work: Callable[[], object]) -> None:
    """Has a process of that user do it; AssertionError when it fails."""
    read_end, write_end = os.pipe()

    def run() -> None:
        os.dup2(write_end, 2)
        work()

    pid = fork_as(uid, run)
    os.close(write_end)
    with os.fdopen(read_end) as words:
        said = words.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said

