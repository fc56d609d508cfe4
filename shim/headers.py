"""NATS headers as bytes: what nats-py writes and reads, without its awaits."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nats import errors
from nats.aio.client import Client as NatsClient

LINE = b"NATS/1.0"
LINE_SIZE = len(LINE)
CRLF = b"\r\n"
STATUS = "Status"
DESCRIPTION = "Description"
STATUS_SIZE = 3  # bytes: "503"

# RFC 7230 token characters, as nats-py allows them: nothing that could end a line.
_KEY = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_NEWLINES = str.maketrans({"\r": " ", "\n": " "})


def encode(headers: Mapping[str, str]) -> bytes:
    """The header block. BadHeaderError for a key that is no token; empty keys are left out, as nats-py does."""
    lines = [LINE]
    for name, value in headers.items():
        key = name.strip()
        if not key:
            continue
        if not _KEY.fullmatch(key):
            raise errors.BadHeaderError(key)
        lines.append(f"{key}: {value.strip().translate(_NEWLINES)}".encode())
    lines.append(b"\r\n")
    return CRLF.join(lines)


def decode(block: bytes) -> dict[str, str] | None:
    """What nats-py's Client._process_headers gives for the block: None when it holds nothing that can be read."""
    if len(block) <= LINE_SIZE:
        return None
    found: dict[str, str] = {}
    rest = block[LINE_SIZE:]
    if rest[:1] == b" ":
        line = block[LINE_SIZE + 1 :]
        status = line[:STATUS_SIZE].strip().decode("utf-8", "replace")
        if status.isdigit():
            found[STATUS] = status
        rest = rest[rest.find(CRLF) + len(CRLF) :]
        description = line[STATUS_SIZE + 1 : len(line) - 2 * len(CRLF)]
        if description:
            end = description.find(CRLF)
            words = description[:end] if end > 0 else description
            found[DESCRIPTION] = words.decode("utf-8", "replace")
        if len(rest) <= len(CRLF):
            return found
    elif len(rest) <= len(CRLF):
        return None
    found.update(NatsClient._parse_header_lines(rest))
    return found or None


def no_responders(subject: str) -> bytes:
    """The block of the status message that nats-server 2.15 answers a request that reached nobody with."""
    return b"NATS/1.0 503\r\nNats-Subject: " + subject.encode() + b"\r\n\r\n"
