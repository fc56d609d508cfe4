"""A memory limit well below what a session may touch by default: at it the kernel kills, it does not say no."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

from tests.faults import Node, programs, running_node, tell, until
from tests.memory_group import memory_group, why_not

LIMIT = 64 << 20
SIZE = 100_000
COUNT = 3000  # messages: more than four times the limit

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def node(runtime_dir: Path, tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, runtime_dir) as running:
        yield running


def test_a_publisher_at_a_memory_limit_waits_and_drops_and_is_not_killed(node: Node, tmp_path: Path) -> None:
    async def run() -> None:
        with memory_group(LIMIT) as group:
            async with programs(tmp_path) as those:
                stopped = await those.ready("receive", node.url, True, subject="x")
                other = await those.ready("receive", node.url, True, subject="x")
                publisher = await those.ready("publish", node.url, True, subject="x", size=SIZE, count=COUNT,
                                              command=group.command(), connect={"write_deadline": 0.3})
                await stopped.stop()
                await publisher.tell("start")
                answer = await publisher.hear()
                assert (answer["published"], group.kills()) == (COUNT, 0)
                counters = answer["counters"]
                await until(lambda: other.marks.highest == COUNT, "the other has all")
                assert set(other.marks.times(COUNT)) == {1}
                stopped.go_on()

                async def accounted() -> bool:
                    said = await stopped.ask()
                    return bool(said["received"] + sum(said["slow"]) == COUNT)

                await until(accounted, "each message was received, or is known to have been dropped")
                received = (await stopped.ask())["received"]
                tell(f"memory limit of {LIMIT >> 20} MiB, {COUNT * SIZE >> 20} MiB published to a stopped one and another",
                     kills=group.kills(), waits=counters["waits"], dropped=counters["dropped"], received=received, lost=0)
                assert counters["waits"] > 0
                assert counters["dropped"] > 0
                for program in (publisher, stopped, other):
                    await program.end()

    asyncio.run(run())


def test_what_a_publisher_has_published_before_the_kernel_kills_it_is_received(node: Node, tmp_path: Path) -> None:
    async def run() -> None:
        with memory_group(LIMIT) as group:
            async with programs(tmp_path) as those:
                stopped = await those.ready("receive", node.url, True, subject="x")
                other = await those.ready("receive", node.url, True, subject="x")
                publisher = await those.ready("publish", node.url, True, subject="x", size=8000, count=20 * COUNT,
                                              command=group.command(), environment={"INSANE_NATS_BUDGET": "1G"})
                await stopped.stop()
                await publisher.tell("start")
                assert await publisher.process.wait() == -signal.SIGKILL
                assert group.kills() == 1
                published = publisher.marks.highest
                await until(lambda: other.marks.highest >= published, "the other has all")
                stopped.go_on()
                await until(lambda: stopped.marks.highest >= published, "who was stopped has all")
                for survivor in (other, stopped):
                    assert set(survivor.marks.times(published)) == {1}
                    assert survivor.marks.total - published in (0, 1)  # the last may have been written when it was killed
                await until(lambda: node.sessions() == 2, "the dead one's session is gone")
                for survivor in (other, stopped):
                    await until(lambda pid=survivor.pid: "/memfd:nsn-" not in Path(f"/proc/{pid}/maps").read_text(),
                                "its memory is released")
                tell(f"killed at a memory limit of {LIMIT >> 20} MiB", published=published, lost=0, doubled=0)
                for survivor in (other, stopped):
                    await survivor.end()

    asyncio.run(run())
