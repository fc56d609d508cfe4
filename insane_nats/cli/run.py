"""`insane-nats run`: the command line of insane_nats.run."""

from __future__ import annotations

import click

from insane_nats.run import RunError, execute

# Everything behind the program's name is the program's own, whatever it looks like.
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.command(context_settings=SETTINGS)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="PROGRAM [ARGUMENTS]...")
def run(arguments: tuple[str, ...]) -> None:
    """Run PROGRAM with insane_nats in place of NATS: its `import nats` gives insane_nats, in its child processes too.

    PROGRAM is a script (app.py), a command (uvicorn, ./bin/app), or -m and a module. What follows it are its own arguments.

    \b
    insane-nats run app.py --port 8080
    insane-nats run uvicorn service:app
    insane-nats run -m package.worker
    """
    try:
        execute(arguments)
    except RunError as error:
        click.echo(f"insane-nats run: {error}", err=True)
        raise SystemExit(error.status) from None
