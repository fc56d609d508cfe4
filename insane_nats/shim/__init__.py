"""Stands for the package insane_nats.shim in the source tree, where its files lie in the folder shim; it is not installed."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "shim")]
