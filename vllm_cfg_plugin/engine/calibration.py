"""What start-up measured: from the ranks to the scheduler, in the engine's copy of vLLM's configuration.

Must not import torch or vLLM.
"""

from __future__ import annotations

import math
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


class MemoryCost(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a GPU that work takes for a while, as measured.

    Attributes:
        step_bytes, token_bytes: of a packed forward, and of each of its tokens.
        decode_bytes: of a decode of the model's own size.
        decode_token_bytes: what one more token of the image adds to that.
    """

    step_bytes: int
    token_bytes: int
    decode_bytes: int
    decode_token_bytes: int


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank's start-up measured.

    Attributes:
        token_budget: image and text tokens in one packed forward past which packing more gains nothing.
        default_tokens: those of one sequence of the model's own size.
        memory: what work takes of a GPU; None on a CPU.
        room: bytes of the GPU that weights and other processes leave for work; None on a CPU.
    """

    cost: CostModel
    token_budget: Annotated[int, msgspec.Meta(ge=1)]
    default_tokens: Annotated[int, msgspec.Meta(ge=1)]
    memory: MemoryCost | None = None
    room: int | None = None

    @property
    def tokens_with_room(self) -> float:
        """Most tokens of a packed forward beside a decode and a long forward; infinite where memory does not count.

        Never less than those of one sequence of the model's own size, which is tried in any case.
        """
        if self.memory is None or self.room is None or not self.memory.token_bytes:
            return math.inf
        beside = self.memory.decode_bytes + self.memory.step_bytes
        return max(self.default_tokens, (self.room - beside) // self.memory.token_bytes)

    @property
    def decode_tokens_with_room(self) -> float:
        """Most tokens of an image that is decoded as a whole beside a packed forward of the model's own size.

        Never less than those of the model's own size; infinite where memory does not count.
        """
        if self.memory is None or self.room is None or not self.memory.decode_token_bytes:
            return math.inf
        beside = self.memory.step_bytes + self.memory.token_bytes * self.default_tokens
        left = self.room - beside - self.memory.decode_bytes
        return self.default_tokens + max(0, left // self.memory.decode_token_bytes)


def slowest(calibrations: Sequence[Calibration]) -> Calibration:
    """The figures that hold on every rank: each coefficient's largest, and the smallest budget."""
    costs = [msgspec.structs.asdict(calibration.cost) for calibration in calibrations]
    return Calibration(
        cost=CostModel(**{name: max(cost[name] for cost in costs) for name in CostModel.__struct_fields__}),
        token_budget=min(calibration.token_budget for calibration in calibrations),
        default_tokens=max(calibration.default_tokens for calibration in calibrations),
        memory=_most_memory([own.memory for own in calibrations if own.memory is not None]),
        room=min((own.room for own in calibrations if own.room is not None), default=None),
    )


def _most_memory(costs: Sequence[MemoryCost]) -> MemoryCost | None:
    fields = MemoryCost.__struct_fields__
    return MemoryCost(**{name: max(getattr(cost, name) for cost in costs) for name in fields}) if costs else None


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
    """Image and text tokens per rank and step: what the user asked for, else what was found at start-up; logs that.

    In either case no more than a GPU's memory has room for.
    """
    asked, calibration = vllm_config.scheduler_config.max_num_batched_tokens, calibration_of(vllm_config)
    with_room = calibration.tokens_with_room
    if asked != FIND_TOKEN_BUDGET:
        if asked > with_room:
            logger.warning("Token budget: memory has room for %d tokens a step, not for %d", with_room, asked)
        return int(min(asked, with_room))
    found = int(min(calibration.token_budget, with_room))
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
