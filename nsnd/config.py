"""INSANE's configuration files, nsnd.cfg and nsn-app.cfg: found, read, checked. Their syntax is TOML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nsnd.credentials import Authentication

LOG_LEVELS = ("error", "warn", "info", "debug", "trace")
DEFAULT_PORT = 4222
DEFAULT_ADDR = "127.0.0.1"
MAX_PAYLOAD_DEFAULT = 1 << 20
MAX_PAYLOAD_LIMIT = 64 << 20
USERS_MAX = 64
NO_USER = (1 << 32) - 1  # what chown(2) takes for "leave it"
ENVIRONMENT = "INSANE_NSND_CONFIG"
SYSTEM_FILE = Path("/etc/insane/nsnd.cfg")


class ConfigError(Exception):
    """Names the file, the key, and what is allowed."""


class Config(NamedTuple):
    """What nsnd.cfg says. `port` and `addr`: where the node listens from its start. `max_payload`: bytes. `users`: whose
    programs may use the node, by user ID, besides those of its own user. `auth`: who may attach, by application ID; everybody
    where there is nothing."""

    path: str | None = None
    port: int = DEFAULT_PORT
    addr: str = DEFAULT_ADDR
    max_payload: int = MAX_PAYLOAD_DEFAULT
    log_level: str = "info"
    users: frozenset[int] = frozenset()
    auth: Mapping[int, Authentication] = MappingProxyType({})
    peers: Mapping[str, Mapping[str, object]] = MappingProxyType({})
    plugins: Mapping[str, Mapping[str, object]] = MappingProxyType({})
    warnings: tuple[str, ...] = ()


class Number(NamedTuple):
    """A key that takes a whole number from `low` to `high`. `unused`: why it has no meaning here."""

    low: int
    high: int
    unused: str = ""

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


class Choice(NamedTuple):
    """A key that takes one of some words."""

    words: tuple[str, ...]
    unused: str = ""

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(f'"{word}"' for word in self.words)

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value in self.words


class Text(NamedTuple):
    """A key that takes any text."""

    unused: str = ""
    allowed: str = "a text in quotes, at most 255 characters"

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and 0 < len(value) < 256


class Address(NamedTuple):
    """A key that takes an IP address."""

    unused: str = ""
    allowed: str = 'an IP address in quotes, such as "127.0.0.1"'

    def accepts(self, value: object) -> bool:
        if not isinstance(value, str):
            return False
        from ipaddress import ip_address  # here and below: not on the way to a quick start

        try:
            ip_address(value)
        except ValueError:
            return False
        return True


class Users(NamedTuple):
    """A key that takes a list of users, by name or by number."""

    unused: str = ""
    allowed: str = f'a list of at most {USERS_MAX} user names in quotes and user IDs, such as ["alice", 1001]'

    def accepts(self, value: object) -> bool:
        return isinstance(value, list) and len(value) <= USERS_MAX and all(_is_user(user) for user in value)


def _is_user(value: object) -> bool:
    if isinstance(value, str):
        return 0 < len(value) < 256 and "\0" not in value
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NO_USER


Key = Number | Choice | Text | Address | Users

GROWS = "memory is taken as it is needed, within each session's budget"
BURSTS = "no network plugin is in use yet"
REST = "nsnd has no REST interface: use `insane-nats status`"

GLOBAL: Mapping[str, Key] = {
    "addr": Address(),
    "port": Number(1, 65535),
    "max_payload": Number(1, MAX_PAYLOAD_LIMIT),
    "log_level": Choice(LOG_LEVELS),
    "app_num": Number(1, 65535, "sessions are bounded by 4096 an application ID"),
    "io_bufs_num": Number(1, 1 << 24, GROWS),
    "io_bufs_size": Number(1, 1 << 30, GROWS),
    "shm_size": Number(1, 1 << 24, GROWS),
    "max_tx_burst": Number(1, 1 << 16, BURSTS),
    "max_rx_burst": Number(1, 1 << 16, BURSTS),
}
ACCESS: Mapping[str, Key] = {"users": Users()}
REST_KEYS: Mapping[str, Key] = {"port": Number(1, 65535, REST), "host": Text(REST)}
GROUPS = {"peers": "other hosts are not reached yet", "plugins": "no network plugin is in use yet"}


def find_config(explicit: str | None, environment: Mapping[str, str], *, autostart: bool = False) -> Path | None:
    """The file to read: --config, $INSANE_NSND_CONFIG, the user's, the system's; None when there is none.

    A file that was named must exist. An autostarted node never depends on the directory that its client happens to be in.
    """
    for name, source in ((explicit, "--config"), (environment.get(ENVIRONMENT), f"${ENVIRONMENT}")):
        if not name:
            continue
        path = Path(name)
        if autostart and not path.is_absolute():
            raise ConfigError(f"{source} is {name!r}: a node that is started by itself needs an absolute path")
        if not path.is_file():
            raise ConfigError(f"{source} names {name}, and there is no such file")
        return path.absolute()
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(environment.get("HOME") or os.path.expanduser("~"), ".config")
    for path in (Path(home, "insane", "nsnd.cfg"), SYSTEM_FILE):
        if path.is_absolute() and path.is_file():
            return path
    return None


def load_config(path: Path | None) -> Config:
    """Reads and checks nsnd.cfg; the defaults when path is None."""
    if path is None:
        return Config()
    document = _read(path)
    warnings: list[str] = []
    _check_sections(path, document, ("global", "access", "auth", "rest", *GROUPS))
    values = _section(path, document, "global", GLOBAL, warnings)
    access = _section(path, document, "access", ACCESS, warnings)
    _section(path, document, "rest", REST_KEYS, warnings)
    groups = {name: _group(path, document, name, warnings) for name in GROUPS}
    return Config(
        path=str(path),
        port=int(values.get("port", DEFAULT_PORT)),
        addr=str(values.get("addr", DEFAULT_ADDR)),
        max_payload=int(values.get("max_payload", MAX_PAYLOAD_DEFAULT)),
        log_level=str(values.get("log_level", "info")),
        users=_user_ids(path, access.get("users", [])),
        auth=_auth(path, document.get("auth", {}), warnings),
        peers=groups["peers"],
        plugins=groups["plugins"],
        warnings=tuple(warnings),
    )


def _user_ids(path: Path, users: list[str | int]) -> frozenset[int]:
    if not users:
        return frozenset()
    from pwd import getpwnam  # not needed by most nodes

    ids = set()
    for user in users:
        try:
            ids.add(getpwnam(user).pw_uid if isinstance(user, str) else user)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{path}: access.users: there is no user {user!r} on this host; allowed are names of users that "
                              f"there are, and user IDs") from error
    return frozenset(ids)


def _auth(path: Path, sections: dict[str, Any], warnings: list[str]) -> dict[int, Authentication]:
    if not sections:
        return {}
    from nsnd.auth_config import AuthError, authentication  # not needed by most nodes

    auth: dict[int, Authentication] = {}
    for name, values in sections.items():
        if not name.isascii() or not name.isdecimal() or str(int(name)) != name or not 1 <= int(name) <= 65535:
            raise ConfigError(f"{path}: auth: has sections [auth.N] alone, one for each application ID N, 1 to 65535")
        try:
            auth[int(name)] = authentication(f"auth.{name}", values)
        except AuthError as error:
            raise ConfigError(f"{path}: {error}") from error
    if path.stat().st_mode & 0o077:
        warnings.append(f"{path} has secrets in it, and other users may read or write it: chmod 600 {path}")
    return auth


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # not needed where there is no file

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _check_sections(path: Path, document: dict[str, Any], known: tuple[str, ...]) -> None:
    for name, value in document.items():
        if name not in known:
            what = "section" if isinstance(value, dict) else "key outside of any section"
            raise ConfigError(f"{path}: {name}: unknown {what}; allowed are {_sections(known)}{_guess(name, known)}")
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {name}: must be a section, [{name}], not a value")


def _section(path: Path, document: dict[str, Any], name: str, keys: Mapping[str, Key], warnings: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = document.get(name, {})
    for key, value in values.items():
        rule = keys.get(key)
        if rule is None:
            allowed = ", ".join(keys)
            raise ConfigError(f"{path}: {name}.{key}: unknown key; allowed in [{name}] are {allowed}{_guess(key, keys)}")
        if not rule.accepts(value):
            raise ConfigError(f"{path}: {name}.{key}: {value!r} is not allowed here; allowed is {rule.allowed}")
        if rule.unused:
            warnings.append(f"{path}: {name}.{key} has no meaning here: {rule.unused}")
    return values


def _group(path: Path, document: dict[str, Any], name: str, warnings: list[str]) -> dict[str, dict[str, object]]:
    """[peers.*] and [plugins.*]: sections of any name; their keys belong to whatever will read them."""
    group: dict[str, dict[str, object]] = document.get(name, {})
    for member, values in group.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {name}.{member}: must be a section, [{name}.{member}], not a value")
        for key, value in values.items():
            if isinstance(value, dict):
                raise ConfigError(f"{path}: {name}.{member}.{key}: must be a value, not a section")
        warnings.append(f"{path}: {name}.{member} has no meaning here: {GROUPS[name]}")
    return group


def _sections(known: tuple[str, ...]) -> str:
    return ", ".join(f"[{name}.*]" if name in (*GROUPS, "auth") else f"[{name}]" for name in known)


def _guess(name: str, known: Mapping[str, Key] | tuple[str, ...]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""
