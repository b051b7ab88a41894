"""A small SyncNet: do sound and mouth belong together? Trained on drawn clips.

Two networks map 0.25 s of sound and the five pictures of the mouth of that time to vectors, near
one another where they belong together (Chung and Zisserman, "Out of time", 2016). Unlike the
geometry of `measure` it does not know which mouth is right, only which one goes with which sound.
As there, a film is scored at offsets of up to 15 frames: distance is the mean distance of the
vectors at the best offset (Sync-D, lower is better), confidence what the median of the distances
at all offsets is above that (Sync-C, higher is better).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from training.data.clips import Clip, Clips
from training.data.identity import Identity
from training.measure import around_mouth
from training.run import Run, learning_rate

FRAMES = 5  # pictures of a window, and features of its sound
REACH = 15  # frames of offset that a film is scored at
SIDE = 32  # pixels of a mouth
WEIGHTS = Path(__file__).resolve().parent / "syncnet.safetensors"
_FFT, _HOP, _BANDS = 512, 160, 40


@dataclass(frozen=True)
class SyncSettings:
    """How it is trained. pool: clips, whose pictures are drawn beforehand. windows: of each clip of
    a step; wrong pairs are of other times and clips. blur: pixels, as much as autoencoders blur;
    half of the clips are sharp."""

    seed: int = 0
    steps: int = 600
    pool: int = 48
    clips: int = 8
    windows: int = 24
    rate: float = 2e-3
    warmup: int = 30
    blur: int = 3


@dataclass(frozen=True)
class SyncScore:
    """offset: frames by which the picture is late where the distance is least."""

    confidence: float
    distance: float
    offset: int


class SyncNet(nn.Module):
    """Vectors of 64 numbers and length 1, for windows of sound and of mouths."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Sequential(
            *(nn.Conv1d(_BANDS, 96, 5, padding=2), nn.GELU()),
            *(nn.Conv1d(96, 96, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv1d(96, 96, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Flatten(), nn.Linear(96 * 5, 64)),
        )
        self.mouth = nn.Sequential(
            *(nn.Conv2d(FRAMES, 32, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU()),
            *(nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 2, 64)),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, sound: Tensor, mouths: Tensor) -> tuple[Tensor, Tensor]:
        """Bands [N, 40, 20] and mouths [N, 5, 32, 32] -> two times [N, 64]."""
        heard, seen = self.sound(sound), self.mouth(mouths)
        return F.normalize(heard, dim=1), F.normalize(seen, dim=1)


def bands(speech: Tensor) -> Tensor:
    """Sound [640 * T] at 16 kHz in the encoder's tempo -> log energies [40, 4 * T], of mean 0."""
    padded = F.pad(speech, ((_FFT - _HOP) // 2, (_FFT - _HOP) // 2))
    spectrum = torch.stft(
        padded, _FFT, _HOP, window=torch.hann_window(_FFT), center=False, return_complex=True
    )
    energy = spectrum.abs().square()  # [257, frames]
    edges = torch.logspace(0.6, 2.4, _BANDS + 1)  # bins 4 to 251: 125 Hz to 7.8 kHz
    bins = torch.arange(len(energy))
    inside = (bins >= edges[:-1, None].floor()) & (bins <= edges[1:, None])
    weights = inside.float() / inside.sum(1, keepdim=True)
    log = (weights @ energy + 1e-6 * energy.mean() + 1e-10).log()
    return (log - log.mean(1, keepdim=True)) / 3


def mouths_of(person: Identity, pictures: Tensor) -> Tensor:
    """Pictures [T, 3, S, S], 0 to 1 -> their mouths in grey, [T, 32, 32], of mean 0."""
    grey = pictures[around_mouth(person, pictures.shape[-1])].mean(1, keepdim=True)
    small = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[:, 0]
    return (small - small.mean((1, 2), keepdim=True)) * 4


def windows_at(sound: Tensor, mouths: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Of bands [40, 4 * T] and mouths [T, 32, 32], the windows that begin at frames `starts`."""
    columns = 4 * starts[:, None] + torch.arange(4 * FRAMES)
    frames = starts[:, None] + torch.arange(FRAMES)
    return sound[:, columns].transpose(0, 1), mouths[frames]


def train_sync(clips: Clips, directory: Path, settings: SyncSettings) -> SyncNet:
    """Trains, or goes on training, to `settings.steps`; returns the averaged network."""
    torch.manual_seed(settings.seed)
    net = SyncNet()
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    run = Run(directory, net, optimiser, asdict(settings), decay=0.98)
    generator = torch.Generator().manual_seed(settings.seed + 7919 * run.step)
    if run.step < settings.steps:
        pool = [_drawn(clips[i], settings.blur) for i in range(min(settings.pool, len(clips)))]
    while run.step < settings.steps:
        run.set_rate(learning_rate(run.step, settings.rate, settings.warmup, settings.steps))
        sounds, mouths = [], []
        for index in torch.randint(len(pool), (settings.clips,), generator=generator):
            sound, versions = pool[int(index)]
            seen = versions[int(torch.randint(len(versions), (), generator=generator))]
            count = len(seen) - FRAMES + 1
            starts = torch.randperm(count, generator=generator)[: settings.windows]
            pair = windows_at(sound, seen, starts)
            sounds.append(pair[0])
            mouths.append(pair[1])
        heard, seen = net(torch.cat(sounds), torch.cat(mouths))
        likeness = net.log_scale.exp() * heard @ seen.T
        own = torch.arange(len(likeness))
        loss = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
        norm = run.stepped(loss)
        if run.step % 50 == 0 or run.step == settings.steps:
            found = float((likeness.argmax(1) == own).float().mean())
            run.report(loss=float(loss.detach()), found=found, gradient=norm)
    run.save()
    run.average.copy_to(net)
    return net.eval()


def load_sync(path: Path = WEIGHTS) -> SyncNet:
    """The network that comes along."""
    net = SyncNet()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return net.eval()


def _drawn(clip: Clip, blur: int) -> tuple[Tensor, list[Tensor]]:
    """The bands of a clip, and its mouths: sharp, and blurred."""
    pictures = clip.frames()
    blurred = F.avg_pool2d(pictures, blur, 1, blur // 2)
    mouths = [mouths_of(clip.identity, version) for version in (pictures, blurred)]
    return bands(torch.from_numpy(clip.speech)), mouths


@torch.no_grad()
def score(net: SyncNet, person: Identity, speech: Tensor, pictures: Tensor) -> SyncScore:
    """Of a film: sound [640 * T] at 16 kHz in the encoder's tempo, pictures [T, 3, S, S]."""
    count = len(pictures) - FRAMES + 1
    given = windows_at(bands(speech), mouths_of(person, pictures), torch.arange(count))
    heard, seen = net(*given)
    distances = {}
    for offset in range(-REACH, REACH + 1):
        late = seen[max(offset, 0) : count + min(offset, 0)]
        said = heard[max(-offset, 0) : count + min(-offset, 0)]
        distances[offset] = float((late - said).norm(dim=1).mean())
    best = min(distances, key=lambda offset: distances[offset])
    median = float(torch.tensor(list(distances.values())).median())
    return SyncScore(median - distances[best], distances[best], best)


def drawn_score(net: SyncNet, clips: Clips, index: int) -> SyncScore:
    """Of a drawn clip: what a film can reach."""
    clip = clips[index]
    return score(net, clip.identity, torch.from_numpy(clip.speech), clip.frames())
