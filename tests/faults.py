"""What the fault tests share: a node that is killed, stopped and started again, programs that are, and the counting of what
was lost and doubled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import insane_nats as nats
from nsnd.status import query
from tests.fault_program import FORGIVING, HEAD, Errors, Marks, number_of
from tests.segments import segments
from tools import servers

PATIENCE_S = 30.0  # a bound, not an expectation: the machine may be slow and busy


async def until(condition: Callable[..., Any], what: str, *arguments: Any) -> Any:
    """The first true value of the condition, a function or coroutine function of the arguments, while the event loop runs.
    AssertionError after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        value = condition(*arguments)
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        await asyncio.sleep(0.005)


@dataclass
class Node:
    """nsnd on one port and one runtime directory, over several of its lives."""

    folder: Path
    runtime: Path
    port: int = field(default_factory=servers.free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, *command: str) -> Node:
        """Returns when it serves its port. command: what nsnd is run by."""
        arguments = [*command, sys.executable, "-m", "nsnd", "--port", str(self.port), "--runtime-dir", str(self.runtime)]
        with (self.folder / "nsnd.log").open("ab") as log:
            self.process = subprocess.Popen(arguments, cwd=servers.ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while servers.read_info(self.port) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.01)
        return self

    def log(self) -> str:
        return (self.folder / "nsnd.log").read_text(errors="replace")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Ends it, and returns when it has ended."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE_S)

    def application(self) -> dict[str, Any]:
        """What nsnd says of its own port: sessions, links, subscriptions."""
        found = [one for one in query(self.runtime / "nsnd.sock")["applications"] if one["application_id"] == self.port]
        return found[0] if found else {"sessions": [], "links": [], "subscriptions": 0}

    def sessions(self) -> int:
        return len(self.application()["sessions"])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Bytes that it occupies."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> list[str]:
        """Doorbells in the directory of its port: one a session."""
        return sorted(path.name for path in (self.runtime / str(self.port)).glob("bell.*"))


    def segments(self) -> list[int]:
        """Numbers of the shared memory segments that it made."""
        return [one.number for one in segments() if one.pid == self.pid]


@contextlib.contextmanager
def running_node(folder: Path, runtime: Path) -> Iterator[Node]:
    node = Node(folder, runtime).start()
    try:
        yield node
    finally:
        with contextlib.suppress(ProcessLookupError):
            node.send(signal.SIGCONT)
        node.kill(signal.SIGTERM)


@dataclass
class Program:
    """A process that runs tests/fault_program.py."""

    process: asyncio.subprocess.Process
    file: Path

    @cached_property
    def marks(self) -> Marks:
        """What it has marked (a program that was started with marked=True)."""
        return Marks(self.file)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def hear(self) -> dict[str, Any]:
        """The next line that it prints."""
        assert self.process.stdout is not None
        async with asyncio.timeout(2 * PATIENCE_S):
            line = await self.process.stdout.readline()
        assert line, f"the program has ended with {await self.process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdin.drain()

    async def ask(self, line: str = "report") -> dict[str, Any]:
        await self.tell(line)
        return await self.hear()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    async def stop(self) -> None:
        """SIGSTOP; returns when it stands still."""
        self.send(signal.SIGSTOP)
        await until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "it stands still")

    def go_on(self) -> None:
        self.send(signal.SIGCONT)

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        await self.process.wait()

    async def end(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ConnectionError):
                await self.tell("end")
            async with asyncio.timeout(PATIENCE_S):
                assert await self.process.wait() == 0


class Programs:
    """Those of one test; whatever still runs at its end is ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all: list[Program] = []

    async def start(self, role: str, url: str, marked: bool = False, environment: dict[str, str] | None = None,
                    command: Sequence[str] = (), **arguments: Any) -> Program:
        """Returns when it runs; what it says first is still to be heard. command: what it is run by."""
        path = self._folder / f"marks-{len(self._all)}"
        if marked:
            arguments["marks"] = str(path)
        process = await asyncio.create_subprocess_exec(
            *command, sys.executable, "-m", "tests.fault_program", role, json.dumps({"url": url, **arguments}),
            cwd=servers.ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        program = Program(process, path)
        self._all.append(program)
        return program

    async def ready(self, role: str, url: str, marked: bool = False, **arguments: Any) -> Program:
        """Returns when it says that it is ready."""
        program = await self.start(role, url, marked, **arguments)
        assert (await program.hear())["ready"]
        return program

    async def end(self) -> None:
        for program in self._all:
            if program.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    program.send(signal.SIGKILL)
                await program.process.wait()


@contextlib.asynccontextmanager
async def programs(folder: Path) -> AsyncIterator[Programs]:
    those = Programs(folder)
    try:
        yield those
    finally:
        await those.end()


class Inbox:
    """Counts numbered messages of a subscription in this process."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.latest_ns = 0
        self.in_order = True
        self._highest = -1

    async def take(self, msg: Any) -> None:
        number = number_of(msg.data)
        self.numbers[number] = self.numbers.get(number, 0) + 1
        self.in_order = self.in_order and number > self._highest
        self._highest = max(number, self._highest)
        self.latest_ns = time.monotonic_ns() - HEAD.unpack_from(msg.data)[1]

    def lost(self, count: int) -> int:
        return sum(number not in self.numbers for number in range(count))

    @property
    def doubled(self) -> int:
        return sum(times > 1 for times in self.numbers.values())

    @property
    def highest(self) -> int:
        """One more than the highest number."""
        return self._highest + 1


@contextlib.asynccontextmanager
async def connection(url: str, **options: Any) -> AsyncIterator[nats.NATS]:
    nc = await nats.connect(url, **({"error_cb": Errors().note, **FORGIVING} | options))
    try:
        yield nc
    finally:
        if not nc.is_closed:
            await nc.close()


def tell(what: str, **figures: Any) -> None:
    """What a test injected and what came of it: shown by pytest -s, and when it fails."""
    words = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()]
    print(f"{what}: {', '.join(words)}")
