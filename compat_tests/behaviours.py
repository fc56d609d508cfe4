"""The list of behaviours (behaviours.toml) and what a run of the suite found out about them."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("behaviours.toml")


@dataclass(frozen=True)
class Behaviour:
    """One promise to a NATS client. `id` is "section/name"."""

    id: str
    section: str
    title: str
    text: str


def load_behaviours() -> dict[str, Behaviour]:
    """All behaviours by id, in the file's order."""
    with FILE.open("rb") as file:
        sections: dict[str, dict[str, str]] = tomllib.load(file)
    return {
        f"{section}/{name}": Behaviour(f"{section}/{name}", section, lines["title"], text)
        for section, lines in sections.items()
        for name, text in lines.items()
        if name != "title"
    }


@dataclass(frozen=True)
class Outcome:
    """How one test ended on one backend ("" for a test that has none): passed, failed or skipped."""

    test: str
    backend: str
    outcome: str
    covers: list[str]
    stricter: str


@dataclass
class Results:
    """The outcomes of a run. A test that failed in any phase has failed."""

    outcomes: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        key = (outcome.test, outcome.backend)
        if key not in self.outcomes or outcome.outcome == "failed":
            self.outcomes[key] = outcome

    def differences(self) -> list[str]:
        """Tests whose outcome is not the same on every backend, except those that say that ours is stricter."""
        by_test: dict[str, dict[str, Outcome]] = defaultdict(dict)
        for outcome in self.outcomes.values():
            by_test[outcome.test][outcome.backend] = outcome
        return [
            f"{test}: " + ", ".join(f"{backend} {outcome.outcome}" for backend, outcome in sorted(outcomes.items()))
            for test, outcomes in by_test.items()
            if len({outcome.outcome for outcome in outcomes.values()}) > 1
            and not any(outcome.stricter for outcome in outcomes.values())
        ]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(outcome) for outcome in self.outcomes.values()]

    @classmethod
    def from_json(cls, outcomes: list[dict[str, Any]]) -> Results:
        results = cls()
        for outcome in outcomes:
            results.add(Outcome(**outcome))
        return results
