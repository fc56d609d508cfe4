"""nsnd.cfg and nsn-app.cfg: found where they should be, read as INSANE writes them, and errors that say what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsnd.config import Config, ConfigError, find_config, load_config

INSANES_OWN = """
[global]
app_num = 64
io_bufs_num = 1024
io_bufs_size = 2048
shm_size = 64
max_tx_burst = 32
max_rx_burst = 32
log_level = "debug"

[rest]
port = 8080
host = "0.0.0.0"

[peers.left]
ip = "10.0.0.1"

[plugins.udpdpdk]
ip = "10.0.0.2"
eal_args = ["-l", "0-1"]
"""


def write(directory: Path, text: str, name: str = "nsnd.cfg") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_without_a_file_the_defaults_hold() -> None:
    config = load_config(None)
    assert config == Config()
    assert (config.port, config.addr, config.max_payload, config.log_level) == (4222, "127.0.0.1", 1 << 20, "info")


def test_insanes_own_file_is_accepted_as_it_is_and_each_key_without_meaning_is_warned_of_once(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, INSANES_OWN))
    assert config.log_level == "debug"
    assert config.peers == {"left": {"ip": "10.0.0.1"}}
    for key in ("global.app_num", "global.io_bufs_num", "global.io_bufs_size", "global.shm_size", "global.max_tx_burst",
                "global.max_rx_burst", "rest.port", "rest.host", "peers.left", "plugins.udpdpdk"):
        assert sum(f"{key} has no meaning here: " in warning for warning in config.warnings) == 1
    assert len(config.warnings) == 10


def test_keys_with_a_meaning_are_taken(tmp_path: Path) -> None:
    text = '[global]\nport = 5000\naddr = "0.0.0.0"\nmax_payload = 67108864\nlog_level = "warn"\n'
    config = load_config(write(tmp_path, text))
    assert (config.port, config.addr, config.max_payload, config.log_level) == (5000, "0.0.0.0", 64 << 20, "warn")
    assert config.warnings == ()


@pytest.mark.parametrize(("text", "words"), [
    ("[global]\nlog_levle = 'info'\n", ["global.log_levle", "unknown key", "did you mean log_level?", "max_payload"]),
    ("[globl]\n", ["globl", "unknown section", "[global]", "[peers.*]"]),
    ("port = 1\n", ["port", "outside of any section", "[global]"]),
    ("global = 1\n", ["global", "must be a section"]),
    ("[global]\nport = 70000\n", ["global.port", "70000", "1 to 65535"]),
    ("[global]\nport = true\n", ["global.port", "True", "whole number"]),
    ("[global]\nport = '4222'\n", ["global.port", "'4222'", "whole number"]),
    ("[global]\nmax_payload = 67108865\n", ["global.max_payload", "1 to 67108864"]),
    ("[global]\nlog_level = 'loud'\n", ["global.log_level", "'loud'", '"error"', '"trace"']),
    ("[global]\naddr = 'here'\n", ["global.addr", "'here'", "IP address"]),
    ("[global]\nio_bufs_num = -1\n", ["global.io_bufs_num", "-1"]),
    ("[rest]\nport = 0\n", ["rest.port", "0", "1 to 65535"]),
    ("[peers]\nleft = 1\n", ["peers.left", "[peers.left]"]),
    ("[global\n", ["not valid TOML", "line 1"]),
])
def test_an_error_names_file_key_and_what_is_allowed(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_the_file_is_looked_for_in_order(tmp_path: Path) -> None:
    named, environment, user = (tmp_path / name for name in ("named.cfg", "environment.cfg", "insane/nsnd.cfg"))
    user.parent.mkdir()
    for path in (named, environment, user):
        path.touch()
    variables = {"INSANE_NSND_CONFIG": str(environment), "XDG_CONFIG_HOME": str(tmp_path)}
    assert find_config(str(named), variables) == named
    assert find_config(None, variables) == environment
    del variables["INSANE_NSND_CONFIG"]
    assert find_config(None, variables) == user
    (tmp_path / "home/.config/insane").mkdir(parents=True)
    (tmp_path / "home/.config/insane/nsnd.cfg").touch()
    assert find_config(None, {"HOME": str(tmp_path / "home")}) == tmp_path / "home/.config/insane/nsnd.cfg"


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config names .*missing\.cfg"):
        find_config(str(tmp_path / "missing.cfg"), {})
    with pytest.raises(ConfigError, match=r"INSANE_NSND_CONFIG names .*missing\.cfg"):
        find_config(None, {"INSANE_NSND_CONFIG": str(tmp_path / "missing.cfg")})


def test_an_autostarted_node_does_not_read_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "[global]\n")
    monkeypatch.chdir(tmp_path)
    assert find_config("nsnd.cfg", {}) == tmp_path / "nsnd.cfg"
    with pytest.raises(ConfigError, match="absolute path"):
        find_config(None, {"INSANE_NSND_CONFIG": "nsnd.cfg"}, autostart=True)


def test_users_are_taken_by_name_and_by_number(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, '[access]\nusers = ["root", 1001, 1001]\n'))
    assert config.users == {0, 1001}
    assert config.warnings == ()
    for nobody in ("[access]\nusers = []\n", "[access]\n"):
        assert load_config(write(tmp_path, nobody)).users == set()


@pytest.mark.parametrize(("line", "words"), [
    ('users = "alice"', "access.users: 'alice' is not allowed here; allowed is a list of at most 64 user names"),
    ("users = [true]", r"access.users: \[True\] is not allowed here"),
    ("users = [-1]", r"access.users: \[-1\] is not allowed here"),
    ("users = [4294967295]", "is not allowed here"),
    ('users = [""]', "is not allowed here"),
    ('users = ["no such user"]', "access.users: there is no user 'no such user' on this host"),
    ("user = [1]", r"access.user: unknown key; allowed in \[access\] are users \(did you mean users\?\)"),
])
def test_users_that_cannot_be_are_refused_in_words(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path, f"[access]\n{line}\n"))
