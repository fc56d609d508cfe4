"""The version that `insane-nats --version` prints."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Of the installed distribution; of the sources when there is none."""
    try:
        return version("insane_nats")
    except PackageNotFoundError:
        import insane_nats

        return str(insane_nats.__version__)
