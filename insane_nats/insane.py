"""INSANE's primitives: sessions, streams with a quality of service, sources and sinks of numbered channels, buffers.

    from insane_nats import insane

    with insane.Session(4444) as session:
        stream = session.create_stream(insane.QoS(consumption="low"))
        source, sink = stream.create_source(7), stream.create_sink(8)
        buffer = source.get_buffer(5)
        buffer.data[:] = b"hello"
        source.emit(buffer)
        with sink.consume(timeout=1) as answer:
            print(bytes(answer.data))

Channel n is the NATS subject $INSANE.n, so NATS programs with the same port hear and are heard.
"""

from __future__ import annotations

from insane_nats.shim.insane import Session, Sink, Source, Stream
from insane_nats.shim.insane_buffer import Buffer, ReleasedError
from insane_nats.shim.insane_handle import ClosedError, InsaneError
from insane_nats.shim.qos import QoS

__all__ = ["Buffer", "ClosedError", "InsaneError", "QoS", "ReleasedError", "Session", "Sink", "Source", "Stream"]
