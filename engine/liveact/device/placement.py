"""Where the DiT and the VAE go when there are two GPUs: by arithmetic on the sizes of the released
model at 512×512, a steady block in fp8 on an H200. Rates are those that docs/kernels.md expects;
nothing of it was measured. Another GPU or another size changes the times more than their order.
"""

from __future__ import annotations

from dataclasses import dataclass

from liveact import _core

BLOCK_FRAMES = 32  # video frames of a block
STEPS, AUDIO_STEPS = 3, 2
FRAME_TOKENS, CURRENT, SLOTS = 1024, 8, 14  # latent frames of 512×512

PRODUCT_TFLOPS = 1320.0  # fp8, sums in the tensor core
ATTENTION_TFLOPS = 675.0  # the Triton kernel
ROWS_MS = 90.0  # norms, activations and the other kernels that memory limits; gaps
VAE_MS = 205.0
LINK_GBPS = 380.0  # NVLink, each way
BARRIER_US = 4.0  # signal and wait


@dataclass(frozen=True)
class Times:
    """Milliseconds from one block to the next.

    Attributes:
        one: everything on one GPU.
        apart: the VAE on the second one.
        shared: both denoise, and the second one decodes too.
    """

    one: float
    apart: float
    shared: float


def denoise_ms(config: _core.ModelConfig) -> float:
    """A block on one GPU."""
    d, m = config.dim, CURRENT * FRAME_TOKENS
    layer = 2 * m * d * (6 * d + 2 * config.ffn_dim)  # self-attention, cross-attention, FFN
    audio = 2 * m * d * 2 * d
    products = config.num_layers * (STEPS * layer + AUDIO_STEPS * audio)
    attention = config.num_layers * STEPS * 4 * m * SLOTS * FRAME_TOKENS * d
    return products / PRODUCT_TFLOPS / 1e9 + attention / ATTENTION_TFLOPS / 1e9 + ROWS_MS


def exchange_ms(config: _core.ModelConfig) -> float:
    """What two GPUs send one another in a block, were none of it hidden (docs/parallel.md)."""
    rows = CURRENT * FRAME_TOKENS // 2
    sent_bytes = rows * config.dim // 2 * (3 + 1)  # q, k, v and what attention mixed, fp8
    layers = STEPS * config.num_layers
    return layers * (sent_bytes / LINK_GBPS / 1e6 + 2 * BARRIER_US / 1e3)


def expected_times(config: _core.ModelConfig) -> Times:
    """Decode and denoise of one GPU add up: either fills it."""
    denoise = denoise_ms(config)
    return Times(
        one=denoise + VAE_MS,
        apart=max(denoise, VAE_MS),
        shared=denoise / 2 + exchange_ms(config) + VAE_MS,
    )


@dataclass(frozen=True)
class Placement:
    """The DiT's devices, the VAE's, and why, in one line."""

    dit: tuple[str, ...]
    vae: str | None  # None: where the encoders are
    reason: str


def choose(gpus: list[str], obstacle: str, config: _core.ModelConfig | None = None) -> Placement:
    """gpus: those that are usable; obstacle: why the first two cannot share, '' where they can."""
    if len(gpus) < 2:
        return Placement((gpus[0],), None, "one GPU")
    times = expected_times(config or _core.ModelConfig())
    said = (
        f"expected ms a block: both denoise {times.shared:.0f}, decode on the second "
        f"{times.apart:.0f}, one GPU {times.one:.0f}"
    )
    if obstacle:
        reason = f"decode on {gpus[1]}, because both to denoise expects {obstacle}"
        return Placement((gpus[0],), gpus[1], reason)
    if times.shared < times.apart:
        return Placement((gpus[0], gpus[1]), gpus[1], f"both denoise; {said}")
    return Placement((gpus[0],), gpus[1], f"decode on {gpus[1]}; {said}")
