"""nats.aio.msg, under this package's name."""

import sys

from nats.aio.msg import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.aio.msg"]  # the same module under both names
