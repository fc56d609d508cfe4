"""nats.js.object_store, under this package's name."""

import sys

from nats.js.object_store import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.js.object_store"]  # the same module under both names
