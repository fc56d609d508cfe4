"""`insane-nats pub`, `sub` and `req`, on an insane_nats node and on a NATS server alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 60


@pytest.fixture(params=["node", "nats-server"])
def url(request: pytest.FixtureRequest, runtime_dir: Path) -> str:
    server = request.getfixturevalue("nsnd" if request.param == "node" else "nats_server")
    return str(server.url)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "insane_nats", *arguments]


def insane_nats(*arguments: str, url: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environ = os.environ | {"NATS_URL": url}
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environ, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False
    )


@contextmanager
def subscriber(*arguments: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running `insane-nats sub` that has subscribed."""
    environ = os.environ | {"NATS_URL": url}
    pipe = subprocess.PIPE
    with subprocess.Popen(command("sub", *arguments), cwd=ROOT, env=environ, stdout=pipe, stderr=pipe) as process:
        try:
            assert process.stderr is not None
            assert b"subscribed to " in process.stderr.readline()
            yield process
        finally:
            process.kill()


def published(*arguments: str, url: str, stdin: bytes = b"") -> None:
    result = insane_nats("pub", *arguments, url=url, stdin=stdin)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def failure(result: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that a failing command writes."""
    assert result.returncode == 1
    assert result.stdout == b""
    (line,) = result.stderr.decode().splitlines()
    return line


def test_sub_prints_subject_reply_headers_and_data(url: str) -> None:
    with subscriber("orders.>", "--count", "2", url=url) as process:
        published("orders.new", "one", "--reply", "answers", "-H", "Kind: big", "-H", "Trace:1:2", url=url)
        published("orders.old", "-", url=url, stdin=b"two\nlines")
        out, _ = process.communicate(timeout=TIMEOUT_S)
    first = '[#1] Received on "orders.new" with reply "answers"\nKind: big\nTrace: 1:2\n\none\n\n'
    assert out.decode() == first + '[#2] Received on "orders.old"\ntwo\nlines\n\n'
    assert process.returncode == 0


def test_each_message_is_shown_as_it_comes(url: str) -> None:
    with subscriber("clock", "--raw", url=url) as process:
        assert process.stdout is not None
        for tick in ("tick", "tock"):
            published("clock", tick, url=url)
            assert process.stdout.readline().decode() == f"{tick}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_sub_cleanly(url: str, number: int) -> None:
    with subscriber("quiet", url=url) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (0, b"", b"")


def test_count_publishes_that_often_and_a_queue_group_shares(url: str) -> None:
    with (
        subscriber("work", "--queue", "g", "--count", "4", "--raw", url=url) as one,
        subscriber("work", "--queue", "g", "--count", "6", "--raw", url=url) as other,
    ):
        published("work", "job", "--count", "10", url=url)
        assert one.communicate(timeout=TIMEOUT_S)[0] == b"job\n" * 4
        assert other.communicate(timeout=TIMEOUT_S)[0] == b"job\n" * 6


ADDER = """
import asyncio, os, nats
async def main():
    connection = await nats.connect(os.environ["NATS_URL"])
    async def add(message):
        number = int(message.data) + int(message.headers["Add"])
        await connection.publish(message.reply, str(number).encode(), headers={"Kind": "sum"})
    await connection.subscribe("add", cb=add)
    await connection.subscribe("silence")
    await connection.flush()
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def adder(url: str) -> Iterator[str]:
    """A NATS program under `insane-nats run` that answers requests; the URL it is at."""
    environ = os.environ | {"NATS_URL": url}
    run = command("run", sys.executable, "-c", ADDER)
    with subprocess.Popen(run, cwd=ROOT, env=environ, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield url
        finally:
            process.kill()


def test_req_prints_the_answer(adder: str) -> None:
    whole = insane_nats("req", "add", "40", "-H", "Add:2", url=adder)
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, b"Kind: sum\n\n42\n", b"")
    assert insane_nats("req", "add", "-", "-H", "Add:2", "--raw", url=adder, stdin=b"1").stdout == b"3\n"


def test_req_without_an_answer_says_why(adder: str) -> None:
    late = failure(insane_nats("req", "silence", "x", "--timeout", "0.2", url=adder))
    assert late == "insane-nats req: timeout: no answer from 'silence' within 0.2 s"
    nobody = failure(insane_nats("req", "nobody", "x", url=adder))
    assert nobody.startswith("insane-nats req: no responders: nobody subscribes to 'nobody'")


@pytest.mark.parametrize("arguments", [("pub", "a b", "x"), ("sub", "a..b"), ("req", "", "x")])
def test_a_bad_subject_is_one_line(url: str, arguments: tuple[str, ...]) -> None:
    assert "subject" in failure(insane_nats(*arguments, url=url)).lower()


def test_a_payload_that_is_too_large_is_one_line(url: str) -> None:
    assert "maximum payload" in failure(insane_nats("pub", "big", "-", url=url, stdin=b"x" * ((1 << 20) + 1)))


@pytest.mark.parametrize("name", ["pub", "sub", "req"])
def test_no_server_is_one_line(runtime_dir: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("INSANE_NATS_AUTOSTART", "0")
    at = f"nats://127.0.0.1:{free_port}"
    line = failure(insane_nats(name, "a", url=at))
    assert line.startswith(f"insane-nats {name}: cannot connect to {at}: ")


def test_a_header_without_a_colon_is_a_usage_error() -> None:
    result = insane_nats("pub", "a", "x", "-H", "nothing", url="nats://127.0.0.1:1")
    assert result.returncode == 2
    assert b"header 'nothing' is not of the form KEY:VALUE" in result.stderr


def test_version_and_help() -> None:
    assert insane_nats("--version", url="").stdout.startswith(b"insane_nats 0.1.0")
    text = insane_nats("--help", url="").stdout
    assert all(name in text for name in (b"run", b"status", b"pub", b"sub", b"req"))
