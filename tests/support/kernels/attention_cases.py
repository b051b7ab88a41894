"""Inputs of the attention kernels as the runtime lays them out, and what they must give.

Shared by the tests under the interpreter, the test on a GPU and the benchmark: a case is made from
fp32 tokens by the quantisation of liveact/dtype.h; the reference takes the quantised bytes, so that
only the attention's own rounding is between the two.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import REPOSITORY
from triton_kernels.spec import Spec

HEAD_DIM = 128
VALUE_PADDING = 128
F8_MAX = 448.0
VALUE_HEADROOM = 8.0  # kValueHeadroom in csrc/core/ops.h
KEY_HEADROOM = 5.0  # about √5120 over the largest of normal keys

# Half a unit in the last place, relative: 4 and 8 significant bits.
F8_STEP = 2.0**-4
BF16_STEP = 2.0**-8
F8_FLOOR = 2.0**-10 / 256  # half the smallest step of e4m3, of P cast as 256·P
# A logit of fp32 products carries about √128 roundings of 2^-24 of its terms; the fp8 tensor core
# of Hopper keeps 13 bits below the largest term of each of the 4 steps of a product.
F32_LOGIT_ERROR = 2.0**-20
TENSOR_CORE_LOGIT_ERROR = 2.0**-11


# A launch as attention_interpreter.py takes it: spec name, tile sizes, arguments.
Launch = tuple[str, dict[str, int], dict[str, Any]]


def launch_of(spec: Spec, arguments: dict[str, Any], arch: str) -> Launch:
    """The launch of `spec` with the tiles of `arch`, or "default"."""
    return spec.name, dict(spec.launch_for(arch).constexprs), arguments


def interpret(launches: list[Launch], folder: Path) -> list[torch.Tensor]:
    """Runs launches in a process with Triton's interpreter; returns the tensor `out` of each."""
    torch.save(launches, folder / "in.pt")
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "engine")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    script = "tests.support.kernels.attention_interpreter"
    command = [sys.executable, "-m", script, str(folder / "in.pt"), str(folder / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    outputs: list[torch.Tensor] = torch.load(folder / "out.pt", weights_only=True)
    return outputs


@dataclass
class Segment:
    """Keys and values of consecutive tokens, quantised."""

    k: torch.Tensor  # [H, T, HEAD_DIM] fp8 or bf16
    v: torch.Tensor  # [H, HEAD_DIM, stride], K-major, zero beyond T

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    def values(self) -> torch.Tensor:
        return self.v.double()[..., : self.tokens].transpose(1, 2)


@dataclass
class SelfAttention:
    """One call of self_attention."""

    q: torch.Tensor  # [H, M, HEAD_DIM]
    q_scale: torch.Tensor  # [H, M]
    context: Segment
    current: Segment
    k_scale: torch.Tensor  # [H]
    v_scale: torch.Tensor  # [H]

    @property
    def is_f8(self) -> bool:
        return self.q.dtype == torch.float8_e4m3fn

    def arguments(self) -> dict[str, Any]:
        heads, tokens, _ = self.q.shape
        return {
            "q": self.q,
            "q_scale": self.q_scale,
            "context_k": self.context.k,
            "context_v": self.context.v,
            "current_k": self.current.k,
            "current_v": self.current.v,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
            "out": torch.empty(tokens, heads * HEAD_DIM, dtype=torch.bfloat16),
            "out_scale": torch.empty(tokens),
            "rest": torch.empty(0, heads * HEAD_DIM, dtype=torch.bfloat16),
            "rest_scale": torch.empty(0),
            "head_scale": self.v_scale,
            "tokens": tokens,
            "out_rows": tokens,
            "heads": heads,
            "all_heads": heads,
            "context_tokens": self.context.tokens,
            "current_tokens": self.current.tokens,
            "context_v_stride": self.context.v.shape[2],
            "current_v_stride": self.current.v.shape[2],
        }

    def expected(self, logit_error: float = F32_LOGIT_ERROR) -> tuple[torch.Tensor, ...]:
        """(out, bound, deviation), each [M, H·HEAD_DIM] float64.

        bound: no element of a right result is further off. deviation: its expected root mean
        square if all roundings are independent and as large as they are just above a power of two.
        logit_error: of a logit, relative to the sum of its terms' magnitudes.
        """
        q = self.q.double() * self.q_scale.double()[..., None]
        keys = torch.cat([self.context.k.double(), self.current.k.double()], dim=1)
        keys = keys * self.k_scale.double()[:, None, None]
        values = torch.cat([self.context.values(), self.current.values()], dim=1)
        values = values * self.v_scale.double()[:, None, None]
        root = math.sqrt(HEAD_DIM)
        logits = q @ keys.transpose(1, 2) / root
        p = torch.exp(logits - logits.amax(dim=2, keepdim=True))
        total = p.sum(dim=2, keepdim=True)
        out = p @ values / total
        step, floor = (F8_STEP, F8_FLOOR) if self.is_f8 else (BF16_STEP, 0.0)
        rounding = torch.where(p > 1 - 1e-9, 0.0, torch.minimum(p, (step * p).clamp(min=floor)))
        # A logit off by e changes its P by e of itself, and the row's sum by as much at most.
        terms = (q.abs() @ keys.abs().transpose(1, 2)).amax(dim=2, keepdim=True) / root
        drift = 2 * torch.expm1(logit_error * terms) * (p @ values.abs()) / total
        bound = rounding @ values.abs() / total + drift + BF16_STEP * out.abs()
        variance = (rounding**2 / 3) @ values**2 / total**2 + (BF16_STEP * out) ** 2 / 3
        deviation = variance.sqrt() + drift
        return _token_major(out), _token_major(bound), _token_major(deviation)


def _token_major(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [H, T, HEAD_DIM] → fp8 codes and scales [H, T] (include/liveact/dtype.h)."""
    bound = x.abs().amax(dim=2).clamp(min=1e-12)
    codes = (x * (F8_MAX / bound)[..., None]).clamp(-F8_MAX, F8_MAX)
    return codes.to(torch.float8_e4m3fn), bound / F8_MAX


def k_major(v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """v [H, T, HEAD_DIM] → [H, HEAD_DIM, T rounded up to VALUE_PADDING], zeros beyond T."""
    heads, tokens, width = v.shape
    stride = -(-tokens // VALUE_PADDING) * VALUE_PADDING
    padded = torch.zeros(heads, width, stride, dtype=torch.float32)
    padded[..., :tokens] = v.transpose(1, 2)
    return padded.to(dtype)


def make(
    q: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor],
    current: tuple[torch.Tensor, torch.Tensor],
    f8: bool,
) -> SelfAttention:
    """From fp32 q and (k, v) pairs, each [H, tokens, HEAD_DIM]."""
    heads = q.shape[0]

    def fixed_scale(part: int, headroom: float) -> torch.Tensor:
        largest = torch.cat([context[part], current[part]], dim=1).abs().amax(dim=(1, 2))
        return largest.clamp(min=1e-12) * headroom / F8_MAX

    k_scale, v_scale = fixed_scale(0, KEY_HEADROOM), fixed_scale(1, VALUE_HEADROOM)

    def segment(k: torch.Tensor, v: torch.Tensor) -> Segment:
        if not f8:
            return Segment(k.bfloat16(), k_major(v, torch.bfloat16))
        k, v = (
            (x / scale[:, None, None]).clamp(-F8_MAX, F8_MAX)
            for x, scale in ((k, k_scale), (v, v_scale))
        )
        return Segment(k.to(torch.float8_e4m3fn), k_major(v, torch.float8_e4m3fn))

    if f8:
        codes, scale = quantize(q)
    else:
        codes, scale = q.bfloat16(), torch.ones(q.shape[:2])
        k_scale = v_scale = torch.ones(heads)
    return SelfAttention(codes, scale, segment(*context), segment(*current), k_scale, v_scale)


def random_tokens(
    generator: torch.Generator, heads: int, tokens: int, size: float = 1.0
) -> torch.Tensor:
    """[H, tokens, HEAD_DIM], normal with an outlier channel, as RMS-normed keys have."""
    x = torch.randn(heads, tokens, HEAD_DIM, generator=generator) * size
    x[..., 5] *= 4.0
    return x
