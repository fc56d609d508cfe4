"""Programs that the fault tests stop and kill: python -m tests.fault_program ROLE JSON-ARGUMENTS.

Each prints JSON objects, one a line, the first when it has begun, and answers commands from stdin, one a line: "report", "end".
What it did it also marks, message by message, in a file that outlives it (Marks).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import insane_nats as nats
from insane_nats import errors

HEAD = struct.Struct("=QQ")  # a message's number, and when it was published (ns of the monotonic clock)
FORGIVING = {"max_reconnect_attempts": -1, "reconnect_time_wait": 0.2, "connect_timeout": 10}


class Marks:
    """How often each message, by number, was seen: a byte each, in a file that is shared with who made it."""

    def __init__(self, path: str | Path, room: int = 1 << 20) -> None:
        self.path = str(path)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(fd).st_size < room:
            os.ftruncate(fd, room)
        self._map = mmap.mmap(fd, 0)
        os.close(fd)

    def mark(self, number: int) -> None:
        self._map[number] = min(self._map[number] + 1, 255)

    def times(self, count: int) -> bytes:
        """How often each of the first `count` was seen."""
        return self._map[:count]

    @property
    def highest(self) -> int:
        """One more than the highest number that was seen, 0 when none was."""
        return len(self._map[:].rstrip(b"\0"))

    @property
    def total(self) -> int:
        used = self._map[: self.highest]
        return sum(value * used.count(value) for value in set(used))


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


async def commands() -> asyncio.Queue[str]:
    """Lines from stdin; an empty one at its end."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def read() -> None:
        while True:
            line = (await reader.readline()).decode().strip()
            lines.put_nowait(line)
            if not line:
                return

    lines.reader = asyncio.create_task(read())  # type: ignore[attr-defined]
    return lines


def payload(number: int, size: int) -> bytes:
    return HEAD.pack(number, time.monotonic_ns()).ljust(max(size, HEAD.size), bytes([number % 251]))


def number_of(data: bytes) -> int:
    """The message's number; ValueError when its bytes are not what was published."""
    number = int(HEAD.unpack_from(data)[0])
    if data.count(number % 251, HEAD.size) != len(data) - HEAD.size:
        raise ValueError(f"message {number} of {len(data)} bytes is damaged")
    return number


class Errors:
    """An error callback that remembers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.slow: list[int] = []

    async def note(self, error: Exception) -> None:
        if isinstance(error, errors.SlowConsumerError):
            self.slow.append(getattr(error, "dropped", 1))
        self.texts.append(f"{type(error).__name__}: {error}")


async def publish(url: str, subject: str, marks: str = "", size: int = 100, large_every: int = 0, large: int = 50_000,
                  rate: float = 0.0, count: int = 0, connect: dict[str, Any] | None = None) -> None:
    """Publishes numbered messages, `rate` of them a second (0: as many as go), and marks each whose publish has returned."""
    seen = Errors()
    nc = await nats.connect(url, error_cb=seen.note, **(FORGIVING | (connect or {})))
    done = Marks(marks) if marks else None
    lines = await commands()
    say(ready=True)
    assert await lines.get() == "start"
    number = 0
    started = time.monotonic()
    while lines.empty() and (not count or number < count):
        if rate and (early := started + number / rate - time.monotonic()) > 0:
            await asyncio.sleep(early)
        big = large_every and number % large_every == large_every - 1
        await nc.publish(subject, payload(number, large if big else size))
        if done:
            done.mark(number)
        number += 1
    took = time.monotonic() - started
    with contextlib.suppress(errors.FlushTimeoutError):
        await nc.flush(10)
    say(published=number, seconds=took, counters=nc.session_counters, errors=seen.texts)
    while await lines.get() not in ("end", ""):
        say(published=number, seconds=took, counters=nc.session_counters, errors=seen.texts)
    await nc.close()


async def receive(url: str, subject: str, marks: str, queue: str = "", connect: dict[str, Any] | None = None) -> None:
    """Receives numbered messages, marks each, and measures how long they took."""
    got = Marks(marks)
    seen = Errors()
    took: list[int] = []
    nc = await nats.connect(url, error_cb=seen.note, **(FORGIVING | (connect or {})))

    async def message(msg: Any) -> None:
        got.mark(number_of(msg.data))
        took.append(time.monotonic_ns() - HEAD.unpack_from(msg.data)[1])

    await nc.subscribe(subject, queue, cb=message, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await nc.flush()
    lines = await commands()
    say(ready=True)
    while (line := await lines.get()) not in ("end", ""):
        if line == "report":
            took.sort()
            say(received=got.total, slow=seen.slow, errors=seen.texts, counters=nc.session_counters,
                p50_ms=took[len(took) // 2] / 1e6 if took else 0.0, p99_ms=took[len(took) * 99 // 100] / 1e6 if took else 0.0,
                most_ms=took[-1] / 1e6 if took else 0.0)
            took.clear()
    await nc.close()


async def sit(url: str, subject: str, fork: bool = False) -> None:
    """Connects and subscribes, and sits there. fork: a child process does nothing but outlive it."""
    nc = await nats.connect(url, **FORGIVING)
    await nc.subscribe(subject, cb=_ignore)
    child = _fork_idle(nc) if fork else 0
    lines = await commands()
    say(ready=True, node=nc._server_info["insane"]["pid"], child=child)
    await lines.get()
    await nc.close()


async def _ignore(msg: Any) -> None:
    pass


def _fork_idle(nc: nats.NATS) -> int:
    """A child that holds all that it inherited, for a minute at most. It cannot use the connection, and says so."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            nc.publish("fork.child", b"").send(None)
        except errors.ConnectionClosedError:
            os.write(write_end, b"refused")
        for fd in (0, 1, 2):
            os.close(fd)  # the test waits for their end
        while True:
            signal.pause()
    os.close(write_end)
    assert os.read(read_end, 16) == b"refused"
    os.close(read_end)
    return pid


async def crowd(url: str, subject: str, sessions: int, first: int, each: int) -> None:
    """So many connections; each publishes `each` times, all by turns. The messages' numbers begin with `first`."""
    connections = []
    for _ in range(sessions):
        connections.append(await nats.connect(url, **FORGIVING))
    lines = await commands()
    number = first
    for turn in range(each):
        if turn == 1:  # now there are links
            say(ready=True)
            assert await lines.get() == "start"
        for nc in connections:
            await nc.publish(subject, payload(number, 24))
            number += 1
    say(published=sessions * each)
    await lines.get()
    await asyncio.gather(*(nc.close() for nc in connections))


async def order(url: str, subject: str, marks: str) -> None:
    """Receives, marks, and says how far messages came from the place that the time of their publish gives them."""
    got = Marks(marks)
    times: list[int] = []
    nc = await nats.connect(url, **FORGIVING)

    async def message(msg: Any) -> None:
        number, stamp = HEAD.unpack_from(msg.data)
        got.mark(number)
        times.append(stamp)

    await nc.subscribe(subject, cb=message, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await nc.flush()
    lines = await commands()
    say(ready=True)
    while (line := await lines.get()) not in ("end", ""):
        if line == "report":
            ranks = sorted(range(len(times)), key=times.__getitem__)
            moved = max((abs(rank - place) for rank, place in enumerate(ranks)), default=0)
            late = max((max(0, times[ranks[place]] - times[place]) for place in range(len(times))), default=0)
            say(received=len(times), moved=moved, late_ms=late / 1e6, links=nc.session_counters["links_in"])
            times.clear()
    await nc.close()


async def come_and_go(url: str, sessions: int, at_once: int, subject: str) -> None:
    """Makes sessions, so many at once; each subscribes, publishes, hears, and is closed. The last ones stay open."""
    for start in range(0, sessions, at_once):
        connections = await asyncio.gather(*(nats.connect(url, **FORGIVING) for _ in range(at_once)))
        for number, nc in enumerate(connections):
            own = await nc.subscribe(f"own.{start + number}")
            await nc.publish(f"own.{start + number}", b"x" * (20_000 if number % 20 == 0 else 10))
            await own.next_msg(10)
            await nc.publish(subject, HEAD.pack(start + number, 0))
        if start + at_once < sessions:
            await asyncio.gather(*(nc.close() for nc in connections))
            say(made=start + at_once)
    say(made=sessions)
    await (await commands()).get()


def _use_up_descriptors() -> tuple[int, list[int]]:
    """Lowers the limit to what is in use, and opens what is left below it. Returns the hard limit, and what was opened."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/proc/self/fd")) + 1, hard))
    opened = [last]
    with contextlib.suppress(OSError):
        while True:
            opened.append(os.dup(last))
    return hard, opened


async def _outcome(call: Awaitable[object]) -> str:
    """Empty when it returned, else its error."""
    try:
        await call
    except (errors.Error, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


async def no_descriptors(url: str, subject: str, new: str) -> None:
    """Receives while no descriptor can be had; tries what needs one; then they can be had again."""
    seen = Errors()
    got: list[int] = []
    nc = await nats.connect(url, error_cb=seen.note, **FORGIVING)

    async def message(msg: Any) -> None:
        got.append(number_of(msg.data))

    await nc.subscribe(subject, cb=message)
    await nc.flush()
    lines = await commands()
    hard, opened = _use_up_descriptors()
    say(ready=True)
    while (line := await lines.get()) not in ("end", ""):
        if line == "report":
            say(received=sorted(got), errors=seen.texts[:5])
        elif line == "connect":
            others = Errors()
            once = {"max_reconnect_attempts": 1, "reconnect_time_wait": 0.02, "connect_timeout": 2}
            say(error=await _outcome(nats.connect(url, error_cb=others.note, **once)), said=others.texts[-1:])
        elif line == "publish":
            say(error=await _outcome(nc.publish(new, payload(0, 100))), connected=nc.is_connected)
        elif line == "free":
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            for fd in opened:
                os.close(fd)
            say(free=True)
    await nc.close()


async def attempt(url: str) -> None:
    """Connects once, and says what came of it."""
    say(error=await _outcome(nats.connect(url, error_cb=Errors().note, allow_reconnect=False)))


def _mount_small(directory: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", directory], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def full_file_system(url: str, directory: str, port: int) -> None:
    """In a mount namespace of its own: nsnd's directory on a tmpfs of 4 MiB, which is then filled to the last page."""
    from tests.faults import Inbox, Node, until

    _mount_small(directory)
    node = Node(Path("/tmp"), Path(directory), port).start()
    try:
        seen, inbox = Errors(), Inbox()
        nc = await nats.connect(url, error_cb=seen.note, **FORGIVING)
        other = await nats.connect(url, error_cb=seen.note, **FORGIVING)
        await other.subscribe("x", cb=inbox.take)
        filler = Path(directory, "filler")
        _fill(filler)
        connect = await _outcome(nats.connect(url, error_cb=Errors().note, connect_timeout=2, allow_reconnect=False))
        for number in range(300):
            await nc.publish("x", payload(number, 30_000 if number % 10 == 0 else 100))
        subscriptions: list[Any] = []
        while not seen.texts and len(subscriptions) < 5000:
            subscriptions.append(await nc.subscribe(f"more.{len(subscriptions)}", cb=_ignore))
        refused = list(seen.texts)
        for sub in subscriptions[:-1]:
            await sub.unsubscribe()
        await nc.flush()
        left = node.application()["subscriptions"]
        os.unlink(filler)
        late = Inbox()
        again = await nats.connect(url, **FORGIVING)
        await again.subscribe("late", cb=late.take)
        await nc.publish("late", payload(0, 100))
        await until(lambda: inbox.highest == 300 and late.highest == 1, "all have come")
        say(connect=connect, refused=refused, subscriptions=len(subscriptions), left=left, lost=inbox.lost(300) + late.lost(1),
            doubled=inbox.doubled, alive=node.process is not None and node.process.poll() is None)
        for one in (nc, other, again):
            await one.close()
    finally:
        node.kill(signal.SIGTERM)


ROLES: dict[str, Callable[..., Awaitable[None]]] = {
    "publish": publish,
    "receive": receive,
    "sit": sit,
    "crowd": crowd,
    "come_and_go": come_and_go,
    "order": order,
    "no_descriptors": no_descriptors,
    "attempt": attempt,
    "full_file_system": full_file_system,
}

if __name__ == "__main__":
    asyncio.run(ROLES[sys.argv[1]](**json.loads(sys.argv[2])))  # type: ignore[arg-type]
