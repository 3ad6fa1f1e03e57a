"""One file per model family; `registry.py` is the table of those that this plugin serves."""
