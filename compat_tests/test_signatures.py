"""nats-py's public API, walked by introspection: every class, method, property, argument and default is there."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
import types
from typing import TYPE_CHECKING, Any

import nats
import nats.aio.client
import nats.aio.msg
import nats.aio.subscription
import pytest

from compat_tests.backend import sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compat_tests.backend import Backend

covers = pytest.mark.covers

MODULES = sorted(module.name.partition(".")[2] for module in pkgutil.walk_packages(nats.__path__, "nats."))
DUNDERS = ("__init__", "__repr__", "__eq__", "__aenter__", "__aexit__", "__aiter__", "__anext__")


def public(kind: type) -> Iterator[tuple[str, Any]]:
    """The members of a class that a program may use, as they stand in it (properties and static methods unbound)."""
    for name, member in inspect.getmembers_static(kind):
        if not name.startswith("_") or name in DUNDERS:
            yield name, member


def differences(theirs: type, ours: type) -> Iterator[str]:
    """How the public face of a class that stands in for theirs differs from it. More is fine, less is not."""
    for name, original in public(theirs):
        replaced = inspect.getattr_static(ours, name, None)
        where = f"{theirs.__qualname__}.{name}"
        if replaced is original:
            continue
        if replaced is None or isinstance(original, property) != isinstance(replaced, property):
            yield f"{where}: {original!r} has become {replaced!r}"
        elif inspect.iscoroutinefunction(original) != inspect.iscoroutinefunction(replaced):
            yield f"{where}: one is a coroutine function, the other is not"
        elif inspect.isfunction(original):
            yield from (f"{where}{words}" for words in signature_differences(original, replaced))


def signature_differences(original: Any, replaced: Any) -> Iterator[str]:
    theirs = inspect.signature(original).parameters
    ours = inspect.signature(replaced).parameters
    names = list(ours)[: len(theirs)]
    if names != list(theirs):
        yield f"({', '.join(theirs)}) has become ({', '.join(names)})"
        return
    for name, parameter in theirs.items():
        if (parameter.default, parameter.kind) != (ours[name].default, ours[name].kind):
            yield f": {parameter} has become {ours[name]}"
    for name in list(ours)[len(theirs) :]:
        if ours[name].default is inspect.Parameter.empty:
            yield f": {name} is new, and must be given"


@covers("api/modules", "api/signatures")
@pytest.mark.parametrize("name", MODULES)
async def test_every_public_name_of_a_module(backend: Backend, name: str) -> None:
    theirs = importlib.import_module(f"nats.{name}")
    ours = importlib.import_module(f"{backend.nats.__name__}.{name}")
    names = [attribute for attribute in vars(theirs) if not attribute.startswith("_") and attribute != "annotations"]
    assert [attribute for attribute in names if not hasattr(ours, attribute)] == []
    for attribute in names:
        original, replaced = getattr(theirs, attribute), getattr(ours, attribute)
        if replaced is original:
            continue
        if inspect.isclass(original):
            assert issubclass(replaced, original), attribute
            assert list(differences(original, replaced)) == []
        elif inspect.isfunction(original):
            assert list(signature_differences(original, replaced)) == []


@covers("api/signatures")
async def test_connect_function(backend: Backend) -> None:
    assert list(signature_differences(nats.connect, backend.nats.connect)) == []
    assert inspect.iscoroutinefunction(backend.nats.connect)


@covers("api/signatures", "api/exceptions")
async def test_objects_of_a_connection(backend: Backend) -> None:
    """A connection, its subscriptions and messages are of classes with nats-py's public face, and its values' types."""
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x")
    message = await subscription.next_msg(5)
    assert list(differences(nats.aio.client.Client, type(nc))) == []
    assert list(differences(nats.aio.subscription.Subscription, type(subscription))) == []
    assert list(differences(nats.aio.msg.Msg, type(message))) == []
    assert isinstance(subscription.messages, nats.aio.subscription._SubscriptionMessageIterator)
    # What nats-py's own modules and subclasses of users find on them, private or not.
    for original, ours in (
        (nats.aio.client.Client(), nc),
        (nats.aio.subscription.Subscription(nc), subscription),
        (nats.aio.msg.Msg(nc), message),
    ):
        assert [name for name in vars(original) if not hasattr(ours, name)] == []
    assert [type(getattr(message, name)) for name in ("subject", "reply", "data")] == [str, str, bytes]


@covers("api/signatures")
@pytest.mark.parametrize("argument", ["nothing", "qos"])
async def test_arguments_that_do_not_exist_are_refused(backend: Backend, argument: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        await backend.connect(**{argument: "nothing"})


@covers("api/signatures", "api/publish", "api/next-msg")
@pytest.mark.parametrize(
    "way", ["await", "create_task", "ensure_future", "gather", "wait_for", "as_completed", "TaskGroup", "threadsafe", "send"]
)
async def test_what_is_awaited_is_a_coroutine(backend: Backend, way: str) -> None:
    """So that every way of asyncio to run one takes it."""
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)

    async def run(coroutine: Any) -> Any:
        assert asyncio.iscoroutine(coroutine) and inspect.isawaitable(coroutine)
        if way == "await":
            return await coroutine
        if way == "create_task":
            return await asyncio.create_task(coroutine, name="a task")
        if way == "ensure_future":
            return await asyncio.ensure_future(coroutine)
        if way == "gather":
            return (await asyncio.gather(coroutine))[0]
        if way == "wait_for":
            return await asyncio.wait_for(coroutine, 5)
        if way == "as_completed":
            (done,) = asyncio.as_completed([coroutine])
            return await done
        if way == "TaskGroup":
            async with asyncio.TaskGroup() as group:
                task = group.create_task(coroutine)
            return task.result()
        if way == "threadsafe":
            loop = asyncio.get_running_loop()
            return await asyncio.wrap_future(await asyncio.to_thread(asyncio.run_coroutine_threadsafe, coroutine, loop))
        return await step_by_step(coroutine)

    await run(nc.publish(backend.subject, b"x"))
    assert (await run(subscription.next_msg(5))).data == b"x"
    waiting = run(subscription.next_msg(5))
    later = asyncio.get_running_loop().create_task(waiting)
    await run(nc.publish(backend.subject, b"y"))
    assert (await later).data == b"y"
    assert await run(nc.flush()) is None


@types.coroutine
def step_by_step(coroutine: Any) -> Any:
    """What `await` does, by hand."""
    value = None
    while True:
        try:
            waits_for = coroutine.send(value)
        except StopIteration as end:
            return end.value
        value = yield waits_for


@covers("api/signatures", "api/publish")
async def test_a_publish_that_is_not_awaited_does_nothing(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    coroutine = nc.publish(backend.subject, b"never")
    coroutine.close()
    await nc.publish(backend.subject, b"x")
    assert (await subscription.next_msg(5)).data == b"x"
    with pytest.raises(TypeError):
        await nc.publish()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        await nc.publish(backend.subject, b"", "", None, None)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        await nc.publish(backend.subject, body=b"")  # type: ignore[call-arg]
