"""nsnd in the foreground: its ports, its signals, its configuration, and what it says when it cannot start."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsnd.arbiter import NOT_A_SERVER
from tests.nsnd_client import RawNode, node, runtime_directory, until
from tools.servers import ROOT, command_path, free_port, nats_server


@pytest.fixture
def running() -> Iterator[RawNode]:
    with node() as one:
        yield one


@pytest.fixture
def directory() -> Iterator[Path]:
    with runtime_directory() as path:
        yield path


def visit(port: int, host: str = "127.0.0.1") -> socket.socket:
    sock = socket.create_connection((host, port), 10)
    sock.settimeout(10)
    return sock


def info(sock: socket.socket) -> dict[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        line += sock.recv(1)
    assert line.startswith(b"INFO ")
    assert line.endswith(b" \r\n")
    found: dict[str, Any] = json.loads(line[5:])
    return found


def fails(directory: Path, *arguments: str) -> str:
    """What it says on stderr, all of it in one line."""
    result = subprocess.run(RawNode(directory).command(*arguments), capture_output=True, text=True, timeout=20, check=False,
                            cwd=ROOT)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("nsnd: ")
    return line


# --- the port ---------------------------------------------------------------------------------------------------------


def test_info_is_that_of_a_nats_server_and_says_who_we_are(running: RawNode) -> None:
    assert running.process is not None
    with visit(running.port) as sock:
        first = info(sock)
        assert first["client_ip"] == "127.0.0.1"
    assert {key: first[key] for key in ("version", "proto", "host", "port", "headers", "max_payload")} == {
        "version": "2.15.1", "proto": 1, "host": "127.0.0.1", "port": running.port, "headers": True, "max_payload": 1 << 20}
    assert first["server_id"]
    assert first["server_name"]
    ours = first["insane"]
    assert ours == {"version": "0.1.0", "node": running.status()["node"]["id"], "domain": ours["domain"], "uid": os.getuid(),
                    "pid": running.process.pid, "socket": str(running.socket), "protocol": [1, 1]}
    with visit(running.port) as sock:
        assert info(sock)["client_id"] > first["client_id"]


@pytest.mark.parametrize("first", [b'CONNECT {"verbose":false}\r\nPING\r\n', b"PING\r\n", b"SUB a 1\r\n", b"x" * 5000])
def test_a_nats_client_of_another_kind_is_told(running: RawNode, first: bytes) -> None:
    with visit(running.port) as sock:
        info(sock)
        sock.sendall(first)
        answer = b""
        while part := sock.recv(4096):
            answer += part
        assert answer == NOT_A_SERVER


def test_a_connection_that_says_nothing_is_closed(running: RawNode) -> None:
    with visit(running.port) as sock:
        info(sock)
        started = time.monotonic()
        assert sock.recv(1) == b""
        assert 4.5 < time.monotonic() - started < 9


def test_the_oldest_of_too_many_connections_is_closed(running: RawNode) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    first = visit(running.port)
    info(first)
    others = []
    for _ in range(1024):
        others.append(visit(running.port))
        others[-1].recv(6)
    assert first.recv(1) == b""
    info_of_another = visit(running.port)
    info(info_of_another)
    for sock in (first, info_of_another, *others):
        sock.close()


def test_a_real_client_gives_up_with_our_words(running: RawNode) -> None:
    program = f"""
import asyncio, nats
async def main():
    await nats.connect("nats://127.0.0.1:{running.port}", allow_reconnect=False, connect_timeout=5)
asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert "insane_nats node" in result.stderr


def test_a_nats_server_cannot_have_the_port_as_well(running: RawNode) -> None:
    result = subprocess.run([command_path("nats-server"), "-p", str(running.port)], capture_output=True, text=True, timeout=20,
                            check=False)
    assert "address already in use" in result.stderr


def test_another_address_is_listened_on_as_well() -> None:
    with node("--addr", "127.0.0.2") as running:
        for host in ("127.0.0.1", "127.0.0.2"):
            with visit(running.port, host) as sock:
                assert info(sock)["host"] == host


def test_a_port_that_a_nats_server_has_is_an_error_naming_it(directory: Path, tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        line = fails(directory, "--port", str(server.port))
    assert f"port {server.port} cannot be bound" in line
    assert "a NATS server (version 2.15.1" in line
    assert line.endswith("listens there: end that one, or choose another port")
    assert not (directory / "node").exists()


def test_a_port_that_another_node_has_is_an_error_naming_it(running: RawNode, directory: Path) -> None:
    assert running.process is not None
    line = fails(directory, "--port", str(running.port))
    assert f"an insane_nats node of uid {os.getuid()} (pid {running.process.pid}" in line


def test_a_second_node_in_one_directory_is_an_error_naming_the_first(running: RawNode) -> None:
    assert running.process is not None
    line = fails(running.directory, "--port", str(free_port()))
    assert f"pid {running.process.pid}" in line
    assert str(running.directory) in line
    running.session().goodbye()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly(running: RawNode, signum: int) -> None:
    session = running.session()
    assert running.kill(signum) == 0
    assert session.receive() is None
    assert not running.socket.exists()
    assert (running.directory / str(running.port) / "slots").exists()
    assert "Traceback" not in running.log()


def test_the_configuration_is_reread(directory: Path, tmp_path: Path) -> None:
    config = tmp_path / "nsnd.cfg"
    config.write_text("[global]\nmax_payload = 1000\n")
    running = RawNode(directory)
    running.start("--config", str(config))
    session = running.session()
    assert session.welcome is not None
    assert session.welcome.max_payload == 1000
    config.write_text(f'[global]\nmax_payload = 2000\nport = {running.port}\naddr = "127.0.0.3"\nshm_size = 64\n')
    running.signal(signal.SIGHUP)
    until(lambda: "configuration reread" in running.log(), "it is reread")
    assert "this cannot change while the node runs key=addr now=127.0.0.1 file=127.0.0.3" in running.log()
    assert "global.shm_size has no meaning here" in running.log()
    with visit(running.port) as sock:
        assert info(sock)["max_payload"] == 2000
    config.write_text("[global]\nmax_payload = -1\n")
    running.signal(signal.SIGHUP)
    until(lambda: "configuration was not reread" in running.log(), "the error is said")
    assert "global.max_payload" in running.log()
    with visit(running.port) as sock:
        assert info(sock)["max_payload"] == 2000
    session.goodbye()
    assert running.kill(signal.SIGTERM) == 0


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_control_socket_elsewhere(directory: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "control"
    running = RawNode(directory)
    with (directory / "stderr").open("wb") as log:
        running.process = subprocess.Popen(running.command("--socket", str(elsewhere)), stderr=log, cwd=ROOT)
    until(elsewhere.exists, "it listens")
    with visit(running.port) as sock:
        assert info(sock)["insane"]["socket"] == str(elsewhere)
    assert running.kill(signal.SIGTERM) == 0
    assert not elsewhere.exists()


def test_errors_say_what_is_wrong(directory: Path, tmp_path: Path) -> None:
    assert "--addr here: allowed is an IP address" in fails(directory, "--addr", "here")
    assert "no such file" in fails(directory, "--config", str(tmp_path / "none"))
    assert "at most 107 bytes" in fails(directory, "--socket", str(tmp_path / ("x" * 120)))
    file = tmp_path / "file"
    file.touch()
    assert "something else is there" in fails(directory, "--socket", str(file))
    assert file.exists()
    directory.chmod(0o755)
    assert f"chmod 700 {directory}" in fails(directory)
    directory.chmod(0o700)
    assert "is not a directory" in fails(file)


def test_the_version_is_told(directory: Path) -> None:
    result = subprocess.run(RawNode(directory).command("--version"), capture_output=True, text=True, timeout=20, check=True)
    assert result.stdout == "nsnd, version 0.1.0\n"
