"""What the tests of INSANE's primitives share: C programs compiled as `insane-nats config` says, and their configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "insane"
SECONDS = 60
WARNINGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


def config_words(*options: str) -> list[str]:
    """What `insane-nats config` prints."""
    command = [sys.executable, "-m", "insane_nats", "config", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def build(source: Path, target: Path) -> Path:
    """Compiles and links a program that uses nsn/nsn.h; AssertionError with the compiler's words."""
    compiler = [os.environ.get("CC", "gcc"), *WARNINGS]
    command = [*compiler, str(source), "-o", str(target), *config_words("--cflags", "--libs"), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return target


def build_text(text: str, folder: Path, name: str = "program") -> Path:
    source = folder / f"{name}.c"
    source.write_text(text)
    return build(source, folder / name)


def configure(folder: Path, port: int, more: str = "") -> None:
    """Writes the folder's nsn-app.cfg."""
    (folder / "nsn-app.cfg").write_text(f"[app]\nl4_port = {port}\n{more}")


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = SECONDS) -> str:
    """Its output, when it ended well and without complaint."""
    try:
        output, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, complaints = process.communicate()
        raise AssertionError(f"{process.args!r} did not end: {output}{complaints}") from None
    assert (process.returncode, complaints) == (0, ""), f"{process.args!r}: {process.returncode} {output}{complaints}"
    return output


def run(command: list[str], folder: Path) -> str:
    return finish(start(command, folder))
