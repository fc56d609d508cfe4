"""Processes that stand still (SIGSTOP), under a load that fits their link and under one that does not; and nsnd that does."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

import insane_nats as nats
from insane_nats import errors
from tests.fault_program import FORGIVING, payload
from tests.faults import Inbox, Node, connection, programs, running_node, tell, until

STANDSTILL_S = 3.0
BOUND_S = 20.0  # of any call; what is measured is printed
DEADLINE_S = 1.0  # the write deadline of the publishers here


@pytest.fixture
def node(runtime_dir: Path, tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, runtime_dir) as running:
        yield running


def test_a_stopped_subscriber_loses_nothing_under_a_load_that_fits_its_link(node: Node, tmp_path: Path) -> None:
    """10 MB/s for 3 s are 30 MB; a link holds 64 MiB. The other subscriber is measured before and meanwhile."""

    async def run() -> None:
        async with programs(tmp_path) as those:
            stopped, other = [await those.ready("receive", node.url, True, subject="load") for _ in range(2)]
            publisher = await those.ready("publish", node.url, True, subject="load", size=8000, rate=1250, large_every=20)
            await publisher.tell("start")
            await until(lambda: other.marks.highest > 100, "messages come")
            await other.ask()
            await asyncio.sleep(1.0)
            before = await other.ask()
            await stopped.stop()
            missed_from = stopped.marks.highest
            await asyncio.sleep(STANDSTILL_S)
            meanwhile = await other.ask()
            missed = other.marks.highest - missed_from
            stopped.go_on()
            report = await publisher.ask("stop")
            count = report["published"]
            await until(lambda: stopped.marks.highest >= count and other.marks.highest >= count, "all have come")
            after = await stopped.ask()
            for one in (stopped, other):
                times = one.marks.times(count)
                tell("subscriber stopped, others read" if one is stopped else "the other subscriber", published=count,
                     lost=times.count(0), doubled=sum(number > 1 for number in times))
                assert set(times) == {1}
            tell("latency of the other (ms)", p50_before=before["p50_ms"], p99_before=before["p99_ms"],
                 p50_meanwhile=meanwhile["p50_ms"], p99_meanwhile=meanwhile["p99_ms"], most_meanwhile=meanwhile["most_ms"],
                 behind=missed)
            assert missed > 1000
            assert (after["slow"], after["errors"], report["errors"]) == ([], [], [])
            assert (report["counters"]["dropped"], report["counters"]["waits"]) == (0, 0)

    asyncio.run(run())


def test_one_that_cannot_keep_up_is_waited_for_once_and_then_dropped_for_alone(node: Node, tmp_path: Path) -> None:
    """Two subscribers; one is stopped, and gets more than its link holds."""

    async def run() -> None:
        count, size = 12_000, 8000
        async with programs(tmp_path) as those:
            stopped, other = [await those.ready("receive", node.url, True, subject="load") for _ in range(2)]
            options = {"write_deadline": DEADLINE_S}
            publisher = await those.ready("publish", node.url, True, subject="load", size=size, count=count, connect=options)
            await stopped.stop()
            started = time.monotonic()
            await publisher.tell("start")
            report = await publisher.hear()
            took = time.monotonic() - started
            await until(lambda: other.marks.total >= count, "the other has all")
            stopped.go_on()

            async def slow() -> dict[str, Any] | None:
                report = await stopped.ask()
                return report if report["slow"] else None

            answer = await until(slow, "it is told that it was slow")
            others = set(other.marks.times(count))
            received = stopped.marks.total
            counters = report["counters"]
            tell("subscriber stopped, its link full", published=count, seconds=took, waits=counters["waits"],
                 dropped_by_publisher=counters["dropped"], received_by_the_stopped=received, reported_by_it=answer["slow"],
                 lost_by_the_other=other.marks.times(count).count(0))
            assert others == {1}
            assert counters["waits"] == 1
            assert took >= DEADLINE_S
            record = (size + 48 + 63) // 64 * 64  # whole cache lines
            assert counters["dropped"] == count - (64 << 20) // record
            assert received + sum(answer["slow"]) == count
            assert len(answer["slow"]) == 1
            assert any("slow consumer" in text for text in answer["errors"])
            async with connection(node.url) as nc:  # it runs again, and gets what comes
                await nc.publish("load", payload(count, 100))
            await until(lambda: stopped.marks.times(count + 1)[count] == 1, "it receives again")

    asyncio.run(run())


def test_an_unreliable_publisher_never_waits_and_counts_what_it_drops(node: Node, tmp_path: Path) -> None:
    async def run() -> None:
        count = 10_000
        async with programs(tmp_path) as those:
            stopped = await those.ready("receive", node.url, True, subject="load")
            publisher = await those.ready("publish", node.url, True, subject="load", size=8000, count=count,
                                          connect={"qos": "reliability=unreliable"})
            await stopped.stop()
            await publisher.tell("start")
            report = await publisher.hear()
            stopped.go_on()
            counters = report["counters"]
            await until(lambda: stopped.marks.total >= count - counters["dropped"], "what was not dropped has come")
            tell("unreliable publisher, stopped subscriber", published=count, waits=counters["waits"],
                 dropped=counters["dropped"], received=stopped.marks.total)
            assert counters["waits"] == 0
            assert counters["dropped"] > 0
            assert stopped.marks.total == count - counters["dropped"]
            assert max(stopped.marks.times(count)) == 1

    asyncio.run(run())


async def bounded(what: str, call: Awaitable[object], outcomes: dict[str, str]) -> None:
    """The call returns or raises by itself, long before it is given up here."""
    started = time.monotonic()
    task = asyncio.ensure_future(call)
    _, late = await asyncio.wait([task], timeout=BOUND_S)
    assert not late, f"{what} takes longer than {BOUND_S} s"
    error = task.exception()
    assert error is None or isinstance(error, (errors.Error, OSError)), f"{what}: {error!r}"
    outcomes[what] = f"{type(error).__name__ if error else 'returned'} in {time.monotonic() - started:.2f} s"


def test_every_call_has_its_bound_while_nsnd_stands_still(node: Node) -> None:
    async def run() -> None:
        outcomes: dict[str, str] = {}
        inbox = Inbox()
        async with connection(node.url) as nc, connection(node.url) as other, connection(node.url) as closing:
            await other.subscribe("x", cb=inbox.take)
            sub = await nc.subscribe("y")
            await closing.subscribe("fresh")
            await nc.publish("x", payload(0, 30_000))
            await until(lambda: inbox.highest == 1, "there is a link")
            node.send(signal.SIGSTOP)
            try:
                for number in range(1, 200):
                    await bounded("publish on a link", nc.publish("x", payload(number, 100)), outcomes)
                await until(lambda: inbox.highest == 200, "it arrives without nsnd")
                await bounded("publish to who is not linked", nc.publish("fresh", b"1"), outcomes)
                await bounded("flush", nc.flush(1), outcomes)
                await bounded("rtt", nc.rtt(1), outcomes)
                await bounded("request", nc.request("fresh", b"", timeout=1), outcomes)
                await bounded("unsubscribe", sub.unsubscribe(), outcomes)
                await bounded("subscribe", nc.subscribe("z"), outcomes)
                await bounded("subscribe again", nc.subscribe("z"), outcomes)
                await bounded("connect", nats.connect(node.url, connect_timeout=1, allow_reconnect=False), outcomes)
                await bounded("close", closing.close(), outcomes)
            finally:
                node.send(signal.SIGCONT)
            for what, outcome in outcomes.items():
                tell("nsnd stopped", **{what.replace(" ", "_"): outcome})
            assert outcomes["publish on a link"].startswith("returned")
            assert not outcomes["connect"].startswith("returned")
            await until(lambda: nc.is_connected and other.is_connected, "they are connected again")
            late = Inbox()
            await other.subscribe("late", cb=late.take)
            for number in range(100):
                await nc.publish("late", payload(number, 100))
                await nc.publish("x", payload(200 + number, 100))
            await until(lambda: late.highest == 100 and inbox.highest == 300, "all goes on")
            tell("afterwards", lost=late.lost(100) + inbox.lost(300), doubled=late.doubled + inbox.doubled)
            assert (late.lost(100), inbox.lost(300), late.doubled, inbox.doubled) == (0, 0, 0, 0)
            await until(lambda: node.sessions() == 2, "who closed meanwhile is gone")

    asyncio.run(run())


def test_a_stopped_session_delays_neither_sessions_that_come_nor_those_that_go(node: Node, tmp_path: Path) -> None:
    """It is linked with all of them; links that it does not take wait for it alone."""

    async def run() -> None:
        async with programs(tmp_path) as those:
            stopped = await those.ready("receive", node.url, True, subject="all")
            await stopped.stop()
            numbers = 0
            for _ in range(5):
                some = await asyncio.gather(*(nats.connect(node.url, **FORGIVING) for _ in range(10)))
                inbox = Inbox()
                await some[0].subscribe("all", cb=inbox.take)
                for nc in some:
                    await nc.publish("all", payload(numbers, 100))
                    numbers += 1
                await until(lambda box, number: box.highest == number, "they hear each other", inbox, numbers)
                await asyncio.gather(*(nc.close() for nc in some))
            stopped.go_on()
            await until(lambda: stopped.marks.total >= numbers, "it has what all of them had published")
            times = stopped.marks.times(numbers)
            tell("50 sessions came and went while one stood still", published=numbers, lost=times.count(0),
                 doubled=sum(one > 1 for one in times))
            assert set(times) == {1}
            await until(lambda: node.sessions() == 1, "only that one is left")

    asyncio.run(run())
