"""What tests of several parts share: a private runtime directory, and servers that end with the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import servers


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, which this process and its children use; nothing may be left running in it."""
    with servers.private_runtime_dir() as path:
        monkeypatch.setenv("INSANE_NATS_RUNTIME_DIR", str(path))
        yield path


@pytest.fixture
def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    return servers.free_port()


@pytest.fixture
def nsnd(runtime_dir: Path, tmp_path: Path) -> Iterator[servers.Server]:
    """A running nsnd in the test's runtime directory."""
    with servers.nsnd(tmp_path, runtime_dir) as server:
        yield server


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[servers.Server]:
    """A running nats-server."""
    with servers.nats_server(tmp_path) as server:
        yield server
