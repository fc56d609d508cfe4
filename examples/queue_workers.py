"""A queue group: each job goes to one of several workers, each a process of its own, and their results come back.

python examples/queue_workers.py [workers jobs]
"""

import asyncio
import multiprocessing
import os
import sys
from collections import Counter

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
TIMEOUT_S = 30


async def work(name: str) -> None:
    connection = await nats.connect(URL, name=name)
    over = asyncio.Event()

    async def job(message: Msg) -> None:
        number = int(message.data)
        await connection.publish("results", f"{name} {number} {number * number}".encode())

    async def end(_: Msg) -> None:
        over.set()

    await connection.subscribe("jobs", queue="workers", cb=job)
    await connection.subscribe("jobs.end", cb=end)
    await connection.flush()
    await connection.publish("ready", name.encode())
    await over.wait()
    await connection.drain()


def worker(name: str) -> None:
    asyncio.run(work(name))


async def hand_out(connection: Client, workers: int, jobs: int) -> None:
    ready = await connection.subscribe("ready")
    results = await connection.subscribe("results")
    await connection.flush()
    names = [f"worker {number}" for number in range(1, workers + 1)]
    processes = [multiprocessing.get_context("spawn").Process(target=worker, args=(name,)) for name in names]
    for process in processes:
        process.start()
    for _ in processes:
        await ready.next_msg(timeout=TIMEOUT_S)

    for number in range(jobs):
        await connection.publish("jobs", str(number).encode())
    done: Counter[str] = Counter()
    squares: dict[int, int] = {}
    for _ in range(jobs):
        name, job, square = (await results.next_msg(timeout=TIMEOUT_S)).data.decode().rsplit(" ", 2)
        done[name] += 1
        squares[int(job)] = int(square)

    await connection.publish("jobs.end")
    await connection.flush()
    for process in processes:
        process.join()
    for name in names:
        print(f"{name}: {done[name]} jobs")
    print(f"{jobs} jobs, each done once: {squares == {number: number * number for number in range(jobs)}}")


async def main() -> None:
    workers, jobs = map(int, sys.argv[1:] or ("3", "300"))
    async with await nats.connect(URL, name="boss") as connection:
        await hand_out(connection, workers, jobs)


if __name__ == "__main__":
    asyncio.run(main())
