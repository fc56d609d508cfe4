"""Programs and nsnd of different protocol versions on one host: each speaks its own and the previous one."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

from nsnd.protocol import VERSION_MAX
from tests.faults import Node, Program, programs, running_node, tell, until
from tests.other_version import OtherVersion, build

RATE = 2000


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> OtherVersion:
    """The next version."""
    return build(VERSION_MAX + 1, tmp_path_factory.mktemp("newer"))


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> OtherVersion:
    """The one after that, which has none in common with this one."""
    return build(VERSION_MAX + 2, tmp_path_factory.mktemp("strange"))


@pytest.fixture
def node(runtime_dir: Path, tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, runtime_dir) as running:
        yield running


async def replace(node: Node, other: OtherVersion, sessions: int) -> None:
    """Stops the node and starts one of another version. sessions: how many then attach again."""
    node.kill(signal.SIGTERM)
    node.start(*other.command)

    async def attached() -> bool:
        return len([session for session in node.application()["sessions"] if session["attached"]]) == sessions

    await until(attached, "the sessions are attached again")


async def stop(publisher: Program) -> int:
    """How many it has published."""
    await publisher.tell("stop")
    return int((await publisher.hear())["published"])


def count(program: Program, published: int) -> tuple[int, int]:
    """Lost and doubled."""
    times = program.marks.times(published)
    return times.count(0), sum(one > 1 for one in times)


def test_nsnd_is_upgraded_in_mid_traffic(node: Node, newer: OtherVersion, tmp_path: Path) -> None:
    async def run() -> None:
        async with programs(tmp_path) as those:
            old = await those.ready("receive", node.url, True, subject="x")
            publisher = await those.ready("publish", node.url, True, subject="x", rate=RATE, large_every=50)
            await publisher.tell("start")
            await until(lambda: old.marks.highest > 200, "messages arrive")
            await replace(node, newer, 2)
            new = await those.ready("receive", node.url, True, environment=newer.environment, subject="x")
            first = publisher.marks.highest
            new_publisher = await those.ready("publish", node.url, True, environment=newer.environment, subject="y", rate=RATE,
                                              large_every=50)
            old_of_new = await those.ready("receive", node.url, True, subject="y")
            await new_publisher.tell("start")
            await until(lambda: old_of_new.marks.highest > 200 and new.marks.highest > first + 200, "old and new are linked")
            published, also_published = await stop(publisher), await stop(new_publisher)
            await until(lambda: old.marks.highest == published == new.marks.highest, "all have come")
            await until(lambda: old_of_new.marks.highest == also_published, "all have come")
            seen_by_new = new.marks.times(published)[first + 1 :]
            tell("nsnd upgraded to the next protocol version", published=published + also_published,
                 old=count(old, published), new=(seen_by_new.count(0), max(seen_by_new)),
                 old_of_new=count(old_of_new, also_published))
            assert count(old, published) == count(old_of_new, also_published) == (0, 0)
            assert set(seen_by_new) == {1}
            for program in (publisher, new_publisher, old, new, old_of_new):
                assert not any("version" in error for error in (await program.ask())["errors"])
                await program.end()

    asyncio.run(run())


def test_a_newer_program_speaks_the_previous_version_with_an_old_nsnd(node: Node, newer: OtherVersion, tmp_path: Path) -> None:
    async def run() -> None:
        async with programs(tmp_path) as those:
            new = await those.ready("receive", node.url, True, environment=newer.environment, subject="x")
            old = await those.ready("receive", node.url, True, subject="y")
            to_new = await those.ready("publish", node.url, True, subject="x", count=500)
            to_old = await those.ready("publish", node.url, True, environment=newer.environment, subject="y", count=500)
            for publisher, receiver in ((to_new, new), (to_old, old)):
                await publisher.tell("start")
                assert (await publisher.hear())["published"] == 500
                await until(lambda receiver=receiver: receiver.marks.highest == 500, "all have come")
                assert count(receiver, 500) == (0, 0)
            for program in (new, old, to_new, to_old):
                await program.end()

    asyncio.run(run())


def test_a_program_that_shares_no_version_with_nsnd_is_told_both_and_the_way_out(node: Node, strange: OtherVersion,
                                                                                 tmp_path: Path) -> None:
    async def run() -> None:
        async with programs(tmp_path) as those:
            program = await those.start("attempt", node.url, environment=strange.environment)
            error = (await program.hear())["error"]
            assert f"speaks versions {VERSION_MAX} to {VERSION_MAX}" in error
            assert f"this session {VERSION_MAX + 1} to {VERSION_MAX + 2}" in error
            assert f"kill {node.pid}" in error
            node.kill(signal.SIGTERM)
            node.start(*strange.command)
            program = await those.start("attempt", node.url)
            error = (await program.hear())["error"]
            assert f"speaks versions {VERSION_MAX + 1} to {VERSION_MAX + 2}" in error
            assert f"this session {VERSION_MAX} to {VERSION_MAX}" in error
            assert "upgrade its insane_nats" in error

    asyncio.run(run())


def test_sessions_that_an_upgrade_leaves_behind_go_on_as_they_were(node: Node, strange: OtherVersion, tmp_path: Path) -> None:
    """Nobody loses anything, and both sides say what is wrong."""

    async def run() -> None:
        async with programs(tmp_path) as those:
            old = await those.ready("receive", node.url, True, subject="x")
            publisher = await those.ready("publish", node.url, True, subject="x", rate=RATE)
            await publisher.tell("start")
            await until(lambda: old.marks.highest > 200, "messages arrive")
            await replace(node, strange, 0)
            there = old.marks.highest
            await until(lambda: old.marks.highest > there + 200, "messages arrive")
            stranger = await those.ready("publish", node.url, environment=strange.environment, subject="x", count=10)
            await stranger.tell("start")
            assert (await stranger.hear())["published"] == 10

            async def told(program: Program, words: str) -> bool:
                return any(words in error for error in (await program.ask())["errors"])

            await until(told, "the old one hears why it is not attached", old, f"speaks versions {VERSION_MAX + 1} to")
            await until(told, "the other hears that it is not linked", stranger,
                        f"process {old.pid} speaks versions {VERSION_MAX} to {VERSION_MAX}")
            published = await stop(publisher)
            await until(lambda: old.marks.highest == published, "all have come")
            tell("nsnd replaced by one that shares no version", published=published, lost_doubled=count(old, published))
            assert count(old, published) == (0, 0)
            for program in (publisher, old, stranger):
                await program.kill()

    asyncio.run(run())
