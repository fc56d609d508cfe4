"""`insane-nats config`: how to compile and link a C program that uses INSANE's primitives."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import click

HEADER = Path("nsn", "nsn.h")
LIBRARY = "libnsn.so"


class ConfigError(Exception):
    """The header or the library is not where an installation has it."""


@dataclass(frozen=True)
class Installed:
    """Folders of the installation: what to look for #include <nsn/nsn.h> in, and where libnsn.so is."""

    include: Path
    library: Path

    def cflags(self) -> list[str]:
        return [f"-I{self.include}"]

    def libs(self) -> list[str]:
        """The library is found at run time where it is now, without LD_LIBRARY_PATH."""
        return [f"-L{self.library}", f"-Wl,-rpath,{self.library}", "-lnsn"]


def installed() -> Installed:
    """ConfigError where this package has no C parts."""
    import insane_nats

    for folder in map(Path, insane_nats.__path__):
        found = Installed(folder.absolute() / "include", folder.absolute() / "lib")
        if (found.include / HEADER).is_file() and (found.library / LIBRARY).is_file():
            return found
    places = ", ".join(map(str, insane_nats.__path__))
    raise ConfigError(f"{HEADER} and {LIBRARY} are not in {places}: they come with an insane_nats that was installed on Linux")


@click.command()
@click.option("--cflags", is_flag=True, help="The compiler's arguments.")
@click.option("--libs", is_flag=True, help="The linker's arguments.")
def config(cflags: bool, libs: bool) -> None:
    """Print how to compile and link C programs that use INSANE's primitives (#include <nsn/nsn.h>).

    \b
    gcc pingpong.c -o pingpong $(insane-nats config --cflags --libs)
    """
    try:
        found = installed()
    except ConfigError as error:
        click.echo(f"insane-nats config: {error}", err=True)
        raise SystemExit(1) from None
    everything = not (cflags or libs)
    words = (found.cflags() if cflags or everything else []) + (found.libs() if libs or everything else [])
    click.echo(shlex.join(words))
