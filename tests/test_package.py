"""The installed package: what is in it, and that it works away from the source tree."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.cdef import declarations, struct
from tools.list_sources import sources
from tools.servers import ROOT, command_path

FOLDERS = {"insane_nats": ROOT / "insane_nats", "insane_nats/shim": ROOT / "shim", "nsnd": ROOT / "nsnd"}


def installed_files() -> list[str]:
    files = importlib.metadata.files("insane_nats")
    assert files is not None, "insane_nats is not installed: make install"
    return [str(path) for path in files]


def is_editable() -> bool:
    return any("editable" in path for path in installed_files())


def outside(command: list[str], folder: Path) -> str:
    """Runs the command in a folder outside the tree; what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(is_editable(), reason="an editable install has no copies")
def test_top_level_has_two_packages_and_nothing_else() -> None:
    top = {path.split("/")[0] for path in installed_files() if not path.startswith("..")}
    assert {name for name in top if not name.endswith(".dist-info")} == {"insane_nats", "nsnd"}


@pytest.mark.skipif(is_editable(), reason="an editable install has no copies")
def test_every_python_file_of_the_tree_is_installed() -> None:
    wanted = {f"{package}/{name}" for package, folder in FOLDERS.items() for name in sources(str(folder))}
    assert wanted <= set(installed_files())


def test_commands_start_outside_the_tree(tmp_path: Path) -> None:
    assert "0.1.0" in outside([command_path("insane-nats"), "--version"], tmp_path)
    assert "--socket" in outside([command_path("nsnd"), "--help"], tmp_path)


@pytest.mark.skipif(is_editable(), reason="an editable install is the tree")
def test_compiled_modules_find_libnsn_outside_the_tree(tmp_path: Path) -> None:
    program = (
        "import insane_nats, nsnd, insane_nats._nsn, nsnd._fabric as fabric\n"
        "print(insane_nats.__file__, nsnd.__file__, fabric.ffi.sizeof('struct nsn_page'))"
    )
    words = outside([sys.executable, "-c", program], tmp_path).split()
    assert words[2] == "4096"
    assert not {str(ROOT / "insane_nats" / "__init__.py"), str(ROOT / "nsnd" / "__init__.py")} & set(words)


def test_the_tree_is_used_from_its_root() -> None:
    program = "import insane_nats, nsnd, insane_nats._nsn; print(insane_nats.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True)
    assert Path(done.stdout.strip()) == ROOT / "insane_nats" / "__init__.py"


def test_inline_functions_and_guards_are_left_out_of_declarations() -> None:
    text = declarations("nsn_log.h")
    assert "static inline" not in text
    assert "nsn_log_reader_behind" not in text
    assert "#define NSN_LOG_H\n" not in text
    assert "#define NSN_LOG_HEADER_SIZE 64\n" in text
    assert "int nsn_log_reader_replay(" in text
    assert "#define NSN_LINK_LIMIT ...\n" in declarations("nsn_link.h")


def test_a_struct_inside_another_is_found() -> None:
    assert "uint64_t backlog_bytes;" in struct("nsn_slots.h", "nsn_counters")
    with pytest.raises(SystemExit, match="declares no struct nothing"):
        struct("nsn_slots.h", "nothing")


def test_every_c_file_of_libnsn_is_in_its_library() -> None:
    listed = (ROOT / "shim" / "libnsn" / "meson.build").read_text()
    assert not [path.name for path in (ROOT / "shim" / "libnsn").glob("*.c") if f"'{path.name}'" not in listed]
