"""Two hosts on one: network namespaces joined by a cable. Runs `python -m tests.two_hosts PORT` in a namespace of its own, and
prints what connecting to the other one gave, case by case, as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import insane_nats
from tests.nsnd_client import until
from tools.servers import ROOT, command_path, stop

HERE, THERE, NOWHERE = "10.77.0.1", "10.77.0.2", "10.77.0.3"
LOG: list[str] = []


def alone(*words: str) -> list[str]:
    """The command in a network namespace of its own, as root or as who may play it."""
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--net", *root, *words]


def missing() -> str:
    """What this system lacks for two hosts, or nothing."""
    programs = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if programs:
        return f"no {', '.join(programs)} on PATH (of util-linux and iproute2)"
    cable = alone("ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
    done = subprocess.run(cable, capture_output=True, text=True, check=False)
    return f"no network namespaces with cables between them: {done.stderr.strip()}" if done.returncode else ""


def call(*words: str) -> None:
    subprocess.run(words, check=True)


@contextlib.contextmanager
def other_host() -> Iterator[list[str]]:
    """A second namespace, at THERE; the words that a command needs in front of it to run there."""
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as holder:
        own = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{holder.pid}/ns/net") != own, "the other host is there")
        there = ["nsenter", "--net", "--target", str(holder.pid)]
        call("ip", "link", "set", "lo", "up")
        call("ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", str(holder.pid))
        call("ip", "address", "add", f"{HERE}/24", "dev", "cable0")
        call("ip", "link", "set", "cable0", "up")
        call(*there, "ip", "address", "add", f"{THERE}/24", "dev", "cable1")
        call(*there, "ip", "link", "set", "cable1", "up")
        call(*there, "ip", "link", "set", "lo", "up")
        try:
            yield there
        finally:
            holder.terminate()


@contextlib.contextmanager
def running(words: list[str], port: int) -> Iterator[None]:
    """A server at THERE, once it greets."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        until(lambda: greets(port), f"{words} greets")
        yield
    finally:
        stop(process)


def greets(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((THERE, port), 1) as connection:
        return connection.recv(5) == b"INFO "
    return False


async def attempt(url: str | list[str], **options: Any) -> dict[str, Any]:
    """How a connect() went, and that the connection works."""
    reported: list[str] = []
    LOG.clear()

    async def error_cb(error: Exception) -> None:
        reported.append(type(error).__name__)

    start = time.monotonic()
    result: dict[str, Any] = {"error": None, "words": ""}
    try:
        nc = await insane_nats.connect(
            url, error_cb=error_cb, connect_timeout=0.3, max_reconnect_attempts=1, reconnect_time_wait=0.01, **options
        )
        subscription = await nc.subscribe("a")
        await nc.publish("a", b"x")
        await subscription.next_msg(5)
        result["insane"] = nc.is_insane
        await nc.close()
    except Exception as error:
        result |= {"error": type(error).__name__, "words": str(error)}
    return result | {"reported": reported, "seconds": time.monotonic() - start, "log": list(LOG)}


async def cases(port: int, there: list[str], folder: str) -> dict[str, Any]:
    url = f"nats://{THERE}:{port}"
    tls = f"tls://{THERE}:{port}"
    found = {
        "refused": await attempt(url),
        "refused, and nobody here": await attempt([url, f"nats://127.0.0.1:{port}"]),
        "no such host": await attempt(f"nats://{NOWHERE}:{port}"),
        "refused, tls": await attempt(tls),
    }
    node = [*there, sys.executable, "-m", "nsnd", "--port", str(port), "--addr", THERE, "--runtime-dir", f"{folder}/there"]
    with running(node, port):
        found["node"] = await attempt(url)
        found["node, tls"] = await attempt(tls)
        found["node, tls context"] = await attempt(url, tls=ssl.create_default_context())
        found["node, credentials"] = await attempt(url, user="me", password="secret")
        found["node, credentials in the URL"] = await attempt(f"nats://me:secret@{THERE}:{port}")
        found["node, token"] = await attempt(url, token="secret")
    with running([*there, command_path("nats-server"), "-a", THERE, "-p", str(port)], port):
        found["server"] = await attempt(url)
        found["server, credentials in the URL"] = await attempt(f"nats://me:secret@{THERE}:{port}")
    return found


def main() -> None:
    handler = logging.Handler()
    handler.emit = lambda record: LOG.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("insane_nats").addHandler(handler)
    with other_host() as there, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        os.environ["INSANE_NATS_RUNTIME_DIR"] = f"{folder}/here"
        found = asyncio.run(cases(int(sys.argv[1]), there, folder))
        found["node here"] = Path(f"{folder}/here").exists()
        print(json.dumps(found))


if __name__ == "__main__":
    main()
