"""`insane-nats run`: what it starts, and that the program is what it would be if it had been started directly."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from insane_nats.run import INJECTED, Program, RunError, environment, resolve

ROOT = Path(__file__).parent.parent


def launch(*arguments: str | Path, cwd: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd or ROOT, **(capture() | options))  # type: ignore[call-overload, no-any-return]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "insane_nats", "run", *map(str, arguments)]


def capture() -> dict[str, object]:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return {"capture_output": True, "text": True, "timeout": 60, "env": environ}


def script(path: Path, text: str, *, executable: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


SHOW = "import sys\nprint(__name__, sys.argv, sys.path[0])\n"


def test_a_script_sees_its_own_arguments_and_path(tmp_path: Path) -> None:
    show = script(tmp_path / "show.py", SHOW)
    result = launch(show, "-m", "--help", "--", "-x")
    assert result.stdout.strip() == f"__main__ {[str(show), '-m', '--help', '--', '-x']} {tmp_path}"
    assert result.stderr == ""


def test_a_module_sees_its_own_arguments(tmp_path: Path) -> None:
    show = script(tmp_path / "package" / "show.py", SHOW)
    result = launch("-m", "package.show", "--help", "-m", "x", cwd=tmp_path)
    assert result.stdout.strip() == f"__main__ {[str(show), '--help', '-m', 'x']} {tmp_path}", result.stderr


def test_a_command_on_path_is_run_as_it_is(tmp_path: Path) -> None:
    show = script(tmp_path / "show-it", f"#!{sys.executable}\n{SHOW}", executable=True)
    environ = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = launch("show-it", "--version", env=environ)
    assert result.stdout.strip() == f"__main__ {[str(show), '--version']} {tmp_path}", result.stderr


@pytest.mark.parametrize("form", ["script", "module", "command", "child", "shell"])
def test_import_nats_gives_insane_nats(tmp_path: Path, form: str) -> None:
    text = "import nats, insane_nats\nprint(nats.connect is insane_nats.connect, nats.NATS is insane_nats.NATS)\n"
    path = script(tmp_path / "ask.py", f"#!{sys.executable}\n{text}", executable=True)
    forms: dict[str, tuple[str, ...]] = {
        "script": (str(path),),
        "module": ("-m", "ask"),
        "command": (str(script(tmp_path / "ask-it", path.read_text(), executable=True)),),
        "child": (sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, {str(path)!r}])"),
        "shell": ("sh", "-c", shlex.join([sys.executable, str(path)])),
    }
    result = launch(*forms[form], cwd=tmp_path)
    assert result.stdout.strip() == "True True", result.stderr


def test_exit_status_and_standard_input_are_the_programs(tmp_path: Path) -> None:
    copy = script(tmp_path / "copy.py", "import sys\nprint(sys.stdin.read())\nraise SystemExit(7)\n")
    result = launch(copy, input="through")
    assert (result.stdout.strip(), result.returncode) == ("through", 7)


def test_the_program_is_the_same_process_and_gets_the_signals(tmp_path: Path) -> None:
    waiting = script(tmp_path / "wait.py", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command(waiting), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


def test_a_broken_pipe_ends_a_program_that_is_no_python() -> None:
    result = launch("sh", "-c", "kill -PIPE $$; echo still here")
    assert (result.returncode, result.stdout) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("no-such-command",), 127, "no command 'no-such-command' on PATH"),
        (("nowhere/app.py",), 127, "no such script: nowhere/app.py"),
        (("./nowhere",), 127, "no such file: ./nowhere"),
        (("-m",), 2, "needs the name of a module"),
        (("-u", "app.py"), 2, "insane-nats run python -u …"),
    ],
)
def test_what_cannot_be_started_says_why(arguments: tuple[str, ...], status: int, words: str) -> None:
    result = launch(*arguments)
    assert result.returncode == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("line", ["#!/usr/bin/python3 -I", "#!/usr/bin/env -S python3 -sE", "#!/opt/python3.12 -X dev -S"])
def test_an_interpreter_that_ignores_the_environment_is_refused(tmp_path: Path, line: str) -> None:
    path = script(tmp_path / "isolated", f"{line}\nprint('ran')\n", executable=True)
    with pytest.raises(RunError, match="ignores PYTHONPATH") as refused:
        resolve([str(path)])
    assert refused.value.status == 126


@pytest.mark.parametrize(
    "line", ["#!/usr/bin/python3", "#!/usr/bin/python3 -sP", "#!/usr/bin/env -S python3 -W Error", "#!/bin/sh -E"]
)
def test_other_options_of_an_interpreter_are_fine(tmp_path: Path, line: str) -> None:
    path = script(tmp_path / "app", f"{line}\n", executable=True)
    assert resolve([str(path), "-I"]) == Program(str(path), (str(path), "-I"))


def test_python_itself_is_refused_with_options_that_ignore_the_environment() -> None:
    with pytest.raises(RunError, match="-I"):
        resolve([sys.executable, "-I", "app.py"])
    assert resolve([sys.executable, "-u", "app.py", "-I"]).executable == sys.executable
    assert resolve([sys.executable, "-c", "pass", "-I"]).executable == sys.executable


def test_a_file_without_permission_to_execute_is_a_python_script(tmp_path: Path) -> None:
    path = script(tmp_path / "app", "print('ran')\n")
    assert resolve([str(path), "x"]) == Program(sys.executable, (sys.executable, str(path), "x"))


def test_the_environments_scripts_are_found_without_activation(tmp_path: Path) -> None:
    scripts = os.path.dirname(sys.executable)
    assert resolve(["pytest"], search_path=str(tmp_path)).executable == os.path.join(scripts, "pytest")


def test_a_search_path_that_was_there_is_kept() -> None:
    injected = str(INJECTED)
    assert environment({})["PYTHONPATH"] == injected
    assert environment({"PYTHONPATH": "/a::/b"})["PYTHONPATH"] == f"{injected}:/a::/b"
    again = environment(environment({"PYTHONPATH": "/a"}))
    assert (again["PYTHONPATH"], again["INSANE_NATS_RUN"]) == (f"{injected}:/a", sys.prefix)
