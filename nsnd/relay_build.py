"""Writes the C source of the extension module nsnd._relay: `python relay_build.py OUTPUT`.

It has the relay of clients with permissions (relay/), compiled into it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.cdef import declarations, write

RELAY = Path(__file__).resolve().parent / "relay"


def main(output: str) -> None:
    """What Python needs of it."""
    headers = ["nsn_permissions.h", "nsn_replies.h", "nsn_relays.h", "nsn_relay.h"]
    write("nsnd._relay", "".join(declarations(str(RELAY / header)) for header in headers), headers, output)


if __name__ == "__main__":
    main(sys.argv[1])
