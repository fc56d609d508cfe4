"""`insane-nats pub`, `sub` and `req`: messages by hand, on an insane_nats node or a NATS server, whichever is at the URL."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import click
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error, NoRespondersError, NoServersError, TimeoutError

import insane_nats
from insane_nats.cli.node import DEFAULT_URL

CONNECT_TIMEOUT_S = 5
SUBJECT_HELP = "A NATS subject"


class MessageError(Exception):
    """What went wrong, in one line for the user."""


@click.command()
@click.argument("subject")
@click.argument("data", default="")
@click.option("-s", "--url", envvar="NATS_URL", default=DEFAULT_URL, show_default=True, show_envvar=True, help="Where.")
@click.option("-H", "--header", "headers", multiple=True, metavar="KEY:VALUE", help="A header. May be repeated.")
@click.option("--reply", default="", metavar="SUBJECT", help="The reply subject of the message.")
@click.option("--count", default=1, type=click.IntRange(min=1), show_default=True, help="How many times.")
def pub(subject: str, data: str, url: str, headers: Sequence[str], reply: str, count: int) -> None:
    """Publish DATA to SUBJECT. DATA - is read from standard input."""
    payload, header = _payload(data), _headers(headers)

    async def publish(client: Client) -> None:
        for _ in range(count):
            await client.publish(subject, payload, reply=reply, headers=header)
        await client.flush()

    _run("pub", url, publish)


@click.command()
@click.argument("subject")
@click.option("-s", "--url", envvar="NATS_URL", default=DEFAULT_URL, show_default=True, show_envvar=True, help="Where.")
@click.option("--queue", default="", metavar="GROUP", help="Take part in a queue group: each message goes to one member.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N messages. Default: at Ctrl-C.")
@click.option("--raw", is_flag=True, help="Only the data of each message, and a newline.")
def sub(subject: str, url: str, queue: str, count: int | None, raw: bool) -> None:
    """Subscribe to SUBJECT, which may have wildcards (* and >), and print what arrives."""

    async def subscribe(client: Client) -> None:
        subscription = await client.subscribe(subject, queue=queue)
        if count is not None:
            await subscription.unsubscribe(limit=count)  # so that a queue group's other members get the rest
        await client.flush()
        _say(f"subscribed to {subject} at {_shown(client)}")
        number = 0
        async for message in subscription.messages:
            number += 1
            _print(_text(message, number, raw))
            if number == count:
                break

    _run("sub", url, subscribe, until_signal=True)


@click.command()
@click.argument("subject")
@click.argument("data", default="")
@click.option("-s", "--url", envvar="NATS_URL", default=DEFAULT_URL, show_default=True, show_envvar=True, help="Where.")
@click.option("-H", "--header", "headers", multiple=True, metavar="KEY:VALUE", help="A header. May be repeated.")
@click.option("--timeout", default=2.0, type=click.FloatRange(min=0, min_open=True), show_default=True, help="Seconds to wait.")
@click.option("--raw", is_flag=True, help="Only the data of the answer, and a newline.")
def req(subject: str, data: str, url: str, headers: Sequence[str], timeout: float, raw: bool) -> None:
    """Send DATA to SUBJECT as a request and print the answer. DATA - is read from standard input."""
    payload, header = _payload(data), _headers(headers)

    async def request(client: Client) -> None:
        message = await client.request(subject, payload, timeout=timeout, headers=header)
        _print(_text(message, None, raw))

    _run("req", url, request, subject=subject, timeout=timeout)


def _payload(data: str) -> bytes:
    return sys.stdin.buffer.read() if data == "-" else os.fsencode(data)


def _headers(given: Sequence[str]) -> dict[str, str] | None:
    headers: dict[str, str] = {}
    for one in given:
        key, colon, value = one.partition(":")
        if not colon or not key.strip():
            raise click.UsageError(f"header {one!r} is not of the form KEY:VALUE")
        headers[key.strip()] = value.strip()
    return headers or None


def _text(message: Msg, number: int | None, raw: bool) -> bytes:
    """What is printed for a message: where it came from (with a number), its headers, its data."""
    if raw:
        return bytes(message.data) + b"\n"
    lines = []
    if number is not None:
        reply = f' with reply "{message.reply}"' if message.reply else ""
        lines.append(f'[#{number}] Received on "{message.subject}"{reply}')
    headers = [f"{key}: {value}" for key, value in (message.headers or {}).items()]
    lines += [*headers, ""] if headers else []
    text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    end = b"\n\n" if number is not None else b"\n"  # a blank line between messages
    return text + bytes(message.data) + end


def _print(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _say(text: str) -> None:
    """For people; standard output is for messages alone."""
    click.echo(text, err=True)


def _shown(client: Client) -> str:
    url = client.connected_url
    return f"{url.hostname}:{url.port}" if url is not None else "the node"


def _run(
    command: str,
    url: str,
    work: Callable[[Client], Coroutine[Any, Any, None]],
    *,
    until_signal: bool = False,
    subject: str = "",
    timeout: float = 0.0,
) -> None:
    """Connects, works, closes; every failure is one line on standard error and exit status 1."""
    logging.getLogger("insane_nats").setLevel(logging.ERROR)  # that a NATS server is spoken to is no news here
    try:
        asyncio.run(_connected(url, f"insane-nats {command}", work, until_signal))
        return
    except NoRespondersError:
        text = f"no responders: nobody subscribes to {subject!r} at {url}"
    except TimeoutError:
        text = f"timeout: no answer from {subject!r} within {timeout:g} s" if subject else f"timeout: {url} did not answer"
    except MessageError as error:
        text = str(error)
    except (Error, ValueError) as error:
        text = str(error)
    except BrokenPipeError:
        raise  # the reader of our output has enough: click ends quietly
    except OSError as error:
        text = f"{url}: {error.strerror or error}"
    click.echo(f"insane-nats {command}: {text}", err=True)
    raise SystemExit(1)


async def _connected(url: str, name: str, work: Callable[[Client], Coroutine[Any, Any, None]], until_signal: bool) -> None:
    client = await _connect(url, name, stays=until_signal)
    try:
        if until_signal:
            await _until_signal(work(client))
        else:
            await work(client)
    finally:
        await client.close()


async def _connect(url: str, name: str, *, stays: bool) -> Client:
    """Each server is tried once. name: as status shows it. stays: reconnects, for ever, when the connection is lost later."""
    servers = [server.strip() for server in url.split(",")]
    errors: list[Exception] = []
    all_failed = asyncio.Event()

    async def on_error(error: Exception) -> None:
        if connected:
            _say(f"insane-nats: {error}")
            return
        errors.append(error)
        if len(errors) >= len(servers):
            all_failed.set()  # nats-py would go on trying

    connected = False
    options: dict[str, Any] = {"name": name, "error_cb": on_error, "connect_timeout": CONNECT_TIMEOUT_S}
    options["allow_reconnect"] = stays
    if stays:
        options["max_reconnect_attempts"] = -1
    try:
        client = await _unless(all_failed, insane_nats.connect(servers, **options))
    except (Error, OSError) as error:
        cause = errors[0] if errors else error
        raise MessageError(f"cannot connect to {url}: {cause or type(cause).__name__}") from error
    connected = True
    return client


async def _unless(event: asyncio.Event, connecting: Coroutine[Any, Any, Client]) -> Client:
    """The result of connecting; NoServersError as soon as the event is set."""
    task = asyncio.ensure_future(connecting)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise NoServersError
        return task.result()
    finally:
        for unfinished in (task, waiting):
            unfinished.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Runs the work until it is done, or SIGINT or SIGTERM asks for an orderly end."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):  # not every platform's loop has signal handlers
            loop.add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        await task
