"""The order of the work: data, autoencoder, speech encoder, latents, DiT, export.

Every stage reads what the ones before left in one directory, and goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from liveact.commands.serve import PROMPTS_FILE
from reference import VAE
from training.checkpoint import rounded, write_dit, write_encoders, write_vae
from training.data.clips import HELD_OUT, Clips, make_clips
from training.data.expressions import WORDINGS
from training.data.identity import identity
from training.data.motion import COLUMNS
from training.data.people import read_people
from training.data.portrait import draw
from training.dit import distill as distillation
from training.dit.examples import Examples, encode_clips, load_vae
from training.dit.forcing import ForcingSettings, compare
from training.dit.train import DitSettings, train_dit
from training.run import plot
from training.speech.model import SpeechEncoder
from training.speech.train import SpeechSettings, correlations, train_speech
from training.sync import WEIGHTS, SyncSettings, drawn_score, train_sync
from training.vae.model import SMALL, fold_normalisation, inflated, raw_moments
from training.vae.train import CLIPS, PICTURES, POLISH, train_vae

FRAMES = 149  # of a clip: five blocks and 7.45 s
PEOPLE = 160
RECORDED = HELD_OUT // 2  # the first number of clips of recorded people
TRAINED_ON = 80  # the people whose clips the DiT sees


def make_data(work: Path, count: int, flite: float, recordings: Path | None) -> None:
    """`clips.npz` to train on and `held.npz` with other voices and people. flite: the share of
    English clips with its voices. recordings: a folder for `read_people`, of which `recorded.npz`
    is made, as many clips as half of the others."""
    work.mkdir(parents=True, exist_ok=True)
    for name, first, number, people in (
        ("clips", 0, count, PEOPLE),
        ("held", HELD_OUT, max(4, count // 25), 40),
    ):
        if not (work / f"{name}.npz").exists():
            make_clips(first, number, FRAMES, people, flite).save(work / f"{name}.npz")
    if recordings and not (work / "recorded.npz").exists():
        speakers = read_people(recordings, work / "aligned")
        spoken = make_clips(RECORDED, count // 2, FRAMES, PEOPLE, recorded=speakers)
        spoken.save(work / "recorded.npz")


def clips_to_hear(work: Path) -> Clips:
    """The clips to train on, and those of recorded people where there are some."""
    clips = Clips.load(work / "clips.npz")
    recorded = work / "recorded.npz"
    return clips.with_more(Clips.load(recorded)) if recorded.exists() else clips


def write_portrait(seed: int, path: Path, size: int) -> None:
    """The portrait of one member of the family, at rest."""
    picture = draw(identity(seed), torch.zeros(1, len(COLUMNS)), size)[0]
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(
        path, optimize=True
    )


def train_autoencoder(work: Path, steps: int, minutes: float, device: str) -> None:
    """Pictures, for at most a third of the time, then `steps` steps of clips."""
    begin = time.time()
    clips = Clips.load(work / "clips.npz")
    first, then = PICTURES, replace(CLIPS, steps=steps)
    ends = begin + 20 * minutes, begin + 60 * minutes
    vae = train_vae(clips, work / "vae_pictures", first, stop_at=ends[0], device=device)
    train_vae(clips, work / "vae_clips", then, start=vae, stop_at=ends[1], device=device)
    for name in ("vae_pictures", "vae_clips"):
        plot(work / name / "log.jsonl", work / name / "curves.png")


def train_encoder(
    work: Path, settings: SpeechSettings, minutes: float, device: str
) -> dict[str, float]:
    """The speech encoder; returns its correlations on held-out voices."""
    stop_at = time.time() + 60 * minutes
    held = Clips.load(work / "held.npz")
    clips = clips_to_hear(work)
    trainer = train_speech(clips, held, work / "speech", settings, stop_at=stop_at, device=device)
    plot(work / "speech" / "log.jsonl", work / "speech" / "curves.png")
    return correlations(trainer, held)


def averaged_vae(work: Path) -> VAE:
    """The trained autoencoder, from the last save of its stage."""
    vae = inflated(SMALL, 0)
    state = torch.load(work / "vae_clips" / "state.pt", weights_only=True)
    vae.load_state_dict(state["average"], strict=False)
    return vae.eval()


@torch.no_grad()
def export_encoders(work: Path) -> Path:
    """`checkpoint/` with everything but the DiT; the latents of the VAE are normalised."""
    vae = averaged_vae(work)
    clips = Clips.load(work / "clips.npz")
    raw = torch.cat(
        [
            raw_moments(vae, clips[i].frames(0, 33).movedim(0, 1)[None] * 2 - 1).flatten(2)
            for i in range(min(24, len(clips)))
        ],
        dim=2,
    )
    fold_normalisation(vae, raw.mean((0, 2)), raw.std((0, 2)))
    speech = SpeechEncoder()
    state = torch.load(work / "speech" / "state.pt", weights_only=True)["average"]
    own = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    speech.load_state_dict(own)
    write_encoders(work / "checkpoint", vae.state_dict(), speech.state_dict())
    return work / "checkpoint"


def polish(work: Path, steps: int, minutes: float, device: str) -> None:
    """Trains the decoder of the checkpoint on, with its latents as they are."""
    vae = load_vae(work / "checkpoint")
    stop_at = time.time() + 60 * minutes
    clips = Clips.load(work / "clips.npz")
    settings = replace(POLISH, steps=steps)
    vae = train_vae(clips, work / "vae_polish", settings, start=vae, stop_at=stop_at, device=device)
    write_vae(work / "checkpoint", vae.state_dict())
    plot(work / "vae_polish" / "log.jsonl", work / "vae_polish" / "curves.png")


def encode(work: Path, count: int, blocks: int, device: str) -> None:
    """`examples.pt`: latents and conditioning of `count` clips of the first `TRAINED_ON` people,
    those with recorded voices at the end."""
    clips = clips_to_hear(work)
    chosen = [i for i in range(len(clips)) if clips.people[i] < TRAINED_ON][:count]
    examples = encode_clips(clips, chosen, work / "checkpoint", blocks, work / "encoded", device)
    examples.save(work / "examples.pt")


def train_transformer(work: Path, settings: DitSettings, minutes: float, device: str) -> None:
    """The DiT, for some minutes or to the end; then its weights beside the encoders'."""
    examples = Examples.load(work / "examples.pt")
    stop_at = time.time() + 60 * minutes
    dit = train_dit(examples, work / "dit", settings, stop_at=stop_at, device=device)
    write_dit(work / "checkpoint", dit.state_dict())
    plot(work / "dit" / "log.jsonl", work / "dit" / "curves.png")


def compare_forcing(work: Path, seconds: float) -> None:
    """`forcing.json`: a line for each way of forcing and quarter of the time."""
    examples = Examples.load(work / "examples.pt")
    lines = compare(examples, ForcingSettings(seconds=seconds))
    (work / "forcing.json").write_text(json.dumps(lines, indent=1) + "\n")


def compare_distillation(work: Path, seconds: float) -> None:
    """`distill.json`: a line for the teacher and for each of its students."""
    examples = Examples.load(work / "examples.pt")
    settings = distillation.DistillSettings(teacher_s=seconds, student_s=seconds)
    lines = distillation.compare(examples, settings)
    (work / "distill.json").write_text(json.dumps(lines, indent=1) + "\n")


def train_scorer(work: Path) -> None:
    """The sync scorer that the benchmark of quality reads, and its scores of held-out drawings."""
    held = Clips.load(work / "held.npz")
    net = train_sync(Clips.load(work / "clips.npz"), work / "sync", SyncSettings())
    save_file(rounded(net.state_dict()), WEIGHTS)
    for index in range(4):
        print(drawn_score(net, held, index))


def export(work: Path, target: Path) -> None:
    """Copies the checkpoint, with the prompts that a page may offer; what was there is replaced."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(work / "checkpoint", target)
    prompts = {expression: wordings[0] for expression, wordings in WORDINGS.items()}
    (target / PROMPTS_FILE).write_text(json.dumps(prompts, indent=2) + "\n")
