"""Parts of the shim without a node: subjects, headers, the spinning budget, the queue of a subscription."""

from __future__ import annotations

import asyncio
import types
from typing import Any, cast

import pytest
from nats import errors
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

from insane_nats.shim import headers, spin, subjects
from insane_nats.shim.subscription import PendingQueue

# --- subjects


@pytest.mark.parametrize("subject", ["", " ", "a b", "a\tb", "a\r\nPUB", "a\n"])
def test_bad_subjects(subject: str) -> None:
    with pytest.raises(errors.BadSubjectError):
        subjects.check(subject)


@pytest.mark.parametrize(("subject", "literal"), [("a.b", True), ("fo*", True), ("a.*", False), (">", False), ("a..b", False)])
def test_literal_subjects(subject: str, literal: bool) -> None:
    assert subjects.is_literal(subject) is literal


@pytest.mark.parametrize(
    ("patterns", "subject", "first"),
    [
        (["a.b", "a.*", ">"], "a.b", ">"),
        (["a.b", "a.*"], "a.b", "a.*"),
        (["*.b", "a.>"], "a.b", "*.b"),
        (["a.b"], "a.b", "a.b"),
        (["a.>"], "a", None),
        (["a.b.c", "*"], "a.b", None),
        ([">"], "a..b", None),
    ],
)
def test_first_subscription_is_the_one_a_server_finds_first(patterns: list[str], subject: str, first: str | None) -> None:
    subs = [cast(Any, types.SimpleNamespace(_subject=pattern, _queue="")) for pattern in patterns]
    found = subjects.first_plain(subs, subject)
    assert (found._subject if found is not None else None) == first


def test_queue_groups_do_not_hear_status_messages() -> None:
    assert subjects.first_plain([cast(Any, types.SimpleNamespace(_subject="a", _queue="q"))], "a") is None


# --- headers


BLOCKS = [
    b"NATS/1.0\r\nA: b\r\n\r\n",
    b"NATS/1.0\r\nA: b\r\nA: c\r\nBad Key: d\r\nE:f\r\n\r\n",
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"NATS/1.0 503\r\nNats-Subject: x.y\r\n\r\n",
    b"NATS/1.0 404 No Messages\r\n\r\n",
    b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 1\r\nNats-Pending-Bytes: 0\r\n\r\n",
    b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 1016\r\nNats-Last-Stream: 1024\r\n\r\n",
    b"NATS/1.0 100 FlowControl Request\r\n\r\n",
    "NATS/1.0\r\nä: b\r\nA: ü\r\n\r\n".encode(),
]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_read_as_nats_py_reads_them(block: bytes) -> None:
    async def theirs() -> dict[str, str] | None:
        return await NatsClient()._process_headers(block)

    assert headers.decode(block) == asyncio.run(theirs())


@pytest.mark.parametrize("block", [b"zzhi", b"", b"NATS/1.0"])
def test_what_is_no_header_block_is_nothing(block: bytes) -> None:
    assert headers.decode(block) is None


def test_headers_are_written_as_nats_py_writes_them() -> None:
    block = headers.encode({" A ": " b\r\nC: d ", "": "left out", "E": "ü"})
    assert block == "NATS/1.0\r\nA: b  C: d\r\nE: ü\r\n\r\n".encode()
    with pytest.raises(errors.BadHeaderError):
        headers.encode({"A B": "c"})


# --- spinning


def test_low_never_spins_and_poll_always() -> None:
    low, poll = spin.Spin("low"), spin.Spin("poll")
    for each in (low, poll):
        for _ in range(100):
            each.miss()
            each.woken(1)
    assert (low.budget_ns, poll.budget_ns) == (0, spin.POLL_NS)


def test_adaptive_budget_goes_while_it_does_not_pay() -> None:
    adaptive = spin.Spin("adaptive")
    spun = 0
    while adaptive.budget_ns:
        spun += adaptive.budget_ns
        adaptive.miss()
    assert spun < 3 * spin.MAX_NS


def test_short_sleeps_bring_the_budget_back_and_long_ones_do_not() -> None:
    adaptive = spin.Spin("adaptive")
    while adaptive.budget_ns:
        adaptive.miss()
    for _ in range(1000):
        adaptive.woken(10 * spin.WORTH_NS)
    assert adaptive.budget_ns == 0
    sleeps = 0
    while not adaptive.budget_ns:
        adaptive.woken(spin.WORTH_NS / 4)
        sleeps += 1
    assert adaptive.budget_ns == spin.PROBE_NS
    assert sleeps <= 8


def test_trust_is_lost_by_being_wrong_and_won_back_by_hits() -> None:
    adaptive = spin.Spin("adaptive")

    def sleeps_until_budget() -> int:
        while adaptive.budget_ns:
            adaptive.miss()
        sleeps = 0
        while not adaptive.budget_ns:
            adaptive.woken(1)
            sleeps += 1
        return sleeps

    needed = [sleeps_until_budget() for _ in range(12)]
    assert needed == sorted(needed)
    assert needed[-1] == spin.LAST_TRUST
    for _ in range(spin.SURE_HITS):
        adaptive.hit(1)
    assert sleeps_until_budget() < 10


def test_budget_follows_how_long_the_hits_take() -> None:
    adaptive = spin.Spin("adaptive")
    for spent_ns, budget_ns in ((1_000, spin.MAX_NS), (150_000, spin.PROBE_NS), (1_000, spin.MAX_NS)):
        for _ in range(spin.SURE_HITS):
            adaptive.hit(spent_ns)
        assert adaptive.budget_ns == budget_ns


# --- the queue of a subscription


def message(number: int) -> Msg:
    return Msg(_client=cast(Any, None), data=b"%d" % number)


def test_queue_is_an_asyncio_queue() -> None:
    async def main() -> None:
        queue = PendingQueue(2)
        assert isinstance(queue, asyncio.Queue)
        assert queue.empty()
        queue.put_nowait(message(1))
        await queue.put(message(2))
        assert queue.full() and queue.qsize() == 2
        with pytest.raises(asyncio.QueueFull):
            queue.put_nowait(message(3))
        putting = asyncio.create_task(queue.put(message(3)))
        await asyncio.sleep(0)
        assert (await queue.get()).data == b"1"
        await putting
        joining = asyncio.create_task(queue.join())
        assert [(await queue.get()).data, queue.get_nowait().data] == [b"2", b"3"]
        with pytest.raises(asyncio.QueueEmpty):
            queue.get_nowait()
        for _ in range(3):
            assert not joining.done()
            queue.task_done()
            await asyncio.sleep(0)
        await joining
        with pytest.raises(ValueError, match="too many times"):
            queue.task_done()

    asyncio.run(main())


def test_cancelled_get_leaves_its_message_to_the_next() -> None:
    async def main() -> None:
        queue = PendingQueue()
        one, two = asyncio.create_task(queue.get()), asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.put_nowait(message(1))
        one.cancel()
        assert (await two).data == b"1"

    asyncio.run(main())
