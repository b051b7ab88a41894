"""Trains the video autoencoder on clips of the family.

Pictures first, which from the inflated initialisation is as good as clips and several times as
fast; then clips, with a fresh optimiser and a lower rate: the taps for past frames never had a
gradient before, and a warm optimiser would move all of them at once. Half of the crops are around
the mouth, where motion is, the others anywhere. The loss is L1, with
more weight where a frame differs from the one before, plus the differences between neighbouring
pixels (edges) and a weak pull of the latents to zero; noise on the latents makes the decoder
tolerate what a sampler gets wrong.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reference import VAE
from training.data.clips import Clips
from training.data.portrait import mouth_geometry
from training.optimiser import Muon, split
from training.run import Run, learning_rate
from training.vae.model import SMALL, inflated, raw_decode, raw_moments


@dataclass(frozen=True)
class VaeSettings:
    """How the autoencoder is trained.

    crop: side of the training crops, in pixels. polish: the latents are normalised already and stay
    what they are, so that what was trained on them stays valid; only the decoder learns.
    """

    seed: int = 0
    steps: int = 1000
    batch: int = 8
    frames: int = 1
    crop: int = 64
    rate: float = 2e-3
    warmup: int = 50
    latent_noise: float = 0.1
    motion_weight: float = 3.0
    edge_weight: float = 0.5
    latent_pull: float = 1e-4
    polish: bool = False


PICTURES = VaeSettings()
CLIPS = VaeSettings(steps=800, batch=2, frames=17, rate=1e-3, warmup=60)
POLISH = VaeSettings(steps=2000, batch=2, frames=17, rate=1e-3, latent_noise=0.05, polish=True)


class Pool:
    """Pictures of many clips, held as bytes, one of them replaced at every fourth draw or so."""

    def __init__(self, clips: Clips, size: int, frames: int, seed: int) -> None:
        self._clips, self._frames = clips, frames
        self._generator = torch.Generator().manual_seed(seed)
        self.pictures = torch.zeros(size, 3, frames, 128, 128, dtype=torch.uint8)
        self.mouths = torch.zeros(size, 2)  # x, y of the middle, -1 to 1
        for slot in range(size):
            self._fill(slot)

    def _integer(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self._generator))

    def _fill(self, slot: int) -> None:
        clip = self._clips[self._integer(len(self._clips))]
        start = self._integer(len(clip.motion) - self._frames + 1)
        pictures = clip.frames(start, start + self._frames)
        self.pictures[slot] = (pictures * 255).round().byte().transpose(0, 1)
        mouth = mouth_geometry(clip.identity, torch.from_numpy(clip.motion[start : start + 1]))
        self.mouths[slot] = torch.stack([mouth.x[0], mouth.y[0]])

    def draw(self, batch: int, frames: int, crop: int) -> Tensor:
        """[batch, 3, frames, crop, crop] in [-1, 1]."""
        if self._integer(4) == 0:
            self._fill(self._integer(len(self.pictures)))
        out = []
        for _ in range(batch):
            slot = self._integer(len(self.pictures))
            first = self._integer(self._frames - frames + 1)
            top, left = self._corner(slot, crop)
            part = self.pictures[slot, :, first : first + frames]
            out.append(part[:, :, top : top + crop, left : left + crop])
        return torch.stack(out).float() / 127.5 - 1

    def _corner(self, slot: int, crop: int) -> tuple[int, int]:
        """Anywhere, or so that the mouth is inside."""
        free = 128 - crop
        if free == 0:
            return 0, 0
        if self._integer(2):
            return self._integer(free + 1), self._integer(free + 1)
        x, y = ((self.mouths[slot] + 1) * 64).long().tolist()
        jitter = crop // 4
        top = y - crop // 2 + self._integer(2 * jitter + 1) - jitter
        left = x - crop // 2 + self._integer(2 * jitter + 1) - jitter
        return min(max(top, 0), free), min(max(left, 0), free)


def vae_loss(vae: VAE, video: Tensor, settings: VaeSettings) -> tuple[Tensor, dict[str, float]]:
    """The training loss of clips [B, 3, T, H, W], and its parts."""
    with torch.autocast(video.device.type, torch.bfloat16):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not settings.polish):
            mean = vae.encode(video) if settings.polish else raw_moments(vae, video)
        noisy = mean + settings.latent_noise * torch.randn_like(mean)
        made = vae.decode(noisy) if settings.polish else raw_decode(vae, noisy)
    made, mean = made.float(), mean.float()
    error = (made - video).abs()
    change = torch.zeros_like(video[:, :1])
    change[:, :, 1:] = video.diff(dim=2).abs().amax(1, keepdim=True)
    weight = 1 + settings.motion_weight * (change > 0.1)
    pixel = (error * weight).mean()
    edges = sum((made.diff(dim=d) - video.diff(dim=d)).abs().mean() for d in (3, 4))
    pull = mean.square().mean()
    loss = pixel + settings.edge_weight * edges + settings.latent_pull * pull
    mse = float((made.clamp(-1, 1) - video).square().mean().detach()) / 4
    return loss, {
        "loss": float(loss.detach()),
        "psnr": psnr(mse),
        "latent": float(pull.detach()) ** 0.5,
    }


def psnr(mse: float) -> float:
    """In dB, of pictures from 0 to 1."""
    return -10 * float(torch.tensor(max(mse, 1e-10)).log10())


def channels_last(module: nn.Module) -> None:
    """Lays the weights of convolutions out as bf16 convolutions on a CPU want them."""
    for part in module.modules():
        if isinstance(part, nn.Conv3d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)


def train_vae(
    clips: Clips,
    directory: Path,
    settings: VaeSettings,
    *,
    start: VAE | None = None,
    pool: int = 96,
    stop_at: float = math.inf,
    device: str = "cpu",
) -> VAE:
    """Trains, or goes on training, to `settings.steps` or the time `stop_at` (of `time.time`);
    returns the averaged autoencoder.

    start: what a fresh training begins from and changes; None: an inflated initialisation.
    """
    vae = inflated(SMALL, settings.seed) if start is None else start
    channels_last(vae.to(device))
    if settings.polish:
        vae.encoder.requires_grad_(False)
        vae.conv1.requires_grad_(False)
    optimiser = Muon(*split(vae, lambda _: True), weight_decay=1e-3)
    run = Run(directory, vae, optimiser, asdict(settings), decay=0.99)
    if run.step < settings.steps:
        pictures = Pool(clips, pool, max(33, settings.frames), settings.seed + run.step)
    while run.step < settings.steps and time.time() < stop_at:
        run.set_rate(learning_rate(run.step, settings.rate, settings.warmup, settings.steps))
        video = pictures.draw(settings.batch, settings.frames, settings.crop)
        video = video.to(device).contiguous(memory_format=torch.channels_last_3d)
        loss, parts = vae_loss(vae, video, settings)
        norm = run.stepped(loss)
        if run.step % 20 == 0 or run.step == settings.steps:
            run.report(**parts, gradient=norm)
    run.save()
    run.average.copy_to(vae)
    return vae.cpu()
