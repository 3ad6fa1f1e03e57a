"""The OpenAI-compatible videos routes."""
