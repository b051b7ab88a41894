"""An engine from load to close: what it says, what it gives back, where it may be used."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from liveact import Engine, InputError, LiveActError, SessionError, _core
from liveact.device import devices as devices_module
from tests.support.cli import Run, generate
from tests.support.paths import PORTRAIT
from tests.support.pipeline import ONE_THREAD, Background, demo_checkpoint, in_time, speech
from tests.support.session import (
    Gate,
    decoder_of,
    fail,
    open_session,
    pictures,
    run_whole,
    stream_of,
    take,
    wait_until,
    workers,
)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.load(demo_checkpoint(), device="cpu") as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No worker; the engines themselves are closed here."""
    yield
    wait_until(lambda: not workers(), "workers are left over")


def uses(engine: Engine) -> list[Any]:
    return [
        lambda: open_session(engine),
        lambda: engine.encode_prompt("A person."),
        lambda: engine.encode_picture(torch.zeros(3, 32, 32)),
        lambda: engine.dit,
        lambda: engine.vae,
    ]


# ------------------------------------------------------------------------------------- close


def test_close_gives_everything_back_though_all_is_held(engine: Engine) -> None:
    core, networks = engine.devices.core, engine._open()
    session = open_session(engine)
    session.push_audio(speech(20.0), 16_000)
    assert in_time(session.next_chunk) is not None
    assert core.allocated_bytes > 1e6
    in_time(engine.close)
    assert core.allocated_bytes == 0
    assert not workers()
    assert all(parameter.is_meta for parameter in networks.vae.parameters())
    encoders = (networks.text_encoder, networks.image_encoder, networks.audio_encoder)
    assert not any(encoder.weights for encoder in encoders)
    assert not networks.vae._ops._prepared and not networks.dit._tensors
    for call in (session.next_chunk, session.interrupt, lambda: session.set_prompt("x")):
        with pytest.raises(SessionError, match="closed"):
            call()
    for use in uses(engine):
        with pytest.raises(LiveActError, match=r"^engine: expected an open one, found a closed"):
            use()
    in_time(engine.close)
    session.close()


def test_a_scope_closes_it_also_after_an_error() -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Engine.load(demo_checkpoint(), device="cpu") as loaded,
    ):
        assert isinstance(loaded, Engine)
        open_session(loaded)
        _ = 1 / 0
    assert not workers() and loaded.devices.core.allocated_bytes == 0


def test_other_engines_go_on(engine: Engine) -> None:
    expected = pictures(run_whole(engine, speech(2.0)))
    other = Engine.load(demo_checkpoint(), device=engine.devices)  # on the very same device
    open_session(other)
    with open_session(engine) as session:
        session.push_audio(speech(2.0), 16_000)
        session.end_of_audio()
        first = in_time(session.next_chunk)
        in_time(other.close)
        assert np.array_equal(pictures([first, *take(session)]), expected)


def test_close_waits_for_a_session_that_is_being_opened(engine: Engine) -> None:
    gate = Gate(engine.vae, "encode")
    opening = Background(open_session, engine)
    gate.wait()
    closing = [Background(engine.close) for _ in range(2)]
    assert closing[0].running(0.1)
    gate.open()
    for one in closing:
        one.result()
    session = opening.result()
    with pytest.raises(SessionError, match="closed"):
        session.next_chunk()
    assert not workers() and engine.devices.core.allocated_bytes == 0


def test_workers_of_a_dropped_session_have_ended_before_the_weights_go(engine: Engine) -> None:
    session = open_session(engine)
    gate = Gate(decoder_of(session), "decode")
    session.push_audio(speech(8.0), 16_000)
    gate.wait()
    del session
    gc.collect()
    closing = Background(engine.close)
    assert closing.running(0.1), "it waits for the decode"
    gate.open()
    closing.result()
    assert not workers() and engine.devices.core.allocated_bytes == 0


def test_a_session_that_cannot_be_opened_holds_nothing(engine: Engine, tmp_path: Path) -> None:
    """Though its exception is held, and with it the frames that it went through."""
    before = engine.devices.core.allocated_bytes
    engine.vae.encode = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        open_session(engine, trace=tmp_path / "trace.json", size=(48, 48))
    assert caught.value.__traceback__ is not None
    assert engine.devices.core.allocated_bytes == before
    assert str(tmp_path) not in " ".join(os.readlink(f) for f in open_files())


def open_files() -> list[str]:
    folder = Path("/proc/self/fd")
    return [str(f) for f in folder.iterdir() if f.is_symlink()]


@pytest.mark.slow
@pytest.mark.alone
def test_many_engines_do_not_grow() -> None:
    """50 MB each, were they kept."""

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    marks = []
    held = []
    for _ in range(8):
        loaded = Engine.load(demo_checkpoint(), device="cpu")
        run_whole(loaded, speech(1.0))
        loaded.close()
        held.append(loaded)
        marks.append(resident_mib())
    assert marks[-1] - marks[2] < 16, marks


# ------------------------------------------------------------------------------------- load


def test_progress_is_told_of_every_component() -> None:
    told: list[tuple[str, int, int]] = []
    progress = lambda *given: told.append(given)  # noqa: E731
    with Engine.load(demo_checkpoint(), device="cpu", progress=progress):
        pass
    names = ["text encoder", "image encoder", "audio encoder", "VAE", "DiT", "ready"]
    assert [name for name, _, _ in told] == names
    files = [demo_checkpoint() / name for name in ("Wan2.1_VAE.pth", "wav2vec/model.safetensors")]
    files += [*demo_checkpoint().glob("models_*.pth"), *demo_checkpoint().glob("*.safetensors")]
    total = sum(file.stat().st_size for file in files)
    done = [bytes_ for _, bytes_, _ in told]
    assert done[0] == 0 and done[-1] == total and done == sorted(set(done))
    assert {all_ for _, _, all_ in told} == {total}


def test_an_error_of_the_progress_ends_the_loading() -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "DiT":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine.load(demo_checkpoint(), device="cpu", progress=stop)


def test_generate_opens_its_devices_once(
    run: Run, wav: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(
        devices_module, "_open", lambda name: (opened.append(name), _core.open_cpu())[1]
    )
    assert run(*generate(wav, tmp_path, device="cpu"))[0] == 0
    assert opened == ["cpu"]


@pytest.mark.slow
def test_a_start_is_mostly_that_of_torch() -> None:
    """CPU time: other processes do not count. 4.0 s with transformers, of which torch takes 1.1."""
    script = f"""
import sys, time
import torch
torch_s = time.process_time()
import liveact
liveact.Engine.load({str(demo_checkpoint())!r}, device="cpu")
print(torch_s, time.process_time() - torch_s)
assert "transformers" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=ONE_THREAD
    )
    assert result.returncode == 0, result.stderr
    torch_s, rest_s = map(float, result.stdout.split())
    assert rest_s < max(1.0, torch_s)


# ------------------------------------------------------------------------------------- forks


def in_a_fork(call: Any) -> str:
    """What `call` ends with in a forked child."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        try:
            theirs.send(f"returned {call()!r}")
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=child)
    process.start()
    answer = ours.recv() if ours.poll(20) else "hangs"
    process.join(5)
    if process.is_alive():
        process.kill()
        return "hangs at its end"
    return str(answer)


def test_a_fork_is_told_to_spawn(engine: Engine) -> None:
    with open_session(engine) as session:
        session.push_audio(speech(20.0), 16_000)
        assert in_time(session.next_chunk) is not None  # threads of every kind exist now
        calls = [
            *uses(engine),
            session.next_chunk,
            lambda: session.push_audio(speech(1.0), 16_000),
            lambda: session.set_prompt("x"),
            session.interrupt,
            session.end_of_audio,
        ]
        for call in calls:
            answer = in_a_fork(call)
            assert re.match(r"LiveActError: (engine|session \d+): expected the process", answer)
            assert 'get_context("spawn")' in answer and "\n" not in answer
        for call in (session.close, engine.close):
            assert in_a_fork(call) == "returned None"
        assert in_time(session.next_chunk) is not None, "the parent's goes on"


def test_a_fork_ends_though_the_parent_holds_locks(engine: Engine) -> None:
    """Also by the way of atexit, which multiprocessing does not take."""
    with open_session(engine) as session, session._state._lock:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                session.close()
                engine.close()
                from liveact.session.workers import _close_all

                _close_all()
                status = 0
            finally:
                os._exit(status)
        ended = threading.Timer(20, os.kill, (pid, 9))
        ended.start()
        _, status = os.waitpid(pid, 0)
        ended.cancel()
        assert status == 0


# ------------------------------------------------------------------------------------- the log


def test_the_log_says_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="liveact")
    with Engine.load(demo_checkpoint(), device="cpu") as loaded:
        with open_session(loaded) as session:
            session.push_audio(speech(8.0), 16_000)
            assert in_time(session.next_chunk) is not None
            session.interrupt()
        with open_session(loaded) as broken:
            stream_of(broken).denoise = fail
            broken.push_audio(speech(1.4), 16_000)
            with pytest.raises(SessionError):
                take(broken)
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    patterns = [
        ("INFO", rf"{re.escape(str(demo_checkpoint()))}: cpu, fp32; .*; \d\.\d s"),
        ("INFO", rf"{session} opened: 32×32 at 20 fps"),
        ("INFO", rf"{session} interrupted"),
        ("INFO", rf"{session} closed"),
        ("INFO", rf"{broken} opened: 32×32 at 20 fps"),
        ("ERROR", rf"{broken} failed: RuntimeError: out of luck"),
        ("INFO", rf"{broken} closed"),
        ("INFO", "engine closed"),
    ]
    assert len(found) == len(patterns), found
    for (level, message), (expected, pattern) in zip(found, patterns, strict=True):
        assert level == expected and re.fullmatch(pattern, message), (level, message)
    assert {record.name for record in caplog.records} == {"liveact"}


def test_nothing_is_logged_of_what_a_caller_did_wrong(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="liveact")
    with pytest.raises(InputError):
        engine.open_session(image=PORTRAIT, prompt="x", size=(33, 33))
    assert [record for record in caplog.records if record.name == "liveact"] == []
