"""Whether data, model and the weights that a training begins with belong together. What does not fit trains without a word of complaint
and answers nonsense, so this is looked at before anything starts; it takes seconds and needs no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from molmo_core.config import ConfigError
from molmo_core.preprocessing.tokenizer import Tokenizer
from molmo_core.registry import BaseModelConfig
from pipelines.data.batches.loader import with_overrides
from pipelines.data.batches.prepared import PreparedDataset, reads_prepared
from pipelines.data.config import DataConfig
from pipelines.data.example_settings import TOKENIZER, example_settings
from pipelines.data.preparation.inventory import inventory_path, require_inventory
from pipelines.data.sources import find_records

_SHOWN = 5


def check_data(data: DataConfig, model: BaseModelConfig) -> None:
    """Raises ConfigError if a dataset is not there, or a prepared one is not finished, not whole, or made for another model."""
    for group_name, group in data.all_groups().items():
        for name, config in group.datasets.items():
            key = f"data.{'' if data.datasets else f'groups.{group_name}.'}datasets.{name}"
            if reads_prepared(config):
                made_for = PreparedDataset(config.path).made_for
                check_prepared(key, config.path, made_for, with_overrides(model, config.overrides, name))
            else:
                find_records(config.path)
                if data.packing:
                    require_inventory(inventory_path(config.path))


def check_prepared(key: str, path: str | Path, made_for: dict[str, Any] | None, model: BaseModelConfig) -> None:
    """Raises ConfigError if a prepared dataset was made for another tokenizer or other settings than the model's.

    Args:
        key, path: of the dataset, for the message.
        made_for: what its preparation noted (`PreparedDataset.made_for`).
        model: what is to be trained, with the settings of this dataset.
    """
    if made_for is None:
        raise ConfigError(f"{key}: {path} does not say for which model it was prepared; delete it and run jobs.prepare again")
    preprocessor = cast(Any, model).build_preprocessor(for_inference=False)
    old, new = made_for["settings"], example_settings(model, preprocessor)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if not changed:
        return
    if "model_name" in changed:
        what = f"for a {old['model_name']} model, and this one is {new['model_name']}"
    elif TOKENIZER in changed:
        what = "with another tokenizer than the model's: its token ids mean other texts"
    else:
        listed = [f"{key} was {old.get(key)!r} and is {new.get(key)!r} in the model" for key in changed[:_SHOWN]]
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        what = f"with other settings ({'; '.join(listed)}{more})"
    advice = (
        "prepare the records for this model (model=... of jobs.prepare, another output), or train the model that they were prepared for"
    )
    own = Path(path, TOKENIZER)
    if TOKENIZER in changed and own.is_dir():
        advice += f", or, if it starts from nothing, give it the tokenizer that was trained on them: model.llm.tokenizer.identifier={own}"
    elif "model_name" not in changed and TOKENIZER not in changed:
        keys = [key.partition(".")[2] for key in changed if key.startswith("mm_preprocessor.")]
        if keys:
            advice += f", or say that they differ on purpose: {key}.overrides.{keys[0]}=..."
    raise ConfigError(f"{key}: {path} was prepared {what}. It was made for model={made_for['model']}: {advice}")


def check_weights(init_from: str | Path, model: BaseModelConfig) -> None:
    """Raises ConfigError if the checkpoint folder that a training begins with has another tokenizer than the model's configuration."""
    folder = next((f for f in (Path(init_from, TOKENIZER), Path(init_from)) if (f / "tokenizer.json").is_file()), None)
    if folder is None:
        return
    own = cast(Any, model).build_tokenizer()
    try:
        theirs = Tokenizer.load(folder, first_special_id=own.first_special_id, layout=own.layout)
    except ValueError as error:  # its special tokens have other ids
        raise ConfigError(f"init_from={init_from} does not fit the model's configuration: {error}") from None
    if theirs.fingerprint != own.fingerprint:
        identifier = cast(Any, model).llm.tokenizer.identifier
        raise ConfigError(
            f"init_from={init_from} has another tokenizer than the model's configuration (llm.tokenizer.identifier: {identifier}), so its "
            f"weights would read other texts: use its own, model.llm.tokenizer.identifier={folder}, or leave out init_from and give "
            f"model={init_from}"
        )
