"""The map in the package of the pipelines names every module, and nothing else."""

import re
from pathlib import Path

from vllm_cfg_plugin import pipelines


def test_every_module_is_on_the_map():
    modules = {path.stem for path in Path(pipelines.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(re.findall(r"`(\w+)`", pipelines.__doc__)) == modules
