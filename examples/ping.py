"""Sends pings over NATS and measures how long the pongs take: start pong.py first, or within ten seconds.

A plain NATS program. `insane-nats run examples/ping.py` runs it over shared memory as it stands.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time

import nats
from nats.aio.client import Client
from nats.aio.subscription import Subscription

WARM_UP = 200


async def round_trip(client: Client, pongs: Subscription, payload: bytes, timeout: float) -> int:
    """One ping and its pong; nanoseconds. Raises nats.errors.TimeoutError."""
    begin = time.perf_counter_ns()
    await client.publish("example.ping", payload)
    message = await pongs.next_msg(timeout=timeout)
    elapsed = time.perf_counter_ns() - begin
    if message.data != payload:
        raise RuntimeError(f"the pong has {len(message.data)} bytes, or other ones than the ping's {len(payload)}")
    return elapsed


async def wait_for_pong(client: Client, pongs: Subscription) -> None:
    """Until somebody answers; what was answered late is thrown away."""
    for _ in range(50):
        try:
            await round_trip(client, pongs, b"anybody there?", timeout=0.2)
            break
        except nats.errors.TimeoutError:
            continue
    else:
        raise SystemExit("ping: nobody answers on example.ping. Start examples/pong.py with the same --url")
    await client.flush()
    while pongs.pending_msgs:
        await pongs.next_msg(timeout=1)


async def ping(arguments: argparse.Namespace) -> list[int]:
    """All round-trip times, nanoseconds."""
    client = await nats.connect(arguments.url, name="ping")
    pongs = await client.subscribe("example.pong")
    await wait_for_pong(client, pongs)
    payload = bytes(index % 251 for index in range(arguments.size))
    if not arguments.rate:
        for _ in range(min(WARM_UP, arguments.count)):
            await round_trip(client, pongs, payload, timeout=5)
    times = []
    due = time.monotonic()
    for _ in range(arguments.count):
        if arguments.rate:
            due += 1 / arguments.rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        times.append(await round_trip(client, pongs, payload, timeout=5))
    await client.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), help="default: NATS_URL")
    parser.add_argument("--count", type=int, default=10_000, help="pings to send")
    parser.add_argument("--size", type=int, default=64, help="bytes of each")
    parser.add_argument("--rate", type=float, default=0, help="pings a second; 0: each as soon as the last one's pong is there")
    arguments = parser.parse_args()
    times = sorted(asyncio.run(ping(arguments)))
    p50, p99 = (times[min(len(times) - 1, len(times) * percent // 100)] / 1000 for percent in (50, 99))
    print(f"{len(times)} round trips of {arguments.size} bytes: p50 {p50:.1f} µs, p99 {p99:.1f} µs")


if __name__ == "__main__":
    main()
