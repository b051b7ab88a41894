"""`python -m training STAGE`: trains a small model; every stage resumes after a kill."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training import stages
from training.dit.train import DitSettings
from training.speech.train import SpeechSettings
from training.vae.train import CLIPS, POLISH


def main() -> None:
    """Reads the command line and runs one stage."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/training"), help="%(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch; %(default)s")
    parser.add_argument("--device", default="cpu", help="of networks that learn; %(default)s")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    data = commands.add_parser("data", help="speech and motion of clips")
    data.add_argument("--clips", type=int, default=1500, help="%(default)s")
    data.add_argument(
        "--flite",
        type=float,
        default=0.0,
        help="share of English clips with voices of recorded people, by the program flite",
    )
    data.add_argument(
        "--recordings",
        type=Path,
        help="folder with speakers, their sounds and texts; see training/data/people.py",
    )
    portrait = commands.add_parser("portrait", help="draw a member of the family")
    portrait.add_argument("--seed", type=int, required=True)
    portrait.add_argument("--size", type=int, default=768, help="pixels; %(default)s")
    portrait.add_argument("--out", type=Path, default=Path("portrait.png"), help="%(default)s")
    vae = commands.add_parser("vae", help="train the autoencoder: pictures, then clips")
    vae.add_argument("--steps", type=int, default=CLIPS.steps, help="of clips; %(default)s")
    speech = commands.add_parser("speech", help="train the speech encoder")
    speech.add_argument("--steps", type=int, default=SpeechSettings.steps, help="%(default)s")
    encode = commands.add_parser("encode", help="write the encoders, make latents with them")
    encode.add_argument("--clips", type=int, default=300, help="%(default)s")
    encode.add_argument("--blocks", type=int, default=3, help="of a clip; %(default)s")
    dit = commands.add_parser("dit", help="train the DiT and write it")
    dit.add_argument("--steps", type=int, default=DitSettings.steps, help="%(default)s")
    dit.add_argument("--batch", type=int, default=DitSettings.batch, help="%(default)s")
    dit.add_argument("--rate", type=float, default=DitSettings.rate, help="%(default)s")
    dit.add_argument("--on-policy", action="store_true", help="the whole sampler, to finish with")
    commands.add_parser("sync", help="train the scorer that the quality benchmark uses")
    forcing = commands.add_parser("forcing", help="compare Neighbor Forcing with three others")
    forcing.add_argument("--seconds", type=float, default=240.0, help="of CPU, each; %(default)s")
    distill = commands.add_parser("distill", help="compare DMD with regression, small")
    distill.add_argument("--seconds", type=float, default=240.0, help="of CPU, each; %(default)s")
    polish = commands.add_parser("polish", help="train the decoder on; latents stay as they are")
    polish.add_argument("--steps", type=int, default=POLISH.steps, help="%(default)s")
    for stage in (vae, speech, dit, polish):
        stage.add_argument("--minutes", type=float, default=1e6, help="stop and write after these")
    export = commands.add_parser("export", help="copy the checkpoint")
    export.add_argument("--out", type=Path, default=Path("examples/talker"), help="%(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _run(arguments)


def _run(a: argparse.Namespace) -> None:
    if a.stage == "data":
        stages.make_data(a.work, a.clips, a.flite, a.recordings)
    elif a.stage == "portrait":
        stages.write_portrait(a.seed, a.out, a.size)
    elif a.stage == "vae":
        stages.train_autoencoder(a.work, a.steps, a.minutes, a.device)
    elif a.stage == "speech":
        settings = SpeechSettings(steps=a.steps)
        print(stages.train_encoder(a.work, settings, a.minutes, a.device))
    elif a.stage == "encode":
        stages.export_encoders(a.work)
        stages.encode(a.work, a.clips, a.blocks, a.device)
    elif a.stage == "dit":
        dit = DitSettings(steps=a.steps, batch=a.batch, rate=a.rate, on_policy=a.on_policy)
        stages.train_transformer(a.work, dit, a.minutes, a.device)
    elif a.stage == "sync":
        stages.train_scorer(a.work)
    elif a.stage == "forcing":
        stages.compare_forcing(a.work, a.seconds)
    elif a.stage == "distill":
        stages.compare_distillation(a.work, a.seconds)
    elif a.stage == "polish":
        stages.polish(a.work, a.steps, a.minutes, a.device)
    elif a.stage == "export":
        stages.export(a.work, a.out)


if __name__ == "__main__":
    main()
