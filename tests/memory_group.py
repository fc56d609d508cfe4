"""A memory cgroup of a test's own, below the one that the test runs in."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class UnavailableError(Exception):
    """No memory cgroup can be made here. The text says why."""


@dataclass(frozen=True)
class MemoryGroup:
    path: Path

    def command(self) -> list[str]:
        """What a program is run by so that it runs in this group."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh"]

    def kills(self) -> int:
        """How many processes the kernel has killed at the limit."""
        events = self.path / "memory.events"
        text = (events if events.exists() else self.path / "memory.oom_control").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def _mounts() -> Iterator[tuple[str, Path, Path]]:
    """Version, where it is mounted, and this process's own group."""
    groups = {line.split(":")[1]: line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        front, _, back = line.partition(" - ")
        kind, _, options = back.split()[:3]
        point = Path(front.split()[4])
        if kind == "cgroup" and "memory" in options.split(","):
            own = next((path for names, path in groups.items() if "memory" in names.split(",")), "/")
            yield "1", point, point / own.lstrip("/")
        elif kind == "cgroup2":
            yield "2", point, point / groups.get("", "/").lstrip("/")


def _make(version: str, parent: Path, limit: int) -> Path:
    """OSError when that is not possible there."""
    if version == "2" and "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        (parent / "cgroup.subtree_control").write_text("+memory")
    path = parent / f"insane-nats-test-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    try:
        (path / ("memory.max" if version == "2" else "memory.limit_in_bytes")).write_text(str(limit))
        swap = path / ("memory.swap.max" if version == "2" else "memory.memsw.limit_in_bytes")
        if swap.exists():
            swap.write_text("0" if version == "2" else str(limit))
    except OSError:
        path.rmdir()
        raise
    return path


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group with this limit, bytes. UnavailableError."""
    reasons = []
    for version, point, own in _mounts():
        for parent in [own, *own.parents]:
            if point not in (parent, *parent.parents):
                break
            try:
                path = _make(version, parent, limit)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            try:
                yield MemoryGroup(path)
            finally:
                path.rmdir()
            return
    raise UnavailableError("; ".join(reasons) or "no memory cgroups are mounted")


def why_not() -> str:
    """Empty when groups can be made and joined here."""
    if os.geteuid() != 0:
        return "only root can make a memory cgroup"
    try:
        with memory_group(1 << 26):
            return ""
    except UnavailableError as error:
        return f"no memory cgroup can be made: {error}"
