"""How the engine starts its ranks and talks to them: vLLM's executor interface, processes, sockets."""
