"""Pipelines of diffusers that no family stands for: each request runs the pipeline's own `__call__`."""
