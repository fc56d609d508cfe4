"""nats.js.client, under this package's name."""

import sys

from nats.js.client import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.js.client"]  # the same module under both names
