"""nats.errors, and the errors of the shim."""

from nats.errors import *  # noqa: F403

from insane_nats.shim.errors import *  # noqa: F403
