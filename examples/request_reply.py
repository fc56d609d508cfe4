"""Request and reply: a service that adds numbers, and a client that asks it, in one program or in two.

python examples/request_reply.py            both
python examples/request_reply.py service    only the service, until Ctrl-C
python examples/request_reply.py client     only the client
"""

import asyncio
import contextlib
import os
import sys

import nats
from nats.aio.msg import Msg
from nats.errors import NoRespondersError, TimeoutError

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")


async def add(message: Msg) -> None:
    try:
        numbers = [int(word) for word in message.data.split()]
    except ValueError:
        await message.respond(b"error: send whole numbers")
        return
    await message.respond(str(sum(numbers)).encode())


async def service() -> None:
    async with await nats.connect(URL, name="adder") as connection:
        await connection.subscribe("math.add", cb=add)
        print("service: ready", flush=True)
        await asyncio.Event().wait()


async def client() -> None:
    async with await nats.connect(URL, name="client") as connection:
        for question in ("1 2", "10 20 30", "one two"):
            answer = await connection.request("math.add", question.encode(), timeout=2)
            print(f"{question} -> {answer.data.decode()}", flush=True)
        try:
            await connection.request("math.divide", b"1 0", timeout=2)
        except NoRespondersError:
            print("math.divide: nobody offers that", flush=True)


async def both() -> None:
    serving = asyncio.create_task(service())
    await until_served()
    await client()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def until_served() -> None:
    """Whoever comes first asks again until somebody answers."""
    async with await nats.connect(URL) as connection:
        while True:
            try:
                await connection.request("math.add", b"0", timeout=1)
                return
            except (NoRespondersError, TimeoutError):
                await asyncio.sleep(0.01)


async def main() -> None:
    parts = {"service": service, "client": client, "both": both}
    await parts[sys.argv[1] if len(sys.argv) > 1 else "both"]()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
