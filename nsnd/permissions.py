"""What a user may publish and subscribe to, as nsnd.cfg says it with nats-server's words."""

from __future__ import annotations

import math
from typing import NamedTuple

LIST_MAX = 1024
SUBJECT_MAX = 4096
RESPONSES_MAX = 1  # where allow_responses says no more
RESPONSES_S = 120.0
PATTERNS = 'a subject in quotes, or a list of them, such as ["orders.>", "_INBOX.>"]'
KEYS = ("publish", "subscribe", "allow_responses")


class PermissionsError(Exception):
    """The key within the permissions, and what is allowed there."""


class Rule(NamedTuple):
    """`allow`: None when everything is. Each entry is a pattern and a queue group's pattern, which may be empty."""

    allow: tuple[tuple[str, str], ...] | None = None
    deny: tuple[tuple[str, str], ...] = ()


class Permissions(NamedTuple):
    """`responses`: how many, and for how many seconds, to what is delivered with a reply subject; None: that is no right."""

    publish: Rule = Rule()
    subscribe: Rule = Rule()
    responses: tuple[int, float] | None = None


def permissions(value: object) -> Permissions:
    """From the table in the file. PermissionsError."""
    if not isinstance(value, dict):
        raise PermissionsError(f": must be a table, {{publish = …, subscribe = …}}; allowed keys are {', '.join(KEYS)}")
    for key in value:
        if key not in KEYS:
            raise PermissionsError(f".{key}: unknown key; allowed are {', '.join(KEYS)}")
    publish = _rule(".publish", value.get("publish", {}), queues=False)
    responses = _responses(value.get("allow_responses", False))
    if responses is not None and publish.allow is None:
        publish = publish._replace(allow=())  # as a nats-server reads it: answers, and nothing else
    return Permissions(publish, _rule(".subscribe", value.get("subscribe", {}), queues=True), responses)


def _rule(where: str, value: object, *, queues: bool) -> Rule:
    if not isinstance(value, dict):
        return Rule(allow=_patterns(where, value, queues=queues))
    for key in value:
        if key not in ("allow", "deny"):
            raise PermissionsError(f"{where}.{key}: unknown key; allowed are allow, deny")
    allow = _patterns(f"{where}.allow", value["allow"], queues=queues) if "allow" in value else None
    return Rule(allow, _patterns(f"{where}.deny", value.get("deny", []), queues=queues))


def _patterns(where: str, value: object, *, queues: bool) -> tuple[tuple[str, str], ...]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or len(entries) > LIST_MAX:
        raise PermissionsError(f"{where}: must be {PATTERNS}")
    if not entries and not where.endswith(".deny"):
        raise PermissionsError(f'{where}: is empty, which a nats-server takes for everything: leave it out, or use deny = ">"')
    return tuple(_pattern(where, entry, queues=queues) for entry in entries)


def _pattern(where: str, entry: object, *, queues: bool) -> tuple[str, str]:
    words = entry.split() if isinstance(entry, str) else []
    if not 1 <= len(words) <= 1 + queues or not all(_is_pattern(word) for word in words):
        more = '; "subject queue" is for members of queue groups' if queues else ""
        raise PermissionsError(f"{where}: must be {PATTERNS}{more}")
    return words[0], words[1] if len(words) > 1 else ""


def _is_pattern(word: str) -> bool:
    tokens = word.split(".")
    return len(word.encode("utf-8", "replace")) <= SUBJECT_MAX and "" not in tokens and ">" not in tokens[:-1]


def _responses(value: object) -> tuple[int, float] | None:
    if isinstance(value, bool):
        return (RESPONSES_MAX, RESPONSES_S) if value else None
    words = ".allow_responses: must be true, false, or {max = a whole number above 0, expires = seconds}"
    if not isinstance(value, dict) or not set(value) <= {"max", "expires"}:
        raise PermissionsError(words)
    most, expires = value.get("max", RESPONSES_MAX), value.get("expires", RESPONSES_S)
    if isinstance(most, bool) or not isinstance(most, int) or not 0 < most < 1 << 31:
        raise PermissionsError(words)
    if isinstance(expires, bool) or not isinstance(expires, int | float) or not 0 < expires < 1e9 or math.isnan(expires):
        raise PermissionsError(words)
    return most, float(expires)
