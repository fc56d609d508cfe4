"""Asks a node (nsnd) about itself: the INFO line on an application ID's port, and NSN_STATUS on the control socket."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack

DEFAULT_URL = "nats://127.0.0.1:4222"
INFO_LIMIT = 1 << 20  # bytes of an INFO line
STATUS_LIMIT = 256 << 20  # bytes of a status
TIMEOUT_S = 5.0  # for each answer

# shim/libnsn/nsn_protocol.h
MAGIC = 0x494E534E
PROTOCOL_VERSION = 1
PACKET_MAX = 32768
REFUSED = 3
STATUS = 14
PACKET = struct.Struct("<IHH")  # magic, type, version
STATUS_HEAD = struct.Struct("<IHHII")  # packet, then length and last
REFUSED_HEAD = struct.Struct("<IHHiI")  # packet, then error and a reserved word; the text follows


class NodeError(Exception):
    """There is no node, or it does not answer as one; the text says which, and what to do."""


@dataclass(frozen=True)
class Session:
    """One NATS connection (or program) on the fabric. counters: struct nsn_counters of nsn_slots.h, bytes and counts."""

    slot: int
    generation: int
    name: str
    pid: int
    uid: int
    attached: bool
    subscriptions: int
    counters: Mapping[str, int] = field(default_factory=dict)
    user: str | None = None


@dataclass(frozen=True)
class Application:
    """One application ID (a NATS URL's port) and who is on it; where it has users, of one account. links: pairs of slots,
    producer and consumer."""

    application_id: int
    interest_number: int
    subscriptions: int
    sessions: tuple[Session, ...]
    links: tuple[tuple[int, int], ...]
    account: str | None = None


@dataclass(frozen=True)
class Status:
    """A node's answer to NSN_STATUS."""

    node_id: str
    version: str
    pid: int
    uptime_s: float
    runtime_dir: str
    started_by: str
    applications: tuple[Application, ...]


def runtime_socket(environ: Mapping[str, str]) -> Path:
    """Where the user's own node has its control socket."""
    directory = environ.get("INSANE_NATS_RUNTIME_DIR") or f"/dev/shm/insane_nats-{os.getuid()}"
    return Path(directory) / "nsnd.sock"


def find_socket(url: str | None, environ: Mapping[str, str]) -> Path:
    """The control socket of the node at a NATS URL; without one that of the user's node, else of the node at NATS_URL.

    Raises NodeError when no node is there.
    """
    if url is not None:
        return socket_at(url)
    path = runtime_socket(environ)
    if _listens(path):
        return path
    at = environ.get("NATS_URL") or DEFAULT_URL
    try:
        return socket_at(at)
    except NodeError as error:
        raise NodeError(f"no nsnd is running for this user (nobody listens at {path}), and {error}") from error


def socket_at(url: str) -> Path:
    """Reads the INFO line at the URL's host and port; raises NodeError unless an insane_nats node wrote it."""
    first = url.split(",")[0].strip()
    host, port = _host_port(first)
    at = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), TIMEOUT_S) as connection:
            info = _read_info(connection, at)
    except OSError as error:
        raise NodeError(
            f"nobody answers at {at} ({_words(error)}). A node starts with the first program that connects there, or by "
            f"hand: nsnd --port {port}"
        ) from error
    insane = info.get("insane")
    if not isinstance(insane, dict) or not isinstance(insane.get("socket"), str):
        raise NodeError(f"{at} is a NATS server (version {info.get('version', 'unknown')}), not an insane_nats node")
    return Path(insane["socket"])


def _host_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    try:
        return parts.hostname or "127.0.0.1", parts.port or 4222
    except ValueError as error:
        raise NodeError(f"{url!r} is no NATS URL ({error}); one looks like {DEFAULT_URL}") from error


def _read_info(connection: socket.socket, at: str) -> dict[str, object]:
    line = b""
    while b"\n" not in line and len(line) < INFO_LIMIT:
        part = connection.recv(65536)
        if not part:
            break
        line += part
    verb, _, text = line.partition(b"\n")[0].partition(b" ")
    try:
        info = json.loads(text) if verb.upper() == b"INFO" else None
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise NodeError(f"what listens at {at} speaks no NATS: neither an insane_nats node nor a NATS server")
    return info


def fetch_status(path: Path) -> Mapping[str, Any]:
    """Asks the node whose control socket is at path; its answer as it came. Raises NodeError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(path))
            connection.send(PACKET.pack(MAGIC, STATUS, PROTOCOL_VERSION))
            answer = _read_status(connection, path)
    except PermissionError as error:
        raise NodeError(f"{path} belongs to another user: ask as that user, or as root") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NodeError(f"no nsnd is running: nobody listens at {path}") from error
    except OSError as error:
        raise NodeError(f"nsnd at {path} does not answer ({_words(error)})") from error
    try:
        status = msgpack.unpackb(answer, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise NodeError(f"the status of nsnd at {path} is no msgpack ({error})") from error
    if not isinstance(status, dict):
        raise NodeError(f"the status of nsnd at {path} is no map")
    return status


def _read_status(connection: socket.socket, path: Path) -> bytes:
    parts: list[bytes] = []
    total = 0
    while total <= STATUS_LIMIT:
        packet = connection.recv(PACKET_MAX)
        if len(packet) < PACKET.size:
            raise NodeError(f"nsnd at {path} closed the connection before its status was complete")
        magic, kind, _ = PACKET.unpack_from(packet)
        if magic != MAGIC:
            raise NodeError(f"what listens at {path} is no nsnd")
        if kind == REFUSED:
            text = packet[REFUSED_HEAD.size :].partition(b"\0")[0].decode("utf-8", "replace")
            raise NodeError(f"nsnd at {path} refuses: {text}")
        if kind != STATUS or len(packet) < STATUS_HEAD.size:
            raise NodeError(f"nsnd at {path} answered packet type {kind} to a question for its status")
        *_, length, last = STATUS_HEAD.unpack_from(packet)
        part = packet[STATUS_HEAD.size : STATUS_HEAD.size + length]
        if len(part) != length:
            raise NodeError(f"nsnd at {path} sent a status packet that is cut short")
        parts.append(part)
        total += length
        if last:
            return b"".join(parts)
    raise NodeError(f"the status of nsnd at {path} is larger than {STATUS_LIMIT} bytes")


def parse_status(raw: Mapping[str, Any]) -> Status:
    """Checks what the table needs. Raises NodeError; fields that this version does not know are left out."""
    try:
        node = raw["node"]
        return Status(
            node_id=str(node["id"]),
            version=str(node["version"]),
            pid=int(node["pid"]),
            uptime_s=float(node["uptime_s"]),
            runtime_dir=str(node["runtime_dir"]),
            started_by=str(node["started_by"]),
            applications=tuple(_application(application) for application in raw["applications"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NodeError(
            f"this insane-nats cannot read the node's status ({type(error).__name__}: {error}): another version? "
            "`insane-nats status --json` shows it as it came"
        ) from error


def _application(raw: Mapping[str, Any]) -> Application:
    return Application(
        application_id=_number(raw["application_id"]),
        interest_number=_number(raw["interest_number"]),
        subscriptions=_number(raw["subscriptions"]),
        sessions=tuple(_session(session) for session in raw["sessions"]),
        links=tuple((_number(link["from_slot"]), _number(link["to_slot"])) for link in raw["links"]),
        account=_name(raw.get("account")),
    )


def _session(raw: Mapping[str, Any]) -> Session:
    return Session(
        slot=_number(raw["slot"]),
        generation=_number(raw["generation"]),
        name=str(raw["name"]),
        pid=_number(raw["pid"]),
        uid=_number(raw["uid"]),
        attached=bool(raw["attached"]),
        subscriptions=_number(raw["subscriptions"]),
        counters={str(name): _number(value) for name, value in raw["counters"].items()},
        user=_name(raw.get("user")),
    )


def _name(value: object) -> str | None:
    return None if value is None else str(value)


def _number(value: object) -> int:
    """A count; a list counts as its length."""
    if isinstance(value, list):
        return len(value)
    if isinstance(value, int):
        return value
    raise TypeError(f"{value!r} is no number")


def _listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(path))
    except PermissionError:
        return True  # somebody does, and says so when asked
    except OSError:
        return False
    return True


def _words(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
