"""nats.micro.request, under this package's name."""

import sys

from nats.micro.request import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.micro.request"]  # the same module under both names
