"""Payloads that are written and read where they lie: what holds them, who gives them back, and what a mistake is told."""

from __future__ import annotations

import asyncio
import gc
import struct
import subprocess
import sys
import textwrap
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nats import errors
from nats.aio import msg as nats_msg

import insane_nats
from insane_nats.shim.errors import ZeroCopyError
from tools import servers
from tools.servers import ROOT, Server

LARGE = 300_000  # bytes: lies in the pool, not in a link
Body = Callable[[Any, Any], Awaitable[None]]


@pytest.fixture(autouse=True)
def no_forgotten_memory() -> Iterator[None]:
    """Nothing is given back by the garbage collector, unless the test expects the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        yield
        gc.collect()


def run(server: Server, body: Body) -> None:
    """With two connections: who publishes, and who subscribes."""

    async def main() -> None:
        one, other = await insane_nats.connect(server.url), await insane_nats.connect(server.url)
        try:
            await body(one, other)
        finally:
            await one.close()
            await other.close()

    asyncio.run(main())


def filled(client: Any, size: int, value: bytes) -> Any:
    buffer = client.borrow(size)
    buffer.data[:] = value * size
    return buffer


@pytest.mark.parametrize("size", [0, 1, 64, 5000, LARGE, 1 << 20])
def test_what_was_written_in_place_is_read_in_place(nsnd: Server, size: int) -> None:
    async def body(one: Any, other: Any) -> None:
        plain = await other.subscribe("a.*")
        views = await other.subscribe("a.>", zero_copy=True)
        buffer = filled(one, size, b"z")
        await one.emit("a.b", buffer, reply="inbox.x")
        assert buffer.released
        copied, viewed = await plain.next_msg(5), await views.next_msg(5)
        assert type(copied.data) is bytes and type(viewed.data) is memoryview
        assert copied.data == bytes(viewed.data) == b"z" * size
        assert viewed.data.readonly
        assert (viewed.subject, viewed.reply, viewed.headers) == ("a.b", "inbox.x", None)
        assert views.pending_bytes == 0
        viewed.release()
        viewed.release()
        copied.release()
        with pytest.raises(ValueError, match="released"):
            viewed.data[:]
        assert one.stats["out_bytes"] == size and other.stats["in_bytes"] == 2 * size

    run(nsnd, body)


def test_handlers_end_releases(nsnd: Server) -> None:
    async def body(one: Any, other: Any) -> None:
        seen: list[Any] = []

        async def handle(message: Any) -> None:
            assert bytes(message.data[:3]) == b"zzz"
            seen.append(message)
            if len(seen) == 2:
                raise KeyError("a handler that fails releases too")

        failed: list[Exception] = []

        async def note(error: Exception) -> None:
            failed.append(error)

        other._error_cb = note
        sub = await other.subscribe("a", cb=handle, zero_copy=True)
        for _ in range(3):
            await one.emit("a", filled(one, LARGE, b"z"))
        await other.flush()
        await sub._pending_queue.join()
        assert len(seen) == 3 and isinstance(failed[0], KeyError)
        for message in seen:
            with pytest.raises(ValueError, match="released"):
                message.data[0]
        assert other._fast.lender.lent == 0

    run(nsnd, body)


def test_part_of_a_buffer_and_headers_beside_views(nsnd: Server) -> None:
    async def body(one: Any, other: Any) -> None:
        sub = await other.subscribe("a", zero_copy=True)
        await one.emit("a", filled(one, LARGE, b"z"), length=10)
        await one.publish("a", b"y" * LARGE, headers={"K": "v"})
        first, second = await sub.next_msg(5), await sub.next_msg(5)
        assert (bytes(first.data), bytes(second.data), second.headers) == (b"z" * 10, b"y" * LARGE, {"K": "v"})
        first.release()
        second.release()

    run(nsnd, body)


def test_a_buffer_is_used_once_and_by_its_own_connection(nsnd: Server) -> None:
    async def body(one: Any, other: Any) -> None:
        buffer = one.borrow(LARGE)
        assert len(buffer) == len(memoryview(buffer)) == LARGE
        slice_of_it = buffer.data[:10]
        with pytest.raises(BufferError, match="cannot be emitted while"):
            await one.emit("a", buffer)
        with pytest.raises(BufferError, match="cannot be released while"):
            buffer.release()
        slice_of_it.release()
        with pytest.raises(ValueError, match="borrowed from"):
            await other.emit("a", buffer)
        for length in (-1, LARGE + 1):
            with pytest.raises(ValueError, match="length"):
                await one.emit("a", buffer, length=length)
        with pytest.raises(errors.BadSubjectError):
            await one.emit("a b", buffer)
        with pytest.raises(TypeError):
            await one.emit("a", bytearray(3))
        await one.emit("a", buffer)
        for use in (lambda: buffer.data, lambda: memoryview(buffer)):
            with pytest.raises(ValueError, match="released or emitted: borrow another"):
                use()
        with pytest.raises(ValueError, match="released or emitted"):
            await one.emit("a", buffer)
        with one.borrow(LARGE) as unused:
            unused.data[0] = 1
        assert unused.released
        with pytest.raises(errors.MaxPayloadError):
            one.borrow((1 << 20) + 1)
        with pytest.raises(ValueError, match="-1 bytes"):
            one.borrow(-1)
        assert one._fast.lender.lent == 0

    run(nsnd, body)


def test_what_is_forgotten_goes_back_and_is_warned_about(nsnd: Server) -> None:
    async def body(one: Any, other: Any) -> None:
        sub = await other.subscribe("a", zero_copy=True)
        await one.emit("a", filled(one, LARGE, b"z"))
        message = await sub.next_msg(5)
        with pytest.warns(ResourceWarning, match="zero_copy subscription was not released"):
            del message
        buffer = one.borrow(LARGE)
        with pytest.warns(ResourceWarning, match="neither emitted nor released"):
            del buffer
        assert other._fast.lender.lent == one._fast.lender.lent == 0

    run(nsnd, body)


def test_views_outlive_handler_connection_and_publisher(nsnd: Server) -> None:
    """And what they show stays as it was, whatever happens to the memory of others."""

    async def body(one: Any, other: Any) -> None:
        kept: list[memoryview] = []

        async def keep(message: Any) -> None:
            kept.append(message.data[:])

        sub = await other.subscribe("a", cb=keep, zero_copy=True)
        await one.emit("a", filled(one, LARGE, b"z"))
        await other.flush()
        await sub._pending_queue.join()
        session = other._session
        await other.close()
        assert session.handle is None
        for number in range(50):
            await one.publish("a", bytes([number]) * LARGE)
            await one.emit("a", filled(one, LARGE, bytes([number])))
        await one.close()
        third = await insane_nats.connect(nsnd.url)
        await third.publish("a", b"x" * LARGE)
        assert bytes(kept[0]) == b"z" * LARGE
        assert session.is_open  # the session is there as long as the memory is read
        kept.pop().release()
        gc.collect()
        assert not session.is_open
        await third.close()

    run(nsnd, body)


def test_object_that_uses_a_message_behind_its_handler_is_warned_about(nsnd: Server) -> None:
    async def body(one: Any, other: Any) -> None:
        users: list[Iterator[tuple[bytes]]] = []

        async def use(message: Any) -> None:
            users.append(struct.iter_unpack("1s", message.data))  # as an array does, it holds the view itself

        sub = await other.subscribe("a", cb=use, zero_copy=True)

        async def deliver() -> None:
            await one.emit("a", filled(one, LARGE, b"z"))
            await other.flush()
            await sub._pending_queue.join()

        with pytest.warns(ResourceWarning, match="to 'a' is still viewed behind its handler"):
            await deliver()
        assert next(users[0]) == (b"z",)
        assert other._fast.lender.lent == 1
        users.clear()
        assert other._fast.lender.lent == 0

    run(nsnd, body)


def test_what_waits_unread_keeps_its_memory_and_goes_with_the_subscription(nsnd: Server) -> None:
    async def body(one: Any, other: Any) -> None:
        sub = await other.subscribe("a", zero_copy=True)
        for _ in range(20):
            await one.emit("a", filled(one, LARGE, b"z"))
        await other.flush()
        assert (sub.pending_msgs, sub.pending_bytes, other._fast.lender.lent) == (20, 20 * LARGE, 20)
        for _ in range(20):
            message = await sub.next_msg(5)
            assert bytes(message.data) == b"z" * LARGE
            message.release()
        assert other._fast.lender.lent == 0

    run(nsnd, body)


def test_publisher_that_holds_too_much_is_told(nsnd: Server) -> None:
    async def body(one: Any, other: Any) -> None:
        held = []

        def hold_more() -> None:
            for _ in range(1000):
                held.append(one.borrow(1 << 20))

        with pytest.raises(errors.OutboundBufferLimitError):
            hold_more()
        assert len(held) > 100
        for buffer in held:
            buffer.release()
        with one.borrow(1 << 20):
            pass

    run(nsnd, body)


def test_program_that_ends_while_it_looks_at_a_message(nsnd: Server, tmp_path: Path) -> None:
    program = tmp_path / "ends.py"
    program.write_text(
        textwrap.dedent(f"""
        import asyncio, insane_nats
        kept = []
        async def main():
            one, other = await insane_nats.connect({nsnd.url!r}), await insane_nats.connect({nsnd.url!r})
            sub = await other.subscribe("a", zero_copy=True)
            await one.emit("a", one.borrow({LARGE}))
            kept.append((await sub.next_msg(5)).data)
            kept.append(one.borrow({LARGE}))
        asyncio.run(main())
        """)
    )
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_plain_nats_says_that_there_is_no_fabric(tmp_path: Path) -> None:
    async def main(url: str) -> None:
        client = await insane_nats.connect(url)
        with pytest.raises(ZeroCopyError, match="plain NATS"):
            client.borrow(10)
        with pytest.raises(ZeroCopyError):
            await client.subscribe("a", zero_copy=True)
        await client.close()
        with pytest.raises(errors.ConnectionClosedError):
            client.borrow(1)
        with pytest.raises(errors.ConnectionClosedError):
            await client.subscribe("a", zero_copy=True)

    with servers.nats_server(tmp_path) as server:
        asyncio.run(main(server.url))


@pytest.mark.parametrize(("subject", "reply"), [("$GR.x", ""), ("a", "$JS.ACK.s.c.1.1.1.1.0")])
def test_what_only_servers_publish_is_refused_and_given_back(nsnd: Server, subject: str, reply: str) -> None:
    async def body(one: Any, other: Any) -> None:
        told: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def error_cb(error: Exception) -> None:
            told.set_result(str(error))

        one._error_cb = error_cb
        everything = await other.subscribe(">")
        buffer = filled(one, LARGE, b"z")
        await one.emit(subject, buffer, reply=reply)
        assert buffer.released
        assert "permissions violation for publish" in await asyncio.wait_for(told, 5)
        await one.publish("a", b"x")
        assert (await everything.next_msg(5)).data == b"x"

    run(nsnd, body)


def test_programs_own_messages_have_copies(nsnd: Server) -> None:
    """Its class of messages knows nothing of release(); the handler gets the next message all the same."""

    class Message(nats_msg.Msg):
        pass

    async def main() -> None:
        client = await insane_nats.connect(nsnd.url)
        client.msg_class = Message
        got: asyncio.Queue[nats_msg.Msg] = asyncio.Queue()
        await client.subscribe("a", cb=got.put, zero_copy=True)
        for _ in range(2):
            await client.publish("a", b"x" * 300_000)
            message = await asyncio.wait_for(got.get(), 5)
            assert type(message) is Message and message.data == b"x" * 300_000
        await client.close()

    asyncio.run(main())


def test_a_view_of_the_loan_itself_does_not_end_it(nsnd: Server) -> None:
    async def main() -> None:
        client = await insane_nats.connect(nsnd.url)
        sub = await client.subscribe("a", zero_copy=True)
        await client.publish("a", b"x" * 300_000)
        message: Any = await sub.next_msg()
        assert bytes(message.data.obj) == message.data
        await client.close()
        assert message.data == b"x" * 300_000
        message.release()

    asyncio.run(main())


@pytest.mark.parametrize("closed", [True, False])
def test_message_that_is_garbage_with_its_connection_goes_back(nsnd: Server, closed: bool) -> None:
    async def main() -> Any:
        client: Any = await insane_nats.connect(nsnd.url)
        sub = await client.subscribe("a", zero_copy=True)
        for _ in range(2):
            await client.publish("a", b"x" * 300_000)
        client.message = await sub.next_msg()
        session = client._session
        if closed:
            await client.close()
        return weakref.ref(session._keeper)

    loop = asyncio.new_event_loop()
    keeper = loop.run_until_complete(main())
    loop.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
        gc.collect()
    assert keeper() is None
