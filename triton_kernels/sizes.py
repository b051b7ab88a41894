"""The model sizes that kernels are compiled for: the released model, and the small one of the
recordings and the demo checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """What a kernel may have as a constant: width, FFN width, heads, head width."""

    dim: int
    ffn_dim: int
    heads: int
    head_dim: int = 128


RELEASED = ModelSize(dim=5120, ffn_dim=13824, heads=40)
SMALL = ModelSize(dim=256, ffn_dim=512, heads=2)
MODEL_SIZES = (RELEASED, SMALL)

HEAD_DIM = 128
PAIRS = HEAD_DIM // 2  # of a head; each rotates by one axis
PAIRS_ROW = PAIRS_COL = PAIRS // 3
PAIRS_FRAME = PAIRS - PAIRS_ROW - PAIRS_COL

VAE_WIDTHS = (96, 8)  # base width of the released autoencoder and of the small one
