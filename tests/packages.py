"""Packages as pip installs them into a folder on the path: modules, and their metadata beside."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

from vllm_cfg_plugin.pipelines.registry import ENTRY_POINTS

SAMPLE = Path(__file__).parents[1] / "examples" / "custom_pipeline"


def install(folder: Path, name: str, entry_points: Mapping[str, str]) -> Path:
    """Write the metadata of a package with pipelines, {class name: "module:Class"}; returns the folder."""
    metadata = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"[{ENTRY_POINTS}]", *(f"{key} = {value}" for key, value in entry_points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def install_sample(folder: Path) -> Path:
    """The sample of docs/adding_a_pipeline.md, as its own pyproject.toml says."""
    settings = tomllib.loads((SAMPLE / "pyproject.toml").read_text())
    for module in settings["tool"]["setuptools"]["py-modules"]:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(SAMPLE / f"{module}.py", folder)
    project = settings["project"]
    return install(folder, project["name"], project["entry-points"][ENTRY_POINTS])
