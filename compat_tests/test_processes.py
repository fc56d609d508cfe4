"""Several programs: what they send each other, exactness of queue groups and maxima, and causes before effects."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from compat_tests.backend import MODULES, REPOSITORY, arrived, payloads, sync, taken, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

covers = pytest.mark.covers
OVERTAKES = (
    "a server writes to the subscribers of a message one after the other: the first may have answered before the second has it"
)


class Program:
    """compat_tests.program in a process of its own."""

    def __init__(self, backend: Backend, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compat_tests.program", MODULES[backend.name], backend.url, *map(str, arguments)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def read_line(self) -> str:
        """The next line that it prints; blocks."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line, f"{self._process.args!r} ended with {self._process.wait()}"
        return line.strip()

    async def ready(self) -> None:
        assert await asyncio.to_thread(self.read_line) == "ready"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    async def result(self) -> str:
        """Its last line, after which it has ended by itself."""
        line = await asyncio.to_thread(self.read_line)
        assert await asyncio.to_thread(self._process.wait, 10) == 0
        return line

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.asynccontextmanager
async def programs(backend: Backend, *arguments: tuple[object, ...]) -> AsyncIterator[list[Program]]:
    """Starts programs at once, waits until all are ready, and kills what is left of them in the end."""
    started: list[Program] = []
    try:
        for each in arguments:
            started.append(Program(backend, *each))
        for program in started:
            await program.ready()
        yield started
    finally:
        for program in started:
            program.end()


@covers("api/processes", "2.3/order")
@pytest.mark.parametrize("size", [20, 50_000])
async def test_publishing_programs(backend: Backend, size: int) -> None:
    count = 2000 if size == 20 else 300
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    publishers = [("publish", backend.subject, index * count, count, size) for index in range(3)]
    async with programs(backend, *publishers) as started:
        for program in started:
            program.go()
        for program in started:
            await program.result()
        await until(lambda: subscription.pending_msgs >= 3 * count, what="everything arrives")
    received = await payloads(subscription)
    assert all(len(payload) == size for payload in received)
    numbers = [int(payload.split()[0]) for payload in received]
    for index in range(3):
        own = range(index * count, (index + 1) * count)
        assert [number for number in numbers if number in own] == list(own)


@covers("2.4/exact", "2.4/one-member", "api/processes")
async def test_queue_group_of_programs(backend: Backend) -> None:
    """Two programs publish; members are two programs and a connection here."""
    nc, publisher = await backend.connect(), await backend.connect()
    member = await nc.subscribe(f"{backend.subject}.*", queue="q")
    await sync(nc)
    receivers = [("receive", f"{backend.subject}.work", "q", 0)] * 2
    publishers = [("publish", f"{backend.subject}.work", index * 1500, 1500, 30) for index in range(2)]
    async with programs(backend, *receivers, *publishers) as started:
        for program in started[2:]:
            program.go()
        for program in started[2:]:
            await program.result()
        for program in started[:2]:
            program.go()
        elsewhere = [await program.result() for program in started[:2]]
    await arrived(publisher, nc)
    numbers = [[int(number) for number in line.split()] for line in elsewhere]
    here = [int(data.split()[0]) for data in await payloads(member)]
    assert Counter(number for group in [*numbers, here] for number in group) == Counter(range(3000))
    assert all(len(group) > 700 for group in [*numbers, here])


@covers("2.5/exact", "2.5/queue", "api/processes")
async def test_maximum_is_exact_with_several_publishing_programs(backend: Backend) -> None:
    nc, publisher = await backend.connect(), await backend.connect()
    limited = await nc.subscribe(backend.subject, queue="q")
    await limited.unsubscribe(limit=7)
    plain = await nc.subscribe(backend.subject)
    await plain.unsubscribe(limit=11)
    other = await publisher.subscribe(backend.subject, queue="q")
    await sync(nc, publisher)
    publishers = [("publish", backend.subject, index * 1000, 1000, 30) for index in range(3)]
    async with programs(backend, *publishers) as started:
        for program in started:
            program.go()
        for program in started:
            await program.result()
        await until(lambda: other.pending_msgs >= 2993, what="the other member gets the rest")
    await arrived(nc, publisher)
    await arrived(publisher, nc)
    counts = [await payloads(limited), await payloads(other)]
    assert [len(got) for got in counts] == [7, 2993]
    assert Counter(int(data.split()[0]) for got in counts for data in got) == Counter(range(3000))
    assert len(await taken(plain)) == 11


@covers("2.3/causal")
@pytest.mark.stricter(OVERTAKES)
@pytest.mark.parametrize("size", [30, 5000])
async def test_effect_never_before_its_cause(backend: Backend, size: int) -> None:
    """A program relays what another publishes, while whoever hears both has not looked yet: a backlog of both."""
    count = 8000 if size == 30 else 2000
    nc = await backend.connect()
    subscription = await nc.subscribe(f"{backend.subject}.*")
    await sync(nc)
    cause, effect = f"{backend.subject}.cause", f"{backend.subject}.effect"
    async with programs(backend, ("relay", cause, effect, count), ("publish", cause, 0, count, size)) as (relay, publisher):
        publisher.go()
        assert publisher.read_line() == str(count)  # blocks this program's loop on purpose, so that nothing is taken
        assert relay.read_line() == str(count)
        await until(lambda: subscription.pending_msgs == 2 * count, what="causes and effects arrive")
    check_causes_first(await taken(subscription), effect, count)


@covers("2.3/causal")
@pytest.mark.stricter(OVERTAKES)
async def test_effect_never_before_its_cause_while_it_flows(backend: Backend) -> None:
    """The same with a consumer that keeps up, so that its links are now empty, now not."""
    count = 5000
    nc, publisher = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(f"{backend.subject}.*")
    await sync(nc)
    cause, effect = f"{backend.subject}.cause", f"{backend.subject}.effect"
    async with programs(backend, ("relay", cause, effect, count)) as (relay,):
        for number in range(count):
            await publisher.publish(cause, b"%d" % number)
            if number % 20 == 0:
                await publisher.flush()
        await relay.result()
        await until(lambda: subscription.pending_msgs == 2 * count, what="causes and effects arrive")
    check_causes_first(await taken(subscription), effect, count)


def check_causes_first(messages: list[Msg], effect: str, count: int) -> None:
    causes: set[int] = set()
    for message in messages:
        number = int(message.data.split()[0])
        if message.subject == effect:
            assert number in causes, f"effect {number} came before its cause"
        else:
            causes.add(number)
    assert len(causes) == count


@covers("2.8/rolling", "2.4/exact", "api/processes")
@pytest.mark.stricter("nats-py flushes ahead of its own UNSUB, so that messages which follow are lost")
async def test_members_drain_while_programs_publish(backend: Backend) -> None:
    nc, keeper = await backend.connect(), await backend.connect()
    kept = await keeper.subscribe(backend.subject, queue="q")
    await sync(keeper)
    got: Counter[int] = Counter()

    async def handler(message: Msg) -> None:
        got[int(message.data.split()[0])] += 1

    publishers = [("publish", backend.subject, index * 10_000, 10_000, 30) for index in range(2)]
    async with programs(backend, *publishers) as started:
        for program in started:
            program.go()
        for _ in range(20):
            member = await nc.subscribe(backend.subject, queue="q", cb=handler)
            await nc.flush()
            await member.drain()
        for program in started:
            await program.result()
    await arrived(nc, keeper)
    await until(lambda: got.total() + kept.pending_msgs >= 20_000, what="every message has been delivered", timeout_s=3)
    got.update(int(data.split()[0]) for data in await payloads(kept))
    assert got == Counter(range(20_000))
