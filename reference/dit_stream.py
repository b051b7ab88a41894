"""A session of the DiT: conditioning, the KV caches of every step, the sampler, the block counter.

Under `torch.no_grad` the caches are written in place, as the released code does it. Otherwise every
block makes new ones, so a loss on any block has gradients in all blocks before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.dit import DiT
from reference.dit_layers import KVCache
from reference.layout import BlockPlan, Layout, audio_windows, expect_one_of, plan_block

TIMESTEPS = (1000.0, 937.5, 833.33333333, 0.0)  # as released; the last one ends the sampler
STEPS = len(TIMESTEPS) - 1
SAMPLERS = ("renoise", "euler")


class DiTStream:
    """One session, or a batch of B that move in step.

    text [n, text_dim] T5 rows; clip [257, clip_dim]; y [20, slots, h, w]; audio
    [S, layers, channels], all of it, clamped at its ends: each for one session, or all with a batch
    dimension before (zeros after the true length of a text). With `audio_guidance` other than 1 the
    steps that hear audio run a second time on zero features, with their own caches. `memory`,
    `compress_axis` and `value_filter` are those of `plan_block`; `sampler` is one of SAMPLERS.

    Raises ValueError for an unknown setting or a tensor of the wrong shape.
    """

    def __init__(
        self,
        model: DiT,
        *,
        text: Tensor,
        clip: Tensor,
        y: Tensor,
        audio: Tensor,
        memory: str = "sequential",
        compress_axis: str = "token",
        value_filter: str = "key",
        audio_guidance: float = 1.0,
        sampler: str = "renoise",
        layout: Layout | None = None,
    ) -> None:
        self.model, self.layout = model, layout or Layout()
        self._memory = (memory, compress_axis, value_filter)
        self.audio_guidance = audio_guidance
        expect_one_of("sampler", sampler, SAMPLERS)
        self.sampler = sampler
        self.block = 0
        self.velocities: list[Tensor] = []
        """Of the last block, one per step, shaped like its noise; float32 or wider."""
        self._plan()  # raises for an unknown setting
        self.y = self._place("y", y, 5)
        if self.y.shape[2] < self.layout.slots:
            raise ValueError(
                f"y: expected [B, 20, >= {self.layout.slots}, h, w], found {list(self.y.shape)}"
            )
        self.clip = self._place("clip", clip, 3)
        self.audio = self._place("audio", audio, 4)
        self.set_prompt(text)
        self._caches = [self._empty_caches() for _ in range(STEPS)]
        guided = range(1, STEPS) if audio_guidance != 1.0 else ()
        self._silent_caches = {i: self._empty_caches() for i in guided}

    def _place(self, name: str, tensor: Tensor, dims: int) -> Tensor:
        """With a batch dimension, in the model's dtype, where it is."""
        given = list(tensor.shape)
        tensor = tensor.unsqueeze(0) if tensor.dim() == dims - 1 else tensor
        batch = tensor.shape[0] if name == "y" else self.y.shape[0]
        if tensor.dim() != dims or tensor.shape[0] != batch:
            raise ValueError(
                f"{name}: expected {dims - 1} dimensions, or {dims} of which the first is {batch}, "
                f"found {given}"
            )
        return tensor.to(device=self.model.device, dtype=self.model.dtype)

    def _empty_caches(self) -> list[KVCache]:
        batch, _, _, h, w = self.y.shape
        return self.model.empty_caches(batch, (h, w), self.layout)

    def set_prompt(self, text: Tensor) -> None:
        """Other T5 rows [n <= text_len, text_dim] or [B, n, text_dim] from the next block on."""
        self.text = self._place("text", text, 3)

    def cache(self, step: int, layer: int) -> tuple[Tensor, Tensor]:
        """(k, v) after the last block, each [B, slots * F, heads, head_dim]; keys unrotated."""
        cache = self._caches[step][layer]
        return cache.k.flatten(1, 3), cache.v.flatten(1, 3)

    def denoise(self, noise: Tensor, renoise: Sequence[Tensor]) -> Tensor:
        """The next block: noise and one re-noising per step -> latent, float32 or wider.

        All [16, n, h, w], or [B, 16, n, h, w]; the last re-noising is multiplied by zero. Per step,
        with z_i = (1 - sigma_i) x0 + sigma_i epsilon (eq. 2) and v = epsilon - x0, the released
        sampler takes x0 = z - sigma_i v and goes on from (1 - sigma_{i+1}) x0 + sigma_{i+1} epsilon
        with a fresh epsilon. The `euler` sampler, of the released demo, draws none (renoise is not
        read): z goes on to z + (sigma_{i+1} - sigma_i) v.

        Raises ValueError for tensors of another shape.
        """
        plan = self._plan()
        y = self.y[:, :, plan.first_slot : plan.end_slot]
        self._check_noise([noise, *renoise], y)
        windows = audio_windows(self.audio, self.block, self.layout)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        timesteps = torch.tensor(TIMESTEPS, dtype=wide, device=self.model.device)
        sigmas = timesteps / 1000
        z = noise.to(self.model.device, wide).view(-1, *noise.shape[-4:])  # [B, 16, n, h, w]
        self.velocities = []
        for i, epsilon in enumerate(renoise):
            velocity = self._velocity(i, z, y, timesteps[i], windows)
            self.velocities.append(velocity.view(noise.shape))
            if self.sampler == "euler":
                z = z + (sigmas[i + 1] - sigmas[i]) * velocity
                continue
            x0 = z - sigmas[i] * velocity
            z = (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * epsilon.to(z)
        self.block += 1
        return z.view(noise.shape)

    def _velocity(self, i: int, z: Tensor, y: Tensor, timestep: Tensor, windows: Tensor) -> Tensor:
        """The velocity of step i, with guidance; moves the caches of the step on."""
        plan = self._plan()
        given = (z, y, timestep, self.text, self.clip)
        velocity, self._caches[i] = self.model(
            *given, windows, self._caches[i], plan, skip_audio=i == 0
        )
        velocity = velocity.to(z.dtype)
        if i not in self._silent_caches:
            return velocity
        silence, self._silent_caches[i] = self.model(
            *given, torch.zeros_like(windows), self._silent_caches[i], plan, skip_audio=False
        )
        silence = silence.to(z.dtype)
        return silence + self.audio_guidance * (velocity - silence)

    def _plan(self) -> BlockPlan:
        memory, compress_axis, value_filter = self._memory
        return plan_block(
            self.block,
            self.layout,
            memory=memory,
            compress_axis=compress_axis,
            value_filter=value_filter,
            in_place=not torch.is_grad_enabled(),
        )

    def _check_noise(self, tensors: list[Tensor], y: Tensor) -> None:
        batch = y.shape[0]
        expected = (self.model.config["out_dim"], *y.shape[2:])
        allowed = [(batch, *expected)] + ([expected] if batch == 1 else [])
        found = [tuple(tensor.shape) for tensor in tensors]
        if found[0] not in allowed or found != [found[0]] * len(TIMESTEPS):
            raise ValueError(
                f"noise and {STEPS} re-noisings of block {self.block}: expected "
                f"{' or '.join(map(str, allowed))} each, found {found}"
            )
