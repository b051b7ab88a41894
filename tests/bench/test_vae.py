"""The VAE benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from liveact.checkpoint.random import random_vae
from liveact.checkpoint.tensors import PthTensors
from liveact.vae.vae import Vae


@pytest.mark.slow
def test_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vae.json"
    command = ["vae", "--device", "cpu", "--base-width", "8", "--size", "48x32", "--repeat", "2"]
    benchmarks.main([*command, "--endurance-blocks", "3", "--json", str(path)])
    result = json.loads(path.read_text())
    assert 0 < result["first_pictures_ms"] < result["ms_per_block"]
    assert result["ratio_to_released"] > 0 and result["released_ms_per_block"] > 0
    # Both ways decode the first block alike, up to the order of fp32 sums.
    assert result["relative_difference"] < 1e-5
    assert result["endurance"]["blocks"] == 3 and result["psnr_db"] is None
    vae = Vae.from_tensors(PthTensors(random_vae(8, 0), Path("random")), "cpu")
    assert result["state_bytes"] == vae.stream_bytes((4, 6), result["frames_per_call"])
    assert result["sizes"]["base_width"] == 8
    # conv_in, conv_out, and the residual blocks: 4 shapes of one width, 1 that widens.
    assert [row["count"] for row in result["convolutions"]].count(1) >= 3
    assert sum(row["count"] for row in result["convolutions"]) == 2 + 2 * 14
    text = capsys.readouterr().out
    assert "released way" in text and "not timed" in text
