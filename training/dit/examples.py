"""What the DiT is trained on: clips as latents, with what a session would be given beside them.

Everything is made with the files of the checkpoint that the DiT will be part of, by the engine's
own encoders and in their formats, so that training sees what the runtime does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from liveact.audio.chain import SAMPLES_PER_FEATURE
from liveact.blocks import RELEASED_CLOCK
from liveact.checkpoint.layout import (
    IMAGE_FILE,
    VAE_FILE,
    WAV2VEC_DIRECTORY,
    WAV2VEC_WEIGHTS_FILES,
)
from liveact.checkpoint.tensors import load_pth
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from reference import VAE, Layout
from training.checkpoint import DIT_CONFIG
from training.data.clips import Clips
from training.data.expressions import PROMPTS
from training.data.identity import identity
from training.data.motion import COLUMNS
from training.data.portrait import draw
from training.vae.train import channels_last

HISTORY = 100  # features before a block that the encoder hears: 4 s, as `AudioFrontEnd` does
CONDITION_FRAMES = RELEASED_CLOCK.condition_frames


@dataclass
class Examples:
    """Clips of B blocks, and their people and prompts.

    latents [N, 16, n, h, w] and the y of each person [P, 20, 14, h, w]: float16. audio: for each
    block [N, 25 or 36, layers, hidden]. image [P, tokens, dim]. text: for each prompt [rows, dim].
    person [N] is an index into y and image, prompt [N, blocks] into text.
    """

    latents: Tensor
    audio: list[Tensor]
    person: Tensor
    prompt: Tensor
    y: Tensor
    image: Tensor
    text: list[Tensor]

    @property
    def blocks(self) -> int:
        """Blocks of each clip."""
        return len(self.audio)

    def save(self, path: Path) -> None:
        """One file of tensors."""
        partial = path.with_suffix(".partial")
        torch.save(self.__dict__, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Examples:
        """What `save` wrote."""
        return cls(**torch.load(path, weights_only=True))


def load_vae(checkpoint: Path) -> VAE:
    """The differentiable VAE of a checkpoint directory."""
    tensors = load_pth(checkpoint / VAE_FILE)
    return VAE.from_tensors({name: tensors[name] for name in tensors}).eval()


@torch.no_grad()
def encode_person(vae: VAE, picture: Tensor) -> Tensor:
    """A portrait [3, H, W] in [-1, 1] -> y [20, 14, h, w], as `condition_on` makes it."""
    video = picture.new_zeros(1, 3, CONDITION_FRAMES, *picture.shape[1:])
    video[0, :, 0] = picture
    encoded = vae.encode(video)[0]
    mask = encoded.new_zeros(4, *encoded.shape[1:])
    mask[:, 0] = 1
    return torch.cat([mask, encoded])


def streamed_features(encoder: AudioEncoder, speech: Tensor, blocks: int) -> list[Tensor]:
    """Speech [n] at 16 kHz in the encoder's tempo -> rows [25 or 36, layers, hidden] per block.

    Each block is encoded with its history only, as `AudioFrontEnd` in mode `stream` does it.
    """
    rows = []
    for block in range(blocks):
        wanted = RELEASED_CLOCK.features(block)
        start = max(0, wanted.start - HISTORY)
        samples = speech[start * SAMPLES_PER_FEATURE : wanted.stop * SAMPLES_PER_FEATURE]
        features = encoder.encode(samples, wanted.stop - start)
        indices = torch.tensor(wanted).clamp(start, wanted.stop - 1) - start
        rows.append(features[indices.to(features.device)].cpu())
    return rows


def windows_of(rows: Tensor, block: int, layout: Layout | None = None) -> Tensor:
    """Rows [B, 25 or 36, layers, hidden] of a block -> the windows [B, 53, 5, layers, hidden] that
    the reference reads; those of other blocks' frames, which it does not use, are zero."""
    layout = layout or Layout()
    around = rows.unfold(1, 5, 1).movedim(-1, 2)  # [B, frames of the block, 5, layers, hidden]
    count = 4 * (layout.slots - 1) + 1
    windows = rows.new_zeros(len(rows), count, *around.shape[2:])
    first = 0 if block == 0 else 4 * (layout.first_block - 1) + 1
    windows[:, first : first + around.shape[1]] = around
    return windows


@torch.no_grad()
def encode_clips(
    clips: Clips,
    chosen: list[int],
    checkpoint: Path,
    blocks: int,
    keep: Path,
    device: str = "cpu",
) -> Examples:
    """The examples of some clips, with the encoders in a checkpoint directory.

    keep: a folder for what is made of each clip and person; what is there already, of the same
    pictures or sound and encoders, is not made again.
    """
    seen = keep / _stamp(blocks, checkpoint, VAE_FILE, IMAGE_FILE)
    heard = keep / _stamp(blocks, checkpoint, f"{WAV2VEC_DIRECTORY}/{WAV2VEC_WEIGHTS_FILES[0]}")
    for folder in (seen, heard):
        folder.mkdir(parents=True, exist_ok=True)
    vae, fast = load_vae(checkpoint).to(device), load_vae(checkpoint).to(device)
    channels_last(fast)
    image_encoder = ImageEncoder.load(checkpoint, device)
    audio_encoder = AudioEncoder.load(checkpoint / WAV2VEC_DIRECTORY, device)
    text_encoder = TextEncoder.load(checkpoint)
    frames = RELEASED_CLOCK.video_frames(blocks - 1).stop

    def of_person(person: int) -> list[Tensor]:
        picture = draw(identity(person), torch.zeros(1, len(COLUMNS)))[0] * 2 - 1
        y = encode_person(vae, picture.to(device)).half().cpu()
        return [y, image_encoder.encode(picture[None].to(device))[0].cpu()]

    def picture_of_clip(index: int) -> list[Tensor]:
        video = clips[index].frames(0, frames).movedim(0, 1)[None] * 2 - 1
        video = video.to(device).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(torch.device(device).type, torch.bfloat16):  # 1 % of noise
            return [fast.encode(video)[0].half().cpu()]

    def sound_of_clip(index: int) -> list[Tensor]:
        speech = torch.from_numpy(clips.speech[index])
        return streamed_features(audio_encoder, speech, blocks)

    people = sorted({int(clips.people[i]) for i in chosen})
    persons = [_kept(seen / f"person_{who}.pt", of_person, who) for who in people]
    encoded = []
    for count, i in enumerate(chosen):
        looks = _digest(clips.people[i].tobytes(), clips.motion[i].tobytes())
        sounds = _digest(clips.speech[i].tobytes())
        encoded.append(
            _kept(seen / f"clip_{looks}.pt", picture_of_clip, i)
            + _kept(heard / f"clip_{sounds}.pt", sound_of_clip, i)
        )
        if count % 20 == 19:
            print(f"encoded {count + 1} of {len(chosen)} clips", flush=True)
    latents, *audio = (torch.stack(some) for some in zip(*encoded, strict=True))
    return Examples(
        latents=latents,
        audio=audio,
        person=torch.tensor([people.index(int(clips.people[i])) for i in chosen]),
        prompt=torch.from_numpy(clips.prompts[chosen, :blocks]).long(),
        y=torch.stack([y for y, _ in persons]),
        image=torch.stack([image for _, image in persons]),
        text=[text_encoder.encode(p, DIT_CONFIG["text_len"]) for p in PROMPTS],
    )


def _stamp(blocks: int, checkpoint: Path, *files: str) -> str:
    """What encoded clips depend on besides the clip, but for the code."""
    return _digest(f"{blocks} blocks".encode(), *((checkpoint / f).read_bytes() for f in files))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _kept(path: Path, make: Callable[[int], list[Tensor]], number: int) -> list[Tensor]:
    """The tensors in a file, which are made if there is none."""
    if path.exists():
        return list(torch.load(path, weights_only=True))
    made = make(number)
    partial = path.with_suffix(".partial")
    torch.save(made, partial)
    partial.replace(path)
    return made


__all__ = [
    "Examples",
    "encode_clips",
    "encode_person",
    "load_vae",
    "streamed_features",
    "windows_of",
]
