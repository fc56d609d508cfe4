"""Programs as one writes them for INSANE, with nothing but the names of nsn/nsn.h, compiled and run as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("libnsn is for Linux", allow_module_level=True)

from tests.insane import ROOT, build, configure, finish, run, start
from tools.servers import Server

PROGRAMS = ROOT / "tests" / "insane_style"
COUNT = 2000


def program(name: str, folder: Path, nsnd: Server) -> str:
    configure(folder, nsnd.port)
    return str(build(PROGRAMS / f"{name}.c", folder / name))


def test_what_is_made_is_destroyed(nsnd: Server, tmp_path: Path) -> None:
    assert run([program("life", tmp_path, nsnd)], tmp_path) == "all made and destroyed\n"


def test_one_way(nsnd: Server, tmp_path: Path) -> None:
    oneway = program("oneway", tmp_path, nsnd)
    sink = start([oneway, "sink", "9", str(COUNT)], tmp_path)
    assert run([oneway, "source", "9", str(COUNT)], tmp_path) == f"sent {COUNT}, the last to 1\n"
    assert finish(sink) == f"received {COUNT}, 0 out of order\n"


def test_there_and_back(nsnd: Server, tmp_path: Path) -> None:
    roundtrip = program("roundtrip", tmp_path, nsnd)
    pong = start([roundtrip, "pong", str(COUNT)], tmp_path)
    assert run([roundtrip, "ping", str(COUNT)], tmp_path) == f"ping {COUNT}\n"
    assert finish(pong) == f"pong {COUNT}\n"
