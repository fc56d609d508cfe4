"""Prints the Python files of the package folder FOLDER that are installed, one a line: `python list_sources.py FOLDER`.

Builders (*_build.py) only run at build time, and insane_nats/shim only stands for the folder shim, which lists itself.
"""

from __future__ import annotations

import os
import sys

SUFFIXES = (".py", ".pyi", ".typed")


def sources(top: str) -> list[str]:
    """Paths relative to top, sorted."""
    found = []
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name != "shim"]
        for name in names:
            if name.endswith(SUFFIXES) and not name.endswith("_build.py"):
                found.append(os.path.relpath(os.path.join(folder, name), top))
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(sources(sys.argv[1])))
