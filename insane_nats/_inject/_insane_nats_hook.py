"""Gives a program that says `import nats` insane_nats's client, when it was started by `insane-nats run` or by such a program.

Loaded at the start of each of their interpreters, also of foreign ones: it imports neither nats nor insane_nats before the
program does, and needs nothing newer than Python 3.8. nats stays nats-py, with these names replaced by ours, which are
subclasses: modules, errors and isinstance checks are the same from both sides.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

OURS = "insane_nats"
THEIRS = "nats"
REPLACED = {"": ("connect", "NATS"), ".aio.client": ("Client",)}  # by module, under `nats` and `insane_nats` alike


class Finder:
    """First on sys.meta_path: finds both packages where they are, and replaces the names as soon as both are loaded."""

    def __init__(self, prefix: str) -> None:
        """prefix: sys.prefix of the environment that `insane-nats run` was started in."""
        self._home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
        self._at_home = sys.prefix == prefix
        self._loading_ours = False

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (OURS, THEIRS):
            return None
        spec = self._spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def invalidate_caches(self) -> None:
        """Nothing is cached here."""

    def _spec(self, name: str, path: object, target: ModuleType | None) -> ModuleSpec | None:
        # The launcher's insane_nats, wherever the program's own search path points. An environment of another prefix must
        # have its own, with compiled modules that fit.
        if name == OURS and self._at_home:
            spec = PathFinder.find_spec(name, [self._home])
            if spec is not None:
                return spec
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)  # type: ignore[arg-type]
                if spec is not None:
                    return spec
        return None

    def execute(self, module: ModuleType, loader: object) -> None:
        """Runs the module's code, then what this hook is for."""
        if module.__name__ == OURS:
            self._loading_ours = True  # ours imports nats and is not ready when that has been executed
            try:
                loader.exec_module(module)  # type: ignore[attr-defined]
            finally:
                self._loading_ours = False
            replace_names()
            return
        loader.exec_module(module)  # type: ignore[attr-defined]
        is_nats_py = THEIRS + ".aio.client" in sys.modules  # and not a program's own package of that name
        if is_nats_py and not self._loading_ours:
            import_ours()
            replace_names()


class Loader:
    """Stands before the real loader until the module's code has run."""

    def __init__(self, loader: object, finder: Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[attr-defined, no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # type: ignore[assignment]
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # type: ignore[assignment]
        self._finder.execute(module, self._loader)


def import_ours() -> None:
    """Raises ImportError with the way out: a program that was to run on insane_nats never gets plain NATS instead."""
    try:
        __import__(OURS)
    except ImportError as error:
        text = (
            "insane-nats run: `import nats` is to give insane_nats here, but {0} cannot import it ({1}). Install it for that "
            "interpreter: {0} -m pip install insane_nats. Or set INSANE_NATS_RUN=0 for this program to use plain NATS."
        )
        raise ImportError(text.format(sys.executable, error)) from error


def replace_names() -> None:
    for suffix, names in REPLACED.items():
        __import__(OURS + suffix)
        for name in names:
            setattr(sys.modules[THEIRS + suffix], name, getattr(sys.modules[OURS + suffix], name))


def install(prefix: str) -> None:
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(prefix))
