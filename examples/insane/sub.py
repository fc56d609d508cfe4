"""Prints what is published on channel 12, in an event loop: `python sub.py [COUNT]`. See pub.py and pub.c."""

import asyncio
import sys

from insane_nats import insane


async def main() -> None:
    left = int(sys.argv[1]) if len(sys.argv) > 1 else -1
    with insane.Session(name="sub") as session:
        sink = session.create_stream(consumption="low").create_sink(12)
        async for buffer in sink:
            with buffer:
                print(bytes(buffer).decode())
            left -= 1
            if left == 0:
                break


if __name__ == "__main__":
    asyncio.run(main())
