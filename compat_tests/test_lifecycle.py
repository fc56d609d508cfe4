"""Connections: making, asking, limits and ending them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import nats.errors
import pytest

from compat_tests.backend import Backend, arrived, free_port, payloads, sync, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from compat_tests.backend import Server

covers = pytest.mark.covers


class Calls:
    """Callbacks that write down their order."""

    def __init__(self) -> None:
        self.order: list[str] = []

    async def disconnected(self) -> None:
        self.order.append("disconnected")

    async def reconnected(self) -> None:
        self.order.append("reconnected")

    async def closed(self) -> None:
        self.order.append("closed")

    @property
    def options(self) -> dict[str, Any]:
        return {"disconnected_cb": self.disconnected, "reconnected_cb": self.reconnected, "closed_cb": self.closed}


@covers("4.2/states", "api/connect-client-class")
async def test_states(backend: Backend) -> None:
    nc = backend.nats.NATS()
    backend.adopt(nc)
    assert not nc.is_connected and not nc.is_closed
    await nc.connect(backend.url)
    assert nc.is_connected
    assert not (nc.is_closed or nc.is_connecting or nc.is_reconnecting or nc.is_draining or nc.is_draining_pubs)
    await nc.close()
    assert nc.is_closed
    assert not (nc.is_connected or nc.is_connecting or nc.is_reconnecting or nc.is_draining)


@covers("4.2/close-order", "4.2/after-close")
async def test_close_calls_back_once(backend: Backend) -> None:
    calls = Calls()
    nc = await backend.connect(**calls.options)
    await nc.close()
    assert calls.order == ["disconnected", "closed"]
    await nc.close()
    assert calls.order == ["disconnected", "closed"]


@covers("4.2/after-close")
async def test_everything_else_after_close(backend: Backend) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    await nc.close()
    for call in (
        lambda: nc.publish(backend.subject),
        lambda: nc.subscribe(backend.subject),
        lambda: nc.request(backend.subject),
        lambda: nc.request(backend.subject, old_style=True),
        lambda: nc.flush(),
        lambda: nc.rtt(),
        lambda: nc.drain(),
        lambda: subscription.unsubscribe(),
        lambda: subscription.drain(),
        lambda: subscription.next_msg(),
    ):
        with pytest.raises(nats.errors.ConnectionClosedError):
            await call()
    assert nc.connected_url is None and nc.client_id is None


@covers("api/context-manager", "4.2/close-order")
async def test_context_manager(backend: Backend) -> None:
    calls = Calls()
    async with await backend.connect(**calls.options) as nc:
        subscription = await nc.subscribe(backend.subject)
        await nc.publish(backend.subject, b"x")
        assert (await subscription.next_msg(5)).data == b"x"
    assert nc.is_closed and calls.order == ["disconnected", "closed"]
    with pytest.raises(ZeroDivisionError):
        async with await backend.connect() as nc:
            raise ZeroDivisionError
    assert nc.is_closed


@covers("api/connect-client-class", "api/message")
async def test_subclass_with_a_message_class(backend: Backend) -> None:
    class Message(backend.nats.aio.msg.Msg):  # type: ignore[misc,name-defined]
        def shout(self) -> str:
            return str(self.data.decode().upper())

    class MyClient(backend.nats.aio.client.Client):  # type: ignore[misc,name-defined]
        msg_class = Message

    nc = MyClient()
    await nc.connect(backend.url)
    backend.adopt(nc)
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"hey")
    assert (await subscription.next_msg(5)).shout() == "HEY"


@covers("api/connect-urls")
@pytest.mark.parametrize(
    "form", ["nats://127.0.0.1:{}", "127.0.0.1:{}", "nats://localhost:{}", "localhost:{}", "nats://127.0.0.1:{}/"]
)
async def test_url_forms(backend: Backend, form: str) -> None:
    nc = await backend.connect(form.format(backend.server.port))
    await nc.flush()
    assert nc.connected_url is not None and nc.connected_url.port == backend.server.port


@covers("api/connect-urls")
async def test_list_of_urls(backend: Backend) -> None:
    nc = await backend.connect([backend.url, backend.url.replace("127.0.0.1", "localhost")], dont_randomize=True)
    assert [uri.hostname for uri in nc.servers] == ["localhost", "127.0.0.1"] or len(nc.servers) == 2
    await nc.flush()


@covers("api/connect-urls")
@pytest.mark.parametrize(
    "servers",
    ["nats://", "nats://127.0.0.1:port", "nats://127.0.0.1:99999", ["nats://127.0.0.1:4222", "ws://127.0.0.1:4222"], 42],
    ids=repr,
)
async def test_bad_urls(backend: Backend, servers: Any) -> None:
    with pytest.raises(nats.errors.Error):
        await backend.nats.connect(servers, max_reconnect_attempts=1, reconnect_time_wait=0.01)


@covers("api/connect-callbacks")
@pytest.mark.parametrize(
    "name", ["error_cb", "disconnected_cb", "closed_cb", "reconnected_cb", "discovered_server_cb", "lame_duck_mode_cb"]
)
async def test_callbacks_must_be_coroutines(backend: Backend, name: str) -> None:
    with pytest.raises(nats.errors.InvalidCallbackTypeError):
        await backend.nats.connect(backend.url, **{name: lambda *_: None})


@covers("api/connect-refused", "api/exceptions")
@pytest.mark.parametrize("reconnect", [True, False])
async def test_nobody_there(backend: Backend, reconnect: bool) -> None:
    """The suite forbids insane_nats to start a daemon by itself, so that both have nobody to talk to."""
    reported: list[Exception] = []

    async def error_cb(error: Exception) -> None:
        reported.append(error)

    with pytest.raises(nats.errors.NoServersError):
        await backend.nats.connect(
            f"nats://127.0.0.1:{free_port()}",
            error_cb=error_cb,
            allow_reconnect=reconnect,
            max_reconnect_attempts=1,
            reconnect_time_wait=0.01,
        )
    assert reported


@covers("api/connect-arguments")
async def test_connect_arguments(backend: Backend) -> None:
    async def nothing(*_: object) -> None:
        pass

    nc = await backend.connect(
        error_cb=nothing,
        disconnected_cb=nothing,
        closed_cb=nothing,
        discovered_server_cb=nothing,
        reconnected_cb=nothing,
        name="a name",
        pedantic=False,
        verbose=False,
        allow_reconnect=True,
        connect_timeout=2,
        reconnect_time_wait=1,
        max_reconnect_attempts=3,
        ping_interval=10,
        max_outstanding_pings=3,
        dont_randomize=True,
        flusher_queue_size=100,
        no_echo=False,
        tls=None,
        tls_hostname=None,
        tls_handshake_first=False,
        user=None,
        password=None,
        token=None,
        drain_timeout=5,
        signature_cb=None,
        user_jwt_cb=None,
        user_credentials=None,
        nkeys_seed=None,
        nkeys_seed_str=None,
        inbox_prefix="_INBOX",
        pending_size=1024 * 1024,
        flush_timeout=2,
        ws_connection_headers=None,
        reconnect_to_server_handler=None,
        lame_duck_mode_cb=nothing,
        skip_subject_validation=False,
    )
    subscription = await nc.subscribe(backend.subject)
    await nc.publish(backend.subject, b"x")
    assert (await subscription.next_msg(5)).data == b"x"
    assert nc.options["name"] == "a name" and nc.options["ping_interval"] == 10


@covers("api/connect-arguments")
@pytest.mark.parametrize(
    "options",
    [
        {"verbose": True},
        {"user": "me", "password": "secret"},
        {"token": "t0ken"},
        {"user": lambda: "me", "password": lambda: "secret"},
        {"pending_size": 0},
        {"flusher_queue_size": 1},
        {"name": "ü" * 40},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_connections_with_odd_options_work(backend: Backend, options: dict[str, Any]) -> None:
    nc = await backend.connect(**options)
    subscription = await nc.subscribe(backend.subject)
    for number in range(20):
        await nc.publish(backend.subject, b"%d" % number)
    await arrived(nc, nc)
    assert [int(data) for data in await payloads(subscription)] == list(range(20))


@covers("api/properties", "1.9/max-payload-advertised")
async def test_properties(backend: Backend) -> None:
    one, two = await backend.connect(), await backend.connect()
    assert one.connected_url is not None and one.connected_url.netloc == f"127.0.0.1:{backend.server.port}"
    assert [uri.netloc for uri in one.servers] == [f"127.0.0.1:{backend.server.port}"]
    assert [server.uri.netloc for server in one.server_pool] == [f"127.0.0.1:{backend.server.port}"]
    assert one.discovered_servers == []
    assert isinstance(one.client_id, int) and isinstance(two.client_id, int) and one.client_id != two.client_id
    assert one.client_ip == "127.0.0.1"
    assert one.max_payload == 1024 * 1024
    assert one.last_error is None
    assert (one.connected_server_version.major, one.connected_server_version.minor) >= (2, 10)
    await sync(one)
    assert one.pending_data_size == 0
    assert "nats client" in repr(one)


@covers("api/stats")
async def test_stats(backend: Backend) -> None:
    publisher, nc = await backend.connect(), await backend.connect()
    assert publisher.stats == dict.fromkeys(
        ["in_msgs", "out_msgs", "in_bytes", "out_bytes", "reconnects", "errors_received"], 0
    )
    one = await nc.subscribe(backend.subject)
    two = await nc.subscribe(f"{backend.subject}")
    await sync(nc)
    for size in (0, 10, 100_000):
        await publisher.publish(backend.subject, b"x" * size)
    for subscription in (one, two):
        for _ in range(3):
            await subscription.next_msg(5)
    assert (publisher.stats["out_msgs"], publisher.stats["out_bytes"]) == (3, 100_010)
    assert (nc.stats["in_msgs"], nc.stats["in_bytes"]) == (6, 200_020)
    assert (publisher.stats["in_msgs"], nc.stats["out_msgs"]) == (0, 0)


@covers("api/new-inbox")
@pytest.mark.parametrize("prefix", ["_INBOX", "own.prefix", b"raw"], ids=repr)
async def test_new_inbox(backend: Backend, prefix: str | bytes) -> None:
    nc = await backend.connect(inbox_prefix=prefix)
    inboxes = {nc.new_inbox() for _ in range(1000)}
    text = prefix if isinstance(prefix, str) else prefix.decode()
    assert len(inboxes) == 1000
    assert all(inbox.startswith(f"{text}.") and len(inbox) == len(text) + 1 + 22 for inbox in inboxes)


@covers("api/flush")
async def test_flush(backend: Backend) -> None:
    nc = await backend.connect()
    await nc.flush()
    await nc.flush(timeout=5)
    await asyncio.gather(*(nc.flush() for _ in range(50)))


@covers("api/flush", "api/rtt")
@pytest.mark.parametrize("timeout", [0, -1])
async def test_bad_timeouts(backend: Backend, timeout: int) -> None:
    nc = await backend.connect()
    with pytest.raises(nats.errors.BadTimeoutError):
        await nc.flush(timeout=timeout)
    with pytest.raises(nats.errors.BadTimeoutError):
        await nc.rtt(timeout=timeout)


@covers("api/rtt", "1.10/ping")
async def test_rtt(backend: Backend) -> None:
    nc = await backend.connect()
    for _ in range(20):
        rtt = await nc.rtt()
        assert isinstance(rtt, float) and 0 <= rtt < 5


@covers("1.10/ping")
async def test_pings_of_the_client_are_answered(backend: Backend) -> None:
    """With a PING every 10 ms, unanswered ones would end the connection after 30."""
    nc = await backend.connect(ping_interval=0.01, max_outstanding_pings=30)
    subscription = await nc.subscribe(backend.subject)
    while nc._pongs_received < 40:
        await nc.publish(backend.subject, b"x")
        await subscription.next_msg(5)
        await asyncio.sleep(0)
    assert nc.is_connected and nc.stats["reconnects"] == 0


@covers("1.9/max-payload-local", "1.9/max-payload-exact")
@pytest.mark.parametrize("headers", [None, {"A": "b"}], ids=["plain", "headers"])
async def test_max_payload(backend: Backend, headers: dict[str, str] | None) -> None:
    nc = await backend.connect()
    subscription = await nc.subscribe(backend.subject)
    too_large = b"x" * (nc.max_payload + 1)
    with pytest.raises(nats.errors.MaxPayloadError):
        await nc.publish(backend.subject, too_large, headers=headers)
    with pytest.raises(nats.errors.MaxPayloadError):
        await nc.request(backend.subject, too_large, headers=headers)
    with pytest.raises(nats.errors.MaxPayloadError):
        await nc.request(backend.subject, too_large, old_style=True)
    await nc.publish(backend.subject, too_large[:-200], headers=headers)
    assert len((await subscription.next_msg(5)).data) == nc.max_payload + 1 - 200
    assert nc.stats["out_msgs"] == 1


@covers("1.9/max-payload-advertised", "1.9/max-payload-local", "1.9/max-payload-exact")
@pytest.mark.parametrize("limit", [1000, 4 * 1024 * 1024])
async def test_configured_max_payload(
    backend: Backend, backend_name: str, new_server: Callable[..., Server], limit: int
) -> None:
    own = Backend(backend_name, new_server(max_payload=limit), backend.subject, dedicated=True)
    nc = await own.connect()
    try:
        assert nc.max_payload == limit
        subscription = await nc.subscribe("a")
        await nc.publish("a", b"x" * limit)
        assert len((await subscription.next_msg(5)).data) == limit
        with pytest.raises(nats.errors.MaxPayloadError):
            await nc.publish("a", b"x" * (limit + 1))
    finally:
        await own.finish()


@covers("1.9/max-payload-headers", "1.8/fatal")
async def test_headers_count_towards_max_payload(
    backend: Backend, backend_name: str, new_server: Callable[..., Server]
) -> None:
    own = Backend(backend_name, new_server(max_payload=1000), backend.subject, dedicated=True)
    calls = Calls()
    nc = await own.connect(**calls.options)
    try:
        subscription = await nc.subscribe("a")
        head = len("NATS/1.0\r\nA: b\r\n\r\n")
        await nc.publish("a", b"x" * (1000 - head), headers={"A": "b"})
        assert len((await subscription.next_msg(5)).data) == 1000 - head
        await nc.publish("a", b"x" * (1001 - head), headers={"A": "b"})
        await until(lambda: nc.is_closed and "closed" in calls.order)
        assert str(nc.last_error) == "nats: maximum payload violation"
        assert calls.order == ["disconnected", "closed"]
    finally:
        await own.finish()


@covers("api/many-connections")
async def test_many_connections_on_one_loop(backend: Backend) -> None:
    clients = await asyncio.gather(*(backend.connect() for _ in range(20)))
    subscriptions = [await nc.subscribe(backend.subject) for nc in clients]
    await sync(*clients)
    for index, nc in enumerate(clients):
        await nc.publish(backend.subject, b"%d" % index)
    for nc in clients:
        await arrived(nc, *clients)
    for subscription in subscriptions:
        assert sorted(int(data) for data in await payloads(subscription)) == list(range(20))


@covers("api/many-connections")
async def test_connections_come_and_go(backend: Backend) -> None:
    keeper = await backend.connect()
    got: list[int] = []

    async def handler(message: Msg) -> None:
        got.append(int(message.data))

    await keeper.subscribe(backend.subject, cb=handler)
    await sync(keeper)
    for number in range(50):
        nc = await backend.connect()
        await nc.publish(backend.subject, b"%d" % number)
        await nc.close()
    await until(lambda: len(got) == 50)
    assert sorted(got) == list(range(50))


@covers("api/many-connections")
async def test_client_that_connects_again_after_close(backend: Backend) -> None:
    """A new client object of the same program, after all earlier ones are gone."""
    for number in range(5):
        nc = await backend.connect()
        subscription = await nc.subscribe(backend.subject)
        await nc.publish(backend.subject, b"%d" % number)
        assert int((await subscription.next_msg(5)).data) == number
        await nc.close()


def _echo_in_a_loop_of_its_own(backend: Backend, index: int, failures: list[BaseException]) -> None:
    async def main() -> None:
        nc: Client = await backend.nats.connect(backend.url)
        subscription = await nc.subscribe(f"{backend.subject}.{index}")
        inbox = await nc.subscribe(f"{backend.subject}.all")
        await sync(nc)
        for number in range(300):
            await nc.publish(f"{backend.subject}.{index}", b"%d" % number)
            assert int((await subscription.next_msg(5)).data) == number
        await nc.publish(f"{backend.subject}.done", b"%d" % index)
        assert (await inbox.next_msg(10)).data == b"everyone is done"
        await nc.close()

    try:
        asyncio.run(main())
    except BaseException as error:
        failures.append(error)
        raise


@covers("api/many-connections")
async def test_loops_in_threads(backend: Backend) -> None:
    nc = await backend.connect()
    done = await nc.subscribe(f"{backend.subject}.done")
    await sync(nc)
    failures: list[BaseException] = []
    threads = [
        asyncio.create_task(asyncio.to_thread(_echo_in_a_loop_of_its_own, backend, index, failures)) for index in range(4)
    ]
    await until(lambda: done.pending_msgs == 4 or failures, timeout_s=15)
    await nc.publish(f"{backend.subject}.all", b"everyone is done")
    await asyncio.gather(*threads)
    assert not failures


@covers("api/ports")
async def test_ports_are_worlds_of_their_own(backend: Backend, backend_name: str, new_server: Callable[..., Server]) -> None:
    elsewhere = Backend(backend_name, new_server(), backend.subject, dedicated=True)
    here, there = await backend.connect(), await elsewhere.connect()
    try:
        heard_here, heard_there = await here.subscribe(backend.subject), await there.subscribe(backend.subject)
        await here.publish(backend.subject, b"here")
        await there.publish(backend.subject, b"there")
        await arrived(here, here)
        await arrived(there, there)
        assert (await payloads(heard_here), await payloads(heard_there)) == ([b"here"], [b"there"])
        with pytest.raises(nats.errors.NoRespondersError):
            await there.request(f"{backend.subject}.only_here", timeout=5)
    finally:
        await elsewhere.finish()
