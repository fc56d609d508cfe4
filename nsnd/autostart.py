"""`nsnd --autostart --port N`: makes sure that a node of this user serves port N. Exactly one node comes of it."""

from __future__ import annotations

import errno
import getopt
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from nsnd import __version__
from nsnd.arbiter import LOOPBACK, Listener, who_listens
from nsnd.config import DEFAULT_PORT, LOG_LEVELS, Config, ConfigError, find_config, load_config
from nsnd.protocol import MAGIC, OPEN, PACKET, PACKET_MAX, VERSION_MAX, PacketType, unpack_refused
from nsnd.runtime import BY_AUTOSTART, NodeRecord, RuntimeDirectory, RuntimeDirectoryError, boot_id, default_directory

LINGER_ENVIRONMENT = "INSANE_NSND_LINGER"
DECIDING_S = 20.0
ASK_S = 5.0
ASK_AGAIN_S = 0.01
USAGE = "nsnd --autostart [--port N] [--runtime-dir DIR] [--socket PATH] [--config FILE] [--log-level LEVEL]"


class AutostartError(Exception):
    """No node serves the port, and none was started. One line that says why, and the way out."""


class Request(NamedTuple):
    """What the command line asks for."""

    port: int
    directory: Path
    socket: Path | None = None
    config: str | None = None
    log_level: str | None = None


def main(arguments: list[str]) -> int:
    """The exit status: 0 when a node serves the port."""
    try:
        ensure(_parse(arguments, os.environ), os.environ)
    except (AutostartError, ConfigError, RuntimeDirectoryError) as error:
        print(f"nsnd: {error}", file=sys.stderr)
        return 1
    return 0


def ensure(request: Request, environment: Mapping[str, str]) -> None:
    """Returns when a node of this user serves the port: it did already, was asked to, or was started. AutostartError."""
    if _serves(request.port):
        return
    runtime = RuntimeDirectory(request.directory)
    try:
        with runtime.deciding(DECIDING_S):
            if _serves(request.port):
                return
            if not _ask(runtime, request.port):
                _start(runtime, request, environment)
            elif not _serves(request.port):
                raise AutostartError(f"the node in {runtime.path} serves port {request.port}, and it cannot be reached: it "
                                     f"is in another network namespace; name another directory with --runtime-dir")
    except TimeoutError as error:
        raise AutostartError(f"{error} for more than {DECIDING_S:.0f} s: is it stopped?") from error


def _serves(port: int) -> bool:
    listener = who_listens(port)
    if listener is None:
        return False
    if listener.is_node and listener.uid == os.getuid():
        return True
    raise AutostartError(_taken(port, listener))


def _taken(port: int, listener: Listener) -> str:
    if listener.is_node:
        return f"port {port} belongs to {listener}: run the program as that user, or choose another port"
    return f"port {port} belongs to {listener}: connect to that as to any NATS server, or choose another port"


def _ask(runtime: RuntimeDirectory, port: int) -> bool:
    """Has the node that runs in this directory serve the port. False when none runs."""
    deadline = time.monotonic() + ASK_S
    while runtime.node_runs():
        record = runtime.record()
        if record is not None:
            try:
                _open(record, port)
                return True
            except (ConnectionError, FileNotFoundError, TimeoutError):
                pass  # it is just starting, or just ending
        if time.monotonic() > deadline:
            pid = record.pid if record else "unknown"
            raise AutostartError(f"the node in {runtime.path} (pid {pid}) does not answer: is it stopped?")
        time.sleep(ASK_AGAIN_S)
    return False


def _open(record: NodeRecord, port: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ASK_S)
        sock.connect(record.socket)
        sock.send(OPEN.pack(MAGIC, PacketType.OPEN, VERSION_MAX, port, 0))
        packet = sock.recv(PACKET_MAX)
    if len(packet) < PACKET.size:
        raise ConnectionResetError(errno.ECONNRESET, "the node ended")
    kind = PACKET.unpack_from(packet)[1]
    if kind == PacketType.REFUSED:
        raise AutostartError(f"the node of pid {record.pid} cannot serve port {port}: {unpack_refused(packet).text}")
    if kind != PacketType.OPENED:
        raise AutostartError(f"the node of pid {record.pid} (version {record.version}) answered packet type {kind}, not that "
                             f"port {port} is open: does it know version {__version__}?")


def _start(runtime: RuntimeDirectory, request: Request, environment: Mapping[str, str]) -> None:
    path = find_config(request.config, environment, autostart=True)
    _check_mark(runtime, str(path) if path else None)

    def read() -> Config:
        config = load_config(path)
        return config._replace(port=request.port, addr=LOOPBACK, log_level=request.log_level or config.log_level)

    config = read()
    linger_s = _linger(environment)
    from nsnd.daemon import StartError, daemonize  # not needed where a node serves the port already

    try:
        daemonize(lambda ready: _run(runtime, config, read, request.socket, linger_s, ready), str(runtime.log))
    except StartError as error:
        # Of an autostart that was killed while it held the lock, the node may have come up meanwhile.
        if not _ask(runtime, request.port):
            raise AutostartError(str(error)) from error


def waited_for(environment: Mapping[str, str]) -> str:
    """Why --autostart would start nothing now: a node that is not replaced is gone. Empty when it may. For who would run it
    again and again, since this starts no process."""
    directory = default_directory(environment)
    try:
        if (directory / "node").exists():
            runtime = RuntimeDirectory(directory)
            path = find_config(None, environment, autostart=True)
            if not runtime.node_runs():
                _check_mark(runtime, str(path) if path else None)
    except (AutostartError, ConfigError, RuntimeDirectoryError) as error:
        return str(error)
    return ""


def _check_mark(runtime: RuntimeDirectory, config: str | None) -> None:
    """A node that somebody started, or that has a configuration of its own, is waited for, not replaced."""
    record = runtime.record()
    if record is None or record.boot_id != boot_id():
        return
    if record.started_by != BY_AUTOSTART:
        raise AutostartError(f"nsnd was started by hand (pid {record.pid}) and is gone: start it again (nsnd --runtime-dir "
                             f"{runtime.path}), or remove {runtime.path}/node to have one started without you")
    if record.config != config:
        raise AutostartError(f"nsnd was started with the configuration {record.config} (pid {record.pid}) and is gone: start "
                             f"it again with that, or remove {runtime.path}/node to have one started with {config or 'none'}")


def _run(runtime: RuntimeDirectory, config: Config, read: Callable[[], Config], control: Path | None, linger_s: float | None,
         ready: Callable[[], None]) -> None:
    from nsnd.daemon import make_node
    from nsnd.logs import Log
    from nsnd.server import LINGER_S, Options

    log = Log(config.log_level, str(runtime.log))
    for warning in config.warnings:
        log.warn(warning)
    options = Options(BY_AUTOSTART, control, LINGER_S if linger_s is None else linger_s, read)
    node = make_node(runtime, config, options, log)
    ready()
    node.run()


def _linger(environment: Mapping[str, str]) -> float | None:
    text = environment.get(LINGER_ENVIRONMENT)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise AutostartError(f"${LINGER_ENVIRONMENT} is {text!r}: allowed are 0 to 86400 seconds")
    return seconds


def _parse(arguments: list[str], environment: Mapping[str, str]) -> Request:
    # Not click: its import would take longer than all the rest of a start.
    names = ["autostart", "port=", "addr=", "runtime-dir=", "socket=", "config=", "log-level="]
    try:
        pairs, rest = getopt.getopt(arguments, "p:a:c:", names)
    except getopt.GetoptError as error:
        raise AutostartError(f"{error}; {USAGE}") from error
    if rest:
        raise AutostartError(f"{rest[0]}: no such argument; {USAGE}")
    short = {"-p": "--port", "-a": "--addr", "-c": "--config"}
    options = {short.get(name, name): value for name, value in pairs}
    port = options.get("--port", str(DEFAULT_PORT))
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise AutostartError(f"--port {port}: allowed are 1 to 65535")
    if options.get("--addr", LOOPBACK) != LOOPBACK:
        raise AutostartError(f"--addr {options['--addr']}: a node that is started by itself listens on {LOOPBACK} alone; "
                             f"start nsnd without --autostart")
    level = options.get("--log-level")
    if level is not None and level not in LOG_LEVELS:
        raise AutostartError(f"--log-level {level}: allowed are {', '.join(LOG_LEVELS)}")
    directory = Path(options["--runtime-dir"]) if "--runtime-dir" in options else default_directory(environment)
    control = Path(options["--socket"]).absolute() if "--socket" in options else None
    return Request(int(port), directory, control, options.get("--config"), level)
