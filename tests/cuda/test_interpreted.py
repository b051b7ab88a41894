"""The CUDA backend computes what the CPU backend computes, shown without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.compare import relative_error
from tests.support.cuda.fake import FakeCuda
from tests.support.paths import REPOSITORY
from tests.support.pipeline import demo_checkpoint, speech, write_wav


def interpreted(
    folder: Path, kernels: Path, *arguments: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata that interpreted_run wrote. arguments: from PRECISION on."""
    out = folder / "out.safetensors"
    command = [sys.executable, "-m", "tests.support.cuda.interpreted_run"]
    command += [FakeCuda.copy_into(folder).path, str(kernels), *arguments, str(out)]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with safe_open(out, "pt") as file:
        return load_file(out), file.metadata()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "blocks", "guidance", "graphs"),
    # Blocks 0 and 1 run eagerly, the steps of block 2 are captured, block 3 replays them.
    [("fp8", 4, 1.0, 6), ("bf16", 2, 1.5, 0)],
)
def test_cuda_backend_under_the_interpreter(
    tmp_path: Path,
    compiled_kernels: Path,
    precision: str,
    blocks: int,
    guidance: float,
    graphs: int,
) -> None:
    """Every launch by Triton's interpreter, with the arguments the C++ launcher passed.

    Both backends quantise the same values in the same way, but sum in another order, so codes flip
    here and there. Bound: the distance to fp32 is at most twice that of the CPU backend in the same
    precision. A wrong argument, layout or order is many times that.
    """
    arguments = (precision, str(blocks), str(guidance), "cpu")
    results, metadata = interpreted(tmp_path, compiled_kernels, *arguments)
    names = [name.removeprefix("cuda.") for name in results if name.startswith("cuda.")]
    for name in names:
        exact = results[f"fp32.{name}"]
        cuda = relative_error(results[f"cuda.{name}"], exact)
        cpu = relative_error(results[f"cpu.{name}"], exact)
        assert 0 < cuda <= 2 * cpu, f"{name}: cuda differs from fp32 by {cuda}, cpu by {cpu}"
    assert len(names) == blocks + 2
    assert int(metadata["graphs"]) == graphs
    assert "self_attention." + ("f8" if precision == "fp8" else "bf16") in metadata["launched"]


@pytest.mark.slow
def test_two_devices_under_the_interpreter(tmp_path: Path, compiled_kernels: Path) -> None:
    """Their velocities and contexts are those of one, bit for bit, in an order that is drawn: the
    products of the fake library sum every row alike. Eager blocks and one that is captured."""
    results, metadata = interpreted(tmp_path, compiled_kernels, "fp8", "3", "1.0", "two")
    names = [name.removeprefix("two.") for name in results if name.startswith("two.")]
    assert len(names) == 3 + 2
    for name in names:
        assert torch.equal(results[f"two.{name}"], results[f"cuda.{name}"]), name
    assert int(metadata["graphs"]) == 3 + 6
    assert {"barrier.signal", "barrier.wait"} <= set(metadata["launched"].split(","))


@pytest.mark.slow
def test_generate_on_a_cuda_device(tmp_path: Path, compiled_kernels: Path) -> None:
    """The main job from the command line to the mp4, every launch by the interpreter.

    Bound: the pictures are at most twice as far from those of fp32 as the CPU's in fp8 are.
    """
    fake = FakeCuda.copy_into(tmp_path)
    audio = write_wav(tmp_path / "speech.wav", speech(1.05))  # 21 frames: 1 block

    def generate(name: str, command: list[str]) -> tuple[torch.Tensor, str]:
        out = tmp_path / name
        command += [
            "--checkpoint",
            str(demo_checkpoint()),
            "--audio",
            str(audio),
            "--out",
            str(out),
        ]
        command += ["--image", str(REPOSITORY / "examples" / "portrait.png"), "--size", "32x32"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *command, "--prompt", "A person is speaking."],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        with av.open(str(out)) as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return torch.from_numpy(np.stack(frames)).float(), done.stdout

    cli = ["liveact", "generate", "--device", "cpu", "--precision"]
    exact, _ = generate("fp32.mp4", [*cli, "fp32"])
    cpu, _ = generate("auto.mp4", [*cli, "auto"])
    fake_cuda = ["tests.support.cuda.interpreted_generate", fake.path, str(compiled_kernels)]
    cuda, output = generate("cuda.mp4", fake_cuda)
    assert cuda.shape == cpu.shape == exact.shape == (21, 32, 32, 3)
    assert "cuda:0, auto; encoders on cpu, VAE on cpu" in output
    assert "self_attention" in output and "update_memory" in output
    assert 0 < (cuda - exact).norm() <= 2 * (cpu - exact).norm()
