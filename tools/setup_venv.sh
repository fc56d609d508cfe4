#!/bin/sh
# Makes the virtual environment $1 with what insane_nats needs to run, build and be tested.
set -eu

venv=$1
python=${PYTHON:-python3}

fail() {
    printf '%s\n' "insane_nats: $*" >&2
    exit 1
}

# As root on Debian or Ubuntu, installs the packages; elsewhere says which are needed.
need() {
    what=$1
    shift
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        printf '%s\n' "insane_nats: $what is missing: installing $*" >&2
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q "$@" >/dev/null ||
            { apt-get update -q >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -q "$@" >/dev/null; } ||
            fail "$what is missing, and apt-get could not install $*"
    else
        fail "$what is missing. On Debian or Ubuntu: sudo apt-get install $*"
    fi
}

command -v "$python" >/dev/null || need "$python" python3 python3-venv python3-dev
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or later is needed; $python is $("$python" --version 2>&1). Name another by: make PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null || need "Python's venv module" python3-venv

if [ "$(uname -s)" = Linux ]; then
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || need "a C compiler" gcc libc6-dev
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' ||
        need "Python's C header (Python.h)" python3-dev
    # For the tests alone, which say so themselves where it cannot be had.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' | clang -x c -fsanitize=fuzzer -o /dev/null - 2>/dev/null ||
            (need "clang with libFuzzer" clang libclang-rt-dev) || true
        command -v spin >/dev/null || (need "the model checker SPIN" spin) || true
    fi
fi

[ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null || "$python" -m venv --clear "$venv" ||
    fail "$python -m venv $venv failed (see above)"

requirements=$("$venv/bin/python" - <<'END'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
groups = project["dependency-groups"]
print("\n".join([*project["project"]["dependencies"], *groups["build"], *groups["dev"]]))
END
)
printf '%s\n' "$requirements" >"$venv/requirements.txt"
printf '%s\n' "insane_nats: installing the packages of $venv/requirements.txt" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$venv/requirements.txt" ||
    fail "pip could not install the packages of $venv/requirements.txt (see above)"
