"""Tiny problems with a known result, in seconds; a training that is killed goes on."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import liveact
from liveact.blocks import RELEASED_CLOCK
from reference import DiT
from tests.support.paths import REPOSITORY
from training.checkpoint import AUDIO_DIM, DIT_CONFIG, IMAGE_DIM
from training.data.clips import HELD_OUT, Clips, make_clips
from training.data.espeak import Voice
from training.data.expressions import EXPRESSIONS
from training.data.identity import identity
from training.data.motion import COLUMNS, motion_of
from training.data.portrait import draw
from training.dit import distill
from training.dit.distill import DistillSettings, compare, dmd_loss, sampled
from training.dit.examples import Examples
from training.dit.forcing import WAYS, ForcingSettings, forced_loss, train_way
from training.dit.train import (
    MEMORY_GAIN,
    DitSettings,
    denoise_at,
    draw_batch,
    evaluate,
    fresh_dit,
    motion_weights,
    noised,
    rollout,
    train_dit,
)
from training.films import film, spoken
from training.measure import (
    expression_errors,
    mouth_openings,
    shown_expressions,
    synchronisation,
)
from training.optimiser import Muon, orthogonalised, split
from training.run import Run, learning_rate, plot, read_log
from training.speech.train import SpeechSettings, train_speech
from training.stages import FRAMES
from training.sync import SyncSettings, bands, score, train_sync, windows_at
from training.vae.model import SMALL, inflated
from training.vae.train import POLISH, VaeSettings, train_vae

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = DIT_CONFIG | {"dim": 32, "ffn_dim": 64, "num_heads": 1, "num_layers": 2}


@pytest.fixture(scope="module")
def clips() -> Clips:
    return make_clips(0, 6, 40, people=3)


# ------------------------------------------------------------------------------ runs


def small_run(directory: Path, steps: int, **settings: float) -> tuple[Run, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    run = Run(directory, model, Muon(*split(model, lambda _: True)), {"seed": 1, **settings})
    while run.step < steps:
        run.set_rate(0.01)
        generator = torch.Generator().manual_seed(run.step)
        run.stepped(model(torch.randn(8, 3, generator=generator)).square().mean())
        run.report(loss=1.0)
    return run, model


def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    run, _ = small_run(tmp_path / "cut", 5)
    run.save()
    small_run(tmp_path / "cut", 8)  # killed: three steps that were never saved
    _, again = small_run(tmp_path / "cut", 10)
    _, whole = small_run(tmp_path / "whole", 10)
    torch.testing.assert_close(again.weight, whole.weight, rtol=0, atol=0)
    logged = read_log(tmp_path / "cut" / "log.jsonl")
    assert [entry["step"] for entry in logged] == list(range(1, 11))
    plot(tmp_path / "cut" / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_run_refuses_the_state_of_another(tmp_path: Path) -> None:
    small_run(tmp_path, 2, rate=1.0)[0].save()
    with pytest.raises(ValueError, match=r"state\.pt: expected .*'rate': 2\.0.*found .*1\.0"):
        small_run(tmp_path, 2, rate=2.0)


def test_a_step_without_a_finite_gradient_is_left_out(tmp_path: Path) -> None:
    run, model = small_run(tmp_path, 1)
    before = model.weight.clone()
    run.stepped((model.weight * float("nan")).sum())
    assert torch.equal(model.weight, before) and run.step == 2


def test_the_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 1.0, 10, 100) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.05) and sorted(rates[10:], reverse=True) == rates[10:]


# ------------------------------------------------------------------------------ optimiser


@pytest.mark.parametrize("shape", [(8, 8), (4, 30), (30, 4)])
def test_updates_are_about_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.cosine_similarity((u @ v).flatten(), orthogonalised(matrix).flatten(), dim=0)
    assert float(cosine) > 0.95


def test_both_halves_of_the_optimiser_learn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimiser = Muon(*split(model, lambda name: name.startswith("0")))
    assert [len(group["params"]) for group in optimiser.param_groups] == [1, 3]
    x = torch.randn(256, 6)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    for step in range(400):
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * (1 - step / 400)
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.05 * float(y.var())


# ------------------------------------------------------------------------------ networks


@pytest.mark.slow
def test_the_autoencoder_learns_three_people(clips: Clips, tmp_path: Path) -> None:
    settings = VaeSettings(steps=40, batch=4, crop=32, warmup=10)
    train_vae(clips, tmp_path, settings, pool=6)
    # The mean colour is 12 dB; that is where torch's own initialisation stays.
    assert max(entry["psnr"] for entry in read_log(tmp_path / "log.jsonl")) > 15


def test_polishing_leaves_the_latents_as_they_are(clips: Clips, tmp_path: Path) -> None:
    vae = inflated(SMALL, 0)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    settings = replace(POLISH, steps=2, batch=1, frames=5, crop=32, warmup=1)
    polished = train_vae(clips, tmp_path, settings, start=vae, pool=2)
    changed = {
        n for n, tensor in polished.state_dict().items() if not torch.equal(tensor, before[n])
    }
    assert changed and not any(name.startswith(("encoder.", "conv1.")) for name in changed)


def test_the_speech_encoder_learns_when_mouths_open(clips: Clips, tmp_path: Path) -> None:
    settings = SpeechSettings(steps=60, batch=4, warmup=10)
    train_speech(clips, clips, tmp_path, settings)
    assert read_log(tmp_path / "log.jsonl")[-1]["opening"] > 0.5


def talking_noise(count: int, blocks: int, side: int) -> Examples:
    """Examples whose latents are a portrait of noise, brighter by what is heard."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    frames = sum(RELEASED_CLOCK.latent_frames(b) for b in range(blocks))
    heard = normal(count, 4 * frames + 8)
    audio = [
        heard[:, RELEASED_CLOCK.features(b).start + 2 : RELEASED_CLOCK.features(b).stop + 2]
        for b in range(blocks)
    ]
    y = normal(2, 20, 14, side, side)
    y[:, 4:, 1:] = 0
    person = torch.arange(count) % 2
    latents = y[person, 4:, :1].repeat(1, 1, frames, 1, 1)
    # Latent frame j hears features 4j - 5 to 4j + 2; the middle of them is 4j - 1.
    loud = torch.stack([heard[:, 4 * j - 1 + 2] for j in range(1, frames)], dim=1)
    latents[:, :4, 1:] += 2 * loud[:, None, :, None, None]
    return Examples(
        latents=latents.half(),
        audio=[rows[..., None, None].expand(*rows.shape, 3, AUDIO_DIM // 3) for rows in audio],
        person=person,
        prompt=torch.zeros(count, blocks, dtype=torch.long),
        y=y.half(),
        image=normal(2, 5, IMAGE_DIM),
        text=[normal(4, 64)],
    )


def with_layers(seed: int) -> DiT:
    """A DiT whose layers do something before any training."""
    dit = fresh_dit(seed, TINY)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if name.endswith(("attn.o.weight", "attn.proj.weight", "ffn.2.weight")):
                parameter.normal_(0, 0.05, generator=generator)
    return dit


def test_the_loss_weights_motion_and_keeps_its_mean() -> None:
    batch = draw_batch(talking_noise(2, 2, 4), torch.arange(2), 2)
    weights = torch.cat(motion_weights(batch, 4.0), dim=2)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    still = draw_batch(talking_noise(2, 2, 4), torch.arange(2), 2)
    for latent in still.latents:
        latent.zero_()
    torch.testing.assert_close(motion_weights(still, 4.0)[0], torch.ones(2, 1, 6, 4, 4))


def test_gradients_reach_the_taps_of_the_memory() -> None:
    dit = with_layers(0)
    batch = draw_batch(talking_noise(1, 3, 2), torch.arange(1), 3)
    losses = dict(rollout(dit, batch, DitSettings(precision="float32"), (1, 2)))
    assert list(losses) == [1, 2] and losses[1].requires_grad
    assert list(dict(rollout(dit, batch, DitSettings(precision="float32"), (1,)))) == [1]
    losses[2].backward()
    taps = dit.blocks[0].self_attn.memory_proj_k.weight.grad  # type: ignore[union-attr]
    assert isinstance(taps, Tensor) and float(taps.abs().max()) > 0


@pytest.mark.slow
def test_the_filters_of_the_memory_cannot_make_it_grow(tmp_path: Path) -> None:
    settings = DitSettings(steps=4, batch=1, blocks=3, rate=0.5, warmup=1)
    dit = train_dit(talking_noise(24, 3, 2), tmp_path, settings, config=TINY)
    filters = [p for name, p in dit.named_parameters() if "memory_proj_k" in name]
    gains = torch.stack([taps.detach().abs().sum(dim=-1) for taps in filters])
    assert len(filters) == TINY["num_layers"]
    assert gains.max() <= MEMORY_GAIN * (1 + 1e-6) and gains.min() < 0.9 * MEMORY_GAIN
    assert filters[0].bfloat16().double().abs().sum(dim=-1).max() <= 1


@pytest.mark.slow
def test_the_dit_learns_to_hear(tmp_path: Path) -> None:
    examples = talking_noise(24, 2, 2)
    settings = DitSettings(steps=120, batch=8, blocks=2, rate=1e-2, warmup=10)
    dit = train_dit(examples, tmp_path, settings, config=TINY)
    held = draw_batch(examples, torch.arange(4), 2)
    found = evaluate(dit, held, settings)
    assert found["held"] < 0.4 * found["deaf"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_forcing_learns(way: str) -> None:
    """Zeros have an error of 2: half of it is the portrait, the other half what is heard."""
    settings = ForcingSettings(seconds=60, batch=4, rate=1e-2, warmup=5, reports=1)
    ticks = itertools.count()  # a step lasts one of them, however fast the machine is
    examples = talking_noise(16, 3, 2)
    (line,) = train_way(way, examples, settings, TINY, clock=lambda: float(next(ticks)))
    assert line["steps"] == 60 and max(line[f"block_{b}"] for b in range(3)) < 1.5


def test_a_step_of_each_way_has_gradients_in_every_layer() -> None:
    dit = with_layers(0)
    batch = draw_batch(talking_noise(1, 3, 2), torch.arange(1), 3)
    for way in WAYS:
        dit.zero_grad()
        forced_loss(dit, batch, way, 2).backward()
        for layer in dit.blocks:
            gradient = layer.self_attn.k.weight.grad
            assert isinstance(gradient, Tensor) and float(gradient.abs().max()) > 0, way


def test_a_student_that_cannot_be_told_from_its_teacher_is_left_alone() -> None:
    """Where the third network says what the teacher says there is nothing to move."""
    student, teacher = with_layers(0), with_layers(1)
    batch = draw_batch(talking_noise(1, 3, 2), torch.arange(1), 3)
    assert float(dmd_loss(student, teacher, teacher, batch, 2).detach()) == 0


def test_a_student_is_moved_to_what_its_teacher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a sample leads from the teacher's estimate to the third network's, over the
    teacher's mean error, at the noise and the timestep that the loss draws."""
    student, teacher, fake = with_layers(0), with_layers(1), with_layers(2)
    batch = draw_batch(talking_noise(1, 2, 2), torch.arange(1), 2)
    made = [torch.randn_like(latent, requires_grad=True) for latent in batch.latents]
    monkeypatch.setattr(distill, "sampled", lambda *_: made)
    torch.manual_seed(5)
    dmd_loss(student, teacher, fake, batch, 2).backward()
    torch.manual_seed(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        timestep = int(torch.randint(distill.LOWEST, distill.HIGHEST + 1, ()))
        noisy = [noised(x0, timestep / 1000) for x0 in made]
        real, own = (denoise_at(dit, batch, timestep, noisy) for dit in (teacher, fake))
    for x0, r, f in zip(made, real, own, strict=True):
        expected = (f - r) / (x0 - r).abs().mean() / x0.numel() / len(made)
        torch.testing.assert_close(x0.grad, expected.detach())


@pytest.mark.parametrize("last", range(3))
def test_a_sample_has_the_gradient_of_its_last_step(last: int) -> None:
    dit = with_layers(0)
    batch = draw_batch(talking_noise(1, 2, 2), torch.arange(1), 2)
    torch.stack([x0.square().mean() for x0 in sampled(dit, batch, last)]).sum().backward()
    for layer in dit.blocks:
        gradient = layer.self_attn.k.weight.grad
        assert isinstance(gradient, Tensor) and float(gradient.abs().max()) > 0
    heard = dit.blocks[0].audio_cross_attn.proj.weight.grad
    assert (heard is not None) == (last > 0)  # step 0 hears nothing: its gradient is cut


@pytest.mark.slow
def test_distillation_is_compared_with_equal_time() -> None:
    """The truth has no chance in it, so regression betters a teacher that is sampled in three
    steps; and the teacher is the same for both students."""
    settings = DistillSettings(teacher_s=30, student_s=15, teacher_rate=1e-2, student_rate=2e-3)
    ticks = itertools.count()  # a step lasts one of them, however fast the machine is
    lines = compare(talking_noise(8, 2, 2), settings, TINY, clock=lambda: float(next(ticks)))
    assert [(line["network"], line["steps"]) for line in lines] == [
        ("teacher", 29),
        ("regression", 14),
        ("dmd", 14),
    ]
    teacher, regression, dmd = (line["error"] for line in lines)
    assert regression < teacher and dmd != teacher


# ------------------------------------------------------------------------------ measuring


@pytest.mark.slow
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_are_told_apart_through_blur(expression: str) -> None:
    said = spoken(Voice("en-us+m6"), "Maybe papa can open the window for us.")
    motion = motion_of(said.phonemes, 60, [expression])
    pictures = draw(identity(21), torch.from_numpy(motion.values))
    blurred = torch.nn.functional.avg_pool2d(pictures, 5, 1, 2)
    errors = expression_errors(identity(21), blurred[20:], said.phonemes, 20)
    assert shown_expressions(errors) == [expression] * 2
    found = synchronisation(
        mouth_openings(identity(21), pictures[6:], expression),
        torch.from_numpy(motion.values[6:]),
    )
    assert found.correlation > 0.95


def test_openings_are_measured_on_drawn_frames() -> None:
    said = spoken(Voice("en-us+m6"), "Maybe papa can open the window for us.")
    motion = motion_of(said.phonemes, 50)
    pictures = draw(identity(21), torch.from_numpy(motion.values))
    found = synchronisation(mouth_openings(identity(21), pictures), torch.from_numpy(motion.values))
    assert found.correlation > 0.97 and found.lag == 0 and found.closed == 1


def test_a_late_picture_is_told() -> None:
    motion = torch.zeros(200, len(COLUMNS))
    motion[:, 0] = torch.from_numpy(np.random.default_rng(0).random(200).astype(np.float32))
    late = torch.cat([torch.zeros(2), motion[:-2, 0]])
    found = synchronisation(late, motion)
    assert found.closed is None  # there is no p, b or m
    assert found.lag == 2 and found.best > 0.99 > 0.5 > found.correlation


# ------------------------------------------------------------------------------ sync scorer


def test_sound_and_pictures_of_a_window_are_of_one_time() -> None:
    """A click at frame 20 is in the columns of frame 20: four to a frame."""
    speech = torch.zeros(40 * 640)
    speech[20 * 640 + 300 :][:40] = 1.0
    sound = bands(speech)
    assert sound.shape == (40, 160)
    assert int(sound.mean(0).argmax()) // 4 == 20
    mouths = torch.arange(40.0).view(40, 1, 1).expand(40, 32, 32)
    heard, seen = windows_at(sound, mouths, torch.tensor([18, 3]))
    assert heard.shape == (2, 40, 20) and seen.shape == (2, 5, 32, 32)
    assert int(heard[0].mean(0).argmax()) // 4 == 2 and seen[0, 2, 0, 0] == 20


@pytest.mark.slow
def test_the_scorer_learns_which_mouth_goes_with_which_sound(tmp_path: Path) -> None:
    """On clips that it knows: late pictures are told by their frames, a mouth at rest by its
    confidence."""
    clips = make_clips(20, 3, 90, people=2)
    settings = SyncSettings(steps=150, pool=3, clips=3, warmup=10)
    net = train_sync(clips, tmp_path, settings)
    clip = next(clips[i] for i in range(3) if clips.motion[i, :, 0].std() > 0.1)
    pictures, speech = clip.frames(), torch.from_numpy(clip.speech)
    right = score(net, clip.identity, speech, pictures)
    assert right.offset == 0 and right.confidence > 0.3
    late = torch.cat([pictures[:4], pictures[:-4]])
    assert score(net, clip.identity, speech, late).offset == 4
    still = pictures[:1].expand_as(pictures)
    assert score(net, clip.identity, speech, still).confidence < 0.3 * right.confidence


def test_a_stage_that_ended_before_its_first_report_has_no_curves(tmp_path: Path) -> None:
    plot(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert read_log(tmp_path / "log.jsonl") == [] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the script


@pytest.mark.slow
def test_the_script_for_a_gpu_leaves_a_checkpoint(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    make_clips(0, 6, FRAMES, people=2).save(data / "clips.npz")
    make_clips(HELD_OUT, 1, FRAMES, people=1).save(data / "held.npz")
    done = subprocess.run(
        [REPOSITORY / "training" / "gpu.sh", out, data, "3", "cpu"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        *("vae", "speech", "encode", "dit", "checkpoint")
    ]
    with liveact.Engine.load(out / "checkpoint", device="cpu") as engine:
        made = film(engine, 1, spoken(Voice(), "Hello."))
    assert made.pictures.shape[1:] == (3, 128, 128) and len(made.pictures) == len(made.motion)
