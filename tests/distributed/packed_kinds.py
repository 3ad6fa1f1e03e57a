"""Small transformers of every packed family with their forwards, and forked processes that share them."""

import multiprocessing
import pickle
import queue
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.distributed import init_distributed_environment
from vllm.utils.network_utils import get_open_port

from tests.model_builders import qwen_image, z_image
from tests.model_builders.mmdit import flux_transformer, longcat_image_transformer, sd3_transformer
from tests.model_builders.qwen_image import SIZES
from tests.model_builders.wan import ModelSize, wan_transformer
from tests.unit import test_qwen_image_transformer as qwen_image_checks
from tests.unit import test_wan_transformer as wan_checks
from tests.unit import test_z_image_transformer as z_image_checks
from tests.unit.test_flux_transformer import TestPackedFlux as FluxChecks
from tests.unit.test_longcat_image_transformer import TestPackedLongCatImage as LongCatImageChecks
from tests.unit.test_sd3_transformer import VERSIONS
from tests.unit.test_sd3_transformer import TestPackedSD3 as SD3Checks
from vllm_cfg_plugin.pipelines.flux.transformer import PackedFluxTransformer
from vllm_cfg_plugin.pipelines.longcat_image.transformer import PackedLongCatImageTransformer
from vllm_cfg_plugin.pipelines.qwen_image.transformer import PackedQwenImageTransformer
from vllm_cfg_plugin.pipelines.sd3.transformer import PackedSD3Transformer
from vllm_cfg_plugin.pipelines.wan.transformer import PackedWanTransformer
from vllm_cfg_plugin.pipelines.z_image.transformer import PackedZImageTransformer

SMALL = SIZES["small"]  # it has four heads, so each of four ranks has one
TIMEOUT_S = 240


class Kind(NamedTuple):
    """A packed transformer, its forward of a pack of sequences, and how sequences are drawn."""

    model: Any
    forward: Callable[[Any, list[Any]], list[torch.Tensor]]
    draw: Callable[[int], list[Any]]


def packed_kinds() -> dict[str, Kind]:
    """All packed families, and the kinds of Wan."""
    torch.manual_seed(0)
    qwen = PackedQwenImageTransformer.adopt(qwen_image.transformer(SMALL))
    z = PackedZImageTransformer.adopt(z_image.transformer(SMALL))
    kinds = {
        "qwen_image": Kind(qwen, qwen_image_checks.forward_packed, qwen_image_checks.draw_sequences),
        "z_image": Kind(z, z_image_checks.forward, z_image_checks.draw_sequences),
    }
    for name, checks, model in (
        ("flux", FluxChecks(), PackedFluxTransformer.adopt(flux_transformer(SMALL))),
        ("longcat_image", LongCatImageChecks(), PackedLongCatImageTransformer.adopt(longcat_image_transformer(SMALL))),
        ("sd3.5", SD3Checks(), PackedSD3Transformer.adopt(sd3_transformer(SMALL, **VERSIONS["3.5"]))),
    ):
        kinds[name] = Kind(model, checks.forward, partial(checks.draw, seed=1))
    for kind, options in wan_checks.KINDS.items():
        packed = PackedWanTransformer.adopt(wan_transformer(ModelSize(heads=4), **options))
        draw = wan_checks.Models(packed, packed, kind).draw
        kinds[f"wan {kind}"] = Kind(packed, partial(_forward_wan, kind), draw)
    return kinds


def _forward_wan(kind: str, model: Any, videos: list[Any]) -> list[torch.Tensor]:
    return wan_checks.Models(model, model, kind).forward_packed(videos)


def run_forked(work: Callable[..., dict[Any, Any]], ranks: int, *args: Any) -> list[dict[Any, Any]]:
    """What `work(rank, *args)` returns on each of so many processes of one gloo world, forked with the arguments."""
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), get_open_port()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            # As bytes: tensors would stay behind in the process's memory.
            answers.put((rank, pickle.dumps(work(rank, *args)), None))
        except BaseException:
            answers.put((rank, b"", traceback.format_exc()))

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    collected: dict[int, dict[Any, Any]] = {}
    try:
        while len(collected) < ranks:
            rank, found, error = answers.get(timeout=TIMEOUT_S)
            assert error is None, f"rank {rank} raised:\n{error}"
            collected[rank] = pickle.loads(found)
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(collected)} finished in {TIMEOUT_S} s") from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(collected) == ranks else 0)
            process.kill()
    return [collected[rank] for rank in range(ranks)]
