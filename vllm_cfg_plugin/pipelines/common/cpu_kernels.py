"""Which library computes what on a CPU in float32; must import nothing but torch.

The choice is part of an image's bytes, so it follows from what the CPU can do and never from a timing. torch's own
kernels are built on MKL, and diffusers runs them: where nothing better is known, they are ours too.

Measured with torch 2.13 and one thread, GFLOP/s of a linear layer by MKL and by oneDNN: with AVX2 95 and 75 to 95; with
AVX-512 in two halves (Zen 4) 97 and 103; with AVX-512 at full width on AMD (Zen 5), unused by MKL, 105 and 240.
Attention by oneDNN's products takes 1.05 to 2 times as long as torch's kernel, except on the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_AMD_ZEN_5 = 26  # "cpu family" of /proc/cpuinfo, of this and later ones


@dataclass(frozen=True)
class CpuKernels:
    """What oneDNN computes; all else is left to torch.

    Attributes:
        linear: linear layers, and GELU in one kernel with the layer before it.
        attention_from: attention of sequences of at least so many rows; None for none.
    """

    linear: bool = False
    attention_from: int | None = None


@cache
def cpu_kernels() -> CpuKernels:
    """The kernels of this process's CPU; found once."""
    return choose_kernels(
        torch.backends.cpu.get_cpu_capability(),
        has_onednn=torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled),
        has_mkl=torch.backends.mkl.is_available(),
        is_zen_5=_is_zen_5(),
    )


def choose_kernels(capability: str, *, has_onednn: bool, has_mkl: bool, is_zen_5: bool) -> CpuKernels:
    """The kernels of a CPU.

    Args:
        capability: as `torch.backends.cpu.get_cpu_capability` names it: what torch's kernels use here.
        is_zen_5: it is an AMD core of that kind or a later one.
    """
    if not has_onednn or capability not in ("AVX2", "AVX512"):
        return CpuKernels()  # also other architectures: nothing is known of oneDNN's rows there
    if capability == "AVX512":
        return CpuKernels(linear=True, attention_from=256 if is_zen_5 else None)
    return CpuKernels(linear=not has_mkl)


def _is_zen_5() -> bool:
    """Whether this is an AMD core with AVX-512 at full width: no flag of its own says so."""
    if not _CPUINFO.exists():
        return False
    pairs = (line.partition(":")[::2] for line in _CPUINFO.read_text().partition("\n\n")[0].splitlines())
    first_core = {name.strip(): value.strip() for name, value in pairs}
    return first_core.get("vendor_id") == "AuthenticAMD" and int(first_core.get("cpu family", 0)) >= _AMD_ZEN_5
