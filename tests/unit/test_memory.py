"""Freed memory stays with a rank's process."""

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from vllm_cfg_plugin.worker.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def touch():
    for _ in range(10):
        torch.ones(12 << 20)  # 48 MB: above what glibc ever keeps by itself

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(policy):
    return int(
        subprocess.run([sys.executable, "-c", SCRIPT, policy], capture_output=True, check=True, text=True).stdout
    )


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_memory_is_not_faulted_in_again():
    assert page_faults("keep") < page_faults("default") / 10
