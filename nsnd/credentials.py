"""Who may use an application ID: users with passwords, tokens and nkeys, and whether what a client gives is theirs."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import NamedTuple

from nsnd.permissions import Permissions

GLOBAL_ACCOUNT = "$G"  # NATS's name for the account of whoever has none
VIOLATION = "Authorization Violation"  # NATS's words
TOKEN = "(token)"  # what the user is called who has one
NKEY_USER = 20 << 3  # first byte of a user's public key, which makes it begin with U
SIGNATURE_BYTES = 64
BCRYPT_USES = 72  # bytes of a password; what comes behind makes no difference
BCRYPT = re.compile(r"\$2[abxy]\$(?:0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")


class Secret:
    """A password or token, plain or as bcrypt made it. It never shows itself."""

    __slots__ = ("_bytes", "hashed")

    def __init__(self, text: str) -> None:
        self._bytes = text.encode()
        self.hashed = text.startswith(("$2a$", "$2b$", "$2x$", "$2y$"))

    @property
    def whole(self) -> bool:
        """False for the beginning of a bcrypt hash without its end."""
        return not self.hashed or BCRYPT.fullmatch(self._bytes.decode()) is not None

    def matches(self, given: str) -> bool:
        """In a time that does not tell how much of it is right. Takes long when it is hashed."""
        if not self.hashed:
            return hmac.compare_digest(sha256(self._bytes).digest(), sha256(given.encode("utf-8", "replace")).digest())
        import bcrypt  # most nodes need none

        try:
            return bcrypt.checkpw(given.encode("utf-8", "replace")[:BCRYPT_USES], self._bytes)
        except ValueError:  # a NUL in it
            return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._bytes, other._bytes)

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __repr__(self) -> str:
        return "<secret>"


class User(NamedTuple):
    """One who may attach. `name`: as status shows it. `secret`: None for who has a key, which then is the name.
    `permissions`: None for who may do everything."""

    name: str
    account: str
    secret: Secret | None
    permissions: Permissions | None = None


class Answer(NamedTuple):
    """What a client gives, under the names that CONNECT has for it."""

    user: str = ""
    password: str = ""
    token: str = ""
    nkey: str = ""
    signature: str = ""

    def __repr__(self) -> str:
        return "<credentials>"


class Authentication(NamedTuple):
    """Of one application ID: a token, or users by name and by public key."""

    token: User | None = None
    users: Mapping[str, User] = MappingProxyType({})
    nkeys: Mapping[str, User] = MappingProxyType({})

    @property
    def slow(self) -> bool:
        """Whether to look at an answer may take long."""
        return any(user.secret is not None and user.secret.hashed for user in self._all())

    def nonce(self) -> str:
        """What whoever has a key is to sign; empty when nobody has one, as a NATS server then sends none."""
        return secrets.token_urlsafe(24) if self.nkeys else ""

    def find(self, answer: Answer, nonce: str) -> User | None:
        """Whose credentials these are."""
        if answer.nkey and self.nkeys:
            user = self.nkeys.get(answer.nkey)
            return user if user is not None and signed(answer.nkey, nonce, answer.signature) else None
        if self.token is not None:
            return self.token if _has(self.token, answer.token) else None
        user = self.users.get(answer.user)
        if user is None:  # takes as long as if there were one
            for other in self.users.values():
                _has(other, answer.password)
                break
            return None
        return user if _has(user, answer.password) else None

    def namesake(self, user: User) -> User | None:
        """Who has the same name or key here as that user of an earlier configuration."""
        return self.token if user.name == TOKEN else (self.nkeys if user.secret is None else self.users).get(user.name)

    def _all(self) -> list[User]:
        return [*([self.token] if self.token is not None else []), *self.users.values(), *self.nkeys.values()]


def _has(user: User, given: str) -> bool:
    return user.secret is not None and user.secret.matches(given)


def answer_from(document: bytes) -> Answer:
    """From the JSON of a CONNECT, of which only credentials are looked at. ValueError."""
    try:
        fields = json.loads(document)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None  # whose own words have some of it
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    given = [fields.get(name) for name in ("user", "pass", "auth_token", "nkey", "sig")]
    return Answer(*(one if isinstance(one, str) else "" for one in given))


def public_key(nkey: str) -> bytes | None:
    """The Ed25519 key in a user's public nkey (base32 of kind, key and CRC-16); None when it is not one."""
    try:
        raw = base64.b32decode(nkey + "=" * (-len(nkey) % 8))
    except (binascii.Error, ValueError):
        return None
    if len(raw) != 35 or raw[0] != NKEY_USER or binascii.crc_hqx(raw[:33], 0) != int.from_bytes(raw[33:], "little"):
        return None
    return raw[1:33]


def signed(nkey: str, nonce: str, signature: str) -> bool:
    """Whether the signature of the nonce (base64 of either kind) was made with that user's key."""
    key = public_key(nkey)
    try:
        text = signature.rstrip("=").replace("-", "+").replace("_", "/")
        raw = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
    if key is None or len(raw) != SIGNATURE_BYTES:
        return False
    from nacl.exceptions import BadSignatureError  # most nodes need none
    from nacl.signing import VerifyKey

    try:
        VerifyKey(key).verify(nonce.encode(), raw)
    except BadSignatureError:
        return False
    return True
