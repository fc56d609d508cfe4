"""Credentials, accounts and permissions between users of the host, for whom files and shared memory are a boundary."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from nats import errors

if sys.platform != "linux" or os.getuid() != 0:
    pytest.skip("only root can be several users", allow_module_level=True)

from tests.nsnd_client import until
from tests.users import ALICE, BOB, OWNER, SharedNode, Stage, shared_node

AUTH = """
[auth.{port}]
users = [
  {{user = "alice", password = "p", account = "A"}},
  {{user = "bob", password = "p", account = "B"}},
  {{user = "carol", password = "p", account = "A", permissions = {{publish = "open", subscribe = "open"}}}},
]
"""


@pytest.fixture
def node() -> Iterator[SharedNode]:
    with shared_node() as running:
        running.allow(ALICE, BOB, more=AUTH.format(port=running.port))
        running.reread()
        yield running


async def _listens(stage: Stage) -> None:
    """As alice, to everything, and says what it heard when it is asked."""
    nc = await stage.connect(user="alice", password="p")
    heard = await nc.subscribe(">")
    await nc.flush()
    stage.say("ready")
    while subject := await stage.hear():
        await nc.publish(subject, b"from alice")
        await nc.flush()
        messages = [await heard.next_msg(5) for _ in range(heard.pending_msgs)]
        stage.say([(message.subject, bytes(message.data)) for message in messages])
    await nc.close()


async def _speaks(stage: Stage) -> None:
    """As somebody else; then what it heard, and was told."""
    user = await stage.hear()
    told: list[str] = []

    async def note(error: Exception) -> None:
        told.append(str(error))

    nc = await stage.connect(user=user, password="p", error_cb=note)
    heard: list[Any] = [await nc.subscribe(subject) for subject in ("open", "secret")]
    for subject in ("secret", "open"):
        await nc.publish(subject, user.encode())
    await nc.flush()
    await nc.flush()
    stage.say("ready")
    while await stage.hear():
        await nc.flush()
        stage.say(([bytes((await one.next_msg(5)).data) for one in heard for _ in range(one.pending_msgs)], sorted(told)))
    await nc.close()


async def _cannot(stage: Stage) -> None:
    """Get in without credentials, nor see where those are who have some."""
    told: list[Exception] = []

    async def note(error: Exception) -> None:
        told.append(error)

    for options in ({}, {"user": "alice", "password": "q"}):
        with pytest.raises(errors.Error, match="Authorization Violation"):
            await stage.connect(allow_reconnect=False, error_cb=note, **options)
    with pytest.raises(PermissionError):
        os.listdir(stage.directory)
    with pytest.raises((PermissionError, FileNotFoundError)):  # nobody is in it
        os.listdir(stage.directory / str(stage.port))
    stage.say("could not")


def test_another_user_needs_credentials_as_the_nodes_own_does(node: SharedNode) -> None:
    alice = node.act(ALICE, _listens)
    assert alice.hear() == "ready"
    for uid in (BOB, ALICE):
        assert node.act(uid, _cannot).hear() == "could not"
    alice.tell("")
    alice.end()


@pytest.mark.parametrize("uid", [ALICE, BOB, OWNER])
def test_accounts_hold_between_users(node: SharedNode, uid: int) -> None:
    alice, other = node.act(ALICE, _listens), node.act(uid, _speaks)
    assert alice.hear() == "ready"
    other.tell("bob")
    assert other.hear() == "ready"
    assert alice.ask("open") == [("open", b"from alice")]
    assert other.ask(True) == ([b"bob", b"bob"], [])
    for actor in (alice, other):
        actor.tell("")
        actor.end()


@pytest.mark.parametrize("uid", [ALICE, BOB, OWNER])
def test_permissions_hold_between_users(node: SharedNode, uid: int) -> None:
    alice, other = node.act(ALICE, _listens), node.act(uid, _speaks)
    assert alice.hear() == "ready"
    other.tell("carol")
    assert other.hear() == "ready"
    assert alice.ask("open") == [("open", b"carol"), ("open", b"from alice")]
    assert alice.ask("secret") == [("secret", b"from alice")]

    heard, told = until(lambda: answer if (answer := other.ask(True))[0] else None, "it hears something")
    assert set(heard) <= {b"carol", b"from alice"}
    assert told == ['nats: permissions violation for publish to "secret"',
                    'nats: permissions violation for subscription to "secret"']
    for actor in (alice, other):
        actor.tell("")
        actor.end()


def test_whoever_is_not_named_any_more_loses_its_relays_too(node: SharedNode) -> None:
    other = node.act(BOB, _speaks)
    other.tell("carol")
    assert other.hear() == "ready"

    def uids() -> list[int]:
        return [session["uid"] for application in node.status()["applications"] for session in application["sessions"]]

    assert uids() == [BOB]
    node.allow(ALICE, more=AUTH.format(port=node.port))
    node.reread()
    until(lambda: not uids(), "it has gone")
