"""The example scripts that need no server, and the demo, which starts one."""

import re

import av
import pytest
from PIL import Image

from tests.distributed.ranks import free_port
from tests.e2e.scripts import flags, run, run_failing
from tests.families import picture

pytestmark = pytest.mark.e2e

TEXT_TO_IMAGE = "offline_inference/text_to_image/text_to_image.py"
IMAGE_EDIT = "offline_inference/image_edit/image_edit.py"
TEXT_TO_VIDEO = "offline_inference/text_to_video/text_to_video.py"


def test_the_demo(tmp_path):
    printed = run("demo.py", "--output", str(tmp_path / "pictures"), cwd=tmp_path)
    assert "e2e_time_ms" in printed
    assert "total: 12 images" in printed
    assert len(list((tmp_path / "pictures").glob("[0-9]*.png"))) == 12


COMPARED = {"cfg_parallel_size": 2, "num_inference_steps": 5, "seed": 3, "compare": True}


def check_comparison(printed):
    """Times of both, their ratio, and equal results: all that a user is to record."""
    assert "guidance: on, cfg_parallel_size: 2, steps: 5" in printed
    times = [float(re.search(rf"e2e_time_ms with cfg_parallel_size: {size}: ([\d.]+)", printed)[1]) for size in (2, 1)]
    ratio = float(re.search(r"ratio: ([\d.]+)", printed)[1])
    assert ratio == pytest.approx(times[1] / times[0], abs=0.01)
    assert "results: identical" in printed


@pytest.mark.parametrize("separator", ["_", "-"])
def test_text_to_image_takes_both_spellings(model, tmp_path, separator):
    """With the one it compares, without the comparison it logs the time of its own run."""
    compares = separator == "-"
    arguments = flags(
        separator,
        model=model,
        prompt="a cup of coffee on the table",
        negative_prompt="ugly, unclear",
        cfg_scale=4.0,
        height=64,
        width=96,
        num_images=2,
        output="cfg_enabled.png",
        **{name: value for name, value in COMPARED.items() if compares or name != "compare"},
    )
    printed = run(TEXT_TO_IMAGE, *arguments, cwd=tmp_path)
    if compares:
        check_comparison(printed)
    else:
        assert "e2e_time_ms: " in printed
        assert "guidance: on" in printed
    assert [Image.open(tmp_path / f"cfg_enabled_{i}.png").size for i in range(2)] == [(96, 64)] * 2


def test_image_edit_compares(edit_model, tmp_path):
    picture(48, 48).save(tmp_path / "bear.png")
    arguments = flags(model=edit_model, image="bear.png", cfg_scale=4.0, output="snow.png", **COMPARED)
    check_comparison(run(IMAGE_EDIT, *arguments, cwd=tmp_path))
    assert Image.open(tmp_path / "snow.png").size == (1024, 1024)


def test_image_edit_takes_as_many_images_as_the_model_does(edit_model, tmp_path):
    """Image edit takes several images and says how many the model does."""
    for name in ("one.png", "two.png"):
        picture(48, 48).save(tmp_path / name)
    arguments = flags(model=edit_model, image=["one.png", "two.png"])
    assert 'failed: image="2 images" is not valid' in run_failing(IMAGE_EDIT, *arguments, cwd=tmp_path)


def test_text_to_video_compares(video_model, tmp_path):
    arguments = flags(
        model=video_model, cfg_scale=4.0, height=32, width=48, num_frames=5, fps=8, output="cat.mp4", **COMPARED
    )
    check_comparison(run(TEXT_TO_VIDEO, *arguments, cwd=tmp_path))
    with av.open(str(tmp_path / "cat.mp4")) as video:
        assert video.streams.video[0].average_rate == 8
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(48, 32)] * 5


def test_a_comparison_needs_two_ranks(model, tmp_path):
    printed = run_failing(TEXT_TO_IMAGE, *flags(model=model, compare=True), cwd=tmp_path)
    assert (
        "--compare needs one of --cfg_parallel_size, --sequence_parallel_size, --tensor_parallel_size of 2 or more"
        in printed
    )


def test_the_mixin_called_directly_on_one_rank_and_on_two(tmp_path):
    script = "torchrun/direct_mixin.py"
    arguments = flags("-", negative_prompt="ugly", steps=4)
    assert "rank 0 of 1: e2e_time_ms: " in run(script, *arguments, "--output", "one.png", cwd=tmp_path)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    printed = run(script, *arguments, "--output", "two.png", cwd=tmp_path, launcher=launcher)
    assert "rank 0 of 2: e2e_time_ms: " in printed
    assert "rank 1 of 2: e2e_time_ms: " in printed
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
