"""What a file of weights is when it is not what was expected, and what to do about it.

People have weights in other forms than the released one: pointers that git left in the place of
large files, GGUF, pickles, names with a prefix or of another library. Each is told apart by a few
bytes or by its names, so that a message can say how to get the right file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from liveact.checkpoint.layout import IMAGE_FILE, TEXT_FILE, VAE_FILE

_LFS = b"version https://git-lfs"
_GGUF = b"GGUF"
_ZIP = b"PK\x03\x04"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PAGES = (b"<!doctype html", b"<html")

_CONVERT = "torch.load it and write it with safetensors.torch.save_file"
_OF_OTHERS = (VAE_FILE, TEXT_FILE, IMAGE_FILE)  # they lie beside those of the DiT
_WEIGHT_SUFFIXES = (".bin", ".ckpt", ".gguf", ".pt", ".pth", ".safetensors")

# What trainers and other programs put in front of the released names.
_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "module.",
    "_orig_mod.",
    "transformer.",
    "first_stage_model.",
    "vae.",
    "text_encoder.",
)
# Part of a name → whose names those are. None of them is in a released file.
_OTHER_NAMES = {
    "condition_embedder.": "diffusers",
    ".attn1.to_q.": "diffusers",
    ".down_blocks.": "diffusers",
    ".SelfAttention.": "transformers",
    "vision_model.": "transformers",
    ".lora_": "a LoRA",
}


def other_form(path: Path, expected: str) -> str | None:
    """What a file is instead of `expected` (`safetensors` or `torch`), with what to do; None where
    nothing is known that helps."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "an empty file: download it again"
    if head.startswith(_LFS):
        return f"a git-lfs pointer in its place: run `git lfs pull` in {path.parent}"
    if head.startswith(_GGUF):
        return "a GGUF file: get the weights as released, GGUF is not read"
    if head.lstrip().lower().startswith(_PAGES):
        return "a web page in its place: download it again"
    is_pickle = head.startswith((_ZIP, *_PICKLES))
    if expected == "safetensors" and is_pickle:
        return f"a pickle of torch.save: {_CONVERT}"
    if expected == "torch" and not is_pickle and head[8:9] == b"{" and head[5:8] == bytes(3):
        return "a safetensors file: get the .pth as released, or write it with torch.save"
    return None


def other_files(directory: Path, stem: str, expected: str) -> str:
    """`, but NAME, WHAT IT IS` for weights in a directory that may be meant for those called
    `stem`; nothing where there are none."""
    if not directory.is_dir():
        return ""
    for path in sorted(directory.iterdir()):
        meant = path.suffix in _WEIGHT_SUFFIXES and path.name not in _OF_OTHERS
        if meant and path.stem.startswith(stem) and path.is_file():
            form = other_form(path, expected)
            return f", but {path.name}" + (f", {form}" if form else "")
    return ""


def other_names(found: Iterable[str], name: str) -> str:
    """What is found instead of a tensor called `name`."""
    names = set(found)
    for prefix in _PREFIXES:
        if prefix + name in names:
            return f"{prefix + name!r}: remove {prefix!r} from the names"
    for part, owner in _OTHER_NAMES.items():
        if any(part in other for other in names):
            return f"none of this name but those of {owner}: get the weights as released"
    return "none of this name"
