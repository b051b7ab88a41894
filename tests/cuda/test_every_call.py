"""Two devices while something goes wrong: at every call of the driver, from opening to closing.

Whichever call fails, whenever a device is lost or somebody cancels: at most one line comes out, no
device waits for the other, everything is freed, and the next stream does what an undisturbed one
does. Each life of a stream has blocks that run as they come, one that is captured and a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from liveact import _core
from liveact.dit.dit import Dit, DitStream, MemoryPolicy
from liveact.errors import LiveActError
from tests.support.cuda.blocks import LATENT, denoise, open_device, set_image, set_prompt
from tests.support.cuda.fake import FakeCuda
from tests.support.cuda.small import core_config, random_weights

pytestmark = pytest.mark.slow
BLOCKS = 4
FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED
SEED = 1  # of an order of the queues: calls come in the same order each time
# What destructors call: nobody hears that one failed.
SILENT = ("Free", "Destroy", "Unload", "Release")


class Lives:
    """Streams on two devices, one after another, on the same weights.

    Attributes:
        names: of the calls of a life that nothing disturbs.
        opened, closing: how many of them come before the stream is open; before it is closed.
    """

    def __init__(self, fake: FakeCuda, dit: Dit) -> None:
        self.fake = fake
        self.dit = dit
        self.live()  # the first one chooses algorithms
        self._before = self._state()
        marks: list[int] = []
        assert self.live(seen=lambda stream: marks.append(fake.calls())) == ""
        self.opened, self.closing = marks[0], marks[-1]
        self.names = [fake.call(i) for i in range(fake.calls())]
        self._digests = [fake.digest(i) for i in range(fake.calls())]

    def _state(self) -> tuple[dict[str, int], int, int, int]:
        """What there is, what waits, how often somebody waited in vain or freed too early."""
        fake = self.fake
        return fake.live(), fake.waiting(), fake.hung(), fake.busy_frees()

    def live(
        self,
        event: Callable[[], None] = lambda: None,
        seen: Callable[[DitStream], None] = lambda stream: None,
    ) -> str:
        """Opens a stream, denoises and closes it; the message of the first error.

        `event` is arranged before it opens; `seen` has the stream once it is open, and then after
        each thing that it did.
        """
        self.fake.brief()
        self.fake.interleave(SEED)
        event()
        message = ""
        stream = None
        try:
            stream = self.dit.open_stream(LATENT, MemoryPolicy(), 1.0, 4)
            seen(stream)
            for step in (set_image, set_prompt, *[denoise] * BLOCKS):
                if stream.device_bytes:  # or it is closed, and nothing may be called
                    step(stream)
                    seen(stream)
        except LiveActError as error:
            message = str(error)
        if stream is not None:
            stream.close()
        return message

    def check(self, what: str, calls: int = 0) -> None:
        """After one that was disturbed; its first calls were the usual ones."""
        self.fake.recover()
        self.fake.interleave(0)
        assert self._state() == self._before, what
        if calls > 0:
            assert self.fake.digest(calls - 1) == self._digests[calls - 1], what


def says_why(message: str) -> bool:
    """Whether this is one line with the code of the driver, or of cuBLASLt for a device lost."""
    return "\n" not in message and any(
        code in message for code in (f"({FAILED})", f"status {FAILED}", "status 13")
    )


@pytest.fixture(scope="module")
def lives(fake: FakeCuda, images: list[_core.KernelImage]) -> Iterator[Lives]:
    """Of a model with one layer: the time of these tests grows with the square of their number."""
    fake.set_multiplies(False)
    devices = [open_device(fake, images, index) for index in (0, 1)]
    yield Lives(fake, Dit(devices, core_config(1), random_weights(1), "fp8"))
    fake.recover()
    fake.brief(False)
    fake.interleave(0)
    fake.set_multiplies(True)


def test_every_call_fails_once(lives: Lives) -> None:
    for call, name in enumerate(lives.names):
        message = lives.live(partial(lives.fake.fail_after, call, FAILED))
        what = f"{name}, call {call} of {len(lives.names)}: {message!r}"
        if call >= lives.closing or any(silent in name for silent in SILENT):
            assert message == "", what
        else:
            assert says_why(message), what
        lives.check(what, call)


def test_a_device_is_lost_at_every_call(lives: Lives) -> None:
    for call, name in enumerate(lives.names):
        message = lives.live(partial(lives.fake.lose_after, call))
        what = f"{name}, call {call} of {len(lives.names)}: {message!r}"
        assert says_why(message) if call < lives.closing else message == "", what
        lives.check(what, call)


def test_a_device_is_lost_in_every_piece_of_work(lives: Lives) -> None:
    """While the host is elsewhere: it hears of it by its next call."""
    piece, message = 0, "nothing yet"
    while message:
        message = lives.live(partial(lives.fake.lose_after_work, piece))
        what = f"piece {piece}: {message!r}"
        assert message == "" or says_why(message), what
        lives.check(what)
        piece += 1
    assert piece > 100


def test_every_call_is_when_it_is_cancelled_and_closed(lives: Lives) -> None:
    for call in range(lives.opened, lives.closing):
        known: list[DitStream] = []

        def stop(known: list[DitStream] = known) -> None:
            known[0].cancel()
            known[0].close()

        message = lives.live(partial(lives.fake.interrupt_after, call, stop), known.append)
        what = f"{lives.names[call]}, call {call} of {len(lives.names)}: {message!r}"
        assert message in ("", "denoise: cancelled"), what
        known.clear()
        lives.check(what, call)


def test_every_call_fails_while_two_devices_open_and_load(
    fake: FakeCuda, images: list[_core.KernelImage]
) -> None:
    """They load at once, so calls come in another order each time."""
    weights = random_weights(1)

    def load() -> str:
        fake.brief()
        try:
            devices = [open_device(fake, images, index) for index in (0, 1)]
            Dit(devices, core_config(1), weights, "bf16")
        except LiveActError as error:
            return str(error)
        return ""

    assert load() == ""
    before, calls = (fake.live(), fake.hung()), fake.calls()
    for call in range(calls):
        fake.fail_after(call, FAILED)
        message = load()
        name = fake.call(call)
        what = f"{name}, call {call} of {calls}: {message!r}"
        silent = any(word in name for word in SILENT)
        assert message == "" if silent else says_why(message), what
        fake.recover()
        assert (fake.live(), fake.hung()) == before, what
    fake.brief(False)
