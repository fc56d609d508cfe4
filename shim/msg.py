"""Messages of a connection that lives on a session: nats-py's Msg, whose fields lie in C."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from nats.aio.msg import Msg as NatsMsg

from insane_nats.shim import headers
from insane_nats.shim.native import fast

FIELDS = tuple(field.name for field in dataclasses.fields(NatsMsg))


class Msg(fast.Message, NatsMsg):
    """nats-py's Msg. Its headers are read when somebody asks for them."""

    decode = staticmethod(headers.decode)

    async def respond(self, data: bytes) -> None:
        """Answers to the inbox of the message, if there is one."""
        client: Any = self._client
        if not client or not self.reply or self.headers is not None or not client._post(self.reply, data, None):
            await super().respond(data)

    def release(self) -> None:
        """Gives the memory of a zero_copy message back: its data cannot be used any more. BufferError while a slice or an array
        views it; then it goes back with the last of these. With other messages, and the second time, this does nothing."""
        view: Any = self.data
        if type(view) is not memoryview:
            return
        try:
            lender = view.obj
        except ValueError:
            return  # it was released before
        if isinstance(lender, fast.Loan):
            lender.meant = True
        view.release()

    def end(self) -> None:
        """As release(), behind the handler of a zero_copy subscription."""
        try:
            self.release()
        except BufferError:
            text = f"a message to {self.subject!r} is still viewed behind its handler: its memory goes back with the last view"
            warnings.warn(text, ResourceWarning, stacklevel=2)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NatsMsg):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in FIELDS)

    __hash__ = None  # type: ignore[assignment]  # as nats-py's: a dataclass that is compared by its fields

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
