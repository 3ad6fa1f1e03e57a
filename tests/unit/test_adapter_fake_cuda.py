"""Adapters on a fake GPU: devices and types fit, and a step with them never waits for the GPU."""

import pytest

from tests.unit.adapter_checks import draw_adapter
from tests.unit.fake_cuda import DEVICE
from tests.unit.test_fake_cuda import OF_EVERY_TRANSFORMER, plan, rank_on_gpu
from vllm_cfg_plugin.pipelines.adapters import Adapter, LowRank


def on_gpu(adapter, dtype):
    layers = {name: LowRank(*(half.to(DEVICE, dtype) for half in own)) for name, own in adapter.layers.items()}
    return Adapter(adapter.key, layers, adapter.modulates)


@pytest.mark.parametrize("family", OF_EVERY_TRANSFORMER, ids=lambda family: family.label)
def test_a_step_with_adapters_never_waits_for_the_gpu(family, tmp_path):
    with rank_on_gpu(family, tmp_path / "model") as (runner, gpu):
        models = {name: getattr(runner.pipeline, name, None) for name in ("transformer", "transformer_2")}
        adapters = [
            on_gpu(draw_adapter(model, seed, modulating=True), model.dtype)
            for model in models.values()
            if model is not None
            for seed in (1, 2)
        ]
        assert not runner.run(plan(1)).failed
        launches = []
        for carried in ((), tuple((adapter, 0.5) for adapter in adapters)):
            first, *others = runner.states.values()
            first.carried = carried
            assert others, "neighbours without adapters"
            assert not runner.run(plan(2 + 2 * len(launches))).failed  # modulations are remembered from now on
            counts = gpu.start_counting()
            assert not runner.run(plan(3 + 2 * len(launches))).failed
            launches.append(counts.launches.total())
            assert counts.syncs == {}
    assert launches[1] > launches[0]
