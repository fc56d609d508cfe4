"""NumPy arrays from one program to another without a copy: `python examples/zero_copy/frames.py [MEGABYTES]`.

One part writes frames where they lie in shared memory, the other computes on them in place. Each could as well be a program of
its own; here both run in this one, over two connections.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import numpy as np

import insane_nats as nats
from insane_nats.aio.msg import Msg

URL = os.environ.get("NATS_URL", "nats://127.0.0.1:4222")
FRAMES = 20


async def main(shape: tuple[int, int]) -> None:
    camera, viewer = await nats.connect(URL), await nats.connect(URL)
    brightness: list[float] = []
    all_there = asyncio.Event()

    async def look(message: Msg) -> None:
        frame = np.frombuffer(message.data, dtype=np.float32).reshape(shape)  # a view: read-only, valid in this handler
        brightness.append(float(frame[::64, ::64].mean()))
        if len(brightness) == FRAMES:
            all_there.set()

    await viewer.subscribe("frames", cb=look, zero_copy=True)
    size = 4 * shape[0] * shape[1]
    began = time.perf_counter()
    for number in range(FRAMES):
        buffer = camera.borrow(size)
        frame = np.frombuffer(buffer.data, dtype=np.float32).reshape(shape)  # a view of the buffer: writable
        frame[:] = number
        del frame  # nothing may view the buffer when it is given away
        await camera.emit("frames", buffer)
    await all_there.wait()
    elapsed = time.perf_counter() - began
    print(f"{FRAMES} frames of {size >> 20} MiB in {elapsed * 1000:.0f} ms")
    print(f"brightness {brightness[0]:.0f} to {brightness[-1]:.0f}")
    await camera.close()
    await viewer.close()


if __name__ == "__main__":
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    asyncio.run(main((256 * megabytes, 1024)))
