# The extension module made by nsnd/relay_build.py: relay/nsn_permissions.h and relay/nsn_relay.h as cffi gives them.
from typing import Any

import cffi

ffi: cffi.FFI
lib: Any
