"""What programs do to connections, in random order, for tests/test_fast_sanitized.py. It ends well, and without output.

    python -m tests.fast_stress URL SEED SECONDS"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import sys
import threading
import warnings
from typing import Any

from nats import errors
from nats.aio.msg import Msg

import insane_nats

SIZES = (0, 1, 100, 5000, 70_000, 300_000)
SUBJECTS = ("a", "b", "c.d")
EXPECTED = (errors.Error, asyncio.TimeoutError, BufferError, ValueError, ZeroDivisionError)  # ValueError: of what was released


class Unlucky(insane_nats.NATS):
    """A subclass with a delivery of its own, which fails now and then."""

    def _build_message(self, *arguments: Any, **names: Any) -> Any:
        if random.random() < 0.1:
            raise ZeroDivisionError
        return super()._build_message(*arguments, **names)


class Message(Msg):
    """A message class of the program's."""


class Holder:
    """Garbage that still uses its connection when it is collected."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.itself = self

    def __del__(self) -> None:
        with contextlib.suppress(*EXPECTED, RuntimeError, StopIteration):
            call = self.client.publish("a", b"from a finalizer")
            try:
                call.send(None)
            finally:
                call.close()


class Program:
    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.clients: list[Any] = []
        self.subscriptions: list[Any] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.held: list[Any] = []

    async def run(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        steps = [getattr(self, name) for name in sorted(dir(type(self))) if name.startswith("do_")]
        while loop.time() < ends:
            step = self.random.choice(steps)
            with contextlib.suppress(*EXPECTED):
                await asyncio.wait_for(step(), 0.5)
            if self.random.random() < 0.02:
                gc.collect()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.random.random() < 0.5:
            for client in self.clients:
                await client.close()

    def client(self) -> Any:
        return self.random.choice(self.clients) if self.clients else self.fail()

    def subscription(self) -> Any:
        return self.random.choice(self.subscriptions) if self.subscriptions else self.fail()

    def fail(self) -> Any:
        raise ZeroDivisionError

    async def on_error(self, error: Exception) -> None:
        if self.random.random() < 0.2 and self.clients:
            await self.client().publish("c.d", b"from an error callback")

    async def on_message(self, message: Any) -> None:
        luck = self.random.random()
        if luck < 0.1:
            self.fail()
        elif luck < 0.2:
            await message.respond(b"answer")
        elif luck < 0.25:
            await self.client().close()
        elif luck < 0.3:
            await self.subscription().unsubscribe()
        elif luck < 0.4:
            self.held.append(message if luck < 0.35 else memoryview(message.data))
        elif luck < 0.45:
            raise asyncio.CancelledError

    async def do_connect(self) -> None:
        if len(self.clients) > 4:
            self.clients.pop(0)  # and whoever else knows of it keeps it
            del self.subscriptions[: len(self.subscriptions) // 2]
        client = (Unlucky if self.random.random() < 0.2 else insane_nats.NATS)()
        if self.random.random() < 0.2:
            client.msg_class = Message
        await client.connect(self.url, error_cb=self.on_error)
        self.clients.append(client)

    async def do_subscribe(self) -> None:
        zero_copy = self.random.random() < 0.4
        names: dict[str, Any] = {"cb": self.on_message} if self.random.random() < 0.4 else {}
        names["pending_msgs_limit"] = self.random.choice((0, 3, 100))
        names["max_msgs"] = self.random.choice((0, 0, 5))
        self.subscriptions.append(
            await self.client().subscribe(self.random.choice((*SUBJECTS, ">")), zero_copy=zero_copy, **names)
        )

    async def do_publish(self) -> None:
        client, size = self.client(), self.random.choice(SIZES)
        headers = {"A": "b"} if self.random.random() < 0.2 else None
        reply = "a" if self.random.random() < 0.1 else ""
        for _ in range(self.random.choice((1, 20))):
            await client.publish(self.random.choice(SUBJECTS), bytes(size), reply, headers)

    async def do_emit(self) -> None:
        client = self.client()
        block = client.borrow(self.random.choice(SIZES))
        if self.random.random() < 0.8:
            await client.emit("a", block)
        elif self.random.random() < 0.5:
            self.held.append(block)

    async def do_next(self) -> None:
        message = await self.subscription().next_msg(0.01)
        if self.random.random() < 0.3:
            self.held.append(message)
        elif self.random.random() < 0.5:
            getattr(message, "release", gc.collect)()  # a message class of a program's own has none

    async def do_iterate(self) -> None:
        async for message in self.subscription().messages:
            if self.random.random() < 0.3:
                break
            del message

    async def do_request(self) -> None:
        await self.client().request("a", b"?", timeout=0.01)

    async def do_wait_in_a_task(self) -> None:
        waits = self.subscription().next_msg(None) if self.random.random() < 0.5 else self.client().flush()
        self.tasks.append(asyncio.get_running_loop().create_task(waits))
        await asyncio.sleep(0)

    async def do_cancel(self) -> None:
        if self.tasks:
            self.tasks.pop(self.random.randrange(len(self.tasks))).cancel()
        await asyncio.sleep(0)

    async def do_forget_a_call(self) -> None:
        call = self.client().publish("a", b"never")
        if self.random.random() < 0.5:
            self.held.append(call)

    async def do_close(self) -> None:
        await self.client().close()

    async def do_drain(self) -> None:
        subscription = self.subscription()
        await subscription.drain()

    async def do_drop(self) -> None:
        self.held = self.held[self.random.randrange(8) :]
        Holder(self.client())

    async def do_drop_in_a_thread(self) -> None:
        held, self.held = self.held, []
        thread = threading.Thread(target=held.clear)
        del held
        thread.start()
        thread.join()

    async def do_look_at_a_queue(self) -> None:
        self.held.extend(self.subscription()._pending_queue._queue)
        self.subscription()._pending_queue._queue.clear()


def main() -> None:
    url, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    logging.disable()
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    gc.set_threshold(1)
    for number in range(2):  # a loop after the other: what the first leaves is collected under the second
        program = Program(url, seed + number)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        loop.run_until_complete(program.run(seconds / 2))
        loop.close()
        del program
    gc.collect()


if __name__ == "__main__":
    main()
