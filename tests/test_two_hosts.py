"""What connect() does about another host, with a second host that is real: network namespaces and a cable between them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests import two_hosts
from tools.servers import ROOT, free_port

PORT = free_port()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """How each case went."""
    if missing := two_hosts.missing():
        pytest.skip(missing)
    command = two_hosts.alone(sys.executable, "-m", "tests.two_hosts", str(PORT))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    cases: dict[str, Any] = json.loads(done.stdout)
    return cases


@pytest.mark.parametrize("case", ["refused", "refused, tls", "refused, and nobody here"])
def test_host_that_refuses_gets_nats_pys_errors(found: dict[str, Any], case: str) -> None:
    assert (found[case]["error"], found[case]["words"]) == ("NoServersError", "nats: no servers available for connection")
    assert set(found[case]["reported"]) == {"ConnectionRefusedError"}


def test_host_that_does_not_answer_is_given_up_in_time(found: dict[str, Any]) -> None:
    assert found["no such host"]["error"] == "NoServersError"
    assert set(found["no such host"]["reported"]) <= {"TimeoutError", "OSError"}
    assert found["no such host"]["seconds"] < 5


def test_nothing_was_started_here(found: dict[str, Any]) -> None:
    assert not found["node here"]


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("node, tls", "tls://"),
        ("node, tls context", "a TLS context"),
        ("node, credentials", "credentials"),
        ("node, credentials in the URL", "credentials"),
        ("node, token", "credentials"),
    ],
)
def test_nothing_secret_goes_to_a_node_of_another_host(found: dict[str, Any], case: str, what: str) -> None:
    assert found[case]["error"] == "NotEncryptedError"
    assert f"is not encrypted yet, but {what} asked for that" in found[case]["words"]
    assert "nats-server with TLS" in found[case]["words"]
    assert f"{two_hosts.THERE}:{PORT}" in found[case]["words"]


@pytest.mark.parametrize("case", ["server", "server, credentials in the URL"])
def test_server_of_another_host_is_plain_nats(found: dict[str, Any], case: str) -> None:
    assert (found[case]["error"], found[case]["insane"]) == (None, False)
    assert found[case]["log"] == [f"plain NATS, no shared memory: at {two_hosts.THERE}:{PORT} is a NATS server"]


def test_no_text_shows_a_password(found: dict[str, Any]) -> None:
    assert "secret" not in json.dumps(found)
