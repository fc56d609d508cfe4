"""nats.js, under this package's name."""

from nats.js import JetStreamContext, JetStreamManager

from insane_nats.js import api, client, errors, kv, manager, object_store

__all__ = ["JetStreamContext", "JetStreamManager", "api", "client", "errors", "kv", "manager", "object_store"]
