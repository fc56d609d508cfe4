"""nsnd/protocol.py says the same as shim/libnsn/nsn_protocol.h."""

from __future__ import annotations

from typing import Any

import pytest

from nsnd import protocol as p
from nsnd._fabric import ffi, lib

STRUCTS = {
    "nsn_packet": p.PACKET,
    "nsn_hello": p.HELLO,
    "nsn_welcome": p.WELCOME,
    "nsn_refused": p.REFUSED,
    "nsn_interest": p.INTEREST,
    "nsn_interest_change": p.INTEREST_CHANGE,
    "nsn_interest_done": p.INTEREST_DONE,
    "nsn_link_packet": p.LINK,
    "nsn_segment_packet": p.SEGMENT,
    "nsn_peer_gone": p.PEER_GONE,
    "nsn_ping": p.PING,
    "nsn_status": p.STATUS,
    "nsn_open": p.OPEN,
    "nsn_challenge": p.CHALLENGE,
    "nsn_credentials": p.CREDENTIALS,
}


@pytest.mark.parametrize("name", STRUCTS)
def test_sizes_are_those_of_the_header(name: str) -> None:
    assert STRUCTS[name].size == ffi.sizeof(f"struct {name}")


def test_numbers_are_those_of_the_header() -> None:
    for kind in p.PacketType:
        assert getattr(lib, f"NSN_{kind.name}") == kind
    assert lib.NSN_PROTOCOL_MAGIC == p.MAGIC
    assert lib.NSN_PROTOCOL_VERSION == p.VERSION_MAX
    assert lib.NSN_PROTOCOL_VERSION_MIN == p.VERSION_MIN
    assert lib.NSN_PACKET_MAX == p.PACKET_MAX


def test_hello_has_its_fields_where_the_header_has_them() -> None:
    hello = p.Hello(3, 4222, 1, (2**64 - 1, 7), 9, 11, 13, "näme", 17, True)
    raw = p.pack_hello(hello)
    c: Any = ffi.new("struct nsn_hello *")
    ffi.memmove(c, raw, len(raw))
    assert (c.packet.magic, c.packet.type, c.packet.version) == (p.MAGIC, lib.NSN_HELLO, 3)
    assert (c.application_id, c.version_min, c.identity[0], c.identity[1]) == (4222, 1, 2**64 - 1, 7)
    assert (c.slot, c.generation, c.acknowledged, c.segment, c.flags) == (9, 11, 13, 17, lib.NSN_HELLO_ANSWERS)
    assert ffi.buffer(c.name)[:].rstrip(b"\0").decode() == "näme"
    assert p.unpack_hello(raw) == hello


def test_welcome_has_its_fields_where_the_header_has_them() -> None:
    welcome = p.Welcome(1, 2, 3, 4, 5, True, "/dev/shm/x/4222", "0.1.0")
    raw = p.pack_welcome(1, welcome)
    c: Any = ffi.new("struct nsn_welcome *")
    ffi.memmove(c, raw, len(raw))
    assert (c.slot, c.generation, c.client_id, c.max_payload, c.acknowledged, c.reattached) == (1, 2, 3, 4, 5, 1)
    assert ffi.buffer(c.directory)[:].rstrip(b"\0") == b"/dev/shm/x/4222"
    assert ffi.buffer(c.version)[:].rstrip(b"\0") == b"0.1.0"
    assert p.unpack_welcome(raw) == welcome


def test_a_long_text_is_cut_between_characters() -> None:
    raw = p.pack_refused(1, 13, "ä" * 400)
    assert len(raw) == p.REFUSED.size
    answer = p.unpack_refused(raw)
    assert answer.errno == 13
    assert answer.text == "ä" * 247


def test_a_status_answer_is_split_and_marked() -> None:
    document = bytes(range(256)) * 300
    parts = p.pack_status_answer(1, document)
    assert all(len(part) <= p.PACKET_MAX for part in parts)
    assert [p.STATUS.unpack_from(part)[4] for part in parts] == [0, 0, 1]
    assert b"".join(part[p.STATUS.size :] for part in parts) == document


def test_link_has_its_fields_where_the_header_has_them() -> None:
    raw = p.LINK.pack(p.MAGIC, p.PacketType.LINK, 1, 2, 3, 4, 5, 0)
    c: Any = ffi.new("struct nsn_link_packet *")
    ffi.memmove(c, raw, len(raw))
    assert (c.peer_slot, c.peer_generation, c.link_id, c.peer_uid) == (2, 3, 4, 5)


def test_a_batch_is_cut_before_the_subscription_that_is_too_many() -> None:
    def change(op: int, pattern: bytes) -> bytes:
        raw = p.INTEREST_CHANGE.pack(op, 0, len(pattern), 0, 0, 1, 0) + pattern
        return raw + b"\0" * (-len(raw) % 8)

    adds, removal = [change(1, b"a.long.pattern"), change(1, b"b"), change(1, b"c")], change(2, b"")
    batch = memoryview(adds[0] + removal + adds[1] + adds[2])
    assert p.fitting(batch, 4, 3) == (len(batch), 4)
    assert p.fitting(batch, 4, 2) == (len(batch) - len(adds[2]), 3)
    assert p.fitting(batch, 4, 1) == (len(adds[0]) + len(removal), 2)
    assert p.fitting(batch, 4, 0) == p.fitting(batch, 4, -7) == (0, 0)
    assert p.fitting(batch[:30], 4, 9) == (30, 4)
