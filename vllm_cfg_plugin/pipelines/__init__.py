"""The model families: one folder each, what they share in `common`, their contract with the engine in `base`."""
