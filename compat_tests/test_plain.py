"""Plain NATS through either import: a real nats-server that comes and goes, clusters, TLS, credentials; and nobody."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats.errors
import nkeys
import pytest

from compat_tests import jwts
from compat_tests.backend import Backend, free_port, payloads, sync, until
from compat_tests.certificates import certificates
from compat_tests.test_options import Calls, restart

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from compat_tests.conftest import OwnServers

covers = pytest.mark.covers
# Of how nats-py calls aiohttp for WebSockets.
pytestmark = pytest.mark.filterwarnings("ignore:parameter 'timeout' of type 'float' is deprecated:DeprecationWarning")


def insane(nc: Client) -> bool:
    """Whether the connection is a session of a node; nats-py has none."""
    return bool(getattr(nc, "is_insane", False))


async def works(nc: Client, subject: str) -> None:
    """Publishing, subscribing and asking."""
    subscription = await nc.subscribe(subject)
    await nc.publish(subject, b"x", headers={"A": "b"})
    message = await subscription.next_msg(5)
    assert (message.data, message.headers) == (b"x", {"A": "b"})
    await subscription.unsubscribe()
    with pytest.raises(nats.errors.NoRespondersError):
        await nc.request(subject, timeout=5)


@covers("plain/server")
async def test_server_at_the_url_is_plain_nats(plain: Backend) -> None:
    nc = await plain.connect(name="plain")
    assert not insane(nc)
    assert nc._transport is not None
    await works(nc, plain.subject)
    assert await plain.connection_names() == ["plain"]


@covers("plain/server", "api/connect-client-class")
async def test_methods_of_a_subclass_are_called(plain: Backend) -> None:
    published: list[str] = []

    class MyClient(plain.nats.aio.client.Client):  # type: ignore[misc,name-defined]
        async def publish(self, subject: str, *arguments: Any, **options: Any) -> None:
            published.append(subject)
            await super().publish(subject, *arguments, **options)

    nc = MyClient()
    await nc.connect(plain.url)
    plain.adopt(nc)
    await works(nc, plain.subject)
    assert published == [plain.subject, plain.subject]


@covers("plain/restart", "4.2/reconnect")
async def test_server_that_is_stopped_and_started_again(new_plain: OwnServers) -> None:
    """What was subscribed is back, what was published meanwhile arrives, and it is plain NATS still."""
    backend = new_plain()
    calls = Calls()
    nc = await backend.connect(**calls.options)
    called: list[bytes] = []

    async def callback(message: Msg) -> None:
        called.append(message.data)

    subscription = await nc.subscribe("a")
    await nc.subscribe("a", queue="g", cb=callback)
    await sync(nc)
    for _ in range(2):
        await backend.stop_server()
        await until(lambda: nc.is_reconnecting)
        await nc.publish("a", b"meanwhile")
        await backend.start_server()
        await until(lambda: nc.is_connected)
        assert not insane(nc)
        await nc.publish("a", b"afterwards")
        await until(lambda: subscription.pending_msgs == 2)
        assert await payloads(subscription) == [b"meanwhile", b"afterwards"]
    await until(lambda: len(called) == 4 and nc.stats["reconnects"] == 2)
    assert calls.order.count("disconnected") == calls.order.count("reconnected") == 2


@covers("plain/restart")
async def test_list_of_servers_of_which_some_are_dead(new_plain: OwnServers) -> None:
    """Over a restart of the one that lives, too."""
    backend = new_plain()
    dead = [f"nats://127.0.0.1:{free_port()}", "nats://no-such-host.invalid:4222"]
    calls = Calls()
    nc = await backend.connect([*dead, backend.url], dont_randomize=True, **calls.options)
    assert [type(error) for error in calls.errors] == [ConnectionRefusedError, socket.gaierror]
    assert not insane(nc)
    await works(nc, "a")
    await restart(backend, nc)
    await works(nc, "a")


@covers("plain/restart", "options/servers")
async def test_another_server_of_the_list_takes_over(new_plain: OwnServers) -> None:
    one, two = new_plain(), new_plain()
    nc = await one.connect([one.url, two.url], dont_randomize=True, **Calls().options)
    subscription = await nc.subscribe("a")
    await sync(nc)
    await one.stop_server()
    await until(lambda: nc.is_connected and nc.connected_url is not None and nc.connected_url.geturl() == two.url)
    assert not insane(nc)
    await nc.publish("a", b"x")
    assert (await subscription.next_msg(5)).data == b"x"


@covers("options/discovered-servers", "plain/cluster")
async def test_servers_of_a_cluster_are_discovered(new_plain: OwnServers) -> None:
    routes = [free_port(), free_port()]
    cluster = "cluster {{ name: c, listen: 127.0.0.1:{}, routes: [nats://127.0.0.1:{}], no_advertise: false }}"
    one = new_plain(more=cluster.format(*routes), jetstream=False)
    calls = Calls()
    nc = await one.connect(**calls.options)
    assert nc.discovered_servers == []
    two = new_plain(more=cluster.format(*routes[::-1]), jetstream=False)
    await until(lambda: "discovered_server" in calls.order)
    assert [uri.port for uri in nc.discovered_servers] == [two.server.port]
    await one.stop_server()
    await until(lambda: nc.is_connected and nc.connected_url is not None and nc.connected_url.port == two.server.port)
    await works(nc, "a")


@covers("plain/lame-duck", "options/lame-duck")
async def test_lame_duck_server(new_plain: OwnServers) -> None:
    backend = new_plain()
    calls = Calls()
    await backend.connect(**calls.options)
    backend.server.announce_end()
    await until(lambda: "lame_duck_mode" in calls.order)


@covers("plain/credentials")
@pytest.mark.parametrize("way", ["arguments", "callables", "url", "token"])
async def test_credentials(new_plain: OwnServers, way: str) -> None:
    authorization = "{ token: t0ken }" if way == "token" else '{ user: me, password: "se cret" }'
    backend = new_plain(more=f"authorization {authorization}", jetstream=False)
    port = backend.server.port
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "arguments": (backend.url, {"user": "me", "password": "se cret"}),
        "callables": (backend.url, {"user": lambda: "me", "password": lambda: "se cret"}),
        "url": (f"nats://me:se cret@127.0.0.1:{port}", {}),
        "token": (f"nats://t0ken@127.0.0.1:{port}", {}),
    }
    url, options = ways[way]
    await works(await backend.connect(url, **options), "a")


@covers("plain/credentials")
@pytest.mark.parametrize("options", [{}, {"user": "me", "password": "wrong"}, {"token": "wrong"}], ids=str)
async def test_wrong_credentials(new_plain: OwnServers, options: dict[str, Any]) -> None:
    backend = new_plain(more="authorization { user: me, password: secret }", jetstream=False)
    calls = Calls()
    with pytest.raises(nats.errors.Error) as raised:
        await backend.nats.connect(backend.url, allow_reconnect=False, **calls.options, **options)
    assert "Authorization Violation" in str(raised.value)
    assert [str(error) for error in calls.errors] == [str(raised.value)]


@covers("plain/keys")
@pytest.mark.parametrize("way", ["file", "text", "wrong"])
async def test_nkeys(new_plain: OwnServers, tmp_path: Path, way: str) -> None:
    seed = jwts.new_seed(nkeys.PREFIX_BYTE_USER)
    backend = new_plain(more=f"authorization {{ users: [ {{ nkey: {jwts.public(seed)} }} ] }}", jetstream=False)
    file = tmp_path / "user.nk"
    file.write_bytes(seed)
    if way == "wrong":
        other = jwts.new_seed(nkeys.PREFIX_BYTE_USER).decode()
        with pytest.raises(nats.errors.Error, match="Authorization Violation"):
            await backend.nats.connect(backend.url, nkeys_seed_str=other, allow_reconnect=False, error_cb=Calls().error)
        return
    options = {"nkeys_seed": str(file)} if way == "file" else {"nkeys_seed_str": seed.decode()}
    nc = await backend.connect(**options, **Calls().options)
    await works(nc, "a")
    await restart(backend, nc)
    await works(nc, "a")


@covers("plain/keys")
@pytest.mark.parametrize("way", ["file", "text"])
async def test_jwt(new_plain: OwnServers, tmp_path: Path, way: str) -> None:
    operator = jwts.make_operator()
    backend = new_plain(more=operator.configuration, jetstream=False)
    file = tmp_path / "user.creds"
    file.write_text(operator.credentials)
    credentials = file if way == "file" else backend.nats.aio.client.RawCredentials(operator.credentials)
    nc = await backend.connect(user_credentials=credentials, **Calls().options)
    await works(nc, "a")
    await restart(backend, nc)
    await works(nc, "a")


@covers("plain/permissions")
async def test_permissions(new_plain: OwnServers) -> None:
    permissions = '{ publish: "a", subscribe: ["a", "_INBOX.>"] }'
    user = f"{{ user: me, password: p, permissions: {permissions} }}"
    backend = new_plain(more=f"authorization {{ users: [{user}] }}", jetstream=False)
    calls = Calls()
    nc = await backend.connect(user="me", password="p", **calls.options)
    await nc.publish("b", b"x")
    await nc.subscribe("b")
    await until(lambda: len(calls.errors) == 2)
    assert [str(error) for error in calls.errors] == [
        'nats: permissions violation for publish to "b"',
        'nats: permissions violation for subscription to "b"',
    ]
    await works(nc, "a")


def tls_server(more: str = "") -> str:
    """Of a server's configuration."""
    files = certificates()
    return f'tls {{ cert_file: "{files.certificate}", key_file: "{files.key}"{more} }}'


@covers("plain/tls")
@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_tls(new_plain: OwnServers, scheme: str) -> None:
    """Also over a restart."""
    backend = new_plain(more=tls_server(), jetstream=False)
    url = f"{scheme}://localhost:{backend.server.port}"
    nc = await backend.connect(url, tls=certificates().trusting(), **Calls().options)
    assert not insane(nc)
    await works(nc, "a")
    await restart(backend, nc)
    await works(nc, "a")


@covers("plain/tls")
async def test_tls_handshake_first(new_plain: OwnServers) -> None:
    backend = new_plain(more=tls_server(", handshake_first: true"), jetstream=False, greeting=False)
    url = f"nats://localhost:{backend.server.port}"
    nc = await backend.connect(url, tls=certificates().trusting(), tls_handshake_first=True, **Calls().options)
    await works(nc, "a")


@covers("plain/websocket")
async def test_websocket(new_plain: OwnServers) -> None:
    port = free_port()
    backend = new_plain(more=f'websocket {{ listen: "127.0.0.1:{port}", no_tls: true }}', jetstream=False)
    nc = await backend.connect(f"ws://127.0.0.1:{port}")
    assert not insane(nc)
    await works(nc, "a")


@covers("plain/tls")
async def test_server_whose_certificate_is_not_trusted(new_plain: OwnServers) -> None:
    backend = new_plain(more=tls_server(), jetstream=False)
    with pytest.raises(ssl.SSLCertVerificationError):
        await backend.nats.connect(f"tls://localhost:{backend.server.port}", allow_reconnect=False, error_cb=Calls().error)


@covers("plain/nobody")
@pytest.mark.parametrize("scheme", ["tls", "ws", "wss"])
async def test_nobody_at_a_url_that_is_no_nodes(backend: Backend, scheme: str) -> None:
    """Nothing is started there: nats-py's way, and nats-py's error."""
    calls = Calls()
    with pytest.raises(nats.errors.NoServersError):
        await backend.nats.connect(
            f"{scheme}://127.0.0.1:{free_port()}", max_reconnect_attempts=1, reconnect_time_wait=0.01, **calls.options
        )
    assert calls.errors
