"""GPU kernels in Triton, compiled ahead of time to cubins and a manifest.

Never imported by the installed package: `liveact` loads what `python -m triton_kernels.compile`
wrote. One file per op of core/ops.h; a file holds the kernel, its specs and the reason for their
numbers, and at its end the tuning table per architecture.
"""
