"""`insane-nats status` against a stand-in for nsnd: finding the node, the packets, the table, and what it says without one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest

from insane_nats.cli import node
from insane_nats.cli.status import render, size
from tools.servers import Server

ROOT = Path(__file__).parent.parent


def session(slot: int, **counters: int) -> dict[str, Any]:
    fields = {"slot": slot, "generation": 3, "name": f"program {slot}", "pid": 4000 + slot, "attached": slot != 2}
    fields["uid"] = 1000 + slot
    return fields | {"subscriptions": slot + 1, "counters": counters}


ANSWER: dict[str, Any] = {
    "node": {
        "id": "00ab",
        "pid": 77,
        "version": "0.1.0",
        "uptime_s": 3723.5,
        "runtime_dir": "/dev/shm/insane_nats-7",
        "started_by": "autostart",
        "what later versions say": True,
    },
    "applications": [
        {
            "application_id": 4222,
            "interest_number": 18,
            "subscriptions": 6,
            "sessions": [
                session(0, messages_out=12345, bytes_out=1 << 20, link_bytes=65536, pool_bytes=65536, links_out=1, dropped=2),
                session(1, messages_in=12000, bytes_in=1536, discarded=5, slow_consumer=1, backlog_bytes=10),
                session(2),
            ],
            "links": [{"from_slot": 0, "to_slot": 1}],
        }
    ],
}


def status_packets(answer: bytes, piece: int) -> list[bytes]:
    pieces = [answer[start : start + piece] for start in range(0, len(answer), piece)]
    return [node.STATUS_HEAD.pack(node.MAGIC, node.STATUS, 1, len(part), part is pieces[-1]) + part for part in pieces]


@contextmanager
def serving(listener: socket.socket, answers: Callable[[bytes], list[bytes]]) -> Iterator[None]:
    """Answers each connection's first packet until the listener is shut down."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                question = connection.recv(4096)
                for packet in answers(question) if question else []:
                    connection.sendall(packet)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


@contextmanager
def control_socket(path: Path, packets: list[bytes]) -> Iterator[Path]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    asked: list[bytes] = []
    with serving(listener, lambda question: asked.append(question) or packets):  # type: ignore[func-returns-value]
        yield path
    assert set(asked) <= {node.PACKET.pack(node.MAGIC, node.STATUS, node.PROTOCOL_VERSION)}


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    """The runtime directory of a node that answers ANSWER, in small packets."""
    with control_socket(tmp_path / "nsnd.sock", status_packets(msgpack.packb(ANSWER), 100)):
        yield tmp_path


def status(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "NATS_URL"} | variables
    command = [sys.executable, "-m", "insane_nats", "status", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failing command writes."""
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_json_is_all_that_the_node_says(runtime: Path) -> None:
    result = status("--json", INSANE_NATS_RUNTIME_DIR=str(runtime))
    assert json.loads(result.stdout) == ANSWER


def test_the_table_shows_sessions_and_totals(runtime: Path) -> None:
    lines = status("--socket", str(runtime / "nsnd.sock")).stdout.splitlines()
    assert lines[0] == "node 00ab: nsnd 0.1.0, pid 77, up 1:02:03, started by autostart, in /dev/shm/insane_nats-7"
    assert lines[2] == "application 4222, interest 18"
    rows = [line.split() for line in lines[4:]]
    first = "0.3 4000 1000 program 0 1 1 12,345 0 1.0 MiB 0 B 128.0 KiB 0 B 2 0"
    assert rows[0] == first.split()
    assert rows[2][:3] == ["2.3", "detached", "4002"]
    last = "total 3 sessions 6 1 12,345 12,000 1.0 MiB 1.5 KiB 128.0 KiB 10 B 7 1"
    assert rows[3] == last.split()


def test_where_there_are_users_the_table_shows_them_and_their_account() -> None:
    application = ANSWER["applications"][0]
    users = ["alice", None, "bob\n"]
    sessions = [one | {"user": user} for one, user in zip(application["sessions"], users, strict=True)]
    answer = ANSWER | {"applications": [application | {"account": "ORDERS", "sessions": sessions}]}
    lines = render(node.parse_status(answer)).splitlines()[2:]
    assert lines[0] == "application 4222, account ORDERS, interest 18"
    assert lines[1].split()[:5] == ["SESSION", "PID", "UID", "USER", "NAME"]
    column = lines[1].index("USER")
    assert [line[column:].split()[0] for line in lines[2:5]] == ["alice", "-", "bob\\n"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_columns_are_aligned() -> None:
    lines = render(node.parse_status(ANSWER)).splitlines()[3:]
    assert len({len(line) for line in lines}) == 1


def test_the_node_at_a_url_is_found_by_its_info(runtime: Path) -> None:
    with info_line({"insane": {"socket": str(runtime / "nsnd.sock")}}) as port:
        for result in (
            status("--url", f"nats://127.0.0.1:{port}"),
            status(INSANE_NATS_RUNTIME_DIR="/nowhere", NATS_URL=f"nats://user:secret@localhost:{port}?datapath=fast"),
        ):
            assert "program 1" in result.stdout, result.stderr


@contextmanager
def info_line(fields: dict[str, Any], line: bytes = b"") -> Iterator[int]:
    """The port of a server that greets with an INFO."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        greeting = line or b"INFO " + json.dumps({"version": "2.15.1", **fields}).encode() + b" \r\n"

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_running_node_shows_a_subscriber_and_what_it_got(nsnd: Server) -> None:
    environ = os.environ | {"NATS_URL": nsnd.url}
    command = [sys.executable, "-m", "insane_nats"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "sub", "a.*", "--raw"], cwd=ROOT, env=environ, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stderr.readline().startswith(b"subscribed")
            subprocess.run([*command, "pub", "a.b", "12345", "--count", "3"], cwd=ROOT, env=environ, check=True, timeout=60)
            assert process.stdout.read(18) == b"12345\n" * 3
            (application,) = json.loads(status("--json").stdout)["applications"]
            table = status("--url", nsnd.url).stdout
        finally:
            process.kill()
    (session,) = application["sessions"]
    assert (application["application_id"], session["pid"], session["subscriptions"]) == (nsnd.port, process.pid, 1)
    assert (session["counters"]["messages_in"], session["counters"]["bytes_in"]) == (3, 15)
    assert "insane-nats sub" in table
    assert f"pid {nsnd.pid}" in table


def test_without_a_node_it_says_so(tmp_path: Path, free_port: int) -> None:
    url = f"nats://127.0.0.1:{free_port}"
    line = failure(status(INSANE_NATS_RUNTIME_DIR=str(tmp_path), NATS_URL=url))
    assert f"nobody listens at {tmp_path}/nsnd.sock" in line
    assert f"nobody answers at 127.0.0.1:{free_port} (Connection refused)" in line
    assert f"nsnd --port {free_port}" in line
    assert "no nsnd is running" in failure(status("--socket", str(tmp_path / "nsnd.sock")))


def test_a_nats_server_is_no_node(nats_server: Server) -> None:
    line = failure(status("--url", nats_server.url))
    assert "is a NATS server (version 2.15" in line


def test_something_else_on_the_port_is_no_node() -> None:
    with info_line({}, b"220 mail.example ESMTP\r\n") as port:
        assert "speaks no NATS" in failure(status("--url", f"127.0.0.1:{port}"))


def test_a_url_that_is_none_is_refused() -> None:
    assert "is no NATS URL" in failure(status("--url", "nats://127.0.0.1:port"))


REFUSED = node.REFUSED_HEAD.pack(node.MAGIC, node.REFUSED, 1, 93, 0) + b"protocol 9 is not spoken here".ljust(496, b"\0")


@pytest.mark.parametrize(
    ("packets", "words"),
    [
        ([], "closed the connection before its status was complete"),
        ([b"x" * 40], "is no nsnd"),
        ([REFUSED], "refuses: protocol 9 is not spoken here"),
        (status_packets(msgpack.packb(ANSWER), 100)[:-1], "closed the connection before its status was complete"),
        (status_packets(b"\xc1", 100), "is no msgpack"),
        (status_packets(msgpack.packb([]), 100), "is no map"),
        (status_packets(msgpack.packb({"node": {"id": "1"}}), 100), "KeyError"),
        ([status_packets(msgpack.packb(ANSWER), 100)[0][:-1]], "cut short"),
        ([node.PACKET.pack(node.MAGIC, 11, 1)], "answered packet type 11"),
    ],
)
def test_a_node_that_answers_wrongly_is_reported(tmp_path: Path, packets: list[bytes], words: str) -> None:
    with control_socket(tmp_path / "nsnd.sock", packets) as path:
        assert words in failure(status("--socket", str(path)))


def test_hostile_names_cannot_move_the_cursor() -> None:
    answer = json.loads(json.dumps(ANSWER))
    answer["applications"][0]["sessions"][0]["name"] = "\x1b[2J" + "x" * 100
    text = render(node.parse_status(answer))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 180


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB"), (2 << 40, "2.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
