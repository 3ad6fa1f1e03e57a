"""Scripts for node, where it and npm's registry are there: OpenAI's client, and a browser at the page."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).with_name("javascript")


def install(folder: Path) -> None:
    """Put the scripts and the client into a folder, or skip the test."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    shutil.copytree(SCRIPTS, folder, dirs_exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode:
        pytest.skip(f"npm can't install what they import: {installed.stderr[-200:]}")


def run(folder: Path, script: str, *arguments: str) -> dict:
    """What a script prints."""
    command = ["node", script, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
