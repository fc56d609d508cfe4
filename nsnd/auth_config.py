"""[auth.N] in nsnd.cfg: who may use application ID N. Errors name the place and what is allowed, never what stands there."""

from __future__ import annotations

from typing import Any

from nsnd.credentials import GLOBAL_ACCOUNT, TOKEN, Authentication, Secret, User, public_key
from nsnd.permissions import Permissions, PermissionsError, permissions

USERS_MAX = 1024
SECTION_KEYS = ("token", "users")
USER_KEYS = ("user", "password", "nkey", "account", "permissions")


class AuthError(Exception):
    """The place within the file, and what is allowed there."""


def authentication(where: str, values: object) -> Authentication:
    """The section at `where`, auth.N. AuthError."""
    if not isinstance(values, dict):
        raise AuthError(f"{where}: must be a section, [{where}], not a value")
    _check_keys(where, values, SECTION_KEYS)
    if len(values) != 1:
        raise AuthError(f"{where}: needs either a token or users")
    if "token" in values:
        return Authentication(token=User(TOKEN, GLOBAL_ACCOUNT, _secret(f"{where}.token", values["token"])))
    entries = values["users"]
    if not isinstance(entries, list) or not 0 < len(entries) <= USERS_MAX or not all(isinstance(one, dict) for one in entries):
        raise AuthError(f"{where}.users: must be a list of 1 to {USERS_MAX} users, such as "
                        f'[{{user = "alice", password = "…"}}]')
    users: dict[str, User] = {}
    nkeys: dict[str, User] = {}
    for index, entry in enumerate(entries):
        place = f"{where}.users[{index}]"
        user = _user(place, entry)
        known = nkeys if user.secret is None else users
        if user.name in known:
            raise AuthError(f"{place}: the same {'nkey' if user.secret is None else 'user'} stands above already")
        known[user.name] = user
    return Authentication(users=users, nkeys=nkeys)


def _user(where: str, entry: dict[str, Any]) -> User:
    _check_keys(where, entry, USER_KEYS)
    account = entry.get("account", GLOBAL_ACCOUNT)
    if account != GLOBAL_ACCOUNT and (not _is_text(account) or account.startswith("$") or not account.isprintable()):
        raise AuthError(f"{where}.account: must be a name in quotes, at most 255 characters, without a $ in front")
    rights = _permissions(f"{where}.permissions", entry["permissions"]) if "permissions" in entry else None
    if "nkey" in entry:
        if "user" in entry or "password" in entry:
            raise AuthError(f"{where}: a user has either an nkey, or a user name and a password")
        if not _is_text(entry["nkey"]) or public_key(entry["nkey"]) is None:
            raise AuthError(f"{where}.nkey: must be a user's public nkey in quotes, which begins with U and has 56 characters "
                            f"(never the seed, which begins with S)")
        return User(entry["nkey"], account, None, rights)
    if not _is_text(entry.get("user")):
        raise AuthError(f"{where}.user: must be there, a text in quotes, at most 255 characters; or an nkey")
    if "password" not in entry:
        raise AuthError(f"{where}.password: must be there")
    return User(entry["user"], account, _secret(f"{where}.password", entry["password"]), rights)


def _permissions(where: str, value: object) -> Permissions:
    try:
        return permissions(value)
    except PermissionsError as error:
        raise AuthError(f"{where}{error}") from error


def _secret(where: str, value: object) -> Secret:
    if not isinstance(value, str) or not 0 < len(value) < 256:
        raise AuthError(f"{where}: must be a text in quotes, at most 255 characters, plain or as bcrypt makes it ($2a$, $2b$)")
    secret = Secret(value)
    if not secret.whole:
        raise AuthError(f"{where}: begins as bcrypt does, and is no whole hash: $2b$, two digits (04 to 31), $, 53 characters")
    return secret


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) < 256


def _check_keys(where: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    from difflib import get_close_matches

    for key in values:
        if key not in known:
            close = get_close_matches(key, known, 1)
            guess = f" (did you mean {close[0]}?)" if close else ""
            raise AuthError(f"{where}.{key}: unknown key; allowed are {', '.join(known)}{guess}")
