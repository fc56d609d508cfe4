"""nats.js.kv, under this package's name."""

import sys

from nats.js.kv import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.js.kv"]  # the same module under both names
