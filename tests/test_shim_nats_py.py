"""The look at the installed nats-py: silent over the tested one, and what it says over another."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from insane_nats.shim import nats_py
from tools.servers import ROOT


def imports(preparation: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Imports insane_nats in a process of its own, after a preparation."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(preparation) + "\nimport insane_nats\nprint('imported')\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_installed_nats_py_is_as_relied_on() -> None:
    assert list(nats_py.differences()) == []
    assert nats_py.version_of(metadata.version("nats-py")) == nats_py.TESTED


def test_the_tested_version_is_imported_without_a_word(tmp_path: Path) -> None:
    done = imports("", tmp_path)
    assert (done.stdout, done.stderr) == ("imported\n", "")


def test_without_its_metadata_its_version_is_not_judged(tmp_path: Path) -> None:
    missing = "def version(name): raise metadata.PackageNotFoundError(name)"
    done = imports(f"from importlib import metadata\n{missing}\nmetadata.version = version", tmp_path)
    assert (done.stdout, done.stderr) == ("imported\n", "")


def test_another_version_that_has_everything_is_named(tmp_path: Path) -> None:
    done = imports("from importlib import metadata; metadata.version = lambda name: '2.17.3'", tmp_path)
    assert done.stdout == "imported\n"
    assert len(done.stderr.splitlines()) == 1
    assert "nats-py 2.17.3 is installed" in done.stderr
    assert nats_py.WAY_OUT in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("del Client._send_ping", "nats.aio.client.Client._send_ping is missing"),
        (
            "Client._close = lambda self, status, reason, do_cbs=True: None",
            "nats.aio.client.Client._close takes (self status reason do_cbs), not (self status do_cbs)",
        ),
        (
            "made = Client.__init__\ndef init(self):\n    made(self)\n    del self._resp_map\nClient.__init__ = init",
            "Client has no _resp_map",
        ),
        (
            "made = Subscription.__init__\nfrom functools import wraps\n@wraps(made)\ndef init(self, *arguments):\n"
            "    made(self, *arguments)\n    self._novelty = 1\nSubscription.__init__ = init",
            "Subscription has _novelty, which is new",
        ),
    ],
    ids=["method", "parameters", "attribute", "new attribute"],
)
def test_what_differs_is_named_in_one_warning(tmp_path: Path, change: str, words: str) -> None:
    done = imports(f"from nats.aio.client import Client, Subscription\n{change}", tmp_path)
    assert done.stdout == "imported\n", done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert metadata.version("nats-py") in done.stderr
    assert nats_py.WAY_OUT in done.stderr


def test_without_a_name_that_is_imported_the_error_says_what_to_install(tmp_path: Path) -> None:
    done = imports("import nats.aio.client; del nats.aio.client._validate_queue", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: insane_nats cannot work with nats-py")
    assert "nats.aio.client._validate_queue" in done.stderr
    assert nats_py.WAY_OUT in done.stderr
