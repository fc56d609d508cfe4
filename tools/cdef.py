"""Reads libnsn's headers as cffi wants declarations, and writes the C source of an extension module from them.

So a header is written once, and cffi compares what it read with what the compiler sees.
"""

from __future__ import annotations

import re
from pathlib import Path

import cffi

LIBNSN = Path(__file__).resolve().parents[1] / "shim" / "libnsn"

# Structs with aligned members: cffi asks the compiler where their fields lie instead of computing it.
COMPILER_LAYOUT = ("nsn_page", "nsn_counters", "nsn_slots_file")


# One line, or a body that ends with a brace in the first column.
INLINE_FUNCTION = r"^static inline [^\n{]*\{[^\n]*\}$|^static inline [^;{]*\n\{\n.*?^\}$"


def _constant(line: str) -> str:
    """A #define as cffi wants it: a plain number as it stands, anything else is left to the compiler; "" for a guard."""
    found = re.match(r"#define (\w+)[ \t]+(\S.*)", line)
    if found is None:
        return ""
    plain = re.fullmatch(r"(0x[0-9a-fA-F]+|\d+)[uUlL]*", found[2].strip())
    return f"#define {found[1]} {plain[1] if plain else '...'}"


def declarations(header: str) -> str:
    """What cffi can read of a libnsn header: its types, functions and integer constants."""
    text = re.sub(r"/\*.*?\*/", "", (LIBNSN / header).read_text(), flags=re.S)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(INLINE_FUNCTION, "", text, flags=re.M | re.S)
    text = re.sub(r"^#.*", lambda line: _constant(line[0]), text, flags=re.M)
    text = re.sub(r"\s*__attribute__\(\(aligned\(\d+\)\)\)", "", text)
    for name in COMPILER_LAYOUT:
        text = re.sub(rf"(struct {name} \{{(?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", r"\1...; }", text)
    return text


def struct(header: str, name: str) -> str:
    """One struct's declaration out of a header, also when it stands inside another."""
    found = re.search(rf"struct {name} \{{[^{{}}]*\}}", declarations(header))
    if found is None:
        raise SystemExit(f"{header} declares no struct {name}")
    return found[0] + ";"


def write(module: str, cdef: str, headers: list[str], output: str) -> None:
    """Writes the C source of `module`, which includes the headers, to the path `output`."""
    ffi = cffi.FFI()
    ffi.cdef(cdef)
    ffi.set_source(module, "".join(f'#include "{header}"\n' for header in headers), py_limited_api=True)
    ffi.emit_c_code(output)
    Path(output).touch()  # cffi leaves a file that would not change alone, and ninja would ask again each time
