"""What torch compiles of packed forwards is compiled at start-up, before a request has to wait for it.

Must not import vLLM.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch

from vllm_cfg_plugin.checkpoint import PipelineInfo
from vllm_cfg_plugin.distributed.sequence_group import SequenceGroup, together
from vllm_cfg_plugin.pipelines.base import EnginePipeline, group_branches
from vllm_cfg_plugin.pipelines.sample_request import blank_embeds, sample_request
from vllm_cfg_plugin.worker.calibration import sample_branch

_SCALE = 0.25  # of the model's own size
_STEPS = 8
_TEXT_TOKENS = 64


@torch.inference_mode()
def warm_up(pipeline: EnginePipeline, info: PipelineInfo, group: SequenceGroup) -> None:
    """Forward branches at unlike timesteps in a pack, by every model that a pipeline has for some of them.

    Args:
        group: the ranks that share the forwards; all of them call this.
    """
    request = msgspec.structs.replace(sample_request(info, _SCALE), num_inference_steps=_STEPS)
    branch = sample_branch(pipeline, request, blank_embeds(pipeline, _TEXT_TOKENS))
    *_, before_last, last = timesteps = pipeline.make_noise_scheduler(request).timesteps
    branches = [replace(branch, timestep=timestep) for timestep in (*timesteps[:2], before_last, last)]
    for positions in group_branches(pipeline, branches):
        with together(group):
            pipeline.predict_noise(**pipeline.pack_branches([branches[position] for position in positions]))
