"""Builds the C benchmarks beside this file with libnsn's sources, and runs them one after another, or those named."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBNSN = FOLDER.parents[1] / "shim" / "libnsn"
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE=", "-O3", "-flto=auto", "-Wall", "-Wextra", "-I", str(LIBNSN))
JOBS = 2


def compile_c(arguments: list[str]) -> None:
    """Ends this program with the compiler's words when it fails."""
    if subprocess.run([os.environ.get("CC", "gcc"), *FLAGS, *arguments], stdin=subprocess.DEVNULL).returncode:
        raise SystemExit("benchmarks.c: does not compile, see above")


def build(names: list[str], folder: Path) -> list[Path]:
    """Compiles libnsn as it is installed (optimised, assertions on) and each benchmark with it."""
    sources = sorted(LIBNSN.glob("*.c"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(compile_c, [["-c", str(a), "-o", str(b)] for a, b in zip(sources, objects, strict=True)]))
    binaries = [folder / name for name in names]
    for name, binary in zip(names, binaries, strict=True):
        compile_c([str(FOLDER / f"{name}.c"), *map(str, objects), "-lpthread", "-lm", "-o", str(binary)])
    return binaries


def main() -> int:
    """Returns 1 when one of them fails."""
    known = sorted(path.stem for path in FOLDER.glob("*.c"))
    names = sys.argv[1:] or known
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"benchmarks.c: no {', '.join(unknown)}. There are {', '.join(known)}")
    failed = False
    with tempfile.TemporaryDirectory(prefix="insane_nats-bench-c-") as temporary:
        for binary in build(names, Path(temporary)):
            print(f"== {binary.name}", flush=True)
            failed |= subprocess.run([str(binary)], cwd=temporary, stdin=subprocess.DEVNULL).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
