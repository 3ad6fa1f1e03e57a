"""The example scripts, run as the README says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


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


def flags(separator: str = "_", **options: Any) -> list[str]:
    """The command line of options; a list is a flag several times, True one without a value."""
    arguments: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', separator)}"
        for one in value if isinstance(value, list) else [value]:
            arguments += [flag] if one is True else [flag, str(one)]
    return arguments
