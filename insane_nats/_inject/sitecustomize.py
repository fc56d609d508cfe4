"""Loaded by Python at its start, because `insane-nats run` puts this directory on PYTHONPATH: installs the import hook, then
makes way for the sitecustomize module that the environment has without us."""

import os
import sys
from importlib.machinery import PathFinder

_here = os.path.dirname(os.path.realpath(__file__))

if os.environ.get("INSANE_NATS_RUN", "0") not in ("", "0"):
    import _insane_nats_hook  # type: ignore[import-not-found]

    _insane_nats_hook.install(os.environ["INSANE_NATS_RUN"])

# The program sees the module search path that it would see without us; its children find us by PYTHONPATH again.
sys.path[:] = [entry for entry in sys.path if not entry or os.path.realpath(entry) != _here]

_spec = PathFinder.find_spec("sitecustomize", sys.path)
if _spec is not None and _spec.loader is not None:
    _own = type(sys)("sitecustomize")
    _own.__spec__ = _spec
    _own.__file__ = _spec.origin
    _own.__loader__ = _spec.loader
    sys.modules["sitecustomize"] = _own
    _spec.loader.exec_module(_own)
