"""Errors of the shim. Each is a subclass of the nats-py error that a NATS program would catch in its place."""

from __future__ import annotations

from nats import errors


class NoNodeError(errors.NoServersError):
    """Nobody listens at the URL, and no nsnd was or could be started for it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"nats: no servers available for connection: {self.text}"


class AutostartError(NoNodeError):
    """An nsnd was started, and did not come up."""


class AttachRefusedError(NoNodeError):
    """There is an insane_nats node at the URL, and this program may not or cannot attach to it."""


class NotEncryptedError(NoNodeError):
    """TLS or credentials were given, and the node at the URL is one that they cannot be kept secret on the way to."""


class WrongKindError(NoNodeError):
    """What listens at the URL is not what INSANE_NATS_MODE, or the kind that this connection has once and for all, asks for."""


class InheritedConnectionError(errors.ConnectionClosedError):
    """The connection was made before fork(), and this is the child."""

    def __str__(self) -> str:
        return (
            "nats: connection closed: it was made before fork() and belongs to the parent process. Connect again in the child "
            "(await nats.connect(…) behind the fork), or start children with the multiprocessing method 'spawn'"
        )


class SessionSlowConsumerError(errors.SlowConsumerError):
    """A publisher waited for this connection up to its write deadline; the backlog was discarded."""

    def __init__(self, dropped: int) -> None:
        super().__init__(subject="", reply="", sid=0, sub=None)  # type: ignore[arg-type]
        self.dropped = dropped

    def __str__(self) -> str:
        return (
            f"nats: slow consumer, {self.dropped} messages dropped: this connection did not take its messages within the "
            "write deadline of a publisher. Let callbacks return sooner, or spread the work over a queue group"
        )


class ZeroCopyError(errors.Error):
    """Memory of the fabric was asked for, on a connection that is plain NATS."""

    def __str__(self) -> str:
        return (
            "nats: zero copy needs the shared-memory fabric, and this connection is plain NATS: use publish() and subscribe() "
            "without zero_copy where nc.is_insane is false"
        )


class SubscriptionRefusedError(errors.Error):
    """nsnd did not accept a subscription."""

    def __init__(self, subject: str, text: str) -> None:
        super().__init__(f"nats: subscription to {subject!r} refused: {text}")


class NotDeliveredError(errors.Error):
    """The node could not take a message of this connection, whose user has permissions. Told to error_cb; others go on."""


class UnreadError(errors.Error):
    """Closed before subscribers had what was published, with nobody left to hand it to them."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(
            f"nats: closed while nsnd was away, and it did not come back within {waited_s:g} s: subscribers that had not heard "
            "from this connection before do not get what it published to them. Keep nsnd running, or close later"
        )


class SessionError(errors.Error):
    """The fabric said no: an errno, and libnsn's words."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"nats: {text}" if text else f"nats: shared-memory session: error {number}")
        self.errno = number


__all__ = [
    "AttachRefusedError",
    "AutostartError",
    "InheritedConnectionError",
    "NoNodeError",
    "NotDeliveredError",
    "NotEncryptedError",
    "SessionError",
    "SessionSlowConsumerError",
    "SubscriptionRefusedError",
    "UnreadError",
    "WrongKindError",
]
