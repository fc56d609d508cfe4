"""Requests, answers, and what a request hears when nobody is there."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest

from compat_tests.backend import arrived, payloads, sync, taken, until, until_nobody_hears

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from compat_tests.backend import Backend

covers = pytest.mark.covers
styles = pytest.mark.parametrize("old_style", [False, True], ids=["new", "old"])


async def echo_service(nc: Client, subject: str, queue: str = "") -> list[Msg]:
    """Answers with the request's own payload; the list grows with each request."""
    requests: list[Msg] = []

    async def handler(message: Msg) -> None:
        requests.append(message)
        await message.respond(message.data)

    await nc.subscribe(subject, queue=queue, cb=handler)
    await sync(nc)
    return requests


async def silent_service(nc: Client, subject: str, queue: str = "") -> list[Msg]:
    requests: list[Msg] = []

    async def handler(message: Msg) -> None:
        requests.append(message)

    await nc.subscribe(subject, queue=queue, cb=handler)
    await sync(nc)
    return requests


@covers("api/request")
@styles
@pytest.mark.parametrize("where", ["own", "other"])
@pytest.mark.parametrize("size", [0, 10, 5000, 100_000, 1024 * 1024])
async def test_request(backend: Backend, size: int, where: str, old_style: bool) -> None:
    nc = await backend.connect()
    responder = nc if where == "own" else await backend.connect()
    await echo_service(responder, backend.subject)
    for number in range(5):
        payload = bytes([number]) * size
        answer = await nc.request(backend.subject, payload, timeout=5, old_style=old_style)
        assert answer.data == payload


@covers("api/request", "1.4/round-trip", "api/message-respond")
async def test_request_with_headers(backend: Backend) -> None:
    nc, responder = await backend.connect(), await backend.connect()
    requests = await echo_service(responder, backend.subject)
    answer = await nc.request(backend.subject, b"x", timeout=5, headers={"Trace": "42"})
    assert requests[0].headers == {"Trace": "42"}
    assert answer.headers == {"Trace": "42"}  # respond() sends the message's own headers back


@covers("api/request")
async def test_answer_with_headers_of_its_own(backend: Backend) -> None:
    nc, responder = await backend.connect(), await backend.connect()

    async def handler(message: Msg) -> None:
        await responder.publish(message.reply, b"answer", headers={"Code": "7"})

    await responder.subscribe(backend.subject, cb=handler)
    await sync(responder)
    answer = await nc.request(backend.subject, timeout=5)
    assert (answer.data, answer.headers) == (b"answer", {"Code": "7"})


@covers("api/request-concurrent")
@styles
async def test_concurrent_requests(backend: Backend, old_style: bool) -> None:
    nc, responder = await backend.connect(), await backend.connect()
    waiting: list[Msg] = []

    async def handler(message: Msg) -> None:
        waiting.append(message)
        if len(waiting) == 200:
            for request in reversed(waiting):  # the last one asked is the first one answered
                await request.respond(b"re " + request.data)

    await responder.subscribe(backend.subject, cb=handler)
    await sync(responder)
    answers = await asyncio.gather(
        *(nc.request(backend.subject, b"%d" % number, timeout=10, old_style=old_style) for number in range(200))
    )
    assert [bytes(answer.data) for answer in answers] == [b"re %d" % number for number in range(200)]


@covers("api/request", "api/request-late")
@styles
async def test_first_of_several_answers_wins(backend: Backend, old_style: bool) -> None:
    nc, responder = await backend.connect(), await backend.connect()

    async def handler(message: Msg) -> None:
        for number in range(3):
            await message.respond(b"%d of %s" % (number, message.data))

    await responder.subscribe(backend.subject, cb=handler)
    await sync(responder)
    for number in range(10):
        answer = await nc.request(backend.subject, b"%d" % number, timeout=5, old_style=old_style)
        assert answer.data == b"0 of %d" % number


@covers("api/request-timeout", "2.6/interest-counts", "api/exceptions")
@styles
@pytest.mark.parametrize("queue", ["", "q"], ids=["plain", "queue"])
async def test_request_timeout(backend: Backend, queue: str, old_style: bool) -> None:
    nc, responder = await backend.connect(), await backend.connect()
    requests = await silent_service(responder, backend.subject, queue)
    start = time.monotonic()
    with pytest.raises(nats.errors.TimeoutError) as caught:
        await nc.request(backend.subject, b"x", timeout=0.1, old_style=old_style)
    assert 0.09 < time.monotonic() - start < 5
    assert isinstance(caught.value, asyncio.TimeoutError)
    assert isinstance(caught.value, backend.nats.errors.TimeoutError)
    await until(lambda: requests, what="the request has arrived")


@covers("api/request-late")
@styles
async def test_late_answer_is_dropped(backend: Backend, old_style: bool) -> None:
    nc, responder = await backend.connect(), await backend.connect()
    requests = await silent_service(responder, backend.subject)
    with pytest.raises(backend.nats.errors.TimeoutError):
        await nc.request(backend.subject, b"late", timeout=0.05, old_style=old_style)
    await until(lambda: requests)
    await requests[0].respond(b"late answer")
    await arrived(responder, nc)
    await echo_service(responder, f"{backend.subject}.echo")
    assert (await nc.request(f"{backend.subject}.echo", b"next", timeout=5, old_style=old_style)).data == b"next"


@covers("api/request-cancel")
@styles
async def test_cancelled_request(backend: Backend, old_style: bool) -> None:
    nc, responder = await backend.connect(), await backend.connect()
    requests = await silent_service(responder, backend.subject)
    task = asyncio.create_task(nc.request(backend.subject, b"x", timeout=10, old_style=old_style))
    await until(lambda: requests)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await requests[0].respond(b"too late")
    await arrived(responder, nc)
    await echo_service(responder, f"{backend.subject}.echo")
    assert (await nc.request(f"{backend.subject}.echo", b"next", timeout=5, old_style=old_style)).data == b"next"


@covers("api/request", "api/subscribe-reentrant")
async def test_request_inside_a_responder(backend: Backend) -> None:
    """a asks b to answer; everything on one connection as well as on two."""
    nc, other = await backend.connect(), await backend.connect()
    await echo_service(other, f"{backend.subject}.inner")

    async def handler(message: Msg) -> None:
        inner = await other.request(f"{backend.subject}.inner", b"<" + message.data + b">", timeout=5)
        await message.respond(inner.data)

    await other.subscribe(f"{backend.subject}.outer", cb=handler)
    await sync(other)
    for number in range(10):
        answer = await nc.request(f"{backend.subject}.outer", b"%d" % number, timeout=5)
        assert answer.data == b"<%d>" % number


@covers("2.1/inbox-prefix", "api/new-inbox")
@styles
@pytest.mark.parametrize("prefix", ["_INBOX", "my.own.inbox", b"bytes_inbox"], ids=["default", "str", "bytes"])
async def test_reply_subjects(backend: Backend, prefix: str | bytes, old_style: bool) -> None:
    options: dict[str, Any] = {} if prefix == "_INBOX" else {"inbox_prefix": prefix}
    nc, responder = await backend.connect(**options), await backend.connect()
    requests = await echo_service(responder, backend.subject)
    for _ in range(3):
        await nc.request(backend.subject, b"x", timeout=5, old_style=old_style)
    text = re.escape(prefix if isinstance(prefix, str) else prefix.decode())
    form = rf"{text}\.[0-9A-Za-z]{{22}}" + ("" if old_style else r"\.[0-9A-Za-z]+")
    replies = [request.reply for request in requests]
    assert len(set(replies)) == 3 and all(re.fullmatch(form, reply) for reply in replies), replies


@covers("2.6/request", "2.6/old-style")
@styles
async def test_nobody_there(backend: Backend, old_style: bool) -> None:
    nc = await backend.connect()
    start = time.monotonic()
    for _ in range(5):
        with pytest.raises(backend.nats.errors.NoRespondersError):
            await nc.request(backend.subject, b"x", timeout=10, old_style=old_style)
    assert time.monotonic() - start < 5


@covers("2.6/status-message", "1.4/status")
@pytest.mark.parametrize("headers", [None, {"A": "b"}], ids=["plain", "headers"])
async def test_no_responders_message(backend: Backend, headers: dict[str, str] | None) -> None:
    nc = await backend.connect()
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox)
    await nc.publish(backend.subject, b"payload", reply=inbox, headers=headers)
    message = await subscription.next_msg(5)
    assert (message.subject, message.reply, message.data) == (inbox, "", b"")
    assert message.headers is not None
    # nats-py also makes a Description of the rest of the block, which no program can want.
    assert (message.headers["Status"], message.headers["Nats-Subject"]) == ("503", backend.subject)


@covers("2.6/wildcard-reply")
async def test_no_responders_through_a_wildcard(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(f"{backend.subject}.inbox.*")
    for number in range(3):
        await nc.publish(f"{backend.subject}.nobody", reply=f"{backend.subject}.inbox.{number}")
    await arrived(nc, nc)
    messages = await taken(subscription)
    assert [message.subject for message in messages] == [f"{backend.subject}.inbox.{number}" for number in range(3)]
    assert all(message.headers and message.headers["Status"] == "503" for message in messages)


@covers("2.6/first-only")
async def test_only_one_subscription_hears_it(backend: Backend) -> None:
    nc = await backend.connect()
    inbox = f"{backend.subject}.inbox"
    subscriptions = [await nc.subscribe(inbox) for _ in range(3)]
    await nc.publish(f"{backend.subject}.nobody", reply=inbox)
    await arrived(nc, nc)
    assert sorted(subscription.pending_msgs for subscription in subscriptions) == [0, 0, 1]


@covers("2.6/queue-reply")
async def test_queue_subscription_does_not_hear_it(backend: Backend) -> None:
    nc = await backend.connect()
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox, queue="q")
    await nc.publish(backend.subject, b"x", reply=inbox)
    await arrived(nc, nc)
    assert subscription.pending_msgs == 0


@covers("2.6/other-connection")
async def test_other_connection_does_not_hear_it(backend: Backend) -> None:
    nc, other = await backend.connect(), await backend.connect()
    inbox = nc.new_inbox()
    subscription = await other.subscribe(inbox)
    await sync(other)
    await nc.publish(backend.subject, b"x", reply=inbox)
    await arrived(nc, other)
    assert subscription.pending_msgs == 0


@covers("2.6/needs-reply")
async def test_no_message_without_reply_subject(backend: Backend) -> None:
    nc = await backend.connect()
    everything = await nc.subscribe(">")
    await nc.publish("a.." + backend.subject, b"x")  # even > does not match this
    await arrived(nc, nc)
    assert [message.headers for message in await taken(everything) if message.headers] == []


@covers("2.6/interest-counts")
async def test_no_echo_of_the_status_for_a_served_subject(backend: Backend) -> None:
    """A subscriber that ignores what it gets is a responder all the same; its own connection counts too."""
    nc = await backend.connect()
    ignoring = await nc.subscribe(backend.subject)
    inbox = nc.new_inbox()
    subscription = await nc.subscribe(inbox)
    await nc.publish(backend.subject, b"x", reply=inbox)
    await arrived(nc, nc)
    assert (ignoring.pending_msgs, subscription.pending_msgs) == (1, 0)


@covers("2.6/interest-counts")
async def test_wildcard_subscriber_counts(backend: Backend) -> None:
    nc, other = await backend.connect(), await backend.connect()
    await silent_service(other, f"{backend.subject}.>")
    with pytest.raises(backend.nats.errors.TimeoutError):
        await nc.request(f"{backend.subject}.a.b", timeout=0.05)
    with pytest.raises(backend.nats.errors.NoRespondersError):
        await nc.request(backend.subject, timeout=5)


@covers("2.6/interest-gone")
@pytest.mark.parametrize("way", ["unsubscribe", "drain", "close", "drain connection"])
@pytest.mark.parametrize("queue", ["", "q"], ids=["plain", "queue"])
async def test_responder_that_left(backend: Backend, way: str, queue: str) -> None:
    nc, responder = await backend.connect(), await backend.connect()

    async def handler(message: Msg) -> None:
        await message.respond(b"here")

    subscription = await responder.subscribe(backend.subject, queue=queue, cb=handler)
    await sync(responder)
    assert (await nc.request(backend.subject, timeout=5)).data == b"here"
    if way == "unsubscribe":
        await subscription.unsubscribe()
        await sync(responder)
    elif way == "drain":
        await subscription.drain()
        await sync(responder)
    elif way == "close":
        await responder.close()
    else:
        await responder.drain()
    await until_nobody_hears(nc, backend.subject)


@covers("2.6/invalid-subject")
@pytest.mark.parametrize("subject", ["foo..bar", "foo.", ".foo", "x.*", "x.>"])
async def test_request_to_a_subject_that_matches_nobody(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    await nc.subscribe("x.y")
    with pytest.raises(backend.nats.errors.NoRespondersError):
        await nc.request(subject, b"x", timeout=5)


@covers("api/message-respond")
async def test_respond_without_reply(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x")
    message = await subscription.next_msg(5)
    with pytest.raises(backend.nats.errors.Error, match="no reply subject"):
        await message.respond(b"y")


@covers("api/message-respond")
async def test_respond_without_client(backend: Backend) -> None:
    message = backend.nats.aio.msg.Msg(_client=None, subject="a", reply="b")
    with pytest.raises(backend.nats.errors.Error, match="client not set"):
        await message.respond(b"y")


@covers("api/message-ack")
@pytest.mark.parametrize("method", ["ack", "nak", "term", "in_progress", "ack_sync"])
async def test_acknowledging_without_reply(backend: Backend, method: str) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x")
    message = await subscription.next_msg(5)
    with pytest.raises(backend.nats.errors.NotJSMessageError):
        await getattr(message, method)()
    with pytest.raises(backend.nats.errors.NotJSMessageError):
        _ = message.metadata


@covers("api/message-ack")
@pytest.mark.parametrize(
    ("method", "arguments", "payload"),
    [
        ("ack", {}, b""),
        ("nak", {}, b"-NAK"),
        ("nak", {"delay": 2}, b'-NAK {"delay": 2000000000}'),
        ("term", {}, b"+TERM"),
        ("in_progress", {}, b"+WPI"),
    ],
)
async def test_acknowledging(backend: Backend, method: str, arguments: dict[str, Any], payload: bytes) -> None:
    nc, other = await backend.connect(), await backend.connect()
    acknowledgements = await other.subscribe(f"{backend.subject}.ack")
    subscription = await nc.subscribe(backend.subject)
    await sync(nc, other)
    await nc.publish(backend.subject, b"x", reply=f"{backend.subject}.ack")
    message = await subscription.next_msg(5)
    await getattr(message, method)(**arguments)
    if method == "in_progress":
        await message.in_progress()
        assert not message.is_acked
    else:
        assert message.is_acked
        with pytest.raises(backend.nats.errors.MsgAlreadyAckdError):
            await message.ack()
    await arrived(nc, other)
    assert await payloads(acknowledgements) == [payload] * (2 if method == "in_progress" else 1)


@covers("api/message-ack")
async def test_ack_sync(backend: Backend) -> None:
    nc, other = await backend.connect(), await backend.connect()
    requests = await echo_service(other, f"{backend.subject}.ack")
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x", reply=f"{backend.subject}.ack")
    message = await subscription.next_msg(5)
    answer = await message.ack_sync(timeout=5)
    assert (len(requests), answer.data, message.is_acked) == (1, b"", True)
