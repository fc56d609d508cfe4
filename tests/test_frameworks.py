"""Frameworks on top of nats-py run unchanged: FastStream's and taskiq's brokers, on a node and on a NATS server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsnd.status import query
from tools.servers import ROOT, Server

EXPECTED = {
    "faststream_orders": ["order 1: 2.50", "order 2: 6.50", "order 3: 12.00"],
    "taskiq_squares": ["20 tasks, done by the workers: True"],
}
NO_PERSISTENCE = """
import asyncio, os
from faststream.nats import JStream, NatsBroker
broker = NatsBroker(os.environ["NATS_URL"])
@broker.subscriber("kept", stream=JStream("stream"))
async def kept(message: str) -> None: ...
async def main() -> None:
    try:
        await asyncio.wait_for(broker.start(), 10)
    except Exception as error:
        print(type(error).__name__)
asyncio.run(main())
"""


def printed(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the program itself printed; FastStream's log goes there too."""
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "INFO" not in line]


def run(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"NATS_URL": url}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_on_a_node(nsnd: Server, runtime_dir: Path, name: str) -> None:
    done = run(nsnd.url, "-m", "insane_nats", "run", f"examples/frameworks/{name}.py")
    assert printed(done) == EXPECTED[name], done.stderr
    (application,) = query(runtime_dir / "nsnd.sock")["applications"]
    assert application["application_id"] == nsnd.port
    assert "plain NATS" not in done.stderr


@pytest.mark.parametrize("name", EXPECTED)
def test_on_a_nats_server(nats_server: Server, name: str) -> None:
    done = run(nats_server.url, f"examples/frameworks/{name}.py")
    assert printed(done) == EXPECTED[name], done.stderr


def test_stream_on_a_node_fails_at_once_and_says_what_to_do(nsnd: Server, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(NO_PERSISTENCE)
    done = run(nsnd.url, "-m", "insane_nats", "run", str(script))
    assert done.stdout.splitlines()[-1] == "ServiceUnavailableError", done.stderr
    assert "nats-server -js" in done.stderr
