"""What every stage of training has: a state that survives a kill, a log, a curve, an average.

A stage keeps two files in its directory: `state.pt` (weights, optimiser, step, random state) and
`log.jsonl` (a line of losses every so many steps). Both are written beside and then renamed or
appended, so that a kill at any moment costs at most the steps since the last save.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """An exponential moving average of the parameters of a module, warmed up like 1/steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Takes the parameters after a step (counted from 1) in."""
        weight = 1 - min(self.decay, step / (step + 10))
        names = list(self.values)
        current = dict(module.named_parameters())
        torch._foreach_lerp_(
            [self.values[n] for n in names], [current[n].detach() for n in names], weight
        )

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Gives a module the averages."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def learning_rate(step: int, peak: float, warmup: int, steps: int, floor: float = 0.05) -> float:
    """Linear from zero, then a cosine down to `floor` of the peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Run:
    """The state of one stage in a directory; it goes on from there if there is one.

    changeable: settings that may be others when it goes on, such as its length.

    Raises ValueError where the directory holds the state of other settings.
    """

    def __init__(
        self,
        directory: Path,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        settings: Mapping[str, Any],
        *,
        decay: float = 0.999,
        save_every_s: float = 60.0,
        changeable: frozenset[str] = frozenset({"steps"}),
    ) -> None:
        self.directory, self.module, self.optimiser = directory, module, optimiser
        self.settings, self.step, self.seconds = dict(settings), 0, 0.0
        self.average = Average(module, decay)
        self._save_every_s, self._saved = save_every_s, time.monotonic()
        self._begun = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)
        if self.state_file.exists():
            self._resume(changeable)
        torch.manual_seed(int(settings.get("seed", 0)) + self.step)

    @property
    def state_file(self) -> Path:
        """Weights and optimiser."""
        return self.directory / "state.pt"

    @property
    def log_file(self) -> Path:
        """A line of JSON for each report."""
        return self.directory / "log.jsonl"

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def stepped(
        self,
        loss: Tensor,
        constrain: Callable[[nn.Module], None] = lambda module: None,
        *,
        clip: float = 1.0,
    ) -> float:
        """Back-propagates a loss, makes the step, returns the norm of the gradient.

        constrain: brings the parameters back to where they may be. A step whose gradient is not
        finite is left out: bf16 has such accidents.
        """
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), clip))
        if math.isfinite(norm):
            self.optimiser.step()
            constrain(self.module)
        self.step += 1
        self.average.update(self.module, self.step)
        if time.monotonic() - self._saved > self._save_every_s:
            self.save()
        return norm

    def report(self, **numbers: float) -> None:
        """Logs numbers of this step and prints them on one line."""
        now = time.monotonic()
        seconds = self.seconds + now - self._begun
        entry = {"step": self.step, "seconds": round(seconds, 1)} | {
            name: round(float(value), 6) for name, value in numbers.items()
        }
        with self.log_file.open("a") as log:
            log.write(json.dumps(entry) + "\n")
        shown = " ".join(f"{name} {value:g}" for name, value in entry.items())
        print(shown, flush=True)

    def save(self) -> None:
        """Writes the state; a kill meanwhile leaves the old one."""
        now = time.monotonic()
        self.seconds += now - self._begun
        self._begun = self._saved = now
        partial = self.state_file.with_suffix(".partial")
        state = {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "average": self.average.values,
            "optimiser": self.optimiser.state_dict(),
        }
        torch.save(state, partial)
        partial.replace(self.state_file)

    def _resume(self, changeable: frozenset[str]) -> None:
        state = torch.load(self.state_file, weights_only=True, map_location="cpu")
        expected, found = (
            {name: value for name, value in settings.items() if name not in changeable}
            for settings in (self.settings, state["settings"])
        )
        if found != expected:
            raise ValueError(f"{self.state_file}: expected {expected}, found {found}")
        self.step, self.seconds = state["step"], state["seconds"]
        self.module.load_state_dict(state["module"])
        for name, value in state["average"].items():
            self.average.values[name].copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])


def read_log(path: Path) -> list[dict[str, float]]:
    """The entries of a log; of steps that were made twice after a kill the later ones. None where
    a stage ended before its first report."""
    if not path.exists():
        return []
    entries: dict[float, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        entries = {step: e for step, e in entries.items() if step < entry["step"]}
        entries[entry["step"]] = entry
    return list(entries.values())


def plot(log: Path, picture: Path, names: Callable[[str], bool] = lambda _: True) -> None:
    """Draws the logged numbers against the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    entries = read_log(log)
    if not entries:
        return
    keys = sorted({k for e in entries for k in e if k not in ("step", "seconds") and names(k)})
    figure, axes = pyplot.subplots(len(keys), 1, figsize=(7, 2 * len(keys)), squeeze=False)
    for key, axis in zip(keys, axes[:, 0], strict=True):
        points = [(e["step"], e[key]) for e in entries if key in e]
        axis.plot(*zip(*points, strict=True))
        axis.set_ylabel(key)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    pyplot.close(figure)
