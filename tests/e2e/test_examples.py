"""The example scripts, run as the README says."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Standard output and error of an example that must succeed."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_the_demo(tmp_path):
    printed = run("demo.py", "--output", str(tmp_path / "pictures"), cwd=tmp_path)
    assert "e2e_time_ms" in printed
    assert "total: 12 images" in printed
    assert len(list((tmp_path / "pictures").glob("[0-9]*.png"))) == 12
    assert Image.open(tmp_path / "pictures" / "contact_sheet.png").width > 600


@pytest.mark.parametrize("separator", ["_", "-"])
def test_text_to_image_takes_both_spellings(model, tmp_path, separator):
    options = {
        "model": str(model),
        "prompt": "a cup of coffee on the table",
        "negative_prompt": "ugly, unclear",
        "cfg_scale": "4.0",
        "num_inference_steps": "5",
        "height": "64",
        "width": "96",
        "seed": "3",
        "num_images": "2",
        "output": "cfg_enabled.png",
        "cfg_parallel_size": "2",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', separator)}", value)]
    printed = run("offline_inference/text_to_image/text_to_image.py", *arguments, cwd=tmp_path)
    assert "e2e_time_ms: " in printed
    assert "guidance: on" in printed
    assert [Image.open(tmp_path / f"cfg_enabled_{i}.png").size for i in range(2)] == [(96, 64)] * 2
