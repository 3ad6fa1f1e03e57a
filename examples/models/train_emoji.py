"""Train the small text-to-emoji model and export it as a diffusers QwenImagePipeline folder.

One command fetches the data, trains and exports; run again with the same --work folder, it goes on where it stopped.
"""

import argparse
import functools
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import emoji_data
import lean_forward
import torch
from emoji_data import COLORS, Emoji
from emoji_model import Parts, encode_pictures, export, load_parts
from muon import Muon
from torch import Tensor
from tqdm import tqdm

TEXT_TOKENS = 16  # captions are padded to this, so that every step has one shape
WARMUP_STEPS = 150
EMA_DECAY = 0.998
CAPTION_NOISE = 0.25  # this share of the captions names another emoji, as captions from the web often are wrong:
NOISE_FROM = 0.2  # without that so small a task needs no guidance; it starts when a fifth of the run has passed
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass
class Dataset:
    """All there is to train on: the emoji, their latents (emoji, colour, token, channel) and a caption's tokens."""

    emoji: list[Emoji]
    latents: Tensor
    tokenize: Callable[[str], list[int]]
    padding: int

    def draw(self, step: int, size: int, noise_share: float) -> Batch:
        """Return latents, noise, sigmas, token ids and their mask; the step seeds them, so a resumed run goes on."""
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        rows, columns = [], []
        ids = torch.full((size, TEXT_TOKENS), self.padding)
        mask = torch.zeros(size, TEXT_TOKENS, dtype=torch.bool)
        for i in range(size):
            color = rng.choice(COLORS)
            row = self.draw_emoji(color, rng)
            named = self.draw_emoji(color, rng) if rng.random() < noise_share else row
            tokens = self.draw_tokens(named, color, rng)
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
            rows.append(row)
            columns.append(COLORS.index(color))
        latents = self.latents[rows, columns]
        noise = torch.randn(latents.shape, generator=generator)
        return latents, noise, torch.randn(size, generator=generator).sigmoid(), ids, mask

    def draw_emoji(self, color: str, rng: random.Random) -> int:
        """Return a random emoji out of those that are trained on this background."""
        while True:
            row = rng.randrange(len(self.emoji))
            if self.emoji[row].held_out != color:
                return row

    def draw_tokens(self, row: int, color: str, rng: random.Random) -> list[int]:
        """Return the tokens of a random caption that is short enough."""
        while True:
            tokens = self.tokenize(emoji_data.draw_caption(self.emoji[row], color, rng))
            if len(tokens) <= TEXT_TOKENS:
                return tokens


def make_dataset(parts: Parts, cache: Path) -> tuple[Dataset, Tensor]:
    """Fetch and encode the pictures; return the data and the tokens of the prompt template's prefix."""
    emoji = emoji_data.load_emoji(cache)
    pictures = torch.from_numpy(emoji_data.compose_all(emoji, cache))
    latents = encode_pictures(parts.vae, pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])

    @functools.cache
    def tokenize(caption: str) -> list[int]:
        return parts.tokenizer(lean_forward.TEMPLATE.format(caption)).input_ids[lean_forward.PREFIX_TOKENS :]

    prefix = parts.tokenizer(lean_forward.TEMPLATE).input_ids[: lean_forward.PREFIX_TOKENS]
    return Dataset(emoji, latents, tokenize, parts.tokenizer.pad_token_id), torch.tensor(prefix)


def make_optimizers(parts: Parts) -> list[torch.optim.Optimizer]:
    """Return Muon for the weight matrices inside layers and AdamW for the rest, embeddings learning fastest."""
    matrices, embeddings, rest = [], [], []
    for name, parameter in parts.trained().items():
        inside = "transformer_blocks" in name or name.startswith("text.layers")
        if "embed_tokens" in name:
            embeddings.append(parameter)
        elif parameter.ndim == 2 and inside and "_mod." not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [{"params": rest, "lr": 1.5e-3}, {"params": embeddings, "lr": 3e-3}]
    optimizers = [Muon(matrices, lr=2.5e-3), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate_share(step: int, progress: float) -> float:
    """Return the share of the peak learning rate: a warm-up, a plateau, a linear decay over the second half."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, min(1.0, 2 * (1 - progress)))


class Trainer:
    """The state of a run: the weights, their moving average, the optimizers, and how far the run has come."""

    def __init__(self, parts: Parts, data: Dataset, prefix: Tensor, args: argparse.Namespace) -> None:
        self.parts, self.data, self.prefix, self.args = parts, data, prefix, args
        self.weights = parts.trained()
        self.average = {name: w.detach().clone() for name, w in self.weights.items()}
        self.optimizers = make_optimizers(parts)
        self.step, self.seconds = 0, 0.0
        self.checkpoint = args.work / "checkpoint.pt"
        if self.checkpoint.is_file():
            self.resume()

    def spent(self) -> float:
        """Return how much of the budget is spent, in the budget's unit."""
        return self.step if self.args.steps else self.seconds / 60

    def train_step(self, progress: float) -> float:
        """Take one flow-matching step and return its loss."""
        share = learning_rate_share(self.step, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
        noise_share = CAPTION_NOISE if progress >= NOISE_FROM else 0.0
        latents, noise, sigma, ids, mask = self.data.draw(self.step, self.args.batch_size, noise_share)
        mixed = torch.lerp(latents, noise, sigma[:, None, None])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            text = lean_forward.encode_text(self.parts.text_encoder.model.language_model, self.prefix, ids)
            velocity = lean_forward.predict_velocity(self.parts.transformer, mixed, text, mask, sigma)
        loss = (velocity.float() - (noise - latents)).square().mean()
        loss.backward()
        rest = [p for group in self.optimizers[1].param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.update_average()
        return loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights, faster while the run is young."""
        rate = max(1 - EMA_DECAY, 4 / (self.step + 4))
        for name, weight in self.weights.items():
            self.average[name].lerp_(weight, rate)

    def save(self) -> None:
        """Write the checkpoint to go on from, and the model as it is now."""
        state = {"step": self.step, "seconds": self.seconds, "average": self.average, "weights": self.weights}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)
        names = [{k: v for k, v in asdict(e).items() if k != "image"} for e in self.data.emoji]
        export(self.parts, self.average, names, self.args.base, self.args.output)

    @torch.no_grad()
    def resume(self) -> None:
        """Take up the state of the checkpoint."""
        state = torch.load(self.checkpoint)
        self.step, self.seconds, self.average = state["step"], state["seconds"], state["average"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def run(self) -> None:
        """Train until the budget is spent, saving now and then."""
        budget, started, saved_at = self.args.steps or self.args.minutes, time.monotonic() - self.seconds, self.seconds
        losses: deque[float] = deque(maxlen=100)
        unit, done = "step" if self.args.steps else "min", round(self.spent(), 2)
        with tqdm(total=budget, initial=done, unit=unit, mininterval=self.args.log_seconds) as bar:
            while self.spent() < budget:
                losses.append(self.train_step(self.spent() / budget))
                self.seconds = time.monotonic() - started
                bar.set_postfix(step=self.step, loss=f"{fmean(losses):.4f}", refresh=False)
                bar.update(round(self.spent(), 2) - bar.n)
                if self.seconds - saved_at > 60 * self.args.save_minutes:
                    self.save()
                    saved_at = self.seconds
        self.save()


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    here = emoji_data.HERE
    add = parser.add_argument
    add("--output", type=Path, default=here / "emoji", help="diffusers folder to export to")
    add("--base", type=Path, default=here / "emoji", help="diffusers folder whose VAE and tokenizer are reused")
    add("--init-from", type=Path, help="diffusers folder to start the weights from, instead of from nothing")
    add("--cache", type=Path, default=emoji_data.DEFAULT_CACHE, help="folder for the fetched packages")
    add("--work", type=Path, default=emoji_data.DEFAULT_CACHE / "training", help="folder for the checkpoint")
    add("--minutes", type=float, default=75, help="training time, over all runs of this --work folder")
    add("--steps", type=int, help="train for this many steps instead of --minutes")
    add("--batch-size", type=int, default=128, help="pictures a step")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    add("--seed", type=int, default=0, help="seed of the first weights; the batches are seeded by their step")
    add("--bf16", action="store_true", help="bfloat16 matrix products: faster on a CPU that has them, else slower")
    add("--compile", action="store_true", help="compile the transformer's block (needs a C++ compiler)")
    add("--save-minutes", type=float, default=5, help="minutes between checkpoints, each exported too")
    add("--log-seconds", type=float, default=0.5 if sys.stderr.isatty() else 30, help="seconds between progress lines")
    return parser.parse_args()


def main() -> None:
    """Train and export."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    parts = load_parts(args.base, args.init_from)
    data, prefix = make_dataset(parts, args.cache)
    trainer = Trainer(parts, data, prefix, args)
    error = lean_forward.check_exact(parts.transformer, parts.text_encoder, parts.tokenizer, ["pizza on red", " ", ""])
    if error > 1e-4:
        raise RuntimeError(f"the training forward differs from diffusers' by {error:.1e}")
    if args.compile:
        lean_forward.run_block = torch.compile(lean_forward.run_block)
    trainer.run()


if __name__ == "__main__":
    main()
