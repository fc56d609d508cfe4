"""The runtime directory: where a user's node keeps what must outlive it, and what says who it is.

    nsnd.sock         control socket (unless --socket says otherwise)
    node              who the node is or was (NodeRecord), locked as long as it runs
    lock              taken by whoever decides whether a node is to be started, or to end
    nsnd.log, .log.1  log of a node that was started by itself
    <number>/         files of one application ID
    <number>-<token>/ files of one account of it, whose name is in the file `account` there. Who may pass through the runtime
                      directory finds only those whose token nsnd has told it
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

ENVIRONMENT = "INSANE_NATS_RUNTIME_DIR"
BY_HAND = "hand"
BY_AUTOSTART = "autostart"
SOCKET_PATH_MAX = 107
DIRECTORY_CLOSED, DIRECTORY_SHARED = 0o700, 0o711  # others open there what they know the name of
ACCOUNT = "account"
RECORD_SIZE = 16384
PLACE = re.compile(r"(\d+)(-[0-9a-f]{32})?")


class RuntimeDirectoryError(Exception):
    """The directory cannot be used, or somebody else uses it. The text says who, and the way out."""


class NodeRecord(NamedTuple):
    """What a node says of itself in the file `node`."""

    pid: int
    boot_id: str
    node_id: str
    starts: int
    started_by: str
    config: str | None
    socket: str
    version: str


def default_directory(environment: Mapping[str, str]) -> Path:
    """$INSANE_NATS_RUNTIME_DIR, or the user's own directory in shared memory."""
    return Path(environment.get(ENVIRONMENT) or f"/dev/shm/insane_nats-{os.getuid()}")


def boot_id() -> str:
    """Changes with every boot of the kernel: state of an earlier boot says nothing of processes that live now."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


class Place(NamedTuple):
    """Where files of an application ID are. `account`: None for the sessions of one that has no users."""

    application_id: int
    account: str | None
    path: Path


class RuntimeDirectory:
    """A directory that belongs to this user and is closed to others; made when it is not there.

    While a node is shared, others may pass through it (mode 0711), to the control socket and the files of application IDs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._node_fd: int | None = None
        self._check()

    def _check(self) -> None:
        try:
            with suppress(FileExistsError):
                self.path.mkdir(mode=DIRECTORY_CLOSED, parents=True)
            status = self.path.lstat()
        except OSError as error:
            raise RuntimeDirectoryError(f"runtime directory {self.path} cannot be made: {error.strerror}; "
                                        f"name another with --runtime-dir or ${ENVIRONMENT}") from error
        if not stat.S_ISDIR(status.st_mode):
            raise RuntimeDirectoryError(f"runtime directory {self.path} is not a directory; "
                                        f"remove it, or name another with --runtime-dir or ${ENVIRONMENT}")
        if status.st_uid != os.getuid():
            raise RuntimeDirectoryError(f"runtime directory {self.path} belongs to uid {status.st_uid}, not to uid "
                                        f"{os.getuid()}; name another with --runtime-dir or ${ENVIRONMENT}")
        if status.st_mode & 0o066:
            raise RuntimeDirectoryError(f"runtime directory {self.path} is open to other users (mode "
                                        f"{stat.S_IMODE(status.st_mode):04o}): chmod 700 {self.path}")

    def share(self, shared: bool) -> None:
        """Lets other users pass through, or not."""
        self.path.chmod(DIRECTORY_SHARED if shared else DIRECTORY_CLOSED)

    def closed_above(self) -> Path | None:
        """A directory above that other users cannot pass through."""
        return next((path for path in self.path.parents if not path.stat().st_mode & 0o001), None)

    @property
    def socket(self) -> Path:
        return self.path / "nsnd.sock"

    @property
    def log(self) -> Path:
        return self.path / "nsnd.log"

    def application(self, application_id: int) -> Place:
        """For sessions of an application ID that has no users."""
        return Place(application_id, None, self.path / str(application_id))

    def new_account(self, application_id: int, account: str) -> Place:
        """For those of an account: a directory of its own, which is there. OSError."""
        path = self.path / f"{application_id}-{secrets.token_hex(16)}"
        path.mkdir(mode=DIRECTORY_CLOSED)
        fd = os.open(path / ACCOUNT, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(account)
        return Place(application_id, account, path)

    def places(self) -> list[Place]:
        """All whose files are there, those of no account first. What a node that was killed had only begun is removed."""
        if not self.path.exists():
            return []
        places = []
        for entry in self.path.iterdir():
            match = PLACE.fullmatch(entry.name)
            if match is None or not entry.is_dir():
                continue
            place = Place(int(match[1]), _account(entry) if match[2] else None, entry)
            if place.account == "":
                self.remove_place(place)
            else:
                places.append(place)
        return sorted(places, key=lambda place: (place.application_id, place.account is not None, place.path))

    def remove_place(self, place: Place) -> None:
        from shutil import rmtree  # not on the way to a quick start

        with suppress(FileNotFoundError):  # somebody removed it already
            rmtree(place.path)

    # --- who decides about start and end ----------------------------------------------------------------------------

    @contextmanager
    def deciding(self, timeout_s: float) -> Iterator[None]:
        """Holds the file `lock`. TimeoutError when somebody else holds it that long; 0 does not wait."""
        fd = self._lock_file("lock", timeout_s)
        try:
            yield
        finally:
            os.close(fd)

    def _lock_file(self, name: str, timeout_s: float) -> int:
        """An ending node removes its files: a lock is only good on the file that has the name still."""
        deadline = time.monotonic() + timeout_s
        path = self.path / name
        while True:
            self._check()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(0.005)  # flock with a time limit is not to be had
            except FileNotFoundError:
                pass
            os.close(fd)

    # --- who the node is -------------------------------------------------------------------------------------------

    def record(self) -> NodeRecord | None:
        """Of the node that runs here, or ran last and had not finished. None when there is nothing to be read."""
        try:
            fields = json.loads((self.path / "node").read_text("utf-8"))
            return NodeRecord(**{name: fields[name] for name in NodeRecord._fields})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def node_runs(self) -> bool:
        """Whether a node holds the file `node`."""
        try:
            fd = os.open(self.path / "node", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def become_node(self, node_id: str, started_by: str, config: str | None, socket: Path, version: str) -> NodeRecord:
        """Takes the directory over for the life of this process, with the identity of the node that was here before.

        RuntimeDirectoryError when a node runs already.
        """
        before = self.record()
        try:
            self._node_fd = self._lock_file("node", 0.2)
        except TimeoutError:
            running = self.record()
            who = f"pid {running.pid}, started by {running.started_by}" if running else "pid unknown"
            raise RuntimeDirectoryError(f"a node runs already in {self.path} ({who}); end it first, "
                                        f"or name another directory with --runtime-dir") from None
        this_boot = boot_id()
        if before is None or before.boot_id != this_boot:
            before = None
            for place in self.places():
                self.remove_place(place)
        record = NodeRecord(os.getpid(), this_boot, before.node_id if before else node_id, before.starts + 1 if before else 0,
                            started_by, config, str(socket), version)
        # One write of one size: whenever this process is killed, one record or the other is there as a whole.
        os.pwrite(self._node_fd, json.dumps(record._asdict()).encode().ljust(RECORD_SIZE), 0)
        return record

    def leave(self, *, sessions: bool, deciding: bool) -> None:
        """The end of this node. Without sessions nothing stays; with some, what the next node needs.

        `deciding`: the caller holds the file `lock`.
        """
        assert self._node_fd is not None
        self.socket.unlink(missing_ok=True)
        if not sessions:
            for place in self.places():
                with suppress(OSError):  # the node has said so
                    self.remove_place(place)
            for name in ("nsnd.log.1", "nsnd.log", "node"):
                (self.path / name).unlink(missing_ok=True)
            if self.path.exists():
                with suppress(TimeoutError), nullcontext() if deciding else self.deciding(0):
                    (self.path / "lock").unlink(missing_ok=True)
        os.close(self._node_fd)
        self._node_fd = None


def _account(directory: Path) -> str:
    """Empty when it was not written."""
    try:
        return (directory / ACCOUNT).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
