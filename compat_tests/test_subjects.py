"""Which subjects are accepted, and which subscriptions a published subject reaches."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from compat_tests.backend import arrived, sync, taken, until

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

    from compat_tests.backend import Backend

covers = pytest.mark.covers

WHITE_SPACE = ["a b", " a", "a\tb", "a\r\n", "a\nPING"]
REFUSED_BY_SERVER = ["foo.", ".", ".foo", "foo..bar", "foo.>.bar"]
PARTIAL_WILDCARDS = ["fo*", "*foo", "foo*.bar", "foo.**", "foo>", ">foo", "foo.>>"]

SUBSCRIPTIONS = ["foo", "foo.*", "foo.>", "*", "*.*", ">", "foo.*.baz", "*.>", "FOO"]
SUBSCRIPTIONS += ["fo*", "foo.b*", ">x", "foo.**", "foo.>>", "*foo"]
# Of each published subject, the subscriptions above that get it, as seen on nats-server 2.15.1.
TABLE = {
    "foo": "foo * >",
    "foo.bar": "foo.* foo.> *.* > *.>",
    "foo.bar.baz": "foo.> > foo.*.baz *.>",
    "fo*": "* > fo*",
    "foo.b*": "foo.* foo.> *.* > foo.b* *.>",
    "foo.": "",
    "foo..": "",
    "foo..bar": "",
    ".foo": "",
    "foo.*": "foo.* foo.> *.* > *.>",
    "foo.>": "foo.* foo.> *.* > *.>",
    "*": "* >",
    ">": "* >",
    "foo.>.baz": "foo.> > foo.*.baz *.>",
    "FOO": "* > FOO",
    "foo.**": "foo.* foo.> *.* > *.> foo.**",
    "foo.>>": "foo.* foo.> *.* > *.> foo.>>",
    "*foo": "* > *foo",
    ">x": "* > >x",
}


def matches(pattern: str, subject: str) -> bool:
    """The rules of NATS, written down once more, plainly, to compare with."""
    wanted, tokens = pattern.split("."), subject.split(".")
    if "" in tokens:
        return False
    for index, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > index
        if index >= len(tokens) or token not in ("*", tokens[index]):
            return False
    return len(wanted) == len(tokens)


@covers("2.1/client-subscribe")
@pytest.mark.parametrize("subject", ["", *WHITE_SPACE, *REFUSED_BY_SERVER, *PARTIAL_WILDCARDS], ids=repr)
async def test_subscribe_refuses_locally(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    with pytest.raises(backend.nats.errors.BadSubjectError):
        await nc.subscribe(subject)
    await sync(nc)
    assert nc.is_connected


@covers("2.1/client-publish")
@pytest.mark.parametrize("subject", ["", *WHITE_SPACE], ids=repr)
async def test_publish_refuses_locally(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    with pytest.raises(backend.nats.errors.BadSubjectError):
        await nc.publish(subject, b"x")
    await sync(nc)
    assert nc.is_connected


@covers("2.1/client-publish")
@pytest.mark.parametrize("reply", WHITE_SPACE, ids=repr)
async def test_publish_refuses_reply_locally(backend: Backend, reply: str) -> None:
    nc = await backend.connect()
    with pytest.raises(backend.nats.errors.BadSubjectError):
        await nc.publish(backend.subject, b"x", reply=reply)


@covers("2.1/client-request")
@pytest.mark.parametrize("old_style", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("subject", ["", *WHITE_SPACE], ids=repr)
async def test_request_refuses_locally(backend: Backend, subject: str, old_style: bool) -> None:
    nc = await backend.connect()
    with pytest.raises(backend.nats.errors.BadSubjectError):
        await nc.request(subject, b"x", old_style=old_style)


@covers("2.1/client-queue")
@pytest.mark.parametrize("queue", WHITE_SPACE, ids=repr)
async def test_subscribe_refuses_queue_locally(backend: Backend, queue: str) -> None:
    nc = await backend.connect()
    with pytest.raises(backend.nats.errors.BadSubjectError):
        await nc.subscribe(backend.subject, queue=queue)


@covers("2.1/client-skip")
async def test_skip_validation_still_refuses_the_empty_subject(backend: Backend) -> None:
    nc = await backend.connect(skip_subject_validation=True)
    with pytest.raises(backend.nats.errors.BadSubjectError):
        await nc.subscribe("")
    with pytest.raises(backend.nats.errors.BadSubjectError):
        await nc.publish("", b"x")


@covers("2.1/sub-invalid", "2.1/client-skip", "1.8/fatal")
@pytest.mark.parametrize("subject", REFUSED_BY_SERVER)
async def test_server_refuses_subscription(backend: Backend, subject: str) -> None:
    nc = await backend.connect(skip_subject_validation=True)
    await nc.subscribe(subject)
    await until(lambda: nc.is_closed, what="the connection is closed for an invalid subscription")
    assert str(nc.last_error) == "nats: invalid subject"


@covers("1.8/error-callbacks", "2.1/sub-invalid")
async def test_server_error_calls_back_and_does_not_reconnect(backend: Backend) -> None:
    calls: list[str] = []

    async def disconnected() -> None:
        calls.append("disconnected")

    async def closed() -> None:
        calls.append("closed")

    async def reconnected() -> None:
        calls.append("reconnected")

    nc = await backend.connect(
        skip_subject_validation=True, disconnected_cb=disconnected, closed_cb=closed, reconnected_cb=reconnected
    )
    await nc.subscribe("foo..bar")
    await until(lambda: "closed" in calls, what="closed_cb")
    assert calls == ["disconnected", "closed"]


@covers("2.1/sub-wildcards", "2.1/sub-any-bytes")
@pytest.mark.parametrize(
    "subject",
    [
        *(">", "*", "*.*", "foo.*", "foo.*.bar", "foo.>", "*.>", "$SYS.>", "_INBOX.>", "FOO"),
        *("größe.☃", "a\x01b", "a\x7fb", "-./:", "'\"{}"),
    ],
    ids=ascii,
)
async def test_subscription_accepted(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    await nc.subscribe(subject)
    await sync(nc)
    assert nc.is_connected and nc.last_error is None


@covers("2.1/sub-any-bytes")
@pytest.mark.parametrize("subject", ["größe.☃.mañana", "a\x01.\x7fb", "a\x00b", "$X.Y", "'.\".{}.\\", "x" * 300], ids=ascii)
async def test_odd_subjects_are_delivered(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    exact = await nc.subscribe(f"{backend.subject}.{subject}")
    wild = await nc.subscribe(f"{backend.subject}.>")
    await nc.publish(f"{backend.subject}.{subject}", b"x")
    for subscription in (exact, wild):
        assert (await subscription.next_msg(5)).subject == f"{backend.subject}.{subject}"


@covers("2.1/sub-partial-wildcards")
@pytest.mark.parametrize("subject", PARTIAL_WILDCARDS)
async def test_partial_wildcards_are_literal(backend: Backend, subject: str) -> None:
    nc = await backend.connect(skip_subject_validation=True)
    prefix = backend.subject
    subscription = await nc.subscribe(f"{prefix}.{subject}")
    expanded = subject.replace("*", "oo").replace(">", "oo")
    await nc.publish(f"{prefix}.{expanded}", b"expanded")
    await nc.publish(f"{prefix}.{subject}", b"literal")
    await nc.publish(f"{prefix}.{subject}.more", b"longer")
    await arrived(nc, nc)
    assert [bytes(message.data) for message in await taken(subscription)] == [b"literal"]


@covers("2.2/table", "2.1/pub-unchecked", "2.1/pub-wildcards-literal", "2.2/tail-needs-token", "2.2/star-one-token")
@pytest.mark.parametrize("subject", TABLE)
async def test_matching_table(backend: Backend, subject: str) -> None:
    nc = await backend.connect(skip_subject_validation=True)
    subscriptions = {pattern: await nc.subscribe(pattern) for pattern in SUBSCRIPTIONS}
    await nc.publish(subject, b"x")
    await arrived(nc, nc)
    got = {
        pattern
        for pattern, subscription in subscriptions.items()
        if [message for message in await taken(subscription) if message.data == b"x"]
    }
    assert got == set(TABLE[subject].split())


@covers("2.2/table", "2.2/star-one-token", "2.2/tail-needs-token")
@pytest.mark.parametrize("seed", range(5))
async def test_matching_random_subjects(backend: Backend, seed: int) -> None:
    dice = random.Random(seed)

    def subject_of(words: list[str], depth: int) -> list[str]:
        return [dice.choice(words) for _ in range(dice.randint(1, depth))]

    patterns: set[str] = set()
    while len(patterns) < 60:
        tokens = subject_of(["a", "b", "ab", "A", "*"], 4)
        patterns.add(".".join([*tokens, ">"] if dice.random() < 0.3 else tokens))
    subjects = {".".join(subject_of(["a", "b", "ab", "A", "aa"], 6)) for _ in range(150)}
    publisher, nc = await backend.connect(), await backend.connect()
    prefix = backend.subject
    subscriptions = {pattern: await nc.subscribe(f"{prefix}.{pattern}") for pattern in patterns}
    await sync(nc)
    for subject in subjects:
        await publisher.publish(f"{prefix}.{subject}")
    await arrived(publisher, nc)
    for pattern, subscription in subscriptions.items():
        got = sorted(message.subject.removeprefix(f"{prefix}.") for message in await taken(subscription))
        assert got == sorted(subject for subject in subjects if matches(pattern, subject)), pattern


@covers("2.2/table")
async def test_matching_follows_changes_of_interest(backend: Backend) -> None:
    """The same subjects again and again, while patterns come and go between them."""
    dice = random.Random(7)
    publisher, nc = await backend.connect(), await backend.connect()
    prefix = backend.subject
    subjects = ["a", "a.b", "a.c", "a.b.c", "b", "b.b", "b.c.d"]
    patterns = ["a", "a.*", "a.>", "*", "*.b", ">", "*.*.c", "b.c.d", "b.>"]
    live: dict[str, Subscription] = {}
    for _ in range(25):
        pattern = dice.choice(patterns)
        if pattern in live:
            await live.pop(pattern).unsubscribe()
        else:
            live[pattern] = await nc.subscribe(f"{prefix}.{pattern}")
        await sync(nc)
        for subject in subjects:
            await publisher.publish(f"{prefix}.{subject}")
        await arrived(publisher, nc)
        for pattern, subscription in live.items():
            got = [message.subject.removeprefix(f"{prefix}.") for message in await taken(subscription)]
            assert got == [subject for subject in subjects if matches(pattern, subject)], pattern


@covers("2.2/bytewise")
async def test_matching_is_by_bytes(backend: Backend) -> None:
    nc = await backend.connect()
    prefix = backend.subject
    forms = ["caf\u00e9", "cafe\u0301", "CAF\u00c9", "CAFE", "cafe"]
    subscriptions = {form: await nc.subscribe(f"{prefix}.{form}") for form in forms}
    for form in forms:
        await nc.publish(f"{prefix}.{form}", form.encode())
    await arrived(nc, nc)
    for form, subscription in subscriptions.items():
        assert [bytes(message.data).decode() for message in await taken(subscription)] == [form]


@covers("2.2/tail-needs-token")
async def test_tail_needs_a_token(backend: Backend) -> None:
    nc = await backend.connect()
    prefix = backend.subject
    tail = await nc.subscribe(f"{prefix}.>")
    await nc.publish(prefix, b"none")
    await nc.publish(f"{prefix}.one", b"one")
    await nc.publish(f"{prefix}.one.two.three", b"three")
    await arrived(nc, nc)
    assert [bytes(message.data) for message in await taken(tail)] == [b"one", b"three"]


@covers("2.1/pub-unchecked")
@pytest.mark.parametrize("subject", ["x.", ".", "..", ".x", "x..y", "x.>.", "*."])
async def test_invalid_published_subject_reaches_nobody(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    everything = await nc.subscribe(">")
    await nc.publish(subject, b"lost")
    await nc.publish(backend.subject, b"kept")
    await arrived(nc, nc)
    assert [bytes(message.data) for message in await taken(everything) if message.data] == [b"kept"]
    assert nc.is_connected


@covers("2.1/pub-wildcards-literal")
@pytest.mark.parametrize("subject", ["a.*", "a.>", "*", ">", "*.b", "a.*.c"])
async def test_wildcards_in_a_published_subject_match_no_literal(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    prefix = backend.subject
    literals = [await nc.subscribe(f"{prefix}.{literal}") for literal in ("a", "a.b", "b.b", "a.b.c")]
    everything = await nc.subscribe(f"{prefix}.>")
    await nc.publish(f"{prefix}.{subject}", b"x")
    await arrived(nc, nc)
    assert [len(await taken(literal)) for literal in literals] == [0, 0, 0, 0]
    assert [message.subject for message in await taken(everything)] == [f"{prefix}.{subject}"]


@covers("2.1/pub-pedantic", "1.8/fatal")
@pytest.mark.parametrize("subject", ["foo.*", "foo.>", "*", "foo..bar", "foo."])
async def test_pedantic_publisher_is_told(backend: Backend, subject: str) -> None:
    nc = await backend.connect(pedantic=True)
    await nc.publish(subject, b"x")
    await until(lambda: nc.is_closed, what="the pedantic connection is closed")
    assert str(nc.last_error) == "nats: invalid publish subject"


@covers("2.1/pub-pedantic")
async def test_pedantic_publisher_with_legal_subjects(backend: Backend) -> None:
    nc = await backend.connect(pedantic=True)
    subscription = await nc.subscribe(f"{backend.subject}.>")
    for subject in ("a", "fo*", "foo>"):
        await nc.publish(f"{backend.subject}.{subject}", b"x")
    await arrived(nc, nc)
    assert len(await taken(subscription)) == 3
    assert nc.is_connected


@covers("1.9/long-subjects")
@pytest.mark.parametrize("shape", ["bytes", "tokens"])
async def test_long_subjects(backend: Backend, shape: str) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    long = "y" * 3900 if shape == "bytes" else ".".join("t" * 1500)
    subject = f"{backend.subject}.{long}"
    exact = await nc.subscribe(subject)
    wild = await nc.subscribe(f"{backend.subject}.>")
    await sync(nc)
    await publisher.publish(subject, b"x")
    for subscription in (exact, wild):
        assert (await subscription.next_msg(5)).subject == subject


@covers("1.9/long-subjects")
async def test_long_reply_subject(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    reply = "r" * 3900
    await publisher.publish(backend.subject, b"x", reply=reply)
    assert (await subscription.next_msg(5)).reply == reply
