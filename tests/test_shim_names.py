"""The names of nats-py under insane_nats, and an install without its compiled part."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap

import nats
import pytest

import insane_nats
from tools.servers import ROOT, Server

MODULES = [
    "aio.errors",
    "aio.msg",
    "aio.subscription",
    "aio.transport",
    "js.api",
    "js.client",
    "js.errors",
    "js.kv",
    "js.manager",
    "js.object_store",
    "micro.request",
    "micro.service",
    "nuid",
    "protocol.command",
    "protocol.parser",
]


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_nats_pys_own(name: str) -> None:
    assert importlib.import_module(f"insane_nats.{name}") is importlib.import_module(f"nats.{name}")


@pytest.mark.parametrize("name", ["errors", "js", "aio.client"])
def test_packages_have_every_name_of_nats_pys(name: str) -> None:
    ours, theirs = importlib.import_module(f"insane_nats.{name}"), importlib.import_module(f"nats.{name}")
    for attribute, value in vars(theirs).items():
        if not attribute.startswith("_") and str(getattr(value, "__module__", "")).startswith("nats"):
            same = getattr(ours, attribute) is getattr(theirs, attribute)
            assert same or attribute in ("Client", "api", "client", "errors", "kv", "manager", "object_store")


def test_client_is_a_subclass_of_nats_pys() -> None:
    client = importlib.import_module("nats.aio.client").Client
    assert issubclass(insane_nats.NATS, client)
    assert insane_nats.aio.client.Client is insane_nats.NATS
    assert insane_nats.errors.NoServersError is nats.errors.NoServersError
    assert issubclass(insane_nats.errors.NoNodeError, nats.errors.NoServersError)


def test_without_the_compiled_part_it_is_plain_nats_and_says_so(nats_server: Server) -> None:
    text = """
        import asyncio, sys
        sys.modules["insane_nats._nsn"] = None
        import insane_nats
        async def main():
            nc = await insane_nats.connect(sys.argv[1])
            subscription = await nc.subscribe("a")
            await nc.publish("a", b"x")
            print((await subscription.next_msg(5)).data, nc.is_insane)
            await nc.close()
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), nats_server.url],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout == "b'x' False\n", done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "plain NATS, no shared memory: its compiled part is not installed" in done.stderr
