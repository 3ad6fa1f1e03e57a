"""A pipeline with the CFG-Parallel mixin, called directly: no server, no engine. Rank 0 saves the image.

python direct_mixin.py --output rocket.png                                # one rank, both branches
torchrun --nproc-per-node 2 direct_mixin.py --output rocket.png           # two ranks, one branch each
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from PIL import Image

from vllm_cfg_plugin.distributed import (
    destroy_model_parallel,
    get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size,
    initialize_model_parallel,
)
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline

BUNDLED_MODEL = Path(__file__).resolve().parents[1] / "models" / "emoji"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="a Qwen-Image (default: the bundled emoji model)")
    parser.add_argument("--prompt", default="a rocket on a black background")
    parser.add_argument("--negative-prompt", default=" ")
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("output.png"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    # torchrun sets WORLD_SIZE; all its processes share the branches of guidance.
    initialize_model_parallel(cfg_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
    rank, ranks = get_classifier_free_guidance_rank(), get_classifier_free_guidance_world_size()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipeline = QwenImagePipeline.load(args.model, dtype=dtype, device=device)

    def generate(steps: int) -> Image.Image:
        return pipeline(
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            guidance_scale=args.cfg_scale,
            num_inference_steps=steps,
            height=args.size,
            width=args.size,
            generator=torch.Generator().manual_seed(args.seed),
        ).images[0]

    generate(2)  # what is set up once
    started = time.perf_counter()
    image = generate(args.steps)  # the same on every rank
    print(f"rank {rank} of {ranks}: e2e_time_ms: {1000 * (time.perf_counter() - started):.1f}", flush=True)
    if rank == 0:
        image.save(args.output)
        print(f"saved {args.output}")
    destroy_model_parallel()


if __name__ == "__main__":
    main()
