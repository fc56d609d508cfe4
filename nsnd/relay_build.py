"""Writes the C source of the extension module nsnd._relay: `python relay_build.py OUTPUT`.

It has the relay of clients with permissions (relay/nsn_relay.h, relay/nsn_permissions.h), compiled into it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cdef import declarations, write

RELAY = Path(__file__).resolve().parent / "relay"


def main(output: str) -> None:
    """Both headers."""
    cdef = declarations(str(RELAY / "nsn_permissions.h")) + declarations(str(RELAY / "nsn_relay.h"))
    write("nsnd._relay", cdef, ["nsn_permissions.h", "nsn_relay.h"], output)


if __name__ == "__main__":
    main(sys.argv[1])
