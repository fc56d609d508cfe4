"""Writes the C source of the extension module insane_nats._nsn: `python nsn_build.py OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cdef import declarations, struct, write


def main(output: str) -> None:
    """All of nsn_session.h with the counters that a session can copy, and of nsn_insane.h with the structs of nsn/nsn.h."""
    session = struct("nsn_slots.h", "nsn_counters") + declarations("nsn_session.h")
    insane = struct("nsn/nsn.h", "nsn_buffer") + struct("nsn/nsn.h", "nsn_options") + declarations("nsn_insane.h")
    write("insane_nats._nsn", session + insane, ["nsn_session.h", "nsn_slots.h", "nsn/nsn.h", "nsn_insane.h"], output)


if __name__ == "__main__":
    main(sys.argv[1])
