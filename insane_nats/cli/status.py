"""`insane-nats status`: who is on this host's fabric, and what goes through it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import click

from insane_nats.cli.node import Application, NodeError, Session, Status, fetch_status, find_socket, parse_status

HEADINGS = (
    "SESSION",
    "PID",
    "UID",
    "NAME",
    "SUBS",
    "LINKS",
    "MSGS OUT",
    "MSGS IN",
    "BYTES OUT",
    "BYTES IN",
    "MEMORY",
    "BACKLOG",
    "DROPS",
    "SLOW",
)
USER_AT = HEADINGS.index("NAME")  # where sessions have one, it stands in front of that
LEFT = {"SESSION", "USER", "NAME"}  # columns of text; the others are numbers
NAME_WIDTH = 32


@click.command()
@click.option("-s", "--url", metavar="URL", help="The node at a NATS URL. Default: this user's node, else the one at NATS_URL.")
@click.option("--socket", "path", type=click.Path(path_type=Path), metavar="PATH", help="The node with this control socket.")
@click.option("--json", "as_json", is_flag=True, help="All the node says, as JSON.")
def status(url: str | None, path: Path | None, as_json: bool) -> None:
    """Show the node's sessions, subscriptions, links, messages, bytes, memory, drops and slow consumers."""
    try:
        if sys.platform != "linux":
            raise NodeError("insane_nats has nodes on Linux only; here all traffic is plain NATS")
        answer = fetch_status(path if path is not None else find_socket(url, os.environ))
        if as_json:
            click.echo(json.dumps(answer, indent=2, default=_plain))
        else:
            click.echo(render(parse_status(answer)))
    except NodeError as error:
        click.echo(f"insane-nats status: {error}", err=True)
        raise SystemExit(1) from None


def _plain(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def render(status: Status) -> str:
    """The text of `insane-nats status`."""
    uptime = timedelta(seconds=int(status.uptime_s))
    lines = [
        f"node {status.node_id}: nsnd {status.version}, pid {status.pid}, up {uptime}, started by {status.started_by}, "
        f"in {status.runtime_dir}"
    ]
    for application in status.applications:
        account = "" if application.account is None else f", account {_printable(application.account)}"
        lines += ["", f"application {application.application_id}{account}, interest {application.interest_number}"]
        rows = [HEADINGS, *(_row(session) for session in application.sessions), _totals(application)]
        if application.account is not None:
            users = ["USER", *(_printable(session.user or "-") for session in application.sessions), ""]
            rows = [(*row[:USER_AT], user, *row[USER_AT:]) for row, user in zip(rows, users, strict=True)]
        lines += table(rows)
    if not status.applications:
        lines += ["", "no sessions"]
    return "\n".join(lines)


def _printable(name: str) -> str:
    short = name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"
    return short if short.isprintable() and short else ascii(short)[1:-1] or "-"


def _row(session: Session) -> tuple[str, ...]:
    return (
        f"{session.slot}.{session.generation}" + ("" if session.attached else " detached"),
        str(session.pid),
        str(session.uid),
        _printable(session.name),
        f"{session.subscriptions:,}",
        f"{session.counters.get('links_out', 0):,}",
        *_traffic([session]),
    )


def _totals(application: Application) -> tuple[str, ...]:
    sessions = application.sessions
    count = len(sessions)
    return (
        "total",
        "",
        "",
        f"{count} session{'' if count == 1 else 's'}",
        f"{application.subscriptions:,}",
        f"{len(application.links):,}",
        *_traffic(sessions),
    )


def _traffic(sessions: Sequence[Session]) -> tuple[str, ...]:
    def total(*names: str) -> int:
        return sum(session.counters.get(name, 0) for session in sessions for name in names)

    return (
        f"{total('messages_out'):,}",
        f"{total('messages_in'):,}",
        size(total("bytes_out")),
        size(total("bytes_in")),
        size(total("link_bytes", "pool_bytes")),
        size(total("backlog_bytes")),
        f"{total('dropped', 'discarded'):,}",
        f"{total('slow_consumer'):,}",
    )


def size(count: int) -> str:
    """Bytes as people read them: 0 B, 1.5 KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines; the first row has the headings."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if heading in LEFT else cell.rjust(width)
            for heading, cell, width in zip(rows[0], row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
