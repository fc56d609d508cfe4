"""QoS policies: what is accepted, who has precedence, and what a mistake is told."""

from __future__ import annotations

import pytest

from insane_nats.shim.qos import QoS, resolve

URL = "nats://localhost:4222"


def test_defaults_are_those_of_the_nats_api() -> None:
    assert resolve(None, [], None) == QoS("reliable", "default", "adaptive", "default")


@pytest.mark.parametrize(
    "given",
    [{"consumption": "low", "datapath": "fast"}, "consumption=low, datapath=fast", QoS(consumption="low", datapath="fast")],
)
def test_forms(given: object) -> None:
    assert resolve(given, [], None) == QoS(consumption="low", datapath="fast")


def test_precedence_is_call_then_query_then_environment() -> None:
    queries = [("consumption=poll&datapath=fast", URL), ("consumption=low&determinism=timesensitive", URL)]
    environment = "reliability=unreliable,datapath=default,consumption=low"
    found = resolve({"datapath": "default"}, queries, environment)
    assert found == QoS("unreliable", "default", "poll", "timesensitive")


@pytest.mark.parametrize(
    ("argument", "query", "environment", "words"),
    [
        (
            {"consumption": "lazy"},
            "",
            None,
            "qos: QoS policy consumption cannot be 'lazy': it is one of adaptive, low, poll",
        ),
        ({"speed": "high"}, "", None, "argument qos: there is no QoS policy 'speed': they are reliability, datapath"),
        ("fast", "", None, "'fast' is not of the form policy=value"),
        (7, "", None, "the argument qos is a int"),
        (None, "datapath=warp", None, r"query of nats://localhost:4222: QoS policy datapath cannot be 'warp'"),
        (None, "", "datapath=", "INSANE_NATS_QOS: QoS policy datapath cannot be ''"),
    ],
)
def test_mistakes_name_place_and_choice(argument: object, query: str, environment: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(argument, [(query, URL)], environment)


def test_a_value_that_does_not_exist_is_refused_by_the_class_too() -> None:
    with pytest.raises(ValueError, match="reliability cannot be 'maybe'"):
        QoS(reliability="maybe")


def test_what_is_no_policy_in_a_query_is_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(None, [("datapath=fast&team=blue", URL)], None) == QoS(datapath="fast")
    assert "ignored in the query: team" in caplog.text
