"""Runs one scenario once on one side: starts its programs, reads their result and the CPU time of all processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.scenarios import Scenario
from benchmarks.worker import Task
from tools.servers import ROOT

READY_S = 30.0
RESULT_S = 180.0


@dataclass(frozen=True)
class WithUsers:
    """A server that tells two users apart: the URLs of the one with permissions and of the other, and its process."""

    limited_url: str
    free_url: str
    pid: int


@dataclass(frozen=True)
class Side:
    """One of the two worlds: the module that programs import, its server's URL and process, the nats-server's, and its server
    that has users."""

    name: str
    module: str
    url: str
    server_pid: int
    plain_url: str
    plain_pid: int
    users: WithUsers | None = None  # where a scenario asks for it

    def server(self, scenario: Scenario, role: str) -> tuple[str, int]:
        """URL and process of the one that a program talks to."""
        if scenario.limited:
            assert self.users is not None
            return self.users.limited_url if role in scenario.limited else self.users.free_url, self.users.pid
        return (self.plain_url, self.plain_pid) if scenario.plain else (self.url, self.server_pid)


@dataclass
class Outcome:
    """Metrics of one run, and why it does not count, if it does not."""

    metrics: dict[str, float] = field(default_factory=dict)
    trouble: str = ""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, ended threads included, in nanoseconds' resolution: the clock that
    clock_getcpuclockid(3) names (/proc/PID/stat has the same figure in hundredths of a second)."""
    return time.clock_gettime((~pid << 3) | 2)


class Program:
    """A running benchmarks.worker."""

    def __init__(self, process: asyncio.subprocess.Process, role: str) -> None:
        self.process = process
        self.role = role

    async def line(self, timeout_s: float) -> str:
        assert self.process.stdout is not None
        raw = await asyncio.wait_for(self.process.stdout.readline(), timeout_s)
        if not raw:
            raise RuntimeError(f"{self.role} ended with {await self.process.wait()}")
        return raw.decode().strip()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())

    async def ready(self) -> None:
        while await self.line(READY_S) != "ready":
            pass


@contextlib.asynccontextmanager
async def program(task: Task) -> AsyncIterator[Program]:
    """Started; killed at the end of the block if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(task)),
        cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24,
    )  # fmt: skip
    try:
        yield Program(process, task.role)
    finally:
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()


def percentile(ordered: list[int], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def metrics_of(result: dict[str, Any], deliveries: int, cpu_us: float) -> Outcome:
    """The figures that rows are read from."""
    if result["lost"]:
        return Outcome(trouble=f"{result['lost']} lost or wrong")
    if "times_ns" in result:
        times = sorted(result["times_ns"])
        return Outcome({f"p{percent}_us": percentile(times, percent) / 1000 for percent in (50, 99)})
    if "kib" in result:
        return Outcome({"kib": result["kib"]})
    seconds, count = result["seconds"], result["published"]
    rates = {"received_s": deliveries / seconds, "milliseconds": seconds * 1000, "each_us": seconds / count * 1e6}
    return Outcome({**rates, "cpu_us": cpu_us})


async def run(scenario: Scenario, side: Side, quick: bool = False, loop: str = "asyncio") -> Outcome:
    """One run. What goes wrong with it is told by Outcome.trouble."""
    try:
        return await _run(scenario, side, quick, loop)
    except (RuntimeError, TimeoutError) as error:
        return Outcome(trouble=f"{type(error).__name__}: {error}")


async def _run(scenario: Scenario, side: Side, quick: bool, loop: str) -> Outcome:
    query = f"?{scenario.qos}" if scenario.qos and side.module == "insane_nats" else ""

    def task(role: str) -> Task:
        return Task(role, side.module, side.server(scenario, role)[0] + query, **options)

    options = {**scenario.options, **(scenario.quick if quick else {}), "loop": loop}
    async with contextlib.AsyncExitStack() as stack:
        passive = []
        for role in scenario.passive:
            passive.append(await stack.enter_async_context(program(task(role))))
        for one in passive:
            await one.ready()
            one.tell("go")
        active = await stack.enter_async_context(program(task(scenario.active)))
        await active.ready()
        others = [side.server(scenario, scenario.active)[1], *(one.process.pid for one in passive)]
        before = sum(map(cpu_seconds, others))
        active.tell("go")
        result = json.loads(await active.line(RESULT_S))
        cpu_s = result["process_cpu_s"] + sum(map(cpu_seconds, others)) - before
        expected = options["count"] + options.get("warm_up", 0) * options.get("burst", 1)
        for one in passive:
            one.tell("stop")
            said = json.loads(await one.line(READY_S))
            if said.get("received", expected) != expected or said.get("wrong"):
                words = f"a subscriber has {said['received']} of {expected} messages, {said['wrong']} of them wrong"
                return Outcome(trouble=words)
        return metrics_of(result, options["count"] * options.get("subscribers", 1), cpu_s / expected * 1e6)
