"""nats.aio, with a Client that speaks to insane_nats nodes too."""

from insane_nats.aio import client, errors, msg, subscription, transport

__all__ = ["client", "errors", "msg", "subscription", "transport"]
