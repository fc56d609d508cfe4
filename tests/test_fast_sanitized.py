"""The hot path in C under AddressSanitizer and UndefinedBehaviourSanitizer: what lives on when a connection is garbage or the
process ends, and a random program with a fixed seed. Each is a process, with libnsn and _fast compiled for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

import insane_nats._fast
from tests.sanitized import build, variables
from tests.test_c import LIBNSN
from tools.servers import ROOT, Server

FAST = ROOT / "shim" / "fast"
SEED = 20261
SECONDS = 5


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process whose insane_nats is the sanitized one."""
    sanitizers = variables()
    folder = tmp_path_factory.mktemp("sanitized")
    package = folder / "insane_nats"
    installed = Path(insane_nats._fast.__file__).parent
    shutil.copytree(installed, package, ignore=shutil.ignore_patterns("_fast*", "__pycache__", "libnsn*"))
    shared = package / "lib" / "libnsn.so"
    build(LIBNSN, folder, shared, (), ("-lpthread",))
    limited = ("-DPy_LIMITED_API=0x030B0000", "-I", sysconfig.get_paths()["include"], "-Wno-missing-field-initializers")
    build(FAST, folder, package / "_fast.abi3.so", limited, (str(shared), "-Wl,-rpath,$ORIGIN/lib"))
    return {**os.environ, **sanitizers, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}


def run(environment: dict[str, str], runtime_dir: Path, *arguments: str) -> str:
    """What the program said, when it ended well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, "INSANE_NATS_RUNTIME_DIR": str(runtime_dir)},
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
    return done.stdout


HEAD = """
    import asyncio, gc, os, sys, threading, time
    import insane_nats
    from insane_nats import _fast
    URL = sys.argv[1]
    assert "libasan" in open("/proc/self/maps").read() and "sanitized" in _fast.__file__
"""
PROGRAMS = {
    # A loop in a daemon thread goes on after the main thread has run what is to be run at exit.
    "ends under a thread that receives": """
        def work():
            async def main():
                client = await insane_nats.connect(URL)
                subscription = await client.subscribe("a")
                started.set()
                while True:
                    await client.publish("a", b"x" * 100)
                    await subscription.next_msg(1)
            asyncio.run(main())
        started = threading.Event()
        threading.Thread(target=work, daemon=True).start()
        started.wait(30)
        time.sleep(0.2)
        print("ok")
    """,
    # Finalizers of garbage run in any order, and use the connection that is garbage with them.
    "is collected with who still publishes": """
        class Holder:
            def __del__(self):
                for reply in ("", "r"):
                    call = self.client.publish("a", b"x" * 10, reply)
                    try:
                        call.send(None)
                    except (StopIteration, RuntimeError):
                        pass  # the event loop, which is closed, does not take what comes behind the message
                    call.close()
                print("ok")
        async def main():
            holder = Holder()
            holder.client = await insane_nats.connect(URL)
            holder.client.holder = holder
            flushes = asyncio.create_task(holder.client.flush())
            await asyncio.sleep(0)
            waits = asyncio.create_task((await holder.client.subscribe("a")).next_msg(None))
            await asyncio.sleep(0)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        gc.collect()
    """,
    # What is called in the middle of a batch receives by the same connection.
    "receives within receive": """
        async def main():
            client = await insane_nats.connect(URL)
            publisher = await insane_nats.connect(URL)
            seen = []
            fast = client._fast
            def sink(message):
                assert fast.receive(0) == 0
                seen.append(message.data)
            subscription = await client.subscribe("a")
            subscription._sink = sink
            sent = [str(number).encode() * 50 for number in range(1000)]
            for data in sent:
                await publisher.publish("a", data)
            await client.flush()
            assert seen == sent, len(seen)
            await client.close()
            await publisher.close()
            print("ok")
        asyncio.run(main())
    """,
    # A callback in the middle of a batch closes the connection: the rest of the batch is not delivered.
    "closes within receive": """
        async def main():
            client = await insane_nats.connect(URL)
            publisher = await insane_nats.connect(URL)
            subscription = await client.subscribe("a", zero_copy=True)
            def sink(message):
                seen.append(message)
                client._let_go()
                session.close()
                assert session.is_open and bytes(message.data[:3]) == b"xxx"
            seen, session = [], client._session
            subscription._sink = sink
            pump = client._pump
            for _ in range(20):
                await publisher.publish("a", b"x" * 300_000)
            deadline = time.monotonic() + 10
            while not seen and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            pump.stop()
            assert len(seen) == 1 and session.is_open
            assert bytes(seen[0].data) == b"x" * 300_000
            seen.clear()
            assert not session.is_open
            await publisher.close()
            print("ok")
        asyncio.run(main())
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(environment: dict[str, str], nsnd: Server, runtime_dir: Path, name: str) -> None:
    program = textwrap.dedent(HEAD) + textwrap.dedent(PROGRAMS[name])
    assert run(environment, runtime_dir, "-W", "ignore", "-c", program, nsnd.url).startswith("ok")


def test_random_program(environment: dict[str, str], nsnd: Server, runtime_dir: Path) -> None:
    """tests/fast_stress.py says what it does."""
    assert run(environment, runtime_dir, "-m", "tests.fast_stress", nsnd.url, str(SEED), str(SECONDS)) == ""
