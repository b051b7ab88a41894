"""The conditioning y that a session starts from: what the VAE makes of the portrait."""

from __future__ import annotations

import torch

from liveact.blocks import RELEASED_CLOCK, TEMPORAL_STRIDE, BlockClock
from liveact.vae.vae import Vae


def condition_on(
    vae: Vae, picture: torch.Tensor, clock: BlockClock = RELEASED_CLOCK
) -> torch.Tensor:
    """picture [3, H, W] in [−1, 1] → y [20, slots, h, w]: the mask of the known latent frame, then
    the encoded video of the picture and zeros (docs/model.md, "Conditioning y")."""
    video = torch.zeros(1, 3, clock.condition_frames, *picture.shape[1:])
    video[0, :, 0] = picture
    encoded = vae.encode(video)[0].cpu()  # [16, slots, h, w]
    mask = torch.zeros(TEMPORAL_STRIDE, *encoded.shape[1:])
    mask[:, 0] = 1.0
    return torch.cat([mask, encoded])
