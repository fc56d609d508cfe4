"""Relays of a real node under AddressSanitizer and UndefinedBehaviourSanitizer: clients that keep to no rule, with a fixed
seed. nsnd's extension with the relay, and libnsn under it, are compiled for it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

import insane_nats as nats
from tests.auth_node import LIMITED_USERS, AuthNode, Raw, auth_node
from tests.sanitized import build, variables
from tests.test_c import LIBNSN
from tools.servers import ROOT

SEED = 7
SECONDS = 4
LIFE_S = 1  # of a client that is stuck, as it reads too little
LINES = (
    b"PUB may.x 1\r\nx\r\n", b"PUB may.x hear.r 0\r\n\r\n", b"PUB not 1\r\nx\r\n", b"HPUB may.x 12 13\r\nNATS/1.0\r\n\r\nx\r\n",
    b"PUB a %d\r\n%s\r\n" % (1 << 20, bytes(1 << 20)), b"PUB hear.x %d\r\n%s\r\n" % (5000, bytes(5000)), b"PUB a\r1\t0\r\n\r\n",
    b"SUB hear.x 1\r\n", b"SUB > 2\r\n", b"SUB hear.> group 3\r\n", b"SUB a 4\r\n", b"SUB a 5\r\n", b"SUB _INBOX.> 6\r\n",
    b"UNSUB 1\r\n", b"UNSUB 3 2\r\n", b"UNSUB 4 1\r\n", b"UNSUB 9\r\n", b"PING\r\n", b"PING\r\n", b"PONG\r\n",
    b"SUB %s 7\r\n" % (b"a." * 2000 + b"b"), b"CONNECT {\"verbose\":true,\"headers\":true}\r\n", b"CONNECT {}\r\n",
)
LAST_WORDS = (b"PUB may.x 100\r\nx", b"PUB", b"\xff\r\n", b"A" * 5000, b"PUB may.x 1\r\nxyz\r\n", b"HPUB may.x 9 3\r\nabc\r\n",
              b"")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a node whose relays are the sanitized ones."""
    sanitizers = variables()
    folder = tmp_path_factory.mktemp("sanitized")
    sources = folder / "relay"
    shutil.copytree(ROOT / "nsnd" / "relay", sources)
    subprocess.run([sys.executable, str(ROOT / "nsnd" / "relay_build.py"), str(sources / "_relay.c")], check=True,
                   stdout=subprocess.DEVNULL)
    (folder / "nsnd").mkdir()
    (folder / "nsnd" / "__init__.py").touch()
    shared = folder / "libnsn.so"
    build(LIBNSN, folder, shared, (), ("-lpthread",))
    limited = ("-DPy_LIMITED_API=0x030B0000", "-I", sysconfig.get_paths()["include"], "-w")
    build(sources, folder, folder / "nsnd" / "_relay.abi3.so", limited, (str(shared),))
    return {**sanitizers, "PYTHONPATH": str(folder)}


@pytest.fixture
def node(environment: dict[str, str]) -> Iterator[AuthNode]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with auth_node(LIMITED_USERS) as running:
            yield running
            for words in ("Sanitizer", "runtime error"):
                assert words not in running.log(), running.log()


def speak(node: AuthNode, rng: random.Random) -> None:
    """A client's life: all that comes to its mind, in pieces; it reads sometimes, and leaves as it likes."""
    raw = Raw(node, rng.choice(("me", "all")))
    raw.sock.settimeout(0.05)
    until = time.monotonic() + LIFE_S
    text = b"".join(rng.choices(LINES, k=rng.randint(1, 60))) + rng.choice(LAST_WORDS)
    with contextlib.suppress(OSError):
        while text and time.monotonic() < until:
            size = rng.choice((1, 7, 100, 4096, 1 << 20))
            with contextlib.suppress(TimeoutError):
                text = text[raw.sock.send(text[:size]):]
            if rng.random() < 0.3:
                with contextlib.suppress(TimeoutError):
                    raw.sock.recv(rng.choice((1, 1000, 1 << 20)))
    raw.sock.close()
    raw.session.sock.close()


def test_clients_that_keep_to_no_rule(node: AuthNode) -> None:
    assert node.process is not None

    async def run() -> None:
        free = await nats.connect(f"nats://free:p@127.0.0.1:{node.port}")
        await free.subscribe("may.>")
        until = time.monotonic() + SECONDS
        rng = random.Random(SEED)
        while time.monotonic() < until:
            others = [asyncio.create_task(asyncio.to_thread(speak, node, random.Random(rng.random()))) for _ in range(3)]
            for size in (0, 100, 70000):
                await free.publish("hear.x", bytes(size), reply="hear.r")
                await free.publish("hear.not.x", bytes(size))
                await free.publish("a", bytes(size))
            await asyncio.gather(*others)
        await free.close()

    asyncio.run(run())
    maps = Path(f"/proc/{node.process.pid}/maps").read_text()
    assert "libasan" in maps and "sanitized" in next(line for line in maps.splitlines() if "_relay" in line)
    assert Raw(node).says("PUB not 1\r\nx\r\n") == ["-ERR 'Permissions Violation for Publish to \"not\"'"]
    assert node.kill(signal.SIGTERM) == 0, node.log()
