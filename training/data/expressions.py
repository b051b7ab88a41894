"""What a prompt asks for: an expression or an action, and how it shows in each frame.

Actions repeat every 16 video frames, half of a block, and start with it: so their phase follows
from the position in the block, which the model knows. A block's prompt is all that decides; from
one prompt to another the face takes a third of a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from liveact.blocks import RELEASED_CLOCK
from training.data.espeak import FloatArray

# All of them differ in their first 64 bytes, which is what the small prompt encoder reads.
WORDINGS: dict[str, tuple[str, ...]] = {
    "neutral": (
        "A person is speaking.",
        "A person talks to the camera.",
        "Somebody is talking.",
    ),
    "smiling": (
        "A person is smiling and speaking.",
        "A happy person talks with a smile.",
        "Somebody smiles while talking.",
    ),
    "sad": (
        "A sad person is speaking.",
        "A person looks sad while talking.",
        "Somebody is unhappy and talks.",
    ),
    "nodding": (
        "A person is nodding and speaking.",
        "A person nods while talking.",
        "Somebody talks and nods in agreement.",
    ),
    "waving": (
        "A person is waving a hand and speaking.",
        "A person waves while talking.",
        "Somebody raises a hand and waves.",
    ),
}
EXPRESSIONS = tuple(WORDINGS)
PROMPTS = tuple(text for texts in WORDINGS.values() for text in texts)
SHARES = (0.4, 0.15, 0.15, 0.15, 0.15)  # of the blocks of clips
PERIOD = 16  # video frames of a nod and of a wave
RAMP = 6  # video frames from one expression to another


def expression_of(prompt: int) -> str:
    """What a member of `PROMPTS` asks for."""
    return next(name for name, texts in WORDINGS.items() if PROMPTS[prompt] in texts)


def prompt_of(expression: str, wording: int = 0) -> int:
    """Index in `PROMPTS`."""
    return PROMPTS.index(WORDINGS[expression][wording])


def expression_track(blocks: Sequence[str], frames: int) -> FloatArray:
    """Expression of each block (the last one lasts) -> [frames, 5]: smile, sad, bob, hand, wave.

    All 0 to 1, but wave from -1 to 1. The first frame, which is the portrait, is at rest.
    """
    strength = np.zeros((frames, len(EXPRESSIONS)))
    for frame in range(1, frames):
        block = next(b for b in range(frames) if frame in RELEASED_CLOCK.video_frames(b))
        wanted = EXPRESSIONS.index(blocks[min(block, len(blocks) - 1)])
        target = np.arange(len(EXPRESSIONS)) == wanted
        step = np.clip(target - strength[frame - 1], -1 / RAMP, 1 / RAMP)
        strength[frame] = strength[frame - 1] + step
    by_name = dict(zip(EXPRESSIONS, strength.T, strict=True))
    phase = 2 * np.pi * (np.arange(frames) - RELEASED_CLOCK.video_frames(0).stop) / PERIOD
    return np.stack(
        [
            by_name["smiling"],
            by_name["sad"],
            by_name["nodding"] * (0.5 - 0.5 * np.cos(phase)),
            by_name["waving"],
            by_name["waving"] * np.sin(phase),
        ],
        axis=1,
    ).astype(np.float32)
