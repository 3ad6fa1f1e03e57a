"""Our own subclass of a loaded diffusers model, over the same modules; must not import vLLM."""

from __future__ import annotations

from typing import Any, TypeVar

Shared = TypeVar("Shared")


def share_modules(shared_class: type[Shared], model: Any, **own: Any) -> Shared:
    """A model of `shared_class`, a subclass of the loaded model's class, over the same modules.

    No weight is copied, and what one of the two changes the other sees.

    Args:
        own: attributes that the new model has besides.
    """
    shared: Any = shared_class.__new__(shared_class)
    shared.__dict__ = model.__dict__
    for name, value in own.items():
        setattr(shared, name, value)
    return shared
