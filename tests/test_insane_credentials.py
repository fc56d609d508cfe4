"""INSANE's primitives in an application ID that asks for credentials."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

from insane_nats import insane
from tests import insane as programs
from tests.auth_node import AuthNode, auth_node
from tests.nsnd_client import until

SECRET = 'p"\\ä\t#'
USERS = """
[auth.{port}]
users = [
  {{user = "me", password = 'p"\\ä\t#'}},
  {{user = "limited", password = "p", permissions = {{publish = ["$INSANE.>"]}}}},
]
"""
PROGRAM = """
#include <nsn/nsn.h>
#include <stdio.h>

int main(void)
{
    if (nsn_init() < 0)
        return 1;
    nsn_options_t options = {.reliability = NSN_QOS_RELIABILITY_RELIABLE, .consumption = NSN_QOS_CONSUMPTION_LOW};
    nsn_source_t source = nsn_create_source(nsn_create_stream(options), 7);
    nsn_buffer_t *buffer = nsn_get_buffer(1, NSN_BLOCKING);
    buffer->data[0] = 'x';
    nsn_emit_data(source, buffer);
    nsn_close();
    puts("sent");
}
"""


@pytest.fixture
def node() -> Iterator[AuthNode]:
    with auth_node(USERS) as running:
        yield running


def exchange(a: insane.Session, b: insane.Session) -> None:
    with b.create_stream().create_sink(7) as sink, a.create_stream().create_source(7) as source:
        source.send(b"x")
        with sink.consume(timeout=10) as got:
            assert bytes(got) == b"x"


def test_who_gives_them_is_let_in(node: AuthNode) -> None:
    with insane.Session(node.port, user="me", password=SECRET) as a, insane.Session(node.port, user="me", password=SECRET) as b:
        exchange(a, b)
        assert {one["user"] for one in node.application()["sessions"]} == {"me"}


def test_a_token(node: AuthNode) -> None:
    node.configure("[auth.{port}]\ntoken = 's3cret'\n")
    node.reread()
    with insane.Session(node.port, token="s3cret") as a, insane.Session(node.port, token="s3cret") as b:
        exchange(a, b)
    with pytest.raises(insane.InsaneError, match="does not know these credentials"):
        insane.Session(node.port, token="other")


def test_who_is_not_let_in_is_told_why(node: AuthNode) -> None:
    with pytest.raises(insane.InsaneError, match=r"does not know these credentials: .* a user in \[auth\.") as raised:
        insane.Session(node.port, user="me", password="wrong")
    assert raised.value.errno == errno.EKEYREJECTED
    with pytest.raises(insane.InsaneError, match=r"asks for credentials, .*\(insane\.Session\(…, user=, password=\)"):
        insane.Session(node.port)
    with pytest.raises(insane.InsaneError, match=r"the user has permissions, .* use one without, or .* \$INSANE\.N") as raised:
        insane.Session(node.port, user="limited", password="p")
    assert raised.value.errno == errno.EACCES
    for user, password, token in (("me", None, None), (None, "p", None), ("me", "p", "t"), ("me", None, "t")):
        with pytest.raises(insane.InsaneError, match="either a user and a password, or a token"):
            insane.Session(node.port, user=user, password=password, token=token)
    with pytest.raises(insane.InsaneError, match="at most 255 bytes"):
        insane.Session(node.port, token="x" * 256)


def test_they_are_given_again_to_the_next_node(node: AuthNode) -> None:
    with insane.Session(node.port, user="me", password=SECRET) as a, insane.Session(node.port, user="me", password=SECRET) as b:
        sinks = [one.create_stream().create_sink(8) for one in (a, b)]
        node.kill(signal.SIGKILL)
        node.start()
        until(lambda: [sink.consume_nowait() for sink in sinks] and a.attached and b.attached, "both are attached again")
        exchange(a, b)


def test_from_the_configuration_of_the_program(node: AuthNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.configure(tmp_path, node.port, "user = \"me\"\npassword = 'p\"\\ä\t#'\n")
    program = programs.build_text(PROGRAM, tmp_path)
    monkeypatch.chdir(tmp_path)
    with insane.Session() as session, session.create_stream().create_sink(7) as sink:
        assert programs.run([str(program)], tmp_path) == "sent\n"
        with sink.consume(timeout=10) as got:
            assert bytes(got) == b"x"
    programs.configure(tmp_path, node.port, 'user = "me"\npassword = "wrong"\n')
    done = subprocess.run([str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "does not know these credentials" in done.stderr
    with insane.Session(user="me", password=SECRET):
        assert len(node.application()["sessions"]) == 1
