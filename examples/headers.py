"""Headers: what a message says about itself, beside its data. Here a trace ID, which an answer carries back, and the content
type that tells a reader how to read it.

    python examples/headers.py
"""

import asyncio
import json
import os
import uuid

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
PRICES = {"coffee": 250, "tea": 180}


def read(message: Msg) -> object:
    kind = (message.headers or {}).get("Content-Type")
    if kind == "application/json":
        return json.loads(message.data)
    return message.data.decode() if kind == "text/plain" else message.data


async def serve_prices(connection: Client) -> None:
    async def price(message: Msg) -> None:
        headers = {"Trace-Id": (message.headers or {}).get("Trace-Id", "none"), "Content-Type": "application/json"}
        item = str(read(message))
        answer = {"item": item, "price": PRICES.get(item)}
        await connection.publish(message.reply, json.dumps(answer).encode(), headers=headers)

    await connection.subscribe("prices", cb=price)
    await connection.flush()


async def ask_prices(connection: Client) -> None:
    for item in (*PRICES, "cocoa"):
        trace_id = uuid.uuid4().hex
        headers = {"Trace-Id": trace_id, "Content-Type": "text/plain"}
        answer = await connection.request("prices", item.encode(), timeout=2, headers=headers)
        same = (answer.headers or {}).get("Trace-Id") == trace_id
        print(f"{read(answer)}, trace ID is ours: {same}", flush=True)


async def main() -> None:
    async with await nats.connect(URL, name="shop") as shop, await nats.connect(URL, name="customer") as customer:
        await serve_prices(shop)
        await ask_prices(customer)


if __name__ == "__main__":
    asyncio.run(main())
