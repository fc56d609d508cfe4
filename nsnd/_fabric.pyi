# The extension module made by nsnd/fabric_build.py: nsn_slots.h, nsn_log.h and nsn_protocol.h as cffi gives it.
from typing import Any

import cffi

ffi: cffi.FFI
lib: Any
