"""Programs of their own for the suite: python -m compat_tests.program MODULE URL ROLE ARGUMENTS…

Each says "ready" on stdout when it has connected and subscribed, does its part, and ends with its counts.

publish SUBJECT FIRST COUNT SIZE   publishes payloads that begin with FIRST … FIRST + COUNT - 1, when a line comes on stdin
relay FROM TO COUNT                publishes every payload that comes on FROM to TO
receive SUBJECT QUEUE MAXIMUM      receives, in a queue group unless QUEUE is "-", until a line comes on stdin; prints numbers
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import TYPE_CHECKING

from compat_tests.backend import sync

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg


def say(text: str) -> None:
    print(text, flush=True)


async def line_from_stdin() -> str:
    return await asyncio.to_thread(sys.stdin.readline)


async def publish(nc: Client, subject: str, first: str, count: str, size: str) -> None:
    say("ready")
    await line_from_stdin()
    for number in range(int(first), int(first) + int(count)):
        await nc.publish(subject, (b"%d " % number).ljust(int(size), b"."))
    await sync(nc)
    say(count)


async def relay(nc: Client, source: str, target: str, count: str) -> None:
    relayed = 0
    done = asyncio.Event()

    async def handler(message: Msg) -> None:
        nonlocal relayed
        await nc.publish(target, message.data)
        relayed += 1
        if relayed == int(count):
            done.set()

    await nc.subscribe(source, cb=handler)
    await sync(nc)
    say("ready")
    await done.wait()
    await sync(nc)
    say(str(relayed))


async def receive(nc: Client, subject: str, queue: str, maximum: str) -> None:
    got: list[str] = []

    async def handler(message: Msg) -> None:
        got.append(message.data.split()[0].decode())

    subscription = await nc.subscribe(subject, queue="" if queue == "-" else queue, cb=handler)
    if int(maximum):
        await subscription.unsubscribe(limit=int(maximum))
    await sync(nc)
    say("ready")
    await line_from_stdin()
    await nc.drain()
    say(" ".join(got))


ROLES: dict[str, Callable[..., Awaitable[None]]] = {"publish": publish, "relay": relay, "receive": receive}


async def main(module: str, url: str, role: str, *arguments: str) -> None:
    nc: Client = await importlib.import_module(module).connect(url)
    await ROLES[role](nc, *arguments)
    if not nc.is_closed:
        await nc.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
