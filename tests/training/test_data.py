"""Speech with phoneme times, the shape of the mouth, and that the pictures show that mouth."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from liveact.errors import InputError
from training.data.clips import HELD_OUT, Clips, heard, make_clip, make_clips, resized
from training.data.espeak import Phoneme, Voice, synthesise
from training.data.expressions import (
    PERIOD,
    PROMPTS,
    RAMP,
    expression_of,
    expression_track,
    prompt_of,
)
from training.data.flite import Speaker, synthesise_flite
from training.data.identity import identity
from training.data.motion import COLUMNS, motion_of
from training.data.portrait import INSIDE, TONGUE, TOOTH, draw, mouth_geometry
from training.data.visemes import mouth_track, shapes_of


def motion(**values: float) -> Tensor:
    """One frame of a face at rest, but for these columns."""
    row = torch.zeros(1, len(COLUMNS))
    for name, value in values.items():
        row[0, COLUMNS.index(name)] = value
    return row


# ------------------------------------------------------------------------------ speech


def test_phonemes_cover_an_utterance_in_order() -> None:
    utterance = synthesise("My mum bought five fish.", Voice("en-us+f3"))
    assert utterance.phonemes[0].start_s == 0
    assert utterance.phonemes[-1].stop_s == pytest.approx(utterance.seconds)
    for one, next_one in zip(utterance.phonemes[:-1], utterance.phonemes[1:], strict=True):
        assert one.start_s < one.stop_s == next_one.start_s
    symbols = [p.symbol[:1] for p in utterance.phonemes if p.symbol]
    assert symbols == list("mammʌmbɔtfavfɪʃ".replace("mam", "ma", 1))


def test_vowels_are_louder_than_pauses_at_their_times() -> None:
    utterance = synthesise("Ah. Ah. Ah.", Voice("en-us"))
    level = {True: [0.0], False: [0.0]}
    for p in utterance.phonemes:
        if p.stop_s - p.start_s > 0.05:
            first, last = (int(t * utterance.sample_rate_hz) for t in (p.start_s, p.stop_s))
            level[bool(p.symbol)].append(float(np.square(utterance.samples[first:last]).mean()))
    assert max(level[True]) > 1e-3
    assert max(level[False]) < 0.02 * max(level[True])


def test_a_voice_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="expected one of espeak-ng, found 'nobody'"):
        synthesise("Hello.", Voice("nobody"))
    with pytest.raises(ValueError, match="expected something to speak, found ''"):
        synthesise("", Voice())


def test_faster_speech_is_shorter() -> None:
    slow, fast = (synthesise("One, two, three.", Voice(rate=rate)) for rate in (120, 240))
    assert 1.5 < slow.seconds / fast.seconds < 2.5


# ------------------------------------------------------------------------------ mouth


def test_lips_are_closed_in_a_b_and_open_in_an_a() -> None:
    phonemes = (Phoneme("a", 0.0, 0.3), Phoneme("b", 0.3, 0.38), Phoneme("a", 0.38, 0.7))
    opening, _, press, _ = mouth_track(phonemes, np.array([0.15, 0.34, 0.55], np.float32)).T
    assert opening[1] == 0 and press[1] == 1
    assert min(opening[0], opening[2]) > 0.9 and max(press[0], press[2]) < 0.1


def test_a_diphthong_moves_from_one_shape_to_the_other() -> None:
    assert shapes_of("aɪ") == [*shapes_of("a"), *shapes_of("ɪ")]
    width = mouth_track((Phoneme("aʊ", 0.0, 0.4),), np.array([0.05, 0.35], np.float32))[:, 1]
    assert width[0] > 0 > width[1]


def test_motion_looks_at_most_two_frames_ahead() -> None:
    """What it does not know it cannot show: all of it can be learned from the sound."""
    phonemes = tuple(Phoneme("ma"[i % 2], i * 0.1, (i + 1) * 0.1) for i in range(40))
    cut = tuple(p for p in phonemes if p.start_s < 2.0)
    whole, known = motion_of(phonemes, 80).values, motion_of(cut, 80).values
    ahead_s = 2 / 20
    frames = int((2.0 - ahead_s) * 20)
    smoothed_over = 3  # frames that neighbouring sounds blend over: some 0.1 s
    np.testing.assert_allclose(
        whole[: frames - smoothed_over], known[: frames - smoothed_over], atol=2e-2
    )
    assert np.abs(whole - known).max() > 0.5


def test_a_blink_follows_a_pause() -> None:
    lids = motion_of((Phoneme("a", 0.0, 1.0), Phoneme("", 1.0, 3.0)), 60).column("blink")
    assert lids[:20].max() == 0
    assert lids[22:26].max() == 1
    assert lids[30:].max() == 0


# ------------------------------------------------------------------------------ pictures


def inside(picture: Tensor, x: float, y: float) -> Tensor:
    """[S, S] bool: pixels within 0.25 of (x, y) of the colours of a mouth's inside."""
    side = picture.shape[-1]
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    near = ((axis - x).abs() < 0.25)[None, :] & ((axis - y).abs() < 0.25)[:, None]
    dark, tooth = torch.tensor(INSIDE), torch.tensor(TOOTH)
    colors = (dark, dark + 0.15 * (tooth - dark), torch.tensor(TONGUE))
    away = [(picture - color.view(3, 1, 1)).abs().amax(0) for color in colors]
    return near & (torch.stack(away).amin(0) < 0.05)


@pytest.mark.parametrize("seed", [3, 11, 12])
@pytest.mark.parametrize("opening", [0.0, 0.4, 1.0])
def test_a_picture_shows_the_mouth_that_the_geometry_tells(seed: int, opening: float) -> None:
    person, given = identity(seed), motion(opening=opening, width=0.4)
    mouth = mouth_geometry(person, given)
    x, y = float(mouth.x), float(mouth.y)
    found = inside(draw(person, given, 512)[0], x, y)
    rows, columns = found[:, int((x + 1) * 256)].nonzero(), found.any(0).nonzero()
    if not opening:
        assert len(rows) / 256 < 0.02  # the line where the lips meet
        return
    edge = 3 * 2 / 512  # pixels of both edges are of neither colour
    height, width = len(rows) / 256, int(columns[-1] - columns[0]) / 256
    assert float(mouth.up + mouth.down) - edge <= height <= float(mouth.up + mouth.down)
    assert width == pytest.approx(2 * float(mouth.half_width), abs=0.04)
    upper_lip = y + 0.35 * float(mouth.lift) - float(mouth.up)
    assert float(rows[0]) / 256 - 1 == pytest.approx(upper_lip, abs=edge)


def test_teeth_show_when_they_should() -> None:
    def white(**values: float) -> int:
        picture = draw(identity(3), motion(opening=0.4, **values), 256)[0]
        lower = picture[:, 140:]  # below the eyes
        return int(((lower - torch.tensor(TOOTH).view(3, 1, 1)).abs().amax(0) < 0.03).sum())

    assert white(teeth=1.0) > white(teeth=0.0) + 50


def test_a_picture_is_the_same_alone_and_in_a_clip() -> None:
    person = identity(5)
    track = torch.rand(6, len(COLUMNS), generator=torch.Generator().manual_seed(0))
    clip = draw(person, track, 64)
    for t in (0, 3, 5):
        # Spots of light end with the rectangle that they are painted in, where they are 1 % bright.
        alone = draw(person, track[t : t + 1], 64)[0]
        torch.testing.assert_close(alone, clip[t], atol=1e-2, rtol=0)


def test_pictures_do_not_depend_on_their_size() -> None:
    """A pixel of a small picture is the mean of those of a large one, but at edges."""
    person, given = identity(8), motion(opening=0.5)
    small, large = draw(person, given, 64)[0], draw(person, given, 256)[0]
    means = torch.nn.functional.avg_pool2d(large, 4)
    assert float((small - means).abs().mean()) < 0.01


def test_identities_differ_and_repeat() -> None:
    assert identity(1) == identity(1)
    portraits = torch.cat([draw(identity(seed), motion(), 32) for seed in range(30)])
    distance = torch.cdist(portraits.flatten(1), portraits.flatten(1))
    distance.fill_diagonal_(9.0)
    assert float(distance.min()) > 1.0


# ------------------------------------------------------------------------------ clips


def test_a_clip_starts_at_rest_and_its_sound_fits_its_frames() -> None:
    clip = make_clip(5, 60, people=10)
    assert clip.motion.shape == (60, len(COLUMNS)) and clip.speech.shape == (60 * 640,)
    assert not clip.motion[0].any()
    assert clip.frames(0, 2, size=32).shape == (2, 3, 32, 32)
    assert clip.person < 10 <= HELD_OUT <= make_clip(HELD_OUT, 20, people=10).person


def test_sound_keeps_its_time_through_the_tempo_change() -> None:
    """A click at frame 30 of 20 a second is at feature 30 of 25 a second."""
    pcm = np.random.default_rng(0).standard_normal(22_050 * 3).astype(np.float32) * 1e-4
    pcm[int(1.5 * 22_050) :][:400] = 0.5
    sound = heard(pcm, 22_050, 55)
    assert int(np.abs(sound).argmax()) / 640 == pytest.approx(30, abs=0.7)


def test_clips_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "clips.npz"
    clips = make_clips(0, 2, 20, people=3)
    clips.save(path)
    again = Clips.load(path)
    np.testing.assert_array_equal(again.motion, clips.motion)
    np.testing.assert_allclose(again.speech, clips.speech, atol=np.abs(clips.speech).max() / 3e4)


# ------------------------------------------------------------------------------ expressions


def test_prompts_differ_where_they_are_read() -> None:
    assert len({text.encode()[:64] for text in PROMPTS}) == len(PROMPTS) == 15
    assert expression_of(prompt_of("sad", 2)) == "sad"


def test_an_expression_comes_and_goes_with_its_blocks() -> None:
    track = expression_track(["neutral", "smiling", "neutral"], 90)
    smile, others = track[:, 0], track[:, 1:]
    assert not others.any() and not smile[:21].any()
    assert smile[21] == pytest.approx(1 / RAMP) and (smile[20 + RAMP : 53] == 1).all()
    assert (smile[52 + RAMP :] < 1e-12).all()


def test_actions_repeat_in_step_with_the_blocks() -> None:
    """So that their phase follows from the position in the block."""
    nods = expression_track(["nodding"], 21 + 3 * 32)[:, 2]
    np.testing.assert_allclose(nods[21:53], nods[53:85], atol=1e-6)
    np.testing.assert_allclose(nods[21 : 21 + PERIOD], nods[37:53], atol=1e-6)
    assert nods[21] == 0 and nods[29] == pytest.approx(1)


def test_a_clip_has_the_expression_of_its_prompts() -> None:
    clip = next(
        c for c in (make_clip(i, 90, people=3) for i in range(40)) if len(set(c.prompts)) > 1
    )
    track = expression_track([expression_of(p) for p in clip.prompts], 90)
    np.testing.assert_array_equal(clip.motion[1:, COLUMNS.index("smile") :], track[1:])


def test_a_larger_head_speaks_lower_and_slower() -> None:
    said = synthesise("One, two, three.", Voice())
    larger = resized(said, 1.1)
    assert larger.seconds == pytest.approx(1.1 * said.seconds, rel=1e-3)
    assert larger.phonemes[-1].stop_s == pytest.approx(larger.seconds, rel=1e-3)
    peaks = [
        np.abs(np.fft.rfft(u.samples)).argmax() / u.seconds for u in (said, larger)
    ]  # the loudest harmonic, Hz
    assert peaks[0] / peaks[1] == pytest.approx(1.1, rel=0.01)


def test_flite_is_asked_for_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"flite: expected it on the PATH .*, found none"):
        synthesise_flite("Hello.", Speaker("rms"))


@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_flite_tells_when_its_phonemes_are() -> None:
    said = synthesise_flite("My mum bought five fish.", Speaker("slt"))
    assert [p.symbol for p in said.phonemes[:4]] == ["", "m", "aɪ", "m"]
    assert said.phonemes[-1].stop_s == pytest.approx(said.seconds, abs=0.05)
