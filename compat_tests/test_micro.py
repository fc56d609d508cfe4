"""Services (micro): endpoints, groups, errors, what monitoring asks, several instances, the end."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest

from compat_tests.backend import Backend, sync

if TYPE_CHECKING:
    from nats.aio.client import Client

covers = pytest.mark.covers


async def echo(request: Any) -> None:
    await request.respond(request.data, headers=request.headers)


async def add(request: Any) -> None:
    if not request.data:
        await request.respond_error("400", "nothing to add", data=b"empty")
        return
    await request.respond(b"%d" % sum(map(int, request.data.split())), headers={"By": "adder"})


async def fail(request: Any) -> None:
    raise ZeroDivisionError("cannot be done")


async def serve(backend: Backend, nc: Client, **options: Any) -> Any:
    micro = importlib.import_module(f"{backend.nats.__name__}.micro")
    service = await micro.add_service(
        nc, name=backend.subject, version="1.2.3", description="adds", metadata={"team": "numbers"}, **options
    )
    await service.add_endpoint(name="add", handler=add, subject=f"{backend.subject}.add")
    group = service.add_group(name=backend.subject).add_group(name="more")
    await group.add_endpoint(name="echo", handler=echo, metadata={"kind": "mirror"})
    await group.add_endpoint(name="fail", handler=fail, subject="fail.*", queue_group="own")
    await sync(nc)
    return service


@covers("api/micro")
async def test_requests_and_errors(backend: Backend) -> None:
    nc, client = await backend.connect(), await backend.connect()
    await serve(backend, nc)
    answer = await client.request(f"{backend.subject}.add", b"3 4", timeout=5)
    assert (answer.data, answer.headers) == (b"7", {"By": "adder"})
    answer = await client.request(f"{backend.subject}.add", b"", timeout=5)
    assert answer.data == b"empty"
    assert answer.headers == {"Nats-Service-Error": "nothing to add", "Nats-Service-Error-Code": "400"}
    answer = await client.request(f"{backend.subject}.more.echo", b"x", headers={"A": "b"}, timeout=5)
    assert (answer.data, answer.headers) == (b"x", {"A": "b"})
    answer = await client.request(f"{backend.subject}.more.fail.now", timeout=5)
    assert answer.headers and answer.headers["Nats-Service-Error-Code"] == "500"
    assert "cannot be done" in answer.headers["Nats-Service-Error"]


@covers("api/micro")
async def test_what_monitoring_asks(backend: Backend) -> None:
    nc, client = await backend.connect(), await backend.connect()
    service = await serve(backend, nc)
    for subject in ("add", "more.echo", "more.fail.x"):
        await client.request(f"{backend.subject}.{subject}", b"1 2", timeout=5)
    for suffix in (f".{backend.subject}", f".{backend.subject}.{service.id}"):
        answers = {}
        for verb in ("PING", "INFO", "STATS"):
            answers[verb] = json.loads((await client.request(f"$SRV.{verb}{suffix}", timeout=5)).data)
            assert answers[verb]["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
            assert (answers[verb]["name"], answers[verb]["id"]) == (backend.subject, service.id)
            assert (answers[verb]["version"], answers[verb]["metadata"]) == ("1.2.3", {"team": "numbers"})
        endpoints = answers["INFO"]["endpoints"]
        subjects = [endpoint["subject"].removeprefix(backend.subject) for endpoint in endpoints]
        assert subjects == [".add", ".more.echo", ".more.fail.*"]
        assert [endpoint["queue_group"] for endpoint in endpoints] == ["q", "q", "own"]
        counts = [(endpoint["num_requests"], endpoint["num_errors"]) for endpoint in answers["STATS"]["endpoints"]]
        assert counts == [(1, 0), (1, 0), (1, 1)]
    assert [endpoint.num_requests for endpoint in service.stats().endpoints] == [1, 1, 1]


@covers("api/micro")
async def test_instances_share_the_requests(backend: Backend) -> None:
    connections = [await backend.connect() for _ in range(3)]
    services = [await serve(backend, nc) for nc in connections]
    client = await backend.connect()
    for _ in range(90):
        await client.request(f"{backend.subject}.add", b"1", timeout=5)
    shares = Counter({service.id: service.stats().endpoints[0].num_requests for service in services})
    assert shares.total() == 90 and min(shares.values()) > 0
    inbox = client.new_inbox()
    found = await client.subscribe(inbox)
    await sync(client)
    await client.publish(f"$SRV.PING.{backend.subject}", reply=inbox)
    assert {json.loads((await found.next_msg(5)).data)["id"] for _ in range(3)} == set(shares)


@covers("api/micro")
async def test_end_of_a_service(backend: Backend) -> None:
    nc, client = await backend.connect(), await backend.connect()
    service = await serve(backend, nc)
    await client.request(f"{backend.subject}.add", b"1", timeout=5)
    await service.stop()
    for subject in (f"{backend.subject}.add", f"$SRV.PING.{backend.subject}"):
        with pytest.raises(nats.errors.NoRespondersError):
            await client.request(subject, timeout=5)
    assert nc.is_connected
