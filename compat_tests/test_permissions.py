"""What users may publish and subscribe to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest

from compat_tests.authorization import Authorization, Authorized
from compat_tests.backend import Backend, arrived, payloads, sync, until
from compat_tests.test_auth import VIOLATION, ended_for_good, start, violations, works
from compat_tests.test_options import Calls, restart

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from compat_tests.conftest import OwnServers

covers = pytest.mark.covers
FREE = Authorized("free", "p")
EVERYTHING: dict[str, object] = {"publish": ">", "subscribe": ">"}


def limited_user(permissions: dict[str, Any], name: str = "me") -> Authorized:
    return Authorized(name, "p", permissions=permissions)


class Both:
    """A client with permissions and one without, on one server."""

    def __init__(self, backend: Backend, me: Client, free: Client, calls: Calls) -> None:
        self.backend = backend
        self.me = me
        self.free = free
        self.calls = calls

    def told(self) -> list[str]:
        """What the one with permissions has been told so far."""
        errors, self.calls.errors = self.calls.errors, []
        return [str(error) for error in errors]


async def both(new_backend: OwnServers, permissions: dict[str, Any], *more: Authorized, **options: Any) -> Both:
    backend = start(new_backend, Authorization(limited_user(permissions), FREE, *more))
    calls = Calls()
    me = await backend.connect(user="me", password="p", **calls.options, **options)
    return Both(backend, me, await backend.connect(user="free", password="p"), calls)


PUBLISHES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "allow": ({"publish": ["a.*", "b"]}, ["a.b", "b"], ["a", "a.b.c", "c"]),
    "text": ({"publish": "a"}, ["a"], ["b"]),
    "deny": ({"publish": {"deny": ["a.>"]}}, ["a", "b"], ["a.b", "a.b.c"]),
    "both": ({"publish": {"allow": [">"], "deny": "a"}}, ["b", "a.b"], ["a"]),
    "subscribe-alone": ({"subscribe": ["x"]}, ["a"], []),
    "nothing": ({}, ["a"], []),
    "reserved": ({}, [], ["$NRG.x", "_GR_.x"]),
}


@covers("1.12 permissions/publish")
@pytest.mark.parametrize("case", PUBLISHES)
async def test_publish(new_backend: OwnServers, case: str) -> None:
    permissions, may, may_not = PUBLISHES[case]
    two = await both(new_backend, permissions)
    everything = await two.free.subscribe(">")
    await sync(two.free)
    for subject in [*may_not, *may]:
        await two.me.publish(subject, subject.encode())
    await sync(two.me)
    await until(lambda: everything.pending_msgs >= len(may), what="they arrive")
    await sync(two.free)
    assert await payloads(everything) == [subject.encode() for subject in may]
    await until(lambda: len(two.calls.errors) >= len(may_not), what="it is told")
    assert two.told() == [f'nats: permissions violation for publish to "{subject.lower()}"' for subject in may_not]
    assert two.me.is_connected
    assert two.calls.order == ["Error"] * len(may_not)


SUBSCRIBES: dict[str, tuple[dict[str, Any], str, list[str] | None]] = {
    "allow": ({"subscribe": ["a.*", "b"]}, "a.*", ["a.x", "a.y"]),
    "allow-part": ({"subscribe": ["a.*", "b"]}, "a.x", ["a.x"]),
    "not-more": ({"subscribe": ["a.x"]}, "a.*", None),
    "not-all": ({"subscribe": ["a.x", "b"]}, ">", None),
    "other": ({"subscribe": ["a.*", "b"]}, "c", None),
    "deny": ({"subscribe": {"deny": ["b"]}}, "b", None),
    "deny-within": ({"subscribe": {"deny": ["a.y", "b"]}}, ">", ["a.x", "c"]),
    "allow-and-deny": ({"subscribe": {"allow": "a.>", "deny": "a.y"}}, "a.*", ["a.x"]),
    "publish-alone": ({"publish": ["a"]}, "b", ["b"]),
}


@covers("1.12 permissions/subscribe")
@pytest.mark.parametrize("case", SUBSCRIBES)
async def test_subscribe(new_backend: OwnServers, case: str) -> None:
    permissions, pattern, heard = SUBSCRIBES[case]
    two = await both(new_backend, permissions)
    subscription = await two.me.subscribe(pattern)
    await sync(two.me)
    for subject in ("a.x", "a.y", "b", "c"):
        await two.free.publish(subject, subject.encode())
    await sync(two.free)
    await sync(two.me)
    if heard is None:
        await until(lambda: two.calls.errors, what="it is told")
        assert two.told() == [f'nats: permissions violation for subscription to "{pattern}"']
    else:
        await until(lambda: subscription.pending_msgs == len(heard), what="they arrive")
    await sync(two.me)
    assert await payloads(subscription) == [subject.encode() for subject in heard or []]
    assert two.told() == []
    assert two.me.is_connected


@covers("1.12 permissions/subscribe")
@pytest.mark.parametrize("queue", ["", "g"])
async def test_what_is_denied_does_not_count_toward_a_maximum(new_backend: OwnServers, queue: str) -> None:
    two = await both(new_backend, {"subscribe": {"allow": ["q.*", "_INBOX.>"], "deny": ["q.secret"]}})
    mine = await two.me.subscribe("q.*", queue=queue)
    await mine.unsubscribe(limit=2)
    await sync(two.me)
    for subject in ("q.secret", "q.secret", "q.a", "q.secret", "q.b", "q.c"):
        await two.free.publish(subject, subject.encode())
    await arrived(two.free, two.me)
    assert await payloads(mine) == [b"q.a", b"q.b"]


@covers("1.12 permissions/queue")
async def test_permissions_for_queue_groups(new_backend: OwnServers) -> None:
    two = await both(new_backend, {"subscribe": {"allow": ["a g.*", "b"], "deny": ["b bad"]}})
    cases = [("a", "g.1", True), ("a", "h", False), ("a", "", False), ("b", "", True), ("b", "good", True), ("b", "bad", False)]
    for subject, queue, allowed in [*cases, ("b", "_sys_", False)]:
        await two.me.subscribe(subject, queue=queue)
        await sync(two.me)
        words = f' using queue "{queue}"' if queue else ""
        expected = [] if allowed else [f'nats: permissions violation for subscription to "{subject}"{words}']
        if expected:
            await until(lambda: two.calls.errors, what="it is told")
        assert (subject, queue, two.told()) == (subject, queue, expected)


@covers("1.12 permissions/queue")
async def test_what_a_member_may_not_have_goes_to_another(new_backend: OwnServers) -> None:
    two = await both(new_backend, {"subscribe": {"allow": ["q.*", "_INBOX.>"], "deny": ["q.secret"]}})
    mine = await two.me.subscribe("q.*", queue="g")
    other = await two.free.subscribe("q.*", queue="g")
    await sync(two.me, two.free)
    for number in range(100):
        await two.free.publish("q.secret", b"%d" % number)
        await two.free.publish("q.open", b"%d" % number)
    await sync(two.free)
    await until(lambda: mine.pending_msgs + other.pending_msgs == 200, what="all arrive")
    assert {message.subject for message in [await mine.next_msg(1) for _ in range(mine.pending_msgs)]} == {"q.open"}


async def members(two: Both, count: int, pattern: str = "q.*") -> list[Any]:
    """Of a queue group, each of a client of its own with the permissions."""
    clients = [await two.backend.connect(user="me", password="p", name=f"{number}") for number in range(count)]
    subscriptions = [await client.subscribe(pattern, queue="g") for client in clients]
    await sync(*clients)
    return subscriptions


QUEUE_DENIED = {"subscribe": {"allow": ["q.*", "_INBOX.>"], "deny": ["q.secret"]}}


@covers("1.12 permissions/queue")
async def test_of_many_members_the_one_that_may_have_it_gets_it_all(new_backend: OwnServers) -> None:
    two = await both(new_backend, QUEUE_DENIED)
    denied = await members(two, 3)
    allowed = await two.free.subscribe("q.*", queue="g")
    await sync(two.free)
    for number in range(300):
        await two.me.publish("q.secret", b"%d" % number)
        await two.me.publish("q.open", b"%d" % number)
    await sync(two.me)
    await until(lambda: sum(one.pending_msgs for one in (*denied, allowed)) == 600, what="all arrive")
    await arrived(two.free, two.free)
    got = [await allowed.next_msg(1) for _ in range(allowed.pending_msgs)]
    assert sorted(int(message.data) for message in got if message.subject == "q.secret") == list(range(300))
    others = [await one.next_msg(1) for one in denied for _ in range(one.pending_msgs)]
    assert {message.subject for message in others} == {"q.open"}
    numbers = [int(message.data) for message in (*got, *others) if message.subject == "q.open"]
    assert sorted(numbers) == list(range(300))


@covers("1.12 permissions/queue")
@pytest.mark.parametrize("count", [1, 3])
async def test_what_no_member_may_have_goes_to_nobody(new_backend: OwnServers, count: int) -> None:
    two = await both(new_backend, QUEUE_DENIED)
    denied = await members(two, count)
    plain = await two.free.subscribe("q.secret")
    await sync(two.free)
    for number in range(50):
        await two.free.publish("q.secret", b"%d" % number)
    await two.free.publish("q.open", b"last")
    await until(lambda: sum(one.pending_msgs for one in denied) == 1, what="what they may have arrives")
    await arrived(two.free, two.me)
    assert sum(one.pending_msgs for one in denied) == 1
    assert plain.pending_msgs == 50


@covers("1.12 permissions/responses")
@pytest.mark.parametrize("most", [1, 3])
async def test_responses(new_backend: OwnServers, most: int) -> None:
    responses: object = True if most == 1 else {"max": most, "expires": "1m" if new_backend.name == "nats" else 60}
    two = await both(new_backend, {"subscribe": "ask", "allow_responses": responses})

    async def answer(message: Msg) -> None:
        for number in range(most + 1):
            await message.respond(b"%d" % number)

    await two.me.subscribe("ask", cb=answer)
    await sync(two.me)
    inbox = await two.free.subscribe("answers")
    await sync(two.free)
    await two.free.publish("ask", b"", reply="answers")
    await until(lambda: two.calls.errors, what="it is told")
    assert two.told() == ['nats: permissions violation for publish to "answers"']
    await arrived(two.free, two.free)
    assert await payloads(inbox) == [b"%d" % number for number in range(most)]
    await two.me.publish("anything", b"x")
    await until(lambda: two.calls.errors, what="it is told")


ANSWERS: dict[str, object] = {"publish": ["ask"], "subscribe": ["ask", "ask.*"], "allow_responses": True}


async def refused(two: Both, *subjects: str) -> None:
    """It is told that it may not publish there, each as often as named, and nothing else."""
    await sync(two.me)
    await until(lambda: len(two.calls.errors) >= len(subjects), what="it is told")
    assert two.told() == [f'nats: permissions violation for publish to "{subject}"' for subject in subjects]


@covers("1.12 permissions/responses")
async def test_a_client_may_answer_what_it_asked_itself(new_backend: OwnServers) -> None:
    """So a reply subject of its choice gives it a right to publish there, once: what it was sent may be answered."""
    two = await both(new_backend, ANSWERS)
    await two.me.subscribe("ask")
    heard = await two.free.subscribe("secret.*")
    await sync(two.me, two.free)
    await two.me.publish("ask", b"", reply="secret.x")
    await two.me.publish("secret.x", b"at once")
    await two.me.publish("secret.x", b"no")
    await refused(two, "secret.x")
    await two.me.publish("ask", b"", reply="secret.y")
    await sync(two.me)
    await two.me.publish("secret.y", b"later")
    await two.me.publish("secret.z", b"no")
    await refused(two, "secret.z")
    await arrived(two.free, two.free)
    assert await payloads(heard) == [b"at once", b"later"]


@covers("1.12 permissions/responses")
@pytest.mark.parametrize("case", ["not-subscribed", "no-echo"])
async def test_what_does_not_reach_it_may_not_be_answered(new_backend: OwnServers, case: str) -> None:
    two = await both(new_backend, ANSWERS, no_echo=case == "no-echo")
    if case == "no-echo":
        await two.me.subscribe("ask")
        await sync(two.me)
    await two.me.publish("ask", b"", reply="secret.x")
    await two.me.publish("secret.x", b"no")
    await refused(two, "secret.x")


@covers("1.12 permissions/responses")
async def test_of_a_queue_group_only_who_was_asked_may_answer(new_backend: OwnServers) -> None:
    two = await both(new_backend, ANSWERS)
    first = await two.me.subscribe("ask.*", queue="g")
    calls = Calls()
    also = await two.backend.connect(user="me", password="p", **calls.options)
    second = await also.subscribe("ask.*", queue="g")
    await sync(two.me, also)
    for number in range(20):
        await two.free.publish("ask.x", b"", reply=f"answers.{number}")
    await sync(two.free)
    await until(lambda: first.pending_msgs + second.pending_msgs == 20, what="all arrive")
    got = {(await one.next_msg(1)).reply for one in (first,) for _ in range(first.pending_msgs)}
    for number in range(20):
        await two.me.publish(f"answers.{number}", b"")
        await also.publish(f"answers.{number}", b"")
    await refused(two, *(f"answers.{number}" for number in range(20) if f"answers.{number}" not in got))
    await until(lambda: len(calls.errors) == len(got), what="the other is told")
    assert 0 < len(got) < 20


# A: asked. +, -: answered, and that is allowed or refused. _: 200 ms go by, of the 300 that a right to answer lasts.
TURNS = ["A++-", "A_+_-", "AA+-", "A+A-", "A++A++-", "A++-A++-", "A_A_-", "A__A++-", "A__-A++-", "A_+A_-"]


@covers("1.12 permissions/responses")
@pytest.mark.parametrize("turns", TURNS)
async def test_rights_to_answer_are_used_up_and_end(new_backend: OwnServers, turns: str) -> None:
    """Each is for two answers. Who is asked with a subject that it may answer gets no other right, and uses one up."""
    responses = {"max": 2, "expires": "300ms" if new_backend.name == "nats" else 0.3}
    two = await both(new_backend, ANSWERS | {"allow_responses": responses})
    await two.me.subscribe("ask")
    await sync(two.me)
    for turn in turns:
        if turn == "_":
            await asyncio.sleep(0.2)
            continue
        await two.me.publish(*(("ask", b"", "r") if turn == "A" else ("r", b"")))
        await refused(two, *(["r"] if turn == "-" else []))


@covers("1.12 permissions/requests")
async def test_requests_and_nobody_who_answers(new_backend: OwnServers) -> None:
    two = await both(new_backend, {"publish": ["ask", "nobody", "mine"], "subscribe": ["_INBOX.>", "mine"]})

    async def answer(message: Msg) -> None:
        await message.respond(message.data + b"!")

    await two.free.subscribe("ask", cb=answer)
    await sync(two.free)
    for number in range(20):
        assert (await two.me.request("ask", b"%d" % number, timeout=5)).data == b"%d!" % number
    with pytest.raises(nats.errors.NoRespondersError):
        await two.me.request("nobody", timeout=5)
    own = await two.me.subscribe("mine")
    await two.me.publish("mine", b"x")
    assert (await own.next_msg(5)).data == b"x"
    with pytest.raises(nats.errors.TimeoutError):
        await two.me.request("denied", timeout=0.05)
    await until(lambda: two.calls.errors, what="it is told")
    assert two.told() == ['nats: permissions violation for publish to "denied"']


@covers("1.12 permissions/delivery")
@pytest.mark.parametrize("size", [0, 1, 5000, 100_000, 1 << 20])
async def test_payloads_headers_and_order(new_backend: OwnServers, size: int) -> None:
    two = await both(new_backend, EVERYTHING)
    mine, theirs = await two.me.subscribe("a.*"), await two.free.subscribe("b.*")
    await sync(two.me, two.free)
    count = 10 if size > 10_000 else 500
    for number in range(count):
        headers = {"Number": str(number)} if number % 2 else None
        payload = (b"%d " % number + bytes(size))[:size]
        await two.free.publish(f"a.{number}", payload, headers=headers if size < 1 << 20 else None)
        await two.me.publish(f"b.{number}", payload, headers=headers if size < 1 << 20 else None, reply="r")
    for subscription in (mine, theirs):
        for number in range(count):
            message = await subscription.next_msg(10)
            assert message.subject.endswith(f".{number}")
            assert len(message.data) == size
            assert message.headers == ({"Number": str(number)} if number % 2 and size < 1 << 20 else None)
            assert message.reply == ("r" if subscription is theirs else "")


@covers("1.12 permissions/delivery")
async def test_maxima_drain_and_flush(new_backend: OwnServers) -> None:
    two = await both(new_backend, EVERYTHING)
    limited = await two.me.subscribe("a", queue="g")
    await limited.unsubscribe(limit=2)
    other = await two.free.subscribe("a", queue="g")
    await sync(two.me, two.free)
    for number in range(20):
        await two.free.publish("a", b"%d" % number)
    await sync(two.free)
    await until(lambda: (limited.pending_msgs, other.pending_msgs) == (2, 18), what="the other gets the rest")
    got: list[bytes] = []

    async def note(message: Msg) -> None:
        got.append(message.data)

    drained = await two.me.subscribe("d", cb=note)
    await sync(two.me)
    for number in range(1000):
        await two.free.publish("d", b"%d" % number)
    await sync(two.free)
    await drained.drain()
    assert got == [b"%d" % number for number in range(1000)]
    heard = await two.free.subscribe("f")
    await sync(two.free)
    for number in range(1000):
        await two.me.publish("f", b"%d" % number)
    await two.me.drain()
    await until(lambda: heard.pending_msgs == 1000, what="all that was published before the end")


@covers("1.12 permissions/delivery")
async def test_a_client_that_wants_no_echo(new_backend: OwnServers) -> None:
    two = await both(new_backend, EVERYTHING, no_echo=True)
    own, other = await two.me.subscribe("a"), await two.free.subscribe("a")
    await sync(two.me, two.free)
    await two.me.publish("a", b"x")
    assert (await other.next_msg(5)).data == b"x"
    await arrived(two.free, two.me)
    assert own.pending_msgs == 0


@covers("1.12 permissions/delivery")
async def test_many_clients_with_permissions_at_once(new_backend: OwnServers) -> None:
    two = await both(new_backend, EVERYTHING)
    clients = [await two.backend.connect(user="me", password="p", name=f"{number}") for number in range(10)]
    subscriptions = [await client.subscribe("all") for client in clients]
    await sync(*clients)
    for number in range(100):
        await clients[number % 10].publish("all", b"%d" % number)
    await sync(*clients)
    await until(lambda: all(subscription.pending_msgs == 100 for subscription in subscriptions), what="all arrive")


@covers("1.12 permissions/reconnect")
async def test_reconnecting(new_backend: OwnServers) -> None:
    two = await both(new_backend, {"subscribe": ["a"], "publish": ["a"]}, reconnect_time_wait=0.05)
    subscription = await two.me.subscribe("a")
    await restart(two.backend, two.me)
    await two.me.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"
    await until(lambda: two.free.is_connected, what="both are there again")
    two.calls.errors.clear()
    two.backend.take_errors(Exception)
    await two.me.publish("b", b"x")
    await until(lambda: two.calls.errors, what="it is told")
    assert two.told() == ['nats: permissions violation for publish to "b"']


@covers("1.12 permissions/reread")
async def test_new_permissions(new_backend: OwnServers) -> None:
    two = await both(new_backend, {"publish": ["a"], "subscribe": ["a", "c", "d"]})
    stays, goes = await two.me.subscribe("a"), await two.me.subscribe("c")
    await two.me.subscribe("d", queue="g")
    heard = await two.free.subscribe(">")
    await sync(two.me, two.free)
    two.backend.server.authorization = Authorization(limited_user({"publish": ["b"], "subscribe": ["a"]}), FREE)
    two.backend.server.reread()
    await until(lambda: len(two.calls.errors) == 2, what="it is told")
    assert sorted(two.told()) == [
        'nats: permissions violation for subscription to "c" (sid "2")',
        'nats: permissions violation for subscription to "d" using queue "g" (sid "3")',
    ]
    await two.me.publish("a", b"no")
    await two.me.publish("b", b"yes")
    await until(lambda: two.calls.errors, what="it is told")
    assert two.told() == ['nats: permissions violation for publish to "a"']
    assert (await heard.next_msg(5)).data == b"yes"
    await two.free.publish("c", b"x")
    await two.free.publish("a", b"x")
    assert (await stays.next_msg(5)).data == b"x"
    await sync(two.free, two.me)
    assert goes.pending_msgs == 0
    assert two.calls.order == ["Error"] * 3


@covers("1.12 permissions/reread")
async def test_no_permissions_any_more(new_backend: OwnServers) -> None:
    two = await both(new_backend, {"publish": ["a"]})
    heard = await two.free.subscribe(">")
    await sync(two.free)
    await two.me.publish("b", b"no")
    await until(lambda: two.calls.errors, what="it is told")
    two.backend.server.authorization = Authorization(Authorized("me", "p"), FREE)
    two.backend.server.reread()
    while not heard.pending_msgs:
        await two.me.publish("b", b"yes")
        await sync(two.me, two.free)
    assert (await heard.next_msg(5)).data == b"yes"
    assert two.me.is_connected
    assert set(two.told()) == {'nats: permissions violation for publish to "b"'}


@covers("1.12 permissions/credentials", "1.12/wrong")
async def test_wrong_credentials(new_backend: OwnServers) -> None:
    backend = start(new_backend, Authorization(limited_user({"publish": "a"}), FREE))
    calls = Calls()
    with pytest.raises(nats.errors.Error) as raised:
        await backend.nats.connect(backend.url, user="me", password="no", allow_reconnect=False, **calls.options)
    assert str(raised.value) == VIOLATION
    assert violations(calls) == 1


@covers("1.12 permissions/credentials", "1.12/revoked")
async def test_a_password_that_changes(new_backend: OwnServers) -> None:
    two = await both(new_backend, EVERYTHING)
    await works(two.me, "a")
    two.backend.server.authorization = Authorization(Authorized("me", "x", permissions=EVERYTHING), FREE)
    two.backend.server.reread()
    await until(lambda: two.me.is_closed and "closed" in two.calls.order, what="it is closed")
    ended_for_good(two.me, two.calls)
