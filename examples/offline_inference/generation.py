"""What the offline examples share: their flags, the run, its comparison with one rank, the log lines."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vllm_cfg_plugin import DiffusionLLM, DiffusionOutput, DiffusionParams
from vllm_cfg_plugin.errors import CfgPluginError

logging.basicConfig(level=logging.INFO, format="%(message)s")
logger = logging.getLogger("example")

_PARAMS = ("negative_prompt", "num_inference_steps", "height", "width", "num_frames", "seed")


def make_parser(description: str | None, *, model: str | None, prompt: str, output: str) -> argparse.ArgumentParser:
    """The flags that all examples have.

    Args:
        description: the script's docstring.
        model: the default; None makes the flag a must.
        prompt, output: defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser, "model", default=model, required=model is None, help=f"diffusers folder or hub id ({model})")
    add_option(parser, "prompt", default=prompt)
    add_option(parser, "negative_prompt", help="most models need one for guidance; an empty one is enough")
    add_option(parser, "cfg_scale", type=float, help="guidance scale; guidance is on above 1 (default: the model's)")
    add_option(parser, "num_inference_steps", type=int, help="default: the model's")
    add_option(parser, "height", type=int, help="pixels (default: the model's)")
    add_option(parser, "width", type=int, help="pixels (default: the model's)")
    add_option(parser, "seed", type=int, help="default: drawn")
    add_option(parser, "output", type=Path, default=Path(output), help=f"file to write (default: {output})")
    add_option(parser, "cfg_parallel_size", type=int, default=1, help="ranks (GPUs) that share guidance's branches")
    add_option(parser, "sequence_parallel_size", type=int, default=1, help="GPUs that share each forward of a rank")
    add_option(parser, "tensor_parallel_size", type=int, default=1, help="GPUs that share the weights of each rank")
    add_option(parser, "compare", action="store_true", help="run on one rank of one GPU too and compare the two")
    return parser


def add_option(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """An option in both spellings, `--num_images` and `--num-images`."""
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)


def run(args: argparse.Namespace, images: Sequence[str] = (), fps: float | None = None) -> int:
    """Generate, save and log what was asked for; returns the exit code.

    Args:
        images: files that the prompt comes with.
        fps: frames a second of a video's file; None for the model's own.
    """
    names = ("cfg_parallel_size", "sequence_parallel_size", "tensor_parallel_size")
    sizes = {name: getattr(args, name) for name in names}
    if args.compare and set(sizes.values()) == {1}:
        logger.error("--compare needs one of --%s of 2 or more", ", --".join(names))
        return 2
    try:
        output = _generate(args, images, **sizes)
        for file in output.save(args.output, **({} if fps is None else {"fps": fps})):
            logger.info("saved %s", file)
        _log(output, sizes)
        if args.compare:
            args.seed = output.image_metrics[0].seed  # it may have been drawn
            _compare(output, _generate(args, images, cfg_parallel_size=1), sizes)
    except (CfgPluginError, OSError) as error:
        logger.error("failed: %s", error)
        return 1
    return 0


def _generate(args: argparse.Namespace, images: Sequence[str], **sizes: int) -> DiffusionOutput:
    prompt = {"prompt": args.prompt} | ({"image": list(images)} if images else {})
    with DiffusionLLM(args.model, **sizes) as llm:
        params = _params(args, llm)
        if args.compare:  # the first request of a process also pays for what is set up once
            llm.generate(prompt | {"prompt": "warm-up"}, params, use_tqdm=False)
        (output,) = llm.generate(prompt, params)
    if output.error:
        raise CfgPluginError(output.error)
    return output


def _params(args: argparse.Namespace, llm: DiffusionLLM) -> DiffusionParams:
    """What was given on the command line; the rest stays the model's own."""
    given = {name: getattr(args, name, None) for name in _PARAMS}
    given[llm.info.cfg_scale] = args.cfg_scale
    return DiffusionParams(
        n=getattr(args, "num_images", 1), **{name: value for name, value in given.items() if value is not None}
    )


def _log(output: DiffusionOutput, sizes: Mapping[str, int]) -> None:
    metrics = output.metrics
    guidance = "on" if metrics.guided else f"off ({metrics.guidance_off or 'not asked for'})"
    logger.info("seeds: %s", ", ".join(str(one.seed) for one in output.image_metrics))
    logger.info("guidance: %s, %s, steps: %d", guidance, _in_words(sizes), metrics.steps)
    logger.info(
        "e2e_time_ms: %.1f (queue %.1f, encode %.1f, denoise %.1f, decode %.1f)",
        metrics.e2e_time_ms,
        metrics.queue_ms,
        metrics.encode_ms,
        metrics.denoise_ms,
        metrics.decode_ms,
    )


def _in_words(sizes: Mapping[str, int]) -> str:
    """Those that are not 1; the first always."""
    return ", ".join(f"{name}: {size}" for name, size in sizes.items() if size > 1 or name == "cfg_parallel_size")


def _compare(parallel: DiffusionOutput, sequential: DiffusionOutput, sizes: Mapping[str, int]) -> None:
    times = parallel.metrics.e2e_time_ms, sequential.metrics.e2e_time_ms
    logger.info("e2e_time_ms with %s: %.1f", _in_words(sizes), times[0])
    logger.info("e2e_time_ms with cfg_parallel_size: 1: %.1f", times[1])
    logger.info("ratio: %.2f", times[1] / times[0])
    pairs = zip(_pictures(parallel), _pictures(sequential), strict=True)
    differences = [np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() for one, other in pairs]
    largest = max(differences)
    logger.info("results: %s", "identical" if largest == 0 else f"differ by up to {largest} of 255")


def _pictures(output: DiffusionOutput) -> list[Image.Image]:
    """All images, or the frames of all videos."""
    return [*output.images, *(frame for video in output.videos for frame in video)]
