"""The figures that count of each result, and what was predicted for them.

Standard library only: benchmarks/stages.py reads results with it before anything is installed. The
predictions are those of docs/kernels.md and docs/vae.md, for a block at 512×512 in FP8.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GLUON = "self_attention.f8.hopper"  # the kernel, see docs/attention.md


@dataclass(frozen=True)
class Figure:
    """One measured number. low, high: the predicted range, or None."""

    name: str
    unit: str
    measured: float
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over the middle of what was predicted."""
        if self.low is None or self.high is None:
            return None
        return self.measured / ((self.low + self.high) / 2)

    @property
    def predicted(self) -> str:
        return "" if self.low is None else f"{self.low:g}–{self.high:g}"


# (low, high), by card where bytes decide. Milliseconds of a block unless they say otherwise.
Range = tuple[float, float]
PREDICTED: dict[str, dict[str, Range]] = {
    "H200": {
        "products": (470, 525),
        "attention": (370, 460),
        "attention_gluon": (250, 293),
        "rest": (77, 87),
        "between": (8, 8),
        "vae": (180, 230),
        "copy": (3.8, 4.3),
    },
    "H100": {
        "products": (470, 525),
        "attention": (370, 460),
        "attention_gluon": (250, 293),
        "rest": (101, 113),
        "between": (8, 8),
        "vae": (190, 250),
        "copy": (2.7, 3.0),
    },
}


def block_ms(card: str, gluon: bool) -> Range:
    """The sum of the parts of PREDICTED."""
    parts = ("products", "attention_gluon" if gluon else "attention", "rest", "between")
    ranges = [PREDICTED[card][part] for part in parts]
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)


def two_ms(low: float, high: float) -> Range:
    """A block on two GPUs: half of one's, and 1 to 14 ms for what they exchange (docs/parallel.md):
    barriers only, or all of it exposed."""
    return low / 2 + 1, high / 2 + 14


def card_of(result: dict[str, Any]) -> str | None:
    """The card that a result was measured on, as PREDICTED names it; None for another one."""
    name = (result.get("gpu") or {}).get("name", "")
    return next((card for card in PREDICTED if card in name), None)


def is_predicted(result: dict[str, Any]) -> bool:
    sizes = result["sizes"]
    return sizes.get("picture") == [512, 512] and sizes.get("dim") == 5120


def _block(result: dict[str, Any], card: str | None) -> list[Figure]:
    gluon = any(said.startswith(f"{GLUON}.to_f8:") for said in result["choices"].values())
    known = card is not None and is_predicted(result)

    def expected(part: str) -> tuple[float | None, float | None]:
        return PREDICTED[card][part] if known and card is not None else (None, None)

    def total(*ops: str) -> float:
        return sum(o["total_ms"] for o in result["ops"] if o["op"].startswith(ops))

    products, attention = total("linear"), total("self_attention")
    whole = block_ms(card, gluon) if known and card is not None else (None, None)
    kernel = "Gluon" if gluon else "Triton"
    if two := result.get("split"):
        half = two_ms(*whole) if known and card is not None else (None, None)
        return [
            Figure("block, two GPUs", "ms", result["ms_per_block"]["median"], *half),
            Figure("of the time of one", "", two["ratio"]),
            Figure("one GPU beside it", "ms", two["one_ms"]["median"], *whole),
            Figure("whole pipeline", "FPS", result["pipeline"]["frames_per_second"]),
        ]
    return [
        Figure(f"block, {kernel} attention", "ms", result["ms_per_block"]["median"], *whole),
        Figure("products", "ms a block", products, *expected("products")),
        Figure(
            f"self-attention, {kernel}",
            "ms a block",
            attention,
            *expected("attention_gluon" if gluon else "attention"),
        ),
        Figure("other ops", "ms a block", total("") - products - attention, *expected("rest")),
        Figure("copy", "TB/s", result["peak"]["tb_per_s"], *expected("copy")),
        Figure("FP8 product, square", "TFLOP/s", result["peak"]["tflops"].get("fp8", 0.0)),
        Figure("whole pipeline", "FPS", result["pipeline"]["frames_per_second"]),
    ]


def _vae(result: dict[str, Any], card: str | None) -> list[Figure]:
    known = card is not None and result["sizes"]["picture"] == [512, 512]
    low, high = PREDICTED[card]["vae"] if known and card is not None else (None, None)
    return [
        Figure("VAE decode of a block", "ms", result["ms_per_block"], low, high),
        Figure("VAE, the released way", "ms", result["released_ms_per_block"]),
    ]


def _session(result: dict[str, Any], card: str | None) -> list[Figure]:
    first = result["time_to_first_chunk"]
    return [
        Figure(f"session, pace {result['pace']}", "FPS", result["frames_per_second"]),
        Figure("first chunk, warm", "s", first["warm"]["first_chunk_s"]),
    ]


def _kernels(result: dict[str, Any], card: str | None) -> list[Figure]:
    figures = [
        Figure(f"{row['case']}.{row['format']}", "TFLOP/s", row["tflops"])
        for row in result["rows"]
        if row["op"] == "linear" and row["format"] == "fp8"
    ]
    worst = min((row["share_measured"] for row in result["rows"]), default=0.0)
    figures.append(Figure("lowest share of the nearer limit", "%", 100 * worst))
    return figures


def _plain(result: dict[str, Any], card: str | None) -> list[Figure]:
    return [Figure(result["name"], "ms", result["ms_per_block"]["median"])]


def _paper(result: dict[str, Any], card: str | None) -> list[Figure]:
    here = result["table_3"]["here"]
    return [
        Figure("Table 3", "FPS", here["fps"]),
        Figure("Table 3, latency", "s", here["latency_s"]),
        Figure("ConvKV memory", "% of a block", 100 * result["convkv"]["share"]),
    ]


_FIGURES = {
    "block": _block,
    "vae": _vae,
    "session": _session,
    "kernels": _kernels,
    "plain": _plain,
    "paper": _paper,
}


def figures(result: dict[str, Any]) -> list[Figure]:
    """Those of one result, the most important first; none of a benchmark that has none."""
    make = _FIGURES.get(result["benchmark"])
    return [] if make is None else make(result, card_of(result))


def headline(file: Path) -> str:
    """A result in one line."""
    try:
        found = figures(json.loads(file.read_text()))
    except (ValueError, KeyError) as error:
        return f"{file.name}: expected a result, found {error!r:.80}"
    return ", ".join(
        f"{f.name} {f.measured:.4g} {f.unit}" + (f" (expected {f.predicted})" if f.ratio else "")
        for f in found[:4]
    )
