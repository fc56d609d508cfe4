"""nats.js.api, under this package's name."""

import sys

from nats.js.api import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.js.api"]  # the same module under both names
