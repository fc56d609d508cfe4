"""nsnd's log: one line an event, words first, then key=value. To stderr, or to a file that cannot grow without bound.

Not the logging module: importing that takes longer than all else that a node does before it serves.
"""

from __future__ import annotations

import os
import time

LEVELS = {"error": 40, "warn": 30, "info": 20, "debug": 10, "trace": 5}
FILE_MAX = 1 << 20


class Log:
    """log.info("session attached", slot=3) is `2026-01-31T12:00:00.123Z info session attached slot=3`.

    `file`: where it goes, None for stderr. At FILE_MAX bytes the file becomes <file>.1 and a new one is begun; stdout and
    stderr lie in it as well, so that what C code or the interpreter print is found there.
    """

    def __init__(self, level: str = "info", file: str | None = None) -> None:
        self._least = LEVELS[level]
        self._file = file
        if file is not None:
            self._redirect(file)

    def set_level(self, level: str) -> None:
        self._least = LEVELS[level]

    def error(self, text: str, /, **fields: object) -> None:
        self._write("error", text, fields)

    def exception(self, text: str, /, **fields: object) -> None:
        """With the traceback of the exception that is being handled."""
        try:
            from traceback import format_exc  # not on the way to a quick start
        except OSError as error:  # no descriptor is left to read it by
            self._write("error", text, fields, f"\n(no traceback: {error.strerror})")
        else:
            self._write("error", text, fields, "\n" + format_exc().rstrip())

    def warn(self, text: str, /, **fields: object) -> None:
        self._write("warn", text, fields)

    def info(self, text: str, /, **fields: object) -> None:
        self._write("info", text, fields)

    def debug(self, text: str, /, **fields: object) -> None:
        self._write("debug", text, fields)

    def trace(self, text: str, /, **fields: object) -> None:
        self._write("trace", text, fields)

    def _write(self, level: str, text: str, fields: dict[str, object], more: str = "") -> None:
        if LEVELS[level] < self._least:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        words = "".join(f" {key}={_quoted(value)}" for key, value in fields.items())
        line = f"{stamp}.{int(now * 1000) % 1000:03d}Z {level} {text}{words}{more}\n"
        try:
            os.write(2, line.encode("utf-8", "replace"))
            if self._file is not None and os.fstat(2).st_size > FILE_MAX:
                os.replace(self._file, self._file + ".1")
                self._redirect(self._file)
        except OSError:
            return  # a log that cannot be written, to a closed terminal or a full disk, must not end the node

    def _redirect(self, file: str) -> None:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and not any(c in text for c in ' "=\n') else '"' + text.replace('"', "'").replace("\n", " ") + '"'
