"""What runs out: descriptors, the file system of the runtime directory; and what comes in masses."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

import insane_nats as nats
from insane_nats import errors
from tests.fault_program import Errors, payload
from tests.faults import PATIENCE_S, Inbox, Node, connection, programs, running_node, tell, until
from tools import servers


@pytest.fixture
def node(runtime_dir: Path, tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path, runtime_dir) as running:
        yield running


def test_a_program_without_descriptors_gets_its_messages_and_clear_errors(node: Node, tmp_path: Path) -> None:
    async def run() -> None:
        async with programs(tmp_path) as those, connection(node.url) as nc, connection(node.url) as other:
            inbox = Inbox()
            await other.subscribe("new", cb=inbox.take)
            poor = await those.ready("no_descriptors", node.url, subject="poor", new="new")
            for number in range(50):  # the link needs a descriptor of the receiver, for a moment
                await nc.publish("poor", payload(number, 30_000 if number == 25 else 100))
            await other.publish("poor", payload(50, 100))
            connect, publish = await poor.ask("connect"), await poor.ask("publish")

            async def received() -> bool:
                return bool((await poor.ask())["received"] == list(range(51)))

            await until(received, "all have come, once")
            tell("no descriptors left", published=51, lost=0, doubled=0, connect=connect["error"], publish=publish["error"])
            assert connect["error"]
            assert "open files" in connect["error"] + connect["said"][0]
            assert "raise the limit of open files" in publish["error"]
            assert publish["connected"]
            assert (await poor.ask("free"))["free"]
            assert not (await poor.ask("publish"))["error"]
            await until(lambda: inbox.highest == 1, "what it publishes now arrives")
            assert (await poor.ask())["errors"] == []

    asyncio.run(run())


def test_an_nsnd_without_descriptors_turns_newcomers_away_and_serves_the_others(runtime_dir: Path, tmp_path: Path) -> None:
    node = Node(tmp_path, runtime_dir).start("prlimit", "--nofile=60:60")

    async def run() -> None:
        inbox = Inbox()
        async with connection(node.url) as nc, connection(node.url) as other:
            await other.subscribe("x", cb=inbox.take)
            guests: list[nats.NATS] = []
            seen = Errors()
            turned_away = 0
            texts: list[str] = []
            while turned_away < 2:
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        guests.append(await nats.connect(node.url, error_cb=seen.note, allow_reconnect=False))
                except errors.NoServersError as error:
                    texts.append(str(error))
                    turned_away += 1
                assert len(guests) < 60
            assert all("limit of open files" in text for text in texts)
            for number in range(100):
                await nc.publish("x", payload(number, 100))
            await until(lambda: inbox.highest == 100, "those who are there are served")
            for guest in guests:
                await guest.close()

            async def another() -> bool:
                try:
                    async with connection(node.url, allow_reconnect=False, connect_timeout=2) as late:
                        await late.publish("x", payload(100, 100))
                        return True
                except (errors.Error, OSError, TimeoutError):
                    return False

            await until(another, "there are descriptors again")
            await until(lambda: inbox.highest == 101, "others can come again")
            tell("nsnd with 60 descriptors", sessions=len(guests) + 2, turned_away=turned_away, lost=inbox.lost(101),
                 doubled=inbox.doubled)
            assert (inbox.lost(101), inbox.doubled) == (0, 0)

    try:
        asyncio.run(run())
    finally:
        node.kill(signal.SIGTERM)


def test_cut_files_of_a_node_end_no_program(node: Node, tmp_path: Path) -> None:
    """Nothing of the runtime directory is mapped by anybody."""

    async def run() -> None:
        inbox, late = Inbox(), Inbox()
        async with programs(tmp_path) as those, connection(node.url) as nc:
            receiver = await those.ready("receive", node.url, True, subject="x")
            await nc.subscribe("y", cb=inbox.take)
            for number in range(100):
                await nc.publish("x", payload(number, 100))
            await until(lambda: receiver.marks.highest == 100, "they have come")
            files = [path for path in (node.runtime / str(node.port)).iterdir() if path.is_file()]
            assert {path.name for path in files} == {"slots", "log.1"}
            for path in files:
                os.truncate(path, 0)
            for number in range(100, 200):
                await nc.publish("x", payload(number, 100))
            await until(lambda: receiver.marks.highest == 200, "those who are there go on")
            with pytest.raises(errors.NoServersError) as refused:
                await nats.connect(node.url, error_cb=Errors().note, allow_reconnect=False, connect_timeout=2)
            await nc.subscribe("z", cb=late.take)
            await nc.publish("y", payload(0, 100))
            await nc.publish("z", payload(0, 100))
            await until(lambda: inbox.highest == 1 and late.highest == 1, "and can subscribe")
            tell("files of the node cut to nothing", lost=receiver.marks.times(200).count(0), refused=str(refused.value))
            assert "slots does not say where the table of sessions is" in str(refused.value)
            assert (node.runtime / str(node.port) / "log.2").exists()

    asyncio.run(run())


def may_mount() -> bool:
    command = ["unshare", "-m", "true"]
    return os.geteuid() == 0 and shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="only root can mount a small tmpfs (unshare -m)")
def test_a_full_file_system_refuses_what_is_new_and_disturbs_nothing_else(runtime_dir: Path, free_port: int) -> None:
    arguments = {"url": f"nats://127.0.0.1:{free_port}", "directory": str(runtime_dir), "port": free_port}
    command = ["unshare", "-m", sys.executable, "-m", "tests.fault_program", "full_file_system", json.dumps(arguments)]
    done = subprocess.run(command, cwd=servers.ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    tell("file system of the runtime directory full", **answer)
    assert answer["connect"] == ""  # a session takes no room there
    assert answer["refused"]
    assert all("No space left" in text for text in answer["refused"])
    assert answer["left"] == 1
    assert (answer["lost"], answer["doubled"], answer["alive"]) == (0, 0, True)


def test_a_thousand_producers_are_served_in_the_order_of_their_publishes(node: Node, tmp_path: Path) -> None:
    """Their subscriber is stopped meanwhile, and then reads from a thousand links. Fair is: first come, first served."""

    async def run() -> None:
        each = 10
        async with programs(tmp_path) as those:
            consumer = await those.ready("order", node.url, True, subject="all")
            crowds = [await those.start("crowd", node.url, subject="all", sessions=250, first=250 * each * number, each=each)
                      for number in range(4)]
            for crowd in crowds:
                assert (await crowd.hear())["ready"]
            await until(lambda: consumer.marks.total == 1000, "each of the thousand is linked")
            await consumer.ask()
            await consumer.stop()
            for crowd in crowds:
                await crowd.tell("start")
            for crowd in crowds:
                assert (await crowd.hear())["published"] == 250 * each
            consumer.go_on()
            count = 1000 * each
            await until(lambda: consumer.marks.total >= count, "all have come")
            answer = await consumer.ask()
            times = consumer.marks.times(count)
            tell("1000 producers, one consumer", published=count, lost=times.count(0), doubled=sum(one > 1 for one in times),
                 links=answer["links"], most_places_moved=answer["moved"], latest_ms=answer["late_ms"])
            assert set(times) == {1}
            assert answer["links"] == 1000
            assert answer["moved"] < count // 2  # one that a scheduler held back in its publish lets many others pass
            for crowd in crowds:
                await crowd.end()
            await until(lambda: node.sessions() == 1, "only the consumer is left")
            await until(lambda: _mapped(consumer.pid) == 0, "the links are gone")

    asyncio.run(run())


def _mapped(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:nsn-")
