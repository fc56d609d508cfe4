"""Arguments of connect(), and what a program can ask a connection about: each has its meaning."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest

from compat_tests.backend import Backend, free_port, payloads, sync, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nats.aio.client import Client

covers = pytest.mark.covers


class Calls:
    """All callbacks that a connection can have; writes down their order, and what error_cb was told."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.errors: list[Exception] = []
        self.error_times: list[float] = []

    async def error(self, error: Exception) -> None:
        self.order.append(type(error).__name__)
        self.errors.append(error)
        self.error_times.append(time.monotonic())

    def note(self, word: str) -> Callable[[], Any]:
        async def called() -> None:
            self.order.append(word)

        return called

    @property
    def options(self) -> dict[str, Any]:
        words = ("disconnected", "reconnected", "closed", "lame_duck_mode", "discovered_server")
        return {"error_cb": self.error, **{f"{word}_cb": self.note(word) for word in words}}


@contextlib.contextmanager
def silent_listener() -> Iterator[str]:
    """The URL of a port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"nats://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


async def restart(backend: Backend, nc: Client) -> None:
    reconnects = nc.stats["reconnects"]
    await backend.stop_server()
    await until(lambda: nc.is_reconnecting)
    await backend.start_server()
    await until(lambda: nc.is_connected and nc.stats["reconnects"] > reconnects)


# --- what is shown to others


@covers("options/name")
async def test_name_is_what_an_administrator_sees(own_backend: Backend) -> None:
    nc = await own_backend.connect(name="billing")
    await nc.flush()
    assert await own_backend.connection_names() == ["billing"]


# --- connecting


@covers("options/connect-timeout")
@pytest.mark.parametrize("reconnect", [False, True])
async def test_connect_timeout(backend: Backend, reconnect: bool) -> None:
    with silent_listener() as url:
        start = time.monotonic()
        expected = nats.errors.NoServersError if reconnect else asyncio.TimeoutError
        calls = Calls()
        with pytest.raises(expected):
            await backend.nats.connect(
                url, connect_timeout=0.1, allow_reconnect=reconnect, max_reconnect_attempts=1, reconnect_time_wait=0.01,
                **calls.options,
            )  # fmt: skip
        assert time.monotonic() - start < 5
        assert set(calls.order) == {"TimeoutError"}


@covers("options/servers", "options/dont-randomize")
async def test_dead_servers_of_a_list_are_passed_over(backend: Backend) -> None:
    """error_cb is told of each that was tried in vain, in the list's order; the pool goes round."""
    dead = [f"nats://127.0.0.1:{free_port()}" for _ in range(2)]
    calls = Calls()
    nc = await backend.connect([*dead, backend.url], dont_randomize=True, **calls.options)
    await nc.flush()
    assert nc.connected_url is not None and nc.connected_url.port == backend.server.port
    assert [uri.geturl() for uri in nc.servers] == [*dead, backend.url]
    assert [server.reconnects for server in nc.server_pool] == [1, 1, 0]
    assert [isinstance(error, OSError) for error in calls.errors] == [True, True]


@covers("options/dont-randomize")
async def test_first_of_a_list_is_taken_unless_randomized(backend: Backend) -> None:
    urls = [f"nats://{host}:{backend.server.port}" for host in ("127.0.0.1", "localhost")]
    for order in (urls, urls[::-1]):
        nc = await backend.connect(order, dont_randomize=True)
        assert nc.connected_url is not None and nc.connected_url.geturl() == order[0]
    chosen = set()
    for _ in range(40):
        nc = await backend.connect(urls)
        assert nc.connected_url is not None
        chosen.add(nc.connected_url.geturl())
        await nc.close()
        if chosen == set(urls):
            return
    raise AssertionError(f"always {chosen}")


@covers("options/servers")
async def test_a_name_that_does_not_resolve_is_passed_over(backend: Backend) -> None:
    calls = Calls()
    unknown = f"nats://no-such-host.invalid:{backend.url.rpartition(':')[2]}"
    nc = await backend.connect([unknown, backend.url], dont_randomize=True, **calls.options)
    await nc.flush()
    assert [isinstance(error, socket.gaierror) for error in calls.errors] == [True]


@covers("options/servers")
async def test_only_names_that_do_not_resolve(backend: Backend) -> None:
    calls = Calls()
    with pytest.raises(nats.errors.NoServersError):
        await backend.nats.connect(
            "nats://no-such-host.invalid:4222", max_reconnect_attempts=1, reconnect_time_wait=0.01, **calls.options
        )
    assert calls.errors and all(isinstance(error, socket.gaierror) for error in calls.errors)


@covers("options/max-reconnect-attempts")
@pytest.mark.parametrize("attempts", [1, 3])
async def test_attempts_of_the_first_connect(backend: Backend, attempts: int) -> None:
    """insane_nats gives up at once where nobody is and it may not start a node, so another host plays the dead one."""
    calls = Calls()
    with pytest.raises(nats.errors.NoServersError):
        await backend.nats.connect(
            "nats://no-such-host.invalid:4222", max_reconnect_attempts=attempts, reconnect_time_wait=0.01, **calls.options
        )
    assert len(calls.errors) == attempts + 1


# --- reconnecting


@covers("4.2/reconnect", "options/callback-order")
async def test_order_of_callbacks_over_a_restart(own_backend: Backend) -> None:
    calls = Calls()
    nc = await own_backend.connect(**calls.options)
    await restart(own_backend, nc)
    await until(lambda: "reconnected" in calls.order)
    await nc.close()
    assert calls.order[:2] == ["UnexpectedEOF", "disconnected"]
    tried = calls.order[2 : calls.order.index("reconnected")]
    assert set(tried) <= {"ConnectionRefusedError"}, calls.order
    assert calls.order[calls.order.index("reconnected") :] == ["reconnected", "disconnected", "closed"]


@covers("4.2/reconnect-off", "options/callback-order")
async def test_order_of_callbacks_without_reconnect(own_backend: Backend) -> None:
    calls = Calls()
    nc = await own_backend.connect(allow_reconnect=False, **calls.options)
    await own_backend.stop_server()
    await until(lambda: "closed" in calls.order)
    assert calls.order == ["UnexpectedEOF", "disconnected", "closed"]
    assert isinstance(nc.last_error, nats.errors.UnexpectedEOF)


@covers("options/reconnect-time-wait")
async def test_attempts_are_spaced(own_backend: Backend) -> None:
    calls = Calls()
    nc = await own_backend.connect(reconnect_time_wait=0.15, **calls.options)
    await own_backend.stop_server()
    await until(lambda: nc.is_reconnecting and len(calls.errors) >= 4)
    times = calls.error_times[1:]  # behind the one of the end
    assert all(later - earlier >= 0.14 for earlier, later in itertools.pairwise(times))


@covers("4.2/reconnect-exhausted", "options/max-reconnect-attempts")
@pytest.mark.parametrize("attempts", [1, 3])
async def test_attempts_of_a_reconnect(own_backend: Backend, attempts: int) -> None:
    calls = Calls()
    nc = await own_backend.connect(max_reconnect_attempts=attempts, reconnect_time_wait=0.01, **calls.options)
    await own_backend.stop_server()
    await until(lambda: nc.is_closed and "closed" in calls.order)
    assert len(calls.errors) == 1 + attempts + 1
    assert calls.order[-2:] == ["disconnected", "closed"]
    assert isinstance(nc.last_error, nats.errors.NoServersError)


@covers("options/max-reconnect-attempts")
async def test_attempts_without_end(own_backend: Backend) -> None:
    calls = Calls()
    nc = await own_backend.connect(max_reconnect_attempts=-1, reconnect_time_wait=0.01, **calls.options)
    await own_backend.stop_server()
    await until(lambda: len(calls.errors) > 10)
    assert nc.is_reconnecting
    await own_backend.start_server()
    await until(lambda: nc.is_connected)


@covers("options/asking", "4.2/states")
async def test_what_is_shown_while_the_server_is_away(own_backend: Backend) -> None:
    nc = await own_backend.connect(**Calls().options)
    before = nc.client_id
    url = nc.connected_url
    await own_backend.stop_server()
    await until(lambda: nc.is_reconnecting)
    assert not nc.is_connected and not nc.is_closed and nc.connected_url is None
    assert [uri.port for uri in nc.servers] == [own_backend.server.port]
    await own_backend.start_server()
    await until(lambda: nc.is_connected and nc.stats["reconnects"] == 1)
    assert nc.connected_url == url
    assert isinstance(before, int) and isinstance(nc.client_id, int)
    assert nc.connected_server_version.major == 2
    assert nc.max_payload == 1 << 20


@covers("4.2/calls-bounded", "api/rtt")
async def test_rtt_while_the_server_is_away(own_backend: Backend) -> None:
    nc = await own_backend.connect(**Calls().options)
    await own_backend.stop_server()
    await until(lambda: nc.is_reconnecting)
    with pytest.raises(nats.errors.TimeoutError):
        await nc.rtt(timeout=0.1)  # type: ignore[arg-type]
    await own_backend.start_server()
    await until(lambda: nc.is_connected)
    assert await nc.rtt() >= 0


@covers("4.2/reconnect-force", "options/callback-order")
async def test_force_reconnect_states(backend: Backend) -> None:
    calls = Calls()
    nc = await backend.connect(**calls.options)
    await nc.force_reconnect()
    assert nc.is_reconnecting
    await nc.force_reconnect()
    await until(lambda: nc.is_connected and "reconnected" in calls.order)
    assert calls.order == ["disconnected", "reconnected"] and nc.stats["reconnects"] == 1
    await nc.flush()


@covers("4.2/reconnect-force")
async def test_force_reconnect_that_does_nothing(backend: Backend) -> None:
    calls = Calls()
    nc = await backend.connect(allow_reconnect=False, **calls.options)
    await nc.force_reconnect()
    assert nc.is_connected
    await nc.flush()
    await nc.close()
    await nc.force_reconnect()
    assert nc.is_closed and calls.order == ["disconnected", "closed"]


# --- choosing the server


@covers("options/reconnect-to-server-handler")
async def test_handler_chooses_the_server(own_backend: Backend) -> None:
    port = own_backend.server.port
    urls = [f"nats://127.0.0.1:{port}", f"nats://localhost:{port}"]
    seen: list[tuple[list[Any], dict[str, Any]]] = []

    def choose(servers: list[Any], info: dict[str, Any]) -> tuple[Any, float]:
        seen.append((servers, info))
        return next(server for server in servers if server.uri.hostname == "localhost"), 0.01

    nc = await own_backend.connect(urls, dont_randomize=True, reconnect_to_server_handler=choose, **Calls().options)
    subscription = await nc.subscribe("a")
    await restart(own_backend, nc)
    assert nc.connected_url is not None and nc.connected_url.hostname == "localhost"
    servers, info = seen[0]
    assert sorted(server.uri.geturl() for server in servers) == sorted(urls)
    assert info["server_id"] and info["max_payload"] == nc.max_payload
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"


@covers("options/reconnect-to-server-handler")
@pytest.mark.parametrize("answer", ["none", "unknown", "raises"])
async def test_handler_that_chooses_no_server_of_the_pool(backend: Backend, answer: str) -> None:
    calls = Calls()
    asked = 0

    def choose(servers: list[Any], info: dict[str, Any]) -> tuple[Any, float]:
        nonlocal asked
        asked += 1
        if answer == "raises" and asked == 1:
            raise ZeroDivisionError
        other = backend.nats.aio.client.Server(uri=servers[0].uri._replace(netloc="127.0.0.1:1"), reconnects=0)
        return (other if answer == "unknown" else None), 0

    nc = await backend.connect(reconnect_to_server_handler=choose, **calls.options)
    await nc.force_reconnect()
    await until(lambda: nc.is_connected and "reconnected" in calls.order)
    expected = {"none": [], "unknown": ["ServerNotInPoolError"], "raises": ["ZeroDivisionError"]}[answer]
    assert calls.order == ["disconnected", *expected, "reconnected"]
    await nc.flush()


@covers("options/server-pool")
async def test_pool_that_is_replaced(backend: Backend) -> None:
    nc = await backend.connect(max_reconnect_attempts=-1)
    other = backend.url.replace("127.0.0.1", "localhost")
    nc.set_server_pool([other])
    assert [server.uri.geturl() for server in nc.server_pool] == [other]
    assert nc.is_connected
    await nc.force_reconnect()
    await until(lambda: nc.is_connected and nc.stats["reconnects"] == 1)
    assert nc.connected_url is not None and nc.connected_url.geturl() == other
    await nc.flush()
    with pytest.raises(nats.errors.Error):
        nc.set_server_pool(["nats://127.0.0.1:port"])
    await nc.close()
    with pytest.raises(nats.errors.ConnectionClosedError):
        nc.set_server_pool([other])


@covers("options/lame-duck")
async def test_lame_duck_mode(own_backend: Backend) -> None:
    calls, others = Calls(), Calls()
    nc = await own_backend.connect(**calls.options)
    await own_backend.connect(**others.options)
    await own_backend.connect()  # has no callback for it
    await sync(nc)
    own_backend.server.announce_end()
    await until(lambda: "lame_duck_mode" in calls.order and "lame_duck_mode" in others.order)
    assert calls.order == ["lame_duck_mode"] and nc.is_connected
    subscription = await nc.subscribe("a")  # what is connected goes on for a while
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"


# --- publishing and subscribing


@covers("2.1/inbox-prefix", "options/inbox-prefix")
async def test_requests_use_the_inbox_prefix(backend: Backend) -> None:
    prefix = f"{backend.subject}.inbox"
    nc, observer = await backend.connect(inbox_prefix=prefix), await backend.connect()
    seen = await observer.subscribe(f"{prefix}.>")
    served = await observer.subscribe(f"{backend.subject}.service")
    await sync(observer)
    request = asyncio.create_task(nc.request(f"{backend.subject}.service", b"?", timeout=5))
    question = await served.next_msg(5)
    await question.respond(b"!")
    assert (await request).data == b"!"
    assert (await seen.next_msg(5)).subject == question.reply
    assert question.reply.startswith(f"{prefix}.")


@covers("options/flush-timeout")
@pytest.mark.parametrize("flush_timeout", [None, 1])
async def test_more_than_pending_size_at_once(backend: Backend, flush_timeout: float | None) -> None:
    """A connection whose buffer is smaller than what is published sends it on, and loses nothing."""
    nc = await backend.connect(pending_size=1000, flush_timeout=flush_timeout)
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    for number in range(100):
        await nc.publish(backend.subject, b"%03d" % number + b"." * 997)
    await sync(nc)
    await until(lambda: subscription.pending_msgs == 100)
    assert [int(data[:3]) for data in await payloads(subscription)] == list(range(100))


@covers("options/verbose")
async def test_verbose_and_pedantic_change_nothing_for_what_is_right(backend: Backend) -> None:
    nc = await backend.connect(verbose=True, pedantic=True)
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x", headers={"A": "b"})
    assert (await subscription.next_msg(5)).headers == {"A": "b"}
    await subscription.unsubscribe()
    with pytest.raises(nats.errors.NoRespondersError):
        await nc.request(backend.subject, timeout=5)


# --- what servers keep for themselves


@covers("2.9/publish")
@pytest.mark.parametrize("subject", ["_GR_.x", "$GR.x", "$NRG.x.y", "_GR_.>"])
async def test_subjects_that_only_servers_publish_to(backend: Backend, subject: str) -> None:
    calls = Calls()
    nc = await backend.connect(**calls.options)
    subscription = await nc.subscribe(">")
    await sync(nc)
    for _ in range(2):
        await nc.publish(subject, b"x")
    await until(lambda: len(calls.errors) == 2)
    assert {str(error) for error in calls.errors} == {f'nats: permissions violation for publish to "{subject.lower()}"'}
    assert str(nc.last_error) == str(calls.errors[0])
    await sync(nc)
    assert nc.is_connected and subscription.pending_msgs == 0 and nc.stats["out_msgs"] == 2


@covers("2.9/publish-reply")
@pytest.mark.parametrize("reply", ["_R_.x", "_GR_.x", "$GR.x", "$JS.ACK.s.c.1.1.1.1.0"])
async def test_replies_that_only_servers_ask_for(backend: Backend, reply: str) -> None:
    calls = Calls()
    nc = await backend.connect(**calls.options)
    subscription = await nc.subscribe(backend.subject)
    await sync(nc)
    for _ in range(2):
        await nc.publish(backend.subject, b"x", reply=reply)
    await until(lambda: len(calls.errors) == 2)
    words = f'nats: permissions violation for publish with reply of "{reply.lower()}"'
    assert {str(error) for error in calls.errors} == {words}
    await sync(nc)
    assert nc.is_connected and subscription.pending_msgs == 0


@covers("2.9/queue")
async def test_queue_group_of_servers(backend: Backend) -> None:
    calls = Calls()
    nc = await backend.connect(**calls.options)
    subscription = await nc.subscribe(backend.subject, queue="_sys_")
    await until(lambda: calls.errors)
    words = f'nats: permissions violation for subscription to "{backend.subject}" using queue "_sys_"'
    assert [str(error) for error in calls.errors] == [words]
    await nc.publish(backend.subject, b"x")
    await sync(nc)
    assert nc.is_connected and subscription.pending_msgs == 0


@covers("2.9/ordinary")
@pytest.mark.parametrize(
    "subject",
    ["$JS.foo", "$SYS.foo", "$KV.b.k", "$O.x", "$SRV.x", "$LDS.x", "$MQTT.x", "_R_.x", "_GR_", "$GR", "$GRX.a", "_INBOX.x"],
)
async def test_subjects_that_only_look_so(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(subject)
    await sync(nc)
    await nc.publish(subject, b"x", reply="$NRG.x")
    assert (await subscription.next_msg(5)).reply == "$NRG.x"


@covers("2.9/unserved")
@pytest.mark.parametrize("subject", ["$SYS.REQ.SERVER.PING", "$SYS.FOO", "$KV.b.k", "$SRV.PING"])
async def test_requests_that_nobody_serves(backend: Backend, subject: str) -> None:
    nc = await backend.connect()
    with pytest.raises(nats.errors.NoRespondersError):
        await nc.request(subject, timeout=5)
