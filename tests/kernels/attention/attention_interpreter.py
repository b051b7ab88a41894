"""Runs attention launches under Triton's CPU interpreter, in a process of its own.

    TRITON_INTERPRET=1 python attention_interpreter.py in.pt out.pt

The interpreter is chosen when a kernel is defined, so it cannot share a process with the compiler.
in.pt is a list of (spec name, {parameter: tensor or number}, constexprs, grid); out.pt gets the
tensor `out` of each, NaN where the kernel wrote nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from triton_kernels import audio_attention, cross_attention, self_attention

FUNCTIONS = {
    spec.name: spec.function
    for module in (self_attention, cross_attention, audio_attention)
    for spec in module.SPECS
}


CASTS = {  # from fp32, with the rounding of the hardware: to nearest even
    tl.float8e4nv: lambda x: x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8),
    tl.bfloat16: lambda x: x.to(torch.bfloat16).view(torch.uint16),
}


def fix_casts() -> None:
    """Replaces the interpreter's casts to e4m3 and bf16, and from e4m3.

    NOTE: Triton 3.6 loses the carry of a rounding into the next power of two (7.77 becomes 4 in
    e4m3), truncates to bf16, and reads the NaN of e4m3 as 480.
    """
    broken = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float8e4nv and target == tl.float16:
            codes = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn)
            return codes.to(torch.float16).numpy()
        if source != tl.float32 or target not in CASTS:
            return broken(data, source, target, rounding)
        return CASTS[target](torch.from_numpy(np.ascontiguousarray(data))).numpy()

    interpreter._convert_float = convert


def fix_products() -> None:
    """Multiplies bf16 operands as numbers: the interpreter multiplies their bit patterns."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle(
            (x.data.astype(np.uint32) << 16).view(np.float32), tl.float32
        )

    def create_widened_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_widened_dot


def fix_scalars() -> None:
    """Lets a loop bound be a number again: NumPy 2.4 refuses int(array of one element)."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


def main() -> None:
    fix_casts()
    fix_products()
    fix_scalars()
    torch.set_num_threads(1)
    results = []
    for name, arguments, constexprs, grid in torch.load(sys.argv[1], weights_only=True):
        arguments["out"].fill_(float("nan"))
        FUNCTIONS[name][tuple(grid)](**arguments, **constexprs)
        results.append(arguments["out"])
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
