"""taskiq's NATS broker: two worker processes share tasks that another program hands out.

    pip install taskiq-nats
    insane-nats run examples/frameworks/taskiq_squares.py

It starts the workers itself, as `taskiq worker` in a process of its own, which makes them processes of its own in turn.
NatsBroker is the one of taskiq's brokers for NATS that needs no JetStream; answers come as messages on a subject here.
"""

import asyncio
import os
import sys
from pathlib import Path

from taskiq_nats import NatsBroker

URL = os.environ.get("NATS_URL", "nats://localhost:4222")
broker = NatsBroker(URL, subject="squares.tasks", queue="workers")


@broker.task(task_name="square")  # the same in the program and in its workers
async def square(number: int) -> None:
    await broker.client.publish("squares.done", b"%d %d" % (number, number * number))


async def hand_out() -> None:
    await broker.startup()
    done = await broker.client.subscribe("squares.done")
    while not done.pending_msgs:  # nobody keeps a task until there is a worker
        await square.kiq(0)
        await asyncio.sleep(0.1)
    for number in range(1, 21):
        await square.kiq(number)
    squares: dict[int, int] = {}
    async for message in done.messages:
        number, result = map(int, message.data.split())
        squares[number] = result
        if len(squares) == 21:
            break
    print(f"20 tasks, done by the workers: {all(result == number**2 for number, result in squares.items())}")
    await broker.shutdown()


async def main() -> None:
    command = [sys.executable, "-m", "taskiq", "worker", "--workers", "2", "--no-configure-logging", "taskiq_squares:broker"]
    workers = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parent)
    try:
        await hand_out()
    finally:
        workers.terminate()
        await workers.wait()


if __name__ == "__main__":
    asyncio.run(main())
