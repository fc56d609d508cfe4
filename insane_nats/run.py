"""`insane-nats run`: starts a Python program whose `import nats`, and that of its children, gives insane_nats.

The program takes this process's place (exec): same process ID, terminal, signals and exit status, and an argv as if it had
been started directly. What reaches it and its children is the environment: INSANE_NATS_RUN, and a directory in front of
PYTHONPATH whose sitecustomize module installs the import hook.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

INJECTED = Path(__file__).parent / "_inject"
PYTHON_SUFFIXES = (".py", ".pyw", ".pyz", ".pyc")
PYTHON_NAME = re.compile(r"(python|pypy)[0-9.]*$")
SHEBANG_LIMIT = 512  # bytes; the kernel itself reads 256


class RunError(Exception):
    """The program cannot be started; status is the exit status that a shell would give (126 or 127)."""

    def __init__(self, text: str, status: int = 127) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Program:
    """What exec gets: an executable's path and the whole argv."""

    executable: str
    argv: tuple[str, ...]


def resolve(arguments: Sequence[str], search_path: str | None = None) -> Program:
    """Decides what `run ARGUMENTS…` means: `-m module`, a script, or a command on PATH (search_path, default $PATH).

    Raises RunError when there is no such thing, or when its interpreter would not load the hook.
    """
    first, rest = arguments[0], tuple(arguments[1:])
    if first == "-m" or (first.startswith("-m") and not first.startswith("--")):
        module = (first[2:], *rest) if first != "-m" else rest
        if not module:
            raise RunError("run -m needs the name of a module: insane-nats run -m package.module", 2)
        return _python("-m", *module)
    if first.startswith("-"):
        hint = f"insane-nats run python {first} …" if first not in ("--help", "-h") else "insane-nats run --help"
        raise RunError(f"run knows no option {first}. For an option of the interpreter: {hint}", 2)
    if first.endswith(PYTHON_SUFFIXES) or os.path.isdir(first):
        if not os.path.exists(first):
            raise RunError(f"no such script: {first}")
        return _python(first, *rest)
    if os.sep in first:
        return _file(first, rest)
    return _command(first, rest, search_path)


def _python(*arguments: str) -> Program:
    if not sys.executable:
        raise RunError("this Python does not know its own executable; start the program as `insane-nats run python …`", 126)
    return Program(sys.executable, (sys.executable, *arguments))


def _file(path: str, rest: tuple[str, ...]) -> Program:
    if not os.path.isfile(path):
        raise RunError(f"no such file: {path}")
    if not os.access(path, os.X_OK):
        return _python(path, *rest)  # as `python path` would
    return _executable(path, path, rest)


def _command(name: str, rest: tuple[str, ...], search_path: str | None) -> Program:
    found = shutil.which(name, path=search_path)
    if found is not None:
        return _executable(found, name, rest)
    found = shutil.which(name, path=sysconfig.get_path("scripts"))  # of an environment that nobody has activated
    if found is not None:
        return _executable(found, found, rest)
    if os.path.isfile(name):
        return _python(name, *rest)
    raise RunError(
        f"no command {name!r} on PATH, and no script of that name here. A script is named by its path (./{name}), a module "
        f"by -m {name}"
    )


def _executable(path: str, name: str, rest: tuple[str, ...]) -> Program:
    interpreter = _shebang(path) or ([path, *rest] if PYTHON_NAME.match(os.path.basename(path)) else [])
    option = _ignores_environment(interpreter)
    if option is not None:
        raise RunError(
            f"{path} runs Python with {option}, which ignores PYTHONPATH: `import nats` would not give insane_nats. Run its "
            "module (insane-nats run -m …) or its script file with an interpreter of its environment (insane-nats run "
            "PYTHON FILE …)",
            126,
        )
    return Program(path, (name, *rest))


def _shebang(path: str) -> list[str]:
    """The words of a script's first line behind `#!`; none for other files."""
    try:
        with open(path, "rb") as file:
            line = file.readline(SHEBANG_LIMIT)
    except OSError:
        return []  # executable, but not readable: exec has the last word
    return os.fsdecode(line[2:]).split() if line.startswith(b"#!") else []


def _ignores_environment(words: Sequence[str]) -> str | None:
    """The interpreter's option that keeps PYTHONPATH or sitecustomize out (-E, -I, -S), if there is one."""
    names = [index for index, word in enumerate(words) if PYTHON_NAME.match(os.path.basename(word))]
    following = iter(words[names[0] + 1 :] if names else ())
    for word in following:
        if not word.startswith("-") or word.startswith("--") or word == "-":
            return None
        for place, letter in enumerate(word[1:], 1):
            if letter in "EIS":
                return f"-{letter}"
            if letter in "cm":
                return None
            if letter in "WX":  # with an argument: the rest of this word, or the next
                if place == len(word) - 1:
                    next(following, None)
                break
    return None


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the program: environ, and what makes its interpreters load the hook."""
    injected = str(INJECTED)
    before = environ.get("PYTHONPATH", "")
    entries = [entry for entry in before.split(os.pathsep) if entry != injected] if before else []
    return {**environ, "PYTHONPATH": os.pathsep.join([injected, *entries]), "INSANE_NATS_RUN": sys.prefix}


def execute(arguments: Sequence[str]) -> NoReturn:
    """Becomes the program. Raises RunError when it cannot be started."""
    program = resolve(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and an ignored signal would stay so in the program
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program.executable, program.argv, environment(os.environ))
    except OSError as error:
        raise RunError(f"cannot start {program.executable}: {error.strerror}", 126) from error
