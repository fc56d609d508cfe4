"""nats.js.errors, under this package's name."""

import sys

from nats.js.errors import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.js.errors"]  # the same module under both names
