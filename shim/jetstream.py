"""JetStream on a node that keeps nothing: nats-py's own errors, and one line in the log that names the way out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from nats.aio.client import NO_RESPONDERS_STATUS
from nats.js import JetStreamContext, api
from nats.js.errors import NoStreamResponseError

from insane_nats.shim import node

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from insane_nats.shim.connection import Connection

_logger = logging.getLogger("insane_nats")

SUBJECTS = "$JS."


class JetStream(JetStreamContext):
    """nats-py's context. What asks for streams and consumers is known by its subjects; a publish to a stream is not."""

    _nc: Connection

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float | None = None,
        stream: str | None = None,
        headers: dict[str, Any] | None = None,
        msg_ttl: float | None = None,
    ) -> api.PubAck:
        """As nats-py's: NoStreamResponseError when no stream takes the subject."""
        try:
            return await super().publish(subject, payload, timeout, stream, headers, msg_ttl)
        except NoStreamResponseError:
            explain(self._nc)
            raise

    async def _handle_async_reply(self, msg: Msg) -> None:
        """Of publish_async()."""
        if msg.headers and msg.headers.get(api.Header.STATUS) == NO_RESPONDERS_STATUS:
            explain(self._nc)
        await super()._handle_async_reply(msg)


def explain(connection: Connection) -> None:
    """Once a connection."""
    if not connection.is_insane or connection._jetstream_explained or connection._server_info.get("jetstream"):
        return
    connection._jetstream_explained = True
    url = f"nats://{node.place(connection.connected_url)}" if connection.connected_url is not None else "this URL"
    _logger.warning(
        "JetStream was asked for, and the insane_nats node at %s keeps no messages: streams, key-value and object stores need "
        "a NATS server. Start one on another port (nats-server -js -p PORT), and give connect() its URL (nats://HOST:PORT) in "
        "the programs that use them", url,
    )  # fmt: skip
