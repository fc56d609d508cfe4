"""Finding out who is at a URL, and starting a node where nobody is."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import nats as nats_py
import pytest

import insane_nats as nats
from insane_nats.shim import node
from insane_nats.shim.errors import AttachRefusedError, AutostartError, NoNodeError, WrongKindError
from insane_nats.shim.node import Found
from tools.servers import Server

INFO: dict[str, Any] = {"server_id": "X", "version": "2.15.1", "max_payload": 1048576, "headers": True}


@contextmanager
def listener(*parts: bytes, close: bool = False) -> Iterator[int]:
    """A port that sends the parts, with a pause between, to everybody who connects."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                for number, part in enumerate(parts):
                    time.sleep(0.02 if number else 0)
                    connection.sendall(part)
                if close:
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                connection.close()


def info_line(info: dict[str, Any]) -> bytes:
    return b"INFO " + json.dumps(info).encode() + b" \r\n"


def probe(url: str, timeout_s: float = 2) -> node.Probe:
    found = asyncio.run(node.probe(urlparse(url), timeout_s))
    found.close()
    return found


@pytest.fixture(autouse=True)
def no_autostart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSANE_NATS_AUTOSTART", "0")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_node_and_server_are_told_apart_by_their_info(host: str) -> None:
    with listener(info_line({**INFO, "insane": {"socket": "/x"}})) as port:
        found = probe(f"nats://{host}:{port}")
        assert (found.found, found.own, found.node) == (Found.NODE, True, {"socket": "/x"})
    with listener(info_line(INFO)) as port:
        assert probe(f"nats://{host}:{port}").found is Found.SERVER


def test_info_in_parts_is_waited_for_and_left_in_the_socket() -> None:
    line = info_line(INFO)
    with listener(line[:10], line[10:30], line[30:]) as port:

        async def main() -> bytes:
            found = await node.probe(urlparse(f"nats://127.0.0.1:{port}"), 2)
            assert found.found is Found.SERVER and found.connection is not None
            left = found.connection.recv(65536)
            found.close()
            return left

        assert asyncio.run(main()) == line


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_nobody_at_an_own_address(host: str, free_port: int) -> None:
    assert probe(f"nats://{host}:{free_port}").found is Found.NOBODY


def test_no_such_host() -> None:
    found = probe("nats://no-such-host.invalid:4222")
    assert found.found is Found.ELSE and isinstance(found.error, OSError)


@pytest.mark.parametrize(
    ("parts", "close"),
    [((b"SSH-2.0-x\r\n",), False), ((b"INFO {no json\r\n",), False), ((), True), ((b"IN",), True)],
)
def test_somebody_else(parts: tuple[bytes, ...], close: bool) -> None:
    with listener(*parts, close=close) as port:
        found = probe(f"nats://127.0.0.1:{port}", 1)
        assert (found.found, found.silent) == (Found.ELSE, False)


def test_silence_ends_with_the_timeout() -> None:
    with listener() as port:
        start = time.monotonic()
        found = probe(f"nats://127.0.0.1:{port}", 0.1)
        assert (found.found, found.silent) == (Found.ELSE, True)
        assert time.monotonic() - start < 1


# --- connecting


def connect(url: str | list[str], **options: Any) -> Any:
    async def main() -> Any:
        client = await nats.connect(url, **options)
        await client.close()
        return client

    return asyncio.run(main())


def test_autostart_forbidden_is_a_no_servers_error_that_names_the_way_out(free_port: int) -> None:
    start = time.monotonic()
    with pytest.raises(
        nats_py.errors.NoServersError, match=rf"INSANE_NATS_AUTOSTART=0 forbids.*nsnd --port {free_port}"
    ) as caught:
        connect(f"nats://127.0.0.1:{free_port}", connect_timeout=2)
    assert isinstance(caught.value, NoNodeError)
    assert time.monotonic() - start < 2


def test_nats_server_is_plain_nats_and_said_in_one_line(nats_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        client = await nats.connect(nats_server.url)
        assert not client.is_insane
        subscription = await client.subscribe("a")
        await client.publish("a", b"x")
        assert (await subscription.next_msg(5)).data == b"x"
        assert client.connected_url is not None and client.connected_url.port == nats_server.port
        await client.close()

    asyncio.run(main())
    lines = [record for record in caplog.records if record.name == "insane_nats"]
    assert len(lines) == 1 and "plain NATS" in lines[0].getMessage()


def test_mode_nats_asks_nobody(nats_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("INSANE_NATS_MODE", "nats")
    caplog.set_level(logging.INFO, "insane_nats")
    assert not connect(nats_server.url).is_insane
    assert "INSANE_NATS_MODE=nats" in caplog.text


def test_mode_insane_refuses_a_nats_server(nats_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSANE_NATS_MODE", "insane")
    with pytest.raises(WrongKindError, match="is a NATS server"):
        connect(nats_server.url)


def test_unknown_mode_is_an_error(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSANE_NATS_MODE", "turbo")
    with pytest.raises(ValueError, match="INSANE_NATS_MODE cannot be 'turbo'"):
        connect(f"nats://127.0.0.1:{free_port}")


def test_list_of_urls_is_tried_before_nobody_is_concluded(nats_server: Server, free_port: int) -> None:
    assert not connect([f"nats://127.0.0.1:{free_port}", nats_server.url], dont_randomize=True).is_insane


def test_somebody_else_gets_nats_pys_error() -> None:
    async def quiet(_: Exception) -> None:
        pass

    with listener(b"SSH-2.0-x\r\n") as port, pytest.raises(nats_py.errors.Error, match="expecting INFO"):
        connect(f"nats://127.0.0.1:{port}", allow_reconnect=False, error_cb=quiet)
    with listener() as port, pytest.raises(asyncio.TimeoutError):
        connect(f"nats://127.0.0.1:{port}", allow_reconnect=False, error_cb=quiet, connect_timeout=0.1)


def test_node_that_cannot_be_attached_to_names_owner_and_way_out(tmp_path: Path) -> None:
    insane = {"socket": str(tmp_path / "no.sock"), "uid": os.getuid() + 1, "pid": 4711}
    with (
        listener(info_line({**INFO, "insane": insane})) as port,
        pytest.raises(
            AttachRefusedError, match=rf"user {os.getuid() + 1}, process 4711.*runs as user {os.getuid()}.*another port"
        ),
    ):
        connect(f"nats://127.0.0.1:{port}")


@pytest.mark.parametrize("deadline", ["soon", "-1"])
def test_write_deadline_that_is_no_number(deadline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSANE_NATS_WRITE_DEADLINE", deadline)
    with pytest.raises(ValueError, match="INSANE_NATS_WRITE_DEADLINE"):
        connect("nats://127.0.0.1:1")


# --- autostart


def autostart(port: int, script: str, timeout_s: float = 2) -> node.Probe:
    uri = urlparse(f"nats://127.0.0.1:{port}")
    found = asyncio.run(node.autostart(uri, [sys.executable, "-c", script], timeout_s))
    found.close()
    return found


def test_autostart_that_fails_tells_its_last_words(free_port: int) -> None:
    with pytest.raises(AutostartError, match=r"could not be started .*: the disk is full$"):
        autostart(free_port, "import sys; print('starting', file=sys.stderr); sys.exit('the disk is full')")


def test_autostart_without_a_word(free_port: int) -> None:
    with pytest.raises(AutostartError, match="ended with status 3 and said nothing"):
        autostart(free_port, "import sys; sys.exit(3)")


def test_autostart_that_cannot_be_run(free_port: int) -> None:
    with pytest.raises(AutostartError, match="cannot be started"):
        asyncio.run(node.autostart(urlparse(f"nats://127.0.0.1:{free_port}"), ["/no/such/program"], 1))


def test_autostart_that_never_listens_is_bounded(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "AUTOSTART_EXTRA_S", 0.5)
    with pytest.raises(AutostartError, match="did not listen in time"):
        autostart(free_port, "import time; time.sleep(60)", 0.5)


def test_autostart_waits_for_the_info(free_port: int) -> None:
    script = (
        "import socket, time\n"
        f"with socket.create_server(('127.0.0.1', {free_port})) as server:\n"
        "    server.settimeout(10)\n"
        "    connection, _ = server.accept()\n"
        f"    connection.sendall({info_line({**INFO, 'insane': {}})!r})\n"
    )
    assert autostart(free_port, script).found is Found.NODE


def test_two_programs_start_one_node(runtime_dir: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSANE_NATS_AUTOSTART", "1")

    async def main() -> None:
        one, two = await asyncio.gather(*(nats.connect(f"nats://127.0.0.1:{free_port}") for _ in range(2)))
        assert one.is_insane and two.is_insane
        assert one._server_info["insane"]["pid"] == two._server_info["insane"]["pid"]
        subscription = await one.subscribe("a")
        await two.publish("a", b"x")
        assert (await subscription.next_msg(5)).data == b"x"
        await one.close()
        await two.close()

    asyncio.run(main())
