"""The binding to libnsn, where there is one: on Linux, in an install that was built with its C parts."""

from __future__ import annotations

import sys
from typing import Any

ffi: Any = None
lib: Any = None
missing: str | None = None  # why there is no binding, in words for a user; None when there is one

if sys.platform.startswith("linux"):
    try:
        from insane_nats import _nsn

        ffi, lib = _nsn.ffi, _nsn.lib
    except ImportError as error:
        missing = f"its compiled part is not installed ({error})"
else:
    missing = f"shared memory between programs needs Linux, and this is {sys.platform}"
