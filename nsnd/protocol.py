"""Packets of the control protocol (shim/libnsn/nsn_protocol.h), written and read with struct."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum
from typing import NamedTuple

MAGIC = 0x494E534E
VERSION_MAX = 1
VERSION_MIN = max(1, VERSION_MAX - 1)  # the previous one too, so that nsnd and programs can be upgraded one after the other
PACKET_MAX = 32768
NO_SLOT = 0xFFFFFFFF
INTEREST_ADD = 1
HELLO_ANSWERS = 1
HELLO_RELAY = 2


class PacketType(IntEnum):
    """enum nsn_packet_type."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    INTEREST = 4
    INTEREST_DONE = 5
    LINK = 6
    SEGMENT = 7
    TAKEN = 8
    PEER_GONE = 9
    PING = 10
    PONG = 11
    GOODBYE = 12
    LAME_DUCK = 13
    STATUS = 14
    OPEN = 15
    OPENED = 16
    CHALLENGE = 17
    CREDENTIALS = 18
    RELAYED = 19


PACKET = struct.Struct("<IHH")
HELLO = struct.Struct("<IHHIIQQIIQ128siI")
WELCOME = struct.Struct("<IHHIIQQQII256s32s")
REFUSED = struct.Struct("<IHHiI496s")
INTEREST = struct.Struct("<IHHQII")
INTEREST_CHANGE = struct.Struct("<BBHHHII")
INTEREST_DONE = struct.Struct("<IHHQiI")
LINK = struct.Struct("<IHHIIQII")
SEGMENT = struct.Struct("<IHHIIIIQ")
PEER_GONE = struct.Struct("<IHHII")
PING = struct.Struct("<IHHQ")
STATUS = struct.Struct("<IHHII")
OPEN = struct.Struct("<IHHII")
CHALLENGE = struct.Struct("<IHH64s")
CREDENTIALS = struct.Struct("<IHHII")

STATUS_PART_MAX = PACKET_MAX - STATUS.size


class ProtocolError(Exception):
    """What the other side sent is not this protocol. `errno` (positive) and the text go into REFUSED."""

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(text)
        self.errno = errno


class Hello(NamedTuple):
    """struct nsn_hello."""

    version_max: int
    application_id: int
    version_min: int
    identity: tuple[int, int]
    slot: int
    generation: int
    acknowledged: int
    name: str
    segment: int = -1
    answers: bool = False
    relay: bool = False


class Welcome(NamedTuple):
    """struct nsn_welcome."""

    slot: int
    generation: int
    client_id: int
    max_payload: int
    acknowledged: int
    reattached: bool
    directory: str
    version: str


class Refused(NamedTuple):
    """struct nsn_refused; errno is positive."""

    errno: int
    text: str


def text_field(raw: bytes) -> str:
    """A NUL-terminated field as text; bytes that are not UTF-8 become replacement characters."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def text_bytes(text: str, size: int) -> bytes:
    """At most size - 1 bytes of the text, never half a character; struct pads with the NULs."""
    return text.encode()[: size - 1].decode("utf-8", "ignore").encode()


def unpack_hello(raw: bytes | memoryview) -> Hello:
    """From a whole packet. A later version's HELLO may be longer, this version's is the front of it."""
    fields = HELLO.unpack_from(raw)
    _, _, version, application_id, version_min, *identity, slot, generation, acknowledged, name, segment, flags = fields
    return Hello(version, application_id, version_min, (identity[0], identity[1]), slot, generation, acknowledged,
                 text_field(name), segment, bool(flags & HELLO_ANSWERS), bool(flags & HELLO_RELAY))


def fitting(batch: memoryview, count: int, room: int) -> tuple[int, int]:
    """How much of a batch of changes of interest comes before the subscription that is one more than `room`: (bytes, changes).
    All of a batch that is malformed."""
    at = 0
    for index in range(count):
        if len(batch) - at < INTEREST_CHANGE.size:
            break
        op, _, pattern_length, queue_length, _, _, _ = INTEREST_CHANGE.unpack_from(batch, at)
        if op == INTEREST_ADD:
            if room <= 0:
                return at, index
            room -= 1
        at += (INTEREST_CHANGE.size + pattern_length + queue_length + 7) & ~7
    return len(batch), count


def pack_hello(hello: Hello) -> bytes:
    """For clients in Python."""
    return HELLO.pack(MAGIC, PacketType.HELLO, hello.version_max, hello.application_id, hello.version_min, *hello.identity,
                      hello.slot, hello.generation, hello.acknowledged, text_bytes(hello.name, 128), hello.segment,
                      HELLO_ANSWERS * hello.answers | HELLO_RELAY * hello.relay)


def pack_welcome(version: int, welcome: Welcome) -> bytes:
    """`version`: of the protocol spoken from here on."""
    return WELCOME.pack(MAGIC, PacketType.WELCOME, version, welcome.slot, welcome.generation, welcome.client_id,
                        welcome.max_payload, welcome.acknowledged, int(welcome.reattached), 0,
                        welcome.directory.encode(), text_bytes(welcome.version, 32))


def unpack_welcome(raw: bytes | memoryview) -> Welcome:
    """For clients in Python."""
    _, _, _, slot, generation, client_id, max_payload, acknowledged, reattached, _, directory, version = WELCOME.unpack(raw)
    return Welcome(slot, generation, client_id, max_payload, acknowledged, bool(reattached), text_field(directory),
                   text_field(version))


def pack_refused(version: int, errno: int, text: str) -> bytes:
    """`errno` positive; a text that is too long is cut."""
    return REFUSED.pack(MAGIC, PacketType.REFUSED, version, errno, 0, text_bytes(text, 496))


def unpack_refused(raw: bytes | memoryview) -> Refused:
    """For clients in Python."""
    _, _, _, errno, _, text = REFUSED.unpack(raw)
    return Refused(errno, text_field(text))


def pack_challenge(version: int, nonce: str) -> bytes:
    """`nonce`: empty where nobody can sign it."""
    return CHALLENGE.pack(MAGIC, PacketType.CHALLENGE, version, nonce.encode())


def unpack_challenge(raw: bytes | memoryview) -> str:
    """The nonce. For clients in Python."""
    return text_field(CHALLENGE.unpack(raw)[3])


def pack_credentials(document: bytes) -> bytes:
    """For clients in Python. `document`: the JSON of a CONNECT."""
    return CREDENTIALS.pack(MAGIC, PacketType.CREDENTIALS, VERSION_MAX, len(document), 0) + document


def unpack_credentials(raw: bytes | memoryview) -> bytes:
    """The JSON. ProtocolError."""
    length = CREDENTIALS.unpack_from(raw)[3]
    if length != len(raw) - CREDENTIALS.size:
        raise ProtocolError(errno.EPROTO, f"CREDENTIALS says {length} bytes, and {len(raw) - CREDENTIALS.size} came")
    return bytes(raw[CREDENTIALS.size :])


def pack_status_answer(version: int, document: bytes) -> list[bytes]:
    """The packets that carry a msgpack document of any length; the last has `last` = 1."""
    parts = [document[i : i + STATUS_PART_MAX] for i in range(0, len(document), STATUS_PART_MAX)] or [b""]
    last = len(parts) - 1
    return [STATUS.pack(MAGIC, PacketType.STATUS, version, len(part), int(i == last)) + part for i, part in enumerate(parts)]
