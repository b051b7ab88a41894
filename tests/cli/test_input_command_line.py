"""The command line as people use it: signals, broken pipes, odd names and numbers, outputs."""

from __future__ import annotations

import io
import logging
import os
import re
import resource
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import pytest

from liveact.commands import cli
from liveact.commands.options import parse_size
from liveact.commands.report import BlockRow, Report, table
from liveact.errors import InputError
from liveact.files import output_target, whole_file
from liveact.media.mp4 import CONTAINERS, Mp4Writer
from liveact.session.chunk import BlockTimings, Chunk, ChunkTimings
from tests.support.cli import Run, generate, refused
from tests.support.paths import PORTRAIT
from tests.support.pipeline import ONE_THREAD, demo_checkpoint, speech, write_wav

LIVEACT = [sys.executable, "-m", "liveact"]


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LIVEACT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
        **options,  # type: ignore[call-overload]
    )


# ---------------------------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["importing", "loading", "first block", "third block"])
def test_sigterm_is_one_line_and_leaves_nothing(tmp_path: Path, moment: str) -> None:
    sound = write_wav(tmp_path / "long.wav", speech(90.0))
    process = start(*generate(sound, tmp_path))
    assert process.stdout is not None
    if moment == "importing":
        # The handler stands once torch is being read; before, there is nothing to clean up.
        wait_for_module(process.pid, "libtorch")
    else:
        lines = {"loading": 1, "first block": 2, "third block": 4}[moment]
        for _ in range(lines):
            assert process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "liveact: terminated\n")
    assert [p.name for p in tmp_path.iterdir()] == ["long.wav"]


def wait_for_module(pid: int, name: str) -> None:
    deadline_s = time.monotonic() + 30
    while name not in Path(f"/proc/{pid}/maps").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


SLOW_CONVERT = """
import sys, time
from liveact.commands import cli, convert
made = convert._converted
convert._converted = lambda *arguments: time.sleep(0.2) or made(*arguments)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_sigterm_during_convert(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_CONVERT, "convert", demo_checkpoint(), f"--out={tmp_path}/out"],
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    deadline_s = time.monotonic() + 30
    while not list(tmp_path.glob(".out.partial*")):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "liveact: terminated\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sigterm_during_calibrate(tmp_path: Path) -> None:
    process = start("calibrate", demo_checkpoint(), f"--out={tmp_path}/out.json", "--blocks=1000")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("device: ")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "liveact: terminated\n")
    assert list(tmp_path.iterdir()) == []


def test_signals_are_as_they_were_afterwards(run: Run) -> None:
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert run("doctor")[0] == 0
        assert signal.getsignal(signal.SIGHUP) is handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_writer_that_is_dropped_leaves_nothing(tmp_path: Path) -> None:
    """As where a signal comes between making it and entering its context."""
    Mp4Writer(tmp_path / "a.mp4", 32, 32, 20, 48_000, 1)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- standard output


@pytest.mark.slow
def test_a_full_standard_output_loses_the_log_only(tmp_path: Path, wav: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*LIVEACT, *generate(wav, tmp_path)], stdout=full, stderr=subprocess.PIPE,
            env=ONE_THREAD, timeout=60,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, b"")
    assert num_frames(tmp_path / "video.mp4") == 20


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_closed_standard_output_loses_the_log_only(
    tmp_path: Path, wav: Path, closed: str
) -> None:
    command = f"{shlex.join([*LIVEACT, *generate(wav, tmp_path)])} {closed}"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, env=ONE_THREAD, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert num_frames(tmp_path / "video.mp4") == 20


@pytest.mark.slow
def test_a_reader_that_goes_away_loses_the_log_only(tmp_path: Path) -> None:
    sound = write_wav(tmp_path / "three.wav", speech(4.0))
    process = start(*generate(sound, tmp_path))
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("device: ")  # as `| head -1`
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
    assert num_frames(tmp_path / "video.mp4") == 80


@pytest.mark.slow
def test_what_only_prints_fails_where_it_cannot() -> None:
    with open("/dev/full", "w") as full:
        for command in ("doctor", "--help"):
            result = subprocess.run(
                [*LIVEACT, command], stdout=full, stderr=subprocess.PIPE, env=ONE_THREAD, text=True
            )
            expected = "liveact: standard output: cannot be written: No space left on device\n"
            assert (result.returncode, result.stderr) == (1, expected)
    process = start("doctor")
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr is not None
    assert (process.returncode, process.stderr.read()) == (1, "")
    process.stderr.close()


# ------------------------------------------------------------------- sizes, numbers and names


@pytest.mark.parametrize("text", ["416x720", "416X720", "416×720", "416*720"])
def test_ways_to_write_a_size(text: str) -> None:
    assert parse_size(text) == (416, 720)


@pytest.mark.parametrize(
    "text", ["４１６x７２０", "٤١٦x720", "416²x720", "416x", "416**720", "416 720"]
)
def test_digits_are_ascii(text: str) -> None:
    with pytest.raises(InputError, match=r"^size: expected WIDTHxHEIGHT such as 512x512, found '"):
        parse_size(text)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", "４２"), ("seed", "1_000"), ("fps", "２５"), ("fps", "2_5"), ("edit", "７:x"),
        ("audio_guidance", "１"), ("device", "cuda:１"), ("device", "cuda:" + "9" * 20),
        ("vae_device", "cuda:" + "9" * 5_000),
    ],
    ids=lambda value: f"{value!a:.16}",
)  # fmt: skip
def test_odd_numbers_are_one_line(
    run: Run, tmp_path: Path, wav: Path, option: str, value: str
) -> None:
    refused(run(*generate(wav, tmp_path, **{option: value})), "expected .*, found")


@pytest.mark.parametrize(
    "option", ["image", "audio", "checkpoint", "wav2vec", "out", "trace", "precision"]
)
def test_names_that_are_too_long_are_one_line(
    run: Run, tmp_path: Path, wav: Path, option: str
) -> None:
    name = "x" * 300 + ".mp4"
    path = name if option == "precision" else tmp_path / name
    refused(run(*generate(wav, tmp_path, **{option: path})), f"x{{80}}.*|{option}")
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_that_there_can_be(run: Run, tmp_path: Path, wav: Path) -> None:
    for name in ("x" * 251 + ".mp4", "ö" * 125 + ".mp4", "\N{GRINNING FACE}" * 62 + ".mp4"):
        assert run(*generate(wav, tmp_path, out=tmp_path / name))[0] == 0
        assert [p.name for p in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()


def test_long_names_of_other_commands(run: Run, tmp_path: Path) -> None:
    name = "x" * 300
    refused(run("inspect", tmp_path / name), name)
    refused(run("convert", demo_checkpoint(), "--out", tmp_path / name), name)
    refused(run("calibrate", demo_checkpoint(), "--out", tmp_path / name), name)


# ------------------------------------------------------------------------------- containers


@pytest.mark.parametrize("suffix", [".mp4", ".m4v", ".mov", ".mkv", ".MP4"])
def test_the_name_chooses_the_container(run: Run, tmp_path: Path, wav: Path, suffix: str) -> None:
    out = tmp_path / f"film{suffix}"
    code, _, errors = run(*generate(wav, tmp_path, out=out))
    assert (code, errors) == (0, "")
    brand = {".mkv": b"\x1a\x45\xdf\xa3", ".mov": b"ftypqt  "}.get(suffix, b"ftypisom")
    assert out.read_bytes()[:12].endswith(brand) or out.read_bytes()[:4] == brand
    with av.open(str(out)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        times = [float(f.pts * f.time_base) for f in container.decode(video)]
    tolerance = 0.0005 if suffix == ".mkv" else 1e-9  # Matroska counts milliseconds
    assert times == [pytest.approx(i / 20, abs=tolerance) for i in range(20)]


@pytest.mark.parametrize("name", ["film.webm", "film.avi", "film", "film.mp4.txt", ".mp4", "film."])
def test_other_names_are_refused_before_anything_is_loaded(
    run: Run, tmp_path: Path, wav: Path, name: str
) -> None:
    answer = run(*generate(wav, tmp_path, out=tmp_path / name, checkpoint=tmp_path / "none"))
    refused(answer, rf"{name}: expected a film in {', '.join(CONTAINERS)}, found ")
    with pytest.raises(InputError, match="expected a film in"):
        Mp4Writer(tmp_path / name, 32, 32, 20, 48_000, 1)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- what an output may replace


@pytest.fixture(params=["device", "pipe", "socket", "directory", "link to a device"])
def no_file(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """Something that must not be replaced, and what it is called."""
    path = tmp_path / "there.mp4"
    kind: str = request.param
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # its name may be short only
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "directory":
        path.mkdir()
    else:
        # One of our own: were this broken, root would lose the machine's.
        device = path if kind == "device" else tmp_path / "null"
        try:
            os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root can make a device, and nobody else could replace one")
        if device != path:
            path.symlink_to(device)
    return path, kind.rpartition(" ")[2]


def test_what_is_no_file_is_not_replaced(
    run: Run, tmp_path: Path, wav: Path, no_file: tuple[Path, str]
) -> None:
    path, kind = no_file
    before = path.lstat()
    expected = rf"{path}: cannot be written: expected a file, found a {kind}$"
    none = tmp_path / "none"
    for option in ("out", "trace"):
        refused(run(*generate(wav, tmp_path, checkpoint=none, **{option: path})), expected)
    inputs = PORTRAIT  # not looked at
    refused(
        run("replay", "--part=dit", f"--checkpoint={none}", f"--inputs={inputs}", f"--out={path}"),
        expected,
    )
    refused(run("calibrate", none, f"--out={path}"), expected)
    with pytest.raises(InputError, match=expected), whole_file(path):
        pass
    with pytest.raises(InputError, match=expected):
        Mp4Writer(path, 32, 32, 20, 48_000, 1)
    after = path.lstat()
    assert (after.st_ino, stat.S_IFMT(after.st_mode)) == (
        before.st_ino,
        stat.S_IFMT(before.st_mode),
    )


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_followed(run: Run, tmp_path: Path, wav: Path, dangling: bool) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    links = {}
    for option in ("out", "trace"):
        target = folder / f"{option}.mp4"
        if not dangling:
            target.write_text("older")
        links[option] = tmp_path / f"{option}.mp4"
        links[option].symlink_to(Path("elsewhere") / target.name)
    code, _, errors = run(*generate(wav, tmp_path, **links))
    assert (code, errors) == (0, "")
    assert num_frames(folder / "out.mp4") == 20
    assert (folder / "trace.mp4").read_text().startswith("[")
    assert all(link.is_symlink() for link in links.values())
    assert len(list(folder.iterdir())) == len(list(tmp_path.glob("*.mp4"))) == 2
    with whole_file(links["out"]) as partial:
        partial.write_text("newer")
    assert links["out"].is_symlink() and (folder / "out.mp4").read_text() == "newer"


def test_links_that_lead_nowhere_good(run: Run, tmp_path: Path, wav: Path) -> None:
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "lost.mp4").symlink_to("none/film.mp4")
    (tmp_path / "sound.mp4").symlink_to(wav)
    for name, expected in (
        ("loop.mp4", "expected a file, found Too many levels of symbolic links"),
        ("lost.mp4", "expected the directory .*/none to exist"),
        ("sound.mp4", "expected a file of its own, found that of another option"),
    ):
        refused(run(*generate(wav, tmp_path, out=tmp_path / name)), f"{name}: .*{expected}")
    assert output_target(tmp_path / "lost.mp4") == tmp_path / "none" / "film.mp4"


def test_film_and_trace_in_one_file(run: Run, tmp_path: Path, wav: Path) -> None:
    path = tmp_path / "a.mp4"
    refused(run(*generate(wav, tmp_path, out=path, trace=path)), "a file of its own")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ long prompts


def test_a_prompt_that_is_cut_is_said(
    run: Run, tmp_path: Path, wav: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, output, errors = run(*generate(wav, tmp_path, prompt="word " * 2_000))
    assert (code, errors) == (0, "")
    (line,) = [line for line in output.splitlines() if line.startswith("prompt: ")]
    (record,) = caplog.records
    assert record.getMessage() == line
    assert (record.name, record.levelno) == ("liveact", logging.WARNING)
    found, used = (int(word) for word in line.split() if word.isdecimal())
    assert line == f"prompt: {found} tokens, the first {used} are used"
    assert found > used
    assert "prompt: " not in run(*generate(wav, tmp_path))[1]


# --------------------------------------------------------------------------- help and version


def test_every_example_of_the_help_can_be_run(run: Run) -> None:
    code, output, errors = run("--help")
    assert (code, errors) == (0, "")
    examples = output.partition("examples:")[2].replace("\\\n", " ").strip().splitlines()
    parser = cli.parser()
    # What is not a command of ours asks one for something: cmake … $(liveact sdk).
    ours = [re.sub(r".*\$\((.*)\)", r"\1", line) for line in examples]
    commands = [parser.parse_args(shlex.split(line)[1:]).command for line in ours]
    assert commands == [
        "generate",
        "demo",
        "serve",
        "replay",
        "demo-checkpoint",
        "inspect",
        "convert",
        "calibrate",
        "doctor",
        "sdk",
    ]
    for command, example in zip(commands, examples, strict=True):
        code, output, _ = run(command, "--help")
        assert code == 0
        text = output.partition("example:")[2].replace("\\\n", " ")
        assert shlex.split(text) == shlex.split(example)


def test_the_version_is_told_at_once() -> None:
    script = "import sys; from liveact.commands.cli import main; code = main(['--version']);"
    result = subprocess.run(
        [sys.executable, "-c", script + "print(code, 'torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert result.stdout.split("\n")[:2] == [f"liveact {version('liveact-engine')}", "0 False"]
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*LIVEACT, "--version"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3  # of the processor: the machine may be busy with something else


# ------------------------------------------------------------------------------- the report


def test_line_and_table_say_the_same_of_real_time(run: Run, tmp_path: Path) -> None:
    sound = write_wav(tmp_path / "in.wav", speech(4.0))
    _, output, _ = run(*generate(sound, tmp_path))
    in_lines = [line.split()[-3] for line in output.splitlines() if line.startswith("block ")]
    in_table = [line.split("│")[6].strip() for line in output.splitlines() if line.startswith("│")]
    assert in_lines == [f"{value}x" for value in in_table] and len(in_lines) == 3


def test_more_times_real_time_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 frames at 20 fps play for 1.6 s."""
    monkeypatch.setattr("liveact.commands.report.time.perf_counter", lambda: 10.8)
    frames, timings = (
        np.zeros((32, 8, 8, 3), np.uint8),
        BlockTimings(wait_ms=0, audio_ms=0, denoise_ms=0, step_ms=()),
    )
    chunk = Chunk(frames, np.zeros((0, 1)), 48_000, 0.0, 0, True, timings=ChunkTimings(0, timings))
    rows: list[BlockRow] = []
    stream = io.StringIO()
    Report(stream, 1, started_s=10.0).add(chunk, Fraction(20), rows)
    assert [row.real_time for row in rows] == [pytest.approx(2.0)]
    assert stream.getvalue().endswith("2.00x real time\n")
    assert table(rows).columns[5].header == "x real time"
