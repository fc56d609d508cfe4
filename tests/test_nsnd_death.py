"""Sessions that end without saying so, and nsnd that does: what was handed over arrives, what was wanted is not forgotten."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsnd import protocol as p
from tests.nsnd_client import Child, RawNode, RawSession, add, child, node, until
from tools.servers import free_port


@pytest.fixture
def running() -> Iterator[RawNode]:
    with node() as one:
        yield one


@contextlib.contextmanager
def log_cut_for_good(running: RawNode) -> Iterator[None]:
    """The log is cut, and no other can be made while this lasts."""
    directory = running.directory / str(running.port)
    (directory / "log.new").mkdir()
    os.truncate(next(directory.glob("log.[0-9]*")), 0)
    yield
    (directory / "log.new").rmdir()


def test_interest_that_cannot_be_written_is_not_answered_and_is_taken_when_it_comes_again(running: RawNode) -> None:
    session = running.session()
    session.subscribe(1, "before")
    assert session.table is not None
    with log_cut_for_good(running):
        for _ in range(2):
            number = session.interest(add(2, "after"), sequence=2)
            assert session.receive() is None  # it is to come back
            assert session.table.slot[session.slot].acknowledged == 1
            assert session.attach().acknowledged == 1
    session.interest(add(2, "after"), sequence=number)
    assert session.interest_done() == (2, 0, 0)
    assert running.application()["subscriptions"] == 2
    assert "the log of interest cannot be written" in running.log()
    session.goodbye()


def test_the_place_of_the_dead_is_kept_until_their_end_can_be_written(running: RawNode) -> None:
    witness, session = running.session(), running.session()
    session.subscribe(1, "mine")
    assert witness.table is not None
    with log_cut_for_good(running):
        session.goodbye()
        until(lambda: "interest of a session that ended cannot be removed" in running.log(), "nsnd has tried")
        assert witness.table.slot[session.slot].alive
    until(lambda: not witness.table.slot[session.slot].alive, "and tries again")  # type: ignore[union-attr]
    assert running.application()["subscriptions"] == 0
    witness.goodbye()


@contextlib.contextmanager
def session_in_a_child(running: RawNode, name: str, *subjects: str, link_to: RawSession | None = None,
                       links: int = 1) -> Iterator[Child]:
    """A forked process with a session that subscribes and hands links over, and then waits to be killed."""

    def work() -> None:
        session = running.session(name)
        session.bind_bell()
        for sid, subject in enumerate(subjects, 1):
            session.subscribe(sid, subject)
        if link_to is not None:
            for number in range(1, links + 1):
                session.link(link_to, number)
        kept.append(session)

    kept: list[RawSession] = []
    with child(work) as process:
        yield process


def names(running: RawNode) -> list[str]:
    return sorted(session["name"] for session in running.application()["sessions"])


# --- death of a session -----------------------------------------------------------------------------------------------


def test_what_a_killed_session_handed_over_arrives_and_then_the_news(running: RawNode) -> None:
    consumer = running.session("consumer")
    with session_in_a_child(running, "producer", "a.b", link_to=consumer, links=3) as producer:
        place = next(one for one in running.application()["sessions"] if one["name"] == "producer")
        producer.kill()
        for number in (1, 2, 3):
            assert consumer.take_link() == (place["slot"], place["generation"], number)
        assert consumer.peer_gone() == (place["slot"], place["generation"])
        assert names(running) == ["consumer"]
        assert running.application()["subscriptions"] == 0
        assert consumer.welcome is not None
        assert not Path(consumer.welcome.directory, f"bell.{place['slot']}").exists()


def test_the_news_of_a_death_comes_within_ten_milliseconds(running: RawNode) -> None:
    consumer = running.session("consumer")
    took = [1.0]
    while min(took) >= 0.01 and len(took) < 20:  # the machine may be busy with other things for a moment
        with session_in_a_child(running, "producer", "a", link_to=consumer) as producer:
            consumer.take_link()
            started = time.perf_counter()
            producer.kill()
            consumer.peer_gone()
            took.append(time.perf_counter() - started)
    assert min(took) < 0.01


def test_a_consumer_that_dies_is_reported_to_its_producers(running: RawNode) -> None:
    producer = running.session("producer")
    with session_in_a_child(running, "consumer") as consumer:
        place = next(one for one in running.application()["sessions"] if one["name"] == "consumer")
        dead = RawSession(running.socket, running.port)
        dead.slot, dead.generation = place["slot"], place["generation"]
        producer.link(dead, 1)
        producer.link(dead, 2)
        until(lambda: running.application()["links"], "the links are under way")
        consumer.kill()
    assert producer.peer_gone() == (dead.slot, dead.generation)
    assert producer.nothing_comes()
    producer.link(dead, 3)
    assert producer.peer_gone() == (dead.slot, dead.generation)


def test_links_arrive_though_their_producer_died_with_unread_packets(running: RawNode) -> None:
    """The kernel says "connection reset" in front of what such a process had sent."""
    consumer = running.session("consumer")

    def work() -> None:
        producer = running.session("producer")
        running.signal(signal.SIGSTOP)
        producer.send(p.PacketType.PING, bytes(8))
        for number in (1, 2):
            producer.link(consumer, number)
        kept.append(producer)

    kept: list[RawSession] = []
    peer = running.session("peer of the producer")
    with child(work) as producer:
        producer.kill()
        running.signal(signal.SIGCONT)
        assert consumer.take_link()[2] == 1
        assert consumer.take_link()[2] == 2
        consumer.expect(p.PacketType.PEER_GONE)
    peer.goodbye()


def test_unread_answers_do_not_hide_what_was_sent(running: RawNode) -> None:
    consumer = running.session("consumer")

    def work() -> None:
        producer = running.session("producer")
        producer.send(p.PacketType.PING, bytes(8))
        until(lambda: producer.sock.recv(100, socket.MSG_PEEK), "PONG is there, unread")
        running.signal(signal.SIGSTOP)
        producer.link(consumer, 1)
        kept.append(producer)

    kept: list[RawSession] = []
    with child(work) as producer:
        producer.kill()
        running.signal(signal.SIGCONT)
        assert consumer.take_link()[2] == 1
        consumer.expect(p.PacketType.PEER_GONE)


def test_a_forked_child_does_not_keep_a_dead_session_alive(running: RawNode) -> None:
    consumer = running.session("consumer")
    read_end, write_end = os.pipe()

    def work() -> None:
        producer = running.session("producer")
        producer.link(consumer, 1)
        kept.append(producer)
        if os.fork() == 0:
            os.close(write_end)
            os.read(read_end, 1)  # holds the socket open until the test is done
            os._exit(0)

    kept: list[RawSession] = []
    with child(work) as producer:
        assert consumer.take_link()[2] == 1
        producer.kill()
        consumer.expect(p.PacketType.PEER_GONE)
        assert names(running) == ["consumer"]
    os.close(write_end)
    os.close(read_end)


def test_a_lost_connection_of_a_living_process_keeps_its_interest(running: RawNode) -> None:
    session = running.session("still here")
    session.bind_bell()
    session.subscribe(1, "a")
    session.sock.close()
    until(lambda: not running.application()["sessions"][0]["attached"], "it is detached")
    time.sleep(3)
    assert running.application()["subscriptions"] == 1
    assert session.attach().reattached
    assert running.application()["sessions"][0]["attached"]


def test_all_sessions_of_a_process_end_with_it(running: RawNode) -> None:
    def work() -> None:
        kept.extend(running.session(f"number {i}") for i in range(20))

    kept: list[RawSession] = []
    with child(work) as many:
        assert len(names(running)) == 20
        many.kill()
        until(lambda: not names(running), "they have ended")
    session = running.session("next")
    assert (session.slot, session.generation) == (0, 2)


def test_a_session_whose_program_was_exchanged_for_another_ends(running: RawNode) -> None:
    consumer = running.session("consumer")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        producer = running.session("producer")
        producer.bind_bell()
        producer.link(consumer, 1)
        os.dup2(read_end, 0)
        os.execvp("cat", ["cat"])
    assert consumer.take_link()[2] == 1
    assert consumer.peer_gone() == (1, 1)
    os.close(write_end)
    os.close(read_end)
    os.waitpid(pid, 0)


def test_a_stopped_session_is_not_dead(running: RawNode) -> None:
    with session_in_a_child(running, "stopped", "a") as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        time.sleep(0.2)
        assert names(running) == ["stopped"]
        assert running.application()["subscriptions"] == 1


# --- death of nsnd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_session_and_its_interest_outlive_nsnd(running: RawNode, signum: int) -> None:
    session = running.session("survivor")
    session.subscribe(1, "a.*")
    session.subscribe(2, "b", "workers")
    before = running.status()
    running.kill(signum)
    assert session.receive() is None
    running.start()
    application = running.application()
    assert application["subscriptions"] == 2
    assert application["interest_number"] == before["applications"][0]["interest_number"]
    assert running.status()["node"]["id"] == before["node"]["id"]
    assert not application["sessions"][0]["attached"]
    first_id = session.welcome.client_id if session.welcome else 0
    welcome = session.attach()
    assert (welcome.reattached, welcome.acknowledged) == (True, 2)
    assert welcome.client_id > first_id
    session.subscribe(3, "c")
    assert running.application()["subscriptions"] == 3


def test_interest_that_nsnd_had_not_answered_is_sent_again_and_counts_once(running: RawNode) -> None:
    session = running.session()
    session.subscribe(1, "a")
    running.kill()
    running.start()
    assert session.attach().acknowledged == 1
    session.interest(b"", sequence=1)
    session.sequence = 1
    assert session.interest_done() == (1, 0, 0)
    session.subscribe(2, "b")
    assert running.application()["subscriptions"] == 2


def test_who_dies_while_there_is_no_nsnd_is_gone_at_its_start_and_all_hear_of_it(running: RawNode) -> None:
    survivor = running.session("survivor")
    with session_in_a_child(running, "victim", "a.b") as victim:
        place = next(one for one in running.application()["sessions"] if one["name"] == "victim")
        running.kill()
        victim.kill()
        running.start()
    assert [session["slot"] for session in running.application()["sessions"]] == [survivor.slot]
    assert running.application()["subscriptions"] == 0
    assert survivor.attach().reattached
    assert survivor.peer_gone() == (place["slot"], place["generation"])


def test_who_has_not_reattached_is_watched_all_the_same(running: RawNode) -> None:
    survivor = running.session("survivor")
    with session_in_a_child(running, "silent", "a.b") as silent:
        place = next(one for one in running.application()["sessions"] if one["name"] == "silent")
        running.kill()
        running.start()
        assert survivor.attach().reattached
        assert running.application()["subscriptions"] == 1
        silent.kill()
        assert survivor.peer_gone() == (place["slot"], place["generation"])
        assert running.application()["subscriptions"] == 0


def test_a_session_that_was_closed_without_nsnd_is_not_waited_for(running: RawNode) -> None:
    open_session, closed = running.session("open"), running.session("closed")
    for session in (open_session, closed):
        session.bind_bell()
    running.kill()
    closed.sock.close()
    assert closed.bell is not None
    closed.bell.close()
    running.start()
    assert len(names(running)) == 2
    until(lambda: len(names(running)) == 1, "the closed one is noticed")
    assert open_session.attach().reattached


def test_generations_and_numbers_go_on_over_restarts(running: RawNode) -> None:
    keeper = running.session("keeper")
    for generation in (1, 2, 3):
        session = running.session()
        assert (session.slot, session.generation) == (1, generation)
        session.subscribe(1, "a")
        session.goodbye()
        running.kill()
        running.start()
        assert keeper.attach().reattached


def test_every_application_id_with_sessions_is_served_again(running: RawNode) -> None:
    other = RawSession(running.socket, free_port())
    other.attach()
    running.kill()
    running.start()
    with socket.create_connection(("127.0.0.1", other.application_id)) as visitor:
        assert visitor.recv(4096).startswith(b"INFO {")
    assert other.attach().reattached


def test_files_of_an_earlier_boot_are_not_believed(running: RawNode) -> None:
    session = running.session("before")
    session.subscribe(1, "a")
    running.kill()
    record = running.directory / "node"
    text = record.read_text()
    boot = text.split('"boot_id": "')[1].split('"')[0]
    record.write_text(text.replace(boot, "0" * len(boot)))
    running.start()
    assert running.application()["subscriptions"] == 0
    assert not session.attach().reattached


def test_without_sessions_nothing_is_left_at_a_clean_end(running: RawNode) -> None:
    running.session("short").goodbye()
    assert running.kill(signal.SIGTERM) == 0
    assert {path.name for path in running.directory.iterdir()} == {"stderr"}


def test_a_load_of_changes_with_nsnd_killed_again_and_again_loses_none(running: RawNode) -> None:
    session = running.session("busy")
    for round_number in range(3):
        for i in range(200):
            session.interest(add_one(round_number * 200 + i))
        running.kill()
        running.start()
        done = session.attach().acknowledged
        for sequence in range(done + 1, session.sequence + 1):
            session.interest(add_one(sequence - 1), sequence=sequence)
            session.sequence -= 1
        while done < session.sequence:
            done = session.interest_done()[0]
    assert running.application()["subscriptions"] == 600


def add_one(sid: int) -> bytes:
    return add(sid + 1, f"round.{sid}")
