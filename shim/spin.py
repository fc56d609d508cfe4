"""How long a waiter spins before it sleeps: never, always, or as long as that has lately been paying off."""

from __future__ import annotations

MAX_NS = 100_000  # one spin of an adaptive waiter
MIN_NS = 6_000  # below it a budget is worth nothing
PROBE_NS = 250_000  # the one spin that finds out whether it would pay again: the other side may have to be woken first
WORTH_NS = 300_000  # a sleep that ended sooner might have been worth a spin: most of it is waking up, here and there
POLL_NS = 1_000_000  # a polling waiter goes through its event loop this often
FIRST_TRUST = 1
LAST_TRUST = 64
SURE_HITS = 8


class Spin:
    """An adaptive budget. A miss halves it. When it is used up, short sleeps allow one long spin as a probe; a hit restores the
    budget. The more often probes were in vain, the more sleeps the next one takes."""

    __slots__ = ("_hits", "_probing", "_short_sleeps", "_trust", "budget_ns", "polls")

    def __init__(self, consumption: str) -> None:
        """consumption: the QoS policy: low, adaptive or poll."""
        self.polls = consumption == "poll"
        self.budget_ns = {"low": 0, "adaptive": MAX_NS, "poll": POLL_NS}[consumption]
        self._trust = FIRST_TRUST if consumption == "adaptive" else 0
        self._short_sleeps = 0
        self._hits = 0
        self._probing = False

    def hit(self, spent_ns: float) -> None:
        """A spin found something in that time."""
        if self._trust:
            self._hits += 1
            # The other side, which has to be woken, may find out meanwhile that it should spin too; or never, when it is paced.
            self.budget_ns = PROBE_NS if self._hits < SURE_HITS or spent_ns > MAX_NS / 2 else MAX_NS
            if self._hits < SURE_HITS:
                return
            self._trust = FIRST_TRUST
            self._probing = False

    def miss(self) -> None:
        """A spin of the whole budget found nothing."""
        if self._trust:
            self._hits = 0
            self.budget_ns = 0 if self._probing else self.budget_ns // 2
            if self.budget_ns < MIN_NS:
                self.budget_ns = 0
                self._probing = False
                self._short_sleeps = 0
                self._trust = min(self._trust * 2, LAST_TRUST)

    def woken(self, slept_ns: float) -> None:
        """A sleep ended because something came."""
        if self._trust and not self.budget_ns:
            if slept_ns < WORTH_NS:
                self._short_sleeps += 1
            else:
                self._short_sleeps = max(0, self._short_sleeps - 2)
            if self._short_sleeps >= self._trust:
                self._short_sleeps = 0
                self.budget_ns = PROBE_NS
                self._probing = True
