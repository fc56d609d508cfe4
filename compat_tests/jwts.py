"""Keys and JWTs as an operator of NATS servers makes them, enough for one account and one user."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass

import nkeys


def new_seed(kind: int) -> bytes:
    """kind: nkeys.PREFIX_BYTE_USER and so on."""
    return bytes(nkeys.encode_seed(os.urandom(32), kind))


def public(seed: bytes) -> str:
    return str(nkeys.from_seed(bytearray(seed)).public_key.decode())


def sign(seed: bytes, nonce: str) -> str:
    """As a client answers a server's nonce."""
    return base64.b64encode(nkeys.from_seed(bytearray(seed)).sign(nonce.encode())).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def signed(issuer: bytes, subject: bytes, name: str, nats: dict[str, object]) -> str:
    """A JWT that the issuer's seed signs about the subject's public key."""
    claims = {"iat": 0, "iss": public(issuer), "sub": public(subject), "name": name, "nats": {"version": 2, **nats}}
    claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
    header = {"typ": "JWT", "alg": "ed25519-nkey"}
    words = b".".join(_base64(json.dumps(part).encode()) for part in (header, claims))
    return (words + b"." + _base64(nkeys.from_seed(bytearray(issuer)).sign(words))).decode()


@dataclass(frozen=True)
class Operator:
    """What a server is configured with, and the credentials of a user."""

    configuration: str
    credentials: str


def make_operator() -> Operator:
    operator = new_seed(nkeys.PREFIX_BYTE_OPERATOR)
    account = new_seed(nkeys.PREFIX_BYTE_ACCOUNT)
    user = new_seed(nkeys.PREFIX_BYTE_USER)
    limits = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1) | {"wildcards": True}
    account_jwt = signed(operator, account, "account", {"type": "account", "limits": limits})
    user_jwt = signed(account, user, "user", {"type": "user", "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}})
    operator_jwt = signed(operator, operator, "operator", {"type": "operator"})
    configuration = f'operator: {operator_jwt}\nresolver: MEMORY\nresolver_preload {{ {public(account)}: "{account_jwt}" }}'
    lines = ["-----BEGIN NATS USER JWT-----", user_jwt, "------END NATS USER JWT------", ""]
    lines += ["-----BEGIN USER NKEY SEED-----", user.decode(), "------END USER NKEY SEED------", ""]
    return Operator(configuration, "\n".join(lines))
