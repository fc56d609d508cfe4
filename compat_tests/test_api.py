"""The names that programs import, and that they are nats-py's or stand in for it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import subprocess
import sys
from typing import TYPE_CHECKING

import nats
import nats.aio.client
import nats.aio.msg
import nats.aio.subscription
import nats.errors
import pytest

from compat_tests.backend import REPOSITORY

if TYPE_CHECKING:
    from compat_tests.backend import Backend

covers = pytest.mark.covers

NAMES = {
    "": ["connect", "NATS"],
    "aio.client": ["Client", "Msg", "Subscription", "ServerVersion", "Srv", "DEFAULT_INBOX_PREFIX", "DEFAULT_PENDING_SIZE"],
    "aio.msg": ["Msg"],
    "aio.subscription": ["Subscription", "DEFAULT_SUB_PENDING_MSGS_LIMIT", "DEFAULT_SUB_PENDING_BYTES_LIMIT"],
    "aio.errors": ["ErrTimeout", "ErrConnectionClosed", "ErrNoServers"],
    "errors": [name for name, value in vars(nats.errors).items() if inspect.isclass(value)],
    "js": ["JetStreamContext", "JetStreamManager"],
    "js.api": ["StreamConfig", "ConsumerConfig", "Header"],
    "js.errors": ["Error", "NotFoundError", "NoStreamResponseError"],
    "js.client": ["JetStreamContext"],
    "js.kv": ["KeyValue"],
    "js.object_store": ["ObjectStore"],
    "micro": ["add_service", "Service", "Request"],
    "nuid": ["NUID"],
}


@covers("api/modules")
@pytest.mark.parametrize("module", NAMES, ids=lambda name: name or "top")
async def test_modules(backend: Backend, module: str) -> None:
    imported = importlib.import_module(f"{backend.nats.__name__}.{module}".rstrip("."))
    original = importlib.import_module(f"nats.{module}".rstrip("."))
    for name in NAMES[module]:
        assert hasattr(imported, name), f"{imported.__name__}.{name}"
        kind = getattr(original, name)
        if inspect.isclass(kind):
            assert issubclass(getattr(imported, name), kind), f"{imported.__name__}.{name} is no {kind}"
    for part in module.split(".")[:1]:
        assert not part or hasattr(backend.nats, part)


@covers("api/modules")
async def test_attributes_after_a_bare_import(backend: Backend) -> None:
    """`import nats` alone makes nats.errors and the others reachable; a program may rely on it."""
    module = backend.nats.__name__
    names = "nats.errors.TimeoutError, nats.aio.client.Client, nats.aio.msg.Msg, nats.js.api, nats.nuid.NUID"
    script = f"import {module} as nats; {names}"
    finished = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


@covers("api/exceptions")
@pytest.mark.parametrize("name", NAMES["errors"])
async def test_exceptions_are_nats_pys(backend: Backend, name: str) -> None:
    assert getattr(backend.nats.errors, name) is getattr(nats.errors, name)


@covers("api/exceptions", "api/connect-client-class")
async def test_client_is_a_nats_client(backend: Backend) -> None:
    nc = await backend.connect()
    assert isinstance(nc, nats.aio.client.Client)
    assert isinstance(nc, backend.nats.aio.client.Client)
    assert issubclass(backend.nats.NATS, nats.aio.client.Client)


@covers("api/modules")
async def test_jetstream_context(backend: Backend) -> None:
    nc = await backend.connect()
    assert isinstance(nc.jetstream(), importlib.import_module("nats.js").JetStreamContext)
    assert isinstance(nc.jsm(), importlib.import_module("nats.js").JetStreamManager)


@covers("api/new-inbox", "api/modules")
async def test_nuid(backend: Backend) -> None:
    nuid = importlib.import_module(f"{backend.nats.__name__}.nuid").NUID()
    names = {bytes(nuid.next()) for _ in range(1000)}
    assert len(names) == 1000 and {len(name) for name in names} == {22}
