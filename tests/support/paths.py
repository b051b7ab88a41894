"""Where things are: the checkout, and the recordings of the released model beside it."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
GOLDEN = REPOSITORY.parent / "shared" / "golden"
PORTRAIT = REPOSITORY / "examples" / "portrait.png"
BUILT = REPOSITORY / "build" / "tests"  # what tests compile, kept for the next run
