"""Measure a trained emoji model through diffusers' own QwenImagePipeline, and draw a contact sheet.

Every measured prompt names an emoji on the one background it was never trained on. A picture counts as the named
emoji (top-1) if, of all trained emoji drawn on the asked background, that one is nearest to it pixel by pixel.
"""

import argparse
import os
import random
import time
from pathlib import Path

import emoji_data
import numpy as np
import torch
from diffusers import QwenImagePipeline
from emoji_data import BACKGROUNDS, COLORS, IMAGE_SIZE, Emoji, with_article
from PIL import Image, ImageDraw
from tqdm import tqdm

SHEET_PROMPTS = (
    "a red apple on a blue background",
    "a red heart on a white background",
    "a pizza on a yellow background",
    "a bicycle on a pink background",
    "a fish on a black background",
    "a cat face on a purple background",
    "a dog face on a green background",
    "a rocket on a black background",
    "a panda on a blue background",
    "grinning face, white background",
    "an octopus on a yellow background",
    "a hamburger on a green background",
    "a guitar on a white background",
    "a sunflower on a black background",
    "a soccer ball on a green background",
    "a snowman on a blue background",
    "a banana on a purple background",
    "police car, pink background",
    "a frog on a red background",
    "a robot on a yellow background",
    "a crown on a purple background",
    "a birthday cake on a green background",
    "a butterfly on a white background",
    "an umbrella on a pink background",
)
COLUMNS = 8
ZOOM = 2
LABEL_HEIGHT = 40


class Painter:
    """Draws pictures with an unmodified pipeline, always 64x64 px, and keeps count of the time."""

    def __init__(self, model: Path, steps: int) -> None:
        self.pipeline = QwenImagePipeline.from_pretrained(model, local_files_only=True)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = steps

    def paint(self, prompts: list[str], scale: float, batch: int = 16) -> np.ndarray:
        """Return one picture a prompt, the prompt's place being its seed."""
        pictures = []
        for start in tqdm(range(0, len(prompts), batch), desc=f"scale {scale:g}", leave=False):
            chunk = prompts[start : start + batch]
            pictures += self.pipeline(
                chunk,
                negative_prompt=[" "] * len(chunk) if scale > 1 else None,
                true_cfg_scale=scale,
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_inference_steps=self.steps,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            ).images
        return np.stack([np.asarray(picture) for picture in pictures])


def background_of(picture: np.ndarray) -> str:
    """Return the named colour nearest to the picture's border, 3 px wide."""
    inside = np.zeros(picture.shape[:2], bool)
    inside[3:-3, 3:-3] = True
    color = picture[~inside].mean(0)
    return min(COLORS, key=lambda name: float(np.linalg.norm(color - np.array(BACKGROUNDS[name]))))


def rank_of(picture: np.ndarray, row: int, candidates: np.ndarray) -> int:
    """Return how many candidates are nearer to the picture than the one in this row."""
    distances = np.square(candidates.astype(np.float32) - picture).mean((1, 2, 3))
    return int((distances < distances[row]).sum())


def measure(painter: Painter, emoji: list[Emoji], drawings: np.ndarray, rows: list[int], scale: float) -> str:
    """Return one line of the table: how the model does at this guidance scale."""
    prompts = [f"{with_article(emoji[r].name)} on a {emoji[r].held_out} background" for r in rows]
    started = time.perf_counter()
    pictures = painter.paint(prompts, scale)
    seconds = (time.perf_counter() - started) / len(rows)
    asked = [COLORS.index(emoji[row].held_out) for row in rows]
    ranks = np.array([rank_of(p, r, drawings[:, c]) for p, r, c in zip(pictures, rows, asked, strict=True)])
    right = np.mean([background_of(p) == COLORS[c] for p, c in zip(pictures, asked, strict=True)])
    top1, top5 = np.mean(ranks < 1), np.mean(ranks < 5)
    return f"{scale:5g}  {top1:6.1%}  {top5:6.1%}  {right:10.1%}  {seconds:14.2f}"


def draw_sheet(painter: Painter, scale: float) -> Image.Image:
    """Return the contact sheet: each prompt's picture without and with guidance, side by side."""
    prompts = list(SHEET_PROMPTS)
    pairs = zip(painter.paint(prompts, 1.0), painter.paint(prompts, scale), strict=True)
    tiles = [(i, s, picture) for i, pair in enumerate(pairs) for s, picture in zip((1.0, scale), pair, strict=True)]
    side = IMAGE_SIZE * ZOOM
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + 8), rows * (side + LABEL_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (seed, tile_scale, picture) in enumerate(tiles):
        x, y = place % COLUMNS * (side + 8) + 4, place // COLUMNS * (side + LABEL_HEIGHT)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        subject, _, rest = prompts[seed].partition(" on a " if " on a " in prompts[seed] else ", ")
        pen.text(
            (x, y + side), f"{subject}\n/ {rest}\nseed {seed}, scale {tile_scale:g}", "black", font_size=10, spacing=1
        )
    return sheet


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=emoji_data.HERE / "emoji", help="diffusers folder to measure")
    add("--cache", type=Path, default=emoji_data.DEFAULT_CACHE, help="folder for the fetched packages")
    add("--count", type=int, default=200, help="emoji to measure, drawn at random with a fixed seed")
    add("--scales", type=float, nargs="+", default=[1, 2, 3, 4, 6], help="guidance scales (true_cfg_scale)")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--sheet", type=Path, help="write a contact sheet to this PNG")
    add("--sheet-scale", type=float, default=4, help="guidance scale on the contact sheet, beside none")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    return parser.parse_args()


def main() -> None:
    """Print the table and write the sheet."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    emoji = emoji_data.load_emoji(args.cache)
    drawings = emoji_data.compose_all(emoji, args.cache)
    rows = random.Random(0).sample(range(len(emoji)), min(args.count, len(emoji)))
    painter = Painter(args.model, args.steps)
    print(f"{len(rows)} of {len(emoji)} emoji, each on its held-out background, {args.steps} steps")
    print("scale   top-1   top-5  background  seconds/image")
    for scale in args.scales:
        print(measure(painter, emoji, drawings, rows, scale), flush=True)
    if args.sheet:
        draw_sheet(painter, args.sheet_scale).save(args.sheet)


if __name__ == "__main__":
    main()
