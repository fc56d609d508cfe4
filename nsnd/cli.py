"""The command `nsnd`: --autostart on its quick way, everything else through click."""

from __future__ import annotations

import sys


def main() -> None:
    arguments = sys.argv[1:]
    if "--autostart" in arguments and "--help" not in arguments:
        from nsnd.autostart import main as autostart

        sys.exit(autostart(arguments))
    from nsnd.command import nsnd

    nsnd(prog_name="nsnd")


if __name__ == "__main__":
    main()
