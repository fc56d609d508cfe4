"""A node whose application ID asks for credentials, and the socket that it gives a client with permissions."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

from nsnd import protocol as p
from tests.nsnd_client import RawNode, RawSession, runtime_directory, until

LIMITED_USERS = """
[auth.{port}]
users = [
  {{user = "free", password = "p"}},
  {{user = "me", password = "p", permissions = {{publish = ["may.>"], subscribe = {{allow = ["hear.>"], deny = [
    "hear.not.>"]}}}}}},
  {{user = "all", password = "p", permissions = {{}}}},
]
"""  # of whom two have permissions


def write(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


class AuthNode(RawNode):
    """With a configuration that has users."""

    @property
    def config(self) -> Path:
        return self.directory / "nsnd.cfg"

    def configure(self, text: str) -> None:
        write(self.config, text.format(port=self.port))

    def start(self, *arguments: str) -> AuthNode:
        super().start("--config", str(self.config), *arguments)
        return self

    def reread(self) -> None:
        before = self.log().count("configuration reread")
        self.signal(signal.SIGHUP)
        until(lambda: self.log().count("configuration reread") > before, "it is reread")

    def stranger(self, name: str = "") -> RawSession:
        return RawSession(self.socket, self.port, name)


@contextlib.contextmanager
def auth_node(users: str) -> Iterator[AuthNode]:
    """It runs, with that configuration; it may be killed in between. Nothing may go wrong in it."""
    with runtime_directory() as directory:
        running = AuthNode(directory)
        running.configure(users)
        yield running.start()
        assert running.process is not None
        if running.process.poll() is None:
            assert "Traceback" not in running.log()
            running.kill()


class Raw:
    """The socket that nsnd gives a client with permissions, without anything in between."""

    def __init__(self, node: AuthNode, user: str = "me", connect: str = '{"headers":true,"no_responders":true,"verbose":false,'
                 '"pedantic":false}') -> None:
        self.session = node.stranger(user)
        self.session.challenged()
        self.session.answer(user=user, password="p")
        packet = self.session.expect(p.PacketType.RELAYED)
        (descriptor,) = packet.fds
        self.packet = packet
        self.sock = socket.socket(fileno=descriptor)
        self.sock.settimeout(10)
        self.data = b""
        self.info = json.loads(self.line()[5:])
        if connect:
            self.send(f"CONNECT {connect}\r\n")

    def send(self, text: str | bytes) -> None:
        self.sock.sendall(text.encode() if isinstance(text, str) else text)

    def line(self) -> str:
        while b"\r\n" not in self.data:
            more = self.sock.recv(65536)
            if not more:
                raise EOFError(self.data)
            self.data += more
        line, _, self.data = self.data.partition(b"\r\n")
        return line.decode()

    def says(self, text: str | bytes) -> list[str]:
        """All lines that come until what was sent is dealt with."""
        self.send(text)
        self.send("PING\r\n")
        lines = []
        while (line := self.line()) != "PONG":
            lines.append(line)
        return lines

    def ends(self, text: str | bytes) -> list[str]:
        """The last lines before the end that this brings about."""
        self.send(text)
        lines = []
        try:
            while True:
                lines.append(self.line())
        except (EOFError, ConnectionResetError):
            return lines
