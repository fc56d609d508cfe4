"""A buffer of the fabric as a Python object: used as long as it is held, given back exactly once, whoever forgets it."""

from __future__ import annotations

import sys
import warnings
import weakref
from contextlib import suppress
from types import TracebackType
from typing import Any

from insane_nats.shim.insane_handle import Handle
from insane_nats.shim.native import ffi, lib


class ReleasedError(ValueError):
    """The buffer was released or emitted before."""


class _Fate:
    """What becomes of a buffer's memory when the last view of it is gone."""

    __slots__ = ("buffer", "handle", "meant")

    def __init__(self, handle: Handle, buffer: Any) -> None:
        self.handle = handle
        self.buffer = buffer
        self.meant = False  # it was released while views of it were alive

    def __call__(self, _: Any) -> None:
        if self.handle.inherited or sys.is_finalizing():
            return
        lib.nsn_insane_release(self.handle.session, self.buffer)
        self.handle.collected()
        if not self.meant:
            text = "an INSANE buffer was neither released nor emitted: it is released now"
            warnings.warn(text, ResourceWarning, stacklevel=2)


class Buffer:
    """Memory lent by the fabric: from Source.get_buffer to be written, from Sink.consume to be read.

    It goes back by release(), by the end of a with block, or by Source.emit(); using it later raises ReleasedError. One that
    is forgotten goes back when it is collected, with a ResourceWarning.
    """

    __slots__ = ("__weakref__", "_buffer", "_fate", "_handle", "_memory", "_owner", "_view", "_writable")

    def __init__(self, handle: Handle, buffer: Any, writable: bool) -> None:
        """buffer: libnsn's struct nsn_buffer, which is this object's from now on."""
        self._handle = handle
        self._buffer = buffer
        self._writable = writable
        self._memory: Any = None
        self._view: memoryview | None = None
        self._attach()

    @property
    def data(self) -> memoryview:
        """The bytes: writable when the buffer is to be emitted, read-only when it was consumed. Valid until release."""
        view = self._view
        if view is None:
            raise ReleasedError("this buffer was released or emitted: take another one")
        if self._handle.inherited:
            raise ReleasedError("this buffer belongs to the parent process: open a session in the child")
        return view

    @property
    def released(self) -> bool:
        return self._view is None

    def __len__(self) -> int:
        return len(self.data)

    def __bytes__(self) -> bytes:
        return bytes(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.data[index] = value

    def __buffer__(self, flags: int) -> memoryview:
        return self.data

    def release(self) -> None:
        """Gives the buffer back. BufferError while another object views its memory (a slice, an array): release that first.
        To release it twice is no error."""
        if self._view is None:
            return
        if self._handle.inherited:
            self._view = None
            return
        self._detach("released")
        lib.nsn_insane_release(self._handle.session, self._buffer)
        self._handle.gave_back()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """As release(), but while other objects view its memory, that goes back when the last of them is gone."""
        try:
            self.release()
        except BufferError:
            self._fate.meant = True
            self._view = self._memory = self._owner = None
            text = "an INSANE buffer is still viewed behind its with block: its memory goes back with the last view"
            warnings.warn(text, ResourceWarning, stacklevel=2)

    def give_away(self) -> Any:
        """For who emits it: libnsn's buffer, and this object is released. BufferError as release()."""
        self._detach("emitted")
        return self._buffer

    def take_back(self) -> None:
        """It could not be emitted."""
        self._attach()

    def _attach(self) -> None:
        self._fate = _Fate(self._handle, self._buffer)
        self._owner = ffi.gc(self._buffer.data, self._fate)
        self._look_at(ffi.buffer(self._owner, self._buffer.len))  # whatever views it keeps it, and it keeps the owner

    def _look_at(self, memory: Any) -> None:
        view = memoryview(memory)
        self._memory = memory
        self._view = view if self._writable else view.toreadonly()

    def _detach(self, what: str) -> None:
        """This object's own hold of the memory ends, unless others have one: BufferError."""
        view, memory = self.data, self._memory
        alive = weakref.ref(memory)
        self._view = self._memory = None
        with suppress(BufferError):  # the same is found below, where it is told
            view.release()
        del view, memory
        memory = alive()
        if memory is not None:
            self._look_at(memory)
            raise BufferError(f"the buffer cannot be {what} while a slice or an array views it: release that first")
        ffi.gc(self._owner, None)
        self._owner = None
