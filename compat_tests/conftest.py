"""Runs every test once per backend, each async test on an event loop of its own, and compares the outcomes.

Options: --backend nats|insane|both|plain (insane_nats on a nats-server), --loop asyncio|uvloop, --results FILE (JSON, what
         report.py reads)
Marks:   covers(id, …)     ids in behaviours.toml that the test pins; every test has one
         uvloop            runs on uvloop, whatever --loop says
         stricter(reason)  insane_nats promises more than nats-py with a NATS server, which may fail the test
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from compat_tests.backend import NAMES, PLAIN, SERVERS, Backend, NatsServer, Server
from compat_tests.behaviours import Outcome, Results, load_behaviours

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

TEST_TIMEOUT_S = 20
HARD_TIMEOUT_S = 40  # for a loop that is blocked and cannot time out by itself; enforced by pytest-timeout
RESULTS: pytest.StashKey[Results] = pytest.StashKey()
BACKEND_ID = re.compile(rf"(?:^|-)(?:{'|'.join(SERVERS)})(?=-|$)")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("compat")
    group.addoption("--backend", choices=[*SERVERS, "both"], default="both", help="what to run against (default: both)")
    group.addoption("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="event loop of the tests")
    group.addoption("--results", type=Path, help="write outcomes as JSON, for compat_tests/report.py")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "covers(*ids): behaviours (behaviours.toml) that the test pins")
    config.addinivalue_line("markers", "uvloop: the test runs on uvloop")
    config.addinivalue_line("markers", "stricter(reason): ours promises more; the NATS side may fail")
    config.stash[RESULTS] = Results()
    # A node that is gone must stay gone, and nothing may reach the node of whoever runs the tests.
    os.environ["INSANE_NATS_AUTOSTART"] = "0"
    os.environ.pop("INSANE_NATS_MODE", None)
    os.environ.pop("INSANE_NATS_QOS", None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend_name", NAMES if chosen == "both" else (chosen,), scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = load_behaviours()
    for item in items:
        ids = covered(item)
        if unknown := [name for name in ids if name not in known]:
            raise pytest.UsageError(f"{item.nodeid} covers {unknown}, which behaviours.toml does not have")
        if not ids:
            raise pytest.UsageError(f"{item.nodeid} has no covers mark: name the behaviour in behaviours.toml that it pins")
        if config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(HARD_TIMEOUT_S))
        stricter = item.get_closest_marker("stricter")
        if stricter is not None and backend_name_of(item) in ("nats", PLAIN):
            item.add_marker(pytest.mark.xfail(reason=f"ours is stricter: {stricter.args[0]}", strict=False))


def covered(item: pytest.Item) -> list[str]:
    return list(dict.fromkeys(name for mark in item.iter_markers("covers") for name in mark.args))


def backend_name_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("backend_name", "")) if callspec is not None else ""


def name_without_backend(item: pytest.Item) -> str:
    path, _, name = item.nodeid.partition("::")
    function, bracket, parameters = name.partition("[")
    rest = BACKEND_ID.sub("", parameters.removesuffix("]")).strip("-") if bracket else ""
    return f"{Path(path).name}::{function}" + (f"[{rest}]" if rest else "")


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """Where the servers keep their files: memory where there is some, since an nsnd runtime directory lies there."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="compat_tests-", dir=base) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture(scope="session")
def shared_server(backend_name: str, directory: Path) -> Iterator[Server]:
    """The server that most tests of a backend share."""
    server = SERVERS[backend_name](directory / backend_name)
    server.start()
    yield server
    server.remove()


@pytest.fixture
def backend(backend_name: str, shared_server: Server, numbers: Iterator[int]) -> Backend:
    """A backend whose server other tests use as well."""
    if shared_server.process is None or shared_server.process.poll() is not None:
        shared_server.process = None
        shared_server.start()
    return Backend(backend_name, shared_server, f"t{next(numbers)}", dedicated=False)


@pytest.fixture
def new_server(backend_name: str, directory: Path, numbers: Iterator[int]) -> Iterator[Callable[..., Server]]:
    """Starts servers of the backend's kind for this test alone; the arguments are those of Server."""
    servers: list[Server] = []

    def start(**options: Any) -> Server:
        server = SERVERS[backend_name](directory / f"{backend_name}-{next(numbers)}", **options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.remove()


@pytest.fixture
def own_backend(backend_name: str, new_server: Callable[..., Server], numbers: Iterator[int]) -> Backend:
    """A backend whose server belongs to this test, which may stop and start it."""
    return Backend(backend_name, new_server(), f"t{next(numbers)}", dedicated=True)


@pytest.fixture(scope="session")
def plain_server(backend_name: str, directory: Path) -> Iterator[Server]:
    """A nats-server for either client module."""
    server = NatsServer(directory / f"plain-{backend_name}")
    server.start()
    yield server
    server.remove()


@pytest.fixture
def plain(backend_name: str, plain_server: Server, numbers: Iterator[int]) -> Backend:
    """The backend's client module on a nats-server, whichever backend it is: plain NATS."""
    return Backend(backend_name, plain_server, f"t{next(numbers)}", dedicated=False)


class OwnServers:
    """Starts servers of a kind for one test, which may stop them; the suite ends what the test connected to them."""

    def __init__(self, name: str, directory: Path, numbers: Iterator[int], kind: type[Server] = NatsServer) -> None:
        self.backends: list[Backend] = []
        self._kind = kind
        self.name = name
        self._directory = directory
        self._numbers = numbers

    def __call__(self, **options: Any) -> Backend:
        """The backend's client module on a server of its own; the arguments are those of its kind."""
        number = next(self._numbers)
        server = self._kind(self._directory / f"own-{self.name}-{number}", **options)
        self.backends.append(Backend(self.name, server, f"t{number}", dedicated=True))
        server.start()
        return self.backends[-1]


@pytest.fixture
def new_plain(backend_name: str, directory: Path, numbers: Iterator[int]) -> Iterator[OwnServers]:
    """Starts nats-servers for this test alone."""
    servers = OwnServers(backend_name, directory, numbers)
    yield servers
    for backend in servers.backends:
        backend.server.remove()


@pytest.fixture
def new_backend(backend_name: str, directory: Path, numbers: Iterator[int]) -> Iterator[OwnServers]:
    """Starts servers of the backend's kind for this test alone."""
    servers = OwnServers(backend_name, directory, numbers, SERVERS[backend_name])
    yield servers
    for backend in servers.backends:
        backend.server.remove()


def backends_of(arguments: dict[str, Any]) -> list[Backend]:
    """All that a test has in its arguments, or has started by means of them."""
    started = [backend for value in arguments.values() if isinstance(value, OwnServers) for backend in value.backends]
    return started + [value for value in arguments.values() if isinstance(value, Backend)]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(function).parameters}
    uvloop_wanted = pyfuncitem.get_closest_marker("uvloop") is not None or pyfuncitem.config.getoption("--loop") == "uvloop"
    with asyncio.Runner(loop_factory=uvloop_factory() if uvloop_wanted else None) as runner:
        runner.run(_supervise(function, arguments))
    return True


def uvloop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's loops; the test is skipped where it is not installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] = pytest.importorskip("uvloop").new_event_loop
    return factory


async def _supervise(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Runs a test under its time limit, then closes its connections; also fails on what only the loop was told."""
    unhandled: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: unhandled.append(f"{context['message']}: {context.get('exception')!r}")
    )
    limit = asyncio.timeout(TEST_TIMEOUT_S)
    try:
        async with limit:
            await function(**arguments)
    except TimeoutError as error:
        if limit.expired():
            raise AssertionError(f"no end within {TEST_TIMEOUT_S} s") from error
        raise
    finally:
        for backend in backends_of(arguments):
            await backend.finish()
    assert not unhandled, f"unhandled in the event loop: {unhandled}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        expected_failure = hasattr(report, "wasxfail")
        word = {"passed": "passed", "failed": "failed", "skipped": "skipped"}[report.outcome]
        mark = item.get_closest_marker("stricter")
        item.config.stash[RESULTS].add(
            Outcome(
                test=name_without_backend(item),
                backend=backend_name_of(item),
                outcome="failed" if expected_failure and report.outcome == "skipped" else word,
                covers=covered(item),
                stricter=str(mark.args[0]) if mark is not None else "",
            )
        )
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    results = session.config.stash[RESULTS]
    if path := session.config.getoption("--results"):
        path.write_text(json.dumps(results.to_json(), indent=1) + "\n")
    if results.differences() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if differences := config.stash[RESULTS].differences():
        terminalreporter.section("the backends differ")
        for line in differences:
            terminalreporter.line(line)
