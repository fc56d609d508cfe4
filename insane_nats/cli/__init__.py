"""The command `insane-nats`: run a NATS program on insane_nats, and look into a running system."""

from __future__ import annotations

import click

from insane_nats.cli.config import config
from insane_nats.cli.messages import pub, req, sub
from insane_nats.cli.run import run
from insane_nats.cli.status import status
from insane_nats.cli.version import package_version

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_version(), prog_name="insane_nats", message="%(prog)s %(version)s")
def commands() -> None:
    """NATS over shared memory: run a NATS program unchanged, without a NATS server, and look into a running system."""


for command in (run, status, pub, sub, req, config):
    commands.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    commands(prog_name="insane-nats")
