"""nats.protocol.command, under this package's name."""

import sys

from nats.protocol.command import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.protocol.command"]  # the same module under both names
