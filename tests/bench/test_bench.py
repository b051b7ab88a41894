"""The benchmark harness itself: numbers that are known, results that are complete, refusals."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    block,
    conversation,
    flops,
    kernel_ops,
    kernels,
    models,
    op_groups,
    peaks,
    schema,
    session,
)
from benchmarks.kernel_cases import CASES, MATRIX_CASES
from benchmarks.kernel_ops import TOLERANCE
from benchmarks.machine import weights_hash
from benchmarks.peers import open_peers
from benchmarks.playback import Arrival
from benchmarks.telemetry import FIELDS as GPU_FIELDS
from benchmarks.telemetry import Telemetry
from benchmarks.timing import Clock
from liveact import _core, _core_dev
from liveact.dit.dit import MemoryPolicy
from liveact.dit.weights import product_weights
from liveact.errors import DeviceError, InputError, LiveActError
from liveact.session.chunk import BlockTimings
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--device", "cpu", "--random-weights", "tiny", "--size", "32x32", "--repeat", "1"]


# ---------------------------------------------------------------------------- schema, stamp


def test_schema_names_what_is_wrong() -> None:
    fields = {"a": {"b": [float]}, "c": (str, type(None))}
    schema.check({"a": {"b": [1, 2.5]}, "c": None, "more": object()}, fields)
    for value, message in (
        ({"a": {}, "c": None}, r"result\.a\.b: expected a value, found 'none'"),
        ({"a": {"b": [1.0, "x"]}, "c": None}, r"result\.a\.b\[1\]: expected float, found 'x'"),
        ({"a": {"b": [True]}, "c": ""}, r"result\.a\.b\[0\]: expected float, found True"),
        ({"a": {"b": []}, "c": 3}, r"result\.c: expected str or NoneType, found 3"),
        ({"a": [], "c": ""}, r"result\.a: expected an object"),
    ):
        with pytest.raises(LiveActError, match=message):
            schema.check(value, fields)
    with pytest.raises(LiveActError, match="finite"):
        schema.to_json({"x": float("nan")})


def test_weights_hash_sees_every_tensor() -> None:
    one = {"a": torch.zeros(3), "b": torch.ones(2, 2).bfloat16()}
    other = {"a": torch.zeros(3), "b": torch.tensor([[1.0, 1.0], [1.0, 2.0]]).bfloat16()}
    assert weights_hash(one) == weights_hash(dict(reversed(one.items())))
    assert len({weights_hash(w) for w in (one, other, {"a": one["a"]})}) == 3


class FakeNvml:
    """Two GPUs' worth of nothing; the clock falls while it is looked at."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.sm_mhz = 1980

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        self.sm_mhz -= 100 if clock == self.NVML_CLOCK_SM else 0
        return self.sm_mhz if clock == self.NVML_CLOCK_SM else 2619

    def __getattr__(self, name: str) -> Any:
        values = {
            "nvmlDeviceGetPowerUsage": 650_000,
            "nvmlDeviceGetTemperature": 61,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x5,  # idle, power cap
            "nvmlDeviceGetName": b"NVIDIA H200",
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": 1980,
        }
        return lambda *_: values[name]


def test_telemetry() -> None:
    with Telemetry("cuda:1", FakeNvml()) as telemetry:
        pass
    found = telemetry.summary()
    schema.check(found, GPU_FIELDS)
    assert found["throttle_reasons"] == {"power cap": 1.0}
    assert found["sm_mhz"]["n"] >= 2 and found["sm_mhz"]["max"] == 1880
    assert (found["power_cap_w"], found["power_w"]["median"]) == (700.0, 650.0)
    with Telemetry("cpu") as telemetry:
        pass
    assert telemetry.summary() == {"missing": "the device is the CPU"}


def test_datasheet_is_found_by_name() -> None:
    sheet = peaks.datasheet("NVIDIA H200")
    assert sheet is not None and sheet["tb_per_s"] == 4.8
    assert peaks.datasheet("NVIDIA H100 80GB HBM3") != sheet
    assert peaks.datasheet("Voodoo 2") is None


# ---------------------------------------------------------------------------- kernels


def test_share_of_the_roofline() -> None:
    peak = {"tflops": {"bf16": 800.0, "fp8": 1600.0}, "tb_per_s": 4.0}
    peak["datasheet"] = peaks.DATASHEET["H200"]
    # 1.6 TFLOP of fp8 take 1 ms at the measured rate, 4 MB take 1 µs.
    found = kernels.rates(1_600_000_000_000, 4_000_000, "fp8", 2.0, peak)
    assert found["bound_by"] == "products"
    assert found["share_measured"] == pytest.approx(0.5)
    assert found["share_datasheet"] == pytest.approx(1600 / 1979 / 2)
    assert found["tflops"] == pytest.approx(800)
    found = kernels.rates(0, 4_000_000_000, "bf16", 2.0, peak)
    assert (found["bound_by"], found["share_measured"]) == ("memory", pytest.approx(0.5))


def test_every_op_has_a_row_on_a_gpu() -> None:
    ops = {case.op for case, _ in kernels.selected(True, "")}
    # A kernel that is no op by itself: the second half of a gated bf16 product.
    assert {case.op for case in (*CASES, *MATRIX_CASES)} - ops == {"apply_epilogue"}
    assert {fmt for case, fmt in kernels.selected(True, "self_attention")} == {"fp8", "bf16"}


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
def test_results_agree_with_torch(fmt: str) -> None:
    """The CPU ops in each format on one case of each; the tolerance is the format's."""
    devices = SimpleNamespace(core=_core.open_cpu())
    seen = set()
    for case in (*MATRIX_CASES, *CASES):
        if case.group != "correctness" or case.op not in kernels.BUILDERS or case.op in seen:
            continue
        if fmt == "fp8" and case.op not in kernels._FP8_OPS:
            continue
        seen.add(case.op)
        prepared = kernels.BUILDERS[case.op](case, fmt, torch.device("cpu"))
        if prepared.reference is not None:
            error, against = kernels.compare(prepared, case, fmt, devices)
            assert against == "torch" and error <= TOLERANCE[prepared.fmt], case.name
    assert len(seen) == (7 if fmt == "fp8" else 17)


def test_a_wrong_result_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One op is wrong and one does not run: both are named, what was measured is written."""
    right = kernels.BUILDERS["layer_norm"]

    def wrong(*given: Any) -> Any:
        prepared = right(*given)
        reference = prepared.reference
        prepared.reference = lambda: 1.001 * reference()
        return prepared

    def broken(*given: Any) -> Any:
        raise DeviceError("no such kernel")

    monkeypatch.setitem(kernels.BUILDERS, "layer_norm", wrong)
    monkeypatch.setitem(kernels.BUILDERS, "rms_norm", broken)
    file = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--only", "norm.rows13", "--repeat", "1", "--check"]
    assert command.main(["kernels", *arguments, "--json", str(file)]) == 1
    failures = json.loads(file.read_text())["failures"]
    assert failures["rms_norm.rows13.cols256.random.fp32"] == "no such kernel"
    # 1.001 is seen in fp32; in fp8 it is far below what the format explains.
    name = "layer_norm.rows13.cols256.random.fp32"
    assert "within 7.6e-06 of those of torch, found 1.0e-03" in failures[name]
    assert len(failures) == 2
    assert "2 of the cases failed" in capsys.readouterr().err


def test_missing_peers_are_named() -> None:
    def absent() -> Any:
        import no_such_package  # noqa: F401

    calls, missing = open_peers([("here", lambda: lambda: 1), ("elsewhere", absent)])
    assert list(calls) == ["here"]
    assert missing == {"elsewhere": "ModuleNotFoundError: No module named 'no_such_package'"}


def test_timed_device() -> None:
    """Every op of a call, as often as asked for; results are those of the device behind it."""
    timed = _core_dev.TimedDevice(_core.open_cpu(), 1 << 16, samples=3, warm=True)
    x = np.ones((2, 64), np.float32)
    plain = _core_dev.ops.activate(_core.open_cpu(), x, "relu", "fp32")
    assert np.array_equal(_core_dev.ops.activate(timed, x, "relu", "fp32"), plain)
    log = timed.take()
    assert [name for name, _ in log] == ["activate"] * 3 and all(ms >= 0 for _, ms in log)
    assert timed.take() == []
    with pytest.raises(InputError, match="expected samples >= 1"):
        _core_dev.TimedDevice(_core.open_cpu(), 0, samples=0)


def options_for(*arguments: str) -> argparse.Namespace:
    return command.parse([*arguments])


def test_op_groups_are_the_ops_of_a_block() -> None:
    """Counts for the model's own two layers follow from models of one and two: 3 steps × 2 layers,
    audio in 2 of 3 steps."""
    loaded = models.load(options_for("block", *TINY))
    calls = {g.op: g.calls for g in op_groups.measure(loaded, MemoryPolicy())}
    assert calls["self_attention"] == calls["update_memory"] == calls["split_qkv"] == 6
    assert calls["audio_attention"] == 4
    assert calls["patchify"] == calls["sampler_step"] == 3 and calls["all_finite"] == 1
    assert calls["linear 768x256"] == 6  # qkv


def test_weights_are_quantised_as_the_engine_does_it() -> None:
    """So that a model may be drawn in bf16, quantised on its device, and its bf16 dropped."""
    sized = models.MODELS["tiny"]
    drawn = models.draw(sized, 0, torch.device("cpu"))
    before = dict(drawn)
    models.quantise(drawn, sized.config["num_layers"], "fp8")
    narrow = [name for name, t in drawn.items() if t.dtype == torch.float8_e4m3fn]
    assert set(narrow) == set(product_weights(sized.config["num_layers"]))
    for name in narrow:
        codes, scale = _core.quantize_weight(
            before[name].data_ptr(), "bf16", list(before[name].shape)
        )
        found = drawn[name].view(torch.uint8).numpy()
        assert (found == codes).mean() > 0.999, name  # x / scale or x · (1 / scale): a last bit
        np.testing.assert_allclose(drawn[f"{name}_scale"].numpy(), scale, rtol=2**-23)
    dit = models.Dit(_core.open_cpu(), models.core_config(sized.config, sized), drawn, "fp8")
    assert dit.config.dim == sized.config["dim"]


def test_plain_has_the_blocks_of_the_engine(tmp_path: Path) -> None:
    """The engine alone leaves its latents; plain PyTorch in a process of its own compares them."""
    loaded = models.load(options_for("block", *TINY))
    latents, file = tmp_path / "block.safetensors", tmp_path / "plain.json"
    engine = block.alone(loaded, 1, Clock(torch.device("cpu")), latents)
    assert engine["baselines"] == [] and engine["ratio_to_plain_torch"] is None
    arguments = [*TINY, "--latents", str(latents), "--json", str(file)]
    assert command.main(["plain", *arguments]) == 0
    assert json.loads(file.read_text())["relative_difference"] < 1e-5


@pytest.mark.parametrize("without", [False, True])
def test_compiled_peers_may_be_left_out(monkeypatch: pytest.MonkeyPatch, without: bool) -> None:
    """They take seconds each."""
    seen: list[str] = []

    def prepare(*given: Any) -> kernels.Prepared:
        prepared = kernel_ops.row_op(*given)
        prepared.peers.append(("torch.compile", lambda: lambda: None))
        return prepared

    def opened(given: list[Any]) -> Any:
        seen.extend(name for name, _ in given)
        return {}, {}

    monkeypatch.setitem(kernels.BUILDERS, "rms_norm", prepare)
    monkeypatch.setattr(kernels, "open_peers", opened)
    given = ["kernels", "--device", "cpu", "--only", "rms_norm.rows13", "--repeat", "1"]
    kernels.measure(options_for(*given, *["--no-compile"] * without))
    assert ("torch.compile" in seen) is not without and "torch" in seen


def test_a_policy_file_is_a_precision(tmp_path: Path) -> None:
    """Also of the models of fewer layers that the times by op come from."""
    formats = {product: {"format": "fp8"} for product in _core.products()}
    mixed = formats | {"cross_kv": {"format": "bf16"}}
    policy = tmp_path / "mixed.json"
    policy.write_text(
        json.dumps(
            {"liveact_precision_policy": 1, "activations": "bf16", "layers": [formats, mixed]}
        )
    )
    loaded = models.load(options_for("block", *TINY, "--precision", str(policy)))
    assert "mixed.json" in loaded.described()["precision"]
    assert {g.op for g in op_groups.measure(loaded, MemoryPolicy())} >= {"self_attention"}


# ---------------------------------------------------------------------------- the commands


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kernels", ["--device", "cpu", "--only", "norm.rows13", "--repeat", "1", "--check"]),
        ("block", TINY),
        ("plain", TINY),
        ("session", [*TINY, "--pace", "off", "--minutes", "0.2"]),
        ("paper", [*TINY, "--blocks", "8"]),
        ("latency", [*TINY, "--moments", "1"]),
        ("conversation", [*TINY, "--minutes", "0.2"]),
        ("serve", ["--moments", "1", "--loads", "3"]),
        ("replicas", ["--sessions", "2", "--seconds", "2", "--size", "64x64"]),
    ],
)
def test_command(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs, prints, and writes a JSON (and a figure) that says everything it has to say."""
    file, figure = tmp_path / "result.json", tmp_path / "figure.png"
    if name in ("kernels", "paper"):
        arguments = [*arguments, "--plot", str(figure)]
    assert command.main([name, *arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    module = sys.modules[f"benchmarks.{name}"]
    schema.check(result, schema.FIELDS | module.FIELDS)
    assert result["benchmark"] == name and result["gpu"] is None
    assert figure.exists() == ("--plot" in arguments)
    printed = capsys.readouterr().out
    assert "not timed:" in printed
    if name == "block":
        assert result["ratio_to_plain_torch"] > 0 and result["relative_difference"] < 1e-5
        shape = flops.BlockShape(4, prompt_tokens=models.PROMPT_TOKENS)
        expected = flops.engine_block(models.MODELS["tiny"].config, shape, 4 * 48)
        assert result["tflop_per_frame"] == flops.tera_per_frame(expected)
    if name == "conversation":
        assert result["faults"] == [] and result["utterances"] > 0
        assert result["memory"]["flat"] is None
    if name == "latency":
        for pace in ("burst", "pace"):
            assert result["speech_to_frame_after_idle_s"][pace]["n"] == 1
        # A block waits for 1.6 s of sound.
        assert result["speech_to_frame_after_idle_s"]["pace"]["min"] > 1.6
        assert result["interruption_to_last_frame_s"]["burst"]["max"] < 0.5
    if name == "serve":
        assert result["refused_per_s"] > result["accepted_per_s"] > 0
        assert result["interrupt_to_silence_s"]["max"] < 1.4  # so much and more of it is left
    if name == "replicas":
        assert [row["replicas"] for row in result["replicas"]] == [1, 2]
        assert all(len(row["each"]) == 2 and min(row["each"]) > 0 for row in result["replicas"])
    if name == "session":
        assert result["blocks"] == 8  # ⌊12 s · 20 / 32⌋ + 1
        assert [p["buffer_s"] for p in result["playback"]] == [0.0, 0.5, 1.0, 2.0]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["kernels", "--device", "cpu", "--only", "nothing"], "only: expected part of the name"),
        (["session", "--device", "cpu", "--minutes", "0.1"], "minutes: expected more than 0.14"),
        (["block", "--device", "tpu"], "device: expected cpu or cuda:N, found 'tpu'"),
        (["block", "--device", "cpu", "--precision", "fp7"], "precision: expected fp32"),
    ):
        assert command.main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"benchmarks: {message}")
    for arguments in (["block", "--size", "100x100"], ["block", "--repeat", "0"]):
        with pytest.raises(SystemExit) as exit_:
            command.main(arguments)
        assert exit_.value.code == 2


def test_a_live_pace_is_that_of_the_clock() -> None:
    """0.2 s of speech take 0.2 s to push."""
    pushed: list[float] = []

    class Listener:
        def push_audio(self, pcm: Any, rate_hz: int, *, timeout_s: float | None) -> None:
            pushed.append(len(pcm) / rate_hz)

        def end_of_audio(self) -> None:
            pushed.append(-1.0)

    feeder = session.Feeder(Listener(), 0.2, True, 0)  # type: ignore[arg-type]
    feeder.start()
    feeder.join()
    assert time.perf_counter() - feeder.started_s >= 0.2
    assert pushed == [session.PIECE_S] * 10 + [-1.0]


def test_a_session_is_flat_and_a_leak_is_not() -> None:
    """What keeps one picture per block is seen."""
    size, picture = (64, 64), 3 * 64 * 64
    timings = BlockTimings(
        wait_ms=1.0,
        audio_ms=1.0,
        denoise_ms=1.0,
        step_ms=(1.0, 1.0, 1.0),
        decode_ms=1.0,
        overlap_ms=0.5,
    )
    for leak, flat in ((0, True), (picture, False)):
        recorder = session.Recorder(SimpleNamespace())  # type: ignore[arg-type]
        recorder.arrivals = [Arrival(1.6 * b, 1.6 * b, 1.6, b) for b in range(40)]
        recorder.timings = [timings] * 40
        recorder.rss_bytes = [10**8 + leak * b for b in range(40)]
        recorder.device_bytes = [10**6] * 40
        found = session.evaluate(recorder, None, size)
        assert found["memory"]["flat"] is flat
        assert found["frames_per_second"] == pytest.approx(20)
        assert found["overlap"] == 0.5


def said(kind: str, *heard: tuple[np.ndarray, int, bool]) -> str | None:
    """What is wrong with a second of sound of which this was heard."""
    pcm = np.linspace(0.1, 0.9, conversation.RATE_HZ, dtype=np.float32)[:, None]
    one = conversation.Said(pcm, 3 if kind == "interrupted" else None)
    for sound, frames, last in heard:
        chunk = SimpleNamespace(pcm=sound, frames=[None] * frames, last_of_utterance=last)
        one.take(chunk)  # type: ignore[arg-type]
    return one.fault()


def test_what_a_conversation_finds_wrong() -> None:
    pcm = np.linspace(0.1, 0.9, conversation.RATE_HZ, dtype=np.float32)[:, None]
    half = len(pcm) // 2
    assert said("whole", (pcm[:half], 10, False), (pcm[half:], 10, True)) is None
    assert said("interrupted", (pcm[:half], 10, False)) is None
    assert "10 frames of 20" in str(said("whole", (pcm[:half], 10, False)))
    assert "other sound" in str(said("whole", (pcm[half:], 10, False), (pcm[:half], 10, True)))
    assert "beside" in str(said("interrupted", (pcm[:half], 9, False)))
    padded = np.concatenate([pcm, np.zeros((2400, 1), np.float32)])
    assert said("whole", (padded, 23, True)) is None
    assert "24 frames of 20" in str(said("whole", (np.pad(pcm, ((0, 3200), (0, 0))), 24, True)))


@pytest.mark.slow
def test_module_runs() -> None:
    """`python -m benchmarks --help` names every benchmark."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    for name in command.BENCHMARKS:
        assert name in done.stdout
