"""The Molmo family of vision-language models: models, preprocessing, generation, checkpoints.

`molmo_core.from_pretrained` loads any checkpoint. It is looked up at first use, so that data workers import this package
without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molmo_core.checkpoint import from_pretrained

__all__ = ["from_pretrained"]


def __getattr__(name: str) -> Any:
    if name == "from_pretrained":
        from molmo_core.checkpoint import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'molmo_core' has no attribute {name!r}")
