"""The stages of benchmarks/gpu.sh: each in a process and with a time limit of its own.

    python3 -m benchmarks.stages OUT first|second

Needs nothing but the standard library, so that a machine which lacks a package says so in the stage
that wants it. OUT gets, anew after every stage, summary.txt (a line a stage) and results.tar.gz:
that, NAME.txt (everything printed) and NAME.json (of a benchmark).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.headline import GLUON, headline

REPOSITORY = Path(__file__).resolve().parent.parent
BUDGET_S = {"first": 480, "second": 560}
VERDICT_LETTERS = 160
KILL_S = 10  # from a polite end to a forced one


@dataclass(frozen=True)
class Stage:
    """name: of its files. limit_s: it is ended then. needed: nothing after it means anything
    without it. after: a stage that must have been ok, or this one is left out. gpus: it needs that
    many; left out where there are fewer. {out} and {python} in the command are filled in."""

    name: str
    limit_s: int
    command: str
    needed: bool = False
    after: str | None = None
    gpus: int = 1


def _pytest(selection: str) -> str:
    return f"{{python}} -m pytest -m gpu -rsfE -p no:cacheprovider --tb=short {selection}"


def _bench(name: str, options: str, file: str | None = None, device: str = "cuda:0") -> str:
    json = f"{{out}}/{file or name}.json"
    return f"{{python}} -m benchmarks {name} --device {device} --json {json} {options}"


# Kernels that come along are used as they are. Without the Gluon kernel at first: it may hang, and
# would do so in every stage that opens a stream.
_KERNELS = (
    "mkdir -p engine/liveact/gpu && { [ ! -d pack/kernels ] || cp -r pack/kernels/. "
    "engine/liveact/gpu/; } && {python} -m triton_kernels.compile --arch sm_90a "
    "--out engine/liveact/gpu"
)
_MODEL = "--random-weights released --size 512x512 --precision fp8"
_LATENTS = "--latents {out}/block.safetensors"
_SETUP = (
    Stage(
        "install",
        60,
        # What is there stays, but for a setuptools that is too old to build with.
        "for wheel in pack/wheels/*.whl; do name=$(basename $wheel); name=${name%%-*}; "
        "{python} -c \"import $name as m; assert '$name' != 'setuptools' or "
        "int(m.__version__.split('.')[0]) >= 77\" 2>/dev/null || "
        "{python} -m pip install --quiet --no-index --no-deps --disable-pip-version-check "
        "--upgrade $wheel || exit 1; done; echo installed",
        needed=True,
    ),
    Stage(
        "build",
        150,
        f"({_KERNELS} --leave-out {GLUON}) & kernels=$!; {{python}} -m pip install --quiet "
        "--disable-pip-version-check --no-build-isolation --no-deps --editable . || exit 1; "
        "wait $kernels && echo built",
        needed=True,
    ),
    Stage("doctor", 30, "{python} -m liveact doctor"),
)
# Both GPUs denoise: is it correct, what does a block take, what a session.
_PAIR = "cuda:0,cuda:1"
_TWO = (
    Stage("two_recorded", 60, _pytest("tests/gpu/test_gpu_two.py"), gpus=2),
    Stage("block_two", 120, _bench("block", f"{_MODEL} --repeat 5", "block_two", _PAIR), gpus=2),
    Stage(
        "session_two",
        60,
        _bench("session", f"{_MODEL} --minutes 0.3 --pace off", "session_two", _PAIR),
        gpus=2,
    ),
)
_VAE_TESTS = " ".join(
    f"tests/gpu/test_gpu_vae.py::{name}"
    for name in ("test_decodes_as_recorded", "test_encodes_as_recorded", "test_conv_epilogue")
)
_GLUON = Stage(
    "gluon", 90, _pytest("tests/kernels/attention/test_attention_gpu.py -k 'hopper or two_fp8'")
)
FIRST = (
    *_SETUP,
    # Without one of the kinds of product no stream opens.
    Stage("products", 60, _pytest("tests/gpu/test_gpu_products.py -k 'real_sizes or 41'")),
    Stage(
        "recorded",
        90,
        _pytest(
            "tests/gpu/test_gpu.py::test_recorded_dit "
            f"tests/gpu/test_gpu.py::test_graphs_change_nothing {_VAE_TESTS}"
        ),
    ),
    Stage(
        "attention",
        90,
        _pytest("tests/kernels/attention/test_attention_gpu.py -k 'not hopper and not two_fp8'"),
    ),
    Stage(
        "attention_time",
        45,
        "{python} -m tests.support.kernels.attention_gpu self_attention.f8 self_attention.bf16",
    ),
    Stage("block", 120, _bench("block", f"{_MODEL} --repeat 5 {_LATENTS}")),
    Stage(
        "linears",
        60,
        _bench("kernels", "--only linear --no-compile --repeat 5 --check", "linears"),
    ),
    Stage("vae", 60, _bench("vae", "--endurance-blocks 5")),
    # A kernel that hangs may take the GPU along; a wrong one would be chosen where it is fast.
    _GLUON,
    Stage(
        "gluon_time",
        45,
        f"{{python}} -m tests.support.kernels.attention_gpu {GLUON}",
        after="gluon",
    ),
    Stage("gluon_package", 60, _KERNELS, after="gluon"),
    Stage(
        "block_gluon",
        100,
        _bench("block", f"{_MODEL} --repeat 5", "block_gluon"),
        after="gluon_package",
    ),
    Stage("session", 60, _bench("session", f"{_MODEL} --minutes 0.3 --pace off")),
    *_TWO,
)
SECOND = (
    *_SETUP,
    _GLUON,
    Stage("gluon_package", 60, _KERNELS, after="gluon"),
    Stage("block", 120, _bench("block", f"{_MODEL} --repeat 9 {_LATENTS}")),
    *(
        Stage(
            f"plain_{variant}",
            120,
            _bench(
                "plain",
                f"{_MODEL} --repeat 2 --variant {variant} {_LATENTS}",
                f"plain_{variant}",
            ),
        )
        for variant in ("plain", "fp8")
    ),
    Stage(
        "kernels",
        150,
        _bench("kernels", "--no-compile --repeat 5 --check --plot {out}/roofline.png"),
    ),
    Stage(
        "paper", 120, _bench("paper", f"{_MODEL} --repeat 3 --blocks 20 --plot {{out}}/scaling.png")
    ),
    Stage("live", 60, _bench("session", f"{_MODEL} --minutes 0.4", "live")),
    Stage("tests", 120, _pytest("tests/gpu -k 'not thousand and not sanitizer'")),
    Stage(
        "plain_compile",
        150,
        _bench("plain", f"{_MODEL} --repeat 2 --variant compile", "plain_compile"),
    ),
    Stage("sanitizer", 120, _pytest("tests/gpu/test_gpu.py::test_compute_sanitizer")),
)
WINDOWS = {"first": FIRST, "second": SECOND}


def count_gpus() -> int:
    """As the driver's own tool lists them; 0 without it."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def run(stage: Stage, out: Path, limit_s: float) -> tuple[int, float]:
    """(exit status, seconds); 124 where it was ended, with everything that it started."""
    command = stage.command.replace("{out}", str(out)).replace("{python}", "python3")
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "CUBLASLT_LOG_LEVEL": "1"}
    start = time.monotonic()
    with (out / f"{stage.name}.txt").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = 124
            for sent in (signal.SIGINT, signal.SIGKILL):
                try:
                    os.killpg(process.pid, sent)
                    process.wait(KILL_S)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it left behind
    return status, time.monotonic() - start


def verdict(stage: Stage, out: Path, status: int, limit_s: float) -> str:
    """What it found, in one line."""
    lines = (out / f"{stage.name}.txt").read_text(errors="replace").splitlines()
    lines = [line.strip() for line in lines if re.search(r"\w", line)]
    last = lines[-1] if lines else "printed nothing"
    if status == 124:
        return f"ended after {limit_s:.0f} s; {last}"
    file = out / f"{stage.name}.json"
    if file.exists():
        return headline(file) + ("" if status == 0 else f"; {last}")
    if " pytest " in stage.command:
        return _tests(lines, last)
    found = [line for line in lines if "TFLOP/s" in line or "ms per block" in line]
    return "; ".join([*found, *([last] if status or not found else [])])


def _tests(lines: list[str], last: str) -> str:
    """What pytest counted, then the first failure or what was skipped most."""
    failures = [line for line in lines if re.match(r"FAILED|ERROR", line)]
    skips = [m for line in lines if (m := re.match(r"SKIPPED \[(\d+)\] \S+ (.*)", line))]
    most = max(skips, key=lambda m: int(m[1]), default=None)
    said = failures[:1] or ([] if most is None else [most[2]])
    return "; ".join([last.strip("= "), *said])


def state_of(stage: Stage, out: Path, status: int) -> str:
    """One word or two. Tests that were all skipped have shown nothing."""
    if status != 0:
        return f"exit {status}"
    text = (out / f"{stage.name}.txt").read_text(errors="replace")
    return "ok" if " pytest " not in stage.command or " passed" in text else "no test"


def pack(found: Path, out: Path) -> None:
    """OUT/results.tar.gz of the files in a folder, whole or not at all."""
    part = out / "results.tar.gz.part"
    with tarfile.open(part, "w:gz") as tar:
        for path in sorted(found.iterdir()):
            if path.suffix != ".safetensors":
                tar.add(path, path.name)
    part.rename(out / "results.tar.gz")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[1] not in WINDOWS:
        print("usage: benchmarks/gpu.sh OUT first|second", file=sys.stderr)
        return 2
    out, window = Path(arguments[0]).resolve(), arguments[1]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="liveact-stages-") as folder:
        return _run_window(window, Path(folder), out)


def _run_window(window: str, found: Path, out: Path) -> int:
    """found: where the stages leave what they find. 0 if every stage was ok."""
    budget_s, start = BUDGET_S[window], time.monotonic()
    rows, states, stopped, gpus = [], dict[str, str](), "", count_gpus()
    for stage in WINDOWS[window]:
        left_s = budget_s - (time.monotonic() - start)
        limit_s, seconds = min(stage.limit_s, left_s), ""
        if stage.gpus > max(gpus, 1):
            state, said = "left out", f"needs {stage.gpus} GPUs, found {gpus}"
        elif stage.after is not None and states[stage.after] != "ok":
            state, said = "left out", f"after {stage.after} only"
        elif stopped or limit_s < 5:
            state, said = "skipped", stopped or f"no time: {left_s:.0f} s left of {budget_s}"
        else:
            status, took_s = run(stage, found, limit_s)
            state, seconds = state_of(stage, found, status), f"{took_s:.0f}s"
            said = verdict(stage, found, status, limit_s)[:VERDICT_LETTERS]
            if status != 0 and stage.needed:
                stopped = f"nothing without {stage.name}"
        states[stage.name] = state
        rows.append(f"{stage.name:<15} {seconds:>5} {state:<8} {said}")
        print(rows[-1], flush=True)
        for folder in (found, out):
            (folder / "summary.txt").write_text("\n".join(rows) + "\n")
        pack(found, out)
    print(f"\n{window}: {time.monotonic() - start:.0f} s of {budget_s}; {out}/results.tar.gz\n")
    print("\n".join(rows))
    return int(not {"ok", "left out"} >= set(states.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
