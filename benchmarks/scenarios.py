"""What is measured: scenarios (which programs run with which task), and the rows of the table that are read from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """An active program, whose result counts, and the programs that answer it.

    options: of the active program's task, shared with the answering ones. qos: the query of our URL; theirs has none.
    plain: both sides talk to the nats-server, ours over plain NATS.
    limited: which programs' user has permissions, on servers that have users.
    ours_alone: there is nothing of theirs to compare with; rows have `against`.
    """

    active: str
    passive: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    qos: str = ""
    quick: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    limited: tuple[str, ...] = ()
    ours_alone: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table: one metric of a scenario, and how many times better than theirs it is meant to be.

    higher: a higher figure is the better one. p99: theirs/ours of the 99th percentile must also be at least 1.
    against: a scenario whose figure on our side stands for theirs: the row compares us with ourselves.
    """

    name: str
    title: str
    scenario: str
    metric: str
    unit: str
    target: float
    higher: bool = False
    p99: bool = False
    against: str = ""


# Few distinct payloads when they are large: a program that publishes large messages has them in the processor's cache.
LARGE: dict[str, Any] = {"period": 16}


def round_trips(count: int, warm_up: int, qos: str = "", beside: tuple[str, ...] = (), **options: Any) -> Scenario:
    quick = {"count": max(2, count // 10)}
    return Scenario("ping", ("pong", *beside), {"count": count, "warm_up": warm_up, **options}, qos, quick)


def bursts(number: int, burst: int, subscribers: int = 1, **options: Any) -> Scenario:
    """One warm-up burst is not counted."""
    fixed = {"burst": burst, "subscribers": subscribers, "warm_up": 1, **options}
    return Scenario("source", ("sink",) * subscribers, {"count": number * burst, **fixed}, quick={"count": burst})


def publishing(*beside: str, **options: Any) -> Scenario:
    burst = 25_000
    return Scenario("publisher", ("sink", *beside), {"count": 8 * burst, "burst": burst, "warm_up": 1, **options},
                    quick={"count": burst}, ours_alone=bool(beside))


def in_place(size: int, ours_alone: bool = False) -> Scenario:
    return Scenario("write_in_place", ("read_in_place",), {"count": 500, "warm_up": 50, "size": size, **LARGE},
                    quick={"count": 20, "warm_up": 2}, ours_alone=ours_alone)


def requests(count: int, qos: str = "", **options: Any) -> Scenario:
    quick = {"count": count // 10}
    return Scenario("requester", ("responder",), {"count": count, "warm_up": 320, **options}, qos, quick)


SCENARIOS: dict[str, Scenario] = {
    "rtt-64": round_trips(5000, 500),
    "rtt-64-low": round_trips(5000, 500, "consumption=low"),
    "rtt-64-poll": round_trips(5000, 500, "consumption=poll"),
    "rtt-64-paced-1": round_trips(8, 1, rate=1),
    "rtt-64-paced-100": round_trips(300, 10, rate=100),
    "rtt-1m": round_trips(200, 20, size=1 << 20, **LARGE),
    "rtt-64-busy": round_trips(5000, 500, beside=("busy",)),
    "rate-64": bursts(8, 50_000),
    "rate-64-iterator": bursts(8, 50_000, way="iterator"),
    "rate-64-next": bursts(4, 50_000, way="next_msg"),
    "rate-64k": bursts(12, 512, size=65536, **LARGE),
    "fanout-64": bursts(4, 25_000, subscribers=4),
    "fanout-64k": bursts(8, 256, subscribers=4, size=65536, **LARGE),
    "subjects-300k": bursts(6, 50_000, distinct_subjects=True),
    "publish-64": publishing(),
    "publish-64-churn": publishing("churn", churn=1000),
    "in-place-1m": in_place(1 << 20),
    "in-place-16m": in_place(16 << 20, ours_alone=True),
    "requests": requests(4000),
    "requests-poll": requests(4000, qos="consumption=poll"),
    "requests-64": requests(16_000, in_flight=64),
    "requests-loop": Scenario("requests_on_one_loop", (), {"count": 4000, "warm_up": 300}, quick={"count": 400}),
    "subscribes": Scenario("subscribes", (), {"count": 5000}),
    "connects": Scenario("connects", (), {"count": 200}, quick={"count": 20}),
    "paced-1000": Scenario("paced_source", ("sink",), {"count": 5000, "burst": 1000, "rate": 1000}, quick={"count": 1000}),
    "memory": Scenario("memory", (), {"count": 1000}),
}

SCENARIOS |= {f"plain-{name}": replace(SCENARIOS[name], plain=True) for name in ("rtt-64", "rate-64", "requests")}

SCENARIOS |= {
    "limited-rtt-64": replace(SCENARIOS["rtt-64"], limited=("ping",)),
    "limited-publish-64": replace(SCENARIOS["rate-64"], limited=("source",)),
    "limited-receive-64": replace(SCENARIOS["rate-64"], limited=("sink",)),
}

ROWS: tuple[Row, ...] = (
    Row("rtt-64", "RTT 64 B", "rtt-64", "p50_us", "µs", 50, p99=True),
    Row("rtt-64-low", "RTT 64 B, consumption=low", "rtt-64-low", "p50_us", "µs", 5, p99=True),
    Row("rtt-64-poll", "RTT 64 B, consumption=poll", "rtt-64-poll", "p50_us", "µs", 60, p99=True),
    Row("rtt-64-paced-1", "RTT 64 B, 1 a second", "rtt-64-paced-1", "p50_us", "µs", 3, p99=True),
    Row("rtt-64-paced-100", "RTT 64 B, 100 a second", "rtt-64-paced-100", "p50_us", "µs", 3, p99=True),
    Row("rtt-64-busy", "RTT 64 B, one of the cores busy", "rtt-64-busy", "p50_us", "µs", 1, p99=True),
    Row("rtt-1m", "RTT 1 MiB", "rtt-1m", "p50_us", "µs", 10, p99=True),
    Row("rate-64", "1 → 1, 64 B, callback", "rate-64", "received_s", "msg/s", 5, higher=True),
    Row("rate-64-iterator", "1 → 1, 64 B, async for", "rate-64-iterator", "received_s", "msg/s", 12, higher=True),
    Row("rate-64-next", "1 → 1, 64 B, next_msg", "rate-64-next", "received_s", "msg/s", 20, higher=True),
    Row("rate-64k", "1 → 1, 64 KiB", "rate-64k", "received_s", "msg/s", 30, higher=True),
    Row("fanout-64", "1 → 4, 64 B", "fanout-64", "received_s", "msg/s", 4, higher=True),
    Row("fanout-64k", "1 → 4, 64 KiB", "fanout-64k", "received_s", "msg/s", 18, higher=True),
    Row("subjects-300k", "300,000 subjects, 64 B", "subjects-300k", "received_s", "msg/s", 2, higher=True),
    Row("publish-64", "publish, 64 B", "publish-64", "received_s", "msg/s", 2.5, higher=True),
    Row("publish-64-churn", "publish under churn, ours : ours", "publish-64-churn", "received_s", "msg/s", 0.8, higher=True,
        against="publish-64"),
    Row("in-place-1m", "written and read in place, 1 MiB", "in-place-1m", "p50_us", "µs", 10, p99=True),
    Row("in-place-16m", "16 MiB in place : 1 MiB in place", "in-place-16m", "p50_us", "µs", 0.5, against="in-place-1m"),
    Row("requests", "requests, two programs", "requests", "received_s", "1/s", 20, higher=True),
    Row("requests-poll", "requests, consumption=poll", "requests-poll", "received_s", "1/s", 30, higher=True),
    Row("requests-64", "requests, 64 in flight", "requests-64", "received_s", "1/s", 5, higher=True),
    Row("requests-loop", "requests, one loop", "requests-loop", "received_s", "1/s", 2, higher=True),
    Row("subscribes", "5,000 subscribes and flush", "subscribes", "milliseconds", "ms", 1),
    Row("connects", "connect and close", "connects", "each_us", "µs", 1),
    Row("memory", "memory, 1,000 subscriptions", "memory", "kib", "KiB", 1),
    Row("cpu-64", "CPU per message, 64 B flat out", "rate-64", "cpu_us", "µs", 2),
    Row("cpu-paced-1000", "CPU per message, 1,000 a second", "paced-1000", "cpu_us", "µs", 1),
    Row("limited-rtt-64", "permissions: RTT 64 B", "limited-rtt-64", "p50_us", "µs", 1, p99=True),
    Row("limited-publish-64", "permissions: it publishes, 64 B", "limited-publish-64", "received_s", "msg/s", 1, higher=True),
    Row("limited-receive-64", "permissions: it receives, 64 B", "limited-receive-64", "received_s", "msg/s", 1, higher=True),
    Row("plain-rtt-64", "plain NATS: RTT 64 B", "plain-rtt-64", "p50_us", "µs", 0.95),
    Row("plain-rate-64", "plain NATS: 1 → 1, 64 B", "plain-rate-64", "received_s", "msg/s", 0.95, higher=True),
    Row("plain-requests", "plain NATS: requests", "plain-requests", "received_s", "1/s", 0.95, higher=True),
)
