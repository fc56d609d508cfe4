"""Who may use a server, said once for both kinds of servers."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Authorized:
    """A user with a password, plain or hashed, or with an nkey. `account`: "" for the global one."""

    user: str = ""
    password: str = ""
    nkey: str = ""
    account: str = ""
    permissions: dict[str, object] | None = None

    def fields(self) -> dict[str, object]:
        who: dict[str, object] = {"nkey": self.nkey} if self.nkey else {"user": self.user, "password": self.password}
        return who if self.permissions is None else who | {"permissions": self.permissions}


class Authorization:
    """A token, or users."""

    def __init__(self, *users: Authorized, token: str = "") -> None:
        self.users = users
        self.token = token

    def for_nats_server(self) -> str:
        """The lines of its configuration; JSON is a part of that."""
        if self.token:
            return f"authorization: {_quoted({'token': self.token})}"
        accounts: dict[str, list[dict[str, object]]] = defaultdict(list)
        for user in self.users:
            accounts[user.account].append(user.fields())
        lines = []
        if accounts[""]:
            lines.append(f"authorization: {_quoted({'users': accounts['']})}")
        named = {name: {"users": users} for name, users in accounts.items() if name}
        if named:
            lines.append(f"accounts: {_quoted(named)}")
        return "\n".join(lines)

    def for_nsnd(self, port: int) -> str:
        """The section of its configuration."""
        if self.token:
            return f"[auth.{port}]\ntoken = {_quoted(self.token)}"
        users = [user.fields() | ({"account": user.account} if user.account else {}) for user in self.users]
        return f"[auth.{port}]\nusers = {_toml(users)}"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else _quoted(value)


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
