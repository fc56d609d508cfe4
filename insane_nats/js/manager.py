"""nats.js.manager, under this package's name."""

import sys

from nats.js.manager import *  # noqa: F403

sys.modules[__name__] = sys.modules["nats.js.manager"]  # the same module under both names
