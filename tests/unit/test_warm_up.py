"""What traffic would compile is compiled before: at start-up a pack of every model has branches of unlike timesteps."""

import pytest
import torch

from tests.contract import branches_of
from tests.families import FAMILIES, load
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.distributed.sequence_group import ALONE
from vllm_cfg_plugin.pipelines.common import fused
from vllm_cfg_plugin.pipelines.common.generate import predict
from vllm_cfg_plugin.pipelines.registry import describe
from vllm_cfg_plugin.worker.warm_up import warm_up

LABELS = ("QwenImageEditPlusPipeline", "ZImagePipeline", "WanImageToVideoPipeline (2.2 14B)", "FluxPipeline")


@pytest.mark.parametrize("label", LABELS)
@torch.inference_mode()
def test_all_that_traffic_uses_is_used_at_start_up(monkeypatch, tmp_path, label):
    family = next(family for family in FAMILIES if family.label == label)
    folder = family.build(tmp_path / "model")
    pipeline = load(folder)
    used = set()
    monkeypatch.setattr(fused, "is_enabled", lambda device: True)
    monkeypatch.setattr(
        fused, "compiled", lambda function: lambda *args: used.add(key(function, args)) or function(*args)
    )
    warm_up(pipeline, describe(Checkpoint(str(folder))), ALONE)
    at_start, used = used.copy(), used
    requests = family.requests(folder)
    predict(pipeline, [b for step, request in enumerate(requests) for b in branches_of(pipeline, request, step)])
    assert used == at_start != set()


def key(function, args):
    """What torch compiles anew for."""
    return function, *((arg.dtype, arg.dim()) for arg in args if isinstance(arg, torch.Tensor))
