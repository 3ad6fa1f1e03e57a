"""The OpenAI-compatible images routes."""
