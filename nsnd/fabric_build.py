"""Writes the C source of the extension module nsnd._fabric: `python fabric_build.py OUTPUT`.

It has the table of sessions and the log's writer (nsn_slots.h, nsn_log.h, nsn_serve.h), and every struct and number of the
control protocol: ffi.sizeof("struct nsn_hello"), lib.NSN_HELLO. Subscriptions are visited through lib.nsn_visit_python.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cdef import declarations, struct, write

VISIT = """
extern "Python" int nsn_visit_python(void *context, struct nsn_target target, const char *pattern, size_t pattern_length,
                                     const char *queue, size_t queue_length);
"""


def main(output: str) -> None:
    """nsn_slots.h, nsn_log.h, nsn_protocol.h, and what of nsn_route.h they need."""
    target = struct("nsn_route.h", "nsn_target")
    cdef = "typedef int32_t pid_t;" + declarations("nsn_slots.h") + target + declarations("nsn_log.h")
    cdef += declarations("nsn_serve.h")
    cdef += declarations("nsn_protocol.h") + VISIT
    write("nsnd._fabric", cdef, ["nsn_slots.h", "nsn_log.h", "nsn_protocol.h", "nsn_serve.h"], output)


if __name__ == "__main__":
    main(sys.argv[1])
