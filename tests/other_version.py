"""insane_nats and nsnd of another protocol version: this tree, copied, with the number changed, built and installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.servers import ROOT

PARTS = ("insane_nats", "shim", "nsnd", "tools", "meson.build", "pyproject.toml", "README.md", "LICENSE")
CONSTANTS = {
    "shim/libnsn/nsn_protocol.h": ("#define NSN_PROTOCOL_VERSION 1 ", "#define NSN_PROTOCOL_VERSION {} "),
    "nsnd/protocol.py": ("\nVERSION_MAX = 1\n", "\nVERSION_MAX = {}\n"),
}


@dataclass(frozen=True)
class OtherVersion:
    """Where it is installed."""

    site: Path

    @property
    def environment(self) -> dict[str, str]:
        """For a program that is to use it, and finds the tests where they are."""
        return {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}"}

    @property
    def command(self) -> list[str]:
        """What such a program is run by."""
        return ["env", *(f"{name}={value}" for name, value in self.environment.items())]


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "DESTDIR": str(folder / "installed")}
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def build(version: int, folder: Path) -> OtherVersion:
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    for name, (old, new) in CONSTANTS.items():
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name} does not say {old!r} once"
        (folder / name).write_text(text.replace(old, new.format(version)))
    _run(["meson", "setup", "build", "--buildtype=plain", "-Dc_args=-O0", "-Db_ndebug=false"], folder)
    _run(["meson", "install", "-C", "build"], folder)
    packages = list((folder / "installed").rglob("nsnd/protocol.py"))
    assert len(packages) == 1
    return OtherVersion(packages[0].parents[1])
