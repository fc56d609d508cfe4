"""Running a node in this process: in the foreground, or as a daemon that was detached from whoever started it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from nsnd.arbiter import who_listens
from nsnd.config import Config
from nsnd.control import ControlError
from nsnd.fabric import FabricError
from nsnd.logs import Log
from nsnd.runtime import RuntimeDirectory, RuntimeDirectoryError
from nsnd.server import Node, Options, PortError

DECIDING_S = 10.0


class StartError(Exception):
    """The node did not start. The text says why, and the way out."""


def make_node(runtime: RuntimeDirectory, config: Config, options: Options, log: Log) -> Node:
    """A node that is ready to run(). The caller holds the runtime directory's file `lock`."""
    try:
        return Node(runtime, config, options, log)
    except PortError as error:
        raise StartError(_who(error.port) if error.in_use else str(error)) from error
    except FabricError as error:
        raise StartError(f"{runtime.application(config.port)}: {error.strerror}") from error
    except (RuntimeDirectoryError, ControlError) as error:
        raise StartError(str(error)) from error


def run_in_foreground(runtime: RuntimeDirectory, config: Config, options: Options, log: Log) -> None:
    """Until a signal ends it. StartError."""
    try:
        with runtime.deciding(DECIDING_S):
            node = make_node(runtime, config, options, log)
    except TimeoutError as error:
        raise StartError(f"{error}, which is starting a node: try again") from error
    node.run()


def daemonize(main: Callable[[Callable[[], None]], None], log_file: str) -> None:
    """Runs main(ready) in a process of its own session, with nothing of this one; returns when it has called ready().

    StartError with its words when main raised StartError first.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        _detached(main, log_file, write_end)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read().decode("utf-8", "replace")
    if answer != "ready":
        raise StartError(answer or f"the node ended before it was ready; {log_file} may say why")


def _detached(main: Callable[[Callable[[], None]], None], log_file: str, write_end: int) -> NoReturn:
    code = 1
    try:
        _shed(write_end, log_file)
        main(lambda: _say(write_end, "ready"))
        code = 0
    except StartError as error:
        _say(write_end, str(error))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _say(fd: int, text: str) -> None:
    with suppress(BrokenPipeError):  # whoever started us was killed meanwhile
        os.write(fd, text.encode()[:4096])
    os.close(fd)


def _shed(keep: int, log_file: str) -> None:
    """Nothing of the program that started us: a descriptor kept would keep its reader waiting, an affinity slow us down."""
    os.chdir("/")
    os.umask(0o077)
    os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in (keep, 0, 1, 2):
            try:
                os.close(fd)
            except OSError:
                continue  # the listing's own
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, fd in enumerate((null, log, log)):
        os.dup2(fd, number)
    for fd in {null, log}:
        if fd > 2:
            os.close(fd)
    # The streams may be of a program that gave us odd ones, or none.
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115


def _who(port: int) -> str:
    who = who_listens(port) or "a program that does not speak NATS"
    return f"port {port} cannot be bound, {who} listens there: end that one, or choose another port"
