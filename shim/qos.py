"""QoS policies of a stream: what they may be, and where a connection has them from: call, URL query, environment."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

_logger = logging.getLogger("insane_nats")

ENVIRONMENT = "INSANE_NATS_QOS"
VALUES: Mapping[str, tuple[str, ...]] = {
    "reliability": ("reliable", "unreliable"),
    "datapath": ("default", "fast"),
    "consumption": ("adaptive", "low", "poll"),
    "determinism": ("default", "timesensitive"),
}


@dataclass(frozen=True)
class QoS:
    """The four policies; the defaults are those of the NATS API. ValueError names a policy's allowed values."""

    reliability: str = "reliable"
    datapath: str = "default"
    consumption: str = "adaptive"
    determinism: str = "default"

    def __post_init__(self) -> None:
        for policy, allowed in VALUES.items():
            value = getattr(self, policy)
            if value not in allowed:
                raise ValueError(f"QoS policy {policy} cannot be {value!r}: it is one of {', '.join(allowed)}")


def parse(given: object, source: str) -> dict[str, str]:
    """The policies named in a QoS, a mapping, or a text as "consumption=low,datapath=fast".

    source: where it stands, for the ValueError that a name or value without meaning raises.
    """
    if given is None:
        return {}
    if isinstance(given, QoS):
        return dataclasses.asdict(given)
    if isinstance(given, Mapping):
        return _checked(given.items(), source)
    if isinstance(given, str):
        return _checked(_pairs(given, source), source)
    raise ValueError(f"{source} is a {type(given).__name__}: give a QoS, a dict, or a text as 'consumption=low,datapath=fast'")


def _pairs(text: str, source: str) -> Iterable[tuple[str, str]]:
    for part in text.split(","):
        if not part.strip():
            continue
        policy, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{source}: {part.strip()!r} is not of the form policy=value")
        yield policy.strip(), value.strip()


def _checked(pairs: Iterable[tuple[object, object]], source: str) -> dict[str, str]:
    policies: dict[str, str] = {}
    for policy, value in pairs:
        allowed = VALUES.get(policy) if isinstance(policy, str) else None
        if allowed is None:
            raise ValueError(f"{source}: there is no QoS policy {policy!r}: they are {', '.join(VALUES)}")
        if value not in allowed:
            raise ValueError(f"{source}: QoS policy {policy} cannot be {value!r}: it is one of {', '.join(allowed)}")
        policies[str(policy)] = str(value)
    return policies


def from_query(query: str, url: str) -> dict[str, str]:
    """The policies in a URL's query. What is no policy is left alone, with a warning, since nats-py ignores queries."""
    named: list[tuple[str, str]] = []
    unknown: list[tuple[str, str]] = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        (named if name in VALUES else unknown).append((name, value))
    if unknown:
        names = ", ".join(name for name, _ in unknown)
        _logger.warning("%s: ignored in the query: %s. QoS policies are %s", url, names, ", ".join(VALUES))
    return _checked(named, f"the query of {url}")


def resolve(argument: object, queries: Iterable[tuple[str, str]], environment: str | None) -> QoS:
    """A connection's QoS. argument: of connect(); queries: (query, URL) of its URLs, the first has precedence;
    environment: the value of INSANE_NATS_QOS. ValueError for a policy or value that does not exist."""
    policies = parse(environment, ENVIRONMENT)
    for query, url in reversed(list(queries)):
        policies.update(from_query(query, url))
    policies.update(parse(argument, "the argument qos"))
    return QoS(**policies)
