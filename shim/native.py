"""The compiled parts, where there are any: on Linux, in an install that was built with them. ffi and lib are the binding to
libnsn, fast is the hot path."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

ffi: Any = None
lib: Any = None
missing: str | None = None  # why there are none, in words for a user; None when there are

if sys.platform.startswith("linux"):
    try:
        from insane_nats import _fast, _nsn

        ffi, lib = _nsn.ffi, _nsn.lib
    except ImportError as error:
        missing = f"its compiled part is not installed ({error})"
else:
    missing = f"shared memory between programs needs Linux, and this is {sys.platform}"

if TYPE_CHECKING or missing is None:
    fast = _fast
else:
    from insane_nats.shim import no_fast as fast  # noqa: F401  (it is what other modules import from here)
