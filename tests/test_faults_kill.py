"""Processes that are killed: publishers, subscribers, nsnd, everybody. What had been published arrives, once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

import insane_nats as nats
from insane_nats import errors
from nsnd.runtime import RuntimeDirectory
from tests.fault_program import Errors, payload
from tests.faults import PATIENCE_S, Inbox, Node, connection, programs, running_node, tell, until


@pytest.fixture
def node(runtime_dir: Path, tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, runtime_dir) as running:
        yield running


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")}


def test_everything_that_a_killed_publisher_had_published_arrives(node: Node, tmp_path: Path) -> None:
    async def run() -> None:
        lost = doubled = returned = 0
        async with programs(tmp_path) as those, connection(node.url) as nc:
            for life in range(4):
                inbox = Inbox()
                sub = await nc.subscribe(f"life.{life}", cb=inbox.take, pending_bytes_limit=-1, pending_msgs_limit=-1)
                publisher = await those.ready("publish", node.url, True, subject=f"life.{life}", large_every=10)
                await publisher.tell("start")
                await until(lambda box: box.highest > 500, "messages come", inbox)
                await asyncio.sleep(random.uniform(0, 0.05))
                await publisher.kill()
                published = publisher.marks.highest
                await until(lambda box, number: box.highest >= number, "all have come", inbox, published)
                await nc.flush()
                assert inbox.highest <= published + 1  # the one in hand may have come
                assert inbox.in_order
                returned += published
                lost += inbox.lost(published)
                doubled += inbox.doubled
                await sub.unsubscribe()
            await until(lambda: node.sessions() == 1, "only this session is left")
            await until(lambda: nc.session_counters["links_in"] == 0, "the links of the dead are gone")
            await until(lambda: node.application()["subscriptions"] == 0, "the last unsubscription is done")
        tell("publisher killed 4 times", published=returned, lost=lost, doubled=doubled)
        assert (lost, doubled) == (0, 0)

    asyncio.run(run())


def test_what_a_killed_queue_member_had_not_read_goes_to_another(node: Node, tmp_path: Path) -> None:
    """It is stopped before anything is sent, so that all it gets lies unread in its link, and then killed."""

    async def run() -> None:
        everything, work = Inbox(), Inbox()
        count = 2000
        async with programs(tmp_path) as those, connection(node.url) as nc, connection(node.url) as other:
            await other.subscribe("work", cb=everything.take)
            await other.subscribe("work", "group", cb=work.take)
            victim = await those.ready("receive", node.url, True, subject="work", queue="group")
            await nc.publish("work", payload(0, 100))  # links are made
            await until(lambda: work.highest + victim.marks.highest == 1, "the first has come")
            first = work.highest
            await victim.stop()
            for number in range(1, count):
                await nc.publish("work", payload(number, 30_000 if number % 20 == 0 else 100))
            await until(lambda: everything.highest == count, "the others are not disturbed")
            unread = count - len(work.numbers) - (1 - first)
            await victim.kill()
            await until(lambda: len(work.numbers) + victim.marks.total >= count, "what the dead one had not read has come")
            await nc.flush()
            await other.flush()
            tell("queue member killed", published=count, unread=unread, lost=count - len(work.numbers) - victim.marks.total,
                 doubled=work.doubled, lost_by_others=everything.lost(count))
            assert unread > count // 4
            assert (len(work.numbers) + victim.marks.total, work.doubled, everything.lost(count)) == (count, 0, 0)
            await until(lambda: node.sessions() == 2 and node.application()["subscriptions"] == 2, "its interest is gone")
            await until(lambda: nc.session_counters["links_out"] == 1, "the link to it is gone")

    asyncio.run(run())


def test_memory_that_a_killed_subscriber_held_is_used_again(node: Node, tmp_path: Path) -> None:
    """It is stopped with 60 MB of the publisher's pool in its link; the pool has 256 MiB."""

    async def run() -> None:
        async with programs(tmp_path) as those, connection(node.url, write_deadline=60) as nc, connection(node.url) as other:
            inbox = Inbox()
            await other.subscribe("big", cb=inbox.take)
            for life in range(3):
                victim = await those.ready("receive", node.url, True, subject="big")
                await victim.stop()
                for number in range(60):
                    await nc.publish("big", payload(life * 60 + number, 1_000_000))
                await until(lambda: nc.session_counters["pool_bytes"] >= 60_000_000, "the gauge follows")
                held = nc.session_counters["pool_bytes"]
                await victim.kill()
                await until(lambda number: inbox.highest == number, "the other one has all", (life + 1) * 60)
                await until(lambda: nc.session_counters["links_out"] == 1, "the link is gone")
                tell("subscriber killed with 60 MB unread", pool_bytes=held)
                assert held < 100_000_000
            assert (inbox.lost(180), inbox.doubled) == (0, 0)
            await until(lambda: nc.session_counters["pool_bytes"] < 20_000_000, "idle memory is given back")

    asyncio.run(run())


def test_a_killed_nsnd_disturbs_no_traffic_and_loses_nothing(node: Node, tmp_path: Path) -> None:
    async def run() -> None:
        count, lost, doubled = 0, 0, 0
        inbox, late = Inbox(), Inbox()
        async with programs(tmp_path) as those, connection(node.url) as nc, connection(node.url) as other:
            await other.subscribe("x", cb=inbox.take)
            publisher = await those.ready("publish", node.url, True, subject="y", rate=500)
            received = Inbox()
            await other.subscribe("y", cb=received.take)
            await publisher.tell("start")
            await until(lambda: received.highest > 50, "the program publishes")
            await nc.publish("x", payload(count, 30_000))  # there is a link, and a segment for large messages
            count += 1
            await until(lambda: inbox.highest == 1, "and the subscriber has both")
            for life in range(3):
                node.kill()
                before = received.highest
                for _ in range(300):  # on links that there are
                    await nc.publish("x", payload(count, 30_000 if count % 50 == 0 else 100))
                    count += 1
                await until(lambda number: inbox.highest == number, "messages pass without nsnd", count)
                await until(lambda number: received.highest > number, "and those of the program", before + 50)
                started = time.monotonic()
                await other.subscribe(f"late.{life}", cb=late.take)  # reconciled when nsnd is back
                with pytest.raises((errors.Error, TimeoutError)):
                    await nc.rtt(1)
                assert time.monotonic() - started < 10
                node.start()
                await until(lambda: nc.is_connected and other.is_connected, "connected again")
                await other.flush()
                await nc.publish(f"late.{life}", payload(life, 100))
                await until(lambda number: late.highest == number, "what was subscribed meanwhile is in force", life + 1)
                await until(lambda: node.sessions() == 3, "all are there again")
            end = (await publisher.ask("stop"))["published"]
            await until(lambda: received.highest >= end, "all of the program's have come")
            await nc.flush()
            lost = inbox.lost(count) + received.lost(end) + late.lost(3)
            doubled = inbox.doubled + received.doubled + late.doubled
            tell("nsnd killed 3 times", published=count + end, lost=lost, doubled=doubled)
            assert (lost, doubled) == (0, 0)
            assert inbox.in_order
            assert received.in_order

    asyncio.run(run())


def test_programs_start_nsnd_again_when_one_that_started_by_itself_is_killed(
    runtime_dir: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSANE_NSND_LINGER", "0.5")

    async def run() -> None:
        url = f"nats://127.0.0.1:{free_port}"
        inbox = Inbox()
        async with connection(url) as nc, connection(url) as other:
            await other.subscribe("x", cb=inbox.take)
            await nc.publish("x", payload(0, 100))
            record = RuntimeDirectory(runtime_dir).record()
            assert record is not None
            os.kill(record.pid, signal.SIGKILL)
            await until(lambda: not nc.is_connected or not other.is_connected, "its end is seen")
            await nc.publish("x", payload(1, 100))
            await until(lambda: nc.is_connected and other.is_connected, "connected again")
            again = RuntimeDirectory(runtime_dir).record()
            assert again is not None
            await nc.publish("x", payload(2, 100))
            await until(lambda: inbox.highest == 3, "all have come")
            tell("nsnd killed that started by itself", lost=inbox.lost(3), doubled=inbox.doubled)
            assert again.pid != record.pid
            assert (inbox.lost(3), inbox.doubled) == (0, 0)

    asyncio.run(run())


def test_nsnd_is_upgraded_in_mid_traffic(node: Node, tmp_path: Path) -> None:
    """The old one is stopped and a new one started, three times, while a program publishes and others come."""

    async def run() -> None:
        async with programs(tmp_path) as those, connection(node.url) as nc:
            inbox, new = Inbox(), Inbox()
            await nc.subscribe("x", cb=inbox.take)
            await nc.subscribe("new", cb=new.take)
            work = [await those.ready("receive", node.url, True, subject="x", queue="group") for _ in range(2)]
            publisher = await those.ready("publish", node.url, True, subject="x", rate=500, large_every=50)
            await publisher.tell("start")
            await until(lambda: inbox.highest > 100, "messages come")
            for life in range(3):
                node.kill(signal.SIGTERM)
                await asyncio.sleep(0.05)
                node.start()
                async with connection(node.url) as late:
                    await late.publish("new", payload(life, 100))
                await until(lambda number: new.highest == number, "what was published at once has come", life + 1)
                before = inbox.highest
                await until(lambda number: inbox.highest > number, "messages go on coming", before + 200)
            end = (await publisher.ask("stop"))["published"]
            await until(lambda: inbox.highest >= end and new.highest == 3, "all have come")
            marks = [one.marks for one in work]
            await until(lambda: sum(one.total for one in marks) >= end, "the group has all")
            together = [sum(times) for times in zip(*(one.times(end) for one in marks), strict=True)]
            lost = inbox.lost(end) + new.lost(3) + together.count(0)
            doubled = inbox.doubled + new.doubled + sum(times > 1 for times in together)
            tell("nsnd upgraded 3 times", published=end, lost=lost, doubled=doubled, lost_here=inbox.lost(end),
                 lost_new=new.lost(3), lost_by_group=together.count(0))
            assert (lost, doubled) == (0, 0)
            assert inbox.in_order

    asyncio.run(run())


def test_nothing_is_left_when_all_are_killed(runtime_dir: Path, tmp_path: Path) -> None:
    with running_node(tmp_path, runtime_dir) as node:

        async def run() -> None:
            async with programs(tmp_path) as those:
                subscribers = [await those.ready("receive", node.url, True, subject="x") for _ in range(2)]
                publisher = await those.ready("publish", node.url, True, subject="x", large_every=3)
                await publisher.tell("start")
                await until(lambda: all(one.marks.highest > 100 for one in subscribers), "messages come")
                assert len(node.segments()) == 2
                node.send(signal.SIGKILL)
                for program in (publisher, *subscribers):
                    program.send(signal.SIGKILL)
                for program in (publisher, *subscribers):
                    await program.process.wait()
                node.kill()
                assert node.segments() == []

        asyncio.run(run())
        node.start()
        assert (node.sessions(), node.application()["subscriptions"], node.files()) == (0, 0, [])
        node.kill(signal.SIGTERM)
        tell("all killed at once, nsnd started and stopped", left=left_in(runtime_dir))
        assert left_in(runtime_dir) <= {"lock", "node"}


def test_a_forked_child_does_not_keep_a_killed_program_alive(node: Node, tmp_path: Path) -> None:
    async def run() -> None:
        async with programs(tmp_path) as those, connection(node.url) as nc:
            parent = await those.start("sit", node.url, subject="forked", fork=True)
            child = (await parent.hear())["child"]
            try:
                assert node.application()["subscriptions"] == 1
                await nc.publish("forked", b"")
                unroutable = nc.session_counters["unroutable"]
                await parent.kill()
                started = time.monotonic()
                await until(lambda: node.application()["subscriptions"] == 0 and node.sessions() == 1, "its interest is gone")
                tell("parent killed", gone_after_ms=(time.monotonic() - started) * 1e3)
                os.kill(child, 0)
                await nc.publish("forked", b"")
                assert nc.session_counters["unroutable"] == unroutable + 1
                await until(lambda: nc.session_counters["links_out"] == 0, "the link to it is gone")
            finally:
                os.kill(child, signal.SIGKILL)
            await nc.flush()
            assert node.files() == [f"bell.{node.application()['sessions'][0]['slot']}"]

    asyncio.run(run())


def test_ten_programs_that_start_at_once_start_one_nsnd(
    runtime_dir: Path, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSANE_NSND_LINGER", "0.5")

    async def run() -> None:
        url = f"nats://127.0.0.1:{free_port}"
        async with programs(tmp_path) as those:
            ten = [await those.start("sit", url, subject="all") for _ in range(10)]
            nodes = {(await one.hear())["node"] for one in ten}
            tell("10 programs started at once", nodes=len(nodes))
            assert len(nodes) == 1
            async with connection(url) as nc:
                assert nc._server_info["insane"]["pid"] in nodes
                await nc.publish("all", b"")
                assert nc.session_counters["deliveries_out"] == 10
            await asyncio.gather(*(one.end() for one in ten))
            pid = nodes.pop()
            await until(lambda: not Path(f"/proc/{pid}").exists(), "it ends when nobody uses it")
        assert left_in(runtime_dir) <= {"lock", "node", "nsnd.log"}

    asyncio.run(run())


def test_a_thousand_sessions_come_and_go_and_leave_nothing(node: Node, tmp_path: Path) -> None:
    """200 at a time; of the last 200 nobody says goodbye: their process is killed."""

    async def run() -> None:
        async with programs(tmp_path) as those, connection(node.url) as nc:
            inbox = Inbox()

            async def count(msg: object) -> None:
                inbox.numbers[len(inbox.numbers)] = 1

            await nc.subscribe("census", cb=count)
            warm = await those.start("come_and_go", node.url, sessions=200, at_once=200, subject="census")
            assert (await warm.hear())["made"] == 200
            await warm.kill()
            await until(lambda: node.sessions() == 1, "all are gone")
            before = (node.descriptors(), node.memory(), _descriptors_here())
            many = await those.start("come_and_go", node.url, sessions=1000, at_once=200, subject="census")
            while (await many.hear())["made"] < 1000:
                pass
            assert node.sessions() == 201
            assert node.application()["subscriptions"] == 201
            await many.kill()
            await until(lambda: node.sessions() == 1, "all are gone")
            await until(lambda: len(inbox.numbers) == 1200, "every session was heard")
            await until(lambda: nc.session_counters["links_in"] == 0, "their links are gone")
            # The question how many sessions there are was a connection too, which nsnd closes a moment later.
            await until(lambda: node.descriptors() <= before[0], "nsnd holds no more descriptors than before")
            after = (node.descriptors(), node.memory(), _descriptors_here())
            tell("1000 sessions made and dropped", descriptors=after[0] - before[0], bytes=after[1] - before[1],
                 descriptors_here=after[2] - before[2], subscriptions=node.application()["subscriptions"],
                 bells=len(node.files()))
            assert after[2] <= before[2]
            assert after[1] - before[1] < 4 << 20
            assert node.application()["subscriptions"] == 1
            assert len(node.files()) == 1
            assert not _mappings_here()

    asyncio.run(run())


def _descriptors_here() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mappings_here() -> list[str]:
    """Links and pool segments that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:nsn-" in line]


def test_a_node_that_was_started_by_hand_is_waited_for_without_starting_anything(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []

    async def autostart(*arguments: object) -> NoReturn:
        started.append(arguments)
        raise AssertionError

    async def run() -> None:
        seen, inbox = Errors(), Inbox()
        async with connection(node.url, error_cb=seen.note, reconnect_time_wait=0.05) as nc:
            await nc.subscribe("x", cb=inbox.take)
            node.kill()
            await until(lambda: sum("started by hand" in text for text in seen.texts) >= 3, "it tries, and says why not")
            with pytest.raises(errors.NoServersError, match="started by hand"):
                await nats.connect(node.url, error_cb=Errors().note)
            node.start()
            await until(lambda: nc.is_connected, "it is back")
            await nc.publish("x", payload(0, 100))
            await until(lambda: inbox.highest == 1, "it works")
            tell("nsnd by hand away", attempts=len(seen.texts), started=len(started))
            assert not started

    monkeypatch.setattr("insane_nats.shim.node.autostart", autostart)
    asyncio.run(run())


def test_close_waits_until_what_was_published_can_be_read_also_over_a_kill_of_nsnd(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nsnd alone has the link of a subscriber that is stopped: killed then, it must get that once more from who is closing."""
    monkeypatch.setattr("insane_nats.shim.connection.CLOSE_S", PATIENCE_S)
    count = 20

    async def run() -> None:
        async with programs(tmp_path) as those:
            stopped = await those.ready("receive", node.url, True, subject="x")
            await stopped.stop()
            seen = Errors()
            async with connection(node.url, error_cb=seen.note) as nc:
                for number in range(count):
                    await nc.publish("x", payload(number, 50_000 if number % 5 == 0 else 100))
                await nc.flush()
                closing = asyncio.create_task(nc.close())
                await asyncio.sleep(0)
                node.kill()
                assert not closing.done()
                node.start()
                stopped.go_on()
                await closing
                assert "UnreadError" not in "".join(seen.texts)
            await until(lambda: stopped.marks.highest == count, "all have come")
            times = stopped.marks.times(count)
            tell("nsnd killed while a publisher closes", published=count, lost=times.count(0), doubled=max(times) - 1)
            assert set(times) == {1}
            await stopped.end()

    asyncio.run(run())


def test_close_does_not_wait_for_ever_for_an_nsnd_that_is_gone_and_says_so(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("insane_nats.shim.connection.CLOSE_S", 0.3)

    async def run() -> None:
        async with programs(tmp_path) as those:
            stopped = await those.ready("receive", node.url, True, subject="x")
            await stopped.stop()
            seen = Errors()
            async with connection(node.url, error_cb=seen.note) as nc:
                await nc.publish("x", payload(0, 100))
                node.kill()
                async with asyncio.timeout(PATIENCE_S):
                    await nc.close()
                await until(lambda: any("UnreadError" in text for text in seen.texts), "it is said")
            monkeypatch.setattr("insane_nats.shim.connection.CLOSE_S", 2 * PATIENCE_S)
            async with connection(node.start().url) as nc:  # who has nothing to hand over does not wait
                node.kill()
                async with asyncio.timeout(PATIENCE_S):
                    await nc.close()

    asyncio.run(run())
