"""The fabric's code on a simulated machine (tests/mutants): whatever a seed lets happen, no wake-up is lost, nothing comes
after a completed unsubscription, no effect before its cause. Taking any one precaution out of the code must be noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("libnsn is for Linux", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
LIBNSN = ROOT / "shim" / "libnsn"
SIMULATOR = ROOT / "tests" / "mutants"
JOBS = 2
ROUNDS = 10_000  # of the code as it is
MUTANT_ROUNDS = 60_000  # at most: a mutant's first failure ends it
SECONDS = 100
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE=", "-g", "-O1", "-w", "-I.", "-I", str(ROOT / "tests" / "c"))
WRAPPED = ",".join(f"--wrap={name}" for name in ("sendmsg", "sendto", "madvise", "getrandom"))
SCENARIOS = ("wake", "space", "quiescence", "queue", "causality", "trim", "stall")


@dataclass(frozen=True)
class Mutant:
    """What is taken out of the code, and the scenario that must notice. edits: file, exact text, what stands in its place."""

    name: str
    scenario: str
    edits: tuple[tuple[str, str, str], ...] = field(repr=False)


BEGIN_SLEEP = ("nsn_wake.c", "    nsn_fence(); /* pairs with the fence a writer makes before nsn_wake_due", "    /* pairs")
ENTER = ("nsn_session_publish.c", "s->last_stamp);\n    nsn_fence();", "s->last_stamp);")
TRIM_FENCES = (
    ("nsn_link_in.c", "    nsn_fence(); /* with the one at the start of every publish", "    /* with"),
    ("nsn_session.c", "            nsn_fence(); /* pairs with the fence at the start of every publish", "            /*"),
)

MUTANTS = (
    Mutant("no second look", "wake", (
        ("nsn_session.c", "    if ((s->passing_bytes >= NSN_PASSING_BYTES || !nsn_in_pending(s)) && !s->held)\n", ""),)),
    Mutant("no fence between announcing sleep and looking", "wake", (BEGIN_SLEEP,)),
    Mutant("the second look before announcing sleep", "wake", (
        ("nsn_session.c", "    nsn_sleep_begin(s->page, &s->sleep_number);\n    if ((s->passing_bytes >= NSN_PASSING_BYTES ||",
         "    bool any = nsn_in_pending(s);\n    nsn_sleep_begin(s->page, &s->sleep_number);\n    if ((!any ||"),
        ("nsn_session.c", "(!any || !nsn_in_pending(s))", "!any"))),
    Mutant("no fence between writing and reading asleep", "wake", (
        ("nsn_session_publish.c", "    nsn_fence(); /* pairs with nsn_sleep_begin's: the sleeper sees the board", "    /*"),)),
    Mutant("asleep is a flag, not a number", "wake", (
        ("nsn_wake.c", "nsn_store_relaxed(&page->asleep, ++*number);\n}", "nsn_store_relaxed(&page->asleep, --*number);\n}"),)),
    Mutant("no fence between wanting room and looking for it", "space", (
        ("nsn_link_out.c", "    nsn_fence(); /* with the one in nsn_link_in_publish", "    /* with"),)),
    Mutant("no look for room behind wanting it", "space", (
        ("nsn_link_out.c", "    int code = nsn_link_out_room(link, record_length, pool_bytes);\n    if (code == 0 && no_ref",
         "    int code = 0;\n    if (code == 0 && no_ref"),)),
    Mutant("no fence between reading and asking who waits", "space", (
        ("nsn_link_in.c", "    nsn_fence(); /* with the one in ask, nsn_link_out.c", "    /* with"),)),
    Mutant("no fence between showing a publish and reading the interest", "quiescence", (ENTER,)),
    Mutant("a publish is not shown", "quiescence", (
        ("nsn_session_publish.c", "nsn_store_relaxed(&s->page->publishing, s->last_stamp);", ""),)),
    Mutant("a publish is over before it is written", "quiescence", (
        ("nsn_session_publish.c", "    uint64_t records = 0, ", "    nsn_publish_leave(s); uint64_t records = 0, "),)),
    Mutant("no wait for publishers", "quiescence", (
        ("nsn_session_barrier.c", "nsn_load_acquire(&page->publishing) == seen->number", "false"),)),
    Mutant("no wait for the change of interest", "quiescence", (
        ("nsn_session_barrier.c", "return s->settled >= barrier->sequence && handed_over;", "return handed_over;"),)),
    Mutant("no wait for announced links", "quiescence", (
        ("nsn_session_barrier.c", "!nsn_in_announced(s, nsn_now_ns()) && note_tails", "note_tails"),)),
    Mutant("no reading to the end", "quiescence", (
        ("nsn_session_barrier.c", "nsn_link_in_head(peer->link) < seen->number &&", "false &&"),)),
    Mutant("no fence between showing a publish and reading the members", "queue", (ENTER,)),
    Mutant("a member that has left is forgotten at once", "queue", (
        ("nsn_session_interest.c", "if (subscription->queue_length) {", "if (false) {"),)),
    Mutant("a member that has left is forgotten before all publishers know", "queue", (
        ("nsn_session_interest.c", "    if (nsn_barrier_step(s, s->ghost_barrier) == 0)\n        return;\n", ""),)),
    Mutant("the clock is read behind the heads", "causality", (
        ("nsn_session_receive.c", "    gather(s, now);\n", "    gather(s, now);\n    latest = nsn_now_ns();\n"),)),
    Mutant("no order by stamps", "causality", (
        ("nsn_session_receive.c", "        if (s->active_stamp[0] > latest) {", "        if (false) {"),)),
    Mutant("a message under way is not announced", "causality", (
        ("nsn_session_publish.c", "            nsn_out_announce(s, s->groups[g].peer, true);", "            ;"),)),
    Mutant("no wait for a message under way", "causality", (
        ("nsn_session_look.c", "    if (inside < s->latest)\n        s->latest = inside;\n", ""),)),
    Mutant("no second look at the other words without the clock", "causality", (
        ("nsn_session_look.c", "    if (next_changed(s, 0, peer->slot) < peer->slot ||", "    if (false &&"),)),
    Mutant("a link is taken as read to its end when it was to a tail read before its word", "wake", (
        ("nsn_link_in.c", "    int result = load_tail(link);\n    *end",
         "    int result = link->head == link->tail ? load_tail(link) : 0;\n    *end"),)),
    Mutant("a message under way is taken as seen without the clock", "causality", (
        ("nsn_session_look.c", "    if (word & 1 || (lives", "    if ((lives"),)),
    Mutant("no fence between asking for memory back and looking who publishes", "trim", TRIM_FENCES),
    Mutant("memory is taken back under a publish", "trim", (
        ("nsn_session.c", "nsn_link_in_trim_end(peer->link, outside);", "nsn_link_in_trim_end(peer->link, true);"),)),
    Mutant("no fence between showing a publish and reading the trim number", "trim", (ENTER,)),
    Mutant("who is given up is not told", "stall", (
        ("nsn_session_out.c", "    nsn_out_nudge(s, peer); /* it may have read", "    /*"),)),
    Mutant("no fence between giving up and reading asleep", "stall", (
        ("nsn_session_out.c", "    nsn_fence();            /* pairs with nsn_sleep_begin's */", ""),)),
    Mutant("no fence between a drop and looking for the answer", "stall", (
        ("nsn_session_publish.c", "    nsn_fence(); /* pairs with the one in nsn_link_in_acknowledge_stall", "    /*"),)),
    Mutant("no fence between the answer and counting the drops", "stall", (
        ("nsn_link_in.c", "    nsn_fence();\n    *dropped = new_drops(link);", "    *dropped = new_drops(link);"),)),
)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def compile_c(source: Path) -> None:
    run([os.environ.get("CC", "gcc"), *FLAGS, "-c", source.name, "-o", f"{source.stem}.o"], source.parent)


def link(folder: Path) -> None:
    objects = [path.name for path in sorted(folder.glob("*.o"))]
    run([os.environ.get("CC", "gcc"), *objects, f"-Wl,{WRAPPED}", "-lpthread", "-lm", "-o", "stress"], folder)


def mutate(text: str, old: str, new: str) -> str:
    """The text must be there, once: a mutant of code that has changed must be thought over, not pass for the wrong reason."""
    assert text.count(old) == 1, f"this is {text.count(old)} times in the code, not once: {old}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libnsn's sources on the simulator's nsn_shared.h, compiled."""
    folder = tmp_path_factory.mktemp("simulated")
    for path in (*LIBNSN.glob("nsn_*.[ch]"), *SIMULATOR.glob("*.[ch]")):
        if "insane" not in path.name:
            shutil.copy(path, folder / path.name)
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(compile_c, sorted(folder.glob("*.c"))))
    link(folder)
    return folder


@pytest.fixture
def mutant_of(simulated: Path, tmp_path: Path) -> Callable[[Mutant], Path]:
    """Where a mutant's program is: what was edited is compiled, the rest is as it was."""

    def make(mutant: Mutant) -> Path:
        for path in (*simulated.glob("*.[cho]"),):
            os.link(path, tmp_path / path.name)
        edited: dict[str, str] = {}
        for name, old, new in mutant.edits:
            edited[name] = mutate(edited.get(name) or (simulated / name).read_text(), old, new)
        for name, text in edited.items():
            source = tmp_path / name
            source.unlink()
            source.with_suffix(".o").unlink()
            source.write_text(text)
            compile_c(source)
        link(tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_code_holds_whatever_happens_in_between(scenario: str, simulated: Path) -> None:
    run(["./stress", scenario, str(ROUNDS)], simulated)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.scenario}: {mutant.name}")
def test_each_precaution_is_needed(mutant: Mutant, mutant_of: Callable[[Mutant], Path]) -> None:
    """Without it some seed finds a round that goes wrong."""
    folder = mutant_of(mutant)
    done = subprocess.run(["./stress", mutant.scenario, str(MUTANT_ROUNDS)], cwd=folder, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=SECONDS)
    assert done.returncode == 1 and done.stdout.startswith("round "), f"nobody misses it\n{done.stdout}{done.stderr}"
    print(done.stdout.splitlines()[0])
