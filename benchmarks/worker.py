"""One program of a benchmark: `python -m benchmarks.worker JSON`, where JSON has the fields of Task.

It says "ready" when it is connected and subscribed, waits for "go", and writes its result as one line of JSON. The programs
that only answer run until "stop". The module under test is the only thing that differs between the two sides.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 10.0
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What to do.

    period: payloads end with 0, 1, … period - 1 in turn, so that a lost or repeated message shows.
    burst: messages published before the subscribers' word that all are there is waited for, so that neither a server's
    limit of 64 MB behind nor a client's of 524,288 messages loses any.
    """

    role: str
    module: str
    url: str
    count: int = 0
    size: int = 64
    warm_up: int = 0
    rate: float = 0.0
    burst: int = 1
    period: int = 251
    subscribers: int = 1
    distinct_subjects: bool = False


def payloads(task: Task) -> list[bytes]:
    """One period of payloads."""
    body = bytes(max(0, task.size - 1))
    return [body + bytes([index]) for index in range(task.period)]


async def line_from_parent() -> str:
    line: str = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return line.strip()


def say(text: str) -> None:
    print(text, flush=True)


class Worker:
    """A connection, and the roles it can play."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.nats = importlib.import_module(task.module)
        self.cpu_at_start = 0.0

    async def connect(self) -> Any:
        return await self.nats.connect(self.task.url, name=self.task.role, error_cb=self.report)

    async def report(self, error: Exception) -> None:
        print(f"{self.task.role}: {error!r}", file=sys.stderr, flush=True)

    async def go(self) -> None:
        """Says that all is set up, and waits for the start."""
        say("ready")
        if await line_from_parent() != "go":
            raise SystemExit(1)
        self.cpu_at_start = time.process_time()

    async def answer(self, result: Callable[[], Result]) -> Result:
        """For programs that only answer: runs until "stop"."""
        await self.go()
        await line_from_parent()
        return result()

    def check(self, data: bytes, number: int) -> bool:
        return len(data) == self.task.size and data[-1] == number % self.task.period

    # --- round trips: publish and next_msg -----------------------------------------------------------------------------
    async def pong(self) -> Result:
        client = await self.connect()
        pings = await client.subscribe("bench.ping")
        await client.flush()
        answering = asyncio.ensure_future(self.answer_pings(client, pings))
        result = await self.answer(lambda: {})
        answering.cancel()
        await asyncio.wait([answering])
        await client.close()
        return result

    async def answer_pings(self, client: Any, pings: Any) -> None:
        while True:
            message = await pings.next_msg(timeout=None)
            await client.publish("bench.pong", message.data)

    async def ping(self) -> Result:
        client = await self.connect()
        pongs = await client.subscribe("bench.pong")
        await client.flush()
        await self.go()
        bodies = payloads(self.task)
        wrong = 0
        times: list[int] = []
        due = time.monotonic()
        for number in range(-self.task.warm_up, self.task.count):
            if self.task.rate and number >= 0:
                due += 1 / self.task.rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            begin = time.perf_counter_ns()
            await client.publish("bench.ping", bodies[number % self.task.period])
            message = await pongs.next_msg(timeout=TIMEOUT_S)
            data = bytes(message.data)
            elapsed = time.perf_counter_ns() - begin
            wrong += not self.check(data, number)
            if number >= 0:
                times.append(elapsed)
            elif not self.task.rate:
                due = time.monotonic()
        await client.close()
        return {"times_ns": times, "lost": wrong}

    # --- one way: bursts into callbacks --------------------------------------------------------------------------------
    async def sink(self) -> Result:
        client = await self.connect()
        received = wrong = 0

        async def take(message: Any) -> None:
            nonlocal received, wrong
            wrong += not self.check(bytes(message.data), received % self.task.burst)
            received += 1
            if received % self.task.burst == 0:
                await client.publish("bench.taken", b"")

        await client.subscribe("bench.data.>", cb=take)
        await client.flush()
        result = await self.answer(lambda: {"received": received, "wrong": wrong})
        await client.close()
        return result

    async def source(self) -> Result:
        client = await self.connect()
        taken = await client.subscribe("bench.taken")
        await client.flush()
        task, bodies = self.task, payloads(self.task)
        subjects = [f"bench.data.{index}" for index in range(task.count)] if task.distinct_subjects else []
        await self.go()
        for _ in range(task.warm_up):
            await self.send_burst(client, taken, ["bench.data.x"] * task.burst, bodies)
        begin = time.perf_counter()
        lost = False
        for start in range(0, task.count, task.burst):
            part = subjects[start : start + task.burst] if subjects else ["bench.data.x"] * task.burst
            if not await self.send_burst(client, taken, part, bodies):
                lost = True
                break
        seconds = time.perf_counter() - begin
        await client.close()
        return {"seconds": seconds, "published": task.count, "lost": int(lost)}

    async def send_burst(self, client: Any, taken: Any, subjects: list[str], bodies: list[bytes]) -> bool:
        """Publishes to each subject once, and waits until every subscriber has all; False when one says nothing."""
        publish, period = client.publish, self.task.period
        for number, subject in enumerate(subjects):
            await publish(subject, bodies[number % period])
        try:
            for _ in range(self.task.subscribers):
                await taken.next_msg(timeout=TIMEOUT_S)
        except self.nats.errors.TimeoutError:
            return False
        return True

    async def paced_source(self) -> Result:
        client = await self.connect()
        taken = await client.subscribe("bench.taken")
        await client.flush()
        task, bodies = self.task, payloads(self.task)
        await self.go()
        begin = due = time.monotonic()
        for number in range(task.count):
            due += 1 / task.rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await client.publish("bench.data.x", bodies[number % task.burst % task.period])
        lost = 0
        try:
            for _ in range(task.count // task.burst):
                await taken.next_msg(timeout=TIMEOUT_S)
        except self.nats.errors.TimeoutError:
            lost = 1
        seconds = time.monotonic() - begin
        await client.close()
        return {"seconds": seconds, "published": task.count, "lost": lost}

    # --- requests ------------------------------------------------------------------------------------------------------
    async def serve_requests(self, client: Any) -> None:
        async def respond(message: Any) -> None:
            await message.respond(message.data)

        await client.subscribe("bench.request", cb=respond)
        await client.flush()

    async def responder(self) -> Result:
        client = await self.connect()
        await self.serve_requests(client)
        result = await self.answer(lambda: {})
        await client.close()
        return result

    async def send_requests(self, client: Any) -> Result:
        task, bodies = self.task, payloads(self.task)
        await self.go()
        wrong = 0
        begin = time.perf_counter()
        for number in range(-task.warm_up, task.count):
            if number == 0:
                begin = time.perf_counter()
            message = await client.request("bench.request", bodies[number % task.period], timeout=TIMEOUT_S)
            wrong += not self.check(bytes(message.data), number)
        return {"seconds": time.perf_counter() - begin, "published": task.count, "lost": wrong}

    async def requester(self) -> Result:
        client = await self.connect()
        result = await self.send_requests(client)
        await client.close()
        return result

    async def requests_on_one_loop(self) -> Result:
        serving, asking = await self.connect(), await self.connect()
        await self.serve_requests(serving)
        result = await self.send_requests(asking)
        await asking.close()
        await serving.close()
        return result

    # --- control -------------------------------------------------------------------------------------------------------
    async def subscribes(self) -> Result:
        client = await self.connect()
        await self.go()
        begin = time.perf_counter()
        for index in range(self.task.count):
            await client.subscribe(f"bench.many.{index}")
        await client.flush()
        seconds = time.perf_counter() - begin
        await client.close()
        return {"seconds": seconds, "published": self.task.count, "lost": 0}

    async def connects(self) -> Result:
        await (await self.connect()).close()
        await self.go()
        begin = time.perf_counter()
        for _ in range(self.task.count):
            await (await self.connect()).close()
        return {"seconds": time.perf_counter() - begin, "published": self.task.count, "lost": 0}


ROLES: dict[str, Callable[[Worker], Awaitable[Result]]] = {
    "pong": Worker.pong,
    "ping": Worker.ping,
    "sink": Worker.sink,
    "source": Worker.source,
    "paced_source": Worker.paced_source,
    "responder": Worker.responder,
    "requester": Worker.requester,
    "requests_on_one_loop": Worker.requests_on_one_loop,
    "subscribes": Worker.subscribes,
    "connects": Worker.connects,
}


async def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    worker = Worker(task)
    result = await ROLES[task.role](worker)
    say(json.dumps({**result, "process_cpu_s": time.process_time() - worker.cpu_at_start}))


if __name__ == "__main__":
    asyncio.run(main())
