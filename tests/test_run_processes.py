"""`insane-nats run` with a real node: every process that a program starts is a session of it, however it imports nats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.servers import ROOT, Server

TASKS = '''
"""Imports nats late, as libraries do that offer several brokers."""
import asyncio
import os

async def answer(number):
    from nats.aio.client import Client as NATS
    nc = NATS()
    await nc.connect(os.environ["NATS_URL"])
    reply = await nc.request("double", b"%d" % number, timeout=10)
    await nc.close()
    return nc.is_insane, os.getpid(), int(reply.data)

def work(number):
    return asyncio.run(answer(number))

if __name__ == "__main__":
    print(work(int(os.environ["NUMBER"])))
'''

PROGRAM = '''
import ast, asyncio, concurrent.futures, multiprocessing, os, subprocess, sys
import nats
from tasks import work

async def serve(nc):
    async def double(message):
        await message.respond(b"%d" % (2 * int(message.data)))
    await nc.subscribe("double", cb=double)

def with_pool(method):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(work, range(4)))

def with_process(method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.map(work, range(2))

def with_subprocess():
    code = "import tasks; print(tasks.work(3))"
    outputs = [
        subprocess.run([sys.executable, *arguments], env={**os.environ, "NUMBER": "3"}, stdout=subprocess.PIPE, text=True)
        for arguments in (["-c", code], ["-m", "tasks"], [os.path.join(os.path.dirname(__file__), "tasks.py")])
    ]
    return [ast.literal_eval(done.stdout) for done in outputs]

HOW = {
    "spawned pool": lambda: with_pool("spawn"),
    "forked pool": lambda: with_pool("fork"),
    "forkserver pool": lambda: with_pool("forkserver"),
    "multiprocessing pool": lambda: with_process("spawn"),
    "subprocesses": with_subprocess,
}

async def main():
    nc = await nats.connect(os.environ["NATS_URL"])
    await serve(nc)
    answers = await asyncio.to_thread(HOW[sys.argv[1]])
    ours = all(insane and pid != os.getpid() for insane, pid, _ in answers)
    print(nc.is_insane, ours, [number for _, _, number in answers])
    await nc.close()

if __name__ == "__main__":
    asyncio.run(main())
'''

EXPECTED = {
    "spawned pool": [0, 2, 4, 6],
    "forked pool": [0, 2, 4, 6],
    "forkserver pool": [0, 2, 4, 6],
    "multiprocessing pool": [0, 2],
    "subprocesses": [6, 6, 6],
}


@pytest.mark.parametrize("how", EXPECTED)
def test_processes_of_a_program_are_sessions_of_the_node(nsnd: Server, tmp_path: Path, how: str) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "program.py").write_text(PROGRAM)
    environ = os.environ | {"NATS_URL": nsnd.url, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "insane_nats", "run", str(tmp_path / "program.py"), how]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == (f"True True {EXPECTED[how]}", "")


UNREACHED = {
    "-I": "[sys.executable, '-I', '-c', CODE]",
    "-E": "[sys.executable, '-E', '-c', CODE]",
    "environment of its own": "[sys.executable, '-c', CODE], env={'PATH': os.environ['PATH']}",
}


@pytest.mark.parametrize("how", UNREACHED)
def test_children_that_it_cannot_reach_have_nats_py(tmp_path: Path, how: str) -> None:
    """README says so: whoever keeps the environment out keeps insane_nats out."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "CODE = 'import nats; print(nats.NATS.__module__)'\n"
        "import nats; print(nats.NATS.__module__, flush=True)\n"
        f"subprocess.run({UNREACHED[how]}, check=True)\n"
    )
    command = [sys.executable, "-m", "insane_nats", "run", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["insane_nats.shim.client", "nats.aio.client"], "")
