"""Images, edits and videos from a running server, through the official `openai` client.

    vllm serve MODEL --cfg-parallel-size 2
    python openai_client.py --prompt "a rocket on a black background" --negative_prompt " " --output rocket.png
    python openai_client.py --prompt "a rocket" --previews 3 --output rocket.png  # and rocket.preview0.png, ...
    python openai_client.py --prompt "make it snow" --image bear.png --output snow.png
    python openai_client.py --prompt "a cat walks on the grass" --num_frames 81 --output cat.mp4

Without --task it takes the endpoint that fits the arguments, and follows the server's hint to /v1/videos.
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from openai import BadRequestError, OpenAI, OpenAIError

# What OpenAI's API lacks goes into `extra_body`, under the names of diffusers' pipelines.
_EXTRA: dict[str, Callable[[str], Any]] = {
    "negative_prompt": str,
    "true_cfg_scale": float,
    "guidance_scale": float,
    "num_inference_steps": int,
    "seed": int,
    "num_frames": int,
    "fps": float,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--task", choices=tuple(TASKS), help="default: what the server's model does")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", action="append", default=[], help="file; may be given several times")
    parser.add_argument("--size", help="WIDTHxHEIGHT (default: the model's)")
    parser.add_argument("--previews", type=int, default=0, help="0 to 3 of an image, saved beside it as they come")
    parser.add_argument("--output", type=Path, required=True)
    for name, convert in _EXTRA.items():
        parser.add_argument(f"--{name}", type=convert, help="default: the model's")
    return parser.parse_args()


def common(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of every call: only what was given, the rest is the model's own."""
    extra = {name: getattr(args, name) for name in _EXTRA if getattr(args, name) is not None}
    return {"prompt": args.prompt, "extra_body": extra} | ({"size": args.size} if args.size else {})


def generate(client: OpenAI, args: argparse.Namespace) -> bytes:
    """POST /v1/images/generations"""
    return image_of(partial(client.images.generate, **common(args)), args)


def edit(client: OpenAI, args: argparse.Namespace) -> bytes:
    """POST /v1/images/edits"""
    with ExitStack() as files:
        images = [files.enter_context(open(path, "rb")) for path in args.image]
        return image_of(partial(client.images.edit, image=images, **common(args)), args)


def image_of(call: Callable[..., Any], args: argparse.Namespace) -> bytes:
    """The image that a call makes; its previews are saved on the way."""
    if not args.previews:
        return base64.b64decode(call().data[0].b64_json)
    for event in call(stream=True, partial_images=args.previews):
        image = base64.b64decode(event.b64_json)
        if event.type.endswith(".completed"):
            return image
        path = args.output.with_suffix(f".preview{event.partial_image_index}{args.output.suffix}")
        path.write_bytes(image)
        print(f"saved {path}")
    raise OpenAIError("the stream ended without an image")


def make_video(client: OpenAI, args: argparse.Namespace) -> bytes:
    """POST /v1/videos, then GET its state until it is done, then its file."""
    reference = {"input_reference": Path(args.image[0])} if args.image else {}
    video = client.videos.create_and_poll(poll_interval_ms=500, **reference, **common(args))
    if video.status != "completed":
        raise OpenAIError(f"the video failed: {video.error}")
    return client.videos.download_content(video.id).read()


TASKS: dict[str, Callable[[OpenAI, argparse.Namespace], bytes]] = {
    "generate": generate,
    "edit": edit,
    "video": make_video,
}


def run(client: OpenAI, args: argparse.Namespace) -> bytes:
    """The file that was asked for."""
    if args.task:
        return TASKS[args.task](client, args)
    if args.num_frames or args.fps:
        return make_video(client, args)
    try:
        return (edit if args.image else generate)(client, args)
    except BadRequestError as refusal:
        if "/v1/videos" not in refusal.message:
            raise
        return make_video(client, args)


def main() -> int:
    args = parse_arguments()
    started = time.perf_counter()
    with OpenAI(base_url=args.url, api_key="unused", max_retries=0) as client:
        try:
            content = run(client, args)
        except OpenAIError as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    args.output.write_bytes(content)
    print(f"saved {args.output}, {1000 * (time.perf_counter() - started):.0f} ms with all there is between us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
