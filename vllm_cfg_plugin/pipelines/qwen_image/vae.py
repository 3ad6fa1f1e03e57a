"""Qwen-Image's video VAE for single images, on diffusers' own modules and weights; must not import vLLM.

Before a first frame the causal 3-D convolutions see only zeros, so of a single frame they are 2-D convolutions with
the last temporal slice of the kernel. For these torch has fast CPU kernels and for 3-D ones it has none; they are
fastest in channels-last layout. Nothing is kept for a next frame, so calls on different threads don't meet.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    AutoencoderKLQwenImage,
    QwenImageCausalConv3d,
    QwenImageResample,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from vllm_cfg_plugin.pipelines.common.adopt import become


class ImageQwenImageVAE(AutoencoderKLQwenImage):
    """diffusers' AutoencoderKLQwenImage, faster for single images; tiles and videos go its own way."""

    @classmethod
    def adopt(cls, vae: AutoencoderKLQwenImage) -> Self:
        """Make a loaded VAE a faster one: the object itself, and its convolutions, see `become`."""
        for module in vae.modules():
            if type(module) is QwenImageCausalConv3d:
                module.__class__ = _CausalConv
            elif type(module) is QwenImageResample:
                module.__class__ = _Resample
            elif type(module) is nn.Conv2d:
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return become(cls, vae)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encode images [batch, channels, frames, height, width]; upstream's caches are for several frames."""
        if self.use_tiling or x.shape[2] != 1:
            return super()._encode(x)
        return self.quant_conv(self.encoder(x))

    def _decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents [batch, channels, frames, height, width]; upstream's caches are for several frames."""
        if self.use_tiling or z.shape[2] != 1:
            return super()._decode(z, return_dict)
        sample = self.decoder(self.post_quant_conv(z)).clamp(-1.0, 1.0)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class _CausalConv(QwenImageCausalConv3d):
    """A causal 3-D convolution that is 2-D where it sees one frame and no earlier ones."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        padding: Any = self._padding  # as F.pad takes it: width, width, height, height, frames before, none after
        if cache_x is not None or x.shape[2] != 1 or padding[4] != self.kernel_size[0] - 1:
            return super().forward(x, cache_x)
        # Copied at each call, 4 % of a decode at 64 px and 0.2 % at 256: to keep it would cost a third of the weights.
        weight = self.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
        output = F.conv2d(x[:, :, 0], weight, self.bias, self.stride[1:], (padding[2], padding[0]))
        return output[:, :, None]


class _Resample(QwenImageResample):
    """Resampling that keeps the channels-last layout of a single frame: upstream's reshape hides it from torch."""

    def forward(self, x: torch.Tensor, feat_cache: list[Any] | None = None, feat_idx: Any = None) -> torch.Tensor:
        if feat_cache is not None or x.shape[2] != 1:
            return super().forward(x, feat_cache, feat_idx)
        return self.resample(x[:, :, 0])[:, :, None]
