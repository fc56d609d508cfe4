"""`python -m benchmarks.steps`: what each step of a 64-byte message's way costs a Python program, in nanoseconds.

Measured in one process with two connections, step by step, best of several passes; so nothing of it runs at the same time as
anything else, and waking a sleeper is measured apart, between two processes (`rtt-64-low` of the benchmark is two of those).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import insane_nats
from insane_nats.shim.native import lib
from tools import servers

COUNT = 20_000
PASSES = 5
BODY = bytes(64)

Step = Callable[[], Awaitable[None]]


async def best(prepare: Step | None, step: Step, count: int = COUNT) -> float:
    """Nanoseconds of one of the `count` repetitions that step makes."""
    times = []
    for _ in range(PASSES):
        if prepare is not None:
            await prepare()
        begin = time.perf_counter_ns()
        await step()
        times.append((time.perf_counter_ns() - begin) / count)
    return min(times)


class Steps:
    """Two connections, and what can be timed about a message from one to the other."""

    def __init__(self, publisher: Any, subscriber: Any) -> None:
        self.publisher = publisher
        self.subscriber = subscriber
        self.sub: Any = None
        self.counted = 0

    async def empty_loop(self) -> None:
        for _ in range(COUNT):
            pass

    async def await_nothing(self) -> None:
        async def nothing() -> None:
            pass

        for _ in range(COUNT):
            await nothing()

    async def publish_to_nobody(self) -> None:
        publish = self.publisher.publish
        for _ in range(COUNT):
            await publish("nobody", BODY)

    async def publish_to_one(self) -> None:
        publish = self.publisher.publish
        for _ in range(COUNT):
            await publish("steps", BODY)

    async def publish_with_headers(self) -> None:
        publish = self.publisher.publish
        for _ in range(COUNT):
            await publish("nobody", BODY, headers={"A": "b"})

    async def in_c(self) -> None:
        publish, handle = lib.nsn_publish, self.publisher._handle
        for _ in range(COUNT):
            publish(handle, b"nobody", 6, b"", 0, b"", 0, BODY, 64)

    async def write(self) -> None:
        """Into the link, without letting the event loop deliver any of it."""
        await self.empty()
        post = self.publisher._fast.post
        assert all(post("steps", BODY, None) for _ in range(COUNT))

    async def receive(self) -> None:
        receive = self.subscriber._fast.receive
        left = COUNT
        while left > 0:
            left -= receive(0)

    async def queue(self) -> None:
        await self.write()
        await self.receive()

    async def empty(self) -> None:
        await self.subscriber.flush()
        self.sub._pending_queue._queue.clear()
        self.sub._pending_size = 0

    async def next_msg(self) -> None:
        next_msg = self.sub.next_msg
        for _ in range(COUNT):
            await next_msg()

    async def iterate(self) -> None:
        left = COUNT
        async for _message in self.sub.messages:
            left -= 1
            if not left:
                break

    async def call_back(self) -> None:
        async def count(message: Any) -> None:
            self.counted += 1

        self.sub._cb = count
        await self.sub._call_back(None)
        self.sub._cb = None

    async def wake_a_task(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(COUNT):
            waiter = loop.create_future()
            loop.call_soon(waiter.set_result, None)
            await waiter


async def measure(url: str) -> None:
    publisher, subscriber = await insane_nats.connect(url), await insane_nats.connect(url)
    steps = Steps(publisher, subscriber)
    steps.sub = await subscriber.subscribe("steps")
    await publisher.publish("steps", b"")
    await steps.sub.next_msg()
    with contextlib.suppress(insane_nats.errors.TimeoutError):
        await steps.sub.next_msg(0.001)
    for text, prepare, step in (
        ("an empty loop of Python", None, steps.empty_loop),
        ("await of a coroutine that does nothing", None, steps.await_nothing),
        ("publish: libnsn alone, through cffi, nobody wants it", None, steps.in_c),
        ("publish: await nc.publish(), nobody wants it", None, steps.publish_to_nobody),
        ("publish: the same with headers", None, steps.publish_with_headers),
        ("publish: await nc.publish(), into one link", steps.empty, steps.publish_to_one),
        ("receive: out of the link, a message made, into its queue", steps.write, steps.receive),
        ("take: await sub.next_msg()", steps.queue, steps.next_msg),
        ("take: async for", steps.queue, steps.iterate),
        ("take: a callback that counts", steps.queue, steps.call_back),
        ("wait: a task of asyncio is woken", None, steps.wake_a_task),
    ):
        print(f"{text:60}{await best(prepare, step):8.0f} ns", flush=True)
    await publisher.close()
    await subscriber.close()


def main() -> int:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="insane_nats-steps-")))
        runtime_dir = stack.enter_context(servers.private_runtime_dir())
        os.environ["INSANE_NATS_RUNTIME_DIR"] = str(runtime_dir)
        asyncio.run(measure(stack.enter_context(servers.nsnd(folder, runtime_dir)).url))
    return 0


if __name__ == "__main__":
    sys.exit(main())
