"""Loggers of the processes that vLLM runs; must import nothing but the standard library."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """A logger below vLLM's own: vLLM sets up handlers and level for that tree alone, and ours should look like its."""
    return logging.getLogger(f"vllm.{name}")
