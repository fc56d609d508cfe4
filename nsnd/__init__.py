"""nsnd: the sidecar of insane_nats. One node a host: who is there, what they want, and how they find each other."""

from __future__ import annotations

from pkgutil import extend_path

# The compiled module nsnd._fabric comes from the installed package, also when this file is found in a source tree.
__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"
