"""Publishes readings on channel 12 until it is stopped, or as many as are given: `python pub.py [COUNT]`. See sub.py and sub.c;
any NATS client with this port hears them as the subject $INSANE.12."""

import sys
import time

from insane_nats import insane


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else None
    number = 0
    with insane.Session(name="pub") as session:
        source = session.create_stream(reliability="reliable").create_source(12)
        while count is None or number < count:
            token = source.send(f"reading {number}".encode())
            if source.outcome(token):
                number += 1
            else:
                time.sleep(0.01)  # nobody listens yet


if __name__ == "__main__":
    main()
