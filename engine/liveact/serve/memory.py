"""How much memory a session takes, and how much is free where it takes it."""

from __future__ import annotations

from pathlib import Path

from liveact import _core
from liveact.engine import Engine
from liveact.session.state import CHUNK_QUEUE_LENGTH
from liveact.session.stats import SessionStats

MARGIN_BYTES = 256 * 2**20  # of every pool: what allocators round up, and what others need
FRAMES_PER_CHUNK = 4
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

Pools = tuple[int, ...]  # bytes in the memory of this machine, then of each GPU in use


class SessionMemory:
    """The pools of memory that the sessions of an engine take from.

    Attributes:
        names: of the pools.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        devices = engine.devices
        self._gpus: list[_core.Device] = []
        for core in (*devices.cores, devices.vae_core):
            if core is not None and core.name != "cpu" and core not in self._gpus:
                self._gpus.append(core)
        self.names = ("host", *(core.name for core in self._gpus))

    def needed(self, size: tuple[int, int]) -> Pools:
        """Of a session of pictures (width, height). Raises InputError."""
        devices, bytes_of = self._engine.devices, self._engine.session_bytes(size)
        pools = [0] * (1 + len(self._gpus))
        pools[0] = CHUNK_QUEUE_LENGTH * FRAMES_PER_CHUNK * size[0] * size[1] * 3
        for core in devices.cores:
            pools[self._pool(core)] += bytes_of.dit
        pools[self._pool(devices.vae_core)] += bytes_of.vae
        return tuple(pools)

    def allocated(self, needed: Pools, stats: SessionStats) -> Pools:
        """Of `needed`, what an open session has taken: on the devices together, since it does not
        say on which; what it has yet to take is overestimated rather than forgotten."""
        share = min(1.0, stats.device_bytes / max(1, sum(needed)))
        return tuple(int(share * pool) for pool in needed)

    def free(self) -> tuple[int | None, ...]:
        """Bytes; None where nothing limits them, or nobody says."""
        return (free_host_bytes(), *(core.free_bytes for core in self._gpus))

    def fits(self, needed: Pools, promised: list[Pools]) -> bool:
        """Whether `needed` is free beside what was promised to others."""
        for pool, free in enumerate(self.free()):
            taken = needed[pool] + sum(one[pool] for one in promised)
            if free is not None and needed[pool] and taken + MARGIN_BYTES > free:
                return False
        return True

    def _pool(self, core: _core.Device | None) -> int:
        return 0 if core is None or core.name == "cpu" else 1 + self._gpus.index(core)


def free_host_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """Available memory of this machine or of the container, whichever is less."""
    found = []
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit = "".join(_lines(cgroup / "memory.max"))
    if limit.isdecimal():
        used = int("".join(_lines(cgroup / "memory.current")) or 0)
        stat = dict(line.split() for line in _lines(cgroup / "memory.stat") if line)
        reclaimable = int(stat.get("inactive_file", 0))
        found.append(int(limit) - used + reclaimable)
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split("\n")
    except OSError:
        return []
