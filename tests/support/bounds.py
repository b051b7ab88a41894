"""What rounding may cost, derived from the formats: bounds of results in reduced precision."""

from __future__ import annotations

import math

# What the reduced precisions may cost, from their formats.
#
# With m mantissa bits a value is rounded by at most u = 2^-(m+1) of its binade 2^e: uniform in
# ±u·2^e. Values spread over the binade log-uniformly, so 1/x² averages 3/(8·ln 2) / 2^2e and the
# relative RMS error is u/√3 · √(3/(8·ln 2)) = 0.425·u.
#
# The errors of the terms of a sum of products are independent, so a product is off, relative to
# its own RMS, by √2 of that for its two operands (fp8: 3.8 %), and by √3 where its result is
# rounded too (bf16: 0.29 %).
#
# What a sub-layer adds to the residual stream came through a chain of products, whose errors add in
# squares: q, k, v and O of an attention, which is 4, or W1 and W2. q and k count in full: they are
# RMS-normed, so logits vary by about 1, an error of theirs by a share δ moves logits by δ, and that
# moves the sum over independent values by δ of its size. Text, image and audio came through up to 3
# more, which in fp8 stay in bf16. The stream is a sum of such parts with independent errors, so it
# is off by no more than its worst part. The contexts it attends to carry the error of the block
# before, of the same size: another √2. The latent carries next to none from step to step, as
# re-noising keeps only 1 − σ ≤ 0.17 of it.
#
# bf16 also rounds the stream itself (patch embedding and 4 sub-layers in each of 2 layers), the
# input of the head and its output.


def rounding(mantissa_bits: int) -> float:
    """Relative RMS error of rounding to that many mantissa bits."""
    return 2.0 ** -(mantissa_bits + 1) / math.sqrt(3) * math.sqrt(3 / (8 * math.log(2)))


BF16, E4M3 = rounding(7), rounding(3)
BF16_BOUND = math.hypot(
    math.sqrt(3) * BF16 * math.sqrt(4 + 3) * math.sqrt(2),  # products, chains of 7, contexts
    BF16 * math.sqrt(1 + 4 * 2 + 2),
)  # 1.2 %
FP8_BOUND = math.hypot(math.sqrt(2) * E4M3 * math.sqrt(4) * math.sqrt(2), BF16_BOUND)  # 10.7 %
BOUND = {"bf16": BF16_BOUND, "fp8": FP8_BOUND}
# From the other side: less than half of what one product costs, and the precision was not on.
ONE_PRODUCT = {"bf16": math.sqrt(3) * BF16, "fp8": math.sqrt(2) * E4M3}
