"""What the sessions of one application ID share, through the C of all sides: who is there (slots), what they want (the log)."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

from nsnd._fabric import ffi, lib
from nsnd.protocol import text_field
from nsnd.runtime import DIRECTORY_CLOSED, DIRECTORY_SHARED

SLOTS_MAX: int = lib.NSN_SLOTS_MAX
NOTHING_COMMITTED: int = lib.NSN_LOG_NOTHING_COMMITTED
COUNTERS = tuple(name for name, _ in ffi.typeof("struct nsn_counters").fields)
SERVE_MAX = 256  # packets of one session before the others have their turn
# A session that subscribes one by one has its next packet ready within this time; with one processor it cannot.
SERVE_SPIN_NS = 30_000 if (os.cpu_count() or 1) > 1 else 0
_ERROR_SIZE = 256


class FabricError(OSError):
    """errno is positive; strerror says what went wrong."""


class Slot(NamedTuple):
    """One living session as the table says it: struct nsn_slot."""

    slot: int
    generation: int
    identity: tuple[int, int]
    acknowledged: int
    pid: int
    start_time: int
    uid: int
    other: bool  # its user is not nsnd's


class Fabric:
    """Slots and interest log of one directory; takes over what is there. Closed by close()."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        path = os.fsencode(directory)
        error = ffi.new("char[]", _ERROR_SIZE)
        slots = ffi.new("struct nsn_slots **")
        self._check(lib.nsn_slots_open(slots, path, error, _ERROR_SIZE), error)
        writer = ffi.new("struct nsn_log_writer **")
        result = lib.nsn_log_writer_open(writer, path, lib.nsn_slots_log(slots[0]), 0, error, _ERROR_SIZE)
        if result < 0:
            lib.nsn_slots_close(slots[0])
        self._check(result, error)
        self._slots = slots[0]
        self._view = lib.nsn_slots_view(self._slots)
        self._writer = writer[0]
        self._failed = ffi.new("uint32_t *")
        self._settled = ffi.new("uint64_t *")
        self._others_read: bool | None = None  # not known: a node before this one may have let them

    def _check(self, result: int, error: Any) -> None:
        if result < 0:
            raise FabricError(-result, text_field(ffi.buffer(error)[:]))

    def close(self) -> None:
        lib.nsn_log_writer_close(self._writer)
        lib.nsn_slots_close(self._slots)

    # --- sessions ---------------------------------------------------------------------------------------------------

    def living(self) -> list[Slot]:
        """Every slot that is taken."""
        return [self.slot(i) for i in range(min(self._view.highest, SLOTS_MAX)) if self._view.slot[i].alive]

    def slot(self, index: int) -> Slot:
        entry = self._view.slot[index]
        return Slot(index, entry.alive, (entry.identity[0], entry.identity[1]), entry.acknowledged, entry.pid, entry.start_time,
                    entry.uid, bool(entry.traits & lib.NSN_SLOT_OTHER))

    def claim(self, identity: tuple[int, int], pid: int, start_time: int, uid: int) -> Slot:
        """A slot for a new session; FabricError ENOSPC when all are taken."""
        generation = ffi.new("uint32_t *")
        result = lib.nsn_slots_claim(self._slots, identity, pid, start_time, uid, generation)
        if result == -errno.ENOSPC:
            raise FabricError(errno.ENOSPC, f"all {SLOTS_MAX} places for sessions of this application ID are taken")
        if result < 0:
            raise FabricError(-result, f"no place for a session: {os.strerror(-result)}")
        return self.slot(result)

    def claim_other(self, identity: tuple[int, int], pid: int, start_time: int, uid: int, segment: int) -> Slot:
        """The same for a session of another user, whose place is in a shared memory segment of its own; from now on others may
        read."""
        generation = ffi.new("uint32_t *")
        error = ffi.new("char[]", _ERROR_SIZE)
        self._let_others_read(True)
        result = lib.nsn_slots_claim_other(self._slots, identity, pid, start_time, uid, segment, generation, error, _ERROR_SIZE)
        self._check(result, error)
        return self.slot(result)

    def share(self, shared: bool) -> None:
        """Lets other users in to read, or not. Shared memory has no list of who may read it: it is opened to all with the first
        session of another user, and not before."""
        if not shared:
            self._let_others_read(False)
        os.chmod(self.directory, DIRECTORY_SHARED if shared else DIRECTORY_CLOSED)

    def _let_others_read(self, may: bool) -> None:
        if may == self._others_read:
            return
        result = lib.nsn_slots_share(self._slots, may)
        if result < 0:
            raise FabricError(-result, os.strerror(-result))
        self._others_read = may

    def has_place(self, slot: int) -> bool:
        """False for a session of another user whose segment has gone with it."""
        return bool(lib.nsn_slots_place(self._slots, slot) != ffi.NULL)

    def find(self, identity: tuple[int, int]) -> Slot | None:
        """The living session of this identity."""
        result = lib.nsn_slots_find(self._slots, identity)
        return None if result < 0 else self.slot(result)

    def speaks(self, slot: int, version_min: int, version_max: int) -> None:
        """Which versions of the protocol: whoever shares none does not link with this session."""
        lib.nsn_slots_speaks(self._slots, slot, version_min, version_max)

    def free(self, slot: int) -> None:
        lib.nsn_slots_free_slot(self._slots, slot)

    def name(self, slot: int) -> str:
        """As the session itself wrote it into its page."""
        return text_field(ffi.buffer(lib.nsn_slots_place(self._slots, slot).page.name)[:]) if self.has_place(slot) else ""

    def counters(self, slot: int) -> dict[str, int]:
        """struct nsn_counters of the session's page."""
        if not self.has_place(slot):
            return dict.fromkeys(COUNTERS, 0)
        counters = lib.nsn_slots_place(self._slots, slot).page.counters
        return {name: getattr(counters, name) for name in COUNTERS}

    def bell(self, slot: int) -> Path:
        """The doorbell of the session in this slot, if its user is nsnd's."""
        return Path(self.directory, f"bell.{slot}")

    def bell_is_bound(self, slot: int) -> bool:
        """Whether somebody listens for its doorbell: a session that was closed while there was no node does not."""
        there = self.slot(slot)
        name = "\0insane_nats/" + "".join(f"{half:016x}" for half in there.identity) if there.other else str(self.bell(slot))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ringer:
            try:
                ringer.connect(name)
            except (ConnectionRefusedError, FileNotFoundError):
                return False
        return True

    # --- interest ---------------------------------------------------------------------------------------------------

    def apply(self, slot: int, generation: int, batch: memoryview, count: int) -> tuple[int, int]:
        """A batch of struct nsn_interest_change. (0, 0), or (negative errno, index of the change that failed); that is
        NOTHING_COMMITTED when the log could not be written."""
        self._failed[0] = 0
        raw = ffi.from_buffer("uint8_t[]", batch)
        result: int = lib.nsn_log_writer_apply(self._writer, slot, generation, raw, len(raw), count, self._failed)
        return (result, self._failed[0]) if result < 0 else (0, 0)

    def serve(self, slot: int, generation: int, settled: int, fd: int) -> int:
        """Applies and acknowledges the next INTEREST packets that lie in a session's socket, and waits a little for more of
        them. Returns the last sequence number that is in the log."""
        self._settled[0] = settled
        lib.nsn_serve_interest(self._writer, self._slots, slot, generation, self._settled, fd, SERVE_MAX, SERVE_SPIN_NS)
        return int(self._settled[0])

    def acknowledge(self, slot: int, sequence: int) -> None:
        lib.nsn_slots_acknowledge(self._slots, slot, sequence)

    def session_gone(self, slot: int, generation: int) -> int:
        """Removes a session's interest; returns how many subscriptions it had."""
        result: int = lib.nsn_log_writer_session_gone(self._writer, slot, generation)
        if result < 0:
            raise FabricError(-result, f"interest of slot {slot} cannot be removed: {os.strerror(-result)}")
        return result

    def interest_number(self) -> int:
        return int(lib.nsn_log_writer_number(self._writer))

    def subscriptions(self) -> int:
        return int(lib.nsn_log_writer_count(self._writer))

    def session_subscriptions(self, slot: int, generation: int) -> int:
        return int(lib.nsn_log_writer_session_count(self._writer, slot, generation))
