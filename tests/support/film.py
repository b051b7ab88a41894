"""A film that was written, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np


def decode(path: Path) -> tuple[list[np.ndarray], list[Any], np.ndarray, Any]:
    """Pictures, their times in seconds (exact fractions), sound [n, channels], its rate."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        pictures, times = [], []
        for picture in container.decode(video):
            pictures.append(picture.to_ndarray(format="rgb24"))
            times.append(picture.pts * picture.time_base)
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.audio[0]))
    sound = np.concatenate([frame.to_ndarray().T for frame in frames])
    return pictures, times, sound, frames[0].sample_rate
