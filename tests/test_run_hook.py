"""The import hook of `insane-nats run`: what `import nats` gives in a program and its children. A stand-in plays the shim."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

INJECTED = Path(__file__).parent.parent / "insane_nats" / "_inject"

OURS = """
    from insane_nats.aio.client import Client, Client as NATS
    async def connect(*arguments, **options):
        return "ours"
"""
OUR_CLIENT = """
    from nats.aio.client import Client as TheirClient
    class Client(TheirClient):
        ours = True
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a package insane_nats: the real hook, and a client that is known by its attribute `ours`."""
    package = tmp_path / "home" / "insane_nats"
    shutil.copytree(INJECTED, package / "_inject", ignore=shutil.ignore_patterns("__pycache__"))
    write(package / "__init__.py", OURS)
    write(package / "aio" / "__init__.py", "")
    write(package / "aio" / "client.py", OUR_CLIENT)
    return package.parent


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Run:
    """Runs a program's text under the hook. path: further PYTHONPATH entries; variables: of the environment."""

    def run(text: str, *, path: tuple[Path, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script" / "program.py"
        write(script, text)
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, [home / "insane_nats" / "_inject", *path])),
            "INSANE_NATS_RUN": sys.prefix,
            **variables,
        }
        return subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=60, check=False)

    return run


def output(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.strip()


@pytest.mark.parametrize(
    "program",
    [
        "import asyncio, nats; print(nats.NATS.ours, asyncio.run(nats.connect()) == 'ours')",
        "from nats.aio.client import Client as NATS; print(NATS.ours, True)",
        "import nats.errors, nats; print(nats.NATS.ours, issubclass(nats.errors.TimeoutError, nats.errors.Error))",
        "import nats.js, nats; print(nats.NATS.ours, nats.aio.client.Client.ours)",
        "from nats.js.api import StreamConfig; import nats.micro; print(nats.NATS.ours, True)",
        "def late():\n    import nats as n\n    return n.NATS\nprint(late().ours, late() is late())",
        "import insane_nats, nats; print(nats.NATS.ours, nats.NATS is insane_nats.NATS)",
        "import insane_nats.aio.client as ours, nats; print(nats.NATS.ours, nats.aio.client.Client is ours.Client)",
    ],
)
def test_every_way_of_importing_nats_gives_the_shim(run: Run, program: str) -> None:
    assert output(run(program)) == "True True"


def test_the_shim_itself_gets_the_real_classes(run: Run) -> None:
    program = """
        import nats
        print([base.__module__ for base in nats.NATS.__mro__[:2]], isinstance(nats.NATS(), nats.aio.client.Client))
    """
    assert output(run(program)) == "['insane_nats.aio.client', 'nats.aio.client'] True"


def test_nothing_is_imported_before_the_program_asks(run: Run) -> None:
    program = """
        import sys
        print([name for name in sys.modules if name.split(".")[0] in ("nats", "insane_nats", "asyncio")])
    """
    assert output(run(program)) == "[]"


def test_modules_show_their_real_loaders(run: Run) -> None:
    program = """
        import importlib.util, inspect
        before = importlib.util.find_spec("nats")
        import nats
        print(type(nats.__loader__).__name__, type(nats.__spec__.loader).__name__, before.origin == nats.__file__)
        print("def connect" in inspect.getsource(nats))
    """
    assert output(run(program)) == "SourceFileLoader SourceFileLoader True\nTrue"


def test_reload_keeps_the_shim(run: Run) -> None:
    program = """
        import asyncio, importlib, nats
        importlib.reload(nats)
        print(nats.NATS.ours, asyncio.run(nats.connect()))
    """
    assert output(run(program)) == "True ours"


def test_threads_that_import_at_once_get_the_shim(run: Run) -> None:
    program = """
        import threading
        start, seen = threading.Barrier(8), []
        def load():
            start.wait()
            from nats import NATS
            seen.append(NATS.ours)
        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(seen == [True] * 8)
    """
    assert output(run(program)) == "True"


def test_the_search_path_is_the_programs_own(run: Run, tmp_path: Path) -> None:
    program = """
        import os, sys
        print(sys.path[0] == os.path.dirname(__file__), [entry for entry in sys.path if entry.endswith("_inject")])
        print(sys.argv == [__file__], __name__, [name for name in sys.modules if "sitecustomize" in name] == ["sitecustomize"])
    """
    assert output(run(program)) == "True []\nTrue __main__ True"


def test_the_environments_own_sitecustomize_runs(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "custom" / "sitecustomize.py", "import builtins\nbuiltins.customized = __file__\n")
    program = """
        import nats, sitecustomize
        print(nats.NATS.ours, customized == sitecustomize.__file__, sitecustomize.__spec__.name)
    """
    assert output(run(program, path=(tmp_path / "custom",))) == "True True sitecustomize"


def test_a_sitecustomize_that_fails_is_reported_and_the_hook_stays(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "custom" / "sitecustomize.py", "raise ValueError('broken customization')\n")
    result = run("import nats; print(nats.NATS.ours)", path=(tmp_path / "custom",))
    assert result.stdout.strip() == "True"
    assert "broken customization" in result.stderr


CHILDREN = {
    "subprocess": "subprocess.run([sys.executable, '-c', 'import nats; print(nats.NATS.ours)'], check=True)",
    "subprocess of a subprocess": """subprocess.run([sys.executable, '-c', "import subprocess, sys; subprocess.run("
        "[sys.executable, '-c', 'import nats; print(nats.NATS.ours)'], check=True)"], check=True)""",
    "system": "os.system(f\"{sys.executable} -c 'import nats; print(nats.NATS.ours)'\")",
    "fork": "work(multiprocessing.get_context('fork'))",
    "spawn": "work(multiprocessing.get_context('spawn'))",
    "forkserver": "work(multiprocessing.get_context('forkserver'))",
    "pool": "with concurrent.futures.ProcessPoolExecutor(1) as pool: pool.submit(show).result()",
}


@pytest.mark.parametrize("how", CHILDREN)
@pytest.mark.parametrize("imported", [False, True], ids=["first import in the child", "imported before"])
def test_children_get_the_shim(run: Run, how: str, imported: bool) -> None:
    program = f"""
import concurrent.futures, multiprocessing, os, subprocess, sys
{"import nats" if imported else ""}

def show():
    import nats
    print(nats.NATS.ours, flush=True)

def work(context):
    child = context.Process(target=show)
    child.start()
    child.join()

if __name__ == "__main__":
    {CHILDREN[how]}
"""
    assert output(run(program)) == "True"


def test_another_environment_without_insane_nats_says_so(run: Run, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "insane_nats" / "_inject", tmp_path / "elsewhere" / "_inject")
    blocker = tmp_path / "blocker" / "sitecustomize.py"
    write(blocker, "import sys\nsys.modules['insane_nats'] = None\n")
    result = run("import nats", path=(blocker.parent,), INSANE_NATS_RUN="/another/prefix")
    assert result.returncode == 1
    assert f"{sys.executable} -m pip install insane_nats" in result.stderr
    assert "INSANE_NATS_RUN=0" in result.stderr


def test_an_import_that_failed_never_gives_plain_nats(run: Run, home: Path) -> None:
    write(home / "insane_nats" / "__init__.py", "raise ImportError('no _nsn here')\n")
    program = """
        for attempt in range(2):
            try:
                import nats
            except ImportError as error:
                print("no _nsn here" in str(error))
    """
    assert output(run(program)) == "True\nTrue"


def test_another_package_of_that_name_is_left_alone(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "other" / "nats" / "__init__.py", "MOSQUITO = True\n")
    program = "import sys, nats; print(nats.MOSQUITO, 'insane_nats' in sys.modules)"
    assert output(run(program, path=(tmp_path / "other",))) == "True False"


def test_switched_off_it_is_plain_nats(run: Run) -> None:
    assert output(run("import nats; print(hasattr(nats.NATS, 'ours'))", INSANE_NATS_RUN="0")) == "False"
