"""The offline entry point on a fake LLMEngine: argument forms, order, failures, interruption. No processes."""

import gc
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import av
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from vllm.v1.engine.exceptions import EngineDeadError

from tests.unit.fakes import INFO, LIMITS, VIDEO_INFO, answer, fake_pixels
from vllm_cfg_plugin.engine.calibration import Calibration
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.metrics import RequestMetrics
from vllm_cfg_plugin.engine.result import ResultHeader, pack_result
from vllm_cfg_plugin.entrypoints import llm as llm_module
from vllm_cfg_plugin.entrypoints.front_end import FrontEnd
from vllm_cfg_plugin.entrypoints.llm import DiffusionLLM
from vllm_cfg_plugin.entrypoints.output import DiffusionOutput
from vllm_cfg_plugin.errors import CfgPluginError, InvalidRequestError
from vllm_cfg_plugin.params import DiffusionParams, DiffusionRequest

NO_ARGS = {"additional_config": {"cause_address": "inproc://nobody"}}


class FakeEngine:
    """`LLMEngine` as far as DiffusionLLM uses it; finishes the newest request first, one a step."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(additional_config={})
        self.waiting: dict[str, DiffusionRequest] = {}
        self.aborted: list[str] = []
        self.shutdowns = 0
        self.behave = answer
        self.engine_core = SimpleNamespace(shutdown=self._shutdown)
        self.renderer = SimpleNamespace(shutdown=lambda: None)
        self.cost = UNCALIBRATED

    def _shutdown(self) -> None:
        self.shutdowns += 1

    def collective_rpc(self, method):
        assert method == "calibrate"
        return [Calibration(cost=self.cost, token_budget=1000, default_tokens=16)]

    def add_request(self, request_id, prompt, params):
        self.waiting[request_id] = msgspec.convert(params.extra_kwargs, DiffusionRequest)

    def step(self):
        request_id, request = self.waiting.popitem()
        data = self.behave(request)
        return [SimpleNamespace(request_id=request_id, finished=True, outputs=SimpleNamespace(data=data))]

    def abort_request(self, request_ids):
        self.aborted += request_ids
        self.waiting.clear()


@pytest.fixture
def engine(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(llm_module, "diffusion_engine_args", lambda *args, **kwargs: NO_ARGS)
    monkeypatch.setattr(llm_module, "EngineArgs", lambda **kwargs: None)
    monkeypatch.setattr(llm_module.LLMEngine, "from_engine_args", lambda args: engine)
    monkeypatch.setattr(FrontEnd, "from_vllm_config", lambda config: FrontEnd(INFO, LIMITS, len))
    return engine


@pytest.fixture
def llm(engine):
    with DiffusionLLM("model") as llm:
        yield llm


def seeds(outputs) -> list[int]:
    return [output.metrics.seed for output in outputs]


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["a", {"prompt": "b", "negative_prompt": " "}, {"prompt": "c"}]
    outputs = llm.generate(prompts, [DiffusionParams(seed=i) for i in range(3)], use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert seeds(outputs) == [0, 1, 2]
    assert [output.metrics.guided for output in outputs] == [False, True, False]
    assert len({output.request_id for output in outputs}) == 3
    assert all(output.error is None and len(output.images) == 1 for output in outputs)


def test_one_text_is_a_list_of_one(llm):
    (output,) = llm.generate("a", DiffusionParams(seed=4, height=128))
    assert output.images[0].size == (64, 128)
    request = DiffusionRequest(
        prompts=["a"],
        text_tokens=[1],
        image_tokens=0,
        height=128,
        width=64,
        num_inference_steps=1,
        seed=4,
    )
    assert np.array_equal(np.asarray(output.images[0]), fake_pixels(request)[0])
    assert output.metrics.e2e_time_ms > 0


def test_prompts_and_params_may_be_generators(llm):
    outputs = llm.generate((text for text in "abc"), (DiffusionParams(seed=i) for i in range(3)), use_tqdm=False)
    assert [output.prompt for output in outputs] == ["a", "b", "c"]
    assert seeds(outputs) == [0, 1, 2]
    assert llm.generate(iter([]), use_tqdm=False) == []
    with pytest.raises(InvalidRequestError) as refused:
        llm.generate((prompt for prompt in ["a", 3]), use_tqdm=False)
    assert refused.value.param == "prompts[1].prompt"
    with pytest.raises(ZeroDivisionError):
        llm.generate((1 / number for number in [0]), use_tqdm=False)


def test_threads_take_turns(llm, engine):
    inside, most = [], []

    def alone(request):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.001)
        inside.pop()
        return answer(request)

    engine.behave = alone
    with ThreadPoolExecutor(8) as pool:
        asked = range(16)
        outputs = pool.map(
            lambda seed: llm.generate("a", DiffusionParams(seed=seed, n=2), use_tqdm=bool(seed % 2))[0], asked
        )
        assert seeds(outputs) == list(asked)
    assert max(most) == 1


def test_close_waits_for_a_call_that_runs(llm, engine):
    running, may_end, closing = threading.Event(), threading.Event(), []

    def slow(request):
        running.set()
        assert may_end.wait(10)
        assert engine.shutdowns == 0
        return answer(request)

    engine.behave = slow
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(llm.generate, "a", use_tqdm=False)
        assert running.wait(10)
        closing = pool.submit(llm.close)
        may_end.set()
        assert call.result()[0].error is None
        closing.result()
    assert engine.shutdowns == 1
    with pytest.raises(CfgPluginError, match="closed"):
        llm.generate("a", use_tqdm=False)


def test_a_forked_process_neither_uses_nor_stops_the_engine(llm, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(llm_module.os, "getpid", lambda: -1)
        with pytest.raises(CfgPluginError, match="forked: make one here"):
            llm.generate("a", use_tqdm=False)
        llm.close()
        llm_module._stop(engine, llm._pid)  # as at the end of the interpreter
        assert engine.shutdowns == 0
    assert llm.generate("a", use_tqdm=False)[0].error is None


def test_no_prompts_no_outputs(llm):
    assert llm.generate([], use_tqdm=False) == []


def test_n_images_in_seed_order(llm):
    (output,) = llm.generate("a", DiffusionParams(seed=4, n=3), use_tqdm=False)
    assert [metrics.seed for metrics in output.image_metrics] == [4, 5, 6]
    assert len(output.images) == 3
    assert output.metrics.e2e_time_ms == max(metrics.e2e_time_ms for metrics in output.image_metrics)


def test_a_prompts_own_negative_prompt_wins(llm, engine):
    seen = []
    engine.behave = lambda request: seen.append(request.prompts) or answer(request)
    llm.generate({"prompt": "a", "negative_prompt": "mine"}, DiffusionParams(negative_prompt="other"), use_tqdm=False)
    llm.generate({"prompt": "a", "negative_prompt": None}, DiffusionParams(negative_prompt="other"), use_tqdm=False)
    assert seen == [["a", "mine"], ["a"]]


@pytest.mark.parametrize(
    ("prompts", "params", "param"),
    [
        (None, None, "prompt"),
        ({"text": "a"}, None, "prompt"),
        ({"prompt": "a", "negative": "b"}, None, "prompt"),
        (["a", 3], None, "prompts[1].prompt"),
        (["a", "b"], [DiffusionParams()], "params"),
        ("a", "fast", "params"),
        ("a", [None], "params"),
        (["a", "b"], [DiffusionParams(), DiffusionParams(n=0)], "prompts[1].n"),
        ("a", DiffusionParams(height=65), "height"),
    ],
)
def test_bad_arguments_raise_before_anything_runs(llm, engine, prompts, params, param):
    with pytest.raises(InvalidRequestError) as refused:
        llm.generate(prompts, params, use_tqdm=False)
    assert refused.value.param == param
    assert isinstance(refused.value, ValueError)
    assert engine.waiting == {}
    assert llm.generate("a", use_tqdm=False)[0].error is None


def test_a_failed_request_loses_no_other(llm, engine):
    failure = pack_result(ResultHeader(metrics=RequestMetrics(), error="out of memory"))
    instead = {1: failure, 2: torch.empty(0, dtype=torch.uint8)}
    engine.behave = lambda request: instead[request.seed] if request.seed in instead else answer(request)
    outputs = llm.generate(["a"] * 4, [DiffusionParams(seed=i) for i in range(4)], use_tqdm=False)
    assert [len(output.images) for output in outputs] == [1, 0, 0, 1]
    assert "out of memory" in outputs[1].error
    assert "aborted" in outputs[2].error
    assert seeds(outputs) == [0, 1, 2, 3]


def test_ctrl_c_aborts_what_is_left_and_the_engine_goes_on(llm, engine):
    def interrupt(request):
        raise KeyboardInterrupt

    engine.behave = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"])
    assert len(engine.aborted) == 2
    engine.behave = answer
    assert llm.generate("a", use_tqdm=False)[0].error is None


def test_after_the_engines_death_what_was_done_is_kept(llm, engine):
    def die_at_the_first(request):
        if request.seed == 0:
            raise EngineDeadError
        return answer(request)

    engine.behave = die_at_the_first
    outputs = llm.generate(["a", "b"], [DiffusionParams(seed=0), DiffusionParams(seed=1)], use_tqdm=False)
    assert "died" in outputs[0].error
    assert outputs[1].error is None
    with pytest.raises(CfgPluginError, match="died"):
        llm.generate("a")


def test_close_waits_for_the_receiver_and_frees_unread_answers(engine):
    told = threading.Event()
    core = SimpleNamespace(shutdown=told.set, outputs_queue=queue.Queue())

    def receive():
        told.wait()
        time.sleep(0.2)
        core.outputs_queue.put_nowait("an image")

    core.output_queue_thread = threading.Thread(target=receive, daemon=True)
    core.output_queue_thread.start()
    engine.engine_core = core
    DiffusionLLM("model").close()
    assert not core.output_queue_thread.is_alive()
    assert core.outputs_queue.empty()


def test_one_that_is_never_closed_stops_its_engine(engine):
    llm = DiffusionLLM("model")
    assert engine.shutdowns == 0
    del llm
    gc.collect()
    assert engine.shutdowns == 1


def test_close_is_idempotent(engine):
    llm = DiffusionLLM("model")
    llm.close()
    llm.close()
    assert engine.shutdowns == 1
    with pytest.raises(CfgPluginError, match="closed"):
        llm.generate("a")


@pytest.fixture
def video_llm(engine, monkeypatch):
    monkeypatch.setattr(FrontEnd, "from_vllm_config", lambda config: FrontEnd(VIDEO_INFO, LIMITS, len))
    with DiffusionLLM("model") as llm:
        yield llm


def video_of(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return frames, float(container.streams.video[0].average_rate)


def grey(request: DiffusionRequest) -> torch.Tensor:
    """Frames without noise, which a video file keeps: frame i has level 20 * i + seed."""
    levels = (20 * np.arange(request.num_frames) + request.seed).astype(np.uint8)
    pixels = np.broadcast_to(levels[:, None, None, None], (request.num_frames, request.height, request.width, 3))
    header = ResultHeader(metrics=RequestMetrics(seed=request.seed), shape=pixels.shape)
    return pack_result(header, pixels.tobytes())


def test_a_video_is_its_frames(video_llm):
    (output,) = video_llm.generate("a", DiffusionParams(seed=4, num_frames=5, width=96), use_tqdm=False)
    assert output.images == []
    assert (len(output.videos), len(output.frames), output.frames[0].size) == (1, 5, (96, 64))
    assert output.fps == 16
    assert output.frames is output.videos[0]


def test_n_videos_in_seed_order(video_llm, engine):
    engine.behave = grey
    (output,) = video_llm.generate("a", DiffusionParams(seed=4, n=3), use_tqdm=False)
    assert [len(video) for video in output.videos] == [9, 9, 9]
    assert [video[0].getpixel((0, 0))[0] for video in output.videos] == [4, 5, 6]
    assert [metrics.seed for metrics in output.image_metrics] == [4, 5, 6]


def test_an_image_model_has_no_frames(llm):
    (output,) = llm.generate("a", use_tqdm=False)
    assert output.frames == output.videos == []


@pytest.mark.parametrize(("fps", "rate"), [(None, 16), (8, 8)])
def test_a_video_is_saved(video_llm, engine, tmp_path, fps, rate):
    engine.behave = grey
    (output,) = video_llm.generate("a", DiffusionParams(seed=4, n=2), use_tqdm=False)
    assert output.save(tmp_path / "cat.MP4", fps) == [tmp_path / "cat.MP4"]
    frames, saved_rate = video_of(tmp_path / "cat.MP4")
    assert frames.shape == (9, 64, 64, 3)
    assert np.abs(frames[:, 0, 0, 0] - (20 * np.arange(9) + 4)).max() <= 3
    assert saved_rate == rate


def test_images_are_saved(llm, tmp_path):
    (one,) = llm.generate("a", use_tqdm=False)
    (three,) = llm.generate("a", DiffusionParams(n=3), use_tqdm=False)
    assert one.save(str(tmp_path / "one.webp")) == [tmp_path / "one.webp"]
    paths = three.save(tmp_path / "cat.png")
    assert [path.name for path in paths] == ["cat_0.png", "cat_1.png", "cat_2.png"]
    saved = [np.asarray(Image.open(path)) for path in paths]
    assert all(np.array_equal(file, np.asarray(image)) for file, image in zip(saved, three.images, strict=True))


def test_what_can_not_be_saved_is_refused(llm, video_llm, engine, tmp_path):
    (image,) = llm.generate("a", use_tqdm=False)
    (video,) = video_llm.generate("a", use_tqdm=False)
    engine.behave = lambda request: pack_result(ResultHeader(metrics=RequestMetrics(), error="out of memory"))
    (failed,) = video_llm.generate("a", use_tqdm=False)
    layered = DiffusionOutput("id", "a", images=[Image.new("RGBA", (8, 8))] * 2)
    for output, name, what in (
        (image, "a.mp4", r"path=.*\.png"),
        (image, "a", r"path=.*\.png"),
        (layered, "a.jpg", r"path=.*\.webp"),
        (video, "a.png", r"path=.*\.mp4"),
        (video, "a.avi", r"path=.*\.mp4"),
        (failed, "a.mp4", "nothing to save.*out of memory"),
    ):
        with pytest.raises(ValueError, match=what):
            output.save(tmp_path / name)
    with pytest.raises(ValueError, match="fps"):
        image.save(tmp_path / "a.png", fps=8)
    assert not list(tmp_path.iterdir())
