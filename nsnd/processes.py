"""Processes that own sessions: which they are, and when they end. A pidfd says so within a millisecond of the death."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from nsnd.loop import Loop

if TYPE_CHECKING:
    from nsnd.sessions import Session

SO_PEERPIDFD = 77  # Linux 6.5; not in Python's socket module yet


def start_time(pid: int) -> int | None:
    """Clock ticks since boot (/proc/PID/stat field 22), which tells a process from a later one of the same number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None


class Process:
    """A living process and its sessions. It owns the pidfd."""

    __slots__ = ("pid", "pidfd", "sessions", "start_time")

    def __init__(self, pid: int, started: int, pidfd: int) -> None:
        self.pid = pid
        self.start_time = started
        self.pidfd = pidfd
        self.sessions: set[Session] = set()

    def close(self) -> None:
        os.close(self.pidfd)


class Processes:
    """Every process that has a session, once each."""

    def __init__(self, loop: Loop, died: Callable[[Process], None]) -> None:
        self._loop = loop
        self._died = died
        self._by_pid: dict[int, Process] = {}

    def peer(self, sock: socket.socket, pid: int) -> Process | None:
        """The process at the other end of a socket; None when it is gone already."""
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            return self.find(pid)
        return self._watch(pid, pidfd)

    def find(self, pid: int, started: int | None = None) -> Process | None:
        """The process of this number (and start time); None when it is gone."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        return self._watch(pid, pidfd, started)

    def _watch(self, pid: int, pidfd: int, started: int | None = None) -> Process | None:
        # Read while the pidfd is open: if it is not readable afterwards, this was the start time of the process it is for.
        now_started = start_time(pid)
        if now_started is None or (started is not None and now_started != started) or _has_ended(pidfd):
            os.close(pidfd)
            return None
        known = self._by_pid.get(pid)
        if known is not None and known.start_time == now_started:
            os.close(pidfd)
            return known
        if known is not None:
            self._end(known)
        process = Process(pid, now_started, pidfd)
        self._by_pid[pid] = process
        self._loop.add(pidfd, select.EPOLLIN, lambda events: self._end(process))
        return process

    def _end(self, process: Process) -> None:
        self.forget(process)
        self._died(process)

    def forget(self, process: Process) -> None:
        """Its last session has gone, or it has."""
        if self._by_pid.get(process.pid) is process:
            del self._by_pid[process.pid]
            self._loop.remove(process.pidfd, process)


def _has_ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
