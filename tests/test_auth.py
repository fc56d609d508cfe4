"""Users of an application ID: what nsnd.cfg may say of them, what nsnd asks and answers, and what is kept secret."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import bcrypt
import nkeys
import pytest

if sys.platform != "linux":
    pytest.skip("the fabric is for Linux", allow_module_level=True)

from compat_tests import jwts
from nsnd import protocol as p
from nsnd.config import ConfigError, load_config
from nsnd.credentials import Answer, Secret, answer_from
from tests.auth_node import AuthNode, auth_node, write
from tests.nsnd_client import RawSession, child, runtime_directory

SECRET = "v3ry-s3cret"
HASH = bcrypt.hashpw(SECRET.encode(), bcrypt.gensalt(4)).decode()
SEED = jwts.new_seed(nkeys.PREFIX_BYTE_USER)
KEY = jwts.public(SEED)
USERS = f"""
[auth.{{port}}]
users = [
  {{{{user = "me", password = "{SECRET}"}}}},
  {{{{user = "hashed", password = "{HASH}", account = "A"}}}},
  {{{{user = "other", password = "{SECRET}", account = "B"}}}},
  {{{{nkey = "{KEY}", account = "A"}}}},
]
"""


@pytest.fixture
def node() -> Iterator[AuthNode]:
    with auth_node(USERS) as running:
        yield running


# --- configuration ----------------------------------------------------------------------------------------------------


def section(text: str) -> str:
    return f"[auth.4222]\n{text}\n"


@pytest.mark.parametrize(("text", "words"), [
    ("auth = 1\n", "auth: must be a section"),
    ("[auth]\ntoken = 'x'\n", "auth: has sections [auth.N] alone"),
    ("[auth.x]\ntoken = 'x'\n", "auth: has sections [auth.N] alone"),
    ("[auth.0]\ntoken = 'x'\n", "auth: has sections [auth.N] alone"),
    ("[auth.70000]\ntoken = 'x'\n", "1 to 65535"),
    ("[auth]\n4222 = 1\n", "auth.4222: must be a section"),
    (section(""), "auth.4222: needs either a token or users"),
    (section("token = 'x'\nusers = [{user = 'a', password = 'b'}]"), "auth.4222: needs either a token or users"),
    (section("tokn = 's3cret'"), "auth.4222.tokn: unknown key; allowed are token, users (did you mean token?)"),
    (section("token = 12345"), "auth.4222.token: must be a text"),
    (section("token = ''"), "auth.4222.token: must be a text"),
    (section("token = '$2b$10$s3cret'"), "auth.4222.token: begins as bcrypt does, and is no whole hash"),
    (section("users = []"), "auth.4222.users: must be a list of 1 to 1024 users"),
    (section("users = 's3cret'"), "auth.4222.users: must be a list"),
    (section("users = ['s3cret']"), "auth.4222.users: must be a list"),
    (section("users = [{user = 'a', pasword = 's3cret'}]"), "auth.4222.users[0].pasword: unknown key"),
    (section("users = [{user = 'a'}]"), "auth.4222.users[0].password: must be there"),
    (section("users = [{password = 's3cret'}]"), "auth.4222.users[0].user: must be there"),
    (section("users = [{user = 1, password = 's3cret'}]"), "auth.4222.users[0].user: must be there, a text"),
    (section("users = [{user = 'a', password = ['s3cret']}]"), "auth.4222.users[0].password: must be a text"),
    (section("users = [{user = 'a', password = 'b'}, {user = 'a', password = 's3cret'}]"), "users[1]: the same user"),
    (section(f"users = [{{nkey = '{KEY}'}}, {{nkey = '{KEY}'}}]"), "users[1]: the same nkey stands above"),
    (section(f"users = [{{nkey = '{KEY}', password = 's3cret'}}]"), "users[0]: a user has either an nkey, or"),
    (section(f"users = [{{nkey = '{KEY[:-1]}'}}]"), "users[0].nkey: must be a user's public nkey"),
    (section(f"users = [{{nkey = '{SEED.decode()}'}}]"), "users[0].nkey: must be a user's public nkey"),
    (section(f"users = [{{nkey = '{KEY[:20]}{'B' if KEY[20] == 'A' else 'A'}{KEY[21:]}'}}]"), "users[0].nkey: must be"),
    (section("users = [{user = 'a', password = 'b', account = ''}]"), "users[0].account: must be a name"),
    (section("users = [{user = 'a', password = 'b', account = '$SYS'}]"), "users[0].account: must be a name"),
    (section("users = [{user = 'a', password = 'b', permissions = 1}]"), "users[0].permissions: must be a table"),
])
def test_errors_name_the_place_and_what_is_allowed_and_no_secret(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "nsnd.cfg", text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert words in str(raised.value)
    assert "s3cret" not in str(raised.value)
    assert SEED.decode() not in str(raised.value)


def test_a_file_with_secrets_that_others_may_read_is_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path / "nsnd.cfg", section("token = 'x'"))
    assert load_config(path).warnings == ()
    path.chmod(0o640)
    (warning,) = load_config(path).warnings
    assert f"chmod 600 {path}" in warning


def test_a_configuration_does_not_show_its_secrets(tmp_path: Path) -> None:
    text = repr(load_config(write(tmp_path / "nsnd.cfg", USERS.format(port=4222))))
    assert "hashed" in text
    assert SECRET not in text
    assert HASH not in text


def test_hashes_of_every_kind_that_bcrypt_has_had(tmp_path: Path) -> None:
    for kind in "abxy":
        text = f"$2{kind}$" + HASH[4:]
        (user,) = load_config(write(tmp_path / "nsnd.cfg", section(f"users = [{{user = 'u', password = '{text}'}}]"))
                              ).auth[4222].users.values()
        assert user.secret is not None
        assert user.secret.matches(SECRET)
        assert not user.secret.matches(SECRET + "x")


@pytest.mark.parametrize("given", ["", "\0", "a\0b", "x" * 10_000, "ü" * 100, "\ud800"])
def test_odd_passwords_do_not_match(given: str) -> None:
    for secret in (Secret(HASH), Secret(SECRET)):
        assert not secret.matches(given)


@pytest.mark.parametrize("document", [b"", b"[]", b"{", b"\xff", b"[" * 20_000, b"1"])
def test_credentials_that_are_no_object_are_not_shown(document: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is not (?:JSON|a JSON object)$"):
        answer_from(document)


def test_credentials_of_other_kinds_count_as_none() -> None:
    assert answer_from(b'{"user": 1, "pass": ["x"], "auth_token": null, "more": {}}') == Answer()
    assert SECRET not in repr(Answer(password=SECRET))


# --- control socket ---------------------------------------------------------------------------------------------------


def test_each_user_is_let_in_by_what_is_its(node: AuthNode) -> None:
    for credentials in ({"user": "me", "password": SECRET}, {"user": "hashed", "password": SECRET}):
        node.stranger().log_in(**credentials)
    session = node.stranger()
    nonce = session.challenged()
    session.answer(nkey=KEY, sig=jwts.sign(SEED, nonce))
    session.welcomed()


def test_each_challenge_has_a_nonce_of_its_own(node: AuthNode) -> None:
    session, again = node.stranger(), node.stranger()
    old, new = session.challenged(), again.challenged()
    assert old != new
    again.answer(nkey=KEY, sig=jwts.sign(SEED, old))
    assert again.refused() == p.Refused(errno.EKEYREJECTED, "Authorization Violation")


@pytest.mark.parametrize("credentials", [
    {}, {"user": "me"}, {"user": "me", "password": HASH}, {"user": "hashed", "password": HASH},
    {"user": "nobody", "password": SECRET},
    {"auth_token": SECRET}, {"nkey": KEY}, {"nkey": KEY, "sig": "AAAA"}, {"nkey": KEY, "sig": "é"},
    {"nkey": KEY, "sig": "", "user": "me", "password": SECRET},
], ids=str)
def test_others_are_refused_in_the_words_of_nats(node: AuthNode, credentials: dict[str, str]) -> None:
    session = node.stranger()
    session.challenged()
    session.answer(**credentials)
    assert session.refused() == p.Refused(errno.EKEYREJECTED, "Authorization Violation")
    assert node.application()["sessions"] == []


def test_who_does_not_answer_challenges_is_told_the_way_out(node: AuthNode) -> None:
    session = node.stranger()
    session.connect()
    session.say_hello()
    refused = session.refused()
    assert refused.errno == errno.EACCES
    assert f"application ID {node.port} asks for credentials" in refused.text
    assert "[auth.*]" in refused.text


def test_application_ids_without_users_are_open(node: AuthNode) -> None:
    session = RawSession(node.socket, node.port + 1)
    session.attach()


def test_what_does_not_belong_before_the_welcome_is_refused(node: AuthNode) -> None:
    session = node.stranger()
    session.challenged()
    session.send(p.PacketType.INTEREST, bytes(p.INTEREST.size - p.PACKET.size))
    assert "INTEREST came before HELLO" in session.refused().text
    session.challenged()
    session.say_hello(answers=True)
    assert "HELLO came twice" in session.refused().text
    session.connect()
    session.answer(user="me", password=SECRET)
    assert "nobody had asked for them" in session.refused().text
    session.log_in(user="me", password=SECRET)
    session.answer(user="me", password=SECRET)
    assert "nobody had asked for them" in session.refused().text
    session.challenged()
    session.answer(user="hashed", password="x")
    session.answer(user="hashed", password=SECRET)
    assert session.refused().errno in (errno.EPROTO, errno.EKEYREJECTED)


def test_credentials_that_cannot_be_read_are_refused_and_not_logged(node: AuthNode) -> None:
    session = node.stranger()
    session.challenged()
    session.sock.send(p.pack_credentials(SECRET.encode()))
    assert session.refused() == p.Refused(errno.EPROTO, "CREDENTIALS cannot be read: it is not JSON")
    session.challenged()
    session.sock.send(p.pack_credentials(b"{}") + b" ")
    assert "CREDENTIALS says 2 bytes, and 3 came" in session.refused().text
    assert SECRET not in node.log()


def test_secrets_are_in_no_log_status_record_or_command_line(node: AuthNode) -> None:
    node.stranger().log_in(user="me", password=SECRET)
    wrong = node.stranger()
    wrong.challenged()
    wrong.answer(user="me", password=SECRET + "-wrong")
    wrong.refused()
    node.reread()
    assert node.process is not None
    places = [node.log(), str(node.status()), Path(f"/proc/{node.process.pid}/cmdline").read_text(),
              (node.directory / "node").read_text()]
    for file in node.directory.rglob("*"):
        if file.is_file() and file != node.config:
            places.append(file.read_bytes().decode("latin-1"))
    assert not any(SECRET in place or HASH in place for place in places)


def test_nobody_waits_for_the_hash_of_another(node: AuthNode) -> None:
    slow = bcrypt.hashpw(SECRET.encode(), bcrypt.gensalt(14)).decode()
    node.configure(f"[auth.{node.port}]\nusers = [{{{{user = 'slow', password = '{slow}'}}}}]\n")
    node.reread()
    session = node.stranger()
    session.challenged()
    session.answer(user="slow", password=SECRET)
    other = RawSession(node.socket, node.port + 1)
    other.attach()
    other.subscribe(1, "x")
    assert session.nothing_comes(0.001)
    session.welcomed()


def test_what_is_reread_while_a_password_is_looked_at_counts(node: AuthNode) -> None:
    slow = bcrypt.hashpw(SECRET.encode(), bcrypt.gensalt(13)).decode()
    node.configure(f"[auth.{node.port}]\nusers = [{{{{user = 'slow', password = '{slow}'}}}}]\n")
    node.reread()
    session = node.stranger()
    session.challenged()
    session.answer(user="slow", password=SECRET)
    node.configure("[auth.{port}]\ntoken = 'another'\n")
    node.reread()
    assert session.refused().errno == errno.EKEYREJECTED


# --- accounts and lives ----------------------------------------------------------------------------------------------


def test_status_shows_users_and_accounts(node: AuthNode) -> None:
    node.stranger("one").log_in(user="me", password=SECRET)
    two = node.stranger("two")
    two.log_in(user="hashed", password=SECRET)
    two.subscribe(1, "x")
    shown = {application["account"]: application for application in node.status()["applications"]}
    assert set(shown) == {"$G", "A"}
    (mine,) = shown["$G"]["sessions"]
    (hashed,) = shown["A"]["sessions"]
    assert (mine["name"], mine["user"], shown["$G"]["subscriptions"]) == ("one", "me", 0)
    assert (hashed["name"], hashed["user"], shown["A"]["subscriptions"]) == ("two", "hashed", 1)


def test_a_session_reaches_none_of_another_account(node: AuthNode) -> None:
    """Their slots have the same numbers and generations: what it hands over goes to its own account's alone."""
    a, b, to = (node.stranger() for _ in range(3))
    a.log_in(user="hashed", password=SECRET)
    b.log_in(user="other", password=SECRET)
    to.log_in(user="other", password=SECRET)
    a.link(to, 1)
    assert a.peer_gone() == (to.slot, to.generation)
    assert to.nothing_comes()
    b.link(to, 2)
    assert to.take_link() == (b.slot, b.generation, 2)


def test_the_directory_of_an_account_cannot_be_guessed(node: AuthNode) -> None:
    a, b = node.stranger(), node.stranger()
    directories = {a.log_in(user="hashed", password=SECRET).directory, b.log_in(user="other", password=SECRET).directory}
    assert len(directories) == 2
    for directory in directories:
        number, _, token = Path(directory).name.partition("-")
        assert number == str(node.port)
        assert len(token) == 32
        assert stat.S_IMODE(os.stat(f"{directory}/account").st_mode) == 0o600


def test_sessions_keep_their_place_over_a_restart(node: AuthNode) -> None:
    session = node.stranger()
    before = session.log_in(user="hashed", password=SECRET)
    session.bind_bell()
    session.subscribe(1, "x")
    node.kill(signal.SIGTERM)
    node.start()
    (application,) = (one for one in node.status()["applications"] if one["account"] == "A")
    assert application["subscriptions"] == 1
    after = session.log_in(user="hashed", password=SECRET)
    assert after.reattached
    assert (after.slot, after.generation, after.directory) == (before.slot, before.generation, before.directory)


def test_who_comes_back_without_good_credentials_has_ended(node: AuthNode) -> None:
    session = node.stranger()
    session.log_in(user="hashed", password=SECRET)
    session.bind_bell()
    session.subscribe(1, "x")
    node.kill(signal.SIGTERM)
    node.configure("[auth.{port}]\ntoken = 'another'\n")
    node.start()
    session.challenged()
    session.answer(user="hashed", password=SECRET)
    session.refused()
    assert sum(application["subscriptions"] for application in node.status()["applications"]) == 0


def test_leaving_needs_no_credentials_and_only_the_process_itself_can(node: AuthNode) -> None:
    session = node.stranger()
    session.log_in(user="me", password=SECRET)
    session.bind_bell()

    def leave_in_its_name() -> None:
        session.challenged()
        session.goodbye()

    with child(leave_in_its_name):
        (one,) = node.application()["sessions"]
        assert one["pid"] == os.getpid()
    session.challenged()
    session.goodbye()
    assert node.application()["sessions"] == []


def test_who_is_in_another_account_now_leaves_the_old_one(node: AuthNode) -> None:
    session = node.stranger()
    session.log_in(user="hashed", password=SECRET)
    session.subscribe(1, "x")
    session.log_in(user="other", password=SECRET)
    shown = {one["account"]: one for one in node.status()["applications"]}
    assert (len(shown["A"]["sessions"]), shown["A"]["subscriptions"], len(shown["B"]["sessions"])) == (0, 0, 1)


def test_what_an_application_id_used_goes_with_it() -> None:
    with runtime_directory() as directory:
        node = AuthNode(directory)
        node.configure(USERS)
        node.start()
        session = node.stranger()
        path = Path(session.log_in(user="hashed", password=SECRET).directory)
        assert path.exists()
        session.goodbye()
        assert node.kill(signal.SIGTERM) == 0
        assert not path.exists()
        with contextlib.suppress(FileNotFoundError):
            assert not [entry for entry in directory.iterdir() if entry.is_dir()]
