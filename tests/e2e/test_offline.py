"""`DiffusionLLM` on the real engine."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

from vllm_cfg_plugin import DiffusionLLM, DiffusionParams
from vllm_cfg_plugin.errors import CfgPluginError

pytestmark = pytest.mark.e2e

FAST = DiffusionParams(height=64, width=64, num_inference_steps=4, true_cfg_scale=3.0, negative_prompt="", seed=5)
SLOW = DiffusionParams(height=512, width=512, num_inference_steps=200, true_cfg_scale=3.0, negative_prompt="", seed=5)


@pytest.fixture(scope="module")
def llm(model):
    with DiffusionLLM(str(model), cfg_parallel_size=2) as llm:
        yield llm


def test_outputs_are_in_order_with_images_and_metrics(llm, capsys):
    prompts = ["a house", {"prompt": "a cat", "negative_prompt": "a dog"}, {"prompt": "fog", "negative_prompt": None}]
    outputs = llm.generate(prompts, FAST)
    assert [output.prompt for output in outputs] == ["a house", "a cat", "fog"]
    assert [output.metrics.guided for output in outputs] == [True, True, False]
    for output in outputs:
        assert output.error is None
        assert output.images[0].size == (64, 64)
        assert output.metrics.seed == 5
        assert output.metrics.steps == 4
        assert output.metrics.e2e_time_ms >= output.metrics.denoise_ms > 0
    assert "12/12" in capsys.readouterr().err  # the progress bar counts denoising steps


@pytest.mark.parametrize("cfg_parallel_size", [1, 3])
def test_an_image_is_the_same_in_any_batch_and_at_any_cfg_size(llm, model, cfg_parallel_size):
    (alone,) = llm.generate("a house", FAST, use_tqdm=False)
    several = llm.generate(["a house", "a long prompt " * 20, "fog"], FAST, use_tqdm=False)
    assert np.array_equal(np.asarray(alone.images[0]), np.asarray(several[0].images[0]))
    with DiffusionLLM(str(model), cfg_parallel_size=cfg_parallel_size) as other_llm:
        (other,) = other_llm.generate("a house", FAST, use_tqdm=False)
    assert np.array_equal(np.asarray(alone.images[0]), np.asarray(other.images[0]))


def test_a_cache_of_steps_is_one_requests_own(llm):
    """A cached request beside a plain one: other pixels, fewer forwards, and the plain one is what it is alone."""
    cached = msgspec.structs.replace(FAST, num_inference_steps=8, cache="static", cache_order=1)
    plain = msgspec.structs.replace(FAST, num_inference_steps=8)
    together = llm.generate(["a house"] * 2, [cached, plain], use_tqdm=False)
    alone = [llm.generate("a house", params, use_tqdm=False)[0] for params in (cached, plain)]
    pixels = [np.asarray(output.images[0]) for output in (*together, *alone)]
    assert np.array_equal(pixels[0], pixels[2])
    assert np.array_equal(pixels[1], pixels[3])
    assert not np.array_equal(pixels[0], pixels[1])
    metrics = together[0].metrics
    assert (metrics.steps, metrics.computed_steps, metrics.reused_steps) == (8, [4, 4], [4, 4])
    assert together[1].metrics.reused_steps == [0, 0]


def test_bad_arguments_leave_the_engine_usable(llm):
    with pytest.raises(ValueError, match="height=63"):
        llm.generate("a house", DiffusionParams(height=63))
    assert llm.generate("a house", FAST, use_tqdm=False)[0].error is None


def test_threads_share_the_engine(llm):
    seeds = range(8)
    with ThreadPoolExecutor(4) as pool:
        asked = [msgspec.structs.replace(FAST, seed=seed) for seed in seeds]
        outputs = [output for (output,) in pool.map(lambda params: llm.generate("a house", params), asked)]
    assert [(output.error, output.metrics.seed) for output in outputs] == [(None, seed) for seed in seeds]


def test_a_forked_process_is_refused_and_the_engine_goes_on(llm):
    child = os.fork()
    if not child:
        refused = False
        try:
            llm.generate("a house", FAST, use_tqdm=False)
        except CfgPluginError as error:
            refused = "forked" in str(error)
        finally:
            llm.close()
            os._exit(0 if refused else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert llm.generate("a house", FAST, use_tqdm=False)[0].error is None


def test_ctrl_c_ends_the_call_and_not_the_engine(llm):
    def press_ctrl_c():  # a terminal signals the whole process group, and a server of other tests is in one of its own
        for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
            if os.getpgid(process.pid) == os.getpgrp():
                process.send_signal(signal.SIGINT)

    timer = threading.Timer(1.5, press_ctrl_c)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a house"] * 3, SLOW, use_tqdm=False)
    timer.join()
    outputs = llm.generate(["a house"] * 2, FAST, use_tqdm=False)
    assert [output.error for output in outputs] == [None, None]


def test_engine_death_is_said_and_close_still_works(model):
    before = set(psutil.Process().children())
    with DiffusionLLM(str(model), cfg_parallel_size=2) as llm:
        core = next(child for child in psutil.Process().children() if child not in before)
        ranks = core.children(recursive=True)
        timer = threading.Timer(1, core.kill)
        timer.start()
        (output,) = llm.generate("a house", SLOW, use_tqdm=False)
        timer.join()
        assert "died" in output.error
        with pytest.raises(CfgPluginError, match="died"):
            llm.generate("a house", FAST)
    _, alive = psutil.wait_procs([core, *ranks], timeout=10)
    assert alive == []


def test_programs_end_well_while_the_last_message_is_being_freed(model, tmp_path):
    outs = [tmp_path / ending for ending in ("close", "leave")]
    command = [sys.executable, str(Path(__file__).with_name("exit_race.py")), str(model), *map(str, outs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for out, code in zip(outs, done.stdout.split(), strict=True):
        printed = out.read_text()
        assert code == "0", printed[-3000:]
        assert "error: None" in printed
        assert printed.index("<done>") < printed.index("<freed>")  # there was something to survive
