"""A pipeline of a few lines behind the engine's contract, for tests of the step loop that need no model."""

from types import SimpleNamespace

import torch

from vllm_cfg_plugin.engine.calibration import Calibration, keep_calibration
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, PREVIEWED, SideReport
from vllm_cfg_plugin.params import DiffusionRequest, Guidance
from vllm_cfg_plugin.pipelines.base import EnginePipeline, PromptEmbeds
from vllm_cfg_plugin.worker.side_work import SideWork, run_now

CHANNELS = 4


class ToyTransformer(torch.nn.Module):
    """Predicts noise as latents * timestep + the mean of the text, sequence by sequence."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.fail = lambda sequences: None

    def forward(self, sequences):
        self.fail(sequences)
        return (torch.cat([s.latents * s.timestep + s.embeds.tokens.mean() for s in sequences], dim=1),)


class ToyNoiseScheduler:
    def __init__(self, steps):
        self.timesteps = torch.linspace(1, 1 / steps, steps)

    def step(self, noise, t, latents, return_dict=False):
        return (latents - 0.1 * t * noise,)


class ToyPipeline(EnginePipeline):
    def __init__(self):
        self.transformer = ToyTransformer()
        self.scheduler = ToyNoiseScheduler(1)
        self.encoded = []

    @classmethod
    def describe(cls, checkpoint):
        raise NotImplementedError

    @classmethod
    def load(cls, model, *, dtype, device, revision=None):
        return cls()

    def encode_branch(self, request, branch):
        prompt = request.prompts[branch]
        self.encoded.append(prompt)
        if prompt == "unencodable":
            raise RuntimeError("no such words")
        return PromptEmbeds(torch.full((max(len(prompt), 1), 3), float(len(prompt))))

    def encode_images(self, request):
        return [torch.tensor(image.pixels[0], dtype=torch.float32) for image in request.images]

    def draw_noise(self, request, generator):
        return torch.randn(1, request.image_tokens, CHANNELS, generator=generator)

    def make_noise_scheduler(self, request):
        return ToyNoiseScheduler(request.num_inference_steps)

    def pack_branches(self, branches):
        return {"sequences": branches}

    def unpack_predictions(self, prediction, branches):
        return list(prediction.split([b.latents.shape[1] for b in branches], dim=1))

    def decode(self, latents, request, condition=()):
        return torch.full((1, request.height, request.width, 3), 7, dtype=torch.uint8)

    def prediction_shape(self, request):
        return request.image_tokens, CHANNELS


UNLUCKY_HOOKS = {
    "draw_noise",
    "prediction_shape",
    "too few timesteps",
    "encode_images",
    "forward_group",
    "pack_branches",
    "one prediction too few",
    "a prediction of another shape",
    "combine_branches",
}


class UnluckyPipeline(ToyPipeline):
    """Fails the requests whose prompt names a hook, in that hook: "pack_branches", or "pack_branches on rank 1"."""

    guidance_fields = ToyPipeline.guidance_fields

    def __init__(self, rank=0):
        super().__init__()
        self._rank = rank

    def _fails(self, hook, request):
        return request.prompts[0] in (hook, f"{hook} on rank {self._rank}")

    def _raise_for(self, hook, request):
        if self._fails(hook, request):
            raise ValueError(f"{hook} is out of luck")

    def draw_noise(self, request, generator):
        self._raise_for("draw_noise", request)
        return super().draw_noise(request, generator)

    def make_noise_scheduler(self, request):
        noise_scheduler = super().make_noise_scheduler(request)
        if self._fails("too few timesteps", request):
            noise_scheduler.timesteps = noise_scheduler.timesteps[:1]
        return noise_scheduler

    def prediction_shape(self, request):
        self._raise_for("prediction_shape", request)
        return super().prediction_shape(request)

    def encode_images(self, request):
        self._raise_for("encode_images", request)
        return super().encode_images(request)

    def forward_group(self, branch):
        self._raise_for("forward_group", branch.request)
        return super().forward_group(branch)

    def pack_branches(self, branches):
        for branch in branches:
            self._raise_for("pack_branches", branch.request)
        return super().pack_branches(branches)

    def unpack_predictions(self, prediction, branches):
        predictions = super().unpack_predictions(prediction, branches)
        if any(self._fails("one prediction too few", branch.request) for branch in branches):
            return predictions[:-1]
        is_cut = [self._fails("a prediction of another shape", branch.request) for branch in branches]
        return [p[:, :-1] if cut else p for p, cut in zip(predictions, is_cut, strict=True)]

    def combine_branches(self, predictions, request, timestep, step):
        self._raise_for("combine_branches", request)
        return super().combine_branches(predictions, request, timestep, step)


def toy_request(
    prompt="a cat", negative="", steps=3, seed=0, image_tokens=4, scale=4.0, condition_tokens=0, **guidance
):
    """`negative`: text of the second branch, or a list of those of all further ones."""
    further = negative if isinstance(negative, list) else [negative]
    prompts = [prompt, *(text for text in further if text is not None)]
    return DiffusionRequest(
        prompts=prompts,
        text_tokens=[len(p) for p in prompts],
        image_tokens=image_tokens,
        condition_tokens=condition_tokens,
        height=2,
        width=2,
        num_inference_steps=steps,
        guidance=Guidance(scale=scale, **guidance),
        seed=seed,
    )


def toy_vllm_config(ranks=2, max_num_seqs=4, max_num_batched_tokens=1000, **settings):
    """`settings`: further fields of `EngineSettings`."""
    config = SimpleNamespace(
        additional_config={"cfg_parallel_size": ranks, **settings},
        parallel_config=SimpleNamespace(data_parallel_index=0),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
    )
    keep_calibration(config, Calibration(cost=UNCALIBRATED, token_budget=500, default_tokens=4))
    return config


class InlineSideWork(SideWork):
    """Does side work at once, in the caller's thread, and keeps the reports, and the frames that came with some."""

    def __init__(self, rank=0):
        self.reports = []
        self.images = {}
        self.shared = {}  # (id, branch) -> embeddings as bytes
        self.kept = []
        self._rank = rank

    def encode(self, id, branch, run, is_long=False):
        self._do(id, branch, "encoding its prompt", run)

    def decode(self, id, run, is_long=False):
        self._do(id, DECODED, "decoding its image", run)

    def preview(self, id, run, is_long=False):
        self._do(id, PREVIEWED, "making a preview", run)

    def keep(self, id, steps, run):
        self._keep(id, steps, run)

    def prepare(self, run):
        return run_now(run)

    def forward(self, id, run, group=None):
        self._do(id, FORWARDED, "predicting its noise", run)

    def deliver(self, report, frame):
        """What is kept of a request."""
        self.reports.append(report)
        self.kept.append(frame)

    def cancel(self, id):
        """Nothing is ever queued."""

    def _do(self, id, branch, doing, run):
        try:
            image = run()
        except Exception as error:
            self.reports.append(SideReport(id, branch, self._rank, 0.0, f"failed while {doing}: {error}"))
            return
        if image is not None and branch >= 0:
            self.shared[id, branch] = image.numpy().tobytes()
        elif image is not None:
            self.images[id] = image
        self.reports.append(SideReport(id, branch, self._rank, 1.0))

    def take(self):
        reports, self.reports = self.reports, []
        return reports
