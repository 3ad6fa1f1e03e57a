"""How users reach the engine: offline (`llm`) and over HTTP (`images`)."""
