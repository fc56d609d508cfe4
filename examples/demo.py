"""`make demo`: ping.py and pong.py, two plain NATS programs, once against a nats-server and once under `insane-nats run`.

Private ports and a private runtime directory; what was started is ended again, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools import servers

EXAMPLES = Path(__file__).resolve().parent
SECONDS = 120


@dataclass(frozen=True)
class World:
    """One way to run a program: the command before it, and its environment."""

    title: str
    prefix: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Figures:
    """Round trips, µs."""

    p50: float
    p99: float


@dataclass(frozen=True)
class Case:
    """One way to ping."""

    title: str
    arguments: list[str]


CASES = (
    Case("tight loop, 64 bytes", ["--count", "10000"]),
    Case("10 a second, 64 bytes", ["--count", "50", "--rate", "10"]),
)


@contextlib.contextmanager
def pong_running(world: World, log: Path) -> Iterator[None]:
    """pong.py, until the block ends."""
    with log.open("wb") as output:
        command = [*world.prefix, str(EXAMPLES / "pong.py")]
        process = subprocess.Popen(command, env=world.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
    finally:
        stopped_by_itself = process.poll()
        servers.stop(process)
        if stopped_by_itself is not None:
            print(f"pong.py ended with {stopped_by_itself}:\n{log.read_text(errors='replace')}", file=sys.stderr)


def ping(world: World, case: Case) -> Figures:
    """Runs ping.py and reads its last line."""
    command = [*world.prefix, str(EXAMPLES / "ping.py"), *case.arguments]
    done = subprocess.run(
        command, env=world.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )
    found = re.search(r"p50 ([\d.]+) µs, p99 ([\d.]+) µs", done.stdout)
    if done.returncode or not found:
        raise SystemExit(f"demo: {' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return Figures(float(found[1]), float(found[2]))


def measure(world: World, folder: Path) -> list[Figures]:
    """All cases, with one pong.py."""
    print(f"{world.title}: {' '.join([Path(world.prefix[0]).name, *world.prefix[1:]])} examples/ping.py", flush=True)
    with pong_running(world, folder / "pong.log"):
        results = []
        for case in CASES:
            results.append(ping(world, case))
            print(f"    {case.title}: p50 {results[-1].p50:.1f} µs, p99 {results[-1].p99:.1f} µs", flush=True)
    return results


def table(theirs: list[Figures], ours: list[Figures]) -> str:
    """Both distributions and their ratio."""
    lines = [f"{'round trip, µs':24}{'':6}{'nats-server':>12}{'insane_nats':>13}{'ratio':>10}"]
    for case, their, our in zip(CASES, theirs, ours, strict=True):
        for title, name, a, b in ((case.title, "p50", their.p50, our.p50), ("", "p99", their.p99, our.p99)):
            lines.append(f"{title:24}{name:6}{a:12.1f}{b:13.1f}{a / b:8.1f} ×")
    return "\n".join(lines)


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="insane_nats-demo-") as temporary,
        servers.private_runtime_dir() as runtime_dir,
        servers.nats_server(Path(temporary)) as server,
    ):
        plain = World("nats-py and nats-server", [sys.executable], {**os.environ, "NATS_URL": server.url})
        url = f"nats://127.0.0.1:{servers.free_port()}"
        environment = {**os.environ, "NATS_URL": url, "INSANE_NATS_RUNTIME_DIR": str(runtime_dir)}
        shared = World("insane_nats, the same programs", [servers.command_path("insane-nats"), "run"], environment)
        theirs = measure(plain, Path(temporary))
        ours = measure(shared, Path(temporary))
    print()
    print(table(theirs, ours))


if __name__ == "__main__":
    main()
