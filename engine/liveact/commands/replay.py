"""`liveact replay`: recorded inputs through one part of the model, computed tensors out.

The tensor names are those of the recordings that parity is checked with, so anyone can compare
their own run of the released code with this engine, or send a report that can be replayed.

    dit       text, clip, audio, y, noise.B, renoise.B.S [text_edit: used in block 3]
              → velocity.B.S, latent.B, context_k.S.L, context_v.S.L (after the last block)
    vae       any of image, video, latent → encode_padded_image, encode_video, decode_stream,
              decode_windowed_B
    encoders  any of t5.ids + t5.mask, clip.image, wav2vec.speech → t5.output, clip.output,
              wav2vec.embedding
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from liveact._core import ModelConfig
from liveact.blocks import RELEASED_CLOCK, RELEASED_SLOTS, Slots, audio_rows
from liveact.checkpoint.layout import VAE_FILE, WAV2VEC_DIRECTORY
from liveact.checkpoint.tensors import Tensors, open_tensor_file
from liveact.commands.options import check_choice, check_output
from liveact.device.devices import Devices, open_devices
from liveact.dit.dit import MEMORIES, SAMPLERS, STEPS, Dit, MemoryPolicy
from liveact.encoders.portrait import ImageEncoder
from liveact.encoders.prompt import TextEncoder
from liveact.encoders.speech import AudioEncoder
from liveact.errors import InputError
from liveact.files import whole_file
from liveact.vae.vae import Vae
from liveact.vae.windowed import WindowedVaeStream

PARTS = ("dit", "vae", "encoders")
EDITED_BLOCK = 3  # made with `text_edit` where that is present


def run(options: argparse.Namespace) -> None:
    """Checks the options, replays and says what was written."""
    check_choice("part", options.part, PARTS)
    check_choice("memory", options.memory, MEMORIES)
    check_choice("sampler", options.sampler, SAMPLERS)
    check_output(options.out, [options.inputs])
    devices = open_devices(
        options.device, options.vae_device, options.precision, options.checkpoint
    )
    print(f"device: {devices.reason}")
    results = replay(
        options.part,
        options.checkpoint,
        options.inputs,
        options.out,
        devices=devices,
        policy=MemoryPolicy(options.memory),
        audio_guidance=options.audio_guidance,
        sampler=options.sampler,
        wav2vec=options.wav2vec,
    )
    print(f"{options.out}: {len(results)} tensors")


def replay(
    part: str,
    checkpoint: Path,
    inputs: Path,
    out: Path,
    *,
    devices: Devices,
    policy: MemoryPolicy,
    audio_guidance: float = 1.0,
    sampler: str = "renoise",
    wav2vec: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Runs `part` on the tensors of `inputs`, writes `out`, and returns what it wrote.

    Raises InputError for missing, misshapen or non-finite inputs.
    """
    if not out.parent.is_dir():
        raise InputError(f"{out}: expected the directory {out.parent} to exist")
    with open_tensor_file(inputs) as given:
        if part == "dit":
            results = _replay_dit(checkpoint, given, devices, policy, audio_guidance, sampler)
        elif part == "vae":
            results = _replay_vae(checkpoint, given, devices)
        else:
            results = _replay_encoders(checkpoint, given, devices, wav2vec)
    with whole_file(out) as partial:  # through memory: errors of the disk are then OSErrors
        partial.write_bytes(save({name: tensor.contiguous() for name, tensor in results.items()}))
    return results


def _take(given: Tensors, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
    """A tensor of the inputs as fp32; None in `shape` stands for any extent of 1 or more."""
    if name not in given:
        raise InputError(f"{given.source}: expected tensor {name}, found none")
    found = given.shape(name)
    fits = len(found) == len(shape) and all(
        f > 0 if e is None else f == e for f, e in zip(found, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("n" if e is None else str(e) for e in shape)
        raise InputError(
            f"{given.file_of(name)}: expected {name} to be [{wanted}], found {list(found)}"
        )
    if not given.dtype(name).is_floating_point:
        raise InputError(
            f"{given.file_of(name)}: expected {name} to be floating point, "
            f"found {given.dtype(name)}"
        )
    tensor = given[name].float()
    if not tensor.isfinite().all():
        raise InputError(f"{given.file_of(name)}: expected {name} to be finite, found NaN or inf")
    return tensor


def _count_blocks(given: Tensors) -> int:
    """Blocks of the inputs, which must be 0, 1, 2, … without a gap."""
    numbers = {int(m[1]) for name in given if (m := re.fullmatch(r"noise\.(\d{1,9})", name))}
    for block in range(max(len(numbers), 1)):
        if block not in numbers:
            raise InputError(
                f"{given.source}: expected tensor noise.{block} of {len(numbers)} blocks, "
                "found none"
            )
    return len(numbers)


def _take_text(given: Tensors, name: str, config: ModelConfig) -> torch.Tensor:
    text = _take(given, name, (None, config.text_dim))
    if len(text) > config.text_len:
        raise InputError(
            f"{given.file_of(name)}: expected {name} of at most {config.text_len} tokens, "
            f"found {len(text)}"
        )
    return text


def _replay_dit(
    checkpoint: Path,
    given: Tensors,
    devices: Devices,
    policy: MemoryPolicy,
    audio_guidance: float,
    sampler: str,
) -> dict[str, torch.Tensor]:
    dit = Dit.load(checkpoint, devices.cores, devices.precision)
    config = dit.config
    channels = config.out_dim
    y = _take(given, "y", (1, config.in_dim - channels, None, None, None))[0]
    clip = _take(given, "clip", (1, None, config.image_dim))[0]
    text = edited = _take_text(given, "text", config)
    if "text_edit" in given:
        edited = _take_text(given, "text_edit", config)
    audio = _take(given, "audio", (None, None, None)).flatten(1)
    if audio.shape[1] != config.audio_dim:
        raise InputError(
            f"{given.source}: expected audio features of {config.audio_dim} = layers × width, "
            f"found {audio.shape[1]}"
        )
    num_blocks = _count_blocks(given)
    slots = Slots(*policy.slots)
    if y.shape[1] < slots.total:
        raise InputError(
            f"{given.source}: expected y to have at least {slots.total} latent frames, "
            f"found {y.shape[1]}"
        )
    h, w = y.shape[2:]
    stream = dit.open_stream((h, w), policy, audio_guidance, clip.shape[0], sampler)
    stream.set_image(clip, y)
    results: dict[str, torch.Tensor] = {}
    for block in range(num_blocks):
        shape = stream.latent_shape
        noise = _take(given, f"noise.{block}", shape)
        renoise = None
        if sampler == "renoise":
            names = [f"renoise.{block}.{step}" for step in range(STEPS - 1)]
            renoise = torch.stack([_take(given, name, shape) for name in names])
        stream.set_prompt(edited if block == EDITED_BLOCK else text)
        velocities = np.zeros((STEPS, *shape), np.float32)
        rows = audio_rows(audio, block, stream.clock)
        latent = stream.denoise(noise, renoise, rows, velocities=velocities)
        for step in range(STEPS):
            results[f"velocity.{block}.{step}"] = torch.from_numpy(velocities[step])
        results[f"latent.{block}"] = latent
    for step in range(STEPS):
        for layer in range(config.num_layers):
            k, v = stream.export_context(step, layer)
            results[f"context_k.{step}.{layer}"], results[f"context_v.{step}.{layer}"] = k, v
    return results


def _replay_vae(checkpoint: Path, given: Tensors, devices: Devices) -> dict[str, torch.Tensor]:
    vae = Vae.load(checkpoint / VAE_FILE, devices.vae_torch_device, devices.vae_launch)
    results: dict[str, torch.Tensor] = {}
    if "image" in given:
        image = _take(given, "image", (1, 3, 1, None, None))
        zeros = torch.zeros(1, 3, RELEASED_CLOCK.condition_frames - 1, *image.shape[3:])
        results["encode_padded_image"] = vae.encode(torch.cat([image, zeros], dim=2)).cpu()
    if "video" in given:
        results["encode_video"] = vae.encode(_take(given, "video", (1, 3, None, None, None))).cpu()
    if "latent" in given:
        latent = _take(given, "latent", (1, 16, None, None, None))[0]
        pieces = vae.open_stream().decode_video(latent)
        results["decode_stream"] = torch.cat([p.cpu() for p in pieces], dim=1)[None]
        windowed = WindowedVaeStream(vae)
        first, later = RELEASED_SLOTS.context, RELEASED_SLOTS.current
        counts = [first] + [later] * ((latent.shape[1] - first) // later)
        if sum(counts) == latent.shape[1]:
            for block, part in enumerate(latent.split(counts, dim=1)):
                pieces = windowed.decode_video(part)
                video = torch.cat([p.cpu() for p in pieces], dim=1)
                results[f"decode_windowed_{block}"] = video[None]
    return _not_empty(results, given, "image, video or latent")


def _replay_encoders(
    checkpoint: Path, given: Tensors, devices: Devices, wav2vec: Path | None
) -> dict[str, torch.Tensor]:
    device = devices.torch_device
    results: dict[str, torch.Tensor] = {}
    if "t5.ids" in given or "t5.mask" in given:
        ids, mask = _take_integers(given, "t5.ids"), _take_integers(given, "t5.mask")
        encoder = TextEncoder.load(checkpoint, device)
        results["t5.output"] = encoder.encode_ids(ids, mask).cpu()
    if "clip.image" in given:
        video = len(given.shape("clip.image")) == 5  # of one frame
        image = _take(given, "clip.image", (1, 3, *([1] if video else []), None, None))
        results["clip.output"] = ImageEncoder.load(checkpoint, device).encode(image).cpu()
    if "wav2vec.speech" in given:
        speech = _take(given, "wav2vec.speech", (None,))
        audio_encoder = AudioEncoder.load(wav2vec or checkpoint / WAV2VEC_DIRECTORY, device)
        num_features = speech.shape[0] * 25 // 16_000
        results["wav2vec.embedding"] = audio_encoder.encode(speech, num_features).cpu()
    return _not_empty(results, given, "t5.ids and t5.mask, clip.image or wav2vec.speech")


def _take_integers(given: Tensors, name: str) -> torch.Tensor:
    if name not in given:
        raise InputError(f"{given.source}: expected tensor {name}, found none")
    tensor = given[name]
    if tensor.dtype not in (torch.int32, torch.int64) or len(tensor.shape) != 2:
        raise InputError(
            f"{given.file_of(name)}: expected {name} to be int32 or int64 [1, n], "
            f"found {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


def _not_empty(
    results: dict[str, torch.Tensor], given: Tensors, expected: str
) -> dict[str, torch.Tensor]:
    if not results:
        raise InputError(f"{given.source}: expected {expected}, found {', '.join(given)!r:.80}")
    return results
