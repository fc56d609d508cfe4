"""Ping-pong over INSANE's primitives in Python: `python pingpong.py pong`, then `python pingpong.py ping [ROUNDS]`, in any
order, in a directory with an nsn-app.cfg. Ping prints the median round trip. They understand pingpong.c's."""

import statistics
import sys
import time

from insane_nats import insane

CHANNEL = 7
SIZE = 64


def pong(source: insane.Source, sink: insane.Sink) -> None:
    """Echoes what it consumes; an empty message ends it."""
    ended = False
    while not ended:
        buffer = sink.consume()
        ended = len(buffer) == 0
        source.emit(buffer)


def emit(source: insane.Source, size: int) -> None:
    """Emits until somebody listens: pong may start later."""
    while True:
        buffer = source.get_buffer(size)
        buffer.data[:] = b"x" * size
        if source.outcome(source.emit(buffer)):
            return
        time.sleep(0.001)


def ping(source: insane.Source, sink: insane.Sink, rounds: int) -> None:
    times = []
    for number in range(rounds + 1):
        begin = time.perf_counter_ns()
        emit(source, SIZE if number < rounds else 0)
        sink.consume().release()
        times.append(time.perf_counter_ns() - begin)
    print(f"{rounds} round trips of {SIZE} bytes, median {statistics.median(times[:-1]) / 1e3:.2f} us")


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] not in ("ping", "pong"):
        sys.exit("usage: pingpong.py ping [ROUNDS] | pingpong.py pong")
    with insane.Session(name=words[0]) as session:
        stream = session.create_stream(consumption="poll")
        sink, source = stream.create_sink(CHANNEL), stream.create_source(CHANNEL)
        if words[0] == "pong":
            pong(source, sink)
        else:
            ping(source, sink, int(words[1]) if len(words) > 1 else 1000)


if __name__ == "__main__":
    main()
