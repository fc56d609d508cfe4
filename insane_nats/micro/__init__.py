"""nats.micro, under this package's name."""

from nats.micro import add_service
from nats.micro.request import Handler, Request
from nats.micro.service import Service, ServiceConfig

__all__ = ["Handler", "Request", "Service", "ServiceConfig", "add_service"]
