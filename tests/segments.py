"""The host's System V shared memory segments, as the kernel lists them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Segment(NamedTuple):
    """mode: the permissions alone. pid, uid: of its maker, and of its owner."""

    number: int
    mode: int
    size: int
    pid: int
    uid: int


def segments() -> list[Segment]:
    """All of this IPC namespace."""
    lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return [Segment(int(line[1]), int(line[2], 8) & 0o777, int(line[3]), int(line[4]), int(line[7])) for line in lines]
