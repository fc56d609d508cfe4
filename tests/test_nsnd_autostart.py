"""`nsnd --autostart`: exactly one node, detached, gone when it is not needed, never in place of one that somebody started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsnd.arbiter import who_listens
from nsnd.status import query
from tests.nsnd_client import RawNode, RawSession, runtime_directory, until
from tools.servers import ROOT, free_port, nats_server


@pytest.fixture
def directory() -> Iterator[Path]:
    with runtime_directory() as path:
        yield path


def command(directory: Path, port: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "nsnd", "--autostart", "--port", str(port), "--runtime-dir", str(directory), *more]


def autostart(directory: Path, port: int, *more: str, linger: str = "60", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INSANE_NSND_LINGER": linger, "HOME": str(directory), **variables}
    return subprocess.run(command(directory, port, *more), capture_output=True, text=True, timeout=30, check=False,
                          env=environment, cwd=ROOT)


def pid(directory: Path) -> int:
    return int(json.loads((directory / "node").read_text())["pid"])


def is_gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists() or " Z " in Path(f"/proc/{process}/stat").read_text()


def refused_with(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode != 0
    assert result.stderr.startswith("nsnd: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


# --- exactly one ------------------------------------------------------------------------------------------------------


def test_it_starts_a_node_and_returns_when_its_info_is_there(directory: Path) -> None:
    port = free_port()
    result = autostart(directory, port)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    listener = who_listens(port)
    assert listener is not None
    assert (listener.uid, listener.pid, listener.socket) == (os.getuid(), pid(directory), str(directory / "nsnd.sock"))
    assert query(directory / "nsnd.sock")["node"]["started_by"] == "autostart"


def test_ten_at_once_start_exactly_one(directory: Path) -> None:
    port = free_port()
    starting = [subprocess.Popen(command(directory, port), cwd=ROOT) for _ in range(10)]
    assert [process.wait(60) for process in starting] == [0] * 10
    log = (directory / "nsnd.log").read_text()
    assert log.count(" info ready ") == 1
    assert " error " not in log


def test_ten_ports_at_once_are_served_by_one_node(directory: Path) -> None:
    ports = [free_port() for _ in range(10)]
    starting = [subprocess.Popen(command(directory, port), cwd=ROOT) for port in ports]
    assert [process.wait(60) for process in starting] == [0] * 10
    assert {listener.pid for port in ports if (listener := who_listens(port))} == {pid(directory)}
    assert (directory / "nsnd.log").read_text().count(" info ready ") == 1


def test_a_node_that_runs_is_asked_for_another_port(directory: Path) -> None:
    first, second = free_port(), free_port()
    assert autostart(directory, first).returncode == 0
    node = pid(directory)
    assert autostart(directory, second).returncode == 0
    assert pid(directory) == node
    listener = who_listens(second)
    assert listener is not None
    assert listener.pid == node


def test_a_node_that_was_killed_is_followed_by_another_with_its_sessions(directory: Path) -> None:
    port = free_port()
    autostart(directory, port)
    session = RawSession(directory / "nsnd.sock", port)
    session.attach()
    session.subscribe(1, "a")
    os.kill(pid(directory), signal.SIGKILL)
    assert session.receive() is None
    assert autostart(directory, port).returncode == 0
    assert session.attach().reattached
    assert query(directory / "nsnd.sock")["applications"][0]["subscriptions"] == 1


def test_an_autostart_that_is_killed_does_no_harm(directory: Path) -> None:
    port = free_port()
    for delay_ms in range(0, 400, 80):
        victim = subprocess.Popen(command(directory, port), cwd=ROOT)
        time.sleep(delay_ms / 1000)
        victim.kill()
        victim.wait()
        result = autostart(directory, port)
        assert (result.returncode, result.stderr) == (0, "")
        os.kill(pid(directory), signal.SIGTERM)
        until(lambda: not (directory / "node").exists(), "it ends")


# --- detached ---------------------------------------------------------------------------------------------------------


def test_the_node_has_nothing_of_the_program_that_started_it(directory: Path, tmp_path: Path) -> None:
    port = free_port()
    kept = os.open(tmp_path, os.O_RDONLY)
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    before = os.umask(0)
    try:
        # As `$(program)` does: it reads until the last holder of the pipe has gone.
        output = subprocess.run(command(directory, port), capture_output=True, pass_fds=[kept], check=True, timeout=20,
                                cwd=ROOT)
    finally:
        os.umask(before)
        os.sched_setaffinity(0, cpus)
        os.close(kept)
    assert output.stdout == b""
    node = pid(directory)
    assert os.getsid(node) != os.getsid(0)
    assert os.getsid(node) != node  # no session leader: it never gets a terminal
    assert os.sched_getaffinity(node) == cpus
    assert Path(f"/proc/{node}/cwd").resolve() == Path("/")
    status = Path(f"/proc/{node}/status").read_text()
    assert "\nUmask:\t0077\n" in status
    targets = {os.readlink(f"/proc/{node}/fd/{fd}") for fd in os.listdir(f"/proc/{node}/fd")}
    assert str(tmp_path) not in targets
    assert os.readlink(f"/proc/{node}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{node}/fd/1") == os.readlink(f"/proc/{node}/fd/2") == str(directory / "nsnd.log")
    assert (directory / "nsnd.log").stat().st_mode & 0o777 == 0o600
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    addresses = [line.split()[1] for line in lines if f":{port:04X} " in line]
    assert {address.split(":")[0] for address in addresses} == {"0100007F"}


def test_the_log_is_bounded(directory: Path) -> None:
    port = free_port()
    autostart(directory, port, "--log-level", "trace")
    with (directory / "nsnd.log").open("ab") as log:
        log.write(b"x" * (1 << 20))
    session = RawSession(directory / "nsnd.sock", port)
    session.attach()
    session.goodbye()
    until(lambda: (directory / "nsnd.log.1").exists(), "a new file is begun")
    session.attach()
    until(lambda: 0 < (directory / "nsnd.log").stat().st_size < 10000, "it goes on in the new file")
    assert os.readlink(f"/proc/{pid(directory)}/fd/2") == str(directory / "nsnd.log")


# --- its end ----------------------------------------------------------------------------------------------------------


def test_it_ends_some_time_after_its_last_session_and_leaves_nothing(directory: Path) -> None:
    port = free_port()
    autostart(directory, port, linger="0.4")
    node = pid(directory)
    session = RawSession(directory / "nsnd.sock", port)
    session.attach()
    time.sleep(0.8)
    assert not is_gone(node)
    session.goodbye()
    assert not is_gone(node)
    until(lambda: is_gone(node), "the node ends")
    assert list(directory.iterdir()) == []


def test_a_node_that_nobody_uses_ends(directory: Path) -> None:
    autostart(directory, free_port(), linger="0.2")
    until(lambda: not list(directory.iterdir()), "the node ends")


def test_it_ends_though_its_directory_was_removed(directory: Path) -> None:
    autostart(directory, free_port(), linger="0.5")
    node = pid(directory)
    shutil.rmtree(directory)
    until(lambda: is_gone(node), "the node ends")
    assert not directory.exists()


def test_a_detached_session_counts_as_one(directory: Path) -> None:
    port = free_port()
    autostart(directory, port, linger="0.2")
    session = RawSession(directory / "nsnd.sock", port)
    session.attach()
    session.sock.close()
    time.sleep(0.5)
    assert session.attach().reattached


def test_one_application_id_goes_while_another_stays(directory: Path) -> None:
    first, second = free_port(), free_port()
    autostart(directory, first, linger="0.2")
    session = RawSession(directory / "nsnd.sock", first)
    session.attach()
    autostart(directory, second)
    until(lambda: not (directory / str(second)).exists(), "the second goes")
    assert who_listens(second) is None
    assert who_listens(first) is not None
    session.subscribe(1, "unharmed")


def test_starting_and_ending_over_and_over_never_fails(directory: Path) -> None:
    port = free_port()
    for _ in range(6):
        assert autostart(directory, port, linger="0.01").returncode == 0


# --- never in place of another ----------------------------------------------------------------------------------------


def test_a_node_started_by_hand_is_waited_for_not_replaced(directory: Path) -> None:
    by_hand = RawNode(directory).start()
    assert by_hand.process is not None
    by_hand.kill()
    refused_with(autostart(directory, by_hand.port), "was started by hand", f"pid {by_hand.process.pid}", "start it again")
    by_hand.start()
    assert autostart(directory, by_hand.port).returncode == 0
    by_hand.kill(signal.SIGTERM)


def test_a_node_by_hand_that_ended_while_sessions_live_is_waited_for(directory: Path) -> None:
    by_hand = RawNode(directory).start()
    session = by_hand.session()
    assert by_hand.kill(signal.SIGTERM) == 0
    refused_with(autostart(directory, by_hand.port), "was started by hand")
    by_hand.start()
    assert session.attach().reattached
    by_hand.kill(signal.SIGTERM)


def test_a_node_by_hand_that_ended_and_was_not_needed_is_not_waited_for(directory: Path) -> None:
    by_hand = RawNode(directory).start()
    assert by_hand.kill(signal.SIGTERM) == 0
    assert autostart(directory, by_hand.port).returncode == 0


def test_a_mark_of_an_earlier_boot_does_not_count(directory: Path) -> None:
    by_hand = RawNode(directory).start()
    by_hand.kill()
    record = json.loads((directory / "node").read_text())
    (directory / "node").write_text(json.dumps(record | {"boot_id": "an earlier one"}))
    assert autostart(directory, by_hand.port).returncode == 0


def test_a_configuration_is_not_exchanged_for_another(directory: Path, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "nsnd.cfg"
    config.write_text("[global]\nmax_payload = 2000000\n")
    assert autostart(directory, port, INSANE_NSND_CONFIG=str(config)).returncode == 0
    with socket.create_connection(("127.0.0.1", port)) as visitor:
        assert b'"max_payload":2000000' in visitor.recv(4096)
    os.kill(pid(directory), signal.SIGKILL)
    until(lambda: who_listens(port) is None, "it is gone")
    refused_with(autostart(directory, port), str(config), "start it again")
    assert autostart(directory, port, INSANE_NSND_CONFIG=str(config)).returncode == 0


def test_a_node_by_hand_takes_over_what_an_autostarted_one_left(directory: Path) -> None:
    port = free_port()
    autostart(directory, port)
    session = RawSession(directory / "nsnd.sock", port)
    session.attach()
    os.kill(pid(directory), signal.SIGKILL)
    by_hand = RawNode(directory, port).start()
    assert session.attach().reattached
    by_hand.kill(signal.SIGTERM)


def test_a_nats_server_on_the_port_is_named(directory: Path, tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        refused_with(autostart(directory, server.port), f"port {server.port}", "a NATS server (version 2.15.1")
    assert not (directory / "node").exists()


def test_a_port_that_something_else_has_is_named(directory: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused_with(autostart(directory, port), f"port {port}", "does not speak NATS", "choose another port")


def test_a_node_that_does_not_answer_is_named(directory: Path) -> None:
    by_hand = RawNode(directory).start()
    assert by_hand.process is not None
    by_hand.signal(signal.SIGSTOP)
    refused_with(autostart(directory, free_port()), f"pid {by_hand.process.pid}", "does not answer")
    by_hand.signal(signal.SIGCONT)
    by_hand.kill(signal.SIGTERM)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--port", "0"], "1 to 65535"),
    (["--log-level", "loud"], "error, warn, info"),
    (["--addr", "0.0.0.0"], "127.0.0.1 alone"),
    (["--frobnicate"], "--frobnicate"),
    (["--config", "/nowhere.cfg"], "/nowhere.cfg"),
])
def test_what_is_asked_wrongly_is_said(directory: Path, arguments: list[str], words: str) -> None:
    refused_with(autostart(directory, free_port(), *arguments), words)
