"""The report of a window: figures beside predictions, with the machine's stamp."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.headline import PREDICTED, block_ms, figures, headline
from tests.support.paths import REPOSITORY

GPU = {
    "name": "NVIDIA H200",
    "driver": "580.1",
    "power_cap_w": 700.0,
    "max_sm_mhz": 1980,
    "sm_mhz": {"median": 1755.0},
    "power_w": {"median": 610.0},
    "throttle_reasons": {"power cap": 0.25},
}
MACHINE = {
    "cpu": "a CPU",
    "commit": "0123456789ab",
    "date": "2026-11-26T20:00:00+00:00",
    "versions": {"torch": "2.11.0"},
}


def block(kernel: str = "self_attention.f8", **changes: Any) -> dict[str, Any]:
    return {
        "benchmark": "block",
        "machine": MACHINE,
        "gpu": GPU,
        "sizes": {"picture": [512, 512], "dim": 5120},
        "choices": {"self_attention f8 8192 x (6144 + 8192), 40 heads": f"{kernel}: 2.5 ms, x: 3"},
        "ops": [
            {"op": "linear 15360x5120", "total_ms": 300.0},
            {"op": "linear 5120x5120", "total_ms": 200.0},
            {"op": "self_attention", "total_ms": 400.0},
            {"op": "layer_norm", "total_ms": 98.0},
        ],
        "ms_per_block": {"median": 1036.0},
        "peak": {"tb_per_s": 4.0, "tflops": {"fp8": 1400.0}},
        "pipeline": {"frames_per_second": 25.0},
        **changes,
    }


def plain(ms: float) -> dict[str, Any]:
    common = {"benchmark": "plain", "machine": MACHINE, "gpu": GPU, "name": "plain PyTorch"}
    return {**common, "ms_per_block": {"median": ms}}


def test_every_figure_beside_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "block.json").write_text(json.dumps(block()))
    (tmp_path / "plain_fp8.json").write_text(json.dumps(plain(2072.0)))
    assert command.main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    low, high = block_ms("H200", gluon=False)
    assert f"| block | block, Triton attention | {low:g}–{high:g} | 1036 ms | 1.03 |" in text
    assert "| block | products | 470–525 | 500 ms a block | 1.01 |" in text
    assert "| block | self-attention, Triton | 370–460 | 400 ms a block | 0.96 |" in text
    assert "times as long as the engine | | 2.00 | |" in text
    assert "NVIDIA H200, driver 580.1, SM 1755 of 1980 MHz" in text
    assert "throttled: power cap 25%" in text and "commit 0123456789ab" in text
    assert (tmp_path / "report.txt").read_text().strip() == text.strip()
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_the_tar_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "block.json"
    file.write_text(json.dumps(block()))
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as tar:
        tar.add(file, file.name)
    file.unlink()
    assert command.main(["report", str(tmp_path)]) == 0
    assert command.main(["report", str(tmp_path / "nowhere")]) == 2


def test_predictions_are_of_the_kernel_card_and_size() -> None:
    gluon = figures(block("self_attention.f8.hopper.to_f8"))
    assert gluon[0].name == "block, Gluon attention"
    assert (gluon[0].low, gluon[0].high) == block_ms("H200", gluon=True)
    h100 = figures(block(gpu=GPU | {"name": "NVIDIA H100 80GB HBM3"}))
    assert (h100[3].low, h100[3].high) == PREDICTED["H100"]["rest"]
    for other in (block(gpu=None), block(sizes={"picture": [720, 416], "dim": 5120})):
        assert all(f.ratio is None for f in figures(other))


def test_a_result_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "block.json"
    file.write_text(json.dumps(block()))
    assert headline(file).startswith("block, Triton attention 1036 ms (expected 925–1080), prod")
    file.write_text("{")
    assert "block.json: expected a result" in headline(file)


def test_the_documentation_has_the_same_predictions() -> None:
    text = (REPOSITORY / "docs" / "kernels.md").read_text()
    expected = [PREDICTED["H200"][p] for p in ("products", "attention", "attention_gluon", "rest")]
    expected += [block_ms("H200", gluon=False), block_ms("H200", gluon=True)]
    for low, high in [*expected, PREDICTED["H200"]["vae"], PREDICTED["H100"]["rest"]]:
        assert f"{low:g}–{high:g}" in text
