"""The hot path in C (shim/fast)."""

from asyncio import Future
from collections.abc import Callable, Coroutine
from collections.abc import Iterator as AnyIterator
from typing import Any, Generic, TypeVar, final

T = TypeVar("T")

BATCH: int  # messages taken at once, at most
YIELD_S: float  # publish() lets the event loop go round at least this often,
YIELD_BYTES: int  # and once in so many bytes

@final
class Ring(Generic[T]):
    def append(self, item: T, /) -> None: ...
    def popleft(self) -> T: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> AnyIterator[T]: ...

@final
class Connection:
    max_payload: int
    waiting: int
    trimming: bool
    pedantic: bool
    @property
    def lender(self) -> Lender: ...
    last_pass: float
    def __init__(
        self, client: object, session: int, keeper: object, message_type: type, plain_class: type, plain: bool
    ) -> None: ...
    def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> Coroutine[Any, Any, None]: ...
    def post(self, subject: str, payload: bytes, reply: str | None, /) -> bool: ...
    def borrow(self, size: int, /) -> Block | int: ...
    def emit(self, subject: bytes, reply: bytes, block: Block, length: int, /) -> int: ...
    def receive(self, spin_ns: int, /) -> int: ...
    def close(self) -> None: ...

@final
class Lender:
    when_returned: Callable[[], object] | None
    @property
    def lent(self) -> int: ...

@final
class Loan:
    meant: bool
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Block:
    @property
    def data(self) -> memoryview: ...
    @property
    def released(self) -> bool: ...
    def release(self) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __enter__(self) -> Block: ...
    def __exit__(self, *arguments: object) -> None: ...

class Message: ...

class Queue:
    @property
    def _queue(self) -> Ring[Any]: ...
    _maxsize: int
    _getters: list[Future[None]]
    _joiners: list[Future[None]] | None

class Subscription:
    _received: int
    _max_msgs: int
    _pending_size: int
    _pending_bytes_limit: int
    _pending_queue: Any
    _jsi: Any
    _sink: Callable[[Any], None] | None
    _zero_copy: bool
    _fast: Connection | None
    def _next_quickly(self, timeout: float | None = 1.0) -> Coroutine[Any, Any, Any]: ...

class Iterator:
    _sub: Any
