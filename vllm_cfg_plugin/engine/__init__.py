"""The engine: step plans, the planner that makes them, and vLLM's scheduler interface on top."""
