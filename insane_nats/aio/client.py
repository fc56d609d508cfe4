"""nats.aio.client, with a Client that speaks to insane_nats nodes too."""

from typing import Any

from nats.aio import client as _theirs
from nats.aio.client import (
    DEFAULT_CONNECT_TIMEOUT,
    DEFAULT_DRAIN_TIMEOUT,
    DEFAULT_FLUSH_TIMEOUT,
    DEFAULT_INBOX_PREFIX,
    DEFAULT_MAX_RECONNECT_ATTEMPTS,
    DEFAULT_PENDING_SIZE,
    DEFAULT_PING_INTERVAL,
    DEFAULT_RECONNECT_TIME_WAIT,
    Credentials,
    RawCredentials,
    Server,
    ServerVersion,
    Srv,
)
from nats.aio.msg import Msg
from nats.aio.subscription import (
    DEFAULT_SUB_PENDING_BYTES_LIMIT,
    DEFAULT_SUB_PENDING_MSGS_LIMIT,
    Subscription,
)

from insane_nats.shim.client import Client

__all__ = [
    "DEFAULT_CONNECT_TIMEOUT",
    "DEFAULT_DRAIN_TIMEOUT",
    "DEFAULT_FLUSH_TIMEOUT",
    "DEFAULT_INBOX_PREFIX",
    "DEFAULT_MAX_RECONNECT_ATTEMPTS",
    "DEFAULT_PENDING_SIZE",
    "DEFAULT_PING_INTERVAL",
    "DEFAULT_RECONNECT_TIME_WAIT",
    "DEFAULT_SUB_PENDING_BYTES_LIMIT",
    "DEFAULT_SUB_PENDING_MSGS_LIMIT",
    "Client",
    "Credentials",
    "Msg",
    "RawCredentials",
    "Server",
    "ServerVersion",
    "Srv",
    "Subscription",
]


def __getattr__(name: str) -> Any:
    """Everything else that nats.aio.client has."""
    return getattr(_theirs, name)
