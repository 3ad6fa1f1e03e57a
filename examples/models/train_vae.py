"""Train the VAE: AutoencoderKLQwenImage cut down to 64x64 px emoji, 4x smaller each way, 8 channels."""

import argparse
import os
from pathlib import Path

import emoji_data
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from muon import Muon
from torch import Tensor, nn
from tqdm import tqdm

CHANNELS = 8
KL_WEIGHT = 4e-4  # enough to keep the latents near a Gaussian, too little to blur the pictures
EDGE_WEIGHT = 0.5


class FlatConv(nn.Module):
    """A causal 3-D convolution on one frame: only the kernel's last slice meets anything but zeros.

    The kernel is kept as the matrix from all its inputs to its outputs, which is what Muon steps.
    """

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        kernel = conv.weight.detach()[:, :, -1]
        self.shape, self.stride, self.padding = kernel.shape, conv.stride[1:], conv._padding[2::-2]
        self.kernel = nn.Parameter(kernel.flatten(1).clone())
        self.bias = conv.bias

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Convolve the only frame; there is no earlier one to remember."""
        return F.conv2d(x[:, :, 0], self.kernel.view(self.shape), self.bias, self.stride, self.padding)[:, :, None]


def new_vae(mean: list[float], std: list[float]) -> AutoencoderKLQwenImage:
    """Return an untrained VAE with these latent statistics."""
    return AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False],
        latents_mean=mean,
        latents_std=std,
    )


def flatten_convolutions(module: nn.Module) -> None:
    """Replace every causal 3-D convolution inside the module."""
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FlatConv(child))
        else:
            flatten_convolutions(child)


def unflatten(weights: dict[str, Tensor], target: AutoencoderKLQwenImage) -> None:
    """Load a flattened VAE's weights into one with 3-D convolutions, zeros where no picture reaches."""
    state = target.state_dict()
    for name, weight in weights.items():
        if name.endswith(".kernel"):
            full = state[name.removesuffix("kernel") + "weight"].zero_()
            full[:, :, -1] = weight.view(full[:, :, -1].shape)
        else:
            state[name].copy_(weight)


def encode(vae: AutoencoderKLQwenImage, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents' mean and log variance."""
    mean, log_variance = vae.quant_conv(vae.encoder(pictures)).chunk(2, 1)
    return mean, log_variance.clamp(-12, 4)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Return the pictures of these latents."""
    return vae.decoder(vae.post_quant_conv(latents))


def loss_of(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """Return the error of the pictures and of their edges, and the latents' distance from a Gaussian."""
    mean, log_variance = encode(vae, pictures)
    error = decode(vae, mean + (0.5 * log_variance).exp() * torch.randn_like(mean)) - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * divergence


def train(vae: AutoencoderKLQwenImage, pictures: Tensor, steps: int, batch: int) -> dict[str, Tensor]:
    """Train the flattened VAE and return the moving average of its weights."""
    kernels = [p for name, p in vae.named_parameters() if name.endswith(".kernel") and min(p.shape) > 3]
    taken = {id(p) for p in kernels}
    rest = [p for p in vae.parameters() if id(p) not in taken]
    optimizers = [
        (Muon(kernels, lr=6e-3, weight_decay=0.02), 6e-3),
        (torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0), 3e-3),
    ]
    average = {name: p.detach().clone() for name, p in vae.named_parameters()}
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        loss = loss_of(vae, pictures[torch.randint(len(pictures), (batch,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 40) * max(0.01, 1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in vae.named_parameters():
                average[name].lerp_(parameter, max(0.005, 5 / (step + 6)))
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return average


@torch.no_grad()
def finish(weights: dict[str, Tensor], pictures: Tensor) -> tuple[AutoencoderKLQwenImage, float]:
    """Return the VAE as diffusers loads it, with its latents' statistics, and its signal-to-noise ratio in dB."""
    measured = new_vae([0.0] * CHANNELS, [1.0] * CHANNELS)
    unflatten(weights, measured)
    sample = pictures[torch.randperm(len(pictures))[:512]].split(64)
    latents = torch.cat([encode(measured, chunk)[0] for chunk in sample])
    decoded = torch.cat([decode(measured, chunk).clamp(-1, 1) for chunk in latents.split(64)])
    errors = ((decoded - torch.cat(sample)) / 2).square().mean((1, 2, 3, 4))
    statistics = (latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
    vae = new_vae(*([round(float(x), 5) for x in statistic] for statistic in statistics))
    vae.load_state_dict(measured.state_dict())
    return vae, float(-10 * errors.log10().mean())


def main() -> None:
    """Read the command line, train and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("output", type=Path, help="base folder; the VAE goes to its subfolder vae/")
    add("--cache", type=Path, default=emoji_data.DEFAULT_CACHE, help="folder for the fetched packages")
    add("--steps", type=int, default=1500, help="training steps")
    add("--batch-size", type=int, default=16, help="pictures a step")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    add("--seed", type=int, default=0, help="seed of the weights and the batches")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    emoji = emoji_data.load_emoji(args.cache)
    drawings = torch.from_numpy(emoji_data.compose_all(emoji, args.cache)).flatten(0, 1)
    pictures = drawings.permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1
    vae = new_vae([0.0] * CHANNELS, [1.0] * CHANNELS)
    flatten_convolutions(vae)
    vae, ratio = finish(train(vae, pictures, args.steps, args.batch_size), pictures)
    vae.half().save_pretrained(args.output / "vae")
    print(f"signal-to-noise ratio {ratio:.1f} dB")


if __name__ == "__main__":
    main()
