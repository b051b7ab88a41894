"""Runs attention launches under Triton's CPU interpreter, in a process of its own.

    TRITON_INTERPRET=1 python -m tests.support.kernels.attention_interpreter in.pt out.pt

in.pt is a list of (spec name, tile sizes, {parameter: tensor or number}); out.pt gets the tensor
`out` of each, NaN where the kernel wrote nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.support.kernels.interpreter import launch


def fix_products() -> None:
    """Multiplies numbers: the interpreter multiplies the bit patterns of bf16 operands, and reads
    the NaN of fp8 operands as 480."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            values = (x.data.astype(np.uint32) << 16).view(np.float32)
        elif x.dtype.scalar == tl.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(x.data.view(np.uint8)))
            values = codes.view(torch.float8_e4m3fn).float().numpy()
        else:
            return x
        return interpreter.TensorHandle(values, tl.float32)

    def create_widened_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_widened_dot


def main() -> None:
    fix_products()
    torch.set_num_threads(1)
    results = []
    for name, tiles, arguments in torch.load(sys.argv[1], weights_only=True):
        arguments["out"].fill_(float("nan"))
        launch(name, tiles, **arguments)
        results.append(arguments["out"])
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
