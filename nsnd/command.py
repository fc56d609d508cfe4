"""nsnd in the foreground: its options, its configuration, and what it says when it cannot start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from nsnd import __version__
from nsnd.config import GLOBAL, LOG_LEVELS, Config, ConfigError, find_config, load_config
from nsnd.daemon import StartError, run_in_foreground
from nsnd.logs import Log
from nsnd.runtime import BY_HAND, RuntimeDirectory, RuntimeDirectoryError, default_directory
from nsnd.server import Options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-a", "--addr", metavar="IP", help="Listen on this address as well as on 127.0.0.1.")
@click.option("-p", "--port", type=click.IntRange(1, 65535), help="Application ID to serve from the start (default 4222).")
@click.option("-c", "--config", metavar="FILE",
              help="Configuration; else $INSANE_NSND_CONFIG, ~/.config/insane/nsnd.cfg, /etc/insane/nsnd.cfg.")
@click.option("--socket", metavar="PATH", help="Control socket (default: nsnd.sock in the runtime directory).")
@click.option("--runtime-dir", metavar="DIR", help="Else $INSANE_NATS_RUNTIME_DIR, else /dev/shm/insane_nats-UID.")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="What goes to stderr (default info).")
@click.option("--autostart", is_flag=True, help="Make sure that a node serves the port, in the background, and return.")
@click.version_option(__version__, prog_name="nsnd")
def nsnd(addr: str | None, port: int | None, config: str | None, socket: str | None, runtime_dir: str | None,
         log_level: str | None, autostart: bool) -> None:
    """The node of this host's insane_nats programs, in the foreground.

    SIGTERM ends it; programs go on locally, and come back to the next one. SIGHUP rereads the configuration. SIGUSR2 tells
    programs that the node is about to end.
    """
    try:
        path = find_config(config, os.environ)

        def read() -> Config:
            return _override(load_config(path), addr, port, log_level)

        settings = read()
        log = Log(settings.log_level)
        for warning in settings.warnings:
            log.warn(warning)
        runtime = RuntimeDirectory(Path(runtime_dir) if runtime_dir else default_directory(os.environ))
        options = Options(BY_HAND, Path(socket).absolute() if socket else None, reread=read)
        run_in_foreground(runtime, settings, options, log)
    except (ConfigError, RuntimeDirectoryError, StartError) as error:
        click.echo(f"nsnd: {error}", err=True)
        sys.exit(1)


def _override(config: Config, addr: str | None, port: int | None, log_level: str | None) -> Config:
    if addr is not None and not GLOBAL["addr"].accepts(addr):
        raise ConfigError(f"--addr {addr}: allowed is {GLOBAL['addr'].allowed}")
    return config._replace(addr=addr or config.addr, port=port or config.port, log_level=log_level or config.log_level)
