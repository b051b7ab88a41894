"""The sizes and values that the kernels other than attention are tested and measured at.

One list for both: `correctness` and `corner` cases are small enough for Triton's CPU interpreter,
`performance` cases are the product's sizes and run on a GPU only. A case says what goes in; which
formats come out (fp8, bf16) is up to the test or benchmark that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Group = Literal["correctness", "corner", "performance"]
Values = Literal["random", "equal", "zero", "tiny", "huge", "outlier"]

RELEASED_DIM, RELEASED_FFN, SMALL_DIM, SMALL_FFN = 5120, 13824, 256, 512
SQUARE, WIDE = (32, 32), (26, 45)  # token grids at 512×512 (F = 1024) and 720×416 (F = 1170)


@dataclass(frozen=True)
class KernelCase:
    """One case of one op.

    sizes: the op's dimensions by the names in csrc/core/ops.h; grid_rows · grid_cols = F.
    options: settings that are not sizes, such as the table of a memory update.
    """

    op: str
    group: Group
    sizes: Mapping[str, int]
    values: Values = "random"
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        sizes = ".".join(f"{key}{value}" for key, value in self.sizes.items())
        return ".".join((self.op, sizes, self.values, *self.options.values()))


def make_values(
    values: Values, *shape: int, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """fp32 values that bf16 holds exactly; `outlier` has one entry per row 10⁴ times the rest. They
    are drawn on `device`: other devices draw others."""
    generator = torch.Generator(device).manual_seed(seed)
    random = torch.randn(shape, generator=generator, device=device)
    if values == "equal":
        random = random[..., :1].expand(shape)
    elif values == "outlier":
        random[..., shape[-1] // 3] *= 1e4
    factor = {"zero": 0.0, "tiny": 1e-30, "huge": 1e30}.get(values, 1.0)
    return (random * factor).bfloat16().float()


def _row_cases(op: str, small: int, released: int) -> list[KernelCase]:
    corners: tuple[Values, ...] = ("equal", "zero", "tiny", "huge", "outlier")
    return [
        KernelCase(op, "correctness", {"rows": 13, "cols": small}),
        KernelCase(op, "correctness", {"rows": 3, "cols": released}),
        KernelCase(op, "corner", {"rows": 1, "cols": small}),
        *(KernelCase(op, "corner", {"rows": 2, "cols": small}, values) for values in corners),
        *(KernelCase(op, "performance", {"rows": rows, "cols": released}) for rows in (8192, 9360)),
    ]


def _frames(n: int, heads: int, grid: tuple[int, int]) -> dict[str, int]:
    return {"n": n, "heads": heads, "grid_rows": grid[0], "grid_cols": grid[1]}


def _split_cases() -> list[KernelCase]:
    corners: tuple[Values, ...] = ("equal", "zero", "tiny", "outlier")
    return [
        KernelCase("split_qkv", "correctness", _frames(2, 2, (3, 4))),
        KernelCase("split_qkv", "correctness", _frames(2, 40, (1, 1))),
        KernelCase("split_qkv", "correctness", _frames(1, 2, (1, 13))),
        KernelCase("split_qkv", "corner", _frames(1, 2, (1, 1))),
        *(KernelCase("split_qkv", "corner", _frames(1, 2, (2, 3)), values) for values in corners),
        *(KernelCase("split_qkv", "performance", _frames(8, 40, grid)) for grid in (SQUARE, WIDE)),
    ]


def _memory_cases() -> list[KernelCase]:
    def case(
        group: Group, heads: int, grid: tuple[int, int], table: str, axis: str, taps: str
    ) -> KernelCase:
        options = {"table": table, "axis": axis, "taps": taps}
        return KernelCase("update_memory", group, _frames(8, heads, grid), "random", options)

    return [
        case("correctness", 2, (3, 4), "sequential", "token", "key"),
        case("correctness", 2, (3, 4), "sequential", "frame", "own"),
        case("correctness", 2, (3, 4), "sharded", "token", "own"),
        case("correctness", 2, (3, 4), "mean", "token", "mean"),
        case("correctness", 2, (3, 4), "block_0", "token", "key"),
        case("corner", 2, (1, 13), "sequential", "token", "key"),
        case("corner", 2, (1, 1), "sequential", "token", "key"),
        case("corner", 5, (2, 3), "sharded", "frame", "key"),  # heads past one group of 4
        case("corner", 1, WIDE, "sequential", "token", "key"),
        *(case("performance", 40, grid, "sequential", "token", "key") for grid in (SQUARE, WIDE)),
    ]


def _latent_cases() -> list[KernelCase]:
    def shapes(op: str) -> list[KernelCase]:
        return [
            KernelCase(op, "correctness", {"n": 2, "h": 6, "w": 8}),
            KernelCase(op, "corner", {"n": 1, "h": 2, "w": 26}),
            KernelCase(op, "performance", {"n": 8, "h": 64, "w": 64}),
        ]

    def flat(op: str) -> list[KernelCase]:
        return [
            KernelCase(op, "correctness", {"size": 1040}),
            KernelCase(op, "corner", {"size": 16}, "huge"),
            KernelCase(op, "performance", {"size": 16 * 8 * 64 * 64}),
        ]

    return [
        *shapes("patchify"),
        *shapes("unpatchify"),
        *flat("sampler_step"),
        *flat("guide"),
        *flat("all_finite"),
    ]


CASES = [
    *_row_cases("layer_norm", SMALL_DIM, RELEASED_DIM),
    *_row_cases("rms_norm", SMALL_DIM, RELEASED_DIM),
    *_row_cases("quantize", SMALL_DIM, RELEASED_DIM),
    *_row_cases("activate", SMALL_FFN, RELEASED_FFN),
    *_split_cases(),
    KernelCase("value_scale", "correctness", {"rows": 140, "heads": 2}),
    KernelCase("value_scale", "corner", {"rows": 1, "heads": 2}, "zero"),
    KernelCase("value_scale", "corner", {"rows": 7, "heads": 3}, "huge"),
    KernelCase("value_scale", "performance", {"rows": 6144, "heads": 40}),
    KernelCase("store_kv", "correctness", {"tokens": 37, "heads": 2}),
    KernelCase("store_kv", "corner", {"tokens": 1, "heads": 3}),
    KernelCase("store_kv", "performance", {"tokens": 512, "heads": 40}),
    *_memory_cases(),
    *_latent_cases(),
    KernelCase("apply_epilogue", "correctness", {"rows": 19, "cols": 272}),
    KernelCase("apply_epilogue", "corner", {"rows": 1, "cols": 16}),
    KernelCase("apply_epilogue", "performance", {"rows": 8192, "cols": 5120}),
]


def _matrix_cases() -> list[KernelCase]:
    """Products and attentions; what tests them has lists of its own, with bounds of its own."""

    def linear(group: Group, rows: int, cols: int, inner: int) -> KernelCase:
        return KernelCase("linear", group, {"rows": rows, "cols": cols, "inner": inner})

    def self_attention(group: Group, heads: int, frame_tokens: int, n: int) -> KernelCase:
        sizes = {"n": n, "context": 6, "heads": heads, "frame_tokens": frame_tokens}
        return KernelCase("self_attention", group, sizes)

    def cross_attention(group: Group, rows: int, heads: int, text: int, image: int) -> KernelCase:
        sizes = {"rows": rows, "heads": heads, "text": text, "image": image}
        return KernelCase("cross_attention", group, sizes)

    def audio_attention(group: Group, n: int, frame: int, heads: int, audio: int) -> KernelCase:
        sizes = {"n": n, "frame_tokens": frame, "heads": heads, "audio": audio}
        return KernelCase("audio_attention", group, sizes)

    layer = [(15360, 5120), (5120, 5120), (13824, 5120), (5120, 13824)]  # N × K of qkv, o and FFN
    return [
        linear("correctness", 48, 272, 256),
        *(linear("performance", rows, *size) for rows in (8192, 9360) for size in layer),
        self_attention("correctness", 2, 12, 8),
        *(self_attention("performance", 40, frame, 8) for frame in (1024, 1170)),
        cross_attention("correctness", 24, 2, 17, 33),
        *(cross_attention("performance", 8192, 40, text, 257) for text in (41, 512)),
        audio_attention("correctness", 2, 12, 2, 8),
        *(audio_attention("performance", 8, frame, 40, 32) for frame in (1024, 1170)),
    ]


MATRIX_CASES = _matrix_cases()


def _epilogue_cases() -> list[KernelCase]:
    def case(
        group: Group, cols: int, size: tuple[int, int, int], variant: str, values: Values = "random"
    ) -> KernelCase:
        sizes = {"n": size[0], "h": size[1], "w": size[2], "cols": cols}
        return KernelCase("conv_epilogue", group, sizes, values, {"variant": variant})

    corners: tuple[Values, ...] = ("equal", "zero", "tiny", "huge", "outlier")
    return [
        *(case("correctness", 32, (2, 3, 5), name) for name in ("norm", "skip", "norm_keep")),
        *(case("correctness", cols, (1, 9, 8), "skip_norm_keep") for cols in (8, 16, 32, 384)),
        case("correctness", 8, (4, 16, 17), "skip_norm"),
        case("correctness", 96, (1, 5, 4), "skip_norm"),
        case("correctness", 32, (4, 3, 5), "frames"),
        case("correctness", 384, (2, 1, 3), "frames"),
        case("correctness", 16, (2, 6, 10), "phases_norm_keep"),
        case("correctness", 192, (1, 2, 4), "phases_norm_keep"),
        case("corner", 8, (1, 2, 2), "phases_norm_keep"),
        case("corner", 32, (2, 1, 1), "frames"),
        *(case("corner", 32, (1, 1, 3), "skip_norm_keep", values) for values in corners),
        # 32 video frames of 512×512, one latent frame at a time
        case("performance", 384, (2, 128, 128), "skip_norm_keep"),
        case("performance", 192, (4, 256, 256), "skip_norm_keep"),
        case("performance", 96, (4, 512, 512), "norm"),
        case("performance", 96, (4, 512, 512), "skip_norm_keep"),
        case("performance", 96, (4, 512, 512), "phases_norm_keep"),
    ]


# The kernels of the VAE decoder (triton_kernels/conv_epilogue.py, to_pictures.py).
VAE_CASES = [
    *_epilogue_cases(),
    KernelCase("to_pictures", "correctness", {"n": 2, "h": 5, "w": 31}),
    KernelCase("to_pictures", "corner", {"n": 1, "h": 1, "w": 1}, "huge"),
    KernelCase("to_pictures", "performance", {"n": 4, "h": 512, "w": 512}),
]


def cases(op: str, *groups: Group) -> list[KernelCase]:
    """The cases of an op, of these groups or of all."""
    return [
        case
        for case in (*CASES, *VAE_CASES)
        if case.op == op and (not groups or case.group in groups)
    ]
