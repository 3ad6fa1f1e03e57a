"""What start-up measured: from the ranks to the scheduler, in the engine's copy of vLLM's configuration.

Must not import torch or vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec

from vllm_cfg_plugin.config import FIND_TOKEN_BUDGET, EngineSettings, additional_config
from vllm_cfg_plugin.engine.cost import CostModel
from vllm_cfg_plugin.logs import get_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

_CALIBRATION = "calibration"  # key of `additional_config`
# A step may take so long whatever the model: short to a user, long to all that a step costs beside its forwards.
_LEAST_STEP_US = 1e6
_STEPS_OF_A_HANG = 10


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank's start-up measured.

    Attributes:
        token_budget: image and text tokens in one packed forward past which packing more gains nothing.
        default_tokens: those of one sequence of the model's own size.
    """

    cost: CostModel
    token_budget: Annotated[int, msgspec.Meta(ge=1)]
    default_tokens: Annotated[int, msgspec.Meta(ge=1)]


def slowest(calibrations: Sequence[Calibration]) -> Calibration:
    """The figures that hold on every rank: each coefficient's largest, and the smallest budget."""
    costs = [msgspec.structs.asdict(calibration.cost) for calibration in calibrations]
    return Calibration(
        cost=CostModel(**{name: max(cost[name] for cost in costs) for name in CostModel.__struct_fields__}),
        token_budget=min(calibration.token_budget for calibration in calibrations),
        default_tokens=max(calibration.default_tokens for calibration in calibrations),
    )


def cost_from_ranks(answers: object) -> CostModel:
    """The cost model in the ranks' answers to the call of "calibrate", however they came.

    Raises:
        msgspec.ValidationError: these are no calibrations.
    """
    return slowest(msgspec.convert(answers, list[Calibration])).cost


def keep_calibration(vllm_config: VllmConfig, calibration: Calibration) -> None:
    """Leave the calibration where `calibration_of` finds it, in the engine's own copy of the configuration."""
    vllm_config.additional_config = {**additional_config(vllm_config), _CALIBRATION: msgspec.to_builtins(calibration)}


def calibration_of(vllm_config: VllmConfig) -> Calibration:
    """What `keep_calibration` left."""
    return msgspec.convert(additional_config(vllm_config)[_CALIBRATION], Calibration)


def token_budget(vllm_config: VllmConfig) -> int:
    """Image and text tokens per rank and step: what the user asked for, else what was found at start-up; logs that."""
    asked = vllm_config.scheduler_config.max_num_batched_tokens
    if asked != FIND_TOKEN_BUDGET:
        return asked
    found = calibration_of(vllm_config).token_budget
    logger.info(
        "Token budget: %d tokens per rank and step (found at start-up; --max-num-batched-tokens overrides it)", found
    )
    return found


def max_step_us(vllm_config: VllmConfig) -> float:
    """Most microseconds of one rank's forwards in a step: what the user asked for, else as many as it takes.

    That is a second, or what a guided request of the model's own size takes on one rank, so that these share steps.
    """
    asked = EngineSettings.from_vllm_config(vllm_config).max_step_ms
    if asked is not None:
        return 1e3 * asked
    found = calibration_of(vllm_config)
    return max(_LEAST_STEP_US, found.cost.step_us + 2 * found.cost.forward(found.default_tokens))


def step_timeout_s(vllm_config: VllmConfig) -> float:
    """Seconds after which ranks that are to report a step hang: as asked, but no less than ten steps may take."""
    asked = EngineSettings.from_vllm_config(vllm_config).cfg_step_timeout
    return max(asked, _STEPS_OF_A_HANG * max_step_us(vllm_config) / 1e6)


def max_side_us(vllm_config: VllmConfig) -> float:
    """An encode or decode that takes more microseconds is long.

    That is more than a step may take, and more than both together take of a request of the model's own size.
    """
    found = calibration_of(vllm_config)
    return max(
        max_step_us(vllm_config), found.cost.encode(found.default_tokens) + found.cost.decode(found.default_tokens)
    )
