"""Direct calls of a family's pipeline: the engine's steps for a few requests, on one cfg rank or many.

The steps are those of `worker/runner.py`, so a direct call and the engine give bitwise the same latents. Must not
import vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from vllm_cfg_plugin.distributed.cfg_parallel import log_once, predict_on_ranks, same_on_all_ranks
from vllm_cfg_plugin.distributed.parallel_state import (
    get_classifier_free_guidance_world_size,
    get_forward_coordinator,
)
from vllm_cfg_plugin.errors import InvalidRequestError
from vllm_cfg_plugin.params import DiffusionRequest
from vllm_cfg_plugin.pipelines.adapters import carrying
from vllm_cfg_plugin.pipelines.base import BranchInput, EnginePipeline, PromptEmbeds, group_branches
from vllm_cfg_plugin.pipelines.common.step_cache import History, complete

Generators = torch.Generator | list[torch.Generator] | None


class DirectCall:
    """Requests that differ in texts and noise alone.

    Args:
        requests: of the same size, steps, guidance and images.
        generator: of the noise that a step may draw: one, or one for each request.
        embeds: of each branch, those of every request, where the caller has them; None where they are to be encoded.
        condition: what the images became, where the caller has that.
        forward_options: further arguments of `predict_noise`.
    """

    def __init__(
        self,
        pipeline: EnginePipeline,
        requests: Sequence[DiffusionRequest],
        generator: Generators,
        embeds: Sequence[Sequence[PromptEmbeds] | None] = (),
        condition: Sequence[torch.Tensor] | None = None,
        **forward_options: Any,
    ) -> None:
        self._pipeline = pipeline
        self._requests = requests
        self._generator = _alike_on_all_ranks(generator)
        self._options = forward_options
        self._embeds: dict[tuple[Any, ...], PromptEmbeds] = {}
        self._given = embeds
        if condition is None:
            condition = pipeline.encode_images(requests[0]) if requests[0].images else []
        self.condition = condition

    def denoise(self, latents: torch.Tensor) -> torch.Tensor:
        """Final latents from first ones, [requests, ...]; every rank returns the same.

        Raises:
            RequestFailedError: another rank failed; no rank is left waiting.
        """
        pipeline, first = self._pipeline, self._requests[0]
        scheduler = pipeline.make_noise_scheduler(first)
        first = msgspec.structs.replace(first, num_timesteps=len(scheduler.timesteps))
        histories: list[History] = [{} for _ in self._requests]
        for step, timestep in enumerate(scheduler.timesteps):
            branches = self._predict(latents, timestep, first.branches_at(step))
            # One by one, as the engine does it: a formula may read all of a prediction.
            noise = []
            for request, history, *parts in zip(self._requests, histories, *branches, strict=True):
                predictions = complete(history, first, step, [part[None] for part in parts])
                noise.append(pipeline.combine_branches(predictions, request, timestep, step))
            latents = pipeline.step_latents(scheduler, torch.cat(noise), timestep, latents, self._generator)
        return latents

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, branches: int) -> list[torch.Tensor]:
        """The predictions of each branch, [requests, ...]."""
        if not branches:
            return []

        def forward(mine: Sequence[int]) -> list[torch.Tensor]:
            inputs = [
                self._branch_input(number, branch, latents, timestep)
                for branch in mine
                for number in range(len(self._requests))
            ]
            predictions = predict(self._pipeline, inputs, **self._options)
            count = len(self._requests)
            return [torch.cat(predictions[first : first + count]) for first in range(0, len(inputs), count)]

        return predict_on_ranks(branches, forward)

    def _branch_input(self, number: int, branch: int, latents: torch.Tensor, timestep: torch.Tensor) -> BranchInput:
        own = latents[number : number + 1]
        embeds = self._embeds_of(number, branch)
        return BranchInput(self._requests[number], own, embeds, timestep, branch, self.condition)

    def _embeds_of(self, number: int, branch: int) -> PromptEmbeds:
        """Encoded once for equal texts, and only on the ranks that forward the branch."""
        given = self._given[branch] if branch < len(self._given) else None
        if given is not None:
            return given[number]
        request = self._requests[number]
        key = request.embeds_key(branch)
        if key not in self._embeds:
            self._embeds[key] = self._pipeline.encode_branch(request, branch)
        return self._embeds[key]


def predict(pipeline: EnginePipeline, branches: Sequence[BranchInput], **forward_options: Any) -> list[torch.Tensor]:
    """The predictions of branches, [1, ...] each, by one packed forward for each group of them."""
    predictions: dict[int, torch.Tensor] = {}
    for group in group_branches(pipeline, branches):
        members = [branches[position] for position in group]
        with carrying([branch.carried for branch in members]):
            prediction = pipeline.predict_noise(**pipeline.pack_branches(members), **forward_options)
        predictions |= zip(group, pipeline.unpack_predictions(prediction, members), strict=True)
    return [predictions[position] for position in range(len(branches))]


def make_requests(texts: Sequence[list[str]], results_per_prompt: int, **fields: Any) -> list[DiffusionRequest]:
    """The requests of a direct call, all results of the first prompt first.

    Args:
        texts: of each prompt, those of its branches.
        fields: of `DiffusionRequest`.
    """
    # Nobody reads the seed, as the caller's generator draws the noise, nor the numbers of tokens, by which the engine
    # plans.
    return [
        DiffusionRequest(prompts=prompts, text_tokens=[], seed=0, **fields)
        for prompts in texts
        for _ in range(results_per_prompt)
    ]


def _alike_on_all_ranks(generator: Generators) -> Generators:
    """Torch's own generator differs between ranks, so where there are several they get one with a seed of rank 0."""
    is_alone = get_classifier_free_guidance_world_size() == 1 and get_forward_coordinator() is None
    if generator is not None or is_alone:
        return generator
    with torch.random.fork_rng(devices=[]):  # so that the first latents are those that one rank draws
        seed = int(torch.randint(2**63 - 1, ()))
    return torch.Generator().manual_seed(same_on_all_ranks(seed))


def branch_texts(prompt: str | list[str], negative_prompt: str | list[str] | None) -> list[list[str]]:
    """Of each prompt, the texts of its branches; one negative prompt serves all prompts of a list.

    Args:
        negative_prompt: None without guidance.

    Raises:
        InvalidRequestError: there are several negative prompts, and not one for each prompt.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if negative_prompt is None:
        return [[text] for text in prompts]
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
    if len(negatives) != len(prompts):
        raise InvalidRequestError("negative_prompt", f"{len(negatives)} texts", f"one text, or {len(prompts)} of them")
    return [[text, negative] for text, negative in zip(prompts, negatives, strict=True)]


def is_guided(scale: float, negative_prompt: str | list[str] | None, needs_negative_prompt: bool = True) -> bool:
    """Whether guidance is on; says once why, where it was asked for and is off.

    Args:
        needs_negative_prompt: without a negative prompt there is no guidance; if not, a missing one is an empty one.
    """
    if scale <= 1:
        if negative_prompt is not None:
            log_once(f"guidance is off: a negative prompt was given, but the guidance scale {scale:g} is not above 1")
        return False
    if negative_prompt is None and needs_negative_prompt:
        log_once(f"guidance is off: the scale is {scale:g}, but there is no negative prompt (an empty one is enough)")
        return False
    return True
