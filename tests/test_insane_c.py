"""INSANE's primitives as a C program uses them: nsn/nsn.h and libnsn.so as they are installed, INSANE's own programs and its
ctypes binding, the meeting with NATS, and what a program is told when something is missing."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import insane_nats
from insane_nats.cli.config import ConfigError, installed
from tests import insane as programs
from tests.insane import build_text, config_words, configure, finish, run, start
from tools import servers

HEAD = """
#include <nsn/nsn.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition) do { if (!(condition)) { \\
    fprintf(stderr, "line %d: not true: %s (%s)\\n", __LINE__, #condition, nsn_error_text()); exit(1); } } while (0)

static inline nsn_stream_t stream_with(int consumption)
{
    return nsn_create_stream((nsn_options_t){.consumption = consumption, .reliability = NSN_QOS_RELIABILITY_RELIABLE});
}
"""


def test_names_signatures_constants_and_layouts_are_insanes(tmp_path: Path) -> None:
    """As INSANE 2.0 has them, checked by the compiler."""
    program = build_text(
        HEAD
        + """
#define SAME(function, type) _Static_assert(__builtin_types_compatible_p(__typeof__(function), type), #function)
SAME(nsn_init, int(void));
SAME(nsn_close, int(void));
SAME(nsn_create_stream, nsn_stream_t(nsn_options_t));
SAME(nsn_destroy_stream, int(nsn_stream_t));
SAME(nsn_create_source, nsn_source_t(nsn_stream_t, uint32_t));
SAME(nsn_destroy_source, int(nsn_source_t));
SAME(nsn_create_sink, nsn_sink_t(nsn_stream_t, uint32_t, handle_data_cb));
SAME(nsn_destroy_sink, int(nsn_sink_t));
SAME(nsn_get_buffer, nsn_buffer_t *(size_t, int));
SAME(nsn_emit_data, int(nsn_source_t, nsn_buffer_t *));
SAME(nsn_check_emit_outcome, int(nsn_source_t, int));
SAME(nsn_data_available, int(nsn_sink_t, int));
SAME(nsn_consume_data, nsn_buffer_t *(nsn_sink_t, int));
SAME(nsn_release_data, int(nsn_buffer_t *));
SAME(nsn_buffer_is_valid, int(nsn_buffer_t *));
SAME(nsn_stream_t, uint32_t);
SAME(nsn_source_t, uint32_t);
SAME(nsn_sink_t, uint32_t);
_Static_assert(sizeof(handle_data_cb) == sizeof(void *), "");
_Static_assert(sizeof(nsn_buffer_t) == 24 && offsetof(nsn_buffer_t, index) == 0 && offsetof(nsn_buffer_t, data) == 8 &&
               offsetof(nsn_buffer_t, len) == 16, "");
_Static_assert(sizeof(nsn_options_t) == 16 && offsetof(nsn_options_t, datapath) == 0 &&
               offsetof(nsn_options_t, consumption) == 4 && offsetof(nsn_options_t, determinism) == 8 &&
               offsetof(nsn_options_t, reliability) == 12, "");
_Static_assert(NSN_INVALID_SNK == UINT32_MAX && NSN_INVALID_SRC == UINT32_MAX && NSN_INVALID_STREAM_HANDLE == UINT32_MAX &&
               NSN_INVALID_PLUGIN_HANDLE == UINT32_MAX, "");
_Static_assert(NSN_QOS_DATAPATH_DEFAULT == 0 && NSN_QOS_DATAPATH_FAST == 1 && NSN_QOS_CONSUMPTION_POLL == 0 &&
               NSN_QOS_CONSUMPTION_LOW == 1 && NSN_QOS_CONSUMPTION_ADAPTIVE == 2 && NSN_QOS_DETERMINISM_DEFAULT == 0 &&
               NSN_QOS_DETERMINISM_TIMESENSITIVE == 1 && NSN_QOS_RELIABILITY_UNRELIABLE == 0 &&
               NSN_QOS_RELIABILITY_RELIABLE == 1, "");
_Static_assert(NSN_BLOCKING == 1 && NSN_NONBLOCKING == 2 && NSN_ERROR_ALREADY_INITIALIZED == 1 &&
               NSN_ERROR_NOT_INITIALIZED == 2, "");
int main(void) { return puts(INSANE_VERSION) < 0 || strcmp(NSN_APP_DEFAULT_CONFIG_FILE, "nsn-app.cfg") != 0; }
""",
        tmp_path,
    )
    assert run([str(program)], tmp_path).strip()


def test_header_is_plain_c_and_cpp(tmp_path: Path) -> None:
    source = tmp_path / "header.c"
    source.write_text("#include <nsn/nsn.h>\n#include <nsn/nsn.h>\nint main(void) { return 0; }\n")
    arguments = ["-Wall", "-Wextra", "-Werror", *config_words("--cflags"), "-c", str(source), "-o", os.devnull]
    for command in (["gcc", "-std=c99", "-pedantic"], ["g++", "-x", "c++", "-std=c++11"]):
        if shutil.which(command[0]) is None:
            continue
        done = subprocess.run([*command, *arguments], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()


def test_session_life(nsnd: servers.Server, tmp_path: Path) -> None:
    configure(tmp_path, nsnd.port)
    program = build_text(
        HEAD
        + """
int main(void)
{
    nsn_options_t wrong = {.datapath = 7};
    CHECK(nsn_close() == NSN_ERROR_NOT_INITIALIZED);
    CHECK(nsn_destroy_stream(1) == NSN_ERROR_NOT_INITIALIZED);
    CHECK(!nsn_buffer_is_valid(nsn_get_buffer(10, 0)) && errno == ENOTCONN);
    CHECK(!nsn_buffer_is_valid(NULL));
    for (int round = 0; round < 3; round++) {
        CHECK(nsn_init() == 0);
        CHECK(nsn_init() == NSN_ERROR_ALREADY_INITIALIZED);
        nsn_stream_t stream = stream_with(NSN_QOS_CONSUMPTION_LOW);
        nsn_sink_t sink = nsn_create_sink(stream, 1, NULL);
        nsn_source_t source = nsn_create_source(stream, 1);
        CHECK(stream != NSN_INVALID_STREAM_HANDLE && sink != NSN_INVALID_SNK && source != NSN_INVALID_SRC);
        CHECK(nsn_data_available(sink, NSN_NONBLOCKING) == 0);
        nsn_buffer_t *none = nsn_consume_data(sink, NSN_NONBLOCKING);
        CHECK(!nsn_buffer_is_valid(none) && none->len == 0 && none->index == EAGAIN && errno == EAGAIN);
        CHECK(nsn_release_data(none) == -EINVAL);
        nsn_buffer_t *buffer = nsn_get_buffer(64, NSN_BLOCKING);
        CHECK(nsn_buffer_is_valid(buffer) && buffer->len == 64);
        int token = nsn_emit_data(source, buffer);
        CHECK(token >= 0 && nsn_check_emit_outcome(source, token) == 0); /* nobody listens but itself */
        CHECK(nsn_release_data(buffer) == -EINVAL); /* as INSANE's example does behind emit */
        CHECK(nsn_release_data(nsn_get_buffer(64, 0)) == 1);
        if (round == 0)
            CHECK(nsn_destroy_sink(sink) == 0 && nsn_destroy_source(source) == 0 && nsn_destroy_stream(stream) == 0);
        CHECK(nsn_close() == 0);
    }
    CHECK(nsn_init() == 0);
    CHECK(freopen("words", "w", stderr));
    CHECK(nsn_create_stream(wrong) == NSN_INVALID_STREAM_HANDLE && strstr(nsn_error_text(), "datapath 7"));
    CHECK(nsn_create_sink(12345, 1, NULL) == NSN_INVALID_SNK);
    CHECK(nsn_close() == 0);
    return 0;
}
""",
        tmp_path,
    )
    run([str(program)], tmp_path)
    words = (tmp_path / "words").read_text()  # failures to set something up are told
    assert "insane_nats: nsn_create_stream: a stream's options are datapath 7" in words
    assert "insane_nats: nsn_create_sink: there is no such stream" in words


def init_words(folder: Path, environ: dict[str, str]) -> str:
    """What a program says whose nsn_init fails."""
    program = build_text(HEAD + "int main(void) { return nsn_init() < 0 ? 3 : 0; }\n", folder)
    done = subprocess.run([str(program)], cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    return done.stderr


def test_what_is_missing_is_named(runtime_dir: Path, free_port: int, tmp_path: Path) -> None:
    assert "nsn_init: there is no nsn-app.cfg: write one" in init_words(tmp_path, {})
    (tmp_path / "nsn-app.cfg").write_text("[app]\nl4_port = 70000\n")
    assert "nsn-app.cfg:2: l4_port = 70000: allowed is a whole number from 1 to 65535" in init_words(tmp_path, {})
    assert "elsewhere.cfg: write one" in init_words(tmp_path, {"INSANE_APP_CONFIG": "elsewhere.cfg"})
    configure(tmp_path, free_port)
    words = init_words(tmp_path, {"INSANE_NATS_AUTOSTART": "0"})
    assert f"nobody serves application ID {free_port}, and INSANE_NATS_AUTOSTART=0 forbids" in words
    configure(tmp_path, free_port, 'log_level = "none"\n')
    assert init_words(tmp_path, {"INSANE_NATS_AUTOSTART": "0"}) == ""


def test_node_of_another_kind_at_the_port(nats_server: servers.Server, tmp_path: Path) -> None:
    configure(tmp_path, nats_server.port)
    assert "belongs to a NATS server" in init_words(tmp_path, {})


def test_nsnd_is_started_by_the_program(runtime_dir: Path, free_port: int, tmp_path: Path) -> None:
    """The nsnd of the same installation, which need not be on PATH."""
    configure(tmp_path, free_port)
    program = build_text(HEAD + "int main(void) { CHECK(nsn_init() == 0); CHECK(nsn_close() == 0); return 0; }\n", tmp_path)
    environ = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([str(program)], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert (runtime_dir / "nsnd.sock").is_socket()


ECHO = (
    HEAD
    + """
int main(int count, char **words)
{
    CHECK(nsn_init() == 0);
    nsn_stream_t stream = stream_with(NSN_QOS_CONSUMPTION_LOW);
    nsn_sink_t sink = nsn_create_sink(stream, 7, NULL);
    nsn_source_t source = nsn_create_source(stream, 8);
    CHECK(count == 2 && sink != NSN_INVALID_SNK && source != NSN_INVALID_SRC);
    puts("ready");
    fflush(stdout);
    for (int left = atoi(words[1]); left; left--) {
        nsn_buffer_t *buffer = nsn_consume_data(sink, NSN_BLOCKING);
        CHECK(nsn_buffer_is_valid(buffer));
        CHECK(nsn_emit_data(source, buffer) >= 0);
    }
    CHECK(nsn_close() == 0);
    return 0;
}
"""
)


def test_c_program_and_nats_program_meet(nsnd: servers.Server, tmp_path: Path) -> None:
    configure(tmp_path, nsnd.port)
    sizes = [0, 1, 64, 8192, 8193, 100_000, 1_000_000]
    program = build_text(ECHO, tmp_path)
    process = start([str(program), str(len(sizes))], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    async def talk() -> None:
        client = await insane_nats.connect(nsnd.url)
        answers = await client.subscribe("$INSANE.8")
        for size in sizes:
            payload = os.urandom(size)
            await client.publish("$INSANE.7", payload)
            answer = await answers.next_msg(timeout=20)
            assert (answer.subject, answer.data) == ("$INSANE.8", payload)
        await client.close()

    asyncio.run(talk())
    finish(process)


def test_ping_pong_example(nsnd: servers.Server, tmp_path: Path) -> None:
    configure(tmp_path, nsnd.port)
    program = str(programs.build(programs.EXAMPLES / "pingpong.c", tmp_path / "pingpong"))
    pong = start([program, "pong"], tmp_path)
    assert "500 round trips of 64 bytes, median" in run([program, "ping", "500"], tmp_path)
    finish(pong)


def test_callback_runs_in_the_librarys_thread(nsnd: servers.Server, tmp_path: Path) -> None:
    configure(tmp_path, nsnd.port, "echo = true\n")
    program = build_text(
        HEAD
        + """
static sem_t done;
static int next;
static nsn_sink_t expected;
static pthread_t main_thread;

static void take(nsn_sink_t sink, nsn_buffer_t *buf)
{
    int number;
    memcpy(&number, buf->data, sizeof number);
    CHECK(sink == expected && number == next++ && !pthread_equal(pthread_self(), main_thread));
    CHECK(nsn_close() == -EDEADLK);
    CHECK(nsn_release_data(buf) == 1);
    if (next == 1000)
        sem_post(&done);
}

int main(void)
{
    main_thread = pthread_self();
    sem_init(&done, 0, 0);
    CHECK(nsn_init() == 0);
    CHECK(freopen("words", "w", stderr));
    nsn_stream_t stream = stream_with(NSN_QOS_CONSUMPTION_ADAPTIVE);
    expected = nsn_create_sink(stream, 7, (handle_data_cb)take);
    nsn_source_t source = nsn_create_source(stream, 7);
    for (int number = 0; number < 1000; number++) {
        nsn_buffer_t *buffer = nsn_get_buffer(sizeof number, NSN_BLOCKING);
        memcpy(buffer->data, &number, sizeof number);
        CHECK(nsn_emit_data(source, buffer) >= 0);
    }
    CHECK(sem_wait(&done) == 0);
    CHECK(nsn_data_available(expected, 0) == -EINVAL);
    CHECK(nsn_close() == 0);
    return 0;
}
""",
        tmp_path,
    )
    run([str(program)], tmp_path)


def test_forked_child_opens_its_own(nsnd: servers.Server, tmp_path: Path) -> None:
    configure(tmp_path, nsnd.port)
    program = build_text(
        HEAD
        + """
int main(void)
{
    CHECK(nsn_init() == 0);
    nsn_sink_t sink = nsn_create_sink(stream_with(NSN_QOS_CONSUMPTION_LOW), 7, NULL);
    pid_t child = fork();
    if (child == 0) {
        CHECK(nsn_data_available(sink, 0) == -ECHILD);
        CHECK(!nsn_buffer_is_valid(nsn_get_buffer(1, 0)) && errno == ECHILD);
        CHECK(nsn_init() == 0);
        nsn_source_t source = nsn_create_source(stream_with(NSN_QOS_CONSUMPTION_LOW), 7);
        nsn_buffer_t *buffer = nsn_get_buffer(1, 0);
        int token = nsn_emit_data(source, buffer);
        CHECK(token >= 0 && nsn_check_emit_outcome(source, token) == 1);
        CHECK(nsn_close() == 0);
        exit(0);
    }
    CHECK(nsn_buffer_is_valid(nsn_consume_data(sink, NSN_BLOCKING)));
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(nsn_close() == 0);
    return 0;
}
""",
        tmp_path,
    )
    run([str(program)], tmp_path)


@pytest.mark.parametrize("consumption", ["NSN_QOS_CONSUMPTION_LOW", "NSN_QOS_CONSUMPTION_POLL"])
def test_blocking_consume_ends_when_nsnd_is_gone(runtime_dir: Path, tmp_path: Path, consumption: str) -> None:
    program = build_text(
        HEAD
        + """
int main(void)
{
    CHECK(nsn_init() == 0);
    nsn_sink_t sink = nsn_create_sink(stream_with(CONSUMPTION), 7, NULL);
    puts("ready");
    fflush(stdout);
    nsn_buffer_t *buffer = nsn_consume_data(sink, NSN_BLOCKING);
    CHECK(!nsn_buffer_is_valid(buffer) && errno == ENOTCONN && strstr(nsn_error_text(), "nsnd is gone"));
    CHECK(nsn_close() == 0);
    return 0;
}
""".replace("CONSUMPTION)", f"{consumption})"),
        tmp_path,
    )
    with servers.nsnd(tmp_path, runtime_dir) as server:
        configure(tmp_path, server.port)
        process = start([str(program)], tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    finish(process, 40)
    assert time.monotonic() - begin < 30


def test_program_lives_through_a_new_nsnd(runtime_dir: Path, tmp_path: Path) -> None:
    """Killed, and its files gone: the program's sinks are subscribed anew at the next one."""
    program = build_text(ECHO, tmp_path)
    with servers.nsnd(tmp_path, runtime_dir) as first:
        port = first.port
        configure(tmp_path, port)
        process = start([str(program), "1"], tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait()
    for path in sorted(runtime_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()

    async def talk() -> None:
        client = await insane_nats.connect(f"nats://127.0.0.1:{port}")
        answers = await client.subscribe("$INSANE.8")
        deadline = time.monotonic() + 20
        while True:
            await client.publish("$INSANE.7", b"again")
            try:
                answer = await answers.next_msg(timeout=0.2)
                break
            except insane_nats.errors.TimeoutError:
                assert time.monotonic() < deadline
        assert answer.data == b"again"
        await client.close()

    with servers.serving([sys.executable, "-m", "nsnd", "--port", str(port)], port, tmp_path, {**os.environ}):
        asyncio.run(talk())
        finish(process)


BINDING = """
import ctypes, sys
from ctypes import c_uint32, c_size_t, c_int, c_void_p, POINTER, Structure

class Buffer(Structure):
    _fields_ = [("index", c_size_t), ("data", POINTER(c_void_p)), ("len", c_size_t)]

class Options(Structure):
    _fields_ = [("datapath", c_int), ("consumption", c_int), ("determinism", c_int), ("reliability", c_int)]

library = ctypes.CDLL(sys.argv[1])
for name, result, arguments in [
    ("init", c_int, []), ("close", c_int, []), ("create_stream", c_uint32, [Options]), ("destroy_stream", c_int, [c_uint32]),
    ("create_source", c_uint32, [c_uint32, c_uint32]), ("destroy_source", c_int, [c_uint32]),
    ("get_buffer", POINTER(Buffer), [c_size_t, c_int]), ("emit_data", c_int, [c_uint32, POINTER(Buffer)]),
    ("check_emit_outcome", c_int, [c_uint32, c_int]), ("create_sink", c_uint32, [c_uint32, c_uint32, c_void_p]),
    ("destroy_sink", c_int, [c_uint32]), ("data_available", c_int, [c_uint32, c_int]),
    ("consume_data", POINTER(Buffer), [c_uint32, c_int]), ("release_data", c_int, [POINTER(Buffer)]),
]:
    function = getattr(library, "nsn_" + name)
    function.restype, function.argtypes = result, arguments

assert library.nsn_init() == 0
stream = library.nsn_create_stream(Options(consumption=1, reliability=1))
source, sink = library.nsn_create_source(stream, 5), library.nsn_create_sink(stream, 5, None)
buffer = library.nsn_get_buffer(32, 1)
ctypes.memmove(buffer.contents.data, b"a" * 32, 32)
buffer.contents.len = 32
assert library.nsn_emit_data(source, buffer) >= 0
library.nsn_release_data(buffer)
got = library.nsn_consume_data(sink, 1)
assert ctypes.string_at(got.contents.data, got.contents.len) == b"a" * 32
assert library.nsn_release_data(got) == 1
assert library.nsn_destroy_source(source) == 0 and library.nsn_destroy_stream(stream) == 0 and library.nsn_close() == 0
"""


def test_a_ctypes_binding_loads_the_library(nsnd: servers.Server, tmp_path: Path) -> None:
    configure(tmp_path, nsnd.port, "echo = true\n")
    library = next(word[2:] for word in config_words("--libs") if word.startswith("-L"))
    assert ctypes.sizeof(ctypes.c_size_t) == 8
    run([sys.executable, "-c", BINDING, f"{library}/libnsn.so"], tmp_path)


def test_benchmark_prints_ours_the_raw_ring_and_the_ratio() -> None:
    command = [sys.executable, "-m", "benchmarks.c", "insane"]
    done = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert names == ["insane_rtt_64_p50", "raw_ring_rtt_64_p50", "insane_to_raw_ratio"]


def test_the_guides_programs_are_programs(tmp_path: Path) -> None:
    guide = (programs.ROOT / "docs" / "insane.md").read_text()
    (text,) = re.findall(r"```c\n(.*?)```", guide, re.S)
    build_text(text, tmp_path)
    for text in re.findall(r"```python\n(.*?)```", guide, re.S):
        compile(text, "insane.md", "exec")


def test_config_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insane_nats, "__path__", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"libnsn.so are not in"):
        installed()
