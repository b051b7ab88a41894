"""The threads of the CPU device: beside a busy neighbour, for several streams, after a fork; and
that torch's threads sleep too."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from liveact import _core
from liveact.commands.doctor import doctor
from liveact.dit.dit import Dit, DitStream
from liveact.errors import DeviceError
from tests.support.cuda.small import AUDIO_DIM, IMAGE_DIM, core_config, random_weights

LATENT = (16, 16)
BLOCKS = 3
ALTERNATIONS = 3
# A neighbour on one of two cores leaves a core and a half. Threads that spin for one another were
# measured to make a block of a tiny model 100 times slower.
MOST_TIMES_SLOWER = 3.0
BUSY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@pytest.fixture
def two_cpus() -> Iterator[tuple[int, int]]:
    """CPUs that this thread, and what it starts, is confined to."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads cannot be confined to CPUs on this system")
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip(f"a neighbour on one of two CPUs needs two, this process may use {len(before)}")
    first, second = sorted(before)[:2]
    os.sched_setaffinity(0, {first, second})
    yield first, second
    os.sched_setaffinity(0, before)


@pytest.fixture
def dit(monkeypatch: pytest.MonkeyPatch) -> Dit:
    """On a device with two threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    device = _core.open_cpu()
    assert device.threads == 2
    return Dit(device, core_config(1), random_weights(1), "bf16")


def open_stream(dit: Dit) -> DitStream:
    generator = torch.Generator().manual_seed(1)
    stream = dit.open_stream(LATENT)
    stream.set_prompt(torch.randn(8, dit.config.text_dim, generator=generator))
    channels = dit.config.in_dim - dit.config.out_dim
    stream.set_image(
        torch.randn(9, IMAGE_DIM, generator=generator),
        torch.randn(channels, 14, *LATENT, generator=generator),
    )
    return stream


def denoise(dit: Dit, stream: DitStream, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (dit.config.out_dim, stream.frames_of_next_block, *LATENT)
    return stream.denoise(
        torch.randn(shape, generator=generator),
        torch.randn(2, *shape, generator=generator),
        torch.randn(stream.audio_rows_of_next_block, AUDIO_DIM, generator=generator),
    )


def latents(dit: Dit) -> list[torch.Tensor]:
    stream = open_stream(dit)
    return [denoise(dit, stream, block) for block in range(BLOCKS)]


def median_s(dit: Dit, stream: DitStream) -> float:
    """Of a block, when the scheduler has got used to what runs."""
    times = []
    settled_s = time.perf_counter() + 1.0
    while len(times) < 5:
        begin = time.perf_counter()
        denoise(dit, stream, 2)
        if begin > settled_s:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


# `two_cpus` comes first: threads are confined where the device is opened.
@pytest.mark.slow
@pytest.mark.alone  # with one neighbour, not with a test besides
def test_a_block_beside_a_busy_neighbour(two_cpus: tuple[int, int], dit: Dit) -> None:
    stream = open_stream(dit)
    for block in range(2):
        denoise(dit, stream, block)
    alone, beside = [], []
    for _ in range(ALTERNATIONS):
        alone.append(median_s(dit, stream))
        # In a session of its own, to which Linux gives as much as to all of this one.
        neighbour = subprocess.Popen(
            [sys.executable, "-c", BUSY, str(two_cpus[1])], start_new_session=True
        )
        try:
            beside.append(median_s(dit, stream))
        finally:
            neighbour.kill()
            neighbour.wait()
    times = statistics.median(beside) / statistics.median(alone)
    assert times < MOST_TIMES_SLOWER, (
        f"{times:.1f} times slower: {alone} s alone, {beside} s beside"
    )


def test_the_same_bits_every_time_and_in_two_threads_at_once(dit: Dit) -> None:
    expected = latents(dit)
    again = latents(dit)
    together: list[list[torch.Tensor]] = [[], []]

    def run(target: list[torch.Tensor]) -> None:
        target.extend(latents(dit))

    threads = [threading.Thread(target=run, args=(target,), daemon=True) for target in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "still running after 60 s: it hangs"
    for found in (again, *together):
        assert len(found) == BLOCKS
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_fork_is_refused_in_one_line(dit: Dit) -> None:
    stream = open_stream(dit)
    denoise(dit, stream, 0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            denoise(dit, stream, 1)
            message = "no error"
        except DeviceError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0] == child:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("still running after 20 s: the child of a fork hangs")
    with os.fdopen(read) as pipe:
        assert pipe.read() == (
            "cpu: expected the threads of the device, found none: this process was forked after "
            "the device was opened; use the spawn start method"
        )
    denoise(dit, stream, 1)  # the parent goes on


def test_as_many_threads_as_asked_for_else_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _core.open_cpu().threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(DeviceError, match="expected OMP_NUM_THREADS to be a number of threads"):
        _core.open_cpu()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert _core.open_cpu().threads == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("passive", "sleep while they wait"),
        (None, "spin while they wait: torch was imported before liveact"),
        ("active", "OMP_WAIT_POLICY is active"),
    ],
)
def test_doctor_says_how_many_there_are_and_how_torchs_wait(
    monkeypatch: pytest.MonkeyPatch, policy: str | None, expected: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    console = Console(width=200)
    with console.capture() as printed:
        console.print(doctor())
    rows = {cells[1].strip(): cells[2].strip() for cells in cells_of(printed.get())}
    assert rows["cpu backend"].endswith("; 3 threads")
    assert rows["torch on the CPU"] == f"{torch.get_num_threads()} threads, {expected}"


def cells_of(table: str) -> list[list[str]]:
    return [line.split("│") for line in table.splitlines() if "│" in line]


def waiting_s(**environment: str) -> float:
    """CPU seconds that the threads of torch use in 0.4 s with nothing to do."""
    script = """
import liveact, time, torch
torch.set_num_threads(2)
x = torch.ones(1 << 20)
used = 0.0
for _ in range(20):
    x.add_(1)
    begin = time.process_time()
    time.sleep(0.02)
    used += time.process_time() - begin
print(used)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", script]
    return float(subprocess.check_output(command, env=kept | environment, text=True))


@pytest.mark.slow
def test_threads_of_torch_sleep_while_they_wait_unless_told_otherwise() -> None:
    asleep = waiting_s()
    chosen = waiting_s(OMP_WAIT_POLICY="ACTIVE")
    assert asleep < 0.1 * chosen, (asleep, chosen)
