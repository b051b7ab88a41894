"""The demo checkpoint: complete, deterministic, finite for many blocks, careful with files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from liveact import _core
from liveact.checkpoint.demo import write_demo_checkpoint
from liveact.checkpoint.layout import TEXT_FILE, VAE_FILE
from liveact.checkpoint.tensors import load_pth
from liveact.dit.dit import Dit
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError
from liveact.vae.vae import Vae, VaeStream


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("demo") / "checkpoint")


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_equal_seeds_give_equal_bytes(demo: Path, tmp_path: Path) -> None:
    again = write_demo_checkpoint(tmp_path / "again", 0)
    other = write_demo_checkpoint(tmp_path / "other", 1)
    assert digests(again) == digests(demo)
    assert digests(other) != digests(demo)
    assert sum(path.stat().st_size for path in demo.rglob("*") if path.is_file()) < 30e6


def test_names_are_the_released_ones(demo: Path, golden: Path) -> None:
    """But for the number of layers, every file has the tensors of a recorded checkpoint."""

    def shape_of_names(names: object) -> set[str]:
        return {".".join("N" if p.isdecimal() else p for p in str(n).split(".")) for n in names}  # type: ignore[attr-defined]

    pairs = (
        (load_file(demo / "diffusion_pytorch_model.safetensors"), "dit"),
        (load_pth(demo / VAE_FILE), "vae"),
        (load_pth(demo / TEXT_FILE), "encoders"),
    )
    for found, part in pairs:
        if part == "dit":
            expected = load_file(golden / "dit" / "diffusion_pytorch_model.safetensors")
        else:
            expected = load_pth(golden / part / (VAE_FILE if part == "vae" else TEXT_FILE))
        assert shape_of_names(found) == shape_of_names(expected), part


def test_everything_loads_and_fits_together(demo: Path) -> None:
    dit = Dit.load(demo, _core.open_cpu())
    text = TextEncoder.load(demo)
    audio = AudioEncoder.load(demo / "wav2vec")
    assert text.dim == dit.config.text_dim
    assert ImageEncoder.load(demo).dim == dit.config.image_dim
    assert audio.num_layers * audio.hidden == dit.config.audio_dim
    for prompt in ("A person is speaking.", "说话的人 👄", "\N{COMBINING ACUTE ACCENT}"):
        assert torch.isfinite(text.encode(prompt)).all()


def test_blocks_stay_finite_and_of_order_one(demo: Path) -> None:
    dit = Dit.load(demo, _core.open_cpu())
    stream = dit.open_stream((4, 4), image_tokens=5)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    stream.set_image(random(5, dit.config.image_dim), random(20, 14, 4, 4))
    stream.set_prompt(random(7, dit.config.text_dim))
    for _ in range(50):
        shape = (16, stream.frames_of_next_block, 4, 4)
        rows = random(stream.audio_rows_of_next_block, dit.config.audio_dim)
        latent = stream.denoise(random(*shape), random(2, *shape), rows)
        assert 0.3 < latent.std() < 3
    frames = torch.cat(list(VaeStream(Vae.load(demo / VAE_FILE)).decode_video(latent)), 1)
    assert frames.std() > 0.1, "the picture must be more than grey"
    assert (frames.abs() > 1).float().mean() < 0.5, "and not saturated"


def test_foreign_directories_are_left_alone(demo: Path, tmp_path: Path) -> None:
    assert json.loads((demo / "config.json").read_text())["_demo"] is True
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(InputError, match=r"demo checkpoint|found a file"):
            write_demo_checkpoint(target)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    assert write_demo_checkpoint(demo) == demo, "a demo checkpoint is replaced"
