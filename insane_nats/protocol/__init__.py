"""nats.protocol, under this package's name."""

from insane_nats.protocol import command, parser

__all__ = ["command", "parser"]
