"""`make lint`: ruff, mypy --strict, and C warnings as errors. All of them run; exit code 1 when one failed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("insane_nats", "nsnd", "benchmarks", "examples", "compat_tests", "tests", "tools")
C_FOLDERS = ("shim/libnsn", "shim/fast", "nsnd/relay", "tests/c", "tests/fuzz", "tests/mutants", "tests/insane_style",
             "benchmarks/c", "examples/insane", "tests/models", "shim/libnsn/nsn")
C_FLAGS = ("-std=gnu11", "-D_GNU_SOURCE=", "-O2", "-Wall", "-Wextra", "-Werror", "-I", "shim/libnsn", "-I", "tests/c",
           "-isystem", sysconfig.get_path("include"), "-DPy_LIMITED_API=0x030B0000")


LINE_MAX = 128


def run(title: str, command: list[str]) -> bool:
    """Runs the command at the repository's root; True when it ended well."""
    print(f"== {title}", flush=True)
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0


def files(pattern: str) -> list[str]:
    """Those of the folders with C, relative to the repository's root."""
    return sorted(str(path.relative_to(ROOT)) for folder in C_FOLDERS for path in (ROOT / folder).glob(pattern))


def are_short(sources: list[str]) -> bool:
    """No line is longer than Python's may be; says which ones are."""
    print(f"== lines of up to {LINE_MAX} characters", flush=True)
    long = [f"{source}:{number}: {len(line)} characters" for source in sources
            for number, line in enumerate((ROOT / source).read_text("utf-8").splitlines(), 1) if len(line) > LINE_MAX]
    print("".join(f"{line}\n" for line in long), end="", flush=True)
    return not long


def package_view() -> Path:
    """A folder of links in which insane_nats.shim is where mypy looks for it: within insane_nats, as it is installed."""
    view = ROOT / "build" / "lint"
    shutil.rmtree(view, ignore_errors=True)
    (view / "insane_nats").mkdir(parents=True)
    for entry in [*(ROOT / "insane_nats").iterdir(), ROOT / "shim"]:
        if entry != ROOT / "insane_nats" / "shim":
            (view / "insane_nats" / entry.name).symlink_to(entry)
    return view


def main() -> int:
    """Returns 0 when nothing was found."""
    packages = [name for name in PACKAGES if any((ROOT / name).glob("**/*.py"))]
    good = run("ruff", [sys.executable, "-m", "ruff", "check", "."])
    os.environ["MYPYPATH"] = str(package_view())
    good &= run("mypy --strict", [sys.executable, "-m", "mypy", *(word for name in packages for word in ("-p", name))])
    if sys.platform == "linux":
        good &= are_short([*files("*.c"), *files("*.h"), *files("*.pml")])
        compiler = os.environ.get("CC", "gcc")
        for source in files("*.c"):
            good &= run(f"{compiler} {source}", [compiler, *C_FLAGS, "-c", "-o", os.devnull, source])
    print("lint: clean" if good else "lint: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
