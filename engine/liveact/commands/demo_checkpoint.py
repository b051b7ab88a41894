"""`liveact demo-checkpoint`: a tiny checkpoint of random weights."""

from __future__ import annotations

import argparse

from liveact.checkpoint.demo import write_demo_checkpoint


def run(options: argparse.Namespace) -> None:
    """Writes it and says what to expect."""
    directory = write_demo_checkpoint(options.directory, options.seed)
    print(f"{directory}: a tiny checkpoint of random weights; the picture will be texture")
