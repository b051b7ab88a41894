"""Portraits as people have them: large photos, HEIC, colour profiles, 16 bits, palettes."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from liveact.errors import InputError
from liveact.media.image import MAX_IMAGE_PIXELS, MAX_REDUCED_PIXELS, read_image
from tests.support.pipeline import ONE_THREAD

SIZE = (64, 64)


def colors(picture: torch.Tensor) -> np.ndarray:
    """[H, W, 3], 0 to 255."""
    return ((picture + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)


def color(path: Path) -> list[int]:
    """Of the middle."""
    return colors(read_image(path, SIZE))[32, 32].tolist()


# ------------------------------------------------------------------------------- large photos


def photo(width: int, height: int, **options: object) -> bytes:
    """A JPEG: left half red, right half blue. Made of copies of rows of blocks, as encoding a
    hundred megapixels takes a while and twice the memory."""
    image = Image.new("RGB", (width, height), (200, 30, 30))
    image.paste((30, 30, 200), (width // 2, 0, width, height))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80, subsampling=0, **options)
    return file.getvalue()


# VmHWM: the peak of ru_maxrss includes that of the process that started this one.
READ_AND_MEASURE = """
import sys
from liveact.media.image import read_image
def peak_kib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak_kib()
picture = read_image(sys.argv[1], (512, 512))
print((peak_kib() - before) // 1024)
print(*[round(float((v + 1) * 127.5)) for x in (100, 400) for v in picture[:, 256, x]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(12_000, 9_000), (16_320, 12_240)])
def test_photos_of_108_and_200_megapixels_within_bounded_memory(
    tmp_path: Path, width: int, height: int
) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo(width, height))
    result = subprocess.run(
        [sys.executable, "-c", READ_AND_MEASURE, str(path)],
        capture_output=True,
        text=True,
        env=ONE_THREAD,
    )
    assert result.returncode == 0, result.stderr
    peak, found = result.stdout.splitlines()
    # A quarter of the pixels, four bytes each, and nothing like it beside.
    assert int(peak) < width * height / 2**20 + 48
    expected = [200, 30, 30, 30, 30, 200]
    assert all(abs(int(a) - b) <= 4 for a, b in zip(found.split(), expected, strict=True)), found


def test_a_large_photo_keeps_its_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: left goes to the top
    path = tmp_path / "turned.jpg"
    path.write_bytes(photo(9_216, 7_168, exif=exif))
    assert MAX_IMAGE_PIXELS < 9_216 * 7_168
    found = colors(read_image(path, SIZE))
    assert abs(found[4, 32] - [200, 30, 30]).max() <= 4
    assert abs(found[60, 32] - [30, 30, 200]).max() <= 4


def test_what_cannot_be_reduced_is_refused_with_the_limit(tmp_path: Path) -> None:
    limit = "expected at most 64 megapixels, 200 of a JPEG, found"
    Image.new("1", (8_192, 8_192)).save(tmp_path / "large.png")
    with pytest.raises(InputError, match=rf"large\.png: {limit} 8192×8192$"):
        read_image(tmp_path / "large.png", SIZE)
    # Beyond the limit of Pillow as well, of which it says the number of pixels.
    Image.new("1", (16_384, 16_384)).save(tmp_path / "larger.png")
    with pytest.raises(InputError, match=rf"larger\.png: {limit} more: .*268435456 pixels"):
        read_image(tmp_path / "larger.png", SIZE)
    content = bytearray(photo(64, 64))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 16_384, 16_384)
    (tmp_path / "largest.jpg").write_bytes(content)
    assert MAX_REDUCED_PIXELS < 16_384 * 16_384
    with pytest.raises(InputError, match=rf"largest\.jpg: {limit} 16384×16384$"):
        read_image(tmp_path / "largest.jpg", SIZE)


# ------------------------------------------------------------------------------- HEIC and AVIF


def test_heic_is_read(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="the extra `heic` is not installed")
    image = Image.open(io.BytesIO(photo(128, 128)))
    heif.from_pillow(image).save(tmp_path / "phone.heic", quality=90)
    found = colors(read_image(tmp_path / "phone.heic", SIZE))
    assert abs(found[32, 8] - [200, 30, 30]).max() <= 8
    assert abs(found[32, 56] - [30, 30, 200]).max() <= 8
    content = (tmp_path / "phone.heic").read_bytes()
    (tmp_path / "cut.heic").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut\.heic: expected an image, found "):
        read_image(tmp_path / "cut.heic", SIZE)


HEIC_HEADER = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)


def test_heic_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # importing it is an ImportError now
    (tmp_path / "phone.heic").write_bytes(HEIC_HEADER)
    message = r"phone\.heic: expected an image .* HEIC.*: pip install liveact-engine\[heic\]$"
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / "phone.heic", SIZE)


def test_avif_is_read(tmp_path: Path) -> None:
    pytest.importorskip("PIL._avif", reason="this Pillow was built without AVIF")
    Image.open(io.BytesIO(photo(128, 128))).save(tmp_path / "a.avif", quality=90)
    found = colors(read_image(tmp_path / "a.avif", SIZE))
    assert abs(found[32, 8] - [200, 30, 30]).max() <= 8


# ------------------------------------------------------------------------------ colour profiles


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2.1 for a display or (with tables) a printer."""
    kind = b"mntr" if space == b"RGB " else b"prtr"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
    } | tags
    at = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content
    header = bytearray(128)
    header[8:12] = b"\x02\x10\0\0"
    header[12:24] = kind + space + pcs
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">iii", *(round(v * 65_536) for v in (0.9642, 1.0, 0.8249)))
    header[0:4] = struct.pack(">I", at + len(data))
    return bytes(header) + table + data


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(v * 65_536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


# Columns: XYZ of red, green and blue, adapted to D50, as the profiles of the vendors have them.
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
ADOBE_RGB = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def rgb_profile(matrix: np.ndarray, exponent: float = 2.2) -> bytes:
    columns = {
        b"rXYZ": xyz(*matrix[:, 0]),
        b"gXYZ": xyz(*matrix[:, 1]),
        b"bXYZ": xyz(*matrix[:, 2]),
    }
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent))
    return profile(b"RGB ", columns | curves)


def in_srgb(matrix: np.ndarray, rgb: tuple[int, ...], exponent: float = 563 / 256) -> np.ndarray:
    """What the formulas give: 563/256 is what a profile can hold of 2.2."""
    linear = np.linalg.inv(SRGB) @ matrix @ (np.array(rgb) / 255) ** exponent
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded).round()


@pytest.mark.parametrize("matrix", [DISPLAY_P3, ADOBE_RGB], ids=["P3", "Adobe RGB"])
@pytest.mark.parametrize("rgb", [(200, 120, 90), (90, 160, 100), (60, 70, 180), (255, 255, 255)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_is_converted_to_srgb(
    tmp_path: Path, matrix: np.ndarray, rgb: tuple[int, ...], mode: str
) -> None:
    path = tmp_path / "photo.png"
    icc = rgb_profile(matrix)
    assert len(icc) < 1_024
    image = Image.new("RGB", SIZE, rgb)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(path, icc_profile=icc)
    expected = in_srgb(matrix, rgb)
    assert abs(color(path) - expected).max() <= 2
    if rgb != (255, 255, 255):
        assert abs(expected - rgb).max() > 4, "ignoring it would be seen"


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tagged.png", icc_profile=icc)
    assert np.array_equal(colors(read_image(tmp_path / "tagged.png", SIZE)), pixels)


def cmyk_profile() -> bytes:
    """White paper and inks that are unlike pure ones: 2 points a side, Lab at each. All inks
    together are black, so that nothing is scaled to the black point."""
    lab = {0: (100, 0, 0), 8: (60, -30, -40), 4: (50, 60, 0), 2: (90, 0, 80), 1: (0, 0, 0)}
    grid = []
    for corner in range(16):  # cyan is the slowest
        inks = [lab[bit] for bit in (8, 4, 2, 1) if corner & bit] or [lab[0]]
        light = 100 * np.prod([ink[0] / 100 for ink in inks])
        grid.append((light, *(np.mean(inks, axis=0)[1:] * (light > 0))))
    scaled = [(v[0] * 652.8, (v[1] + 128) * 256, (v[2] + 128) * 256) for v in grid]
    identity = struct.pack(">9i", *(65_536 * int(i % 4 == 0) for i in range(9)))
    table = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + identity + struct.pack(">HH", 2, 2)
    table += struct.pack(">8H", *[0, 65_535] * 4)
    table += struct.pack(">48H", *(round(min(v, 65_280)) for point in scaled for v in point))
    table += struct.pack(">6H", *[0, 65_535] * 3)
    return profile(b"CMYK", {b"A2B0": table}, pcs=b"Lab ")


def test_a_profile_of_a_printer_is_converted(tmp_path: Path) -> None:
    icc = cmyk_profile()
    assert len(icc) < 1_024
    path = tmp_path / "print.tif"
    for ink, lab in (((255, 0, 0, 0), (60, -30, -40)), ((0, 0, 0, 0), (100, 0, 0))):
        Image.new("CMYK", SIZE, ink).save(path, icc_profile=icc)
        # Lab of D50 → XYZ → sRGB
        f = np.array([(lab[0] + 16) / 116 + d for d in (lab[1] / 500, 0, -lab[2] / 200)])
        white = np.array([0.9642, 1.0, 0.8249])
        values = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * white
        expected = in_srgb(np.stack([values] * 3, axis=1) / 3, (255, 255, 255))
        assert abs(color(path) - expected).max() <= 3, (color(path), expected)
    Image.new("CMYK", SIZE, (255, 0, 0, 0)).save(path)
    assert color(path) == [0, 255, 255], "without a profile, as before"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize(
    "icc",
    [b"", b"junk", bytes(200), rgb_profile(DISPLAY_P3)[:150], rgb_profile(DISPLAY_P3)[:-140]],
    ids=["empty", "junk", "zeros", "cut in its table", "cut in its curves"],
)
def test_a_broken_profile_is_ignored(tmp_path: Path, mode: str, icc: bytes) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    image = Image.new("RGB", SIZE, (200, 100, 50)).convert(mode)
    image.save(tmp_path / f"plain.{suffix}")
    image.save(tmp_path / f"tagged.{suffix}", icc_profile=icc)
    assert color(tmp_path / f"tagged.{suffix}") == color(tmp_path / f"plain.{suffix}")


def test_a_profile_for_other_pixels_is_ignored(tmp_path: Path) -> None:
    Image.new("CMYK", SIZE, (255, 0, 0, 0)).save(
        tmp_path / "a.tif", icc_profile=rgb_profile(DISPLAY_P3)
    )
    assert color(tmp_path / "a.tif") == [0, 255, 255]
    Image.new("RGB", SIZE, (9, 99, 199)).save(tmp_path / "a.png", icc_profile=cmyk_profile())
    assert color(tmp_path / "a.png") == [9, 99, 199]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_grey_profile(tmp_path: Path, mode: str) -> None:
    icc = bytearray(profile(b"GRAY", {b"kTRC": gamma(1.0)}))
    icc[12:16] = b"mntr"
    image = Image.new("L", SIZE, 100)
    if mode == "I;16":
        image = Image.fromarray(np.full((64, 64), 100 * 257, np.uint16))
    image.convert(mode).save(tmp_path / "grey.png", icc_profile=bytes(icc))
    linear = 100 / 255
    expected = round(255 * (1.055 * linear ** (1 / 2.4) - 0.055))
    assert abs(np.array(color(tmp_path / "grey.png")) - expected).max() <= 1


# -------------------------------------------------------------------------------------- depth


def test_grey_of_16_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    expected = np.round(ramp / 257).astype(int)[..., None].repeat(3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + ramp.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.pgm"):
        assert np.array_equal(colors(read_image(tmp_path / name, SIZE)), expected), name


def deep_png(path: Path, pixels: np.ndarray) -> None:
    """16 bits a channel, which Pillow does not write. pixels uint16 [H, W, 3 or 4]."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def test_colour_of_16_bits(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65_536, (64, 64, 4)).astype(np.uint16)
    pixels[..., 3] = 65_535
    for channels in (3, 4):
        deep_png(tmp_path / "a.png", pixels[..., :channels])
        found = colors(read_image(tmp_path / "a.png", SIZE))
        assert abs(found - pixels[..., :3] / 257).max() <= 1
    pixels[..., 3] = 0
    deep_png(tmp_path / "a.png", pixels)
    assert (colors(read_image(tmp_path / "a.png", SIZE)) == 255).all(), "transparent is white"


def test_one_bit_and_palettes(tmp_path: Path) -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2
    Image.fromarray(checks.astype(bool)).save(tmp_path / "a.png")
    found = colors(read_image(tmp_path / "a.png", SIZE))
    assert np.array_equal(found, 255 * checks[..., None].repeat(3, axis=2))
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 100])
    image.paste(2, (0, 32, 64, 64))
    image.save(tmp_path / "p.png", transparency=bytes([0, 255, 128]))  # half clear
    found = colors(read_image(tmp_path / "p.png", SIZE))
    assert found[8, 8].tolist() == [200, 0, 0]
    assert abs(found[56, 56] - [127, 127, 177]).max() <= 1
    grey = Image.fromarray(np.full((64, 64), 30_000, np.uint16))
    grey.save(tmp_path / "t.png", transparency=30_000)
    assert color(tmp_path / "t.png") == [255, 255, 255]


@pytest.mark.parametrize(
    ("dtype", "found"), [(np.float32, "floating point"), (np.int32, "32 bits")]
)
def test_what_has_no_known_range_is_refused(
    tmp_path: Path, dtype: type[np.generic], found: str
) -> None:
    Image.fromarray(np.zeros((64, 64), dtype)).save(tmp_path / "a.tif")
    message = rf"a\.tif: expected 8 or 16 bits per channel, found {found}$"
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / "a.tif", SIZE)
