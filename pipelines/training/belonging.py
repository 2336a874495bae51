"""Whether the data of a run, its model and the weights it begins with belong together: looked at before Ray starts."""

from __future__ import annotations

from pipelines.data.batches.belonging import check_data, check_weights
from pipelines.data.sources import find_records
from pipelines.model_folder import fixed_model, model_folder
from pipelines.training.config import TrainConfig


def check_belonging(config: TrainConfig) -> None:
    """Raises ConfigError, in seconds, for data that are not there, not finished, damaged or made for another tokenizer or other settings
    than the model's, and for weights with another tokenizer."""
    for data in config.all_data():
        check_data(data, config.model)
    if config.samples is not None:
        find_records(config.samples.records)
    if config.init_from is not None:
        fixed_model(config.init_from)
        check_weights(model_folder(config.init_from), config.model)
