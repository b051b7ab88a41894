"""The launch path of the CUDA backend without a GPU: against a driver that records every call."""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path

import pytest
import torch

from liveact import _core
from liveact.device import kernels
from liveact.dit.dit import Dit, MemoryPolicy
from liveact.errors import DeviceError, LiveActError
from tests.support.builds import NVIDIA_HEADERS
from tests.support.cuda.blocks import (
    LATENT,
    NUM_LAYERS,
    calls,
    denoise,
    launched,
    open_device,
    open_stream,
)
from tests.support.cuda.fake import KERNEL_MS, FakeCuda
from tests.support.cuda.small import core_config, random_weights
from tests.support.paths import REPOSITORY


def test_declarations_agree_with_the_real_headers() -> None:
    include = NVIDIA_HEADERS
    if not (include / "cublasLt.h").exists():
        pytest.skip(f"the nvidia-cublas package is not installed: expected {include}/cublasLt.h")
    source = REPOSITORY / "tests" / "support" / "cuda" / "check_declarations.cpp"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-I", str(REPOSITORY / "csrc")]
    command += ["-I", str(REPOSITORY / "include")]
    command += ["-isystem", str(include / "cccl"), "-isystem", str(include), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_steady_block_is_three_graphs(fake, images, weights, precision: str) -> None:
    """Blocks 0 and 1 run as they are, block 2 is captured, later ones launch a graph per step."""
    stream = open_stream(open_device(fake, images), weights, precision)
    logs = []
    for _ in range(5):
        fake.clear()
        denoise(stream)
        logs.append(fake.log())
    counts = [calls(log) for log in logs]
    assert [c["cuStreamBeginCapture"] for c in counts] == [0, 0, 3, 0, 0]
    assert [c["cuGraphLaunch"] for c in counts] == [0, 0, 3, 3, 3]
    assert counts[3] == counts[4]
    assert sum(c["cuMemAlloc"] for c in counts) == 0, "denoise must not allocate"
    # It may wait for the uploads before the steps, and for the check and the result after them.
    steps = [line.split()[0] for line in logs[3]]
    first, last = steps.index("cuGraphLaunch"), len(steps) - steps[::-1].index("cuGraphLaunch")
    assert "cuStreamSynchronize" not in steps[first:last], "a wait inside the block"


def test_timings_are_those_of_the_device(fake, images, weights) -> None:
    """Events around the parts of a block, made when the stream opens, read after its last wait."""
    stream = open_stream(open_device(fake, images), weights)
    for block in range(4):
        fake.clear()
        denoise(stream)
        # Kernels between two events, in order; a graph's are those that its capture recorded.
        kernels, parts = 0, []
        for line in fake.log():
            kernels += line.startswith("cuLaunchKernel ")
            if line.startswith("cuEventRecord"):
                parts.append(kernels)
                kernels = 0
        if block < 3:
            eager = parts
        assert len(parts) == 5, "before the block, after the conditioning and after each step"
        timings = stream.timings
        expected = [KERNEL_MS * n for n in eager[1:]]
        assert [timings["conditioning_ms"], *timings["step_ms"]] == expected, f"block {block}"
        waits = [i for i, x in enumerate(fake.log()) if x.startswith("cuStreamSynchronize")]
        reads = [i for i, x in enumerate(fake.log()) if x.startswith("cuEventElapsedTime")]
        assert len(reads) == 4
        assert waits[-1] < reads[0]
        assert calls(fake.log())["cuEventCreate"] == calls(fake.log())["cuEventSynchronize"] == 0


def test_a_new_prompt_records_anew(fake, images, weights) -> None:
    stream = open_stream(open_device(fake, images), weights)
    for _ in range(4):
        denoise(stream)
    stream.set_prompt(torch.randn(9, 64))
    fake.clear()
    denoise(stream)
    assert calls(fake.log())["cuStreamBeginCapture"] == 3


def test_products_are_row_scaled_fp8_with_the_residual_in_beta(fake, images, weights) -> None:
    fake.clear()
    stream = open_stream(open_device(fake, images), weights)
    opened = fake.log()
    denoise(stream)
    fake.clear()
    denoise(stream)
    log = fake.log()
    modes = [line for line in opened if line.startswith("cublasLtMatmulDescSetAttribute 3")]
    assert "cublasLtMatmulDescSetAttribute 31 3" in modes
    assert "cublasLtMatmulDescSetAttribute 32 3" in modes
    residuals = sum(line.startswith("cublasLtMatmul 1 1 |") for line in log)
    # self_o, cross_o and ffn_down at every step, audio_o at two, in both layers.
    assert residuals == 2 * (3 * 3 + 2)


def test_argument_order_and_grid(fake, images, manifest, weights) -> None:
    """One launch read back value by value."""
    stream = open_stream(open_device(fake, images), weights)
    denoise(stream)
    fake.clear()
    denoise(stream)
    line = next(x for x in fake.log() if x.startswith("cuLaunchKernel self_attention.f8.to_f8"))
    launch, values = line.split("|")
    grid = [int(n) for n in launch.split()[2:5]]
    numbers = values.split()[13:]
    tokens, heads, context, current = 8 * 12, 2, 6 * 12, 8 * 12
    expected_numbers = [tokens, tokens, heads, heads, context, current, 128, 128]
    assert [int(n) for n in numbers] == expected_numbers
    spec = next(i for i in manifest if i["name"] == "self_attention.f8.to_f8")
    arguments = dict(
        zip([p["name"] for p in spec["parameters"]][13:], map(int, numbers), strict=True)
    )
    expected = []
    for dimension in spec["grid"]:
        extent = 1
        for factor in dimension:
            extent *= (
                factor
                if isinstance(factor, int)
                else -(-arguments[factor["parameter"]] // factor["divisor"])
            )
        expected.append(extent)
    assert grid == expected


def test_attention_writes_what_its_projection_reads(fake, images, weights) -> None:
    """A steady block quantises nothing after attention; block 0 what self-attention wrote, whose
    scale it finds. Two layers, three steps, audio in two of them."""
    stream = open_stream(open_device(fake, images), weights)
    counts = []
    for _ in range(2):
        fake.clear()
        denoise(stream)
        counts.append(launched(fake.log()))
    first, steady = counts
    written = ("self_attention.f8.to_f8", "cross_attention.to_f8", "audio_attention.to_f8")
    assert [steady[name] for name in written] == [6, 6, 4]
    assert [first[name] for name in ("self_attention.f8", *written)] == [6, 0, 6, 4]
    quantised = [
        sum(n for k, n in c.items() if k.startswith("quantize") and k.endswith(".f8"))
        for c in counts
    ]
    assert quantised == [6, 0]
    # Of the audio's values in each layer; of V and of what block 0 mixed, in each layer and step.
    assert (first["value_scale"], steady["value_scale"]) == (2 + 6 + 6, 2)


def test_shared_memory_is_opted_into(fake, images, manifest) -> None:
    fake.clear()
    device = open_device(fake, images)
    wanted = {i["name"]: i["shared_bytes"] for i in manifest if i["shared_bytes"] > 48 * 1024}
    assert wanted, "at least attention needs more than the default"
    found = {}
    for line in fake.log():
        if line.startswith("cuFuncSetAttribute"):
            _, name, attribute, value = line.split()
            assert attribute == "8"  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            found[name] = int(value)
    assert found == wanted
    del device


@pytest.mark.parametrize(
    "call",
    [
        "cuDeviceGetCount",
        "cuDevicePrimaryCtxRetain",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuStreamCreateWithPriority",
    ],
)
def test_error_text_when_opening(fake, images, call: str) -> None:
    fake.fail(call, 999)
    with pytest.raises(DeviceError) as error:
        open_device(fake, images)
    assert "CUDA_ERROR_FAKE (999): a failure that the test asked for" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "blocks"),
    [
        ("cuLaunchKernel", 0),
        ("cublasLtMatmul", 0),
        ("cuMemcpyHtoDAsync", 0),
        ("cuMemcpyDtoHAsync", 0),
        ("cuStreamSynchronize", 0),
        ("cuStreamBeginCapture", 2),
        ("cuStreamEndCapture", 2),
        ("cuGraphInstantiate", 2),
        ("cuGraphLaunch", 3),
    ],
)
def test_error_in_a_block_fails_that_stream_only(fake, images, weights, call, blocks) -> None:
    device = open_device(fake, images)
    failing, other = open_stream(device, weights), open_stream(device, weights)
    for _ in range(blocks):
        denoise(failing)
        denoise(other)
    fake.fail(call, 999)
    with pytest.raises(LiveActError, match="a failure that the test asked for"):
        denoise(failing)
    with pytest.raises(LiveActError, match="failed before"):
        denoise(failing)
    denoise(other)


def test_a_recording_that_fails_is_ended_at_once(fake, images, weights) -> None:
    """Not when the stream is closed: an open capture fails every wait for the device."""
    stream = open_stream(open_device(fake, images), weights)
    for _ in range(2):
        denoise(stream)
    fake.clear()
    fake.fail("cuLaunchKernel self_attention.f8.to_f8", 999)
    with pytest.raises(LiveActError, match="a failure that the test asked for"):
        denoise(stream)
    log = calls(fake.log())
    assert log["cuStreamBeginCapture"] == log["cuStreamEndCapture"] == 1
    assert log["cuGraphLaunch"] == 0


def test_out_of_memory_says_how_much(fake, images, weights) -> None:
    device = open_device(fake, images)
    fake.fail("cuMemAlloc", 2)
    with pytest.raises(DeviceError, match=r"expected \d+ bytes of memory, found \d+ of \d+ free"):
        Dit(device, core_config(NUM_LAYERS), weights, "fp8")


def test_nothing_is_left_on_the_device(fake, images, weights) -> None:
    before, events = fake.live_allocations(), fake.live_events()
    device = open_device(fake, images)
    stream = open_stream(device, weights, guidance=1.5)
    for _ in range(4):
        denoise(stream)
    assert fake.live_allocations() > before
    del stream, device
    gc.collect()
    assert (fake.live_allocations(), fake.live_events()) == (before, events)


@pytest.mark.parametrize("call", ["cuStreamCreateWithPriority", "cuEventCreate", "cuMemAlloc"])
def test_a_stream_that_cannot_open_leaves_nothing(fake, images, weights, call: str) -> None:
    dit = Dit(open_device(fake, images), core_config(NUM_LAYERS), weights, "fp8")
    before = fake.live_allocations(), fake.live_events()
    fake.fail(call, 999)
    with pytest.raises(LiveActError, match=r"a failure that the test asked for|bytes of memory"):
        dit.open_stream(LATENT, MemoryPolicy(), 1.0, 4)
    assert (fake.live_allocations(), fake.live_events()) == before
    dit.open_stream(LATENT, MemoryPolicy(), 1.0, 4)


def test_a_segment_beyond_32_bits_is_refused(fake, images) -> None:
    """Sizes from which a kernel's offsets would wrap; checked when a stream opens."""
    dit = Dit(open_device(fake, images), core_config(1), random_weights(1), "fp8")
    with pytest.raises(LiveActError, match=r"fewer than 2\^31 keys x width in .*, found 2 x"):
        dit.open_stream((1024, 1024), MemoryPolicy(slots=(2, 2, 2, 32)), 1.0, 4)
    # All launches are checked before the first product is looked up; none of this size is tried.
    fake.fail("cublasLtMatmulAlgoGetHeuristic", 7)
    with pytest.raises(LiveActError, match="cuBLASLt status 7"):
        dit.open_stream((1024, 1022), MemoryPolicy(slots=(2, 2, 2, 32)), 1.0, 4)


def test_fp32_is_refused(fake, images, weights) -> None:
    with pytest.raises(LiveActError, match="fp32"):
        open_stream(open_device(fake, images), weights, "fp32")


def test_missing_libraries_and_kernels(tmp_path: Path, fake, images) -> None:
    with pytest.raises(DeviceError, match=r"expected the library libnothing.so, found none"):
        _core.open_cuda(0, [], "libnothing.so", fake.path)
    with pytest.raises(DeviceError, match=r"expected the library libnothing.so, found none"):
        _core.open_cuda(0, [], fake.path, "libnothing.so")
    with pytest.raises(DeviceError, match="expected one of 2 devices, found index 7"):
        _core.open_cuda(7, images, fake.path, fake.path)
    with pytest.raises(DeviceError, match=r"expected some compiled for sm_90a in .*, found none"):
        kernels.load("sm_90a", tmp_path)
    assert _core.cuda_architecture(0, fake.path) == "sm_90a"


def test_versions(fake: FakeCuda) -> None:
    found = _core.cuda_versions(0, fake.path, fake.path)
    assert found == {"device": "Fake H200", "driver": "13.0", "cublaslt": "13.0.0"}
    fake.fail("cuDeviceGet", 101)
    with pytest.raises(DeviceError, match="CUDA_ERROR_FAKE"):
        _core.cuda_versions(5, fake.path, fake.path)
    with pytest.raises(DeviceError, match=r"expected the library libnothing.so, found none"):
        _core.cuda_versions(0, fake.path, "libnothing.so")


def test_a_changed_cubin_is_refused(tmp_path: Path, compiled_kernels: Path) -> None:
    folder = tmp_path / "sm_90a"
    folder.mkdir()
    for file in (compiled_kernels / "sm_90a").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    victim = folder / "guide.cubin"
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    with pytest.raises(DeviceError, match=r"guide\.cubin: expected SHA-256"):
        kernels.load("sm_90a", tmp_path)
