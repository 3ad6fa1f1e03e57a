"""Ranks exchange predictions in the dtype that a family predicts in: another one would round them on their way."""

import pytest
import torch

from tests.contract import branches_of, predict
from tests.families import FAMILIES
from vllm_cfg_plugin.checkpoint import Checkpoint
from vllm_cfg_plugin.pipelines.registry import pipeline_class


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
@torch.inference_mode()
def test_predictions_are_like_what_the_exchange_is_told(family, tmp_path):
    folder = family.build(tmp_path / "model")
    cls = pipeline_class(Checkpoint(str(folder)))
    pipeline = cls.load(str(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    request = min(family.requests(folder), key=lambda request: request.image_tokens + request.condition_tokens)
    (prediction,) = predict(pipeline, branches_of(pipeline, request)[:1])
    assert prediction.dtype == pipeline.prediction_like.dtype
