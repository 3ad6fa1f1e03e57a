"""What a user may ask of one generation, and the exact request that it becomes: the words of front end and engine.

`DiffusionParams` is what users write; unset fields take the model's defaults. `resolve.py` validates everything once,
in the front end, and returns one `DiffusionRequest` per result: nothing invalid goes further. Must not import torch or
vLLM.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

# Times as many pixels as one image or video may have, all results of a request may have together, and all of its own
# images once for each of its results: that is how many are held at the same time.
TOGETHER = 4
MAX_IMAGES_PER_REQUEST = 10  # OpenAI's limit of `n`
MAX_SEED = 2**63 - 1
MIN_SEED = -(2**63)

# How the predictions of two branches may be combined; the formulas are in guidance.py.
COMBINE_RULES = ("cfg", "cfg_zero_star", "apg")
# Fields that `EnginePipeline.combine_branches` reads, unless a family has one of its own that reads fewer.
GUIDANCE_FIELDS = frozenset({"cfg_normalize", "guidance_rescale", "combine_rule"})
CACHE_MODES = ("off", "static")
CACHE_BRANCHES = ("all", "negative")
MAX_CACHE_ORDER = 2
# What only a request with a cache has.
CACHE_NUMBERS = ("cache_interval", "cache_range", "cache_order", "cache_branches")


class DiffusionParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters of one generation; a field left UNSET takes the model's default.

    A field that the served model does not read is refused, naming the one that it does read where there is one.

    Attributes:
        negative_prompt: text of the negative branch. None means none: guidance is off, except for models whose
            diffusers pipeline takes a missing one for an empty one. An empty string is a negative prompt.
        height, width: pixels of the image.
        num_frames: frames of a video.
        layers: layers of a layered image.
        max_sequence_length: most tokens of a text. Where texts are padded, they are padded to it.
        num_inference_steps: denoising steps, as the noise scheduler counts them.
        true_cfg_scale, guidance_scale: what diffusers' pipeline of the model means by them. One of the two is the scale
            s of classifier-free guidance, `neg + s * (pos - neg)`, on above 1; the other one may be an input of a
            distilled model.
        guidance_scale_2: a second scale: of the expert for the steps with little noise (Wan 2.2).
        guidance_interval: [start, stop], fractions of the timesteps; only those from `int(start * number)` until before
            `int(stop * number)` are guided (Kynkaanniemi et al. 2024, https://arxiv.org/abs/2404.07724). There are as
            many timesteps as denoising steps, except with noise schedulers that forward twice in a step.
        cfg_normalize: whether the guided prediction is brought back to the positive one's norm.
        guidance_rescale: 0 to 1, share of the guided prediction that is rescaled to the positive one's deviation.
        combine_rule: "cfg", "cfg_zero_star" or "apg".
        lora: adapters that the request carries: a name, {"name": ..., "scale": ...} or a list of these.
        cache: "off" or "static": some steps are not computed, their predictions follow from those of steps before.
        cache_interval, cache_range, cache_order, cache_branches: which ones, and how; see `StepCache`.
        seed: 64-bit integer; unset or None draws one, which the outputs report.
        n: results, with seeds seed, seed + 1, ...
        extra: further parameters of the `__call__` of diffusers' own pipeline, for a model that runs as such.
    """

    negative_prompt: str | UnsetType | None = UNSET
    height: int | UnsetType = UNSET
    width: int | UnsetType = UNSET
    num_frames: int | UnsetType = UNSET
    layers: int | UnsetType = UNSET
    max_sequence_length: int | UnsetType = UNSET
    num_inference_steps: int | UnsetType = UNSET
    true_cfg_scale: float | UnsetType = UNSET
    guidance_scale: float | UnsetType = UNSET
    guidance_scale_2: float | UnsetType = UNSET
    guidance_interval: tuple[float, float] | UnsetType = UNSET
    cfg_normalize: bool | UnsetType = UNSET
    guidance_rescale: float | UnsetType = UNSET
    combine_rule: str | UnsetType = UNSET
    lora: Any = UNSET
    cache: str | UnsetType = UNSET
    cache_interval: int | UnsetType = UNSET
    cache_range: tuple[float, float] | UnsetType = UNSET
    cache_order: int | UnsetType = UNSET
    cache_branches: str | UnsetType = UNSET
    seed: int | UnsetType | None = UNSET
    n: int = 1
    extra: dict[str, Any] = {}


class ImageInput(msgspec.Struct, frozen=True, array_like=True):
    """An image that a request brings along, decoded.

    Attributes:
        digest: names the content: equal digests, equal images.
        mode: PIL's "RGB" or "RGBA".
        pixels: uint8 [height, width, channels], row by row.
    """

    digest: str
    mode: str
    width: int
    height: int
    pixels: bytes


class LoRA(msgspec.Struct, frozen=True, array_like=True):
    """A low-rank adapter that a request carries.

    Attributes:
        name: what users call it.
        path: of its file, which every rank reads when it needs it.
        key: names the content of the file.
        scale: weighs what the adapter adds.
    """

    name: str
    path: str
    key: str
    scale: float = 1.0


class Guidance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the predictions of a request's branches become one; fields as in `DiffusionParams`.

    Attributes:
        scale: of classifier-free guidance.
        scale_2: a second one, as of a second expert; None where none is asked for.
        distilled: the guidance input of a distilled model; None where the model has none.
    """

    scale: float = 1.0
    scale_2: float | None = None
    distilled: float | None = None
    rule: str = "cfg"
    normalize: bool | float = False  # a number where a family's direct call takes one
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def guided_steps(self, steps: int) -> range:
        """The steps that are guided, by the rule of diffusers' guiders (`guiders/guider_utils.py`)."""
        return _steps_within(self.interval, steps)


def _steps_within(fractions: tuple[float, float], steps: int) -> range:
    start, stop = fractions
    return range(int(start * steps), int(stop * steps))


class StepCache(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which steps of a request are not computed, decided before its first: a *static* cache of steps.

    The network sees nearly the same in neighbouring steps, so that what it says may be taken from those before:
    FORA (Selvaraju et al. 2024, https://arxiv.org/abs/2407.01425) reuses features for a fixed number of steps,
    TaylorSeer (Liu et al. 2025, https://arxiv.org/abs/2503.06923) extrapolates them. Here it is whole predictions.

    Attributes:
        interval: within the range every so-manieth step is computed, from 2 up.
        range: [start, stop], fractions of the steps as of the guidance interval; those outside are all computed.
        order: 0 takes the last computed prediction, 1 and 2 extrapolate the last two or three.
        negative_only: the first branch, the positive one, is always computed.
    """

    interval: int = 2
    range: tuple[float, float] = (0.0, 1.0)
    order: int = 0
    negative_only: bool = False

    def skips(self, step: int, steps: int) -> bool:
        """Whether a step is one of those that are not computed; the first of the range is."""
        within = _steps_within(self.range, steps)
        return step in within and (step - within.start) % self.interval != 0


class DiffusionRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One result, fully decided: what travels to the engine and, once, to every rank.

    Attributes:
        prompts: one text per branch, in branch order: the positive one, then those of guidance. Branches of a
            step without guidance are the first alone.
        text_tokens: tokens that each branch's text adds to its sequence, in the same order.
        image_tokens: tokens of the latents.
        condition_tokens: tokens that the images add to the sequence of a branch.
        images: what the request brings along, in the user's order.
        text_sees_images: the text encoder reads the images too, so an embedding belongs to both.
        is_captioned: the text encoder writes the first branch's text: a caption of the image at the result's size.
        num_inference_steps: what the noise scheduler is set to.
        num_timesteps: how many timesteps it takes then, as second-order ones forward twice in a step; None: as many.
        num_frames: frames of a video; 1 of an image. layers: of a layered image; 0 of all others.
        max_sequence_length: tokens that a text is cut to; 0 for the family's own number.
        cache: which steps are not computed; None: all are.
        call: arguments of the `__call__` of diffusers' own pipeline, which every rank runs for this request; None where
            the engine makes its steps itself.
        guidance_off: why a request that asked for guidance runs without it; empty otherwise.
        progress_key: the caller's name of this request on the channel of updates; "" for one that asks for none.
        previews: how many previews are asked for.
        lora: the adapters that its forwards carry.
    """

    prompts: list[str]
    text_tokens: list[int]
    image_tokens: int
    height: int
    width: int
    num_inference_steps: int
    seed: int
    guidance: Guidance = msgspec.field(default_factory=Guidance)
    condition_tokens: int = 0
    images: list[ImageInput] = []
    text_sees_images: bool = False
    is_captioned: bool = False
    num_timesteps: int | None = None
    num_frames: int = 1
    layers: int = 0
    max_sequence_length: int = 0
    cache: StepCache | None = None
    call: dict[str, Any] | None = None
    guidance_off: str = ""
    progress_key: str = ""
    previews: int = 0
    lora: list[LoRA] = []

    @property
    def preview_steps(self) -> tuple[int, ...]:
        """After how many steps each preview is taken: after every fifth of all, and never after the last.

        The latents of a pipeline's own call are nothing that could be decoded in between.
        """
        previews = 0 if self.on_all_ranks else self.previews
        points = (max(1, (index + 1) * self.steps // 5) for index in range(previews))
        return tuple(step for step in dict.fromkeys(points) if step < self.steps)

    @property
    def steps(self) -> int:
        """Steps of the engine: in each one timestep is forwarded, and the noise scheduler stepped once."""
        return self.num_inference_steps if self.num_timesteps is None else self.num_timesteps

    @property
    def on_all_ranks(self) -> bool:
        """Whether every rank prepares it, and none knows the shape of its predictions before that."""
        return self.call is not None

    @property
    def guided(self) -> bool:
        return len(self.prompts) > 1

    @property
    def adapters(self) -> frozenset[str]:
        """Names the content of each adapter."""
        return frozenset(lora.key for lora in self.lora)

    @property
    def condition_key(self) -> tuple[str, ...]:
        """Names the images; empty without any."""
        return tuple(image.digest for image in self.images)

    def sequence_tokens(self, branch: int) -> int:
        """Tokens of a branch's sequence."""
        return self.image_tokens + self.condition_tokens + self.text_tokens[branch]

    def embeds_key(self, branch: int) -> tuple[str | int, ...]:
        """Names what the embedding of a branch is made of."""
        if self.is_captioned and branch == 0:
            return (f"caption at {self.width}x{self.height}", self.max_sequence_length, *self.condition_key)
        images = self.condition_key if self.text_sees_images else ()
        return (self.prompts[branch], self.max_sequence_length, *images)

    def branches_at(self, step: int) -> int:
        """Branches that are forwarded at a step, from branch 0 on: those that it needs, but for what is cached.

        The first guided step computes all, as there is nothing yet to take the further branches' predictions from.
        """
        needed = self.branches_needed_at(step)
        if self.cache is None or not self.cache.skips(step, self.steps):
            return needed
        if self.guided and step == self.guidance.guided_steps(self.steps).start:
            return needed
        return min(needed, 1) if self.cache.negative_only else 0

    def branches_needed_at(self, step: int) -> int:
        """Branches whose predictions are combined at a step, from branch 0 on."""
        is_guided = step in self.guidance.guided_steps(self.steps)
        return len(self.prompts) if is_guided else 1


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator allows; read from the engine's `additional_config` (see config.py).

    Attributes:
        max_image_pixels: of one image with all its layers, or of one frame of a video; max_video_pixels: of all frames.
        max_input_images, max_input_pixels: number of a request's own images, and pixels of each.
        max_upload_bytes: of the body of an HTTP request.
        max_request_seconds: that all results of a request may take, as predicted.
        max_input_bytes_in_flight: of all requests over HTTP at once: their bodies, and their images with all copies.
    """

    max_image_pixels: int = 4_194_304
    max_video_pixels: int = 134_217_728
    max_inference_steps: int = 200
    max_request_seconds: int = 3600
    max_input_images: int = 16
    max_input_pixels: int = 33_554_432
    max_upload_bytes: int = 268_435_456
    max_input_bytes_in_flight: int = 2_147_483_648
