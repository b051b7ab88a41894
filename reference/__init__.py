"""The LiveAct model in plain PyTorch: one statement of its mathematics, in three roles.

It is the independent oracle of the tests: it shares no code with the engine and agrees with the
recordings of the released model. It is the baseline of the benchmarks: a session does the work that
the released code does. And it is what a trainer differentiates: batched, with gradients through
cached keys, values and the memory's taps, its `state_dict()` in the released names. Nothing here is
fused, and nothing is kept that can be computed again. Not in the wheel.

Reading order: `layout` (which slot holds what), `dit_layers`, `dit` (one velocity evaluation),
`dit_stream` (a session), `vae` (a whole video at once), `vae_stream` (block by block, as released).
"""

from reference.dit import DiT, stack_texts
from reference.dit_layers import KVCache
from reference.dit_stream import TIMESTEPS, DiTStream
from reference.layout import (
    BlockPlan,
    Layout,
    UpdateTable,
    audio_rows,
    audio_windows,
    plan_block,
    update_table,
)
from reference.vae import VAE, VAESizes
from reference.vae_stream import VAEStream, to_uint8

__all__ = [
    "TIMESTEPS",
    "VAE",
    "BlockPlan",
    "DiT",
    "DiTStream",
    "KVCache",
    "Layout",
    "UpdateTable",
    "VAESizes",
    "VAEStream",
    "audio_rows",
    "audio_windows",
    "plan_block",
    "stack_texts",
    "to_uint8",
    "update_table",
]
