"""The small video autoencoder: its sizes, how it is initialised, how its latents are normalised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference import VAE, VAESizes
from reference.vae_layers import CausalConv3d, Downsample, FrameAttention, ResidualBlock, Upsample

# One residual block per level and none at full resolution, where a block would cost as much as all
# the others: what lets two CPU cores keep up at 128×128.
SMALL = VAESizes(
    encoder_width=16,
    encoder=("space", 32, "time", 64, "time", 96),
    decoder_width=96,
    decoder=(96, "time", 64, "time", 32, "space"),
)


def inflated(sizes: VAESizes, seed: int) -> VAE:
    """A fresh autoencoder that treats a clip, frame by frame, as it treats pictures.

    Taps for past frames start at zero, down-sampling in time takes the last frame, up-sampling
    repeats, and each residual block starts as its shortcut. (The inflation of "Quo Vadis, Action
    Recognition?", 2017, for causal convolutions.) Convolutions keep the variance and have no bias:
    NOTE: with torch's default, which takes 1/√3 of the signal at each, nothing was learned in 80
    steps (12.4 dB, the mean colour).
    """
    torch.manual_seed(seed)
    vae = VAE(sizes)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                taps = module.weight[0].numel()
                if isinstance(module, CausalConv3d):
                    taps //= module.kernel_size[0]  # those of the past are zero
                module.weight.normal_(0, taps**-0.5)
                assert module.bias is not None
                module.bias.zero_()
            if isinstance(module, CausalConv3d) and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] = 0
        for module in vae.modules():  # after all convolutions: some of them are parts of these
            if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                _pass_through(module.time_conv)
            if isinstance(module, ResidualBlock):
                _silence(module.residual[-1])
            if isinstance(module, FrameAttention):
                _silence(module.proj)
    return vae


def _pass_through(conv: nn.Conv3d) -> None:
    """Output = the last input frame, for each group of as many outputs as there are inputs."""
    channels = conv.in_channels
    eye = torch.eye(channels).repeat(conv.out_channels // channels, 1)
    conv.weight.zero_()
    conv.weight[:, :, -1, 0, 0] = eye
    assert conv.bias is not None
    conv.bias.zero_()


def _silence(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


def raw_moments(vae: VAE, video: Tensor) -> Tensor:
    """The mean of the posterior [B, 16, 1 + k, h, w] in the scale of the convolutions."""
    return vae.posterior(video)[0]


def raw_decode(vae: VAE, latent: Tensor) -> Tensor:
    """A latent in the scale of the convolutions -> video, not clamped."""
    return vae.decoder(vae.conv2(latent))


def fold_normalisation(vae: VAE, mean: Tensor, std: Tensor) -> None:
    """Makes latents normalised: changes `conv1` and `conv2` so that `encode` gives (raw - mean) /
    std, and `decode` takes that. mean, std [16], of the raw latents of the training clips.

    The released pipeline normalises with constants of its own, so their inverse is folded in too.
    The log-variances, which nothing at run time reads, stay as they are.
    """
    gain = vae.std.flatten() / std  # raw * gain + shift is what the constants normalise
    shift = vae.mean.flatten() - mean * gain
    with torch.no_grad():
        weight, bias = vae.conv1.weight, vae.conv1.bias
        assert bias is not None and vae.conv2.bias is not None
        half = len(mean)
        weight[:half] *= gain.view(-1, 1, 1, 1, 1)
        bias[:half] = bias[:half] * gain + shift
        inward = vae.conv2.weight  # [16, 16, 1, 1, 1]; raw = (given - shift) / gain
        vae.conv2.bias -= inward.flatten(1) @ (shift / gain)
        inward /= gain.view(1, -1, 1, 1, 1)
