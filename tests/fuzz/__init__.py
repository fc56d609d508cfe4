"""Coverage-guided fuzzing of what reads other processes' words, with libFuzzer: builds the targets fuzz_*.c and runs them.

    python -m tests.fuzz [--seconds N] [TARGET …]      all targets, N seconds each
    python -m tests.fuzz --replay FILE TARGET          one input again
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LIBNSN = ROOT / "shim" / "libnsn"
RELAY = ROOT / "nsnd" / "relay"  # a target is compiled with nsn_relay*.c inside it
BUILD = ROOT / "build" / "fuzz"
CORPUS = HERE / "corpus"  # small, in the tree; what is found on the way is kept in BUILD
CLANG = os.environ.get("CLANG", "clang")
JOBS = 2
INPUT_MAX = 1024  # bytes
INPUT_S = 20  # an input that takes longer is a loop
MEMORY_MB = 2048
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE=", "-gline-tables-only", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-omit-frame-pointer",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-I", str(LIBNSN), "-I", str(HERE))
MISSING = "{clang} cannot build with libFuzzer. On Debian or Ubuntu: apt-get install clang libclang-rt-dev\n{said}"


class FuzzError(Exception):
    """A target cannot be built. The text says why."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run. `artifact` is the input that failed; `said` the end of what the target wrote."""

    good: bool
    said: str
    artifact: Path | None = None


def targets() -> list[str]:
    """All there are, by name."""
    return sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.c"))


def _compile(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run([CLANG, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise FuzzError(MISSING.format(clang=CLANG, said=error)) from error
    if done.returncode:
        raise FuzzError(done.stderr)


def _check_compiler() -> None:
    """Says what to install, where libFuzzer is not there."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "nothing.c"
        source.write_text("int LLVMFuzzerTestOneInput(const unsigned char *data, unsigned long size)\n"
                          "{ (void)data, (void)size; return 0; }\n")
        try:
            _compile(["-fsanitize=fuzzer,address,undefined", str(source), "-o", str(Path(folder) / "nothing")])
        except FuzzError as error:
            raise FuzzError(MISSING.format(clang=CLANG, said=error)) from error


def _is_older(made: Path, sources: Sequence[Path]) -> bool:
    return not made.exists() or any(source.stat().st_mtime > made.stat().st_mtime for source in sources)


def build() -> None:
    """Everything that changed since the last time. FuzzError when it cannot be done."""
    BUILD.mkdir(parents=True, exist_ok=True)
    headers = [*LIBNSN.glob("*.h"), *RELAY.glob("*.h"), *RELAY.glob("nsn_relay*.c"), HERE / "fuzz.h"]
    sources = sorted(path for path in LIBNSN.glob("nsn_*.c") if not path.stem.startswith("nsn_insane"))
    sources += [RELAY / "nsn_permissions.c", RELAY / "nsn_replies.c"]
    objects = [BUILD / f"{source.stem}.o" for source in sources]
    due = [(source, made) for source, made in zip(sources, objects, strict=True) if _is_older(made, [source, *headers])]
    programs = [(HERE / f"fuzz_{name}.c", BUILD / f"fuzz_{name}") for name in targets()]
    if due or any(_is_older(made, [source, *objects, *headers]) for source, made in programs):
        _check_compiler()
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda one: _compile([*FLAGS, "-fsanitize=fuzzer-no-link", "-c", str(one[0]), "-o", str(one[1])]), due))
        changed = [one for one in programs if _is_older(one[1], [one[0], *objects, *headers])]
        list(pool.map(lambda one: _compile([*FLAGS, "-fsanitize=fuzzer", str(one[0]), *map(str, objects), "-lpthread", "-o",
                                            str(one[1])]), changed))


def _run(target: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    folder = tempfile.mkdtemp(prefix="nsn-fuzz-", dir="/dev/shm")
    environment = {**os.environ, "NSN_FUZZ_DIRECTORY": folder}
    try:
        return subprocess.run([str(BUILD / f"fuzz_{target}"), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", env=environment)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(target: str, seconds: int) -> Outcome:
    """Runs a target that is built, from the corpus on, for so long or until an input fails."""
    kept, artifacts = BUILD / "corpus" / target, BUILD / "artifacts"
    for folder in (kept, artifacts):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(artifacts.iterdir())
    done = _run(target, [f"-max_total_time={seconds}", f"-max_len={INPUT_MAX}", "-len_control=0", f"-timeout={INPUT_S}",
                         f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1", f"-artifact_prefix={artifacts}/{target}-",
                         str(kept), str(CORPUS / target)])
    found = sorted(set(artifacts.iterdir()) - before)
    return Outcome(done.returncode == 0, "\n".join(done.stdout.splitlines()[-60:]), found[0] if found else None)


def replay(target: str, file: Path) -> Outcome:
    """One input again."""
    done = _run(target, [f"-timeout={INPUT_S}", str(file)])
    return Outcome(done.returncode == 0, done.stdout, None if done.returncode == 0 else file)
