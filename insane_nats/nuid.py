"""nats.nuid, under this package's name."""

import sys

from nats.nuid import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.nuid"]  # the same module under both names
