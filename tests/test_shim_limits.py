"""The largest payload that can be configured, and the port that keeps programs of one node apart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import insane_nats as nats
from tools import servers

LARGEST = 64 << 20  # bytes


@pytest.mark.parametrize("size", [0, 1, 1 << 20, LARGEST])
def test_payloads_arrive_on_their_port_alone(runtime_dir: Path, tmp_path: Path, free_port: int, size: int) -> None:
    config = tmp_path / "nsnd.cfg"
    config.write_text(f"[global]\nmax_payload = {LARGEST}\n")

    async def main(url: str) -> None:
        one, other, apart = [await nats.connect(place) for place in (url, url, f"nats://127.0.0.1:{free_port}")]
        subscription, elsewhere = await other.subscribe(">"), await apart.subscribe(">")
        payload = bytes([size % 251 + 1]) * size
        await one.publish("a", payload)
        assert (await subscription.next_msg(30)).data == payload
        await apart.flush()
        assert apart.is_insane and elsewhere.pending_msgs == 0
        with pytest.raises(nats.errors.MaxPayloadError):
            await one.publish("a", bytes(LARGEST + 1))
        for connection in (one, other, apart):
            await connection.close()

    with servers.nsnd(tmp_path, runtime_dir, "--config", str(config)) as server:
        asyncio.run(main(server.url))
