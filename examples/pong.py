"""Answers each ping with a pong, until it is interrupted. A plain NATS program, as ping.py."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal

import nats


async def pong(url: str) -> None:
    client = await nats.connect(url, name="pong")
    pings = await client.subscribe("example.ping")
    while True:
        message = await pings.next_msg(timeout=None)
        await client.publish("example.pong", message.data)


async def until_interrupted(url: str) -> None:
    """Ends quietly at SIGINT and SIGTERM."""
    task = asyncio.ensure_future(pong(url))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), help="default: NATS_URL")
    asyncio.run(until_interrupted(parser.parse_args().url))


if __name__ == "__main__":
    main()
