"""One process per cfg rank: the step runner, its request states and vLLM's worker interface on top."""
