"""One program of a benchmark: `python -m benchmarks.worker JSON`, where JSON has the fields of Task.

It says "ready" when it is connected and subscribed, waits for "go", and writes its result as one line of JSON. The programs
that only answer run until "stop". The module under test is the only thing that differs between the two sides.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import select
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What to do.

    period: payloads end with 0, 1, … period - 1 in turn, so that a lost or repeated message shows.
    burst: messages published before the subscribers' word that all are there is waited for, so that neither a server's
    limit of 64 MB behind nor a client's of 524,288 messages loses any.
    churn: subscribes, and unsubscribes, a second, of a program beside.
    way: how a subscriber takes messages: callback, iterator or next_msg.
    in_flight: requests that wait for their answers at once.
    loop: asyncio or uvloop.
    """

    role: str
    module: str
    url: str
    count: int = 0
    size: int = 64
    warm_up: int = 0
    rate: float = 0.0
    churn: float = 0.0
    burst: int = 1
    period: int = 251
    subscribers: int = 1
    distinct_subjects: bool = False
    way: str = "callback"
    in_flight: int = 1
    loop: str = "asyncio"


def payloads(task: Task) -> list[bytes]:
    """One period of payloads."""
    body = bytes(max(0, task.size - 1))
    return [body + bytes([index]) for index in range(task.period)]


def proportional_kib() -> float:
    """Memory of this process; what it shares counts in proportion."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("Pss:"))


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

    # --- round trips of what is large and not copied, where the library can do that --------------------------------------
    async def read_in_place(self) -> Result:
        client = await self.connect()
        lends = hasattr(client, "borrow")
        frames = await client.subscribe("bench.frame", **({"zero_copy": True} if lends else {}))
        await client.flush()

        async def read() -> None:
            while True:
                message = await frames.next_msg(timeout=None)
                seen = bytes(message.data[-1:])
                if lends:
                    message.release()
                await client.publish("bench.seen", seen)

        reading = asyncio.ensure_future(read())
        result = await self.answer(lambda: {})
        reading.cancel()
        await asyncio.wait([reading])
        await client.close()
        return result

    async def write_in_place(self) -> Result:
        client = await self.connect()
        seen = await client.subscribe("bench.seen")
        await client.flush()
        lends = hasattr(client, "borrow")
        frames = [] if lends else payloads(self.task)
        await self.go()
        times: list[int] = []
        wrong = 0
        for number in range(-self.task.warm_up, self.task.count):
            last = number % self.task.period
            begin = time.perf_counter_ns()
            if lends:
                buffer = client.borrow(self.task.size)
                buffer.data[-1] = last
                await client.emit("bench.frame", buffer)
            else:
                await client.publish("bench.frame", frames[last])
            wrong += (await seen.next_msg(timeout=TIMEOUT_S)).data != bytes([last])
            if number >= 0:
                times.append(time.perf_counter_ns() - begin)
        await client.close()
        return {"times_ns": times, "lost": wrong}

    # --- one way: bursts -----------------------------------------------------------------------------------------------
    async def sink(self) -> Result:
        client = await self.connect()
        task = self.task
        size, period, burst = task.size, task.period, task.burst
        received = wrong = 0

        def take(message: Any) -> bool:
            """True when a burst is there as a whole, which is to be answered. It does no more: that counts on both sides."""
            nonlocal received, wrong
            data = message.data
            if len(data) != size or data[-1] != received % burst % period:
                wrong += 1
            received += 1
            return received % burst == 0

        async def called_back(message: Any) -> None:
            if take(message):
                await client.publish("bench.taken", b"")

        async def iterate(subscription: Any) -> None:
            async for message in subscription.messages:
                if take(message):
                    await client.publish("bench.taken", b"")

        async def take_one_by_one(subscription: Any) -> None:
            while True:
                if take(await subscription.next_msg(timeout=None)):
                    await client.publish("bench.taken", b"")

        taking: asyncio.Future[None] | None = None
        if task.way == "callback":
            await client.subscribe("bench.data.>", cb=called_back)
        else:
            subscription = await client.subscribe("bench.data.>")
            ways = {"iterator": iterate, "next_msg": take_one_by_one}
            taking = asyncio.ensure_future(ways[task.way](subscription))
        await client.flush()
        result = await self.answer(lambda: {"received": received, "wrong": wrong})
        if taking is not None:
            taking.cancel()
            await asyncio.wait([taking])
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

    async def publisher(self) -> Result:
        """As source; the time is that of publishing alone."""
        client = await self.connect()
        taken = await client.subscribe("bench.taken")
        await client.flush()
        task, bodies = self.task, payloads(self.task)
        publish, period = client.publish, task.period
        await self.go()
        seconds = 0.0
        lost = 0
        for burst in range(-task.warm_up, task.count // task.burst):
            begin = time.perf_counter()
            for number in range(task.burst):
                await publish("bench.data.x", bodies[number % period])
            await client.flush()
            if burst >= 0:
                seconds += time.perf_counter() - begin
            try:
                await taken.next_msg(timeout=TIMEOUT_S)
            except self.nats.errors.TimeoutError:
                lost += 1
        await client.close()
        return {"seconds": seconds, "published": task.count, "lost": lost}

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
        wrong = 0

        async def ask(count: int) -> None:
            nonlocal wrong
            for number in range(count):
                message = await client.request("bench.request", bodies[number % task.period], timeout=TIMEOUT_S)
                wrong += not self.check(bytes(message.data), number)

        async def ask_at_once(count: int) -> None:
            if task.in_flight == 1:
                await ask(count)
            else:
                await asyncio.gather(*(ask(count // task.in_flight) for _ in range(task.in_flight)))

        await self.go()
        await ask_at_once(task.warm_up)
        begin = time.perf_counter()
        await ask_at_once(task.count)
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

    async def churn(self) -> Result:
        """Subscribes and unsubscribes until "stop"."""
        client = await self.connect()
        churning = asyncio.ensure_future(self.subscribe_and_unsubscribe(client))
        result = await self.answer(lambda: {})
        churning.cancel()
        await asyncio.wait([churning])
        await client.close()
        return result

    async def subscribe_and_unsubscribe(self, client: Any) -> None:
        due = time.monotonic()
        number = 0
        while True:
            due = max(due + 1 / self.task.churn, time.monotonic() - 0.1)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            subscription = await client.subscribe(f"bench.churn.{number % 1000}")
            await subscription.unsubscribe()
            number += 1

    async def memory(self) -> Result:
        """What a connection with `count` subscriptions takes, kernel's share of the process's own memory not included."""
        await (await self.connect()).close()
        await self.go()
        before = proportional_kib()
        client = await self.connect()
        for index in range(self.task.count):
            await client.subscribe(f"bench.many.{index}")
        await client.flush()
        after = proportional_kib()
        await client.close()
        return {"kib": after - before, "published": 1, "lost": 0, "seconds": 1.0}

    async def busy(self) -> Result:
        """Not a client: keeps one processor busy until "stop"."""
        await self.go()
        while not select.select([sys.stdin], [], [], 0)[0]:
            end = time.monotonic() + 0.01
            while time.monotonic() < end:
                pass
        await line_from_parent()
        return {}

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
    "read_in_place": Worker.read_in_place,
    "write_in_place": Worker.write_in_place,
    "publisher": Worker.publisher,
    "churn": Worker.churn,
    "memory": Worker.memory,
    "busy": Worker.busy,
    "subscribes": Worker.subscribes,
    "connects": Worker.connects,
}


async def main() -> None:
    logging.getLogger("insane_nats").setLevel(logging.ERROR)  # that it is plain NATS is what some rows are about
    task = Task(**json.loads(sys.argv[1]))
    worker = Worker(task)
    result = await ROLES[task.role](worker)
    say(json.dumps({**result, "process_cpu_s": time.process_time() - worker.cpu_at_start}))


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    return None if name == "asyncio" else importlib.import_module(name).new_event_loop


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory(Task(**json.loads(sys.argv[1])).loop)) as runner:
        runner.run(main())
