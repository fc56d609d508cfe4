"""Checks the Promela models in tests/models with SPIN: each holds in every interleaving, and no longer does when any one of
its ingredients is taken out, which are the names that it asks for by #ifdef or #ifndef."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("libnsn, which the models are of, is for Linux", allow_module_level=True)

MODELS = Path(__file__).resolve().parent / "models"
MEMORY_MB = 500
DEPTH = 20_000  # steps
SECONDS = 60  # for one search; they take a few at most
TRACE_LINES = 60
INGREDIENT = re.compile(r"^#ifn?def (\w+)$", re.MULTILINE)
COUNTEREXAMPLES = re.compile(r"assertion violated \(|invalid end state")


@dataclass(frozen=True)
class Search:
    """What the verifier said. complete: it looked at everything; trace: the steps to the error it found."""

    said: str
    errors: int
    complete: bool
    trace: str


def models() -> list[str]:
    return sorted(path.stem for path in MODELS.glob("*.pml") if path.stem != "tso")


def ingredients(model: str) -> list[str]:
    return sorted(set(INGREDIENT.findall((MODELS / f"{model}.pml").read_text())))


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def search(model: str, without: str | None, folder: Path) -> Search:
    """Looks through all states of the model, until an error."""
    defines = [f"-D{without}"] if without else []
    for path in MODELS.glob("*.pml"):
        shutil.copy(path, folder)
    run(["spin", *defines, "-a", f"{model}.pml"], folder)
    optimise = "-O0" if without else "-O1"  # a search that ends at its first error is shorter than the compiler's work
    run([os.environ.get("CC", "gcc"), "-w", optimise, "-DSAFETY", f"-DMEMLIM={MEMORY_MB}", "-o", "pan", "pan.c"], folder)
    said = run(["./pan", f"-m{DEPTH}"], folder)
    errors = re.search(r"errors: (\d+)", said)
    assert errors, said
    complete = "Search not completed" not in said and "max search depth too small" not in said
    trace = run(["spin", *defines, "-p", "-g", "-t", f"{model}.pml"], folder) if int(errors[1]) else ""
    return Search(said, int(errors[1]), complete, "\n".join(trace.splitlines()[-TRACE_LINES:]))


@pytest.fixture(scope="module", autouse=True)
def spin() -> None:
    """`make` installs SPIN where it installs packages; elsewhere its absence is no error of this tree."""
    if shutil.which("spin"):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        pytest.fail("the model checker SPIN is missing: apt-get install spin", pytrace=False)
    pytest.skip("the model checker SPIN is missing. On Debian or Ubuntu: sudo apt-get install spin")


@pytest.mark.parametrize("model", models())
def test_model_holds(model: str, tmp_path: Path) -> None:
    """In every interleaving."""
    found = search(model, None, tmp_path)
    assert found.errors == 0, f"{found.said}\n{found.trace}"
    assert found.complete, found.said


@pytest.mark.parametrize(("model", "without"), [(model, name) for model in models() for name in ingredients(model)])
def test_each_ingredient_is_needed(model: str, without: str, tmp_path: Path) -> None:
    """Without it there is an interleaving in which the model does not hold."""
    found = search(model, without, tmp_path)
    assert found.errors, f"{model} holds without it:\n{found.said}"
    assert COUNTEREXAMPLES.search(found.said), f"another error than the one that it is there for:\n{found.said}\n{found.trace}"
