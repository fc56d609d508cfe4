"""Runs the C unit tests, tests/c/test_*.c: plain, under AddressSanitizer and UndefinedBehaviourSanitizer, and those that
have several threads or processes at one memory under ThreadSanitizer; and one that dies behind every store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("libnsn is for Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
LIBNSN = ROOT / "shim" / "libnsn"
PROGRAMS = sorted(path.stem for path in (ROOT / "tests" / "c").glob("test_*.c"))
THREADED = ("test_faults", "test_insane", "test_link", "test_log", "test_wake", "test_session", "test_users")
STORES = ("test_death",)  # in that mode alone
JOBS = 2
SECONDS = 300

FLAGS = ("-std=gnu11", "-D_GNU_SOURCE=", "-g", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer", "-I", str(LIBNSN))
MODES = {
    "plain": ("-O2",),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    # GCC warns that ThreadSanitizer does not see fences; the fences here order a store before a load, which it need not.
    "thread": ("-O1", "-fsanitize=thread", "-Wno-tsan"),
    # A program can end its process behind any store to shared memory.
    "stores": ("-O1", "-DNSN_DEBUG_STORES"),
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


@dataclass(frozen=True)
class Library:
    """libnsn compiled in one mode: its archive, or what the compiler said."""

    archive: Path
    error: str


def compile_c(arguments: list[str]) -> str:
    """Runs the compiler; returns what it said when it failed, else an empty string."""
    command = [os.environ.get("CC", "gcc"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stderr if done.returncode else ""


def build_library(mode: str, folder: Path) -> Library:
    """All of libnsn's sources, at most two at once."""
    sources = sorted(LIBNSN.glob("*.c"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [*FLAGS, *MODES[mode], "-c", str(source), "-o", str(target)] for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(JOBS) as pool:
        errors = "".join(pool.map(compile_c, commands))
    archive = folder / "libnsn.a"
    if not errors:
        subprocess.run(["ar", "rcs", str(archive), *map(str, objects)], check=True)
    return Library(archive, errors)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Library]:
    """library(mode): libnsn in that mode, compiled once a run."""
    made: dict[str, Library] = {}

    def get(mode: str) -> Library:
        if mode not in made:
            made[mode] = build_library(mode, tmp_path_factory.mktemp(f"libnsn-{mode}"))
        return made[mode]

    return get


def runner(mode: str) -> list[str]:
    """ThreadSanitizer's map of addresses has no place for what the widest address randomisation does."""
    return ["setarch", "-R"] if mode == "thread" and shutil.which("setarch") else []


CASES = [
    (program, mode)
    for program in PROGRAMS
    for mode in MODES
    if (mode == "stores") == (program in STORES) and (mode != "thread" or program in THREADED)
]


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize(("program", "mode"), CASES)
def test_c(program: str, mode: str, library: Callable[[str], Library], tmp_path: Path) -> None:
    """The program compiles without a warning, and all its tests pass without a sanitizer's report."""
    built = library(mode)
    assert not built.error, built.error
    binary = tmp_path / program
    source = ROOT / "tests" / "c" / f"{program}.c"
    error = compile_c([*FLAGS, *MODES[mode], str(source), str(built.archive), "-lpthread", "-lm", "-o", str(binary)])
    assert not error, error
    done = subprocess.run(
        [*runner(mode), str(binary)],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{program} ({mode}) ended with {done.returncode}\n{done.stdout}{done.stderr}"
