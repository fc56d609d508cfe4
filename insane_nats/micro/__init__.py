"""nats.micro, under this package's name."""

from typing import Any

from nats import micro as _theirs
from nats.micro import add_service
from nats.micro.request import Handler, Request
from nats.micro.service import Service, ServiceConfig

from insane_nats.micro import request, service

__all__ = ["Handler", "Request", "Service", "ServiceConfig", "add_service", "request", "service"]


def __getattr__(name: str) -> Any:
    """Everything else that nats.micro has."""
    return getattr(_theirs, name)
