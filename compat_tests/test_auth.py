"""Users, passwords, tokens, nkeys and accounts, on a server whose configuration has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import bcrypt
import nats.errors
import nkeys
import pytest

from compat_tests import jwts
from compat_tests.authorization import Authorization, Authorized
from compat_tests.backend import Backend, arrived, payloads, sync, until
from compat_tests.test_options import Calls, restart

if TYPE_CHECKING:
    from nats.aio.client import Client

    from compat_tests.conftest import OwnServers

covers = pytest.mark.covers
VIOLATION = "nats: 'Authorization Violation'"


def hashed(password: str) -> str:
    """At bcrypt's least cost."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()


ME = Authorized("me", "se cret")
ALL_WAYS: dict[str, tuple[Authorization, str, dict[str, Any]]] = {
    "arguments": (Authorization(ME), "", {"user": "me", "password": "se cret"}),
    "callables": (Authorization(ME), "", {"user": lambda: "me", "password": lambda: "se cret"}),
    "url": (Authorization(ME), "me:se cret@", {}),
    "arguments-before-url": (Authorization(ME), "other:wrong@", {"user": "me", "password": "se cret"}),
    "one-of-many": (Authorization(Authorized("you", "x"), ME), "", {"user": "me", "password": "se cret"}),
    "hashed": (Authorization(Authorized("me", hashed("se cret"))), "", {"user": "me", "password": "se cret"}),
    "long-hashed": (Authorization(Authorized("me", hashed("a" * 72))), "", {"user": "me", "password": "a" * 72}),
    "unicode": (Authorization(Authorized("mé", "pässwörd")), "", {"user": "mé", "password": "pässwörd"}),
    "token": (Authorization(token="t0ken"), "", {"token": "t0ken"}),
    "token-callable": (Authorization(token="t0ken"), "", {"token": lambda: "t0ken"}),
    "token-url": (Authorization(token="t0ken"), "t0ken@", {}),
    "token-hashed": (Authorization(token=hashed("t0ken")), "", {"token": "t0ken"}),
    "verbose": (Authorization(ME), "", {"user": "me", "password": "se cret", "verbose": True}),
}
WRONG: dict[str, tuple[Authorization, str, dict[str, Any]]] = {
    "nothing": (Authorization(ME), "", {}),
    "password": (Authorization(ME), "", {"user": "me", "password": "Se cret"}),
    "prefix": (Authorization(ME), "", {"user": "me", "password": "se cre"}),
    "empty": (Authorization(ME), "", {"user": "me", "password": ""}),
    "user": (Authorization(ME), "", {"user": "Me", "password": "se cret"}),
    "url": (Authorization(ME), "me:wrong@", {}),
    "token-for-user": (Authorization(ME), "", {"token": "se cret"}),
    "hashed": (Authorization(Authorized("me", hashed("x"))), "", {"user": "me", "password": "y"}),
    "the-hash": (Authorization(Authorized("me", "$2b$04$" + "a" * 53)), "", {"user": "me", "password": "$2b$04$" + "a" * 53}),
    "token": (Authorization(token="t0ken"), "", {"token": "T0ken"}),
    "user-for-token": (Authorization(token="t0ken"), "", {"user": "t0ken", "password": "t0ken"}),
    "no-token": (Authorization(token="t0ken"), "", {}),
}


def start(new_backend: OwnServers, authorization: Authorization) -> Backend:
    more = {"jetstream": False} if new_backend.name == "nats" else {}
    return new_backend(authorization=authorization, **more)


def url(backend: Backend, userinfo: str) -> str:
    return f"nats://{userinfo}127.0.0.1:{backend.server.port}"


def violations(calls: Calls) -> int:
    """How often it was told; nats-py sometimes tells as well that the server closed the connection behind that."""
    others = [error for error in calls.errors if str(error) != VIOLATION]
    assert all(isinstance(error, ConnectionResetError) for error in others), others
    return len(calls.errors) - len(others)


def ended_for_good(nc: Client, calls: Calls) -> None:
    """nats-py sometimes meets the end of the connection before it has read why."""
    reset = "ConnectionResetError" in calls.order
    assert [word for word in calls.order if word != "ConnectionResetError"] == ["disconnected", "closed"]
    assert reset or isinstance(nc.last_error, nats.errors.AuthorizationError)


async def works(nc: Client, subject: str) -> None:
    subscription = await nc.subscribe(subject)
    await nc.publish(subject, b"x")
    assert (await subscription.next_msg(5)).data == b"x"
    await subscription.unsubscribe()


@covers("1.12/credentials")
@pytest.mark.parametrize("way", ALL_WAYS)
async def test_credentials_let_a_client_in(new_backend: OwnServers, way: str) -> None:
    authorization, userinfo, options = ALL_WAYS[way]
    backend = start(new_backend, authorization)
    await works(await backend.connect(url(backend, userinfo), **options), "a")


@covers("1.12/wrong")
@pytest.mark.parametrize("way", WRONG)
async def test_wrong_credentials_are_told(new_backend: OwnServers, way: str) -> None:
    authorization, userinfo, options = WRONG[way]
    backend = start(new_backend, authorization)
    calls = Calls()
    with pytest.raises(nats.errors.Error) as raised:
        await backend.nats.connect(url(backend, userinfo), allow_reconnect=False, **calls.options, **options)
    assert type(raised.value) is nats.errors.Error
    assert str(raised.value) == VIOLATION
    assert calls.errors == [raised.value]
    assert calls.order == ["Error"]


@covers("1.12/wrong")
async def test_wrong_credentials_are_tried_again_as_any_failure(new_backend: OwnServers) -> None:
    backend = start(new_backend, Authorization(ME))
    calls = Calls()
    passwords = iter(["wrong", "wrong too", "se cret", "more"])
    nc = await backend.connect(
        user="me", password=lambda: next(passwords), reconnect_time_wait=0.01, max_reconnect_attempts=5, **calls.options
    )
    assert violations(calls) == 2
    assert next(passwords) == "more"
    await works(nc, "a")
    calls = Calls()
    with pytest.raises(nats.errors.NoServersError):
        await backend.nats.connect(
            backend.url, user="me", password="no", reconnect_time_wait=0.01, max_reconnect_attempts=2, **calls.options
        )
    assert violations(calls) == 3


@covers("1.12/wrong")
async def test_the_next_server_of_a_list_is_tried(new_backend: OwnServers) -> None:
    backend = start(new_backend, Authorization(ME))
    calls = Calls()
    urls = [url(backend, "me:wrong@"), url(backend, "me:se cret@")]
    nc = await backend.connect(urls, dont_randomize=True, **calls.options)
    assert violations(calls) == 1
    await works(nc, "a")


@covers("1.12/auth-required")
async def test_the_information_says_so(new_backend: OwnServers) -> None:
    backend = start(new_backend, Authorization(ME))
    nc = await backend.connect(user="me", password="se cret")
    assert nc._server_info["auth_required"] is True


@covers("1.12/nkeys")
@pytest.mark.parametrize("way", ["file", "text", "callback", "beside-a-password"])
async def test_nkeys(new_backend: OwnServers, tmp_path: Path, way: str) -> None:
    seed = jwts.new_seed(nkeys.PREFIX_BYTE_USER)
    backend = start(new_backend, Authorization(ME, Authorized(nkey=jwts.public(seed))))
    file = tmp_path / "user.nk"
    file.write_bytes(seed)
    options: dict[str, Any] = {"nkeys_seed": str(file)} if way == "file" else {"nkeys_seed_str": seed.decode()}
    if way == "beside-a-password":
        options = {"user": "me", "password": "se cret"}
    nc = await backend.connect(**options, **Calls().options)
    await works(nc, "a")
    await restart(backend, nc)
    await works(nc, "a")


@covers("1.12/nkeys")
@pytest.mark.parametrize("way", ["unknown", "other-signature"])
async def test_wrong_nkeys(new_backend: OwnServers, way: str) -> None:
    seed, other = jwts.new_seed(nkeys.PREFIX_BYTE_USER), jwts.new_seed(nkeys.PREFIX_BYTE_USER)
    backend = start(new_backend, Authorization(ME, Authorized(nkey=jwts.public(seed))))

    class Impostor(backend.nats.aio.client.Client):  # type: ignore[misc,name-defined]
        def _setup_nkeys_connect(self) -> None:
            super()._setup_nkeys_connect()
            if way == "other-signature":
                self._public_nkey = jwts.public(seed)

    calls = Calls()
    with pytest.raises(nats.errors.Error) as raised:
        await Impostor().connect(backend.url, nkeys_seed_str=other.decode(), allow_reconnect=False, **calls.options)
    assert str(raised.value) == VIOLATION


@covers("1.12/reconnect")
async def test_credentials_are_given_again_at_a_reconnect(new_backend: OwnServers) -> None:
    backend = start(new_backend, Authorization(ME))
    calls = Calls()
    nc = await backend.connect(user="me", password="se cret", **calls.options)
    subscription = await nc.subscribe("a")
    await restart(backend, nc)
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"


@covers("1.12/reconnect")
async def test_a_reconnect_fails_where_they_are_not_good_any_more(new_backend: OwnServers) -> None:
    backend = start(new_backend, Authorization(ME))
    calls = Calls()
    nc = await backend.connect(user="me", password="se cret", max_reconnect_attempts=60, **calls.options)
    await backend.stop_server()
    backend.server.authorization = Authorization(Authorized("me", "another"))
    await backend.start_server()
    await until(lambda: nc.is_closed, what="it gives up")
    await until(lambda: "closed" in calls.order, what="it says so")
    assert VIOLATION in [str(error) for error in calls.errors]
    assert isinstance(nc.last_error, nats.errors.NoServersError)
    assert "reconnected" not in calls.order


@covers("1.12/revoked", "1.12/kept")
async def test_a_user_whose_password_changes_is_disconnected_for_good(new_backend: OwnServers) -> None:
    you = Authorized("you", "p")
    backend = start(new_backend, Authorization(ME, you))
    mine, yours = Calls(), Calls()
    nc = await backend.connect(user="me", password="se cret", **mine.options)
    other = await backend.connect(user="you", password="p", **yours.options)
    await nc.subscribe("a")
    await sync(nc, other)
    backend.server.authorization = Authorization(you, Authorized("me", "x"))
    backend.server.reread()
    await until(lambda: nc.is_closed and "closed" in mine.order, what="it is closed")
    ended_for_good(nc, mine)
    with pytest.raises(nats.errors.NoRespondersError):
        await other.request("a", timeout=5)
    await works(other, "b")
    assert yours.order == []


@covers("1.12/removed", "1.12/kept")
@pytest.mark.parametrize("way", ["password", "nkey"])
async def test_a_user_who_is_removed_is_disconnected_and_cannot_come_back(new_backend: OwnServers, way: str) -> None:
    you = Authorized("you", "p")
    seed = jwts.new_seed(nkeys.PREFIX_BYTE_USER)
    backend = start(new_backend, Authorization(ME, you, Authorized(nkey=jwts.public(seed))))
    options: dict[str, Any] = (
        {"user": "me", "password": "se cret"} if way == "password" else {"nkeys_seed_str": seed.decode()}
    )
    mine, yours = Calls(), Calls()
    nc = await backend.connect(max_reconnect_attempts=2, **options, **mine.options)
    other = await backend.connect(user="you", password="p", **yours.options)
    await nc.subscribe("a")
    await sync(nc, other)
    backend.server.authorization = Authorization(you)
    backend.server.reread()
    await until(lambda: nc.is_closed and "closed" in mine.order, what="it is closed")
    assert mine.order[:2] == ["UnexpectedEOF", "disconnected"]
    mine.errors.pop(0)
    assert violations(mine) > 0
    assert isinstance(nc.last_error, nats.errors.NoServersError)
    with pytest.raises(nats.errors.NoRespondersError):
        await other.request("a", timeout=5)
    await works(other, "b")
    assert yours.order == []


@covers("1.12/revoked")
async def test_a_token_that_changes_disconnects_for_good(new_backend: OwnServers) -> None:
    backend = start(new_backend, Authorization(token="t0ken"))
    calls = Calls()
    nc = await backend.connect(token="t0ken", **calls.options)
    backend.server.authorization = Authorization(token="another")
    backend.server.reread()
    await until(lambda: nc.is_closed and "closed" in calls.order, what="it is closed")
    ended_for_good(nc, calls)


@covers("1.12/revoked")
async def test_who_gave_nothing_is_disconnected_when_users_come_to_be(new_backend: OwnServers) -> None:
    backend = new_backend(**({"jetstream": False} if new_backend.name == "nats" else {"max_payload": 1 << 20}))
    calls = Calls()
    nc = await backend.connect(**calls.options)
    backend.server.authorization = Authorization(ME)
    backend.server.reread()
    await until(lambda: nc.is_closed and "closed" in calls.order, what="it is closed")
    ended_for_good(nc, calls)
    await works(await backend.connect(user="me", password="se cret"), "a")


@covers("1.12/accounts")
async def test_accounts_do_not_hear_each_other(new_backend: OwnServers) -> None:
    seed = jwts.new_seed(nkeys.PREFIX_BYTE_USER)
    backend = start(
        new_backend,
        Authorization(
            Authorized("a1", "p", account="A"),
            Authorized("a2", "p", account="A"),
            Authorized(nkey=jwts.public(seed), account="B"),
            Authorized("b", "p", account="B"),
        ),
    )
    a1 = await backend.connect(user="a1", password="p")
    a2 = await backend.connect(user="a2", password="p")
    b1 = await backend.connect(nkeys_seed_str=seed.decode())
    b2 = await backend.connect(user="b", password="p")
    heard = {nc: await nc.subscribe("x.>") for nc in (a1, a2, b1, b2)}
    await sync(a1, a2, b1, b2)
    await a1.publish("x.1", b"from a")
    await b1.publish("x.1", b"from b")
    await arrived(a1, a1, a2)
    await arrived(b1, b1, b2)
    for nc, subscription in heard.items():
        assert await payloads(subscription) == [b"from a" if nc in (a1, a2) else b"from b"]
    await a1.subscribe("only.a")
    await sync(a1)
    with pytest.raises(nats.errors.NoRespondersError):
        await b2.request("only.a", timeout=5)
    members = [await nc.subscribe("q", queue="group") for nc in (a1, a2, b1)]
    await sync(a1, a2, b1)
    for number in range(30):
        await a2.publish("q", b"%d" % number)
    await arrived(a2, a1, a2)
    assert sum(member.pending_msgs for member in members[:2]) == 30
    assert members[2].pending_msgs == 0


@covers("1.12/moved")
async def test_who_comes_into_another_account_reconnects_there(new_backend: OwnServers) -> None:
    a, b = Authorized("me", "p", account="A"), Authorized("you", "p", account="B")
    backend = start(new_backend, Authorization(a, b))
    calls = Calls()
    nc = await backend.connect(user="me", password="p", reconnect_time_wait=0.05, **calls.options)
    other = await backend.connect(user="you", password="p")
    subscription = await nc.subscribe("x")
    backend.server.authorization = Authorization(
        Authorized("me", "p", account="B"), b, Authorized("nobody", "p", account="A")
    )
    backend.server.reread()
    await until(lambda: "reconnected" in calls.order, what="it is there again")
    await sync(nc)
    await other.publish("x", b"hello")
    assert (await subscription.next_msg(5)).data == b"hello"
