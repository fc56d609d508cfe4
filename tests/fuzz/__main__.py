"""`make fuzz`, or python -m tests.fuzz: see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz import FuzzError, Outcome, build, fuzz, replay, targets


def show(target: str, outcome: Outcome) -> bool:
    """Prints what became of it; True when all was well."""
    if outcome.good:
        numbers = [line for line in outcome.said.splitlines() if "number_of_executed_units" in line or "DONE" in line]
        print(f"{target}: nothing found\n  " + "\n  ".join(numbers), flush=True)
        return True
    print(outcome.said)
    if outcome.artifact:
        print(f"{target}: again with: python -m tests.fuzz --replay {outcome.artifact} {target}", flush=True)
    return False


def main() -> int:
    """Returns 0 when no input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Coverage-guided fuzzing of libnsn.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one or more of {', '.join(targets())}; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default 60)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the one target on this input alone")
    options = parser.parse_args()
    chosen: list[str] = options.targets or targets()
    unknown = sorted(set(chosen) - set(targets()))
    if unknown:
        parser.error(f"there is no target {unknown[0]}: there are {', '.join(targets())}")
    if options.replay and len(chosen) != 1:
        parser.error("--replay needs the name of one target")
    try:
        build()
    except FuzzError as error:
        print(error, file=sys.stderr)
        return 2
    if options.replay:
        return 0 if show(chosen[0], replay(chosen[0], options.replay)) else 1
    failed = [target for target in chosen if not show(target, fuzz(target, options.seconds))]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
