"""The examples are plain NATS programs: each runs under `insane-nats run` with no node started beforehand, and, as it is,
against a NATS server."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.servers import Server

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TIMEOUT_S = 90

EXPECTED = {
    "request_reply": ["service: ready", "1 2 -> 3", "one two -> error: send whole numbers", "math.divide: nobody offers that"],
    "queue_workers": ["300 jobs, each done once: True"],
    "headers": ["{'item': 'coffee', 'price': 250}, trace ID is ours: True"],
}


def run(command: list[str], url: str) -> list[str]:
    environ = os.environ | {"NATS_URL": url}
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    complaints = [line for line in result.stderr.splitlines() if not line.startswith("plain NATS, no shared memory: ")]
    assert (result.returncode, complaints) == (0, [])
    return result.stdout.splitlines()


@pytest.mark.parametrize("name", EXPECTED)
def test_under_insane_nats_run(runtime_dir: Path, free_port: int, name: str) -> None:
    command = [sys.executable, "-m", "insane_nats", "run", str(EXAMPLES / f"{name}.py")]
    lines = run(command, f"nats://127.0.0.1:{free_port}")
    assert set(EXPECTED[name]) <= set(lines)
    assert (runtime_dir / "nsnd.sock").is_socket()  # a node of insane_nats carried it


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("under", ["plain", "insane-nats run"])
def test_against_a_nats_server(nats_server: Server, runtime_dir: Path, name: str, under: str) -> None:
    runner = ["-m", "insane_nats", "run"] if under != "plain" else []
    lines = run([sys.executable, *runner, str(EXAMPLES / f"{name}.py")], nats_server.url)
    assert set(EXPECTED[name]) <= set(lines)
    assert not (runtime_dir / "nsnd.sock").exists()


@pytest.mark.parametrize("name", EXPECTED)
def test_they_import_no_other_messaging_library(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in imported}
    assert packages - set(sys.stdlib_module_names) == {"nats"}


def test_zero_copy_example(nsnd: Server) -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", str(EXAMPLES / "zero_copy" / "frames.py"), "1"]
    lines = run(command, nsnd.url)
    assert lines[0].startswith("20 frames of 1 MiB in ")
    assert lines[1] == "brightness 0 to 19"
