"""What a model takes of a GPU's memory, and what can go where; `python -m vllm_cfg_plugin.memory MODEL --gpu 80`."""
