"""Clients whose users have permissions: each has a relay, a thread in C that is a session of the fabric in its place."""

from __future__ import annotations

import errno
import os
import secrets
import socket
from threading import Thread
from typing import Any, NamedTuple

from nsnd._relay import ffi, lib
from nsnd.credentials import User
from nsnd.permissions import Permissions, Rule
from nsnd.protocol import ProtocolError

RELAYS_MAX = 512  # of a node
OTHERS_RELAYS_MAX = 32  # of one user that is not nsnd's
SUBSCRIPTIONS_MAX = 16384  # of one of them
OTHERS_SUBSCRIPTIONS_MAX = 512  # the same of a user that is not nsnd's
BUDGET = 64 << 20  # bytes of a relay's session, beside what the largest message has
WRITE_DEADLINE_NS = 10_000_000_000


class Relayed(NamedTuple):
    """For whom a relay's session is there. `pid`, `uid`: of the client, from the kernel."""

    user: User
    name: str
    pid: int
    uid: int
    relay: str = ""  # its name, once it is attached


class _Relay:
    """One that runs, and all that its thread reads meanwhile."""

    def __init__(self, relays: Any, relayed: Relayed, socket_path: str, application_id: int, max_payload: int, info: str,
                 lame_duck: str) -> None:
        self.relayed = relayed
        self.name = "relay " + secrets.token_hex(16)
        self._permissions = [_made(relayed.user.permissions)]
        self._texts = [ffi.new("char[]", text.encode()) for text in (socket_path, self.name, info, lame_duck)]
        self._options = ffi.new("struct nsn_relay_options *", {
            "socket_path": self._texts[0], "name": self._texts[1], "info": self._texts[2], "lame_duck": self._texts[3],
            "application_id": application_id, "max_payload": max_payload, "budget": BUDGET + max_payload,
            "write_deadline_ns": WRITE_DEADLINE_NS, "permissions": self._permissions[0], "relays": relays,
            "subscriptions_max": SUBSCRIPTIONS_MAX if relayed.uid == os.getuid() else OTHERS_SUBSCRIPTIONS_MAX,
        })

    def run(self, client: int) -> None:
        """Until one of both ends."""
        lib.nsn_relay_run(client, self._options)

    def permit(self, permissions: Permissions | None) -> None:
        self._permissions.append(_made(permissions))
        lib.nsn_relay_permit(self._options, self._permissions[-1])


class Relays:
    """Those that run. A relay attaches as everybody does, from this very process, and is known by its name."""

    def __init__(self, socket_path: str) -> None:
        self._socket = socket_path
        self._all = lib.nsn_relays_new()
        if self._all == ffi.NULL:
            raise MemoryError("no memory for relays")
        self._coming: dict[str, _Relay] = {}
        self._running: dict[str, _Relay] = {}

    def start(self, relayed: Relayed, application_id: int, max_payload: int, info: str, lame_duck: str) -> socket.socket:
        """The client's end of a connection to a relay of its own. ProtocolError when there are too many."""
        running = list(self._running.values())
        if len(running) >= RELAYS_MAX:
            raise ProtocolError(errno.EDQUOT, f"this node has {RELAYS_MAX} clients whose users have permissions, and no more")
        if relayed.uid != os.getuid() and sum(one.relayed.uid == relayed.uid for one in running) >= OTHERS_RELAYS_MAX:
            raise ProtocolError(errno.EDQUOT, f"uid {relayed.uid} has {OTHERS_RELAYS_MAX} clients whose users have "
                                              f"permissions, and users other than the node's have no more")
        relay = _Relay(self._all, relayed, self._socket, application_id, max_payload, info, lame_duck)
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise ProtocolError(error.errno or errno.EIO, f"a client with permissions: {error.strerror}") from error
        self._coming[relay.name] = self._running[relay.name] = relay
        try:
            Thread(target=self._run, args=(relay, ours), name="relay", daemon=True).start()
        except RuntimeError as error:
            self._forget(relay)
            ours.close()
            theirs.close()
            raise ProtocolError(errno.EAGAIN, f"a client with permissions: {error}") from error
        return theirs

    def _run(self, relay: _Relay, client: socket.socket) -> None:
        relay.run(client.detach())
        self._forget(relay)

    def _forget(self, relay: _Relay) -> None:
        self._coming.pop(relay.name, None)
        self._running.pop(relay.name, None)

    def claim(self, name: str) -> Relayed | None:
        """Whose relay attaches now under that name. Once."""
        relay = self._coming.pop(name, None)
        return None if relay is None else relay.relayed._replace(relay=name)

    def permit(self, relayed: Relayed, permissions: Permissions | None) -> None:
        """What holds for that client from the next time on that its relay wakes."""
        relay = self._running.get(relayed.relay)
        if relay is not None:
            relay.permit(permissions)


def _made(permissions: Permissions | None) -> Any:
    """None: everything."""
    permissions = permissions or Permissions()
    made = ffi.gc(lib.nsn_permissions_new(), lib.nsn_permissions_free)
    _add(made, permissions.publish, lib.NSN_PUBLISH_ALLOW, lib.NSN_PUBLISH_DENY)
    _add(made, permissions.subscribe, lib.NSN_SUBSCRIBE_ALLOW, lib.NSN_SUBSCRIBE_DENY)
    if permissions.responses is not None:
        most, expires_s = permissions.responses
        lib.nsn_permissions_responses(made, most, int(expires_s * 1e9))
    return made


def _add(made: Any, rule: Rule, allow: int, deny: int) -> None:
    if rule.allow is not None:
        lib.nsn_permissions_restrict(made, allow)
    for number, entries in ((allow, rule.allow or ()), (deny, rule.deny)):
        for pattern, queue in entries:
            raw, group = pattern.encode(), queue.encode()
            if lib.nsn_permissions_add(made, number, raw, len(raw), group, len(group)) < 0:
                raise ProtocolError(errno.ENOMEM, "no memory for a user's permissions")
