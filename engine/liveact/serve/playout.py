"""The two tracks of a session for WebRTC, on one timeline: the samples of its sound.

A picture is stamped with the samples that were handed out before it, so picture and sound cannot
come apart, whatever the frame rate. What is due is sent PLAYOUT_S later: within that time the sound
that fills a packet to its end is there, as a packet begins at most a packet before a frame.

Where the pacer had to begin its clock anew, the stamps of both tracks leave out what it was late.
A receiver learns from stamps and arrivals how long it has to wait for packets, so stamps that went
on would be a delay to it, and it would keep that for long.
NOTE: in a browser three such delays of 0.1 to 0.4 s made the sound wait for 1 s, and the picture
with it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from fractions import Fraction
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from aiortc import MediaStreamTrack
from aiortc.mediastreams import VIDEO_CLOCK_RATE, VIDEO_TIME_BASE, MediaStreamError
from av import AudioFrame, VideoFrame

from liveact.audio.samples import as_int16
from liveact.session.pacing import Frame

SAMPLE_RATE_HZ = 48_000  # WebRTC's own
PACKET_SAMPLES = 960  # 20 ms
PLAYOUT_S = PACKET_SAMPLES / SAMPLE_RATE_HZ
FADE_SAMPLES = 240  # 5 ms, so that nothing clicks
MAX_PACKETS = 50  # 1 s that a sender may be behind before it loses the oldest
MAX_PICTURES = 2

Item = TypeVar("Item")


class _Paced(MediaStreamTrack, Generic[Item]):
    """Hands out items, each at its moment. A sender that is too slow loses the oldest."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.items: deque[tuple[float, Item]] = deque(maxlen=limit)  # when it is due, of the loop
        self._put = asyncio.Event()

    def put(self, due_s: float, item: Item) -> None:
        """due_s: of the event loop's clock."""
        self.items.append((due_s, item))
        self._put.set()

    def stop(self) -> None:
        """Whoever waits for an item gets MediaStreamError."""
        super().stop()
        self._put.set()

    async def next_item(self) -> Item:
        """The next item, when it is due. Raises MediaStreamError once it was stopped."""
        while True:
            if self.readyState != "live":
                raise MediaStreamError
            if not self.items:
                self._put.clear()
                await self._put.wait()
                continue
            left_s = self.items[0][0] - asyncio.get_running_loop().time()
            if left_s <= 0:
                return self.items.popleft()[1]
            await asyncio.sleep(left_s)


class VideoTrack(_Paced[VideoFrame]):
    """Pictures, stamped in 1/90 000 s."""

    kind = "video"

    async def recv(self) -> VideoFrame:
        """The next picture."""
        return await self.next_item()


class AudioTrack(_Paced[tuple[int, npt.NDArray[np.int16]]]):
    """Packets of PACKET_SAMPLES at SAMPLE_RATE_HZ: (number of the first sample, int16 [n])."""

    kind = "audio"

    async def recv(self) -> AudioFrame:
        """The next packet."""
        pts, pcm = await self.next_item()
        packet = AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        packet.sample_rate = SAMPLE_RATE_HZ
        packet.pts, packet.time_base = pts, Fraction(1, SAMPLE_RATE_HZ)
        return packet


class Playout:
    """Cuts frames into pictures and packets of sound, and stamps them.

    Attributes:
        video, audio: the tracks.
    """

    def __init__(self) -> None:
        self.video = VideoTrack(MAX_PICTURES)
        self.audio = AudioTrack(MAX_PACKETS)
        self._start_s: float | None = None  # when sample 0 was due
        self._samples = 0  # of all frames so far, and of what was left out
        self._rest = np.zeros(0, np.int16)  # the last of them, which fill no packet

    def put(self, frame: Frame) -> None:
        """The next frame of a session whose sound is mono at SAMPLE_RATE_HZ."""
        due_s = frame.due_s + PLAYOUT_S
        self._leave_out(due_s)
        picture = VideoFrame.from_ndarray(frame.picture, format="rgb24")
        picture.pts = self._samples * VIDEO_CLOCK_RATE // SAMPLE_RATE_HZ
        picture.time_base = VIDEO_TIME_BASE
        self.video.put(due_s, picture)

        sound = np.concatenate([self._rest, as_int16(frame.pcm[:, 0])])
        first = self._samples - len(self._rest)
        whole = len(sound) - len(sound) % PACKET_SAMPLES
        for i in range(0, whole, PACKET_SAMPLES):
            ahead_s = (first + i - self._samples) / SAMPLE_RATE_HZ
            self.audio.put(due_s + ahead_s, (first + i, sound[i : i + PACKET_SAMPLES]))
        self._rest = sound[whole:]
        self._samples += len(frame.pcm)

    def _leave_out(self, due_s: float) -> None:
        """Whole packets, where the next sample is due later than the one before it says."""
        if self._start_s is None:
            self._start_s = due_s
        late = round((due_s - self._start_s) * SAMPLE_RATE_HZ) - self._samples
        if late < PACKET_SAMPLES:
            return
        self._samples += late - late % PACKET_SAMPLES
        # Opus keeps 6.5 ms back, so aiortc stamps the first packet after a gap as if there were
        # none. That one is silent.
        first = self._samples - len(self._rest) - PACKET_SAMPLES
        silence = np.zeros(PACKET_SAMPLES, np.int16)
        self.audio.put(due_s - PLAYOUT_S, (first, silence))

    def hush(self) -> None:
        """What was put and not sent yet is silent: a short fade, and zeros."""
        level = np.linspace(1, 0, FADE_SAMPLES)
        for _, (_, pcm) in self.audio.items:
            faded = pcm[: len(level)] * level
            pcm[:] = 0
            pcm[: len(faded)] = faded
            level = level[:0]
        self._rest = np.zeros_like(self._rest)

    def stop(self) -> None:
        """Nothing is handed out any more."""
        self.video.stop()
        self.audio.stop()
