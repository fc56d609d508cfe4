"""The benchmark runs: both sides, real processes, nothing lost; and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import figure, line
from benchmarks.run import Outcome
from benchmarks.scenarios import ROWS, SCENARIOS, Row
from tools.servers import ROOT

RATE = Row("rate", "a rate", "rate-64", "received_s", "msg/s", 2, higher=True)
TIME = Row("time", "a time", "rtt-64", "p50_us", "µs", 2, p99=True)


def test_every_row_has_its_scenario_and_every_scenario_a_row() -> None:
    assert {row.scenario for row in ROWS} | {row.against for row in ROWS} - {""} == set(SCENARIOS)


def test_ratio_is_the_median_of_the_ratios_of_rounds() -> None:
    rounds = [(Outcome({"received_s": a}), Outcome({"received_s": b})) for a, b in ((100, 300), (200, 300), (100, 1000))]
    result = figure(RATE, rounds)
    assert result.main is not None
    assert result.main.ratio == pytest.approx(3)
    assert result.reached
    assert result.rounds == 3


def test_round_with_loss_does_not_count_and_is_told() -> None:
    slow, fast = Outcome({"received_s": 100}), Outcome({"received_s": 300})
    rounds = [(slow, fast), (Outcome(trouble="7 lost"), fast)]
    result = figure(RATE, rounds)
    assert result.main is not None
    assert (result.rounds, result.main.ratio) == (1, 3)
    assert "theirs: 7 lost" in line(result)
    nothing = figure(RATE, rounds[1:])
    assert nothing.main is None
    assert not nothing.reached
    assert "no figure: theirs: 7 lost" in line(nothing)


def test_round_trips_need_p99_no_worse() -> None:
    theirs = Outcome({"p50_us": 100, "p99_us": 200})
    assert figure(TIME, [(theirs, Outcome({"p50_us": 10, "p99_us": 199}))]).reached
    assert not figure(TIME, [(theirs, Outcome({"p50_us": 10, "p99_us": 201}))]).reached


def test_both_sides_run(tmp_path: Path) -> None:
    results = tmp_path / "figures.json"
    names = ["rtt-64", "rate-64k", "fanout-64k", "requests-loop", "cpu-paced-1000", "limited-rtt-64", "plain-rtt-64"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(results), *names],
        cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert [one["row"]["name"] for one in rows] == names
    assert all(one["main"]["ratio"] > 0 for one in rows)
