"""nats.micro.service, under this package's name."""

import sys

from nats.micro.service import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.micro.service"]  # the same module under both names
