"""The command `nsnd`: --autostart on its quick way, everything else through click."""

from __future__ import annotations

import sys


def main() -> None:
    if why := _cannot_run():
        sys.exit(f"nsnd: {why}. Programs use plain NATS here: start a nats-server for them")
    arguments = sys.argv[1:]
    if "--autostart" in arguments and "--help" not in arguments:
        from nsnd.autostart import main as autostart

        sys.exit(autostart(arguments))
    from nsnd.command import nsnd

    nsnd(prog_name="nsnd")


def _cannot_run() -> str | None:
    """Why there can be no node here, in words for a user."""
    if not sys.platform.startswith("linux"):
        return f"shared memory between programs needs Linux, and this is {sys.platform}"
    try:
        import nsnd._fabric  # noqa: F401
    except ImportError as error:
        return f"its compiled part is not installed ({error})"
    return None


if __name__ == "__main__":
    main()
