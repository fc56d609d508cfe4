"""A bounded run of each fuzz target, from the corpus in the tree on. `make fuzz` runs them for as long as told."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("libnsn is for Linux", allow_module_level=True)

from tests.fuzz import CORPUS, FuzzError, build, fuzz, targets

SECONDS = 3


@pytest.fixture(scope="module")
def built() -> None:
    """All targets; where the compiler is missing this fails, saying what to install."""
    try:
        build()
    except FuzzError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("target", targets())
def test_nothing_is_found(target: str) -> None:
    """The corpus, and a few seconds of what comes from it."""
    assert any((CORPUS / target).iterdir()), f"{CORPUS / target} is empty"
    outcome = fuzz(target, SECONDS)
    assert outcome.good, f"{outcome.said}\nagain with: python -m tests.fuzz --replay {outcome.artifact} {target}"
