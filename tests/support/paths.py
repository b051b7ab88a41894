"""Where things are: the checkout, and the recordings of the released model, which lie beside it or,
where the checkout alone was copied to another machine, in the folder that benchmarks/pack.sh fills.
"""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
_RECORDINGS = (REPOSITORY.parent / "shared" / "golden", REPOSITORY / "pack" / "golden")
GOLDEN = next((folder for folder in _RECORDINGS if folder.is_dir()), _RECORDINGS[0])
PORTRAIT = REPOSITORY / "examples" / "portrait.png"
BUILT = REPOSITORY / "build" / "tests"  # what tests compile, kept for the next run
