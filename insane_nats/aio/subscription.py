"""nats.aio.subscription, under this package's name."""

import sys

from nats.aio.subscription import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.aio.subscription"]  # the same module under both names
