"""What a model takes of GPUs, and what goes where on them.

    python -m vllm_cfg_plugin.memory MODEL --gpu 80 [--ranks 2] [--tensor-parallel-size 2] [--quantization fp8] ...

Nothing is loaded and no GPU is needed: configurations and the headers of weight files are enough, also of a hub id.
Exit code 1: the model does not fit.
"""

from __future__ import annotations

import argparse
import sys

import torch

from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.config import QUANTIZATIONS, TEXT_ENCODERS
from vllm_cfg_plugin.errors import ConfigurationError
from vllm_cfg_plugin.memory.placement import (
    GIB,
    Card,
    ModelMemory,
    Placement,
    describe_placement,
    fits,
    gib,
    place,
    refusal,
)
from vllm_cfg_plugin.memory.sizing import model_memory
from vllm_cfg_plugin.pipelines.registry import check_sharing

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m vllm_cfg_plugin.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder or a hub id")
    parser.add_argument("--gpu", type=float, required=True, metavar="GB", help="memory of each GPU")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="cfg ranks (--cfg-parallel-size)")
    parser.add_argument(
        "--sequence-parallel-size", type=int, default=1, metavar="N", help="GPUs of each rank, which share its forwards"
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of those that have the weights together",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--revision")
    parser.add_argument("--variant", default="", metavar="NAME", help="as in model.fp16.safetensors")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="SHARE", help="as of `vllm serve`"
    )
    parser.add_argument("--cfg-text-encoder", choices=TEXT_ENCODERS, help="default: the first of these that fits")
    parser.add_argument("--quantization", choices=QUANTIZATIONS)
    parser.add_argument(
        "--cpu-offload-gb", type=float, default=0, metavar="GB", help="as of `vllm serve`; default: as many as it must"
    )
    args = parser.parse_args(arguments)
    try:
        checkpoint = Checkpoint(args.model, args.revision)
        sizes = {"sequence_parallel_size": args.sequence_parallel_size}
        sizes["tensor_parallel_size"] = args.tensor_parallel_size
        check_sharing(checkpoint, **sizes)
        model = model_memory(checkpoint, _DTYPES[args.dtype], args.variant, args.quantization, **sizes)
    except ConfigurationError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    card = Card(int(args.gpu * GIB), args.gpu_memory_utilization)
    placement = place(model, card, args.ranks, args.cfg_text_encoder, int(args.cpu_offload_gb * GIB))
    print("\n".join(_lines(args.model, model, placement, card, args.ranks)))
    return 0 if fits(placement, card) else 1


def _lines(name: str, model: ModelMemory, placement: Placement, card: Card, ranks: int) -> list[str]:
    rows = [
        _row(component, gib(size.nbytes), gib(placement.resident[component]), _place_of(component, placement))
        for component, size in model.components.items()
    ]
    rows += [_row(what, "", gib(nbytes), "") for what, nbytes in placement.work.items()]
    rows = [_row("", "weights", "on a rank", ""), *rows]
    if not fits(placement, card):
        return [*rows, refusal(name, placement, card, ranks)]
    free = card.usable - placement.needed
    return [
        *rows,
        f"Fits with {describe_placement(placement, ranks)}: the fullest rank needs {gib(placement.needed)} of "
        f"{gib(card.usable)}, and each keeps {gib(placement.host)} in host memory.",
        f"A step takes {model.step_token_bytes // 1024} kB a token, a decode {model.decode_token_bytes // 1024} kB a "
        f"token of the image: room is left for {free // model.step_token_bytes} more tokens in a step, or for a decode "
        f"of {model.image_tokens + free // model.decode_token_bytes} tokens.",
    ]


def _row(what: str, weights: str, on_rank: str, place: str) -> str:
    return f"{what:<20}{weights:>10}{on_rank:>14}  {place}".rstrip()


def _place_of(component: str, placement: Placement) -> str:
    if component in placement.streamed:
        return "in host memory, streamed layer by layer"
    if component.startswith("transformer") and placement.offloaded:
        return "on every rank, some layers in host memory"
    if component.startswith("text_encoder") and placement.text_encoder == "one":
        return "on the first rank"
    return "on every rank"


if __name__ == "__main__":
    sys.exit(main())
