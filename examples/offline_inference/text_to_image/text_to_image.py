"""Text to image offline, with or without CFG-Parallel.

    python text_to_image.py --prompt "a rocket on a black background" --negative_prompt " " --cfg_scale 4.0 \\
        --cfg_parallel_size 2 --output rocket.png

Compare the logged e2e_time_ms with that of `--cfg_parallel_size 1`: the image is the same, byte for byte.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from vllm_cfg_plugin import DiffusionLLM, DiffusionParams

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "models" / "emoji"

logging.basicConfig(level=logging.INFO, format="%(message)s")
logger = logging.getLogger("text_to_image")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **options: Any) -> None:
        """An option in both spellings, `--num_images` and `--num-images`."""
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)

    add("model", default=str(BUNDLED_MODEL), help="diffusers folder or hub id (default: the bundled emoji model)")
    add("prompt", default="a rocket on a black background")
    add("negative_prompt", help="needed for guidance; an empty one is enough")
    add("cfg_scale", type=float, help="guidance scale; guidance is on above 1 (default: the model's)")
    add("num_inference_steps", type=int, help="default: the model's")
    add("height", type=int, help="pixels (default: the model's)")
    add("width", type=int, help="pixels (default: the model's)")
    add("seed", type=int, help="default: drawn")
    add("num_images", type=int, default=1, help="images with seeds seed, seed + 1, ...")
    add("output", type=Path, default=Path("output.png"), help="image file; with several images output_0.png, ...")
    add("cfg_parallel_size", type=int, default=1, help="ranks (GPUs) that share the branches of guidance")
    return parser.parse_args()


def make_params(args: argparse.Namespace) -> DiffusionParams:
    """What was given on the command line; the rest stays the model's own."""
    given = {
        "negative_prompt": args.negative_prompt,
        "true_cfg_scale": args.cfg_scale,
        "num_inference_steps": args.num_inference_steps,
        "height": args.height,
        "width": args.width,
        "seed": args.seed,
    }
    return DiffusionParams(n=args.num_images, **{name: value for name, value in given.items() if value is not None})


def main() -> int:
    args = parse_arguments()
    with DiffusionLLM(args.model, cfg_parallel_size=args.cfg_parallel_size) as llm:
        (output,) = llm.generate(args.prompt, make_params(args))
    if output.error:
        logger.error("failed: %s", output.error)
        return 1
    files = ", ".join(map(str, output.save(args.output)))
    logger.info("saved %s (seeds %s)", files, ", ".join(str(metrics.seed) for metrics in output.image_metrics))
    metrics = output.metrics
    guidance = "on" if metrics.guided else f"off ({metrics.guidance_off or 'not asked for'})"
    logger.info("guidance: %s, cfg_parallel_size: %d, steps: %d", guidance, args.cfg_parallel_size, metrics.steps)
    logger.info(
        "e2e_time_ms: %.1f (queue %.1f, encode %.1f, denoise %.1f, decode %.1f)",
        metrics.e2e_time_ms,
        metrics.queue_ms,
        metrics.encode_ms,
        metrics.denoise_ms,
        metrics.decode_ms,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
