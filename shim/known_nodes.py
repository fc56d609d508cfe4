"""Nodes that this process has attached to. Another connection to the same URL asks the node's control socket at once: whoever
answers there still has the application ID's port, or takes it, so that the question at the port can be left out.

Only for 127.0.0.1, also as localhost, and a node that listens there: nobody else can while it does. Another name or address may
move to another host, or be a NATS server's the next time."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import ParseResult

from insane_nats.shim.node import LOOPBACK

MOST = 64  # URLs; above, all are forgotten


class KnownNode(NamedTuple):
    """INFO as it was read at the port; node_pid: nsnd's process as the kernel says, which may differ in a PID namespace."""

    info: dict[str, Any]
    node_pid: int


_nodes: dict[tuple[str, int], KnownNode] = {}


def remember(uri: ParseResult, peer: str, info: dict[str, Any], node_pid: int) -> None:
    """The node at the URL, which answered at the address peer, has let this process in."""
    if peer != LOOPBACK or uri.hostname not in (None, LOOPBACK, "localhost"):
        return
    if node_pid <= 0:  # of another PID namespace: the next one there cannot be told from it
        return
    if len(_nodes) >= MOST:
        _nodes.clear()
    _nodes[_key(uri)] = KnownNode(info, node_pid)


def forget(uri: ParseResult) -> None:
    _nodes.pop(_key(uri), None)


def find(uri: ParseResult) -> KnownNode | None:
    """What was at the URL before; it may be gone."""
    return _nodes.get(_key(uri))


def _key(uri: ParseResult) -> tuple[str, int]:
    return uri.hostname or LOOPBACK, uri.port or 4222
