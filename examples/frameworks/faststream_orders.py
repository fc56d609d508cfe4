"""FastStream's NATS broker: a queue group that answers on another subject, a service, and a raw look at the connection.

    pip install 'faststream[nats]'
    insane-nats run examples/frameworks/faststream_orders.py

Nothing of FastStream knows that its messages go through shared memory. With a NATS server at NATS_URL it runs as it is.
"""

import asyncio
import os

from faststream import FastStream
from faststream.nats import NatsBroker, NatsMessage
from pydantic import BaseModel

broker = NatsBroker(os.environ.get("NATS_URL", "nats://localhost:4222"))
app = FastStream(broker)
bills: "asyncio.Queue[Bill]" = asyncio.Queue()


class Order(BaseModel):
    number: int
    items: list[str]


class Bill(BaseModel):
    order: int
    cents: int


@broker.subscriber("orders.new", queue="billing")
@broker.publisher("orders.billed")
async def bill(order: Order) -> Bill:
    return Bill(order=order.number, cents=sum(await asyncio.gather(*map(ask_price, order.items))))


@broker.subscriber("orders.billed")
async def billed(bill: Bill, message: NatsMessage) -> None:
    assert message.raw_message.subject == "orders.billed"
    await bills.put(bill)


@broker.subscriber("prices.{kind}")
async def price(item: str) -> int:
    return {"coffee": 250, "cake": 400}.get(item, 0)


async def ask_price(item: str) -> int:
    answer = await broker.request(item, "prices.food", timeout=5)
    return int(str(await answer.decode()))


@app.after_startup
async def order_something() -> None:
    for number, items in enumerate((["coffee"], ["coffee", "cake"], ["cake"] * 3), 1):
        await broker.publish(Order(number=number, items=items), "orders.new", headers={"source": "example"})
    for found in sorted([await bills.get() for _ in range(3)], key=lambda bill: bill.order):
        print(f"order {found.order}: {found.cents / 100:.2f}")
    app.exit()


if __name__ == "__main__":
    asyncio.run(app.run())
