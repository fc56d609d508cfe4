"""A certificate for the TLS servers of this suite, made when it is first asked for. Only this suite's clients trust it."""

from __future__ import annotations

import functools
import ssl
import tempfile
from pathlib import Path

import trustme


class Certificates:
    """Files of a server at localhost, in a folder that goes with the process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="compat_tests-tls-")
        self._authority = trustme.CA()
        server = self._authority.issue_cert("localhost", "127.0.0.1")
        self.certificate = Path(self._folder.name, "server.pem")
        self.key = Path(self._folder.name, "server.key")
        server.cert_chain_pems[0].write_to_path(self.certificate)
        server.private_key_pem.write_to_path(self.key)

    def trusting(self) -> ssl.SSLContext:
        """For clients."""
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        return context


@functools.cache
def certificates() -> Certificates:
    return Certificates()
