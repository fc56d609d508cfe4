"""Where there is no shared memory between programs: everything goes over plain NATS, and who asks for more is told why."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tools.servers import ROOT, Server

COMPILED = ["insane_nats._nsn", "insane_nats._fast", "nsnd._fabric"]
ELSEWHERE = {
    "another system": "import sys; sys.platform = 'darwin'",
    "no compiled parts": f"import sys; sys.modules.update(dict.fromkeys({COMPILED!r}))",
}
WHY = {"another system": "needs Linux, and this is darwin", "no compiled parts": "its compiled part is not installed"}


def run(where: str, program: str) -> subprocess.CompletedProcess[str]:
    """The program, in a Python that takes itself to be elsewhere."""
    text = f"{ELSEWHERE[where]}\n{textwrap.dedent(program)}"
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("where", ELSEWHERE)
def test_everything_is_carried_by_plain_nats(where: str, nats_server: Server) -> None:
    done = run(
        where,
        f"""
        import asyncio
        import insane_nats as nats

        async def main():
            nc = await nats.connect({nats_server.url!r})
            async def answer(msg):
                await msg.respond(msg.data.upper())
            await nc.subscribe("shout", cb=answer)
            assert (await nc.request("shout", b"hello", timeout=5)).data == b"HELLO"
            sub = await nc.subscribe("a.*")
            await nc.publish("a.b", b"x", headers={{"K": "v"}})
            message = await sub.next_msg(5)
            print(message.data, message.headers, nc.is_insane)
            await nc.drain()

        asyncio.run(main())
        """,
    )
    assert (done.returncode, done.stdout) == (0, "b'x' {'K': 'v'} False\n"), done.stderr
    assert "plain NATS, no shared memory" in done.stderr and WHY[where] in done.stderr


@pytest.mark.parametrize("where", ELSEWHERE)
def test_nsnd_says_why_there_is_no_node(where: str) -> None:
    done = run(where, "import sys; sys.argv = ['nsnd']; from nsnd.cli import main; main()")
    assert done.returncode == 1
    assert WHY[where] in done.stderr and "Traceback" not in done.stderr


def test_looking_into_nodes_elsewhere() -> None:
    program = "import sys; sys.argv = ['insane-nats', 'status']; from insane_nats.cli import main; main()"
    done = run("another system", program)
    assert (done.returncode, done.stdout) == (1, "")
    assert "insane_nats has nodes on Linux only" in done.stderr


@pytest.mark.parametrize("where", ELSEWHERE)
def test_primitives_say_why_there_are_none(where: str) -> None:
    done = run(
        where,
        """
        from insane_nats import insane
        try:
            insane.Session(4222)
        except insane.InsaneError as error:
            print(error)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert WHY[where] in done.stdout
