"""A loaded diffusers model becomes one of our subclass of its class; must not import vLLM."""

from __future__ import annotations

from typing import Any, TypeVar

Adopted = TypeVar("Adopted")


def become(adopted_class: type[Adopted], model: Any, **own: Any) -> Adopted:
    """The loaded model itself, from now on of a subclass of its class; a user who needs both passes a copy.

    Args:
        own: attributes that the subclass has besides; those of a model that is of this class already stay.
    """
    # Not a second object: there is one state, so whatever a user does to the model that he passed (adapters, hooks,
    # `enable_tiling`, `to`) acts here too, as in diffusers, and no weight is copied. torch's `fully_shard` and
    # `parametrize` change a module's class in the same way.
    if type(model) is not adopted_class:
        model.__class__ = adopted_class
        for name, value in own.items():
            setattr(model, name, value)
    adopted: Adopted = model
    return adopted
