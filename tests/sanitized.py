"""Extension modules under AddressSanitizer and UndefinedBehaviourSanitizer, in an interpreter that was built without them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.test_c import FLAGS, JOBS, MODES, compile_c

PRELOADED = ("libasan.so", "libubsan.so")


def preloaded() -> list[str] | None:
    """The sanitizers' libraries, which an interpreter that was built without needs first; None where they are not there."""
    compiler = os.environ.get("CC", "gcc")
    found = []
    for name in PRELOADED:
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(done.stdout.strip())
        if done.returncode or not path.is_absolute():
            return None
        found.append(str(path))
    return found


def variables() -> dict[str, str]:
    """What the environment of such an interpreter has. The test is skipped where there is no libasan."""
    libraries = preloaded()
    if libraries is None:
        pytest.skip("there is no libasan.so: gcc's libasan is not installed")
    return {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def build(sources: Path, folder: Path, target: Path, options: Sequence[str], libraries: Sequence[str]) -> None:
    """A shared object of all sources."""
    flags = [*FLAGS, *MODES["address"], "-fPIC"]
    objects = {source: folder / f"{source.stem}.o" for source in sorted(sources.glob("*.c"))}
    commands = [[*flags, *options, "-c", str(source), "-o", str(made)] for source, made in objects.items()]
    with ThreadPoolExecutor(JOBS) as pool:
        errors = "".join(pool.map(compile_c, commands))
    assert not errors, errors
    error = compile_c([*flags, "-shared", "-o", str(target), *map(str, objects.values()), *libraries])
    assert not error, error
