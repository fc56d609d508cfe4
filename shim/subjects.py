"""Subjects on the Python side: nats-py's checks, faster, and which of a connection's subscriptions matches first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nats import errors

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription


# What a NATS server keeps for itself (shim/fast/publish.c has the same list): an ordinary client may neither publish to these,
RESERVED_SUBJECTS = ("_GR_.", "$GR.", "$NRG.")
# nor ask for replies to these,
RESERVED_REPLIES = ("_R_.", "_GR_.", "$GR.", "$JS.ACK.")
# nor join this queue group.
RESERVED_QUEUE = "_sys_"


def reserved(subject: str, reply: str) -> str:
    """What only a server may do of publishing to the subject with that reply, in a server's words; nothing if there is none."""
    if subject.startswith(RESERVED_SUBJECTS):
        return f'publish to "{subject}"'
    if reply and reply.startswith(RESERVED_REPLIES):
        return f'publish with reply of "{reply}"'
    return ""


def check(subject: str) -> None:
    """As nats-py before a publish: BadSubjectError for an empty subject or one with white space."""
    if not subject or " " in subject or "\t" in subject or "\r" in subject or "\n" in subject:
        raise errors.BadSubjectError


def is_literal(subject: str) -> bool:
    """What a pedantic server asks of a published subject: no empty token, and no wildcard one."""
    return not any(token in ("", "*", ">") for token in subject.split("."))


def matches(pattern: Sequence[str], subject: Sequence[str]) -> bool:
    """True when the tokens of a pattern match those of a published subject, in which every byte is literal."""
    if pattern[-1] == ">":
        if len(subject) < len(pattern):
            return False
        pattern = pattern[:-1]
    elif len(pattern) != len(subject):
        return False
    return all(token in ("*", subject[place]) for place, token in enumerate(pattern))


def first_plain(subscriptions: Iterable[Subscription], subject: str) -> Subscription | None:
    """The subscription that a nats-server finds first for the subject, queue groups left out.

    It walks its tree token by token, and looks at ">", then "*", then the literal token.
    """
    tokens = subject.split(".")
    if "" in tokens:
        return None
    best, best_rank = None, None
    for subscription in subscriptions:
        if subscription._queue:
            continue
        pattern = subscription._subject.split(".")
        if not matches(pattern, tokens):
            continue
        rank = [(">", "*").index(token) if token in (">", "*") else 2 for token in pattern]
        if best_rank is None or rank < best_rank:
            best, best_rank = subscription, rank
    return best
