# The extension module made by shim/nsn_build.py: nsn_session.h as cffi gives it.
from typing import Any

import cffi

ffi: cffi.FFI
lib: Any
