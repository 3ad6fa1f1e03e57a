"""Work-arounds in libraries that models are made of, and for what torch says needlessly."""

from __future__ import annotations

import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_APOSTROPHE = "\ue000"  # of Unicode's private use: no text has it


def silence_all_gather_deprecation() -> None:
    """Drop one warning of a worker.

    Symptom: a FutureWarning on the first step. Cause: torch 2.13 renamed the collective that vLLM's GroupCoordinator
    calls. Exit condition: vLLM calls `all_gather_single`.
    """
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)


def let_unipc_run_ahead(scheduler: Any, device: Any) -> None:
    """Have a UniPC noise scheduler, its timesteps set, step latents on a GPU without waiting for it.

    To be called once, and `unipc_runs_ahead` around each step. Other noise schedulers are left alone.

    Symptom: each of its steps waits several times for all that is queued on the GPU. Cause: diffusers copies noise
    levels there one by one, and has torch check that a system of two equations has a solution. Exit condition:
    diffusers computes these numbers where the timesteps are.
    """
    if device.type == "cuda" and type(scheduler).__name__ == "UniPCMultistepScheduler":
        scheduler.sigmas = scheduler.sigmas.to(device)


def unipc_runs_ahead(scheduler: Any, device: Any) -> AbstractContextManager[object]:
    """See `let_unipc_run_ahead`."""
    if device.type != "cuda" or type(scheduler).__name__ != "UniPCMultistepScheduler":
        return nullcontext()
    from torch.overrides import TorchFunctionMode

    class Unchecked(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            import torch

            if func is torch.linalg.solve:
                return torch.linalg.solve_ex(*args, check_errors=False)[0]
            return func(*args, **(kwargs or {}))

    return Unchecked()


def split_contractions_alike() -> None:
    """Keep words such as "don't" whole in LongCat-Image's prompts.

    Symptom: "I don't, you can't" becomes "I can'tcan't, you can't", and another text in another process, so that the
    same request gives another image after a restart. Cause: diffusers' `split_quotation` puts stand-ins for such words,
    one of which is a part of the next, and walks a set, whose order follows the process's hash seed. Exit condition:
    diffusers walks them in order and gives each a stand-in of its own.
    """
    from diffusers.pipelines.longcat_image import pipeline_longcat_image, pipeline_longcat_image_edit

    modules: tuple[Any, ...] = (pipeline_longcat_image, pipeline_longcat_image_edit)
    for module in modules:
        upstream = module.split_quotation
        if getattr(upstream, "keeps_contractions", False):
            continue

        def split(prompt: str, *args: Any, upstream: Any = upstream) -> list[tuple[str, bool]]:
            hidden = re.sub(r"(?<=[a-zA-Z])'(?=[a-zA-Z])", _APOSTROPHE, prompt)
            return [(part.replace(_APOSTROPHE, "'"), is_quoted) for part, is_quoted in upstream(hidden, *args)]

        split.keeps_contractions = True  # type: ignore[attr-defined]
        module.split_quotation = split


def let_vl_processors_do_without_videos() -> None:
    """Make Qwen2VLProcessor a processor of texts and images where torchvision is missing.

    Symptom: without torchvision it can neither be made (AttributeError: `_extra_content`) nor loaded (ImportError).
    Cause: transformers 5 asks every such processor for a video processor too, and those exist for torchvision alone;
    images have a PIL one. Exit condition: transformers makes `video_processor` optional.
    """
    from transformers import Qwen2VLProcessor
    from transformers.utils import is_torchvision_available

    processor_class: Any = Qwen2VLProcessor
    if not is_torchvision_available():
        processor_class.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])
