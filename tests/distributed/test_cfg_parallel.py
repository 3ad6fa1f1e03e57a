"""The cfg groups and the mixin on real gloo ranks: the same bits as on one rank, and nobody left waiting."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.ranks import free_port, run_ranks
from vllm_cfg_plugin.distributed.cfg_parallel import CFGParallelMixin
from vllm_cfg_plugin.distributed.parallel_state import cfg_group_ranks, sequence_group_ranks, tensor_group_ranks
from vllm_cfg_plugin.errors import ConfigurationError

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SHAPE = (1, 12, 8)


class ToyScheduler:
    """Counts its steps, and adds noise of its own: ranks agree on the latents only if one of them steps for all."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self, noise_pred, t, latents, return_dict):
        self.steps += 1
        return (latents - 0.1 * noise_pred + 0.01 * torch.randn(latents.shape, generator=self.generator),)


class ToyPipeline(CFGParallelMixin):
    """A pipeline whose transformer is one matrix product; it may be told to fail or to predict another shape."""

    def __init__(self, scheduler_seed):
        weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(7))
        self.transformer = lambda hidden_states, shift: (torch.tanh(hidden_states @ weight + shift),)
        self.scheduler = ToyScheduler(scheduler_seed)

    def predict_noise(self, fails=False, tokens=None, **kwargs):
        if fails:
            raise ArithmeticError("this branch can't be predicted")
        return super().predict_noise(**kwargs)[:, :tokens]

    def diffuse(self, latents, guided_steps):
        """Latents after every step."""
        history = []
        for t, guided in enumerate(guided_steps):
            positive, negative = ({"hidden_states": latents, "shift": shift} for shift in (0.5, -0.25))
            noise = self.predict_noise_maybe_with_cfg(guided, 3.0, positive, negative if guided else None)
            latents = self.scheduler_step_maybe_with_cfg(noise, torch.tensor(t), latents, guided)
            history.append(latents.clone())
        return torch.stack(history)


def first_latents():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def start_cfg_group(cfg_parallel_size, tensor_parallel_size=1):
    """Initialise as a user under torchrun would; returns (cfg rank, cfg world size)."""
    from vllm_cfg_plugin.distributed import (
        get_classifier_free_guidance_rank,
        get_classifier_free_guidance_world_size,
        initialize_model_parallel,
    )

    initialize_model_parallel(cfg_parallel_size, tensor_parallel_size)
    return get_classifier_free_guidance_rank(), get_classifier_free_guidance_world_size()


def diffuse_on_rank(cfg_parallel_size, guided_steps):
    rank, world_size = start_cfg_group(cfg_parallel_size)
    assert world_size == cfg_parallel_size
    pipeline = ToyPipeline(scheduler_seed=rank)
    return pipeline.diffuse(first_latents(), guided_steps).numpy(), pipeline.scheduler.steps


def failure_on_rank(bad_rank, kind):
    """What this rank raises when one rank can't go on, and the result of a step after that."""
    rank, _ = start_cfg_group(2)
    pipeline = ToyPipeline(scheduler_seed=rank)
    kwargs = {"hidden_states": first_latents(), "shift": 1.0}
    trouble = {"fails": {"fails": True}, "other shape": {"tokens": 5}}.get(kind, {})
    mine = kwargs | trouble if rank == bad_rank else kwargs
    message = ""
    try:
        if kind == "step fails":
            pipeline.scheduler = None if rank == bad_rank else pipeline.scheduler
            pipeline.scheduler_step_maybe_with_cfg(kwargs["hidden_states"], torch.tensor(0), first_latents(), True)
        else:
            pipeline.predict_noise_maybe_with_cfg(True, 3.0, mine, mine)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    after = pipeline.predict_noise_maybe_with_cfg(True, 3.0, kwargs, kwargs | {"shift": 0.0})
    return message, after.numpy()


def sliced_on_rank():
    start_cfg_group(2)
    kwargs = {"hidden_states": first_latents(), "shift": 1.0}
    noise = ToyPipeline(0).predict_noise_maybe_with_cfg(True, 3.0, kwargs, kwargs | {"shift": 0.0}, output_slice=5)
    return noise.numpy()


class ThreeBranches(ToyPipeline):
    def combine_multi_branch_cfg_noise(self, predictions, true_cfg_scale, cfg_normalize=False):
        both, image, nothing = predictions
        text_scale, image_scale = true_cfg_scale
        return nothing + image_scale * (image - nothing) + text_scale * (both - image)


def predict_three_branches():
    shifts = (0.5, -0.25, 0.125)
    branches = [{"hidden_states": first_latents(), "shift": shift} for shift in shifts]
    return ThreeBranches(0).predict_noise_with_multi_branch_cfg(True, (3.0, 1.5), branches, output_slice=7).numpy()


def three_branches_on_rank(ranks):
    start_cfg_group(ranks)
    return predict_three_branches()


def groups_on_rank():
    """(cfg group, vLLM's tensor parallel group) of this rank, as ranks, with vLLM's own groups built first."""
    import torch.distributed as dist
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state as vllm_state

    from vllm_cfg_plugin.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        vllm_state.init_distributed_environment(
            int(os.environ["WORLD_SIZE"]),
            int(os.environ["RANK"]),
            "env://",
            int(os.environ["LOCAL_RANK"]),
            backend="gloo",
        )
        vllm_state.initialize_model_parallel(tensor_model_parallel_size=2)
    parallel_state.initialize_model_parallel(cfg_parallel_size=2, tensor_parallel_size=2)
    parallel_state.initialize_model_parallel(cfg_parallel_size=2, tensor_parallel_size=2)
    group = parallel_state.get_cfg_group()
    gathered = group.all_gather(torch.tensor([float(group.rank)]), dim=0).tolist()
    groups = group.ranks, vllm_state.get_tp_group().ranks, gathered
    parallel_state.destroy_model_parallel()
    assert dist.is_initialized(), "a world that vLLM started must outlive our group"
    assert parallel_state.get_classifier_free_guidance_world_size() == 1
    return groups


def images_on_rank(folder, generator_seed):
    rank, _ = start_cfg_group(2)
    return latents_of_two_generations(folder, generator_seed, global_seed=rank)


def latents_of_two_generations(folder, generator_seed, global_seed=0):
    """Final latents of a guided and of an unguided generation, noise from torch's own generator if no seed is given."""
    from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline

    pipeline = QwenImagePipeline.load(folder, dtype=torch.float32, device=torch.device("cpu"))
    options = {"num_inference_steps": 3, "height": 64, "width": 48, "output_type": "latent"}
    latents = []
    torch.manual_seed(global_seed)
    for negative_prompt in ("", None):
        generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
        images = pipeline("a red apple", negative_prompt, 3.0, generator=generator, **options).images
        latents.append(images.numpy())
    return latents


def sequential_history(guided_steps):
    return ToyPipeline(scheduler_seed=0).diffuse(first_latents(), guided_steps).numpy()


@pytest.mark.parametrize("ranks", [2, 3])
def test_parallel_is_bitwise_sequential_after_every_step(ranks):
    guided_steps = [True] * 4
    results = run_ranks(diffuse_on_rank, ranks, ranks, guided_steps)
    for history, _ in results:
        np.testing.assert_array_equal(history, sequential_history(guided_steps))
    assert [steps for _, steps in results] == [4] + [0] * (ranks - 1)  # rank 0 steps for all


def test_guidance_may_be_switched_between_steps():
    guided_steps = [False, True, True, False, True]
    for history, _ in run_ranks(diffuse_on_rank, 2, 2, guided_steps):
        np.testing.assert_array_equal(history, sequential_history(guided_steps))


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_rank_that_raises_does_not_hang_the_other(bad_rank):
    results = run_ranks(failure_on_rank, 2, bad_rank, "fails")
    assert results[bad_rank][0] == "ArithmeticError: this branch can't be predicted"
    assert results[1 - bad_rank][0].startswith(f"RequestFailedError: cfg rank {bad_rank} failed")
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_a_scheduler_that_raises_on_rank_0_hangs_nobody():
    """A scheduler that raises on rank 0 does not hang the other."""
    (first, after), (second, other_after) = run_ranks(failure_on_rank, 2, 0, "step fails")
    assert first.startswith("AttributeError")
    assert second.startswith("RequestFailedError: cfg rank 0 failed")
    np.testing.assert_array_equal(after, other_after)


def test_predictions_of_other_shapes_are_an_error_on_all_ranks():
    """Predictions of different shapes are an error on both ranks."""
    for message, _ in run_ranks(failure_on_rank, 2, 1, "other shape"):
        assert message.startswith("RequestFailedError: the branches' predictions differ")
        assert "rank 0: [1, 12, 8], rank 1: [1, 5, 8]" in message


def test_output_slice():
    kwargs = {"hidden_states": first_latents(), "shift": 1.0}
    expected = ToyPipeline(0).predict_noise_maybe_with_cfg(True, 3.0, kwargs, kwargs | {"shift": 0.0}, output_slice=5)
    for noise in run_ranks(sliced_on_rank, 2):
        np.testing.assert_array_equal(noise, expected.numpy())


@pytest.mark.parametrize("ranks", [2, 3])
def test_three_branches_are_bitwise_those_of_one_rank(ranks):
    """On two ranks the first one has two of them."""
    for noise in run_ranks(three_branches_on_rank, ranks, ranks):
        np.testing.assert_array_equal(noise, predict_three_branches())


def test_branches_that_nobody_combines_are_refused():
    kwargs = {"hidden_states": first_latents(), "shift": 1.0}
    with pytest.raises(ValueError, match="override combine_multi_branch_cfg_noise"):
        ToyPipeline(0).predict_noise_with_multi_branch_cfg(True, 3.0, [kwargs] * 3)


def test_groups_beside_vllms_own_tensor_parallel_groups():
    results = run_ranks(groups_on_rank, 4)
    assert [cfg for cfg, _, _ in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [tp for _, tp, _ in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [gathered for _, _, gathered in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]


@pytest.mark.parametrize("generator_seed", [1, None])
def test_qwen_image_on_two_ranks_is_bitwise_that_of_one(qwen_image_folders, generator_seed):
    """Without a generator every rank would draw noise of its own: rank 0's must count."""
    folder = str(qwen_image_folders["tiny"])
    alone = latents_of_two_generations(folder, generator_seed)
    for latents in run_ranks(images_on_rank, 2, folder, generator_seed):
        np.testing.assert_array_equal(latents, alone)


SCRIPT = """
import sys, torch
from vllm_cfg_plugin.distributed import initialize_model_parallel
from vllm_cfg_plugin.distributed.parallel_state import get_classifier_free_guidance_rank
from vllm_cfg_plugin.pipelines.qwen_image import QwenImagePipeline

initialize_model_parallel(cfg_parallel_size=2)
pipeline = QwenImagePipeline.from_pretrained(sys.argv[1])
options = {"num_inference_steps": 2, "height": 32, "width": 32}
image = pipeline(prompt="a cat", negative_prompt="", guidance_scale=3.5, **options).images[0]
image.save(f"{sys.argv[2]}/{get_classifier_free_guidance_rank()}.png")
"""


def test_torchrun(qwen_image_folders, tmp_path):
    """The whole way of a user's script; every rank returns the same image."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, qwen_image_folders["tiny"], tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 1, 1), [[0]]),
        ((2, 2, 1), [[0, 1]]),
        ((4, 2, 2), [[0, 2], [1, 3]]),
        ((6, 3, 2), [[0, 2, 4], [1, 3, 5]]),
        ((4, 1, 4), [[0], [1], [2], [3]]),
        ((4, 2, 1, 2), [[0, 2], [1, 3]]),
    ],
)
def test_cfg_group_ranks(sizes, expected):
    assert cfg_group_ranks(*sizes) == expected


def test_sequence_group_ranks():
    assert sequence_group_ranks(4, 1, 2) == [[0, 1], [2, 3]]
    assert sequence_group_ranks(8, 2, 2) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_tensor_group_ranks():
    assert tensor_group_ranks(4, 2) == [[0, 1], [2, 3]]
    assert tensor_group_ranks(2, 1) == [[0], [1]]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match=r"cfg_parallel_size=0 is not valid"):
        cfg_group_ranks(1, 0, 1)
    with pytest.raises(ConfigurationError, match=r"cfg_parallel_size=2 x tensor_parallel_size=2 = 4 ranks.* has 2"):
        cfg_group_ranks(2, 2, 2)
    with pytest.raises(ConfigurationError, match=r"sequence_parallel_size=2 = 4 ranks.* has 2"):
        cfg_group_ranks(2, 2, 1, 2)


def test_initialising_twice_with_other_sizes_is_refused():
    from vllm_cfg_plugin.distributed import parallel_state

    with pytest.raises(ConfigurationError, match="call initialize_model_parallel"):
        parallel_state.get_cfg_group()
    with pytest.raises(ConfigurationError, match="torchrun --nproc-per-node 2"):
        parallel_state.initialize_model_parallel(2)
    parallel_state.initialize_model_parallel()
    try:
        assert parallel_state.get_cfg_group().world_size == 1
        with pytest.raises(ConfigurationError, match=r"=\(2, 1, 1\), but the groups exist with \(1, 1, 1\)"):
            parallel_state.initialize_model_parallel(2)
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_model_parallel()
