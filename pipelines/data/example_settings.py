"""What of a model shapes the examples that are made for it: noted by a preparation, compared before a training."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from molmo_core.registry import BaseModelConfig

TOKENIZER = "tokenizer"


def example_settings(model: BaseModelConfig, preprocessor: Any) -> dict[str, Any]:
    """What of a model shapes its examples, flat (`mm_preprocessor.max_crops: 8`), as JSON gives it back; the tokenizer by its fingerprint.

    Args:
        preprocessor: of the model.
    """
    parts = {
        "model_name": model.model_name,
        TOKENIZER: preprocessor.tokenizer.fingerprint,
        "data_formatter": cast(Any, model).data_formatter.as_dict(),
        "mm_preprocessor": preprocessor.limits.as_dict(),
        "images": {} if preprocessor.settings is None else dataclasses.asdict(preprocessor.settings),
    }
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    own = {key.removeprefix("mm_preprocessor.") for key in flat if key.startswith("mm_preprocessor.")}
    return json.loads(json.dumps({k: v for k, v in flat.items() if k.removeprefix("images.") not in own}))
