"""nats.aio.errors, under this package's name."""

import sys

from nats.aio.errors import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.aio.errors"]  # the same module under both names
