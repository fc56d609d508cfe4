"""nats.protocol.parser, under this package's name."""

import sys

from nats.protocol.parser import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.protocol.parser"]  # the same module under both names
