"""nats.aio.transport, under this package's name."""

import sys

from nats.aio.transport import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.aio.transport"]  # the same module under both names
