"""What a node says of itself and its sessions: written here by the node, asked for here by tools."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from nsnd import __version__
from nsnd.protocol import MAGIC, PACKET, PACKET_MAX, STATUS, VERSION_MAX, PacketType, unpack_refused

if TYPE_CHECKING:
    from nsnd.applications import Application
    from nsnd.server import Node

msgpack: Any = import_module("msgpack")  # it comes without types


class StatusError(Exception):
    """The node did not answer. The text says why."""


def document(node: Node) -> bytes:
    """The msgpack map that answers a STATUS packet."""
    report: bytes = msgpack.packb({
        "node": {
            "id": node.record.node_id,
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": monotonic() - node.started_at,
            "runtime_dir": str(node.runtime.path),
            "started_by": node.record.started_by,
        },
        "applications": [_application(application) for application in node.everywhere()
                         if application.account is not None or application.application_id not in node.config.auth
                         or len(application)],
    })
    return report


def _application(application: Application) -> dict[str, object]:
    fabric = application.fabric
    sessions = application.sessions
    return {
        "application_id": application.application_id,
        "account": application.account,
        "interest_number": fabric.interest_number(),
        "subscriptions": fabric.subscriptions(),
        "sessions": [
            {
                "slot": session.slot,
                "generation": session.generation,
                "name": session.name,
                "pid": session.relayed.pid if session.relayed is not None else session.process.pid,
                "uid": session.relayed.uid if session.relayed is not None else session.uid,
                "relayed": session.relayed is not None,
                "user": session.user.name if session.user is not None else None,
                "attached": session.connection is not None,
                "counters": fabric.counters(session.slot),
                "subscriptions": fabric.session_subscriptions(session.slot, session.generation),
            }
            for session in sessions
        ],
        "links": [
            {"from_slot": session.slot, "to_slot": consumer.slot}
            for session in sessions
            for consumer in sorted(session.consumers, key=lambda consumer: consumer.slot)
        ],
    }


def query(path: str | Path, timeout_s: float = 5.0) -> dict[str, Any]:
    """Asks the node whose control socket this is. StatusError when it does not answer within timeout_s."""
    parts = bytearray()
    deadline = monotonic() + timeout_s
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            sock.send(PACKET.pack(MAGIC, PacketType.STATUS, VERSION_MAX))
            last = 0
            while not last:
                sock.settimeout(max(0.001, deadline - monotonic()))
                part, last = _part(sock.recv(PACKET_MAX), path)
                parts += part
    except OSError as error:
        raise StatusError(f"the node at {path} does not answer: {error.strerror or error}") from error
    report: dict[str, Any] = msgpack.unpackb(bytes(parts))
    return report


def _part(packet: bytes, path: str | Path) -> tuple[bytes, int]:
    if not packet:
        raise StatusError(f"the node at {path} ended while it answered")
    kind = PACKET.unpack_from(packet)[1]
    if kind == PacketType.REFUSED:
        raise StatusError(f"the node at {path} refused to answer: {unpack_refused(packet).text}")
    if kind != PacketType.STATUS:
        raise StatusError(f"the node at {path} answered with packet type {kind}")
    _, _, _, length, last = STATUS.unpack_from(packet)
    return packet[STATUS.size : STATUS.size + length], last
