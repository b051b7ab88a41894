"""The Wan 2.1 video autoencoder on whole videos: batched, differentiable, nothing streamed.

`vae_stream` is the same mathematics with caches, window by window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.vae_layers import LATENT_CHANNELS, CausalConv3d, Decoder, Encoder, Stage

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4  # video frames per latent frame; the first latent frame is one video frame

# Released code: latent = normalised * std + mean, per channel.
# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on


@dataclass(frozen=True)
class VAESizes:
    """Widths and order of the blocks, as a list per side, from the input on.

    encoder, decoder: a number is a residual block with that many output channels; "space" halves
    (in the decoder doubles) height and width, "time" the frames after the first as well; a decoder
    step of either kind also halves the channels. encoder_width, decoder_width: channels after the
    first convolution.
    """

    encoder_width: int
    encoder: tuple[Stage, ...]
    decoder_width: int
    decoder: tuple[Stage, ...]

    def __post_init__(self) -> None:
        for side, stages in (("encoder", self.encoder), ("decoder", self.decoder)):
            time = stages.count("time")
            found = 2 ** (time + stages.count("space")), 2**time
            if found != (SPATIAL_STRIDE, TEMPORAL_STRIDE):
                raise ValueError(
                    f"VAE {side}: expected a stride of {SPATIAL_STRIDE} in space and "
                    f"{TEMPORAL_STRIDE} in time, found {found[0]} and {found[1]}"
                )

    @classmethod
    def released(
        cls, base_width: int = 96, multipliers: Sequence[int] = (1, 2, 4, 4), blocks: int = 2
    ) -> VAESizes:
        """The released arrangement at any base width.

        multipliers: of the base width, one per level from full resolution down, 4 of them. blocks:
        residual blocks per level of the encoder; the decoder has one more. Raises ValueError for
        another number of levels.
        """
        if len(multipliers) != 4:
            raise ValueError(f"multipliers: expected 4 levels, found {len(multipliers)}")
        widths = [base_width * multiplier for multiplier in multipliers]
        downs: tuple[Stage, ...] = ("space", "time", "time")
        encoder: list[Stage] = []
        decoder: list[Stage] = []
        for level, width in enumerate(widths):
            encoder += [*[width] * blocks, *downs[level : level + 1]]
        for level, width in enumerate(reversed(widths)):
            decoder += [*[width] * (blocks + 1), *downs[::-1][level : level + 1]]
        return cls(widths[0], tuple(encoder), widths[-1], tuple(decoder))

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> VAESizes:
        """The sizes of a checkpoint, from its names and shapes.

        Raises KeyError where a tensor that gives a size is missing, ValueError for other strides.
        """
        return cls(
            weights["encoder.conv1.weight"].shape[0],
            _read_stages(weights, "encoder.downsamples"),
            weights["decoder.conv1.weight"].shape[0],
            _read_stages(weights, "decoder.upsamples"),
        )


def _read_stages(weights: Mapping[str, Tensor], prefix: str) -> tuple[Stage, ...]:
    parts = len(prefix.split("."))
    count = len({name.split(".")[parts] for name in weights if name.startswith(f"{prefix}.")})
    stages: list[Stage] = []
    for i in range(count):
        if f"{prefix}.{i}.resample.1.weight" not in weights:
            stages.append(weights[f"{prefix}.{i}.residual.2.weight"].shape[0])
        else:
            temporal = f"{prefix}.{i}.time_conv.weight" in weights
            stages.append("time" if temporal else "space")
    return tuple(stages)


class VAE(nn.Module):
    """The autoencoder: its weights, and what they compute of whole videos.

    It computes in the dtype and on the device of its parameters, to which inputs are converted. A
    fresh one has torch's default initialisation (ones in the norms); a trainer may want another.
    The names and shapes of `state_dict()` are those of the released `Wan2.1_VAE.pth`.
    """

    mean: Tensor  # [16, 1, 1, 1]
    std: Tensor  # [16, 1, 1, 1]

    def __init__(self, sizes: VAESizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes.encoder_width, sizes.encoder)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(sizes.decoder_width, sizes.decoder)
        for name, values in (("mean", LATENT_MEAN), ("std", LATENT_STD)):
            constant = torch.tensor(values).view(-1, 1, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    @classmethod
    def from_tensors(
        cls, weights: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
    ) -> VAE:
        """The VAE of a checkpoint, in a copy of its tensors, on their device.

        weights: by released name; widths and blocks come from their names and shapes. Raises
        RuntimeError (of `load_state_dict`) for missing, unexpected or misshapen tensors, and what
        `VAESizes.of` raises.
        """
        vae = cls(VAESizes.of(weights)).to(weights["conv1.weight"].device, dtype)
        vae.load_state_dict(weights)
        return vae

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of [B, 3, 1 + 4 * k, H, W], values in [-1, 1].

        Both [B, 16, 1 + k, H/8, W/8], as the convolutions leave them: not normalised, the
        log-variance not clamped. Of them the KL term is (mean^2 + e^logvar - 1 - logvar) / 2.

        Raises ValueError where T is not 1 + 4 * k or H, W not multiples of 8.
        """
        shape = list(video.shape)
        if (
            len(shape) != 5
            or shape[1] != 3
            or shape[2] % TEMPORAL_STRIDE != 1
            or any(size < 1 or size % SPATIAL_STRIDE for size in shape[3:])
        ):
            raise ValueError(
                "video: expected [B, 3, 1 + 4 * k, H, W] with H and W multiples of "
                f"{SPATIAL_STRIDE}, found {shape}"
            )
        mean, log_variance = self.conv1(self.encoder(video.to(self.mean))).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, 1 + 4 * k, H, W] in [-1, 1] -> normalised latent mean [B, 16, 1 + k, H/8, W/8].

        Raises as `posterior`.
        """
        mean, _ = self.posterior(video)
        return self.normalise(mean)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised [B, 16, n, h, w] -> video [B, 3, 1 + 4 * (n - 1), 8 * h, 8 * w], not clamped.

        Raises ValueError for latents of another form.
        """
        if latent.dim() != 5 or latent.shape[1] != LATENT_CHANNELS or 0 in latent.shape:
            raise ValueError(
                f"latent: expected [B, {LATENT_CHANNELS}, n, h, w], found {list(latent.shape)}"
            )
        return self.decoder(self.conv2(self.denormalise(latent.to(self.mean))))

    def normalise(self, latent: Tensor) -> Tensor:
        """Latents [B, 16, ...] in the scale of the DiT, from that of the VAE."""
        return (latent - self.mean) / self.std

    def denormalise(self, latent: Tensor) -> Tensor:
        """Latents [B, 16, ...] in the scale of the VAE, from that of the DiT."""
        return latent * self.std + self.mean
