"""Writes the table of behaviours and backends, and the behaviours that no test covers.

    python -m compat_tests.report [--results FILE] [--output FILE]

Without --results it runs the suite. Ends with 1 when something is uncovered, or failed without being excused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from compat_tests.backend import NAMES, REPOSITORY
from compat_tests.behaviours import Behaviour, Results, load_behaviours

if TYPE_CHECKING:
    from compat_tests.behaviours import Outcome

TITLES = {"nats": "nats-py, nats-server", "insane": "insane_nats"}


def run_suite() -> Results:
    """Runs the whole suite; its own output goes to stderr."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "results.json"
        command = [sys.executable, "-m", "pytest", "-q", "compat_tests", "--results", str(path)]
        subprocess.run(command, cwd=REPOSITORY, stdout=sys.stderr, check=False)
        return Results.from_json(json.loads(path.read_text()))


def verdict(outcomes: list[Outcome]) -> str:
    """One cell: how the tests of a behaviour ended on one backend."""
    if not outcomes:
        return "–"
    failed = [outcome for outcome in outcomes if outcome.outcome == "failed"]
    passed = [outcome for outcome in outcomes if outcome.outcome == "passed"]
    if not failed:
        return f"yes ({len(passed)})" if passed else "not run"
    if all(outcome.stricter for outcome in failed):
        return f"not always ({len(failed)} of {len(outcomes)} fail)"
    return f"**no** ({len(failed)} of {len(outcomes)} fail)"


class Report:
    """What a run says about each behaviour."""

    def __init__(self, results: Results) -> None:
        self.behaviours = load_behaviours()
        self.outcomes: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
        self.stricter: dict[str, set[str]] = defaultdict(set)
        for outcome in results.outcomes.values():
            for name in outcome.covers:
                self.outcomes[name, outcome.backend].append(outcome)
                if outcome.stricter:
                    self.stricter[name].add(outcome.stricter)
        self.backends = [name for name in NAMES if any(backend == name for _, backend in self.outcomes)]
        self.tests = len({outcome.test for outcome in results.outcomes.values()})

    @property
    def uncovered(self) -> list[Behaviour]:
        covered = {name for name, _ in self.outcomes}
        return [behaviour for behaviour in self.behaviours.values() if behaviour.id not in covered]

    @property
    def failed(self) -> list[str]:
        return sorted(
            {
                f"{outcome.test} ({outcome.backend})"
                for outcomes in self.outcomes.values()
                for outcome in outcomes
                if outcome.outcome == "failed" and not (outcome.stricter and outcome.backend == "nats")
            }
        )

    def markdown(self) -> str:
        lines = [
            "# What programs can rely on",
            "",
            "Written by `python -m compat_tests.report` from a run of the conformance suite, which runs the same tests with",
            "nats-py against a real nats-server and with insane_nats. In brackets, how many tests pin the line.",
            f"{self.tests} tests, {len(self.behaviours)} behaviours.",
        ]
        section = ""
        for behaviour in self.behaviours.values():
            if behaviour.section != section:
                section = behaviour.section
                head = " | ".join(TITLES[name] for name in self.backends)
                number = "" if section == "api" else f"{section} "
                rule = "|---|" + "---|" * len(self.backends)
                lines += ["", f"## {number}{behaviour.title}", "", f"| behaviour | {head} |", rule]
            cells = " | ".join(verdict(self.outcomes[behaviour.id, name]) for name in self.backends)
            notes = "".join(f" *Ours is stricter: {reason}.*" for reason in sorted(self.stricter[behaviour.id]))
            lines.append(f"| {behaviour.text.replace('|', '&#124;')}{notes} | {cells} |")
        lines += ["", "## Not covered", ""]
        lines += [f"- {behaviour.id}: {behaviour.text}" for behaviour in self.uncovered] or ["Every line has a test."]
        if self.failed:
            lines += ["", "## Failed", "", *(f"- {name}" for name in self.failed)]
        return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="what `pytest compat_tests --results FILE` wrote (default: run it)")
    parser.add_argument("--output", type=Path, help="where the Markdown goes (default: stdout)")
    arguments = parser.parse_args()
    results = Results.from_json(json.loads(arguments.results.read_text())) if arguments.results else run_suite()
    report = Report(results)
    if arguments.output:
        arguments.output.write_text(report.markdown())
    else:
        print(report.markdown(), end="")
    for behaviour in report.uncovered:
        print(f"no test covers {behaviour.id}", file=sys.stderr)
    return 1 if report.uncovered or report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
