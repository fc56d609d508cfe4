"""Message headers as programs see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from compat_tests.backend import sync

if TYPE_CHECKING:
    from compat_tests.backend import Backend

covers = pytest.mark.covers


async def round_trip(backend: Backend, headers: dict[str, str], payload: bytes = b"x") -> dict[str, str] | None:
    publisher, nc = await backend.connect(), await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    await publisher.publish(backend.subject, payload, headers=headers)
    message = await subscription.next_msg(5)
    assert message.data == payload
    received: dict[str, str] | None = message.headers
    return received


@covers("1.4/round-trip", "1.4/case-preserved")
@pytest.mark.parametrize("payload", [b"", b"x", b"\r\n\r\n", bytes(range(256)) * 100, b"z" * 200_000], ids=len)
@pytest.mark.parametrize(
    "headers",
    [
        {"A": "b"},
        {"one": "1", "Two": "2", "THREE": "3", "fOuR": "4"},
        {"X": "größe ☃ 日本"},
        {"X": "a: b, c=d; e"},
        {"X": ""},
        {"!#$%&'*+-.^_`|~09": "all token characters"},
        {"k" * 200: "v" * 2000},
    ],
    ids=["one", "four", "unicode", "punctuation", "empty value", "token", "long"],
)
async def test_round_trip(backend: Backend, headers: dict[str, str], payload: bytes) -> None:
    assert await round_trip(backend, headers, payload) == headers


@covers("1.4/case-preserved")
async def test_names_that_differ_in_case(backend: Backend) -> None:
    headers = {"Key": "1", "key": "2", "KEY": "3"}
    assert await round_trip(backend, headers) == headers


@covers("1.4/trimmed")
@pytest.mark.parametrize(
    ("sent", "received"),
    [
        ({" A ": " b "}, {"A": "b"}),
        ({"A": "x\r\ny"}, {"A": "x  y"}),
        ({"A": "x\ny\rz"}, {"A": "x y z"}),
        ({"A": "\tb\t"}, {"A": "b"}),
        ({"A": "two  spaces"}, {"A": "two  spaces"}),
        ({"": "dropped", "  ": "dropped", "A": "kept"}, {"A": "kept"}),
    ],
    ids=repr,
)
async def test_trimming(backend: Backend, sent: dict[str, str], received: dict[str, str]) -> None:
    assert await round_trip(backend, sent) == received


@covers("1.4/bad-name")
@pytest.mark.parametrize("name", ["a b", "a:b", "a\r\nb", "größe", "a(b)", "a/b", "a\x00b", "a\tb", "{a}"], ids=ascii)
async def test_bad_names(backend: Backend, name: str) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    with pytest.raises(backend.nats.errors.BadHeaderError) as caught:
        await nc.publish(backend.subject, b"x", headers={"Good": "1", name: "2"})
    assert caught.value.key == name
    with pytest.raises(backend.nats.errors.BadHeaderError):
        await nc.request(backend.subject, b"x", headers={name: "2"})
    await nc.publish(backend.subject, b"next")
    assert (await subscription.next_msg(5)).data == b"next"


@covers("1.4/none")
@pytest.mark.parametrize("headers", [None, {}, {" ": "dropped"}], ids=repr)
async def test_no_headers(backend: Backend, headers: dict[str, str] | None) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x", headers=headers)
    message = await subscription.next_msg(5)
    assert message.headers is None and message.header is None


@covers("1.4/user-status")
async def test_headers_like_a_servers(backend: Backend) -> None:
    headers = {"Status": "200", "Description": "fine", "Nats-Msg-Id": "1", "Nats-Subject": "a"}
    assert await round_trip(backend, headers) == headers


@covers("1.4/user-status", "2.6/request")
async def test_status_503_from_a_client_is_no_responders_too(backend: Backend) -> None:
    nc = await backend.connect()

    async def handler(message: object) -> None:
        await nc.publish(message.reply, b"", headers={"Status": "503"})  # type: ignore[attr-defined]

    await nc.subscribe(backend.subject, cb=handler)
    with pytest.raises(backend.nats.errors.NoRespondersError):
        await nc.request(backend.subject, timeout=5)


@covers("1.4/large")
@pytest.mark.parametrize("count", [100, 2000])
async def test_many_headers(backend: Backend, count: int) -> None:
    headers = {f"Header-{number}": f"value {number}" for number in range(count)}
    assert await round_trip(backend, headers) == headers


@covers("1.4/large")
async def test_half_a_mebibyte_of_headers(backend: Backend) -> None:
    headers = {"Big": "v" * (512 * 1024)}
    assert await round_trip(backend, headers, b"p" * (400 * 1024)) == headers


@covers("1.4/round-trip")
async def test_reply_and_headers_together(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x", reply="some.reply", headers={"A": "b"})
    message = await subscription.next_msg(5)
    assert (message.reply, message.headers, message.data) == ("some.reply", {"A": "b"}, b"x")


@covers("1.4/round-trip")
async def test_each_subscription_has_headers_of_its_own(backend: Backend) -> None:
    nc = await backend.connect()
    one, two = await nc.subscribe(backend.subject), await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x", headers={"A": "b"})
    first, second = await one.next_msg(5), await two.next_msg(5)
    assert first.headers is not None
    first.headers["A"] = "changed"
    assert second.headers == {"A": "b"}


@covers("api/stats")
async def test_stats_count_payload_only(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"12345", headers={"A": "b" * 100})
    await subscription.next_msg(5)
    assert (nc.stats["out_bytes"], nc.stats["in_bytes"]) == (5, 5)
