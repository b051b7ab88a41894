"""A small wav2vec2, differentiable and batched, with the released names and the engine's reading.

Like the engine (`liveact.encoders.speech`) it interpolates the convolutional features to the rate
of the video before the transformer; the tests compare the two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "model_type": "wav2vec2",
    "architectures": ["Wav2Vec2Model"],
    "dtype": "float32",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "do_stable_layer_norm": False,
    "num_feat_extract_layers": 7,
    "conv_dim": [32, 32, 48, 48, 64, 64, 64],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PREPROCESSOR: dict[str, Any] = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "do_normalize": True,
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}


class _Convolution(nn.Module):
    def __init__(self, fan_in: int, out: int, kernel: int, normed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(fan_in, out, kernel, bias=False)
        nn.init.kaiming_normal_(self.conv.weight)
        self.layer_norm = nn.GroupNorm(out, out) if normed else None


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        heard = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(heard.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(hidden, inner)
        self.output_dense = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class _Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.attention = _Attention(hidden, config["num_attention_heads"])
        self.layer_norm = nn.LayerNorm(hidden, eps)
        self.feed_forward = _FeedForward(hidden, config["intermediate_size"])
        self.final_layer_norm = nn.LayerNorm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x))


class SpeechEncoder(nn.Module):
    """The names and shapes of `state_dict()` are those that `transformers` gives a Wav2Vec2Model.

    config: keys of its config.json, with the fixed ones as in `CONFIG`.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config = CONFIG if config is None else config
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        widths, taps = config["conv_dim"], config["num_conv_pos_embeddings"]
        fan_ins = [1, *widths[:-1]]
        # In lists, so that they are registered once, under the released names.
        self._convolutions = [
            _Convolution(fan_in, out, kernel, index == 0)
            for index, (fan_in, out, kernel) in enumerate(
                zip(fan_ins, widths, config["conv_kernel"], strict=True)
            )
        ]
        self.feature_extractor = nn.ModuleDict({"conv_layers": nn.ModuleList(self._convolutions)})
        self.feature_projection = nn.ModuleDict(
            {
                "layer_norm": nn.LayerNorm(widths[-1], eps),
                "projection": nn.Linear(widths[-1], hidden),
            }
        )
        positions = nn.Conv1d(
            hidden,
            hidden,
            taps,
            padding=taps // 2,
            groups=config["num_conv_pos_embedding_groups"],
        )
        self._positions = [nn.utils.parametrizations.weight_norm(positions, dim=2)]
        self._layers = [_Layer(config) for _ in range(config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict(
            {
                "pos_conv_embed": nn.ModuleDict({"conv": self._positions[0]}),
                "layer_norm": nn.LayerNorm(hidden, eps),
                "layers": nn.ModuleList(self._layers),
            }
        )

    def forward(self, samples: Tensor, features: int) -> Tensor:
        """[B, n] at 16 kHz -> [B, features, layers, hidden], first and last at the ends."""
        wide = samples.double()
        variance, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
        x = ((wide - mean) / torch.sqrt(variance + 1e-7)).float().unsqueeze(1)
        strides = self.config["conv_stride"]
        for convolution, stride in zip(self._convolutions, strides, strict=True):
            x = F.conv1d(x, convolution.conv.weight, stride=stride)
            if convolution.layer_norm is not None:
                x = convolution.layer_norm(x)
            x = F.gelu(x)
        x = F.interpolate(x, size=features, mode="linear", align_corners=True).transpose(1, 2)
        x = self.feature_projection["projection"](self.feature_projection["layer_norm"](x))
        positions = self._positions[0](x.transpose(1, 2))
        x = x + F.gelu(positions[..., : x.shape[1]]).transpose(1, 2)
        x = self.encoder["layer_norm"](x)
        outputs = []
        for layer in self._layers:
            x = layer(x)
            outputs.append(x)
        return torch.stack(outputs, dim=2)
