"""diffusers' noise schedulers as the engine uses them: one per request, stepped in turn with others' of the kind."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.model_builders.wan import wan_scheduler

SCHEDULERS = {"unipc": wan_scheduler(), "euler": FlowMatchEulerDiscreteScheduler(shift=3.0)}


def start(template, steps):
    scheduler = type(template).from_config(template.config)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def step(scheduler, index, prediction, latents):
    return scheduler.step(prediction, scheduler.timesteps[index], latents, return_dict=False)[0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_of_other_requests_change_nothing(name):
    torch.manual_seed(0)
    latents = [torch.randn(1, 4, 3, 8, 8), torch.randn(1, 4, 1, 16, 4)]
    predictions = [[torch.randn_like(own) for _ in range(6)] for own in latents]
    alone = []
    for own, ours in zip(latents, predictions, strict=True):
        scheduler = start(SCHEDULERS[name], 6)
        for i, prediction in enumerate(ours):
            own = step(scheduler, i, prediction, own)
        alone.append(own)
    schedulers = [start(SCHEDULERS[name], 6) for _ in latents]
    together = list(latents)
    for i in range(7):  # the second request is one step behind
        for which, index in ((0, i), (1, i - 1)):
            if 0 <= index < 6:
                together[which] = step(schedulers[which], index, predictions[which][index], together[which])
    assert all(torch.equal(mixed, own) for mixed, own in zip(together, alone, strict=True))
