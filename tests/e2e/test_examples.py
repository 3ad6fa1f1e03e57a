"""The example scripts, run as the README says."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import pytest
from PIL import Image

from examples.vllm_server import VllmServer
from tests.distributed.ranks import free_port
from tests.e2e.conftest import START_TIMEOUT_S
from tests.families import picture
from tests.model_builders.longcat_image import build_longcat_image_edit
from tests.model_builders.wan import build_wan

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    return build_wan(tmp_path_factory.mktemp("wan") / "model", "2.1")


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory):
    return build_longcat_image_edit(tmp_path_factory.mktemp("edit") / "model")


def run(script: str, *arguments: str, cwd: Path, launcher: Sequence[str] = ()) -> str:
    """Standard output and error of an example that must succeed."""
    code, printed = _run(script, arguments, cwd, launcher)
    assert code == 0, printed[-3000:]
    return printed


def run_failing(script: str, *arguments: str, cwd: Path) -> str:
    """Standard output and error of an example that must say what is wrong."""
    code, printed = _run(script, arguments, cwd)
    assert code in (1, 2)
    assert "Traceback" not in printed
    return printed


def _run(script: str, arguments: Sequence[str], cwd: Path, launcher: Sequence[str] = ()) -> tuple[int, str]:
    command = [sys.executable, *launcher, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    return done.returncode, done.stdout


def test_the_demo(tmp_path):
    printed = run("demo.py", "--output", str(tmp_path / "pictures"), cwd=tmp_path)
    assert "e2e_time_ms" in printed
    assert "total: 12 images" in printed
    assert len(list((tmp_path / "pictures").glob("[0-9]*.png"))) == 12
    assert Image.open(tmp_path / "pictures" / "contact_sheet.png").width > 600


def flags(separator="_", **options):
    """The command line of options; a list is a flag several times, True one without a value."""
    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', separator)}"
        for one in value if isinstance(value, list) else [value]:
            arguments += [flag] if one is True else [flag, str(one)]
    return arguments


COMPARED = {"cfg_parallel_size": 2, "num_inference_steps": 5, "seed": 3, "compare": True}


def check_comparison(printed):
    """Times of both, their ratio, and equal results: all that a user is to record."""
    assert "guidance: on, cfg_parallel_size: 2, steps: 5" in printed
    times = [float(re.search(rf"e2e_time_ms with cfg_parallel_size {size}: ([\d.]+)", printed)[1]) for size in (2, 1)]
    ratio = float(re.search(r"ratio: ([\d.]+)", printed)[1])
    assert ratio == pytest.approx(times[1] / times[0], abs=0.01)
    assert "results: identical" in printed


@pytest.mark.parametrize("separator", ["_", "-"])
def test_text_to_image_takes_both_spellings(model, tmp_path, separator):
    arguments = flags(
        separator,
        model=model,
        prompt="a cup of coffee on the table",
        negative_prompt="ugly, unclear",
        cfg_scale=4.0,
        num_inference_steps=5,
        height=64,
        width=96,
        seed=3,
        num_images=2,
        output="cfg_enabled.png",
        cfg_parallel_size=2,
    )
    printed = run("offline_inference/text_to_image/text_to_image.py", *arguments, cwd=tmp_path)
    assert "e2e_time_ms: " in printed
    assert "guidance: on" in printed
    assert [Image.open(tmp_path / f"cfg_enabled_{i}.png").size for i in range(2)] == [(96, 64)] * 2


def test_text_to_image_compares(model, tmp_path):
    arguments = flags(model=model, negative_prompt="ugly", cfg_scale=4.0, height=64, width=64, **COMPARED)
    check_comparison(run("offline_inference/text_to_image/text_to_image.py", *arguments, cwd=tmp_path))


def test_image_edit_compares(edit_model, tmp_path):
    picture(48, 48).save(tmp_path / "bear.png")
    arguments = flags(model=edit_model, image="bear.png", cfg_scale=4.0, output="snow.png", **COMPARED)
    check_comparison(run("offline_inference/image_edit/image_edit.py", *arguments, cwd=tmp_path))
    assert Image.open(tmp_path / "snow.png").size == (1024, 1024)


def test_image_edit_takes_several_images_and_says_how_many_the_model_does(edit_model, tmp_path):
    for name in ("one.png", "two.png"):
        picture(48, 48).save(tmp_path / name)
    arguments = flags(model=edit_model, image=["one.png", "two.png"])
    assert "failed: image='2 images' is not valid" in run_failing(
        "offline_inference/image_edit/image_edit.py", *arguments, cwd=tmp_path
    )


def test_text_to_video_compares(video_model, tmp_path):
    arguments = flags(
        model=video_model, cfg_scale=4.0, height=32, width=48, num_frames=5, fps=8, output="cat.mp4", **COMPARED
    )
    check_comparison(run("offline_inference/text_to_video/text_to_video.py", *arguments, cwd=tmp_path))
    with av.open(str(tmp_path / "cat.mp4")) as video:
        assert video.streams.video[0].average_rate == 8
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(48, 32)] * 5


def test_a_comparison_needs_two_ranks(model, tmp_path):
    arguments = flags(model=model, compare=True)
    printed = run_failing("offline_inference/text_to_image/text_to_image.py", *arguments, cwd=tmp_path)
    assert "--compare needs --cfg_parallel_size of 2 or more" in printed


def test_the_mixin_called_directly_on_one_rank_and_on_two(tmp_path):
    script = "torchrun/direct_mixin.py"
    arguments = flags("-", negative_prompt="ugly", steps=4)
    assert "rank 0 of 1: e2e_time_ms: " in run(script, *arguments, "--output", "one.png", cwd=tmp_path)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    printed = run(script, *arguments, "--output", "two.png", cwd=tmp_path, launcher=launcher)
    assert "rank 0 of 2: e2e_time_ms: " in printed
    assert "rank 1 of 2: e2e_time_ms: " in printed
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_client_draws_an_image(server, tmp_path):
    arguments = flags(
        url=f"{server.url}/v1",
        prompt="a rocket",
        negative_prompt="ugly",
        true_cfg_scale=4.0,
        num_inference_steps=4,
        size="64x32",
        seed=1,
        output="rocket.png",
    )
    assert "saved rocket.png" in run("openai_client.py", *arguments, cwd=tmp_path)
    assert Image.open(tmp_path / "rocket.png").size == (64, 32)


def test_the_client_edits_images(edit_model, tmp_path):
    picture(48, 48).save(tmp_path / "bear.png")
    with VllmServer(edit_model, ["--cfg-parallel-size", "2"], tmp_path / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        asked = {"url": f"{server.url}/v1", "prompt": "snow", "guidance_scale": 4.0, "num_inference_steps": 4}
        arguments = flags(**asked, image="bear.png", output="snow.png")
        assert "saved snow.png" in run("openai_client.py", *arguments, cwd=tmp_path)
        printed = run_failing("openai_client.py", *flags(**asked, output="nothing.png"), cwd=tmp_path)
    assert Image.open(tmp_path / "snow.png").size == (1024, 1024)
    assert "/v1/images/edits" in printed


def test_the_client_finds_the_endpoint_of_videos(video_model, tmp_path):
    with VllmServer(video_model, ["--cfg-parallel-size", "2"], tmp_path / "server.log") as server:
        server.wait_ready(START_TIMEOUT_S)
        asked = {"url": f"{server.url}/v1", "prompt": "a cat walks", "guidance_scale": 4.0, "num_inference_steps": 4}
        by_hint = flags(**asked, size="32x32", output="hint.mp4")
        by_frames = flags(**asked, num_frames=5, size="48x32", output="frames.mp4")
        assert "saved hint.mp4" in run("openai_client.py", *by_hint, cwd=tmp_path)
        assert "saved frames.mp4" in run("openai_client.py", *by_frames, cwd=tmp_path)
    for name, size in (("hint", (32, 32)), ("frames", (48, 32))):
        with av.open(str(tmp_path / f"{name}.mp4")) as video:
            sizes = [(frame.width, frame.height) for frame in video.decode(video=0)]
        assert len(sizes) >= 5
        assert set(sizes) == {size}
