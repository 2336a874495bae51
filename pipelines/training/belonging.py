"""Whether the data of a run, its model and the weights it begins with belong together: looked at before Ray starts."""

from __future__ import annotations

from pipelines.data.batches.belonging import check_data, check_weights
from pipelines.model_folder import model_folder
from pipelines.training.config import TrainConfig
from pipelines.training.places import check_places


def check_belonging(config: TrainConfig) -> None:
    """Raises ConfigError, in seconds, for data that are not there, not finished, damaged or made for another tokenizer or other settings
    than the model's, and for weights with another tokenizer."""
    check_places(config)
    for data in config.all_data():
        check_data(data, config.model)
    if config.init_from is not None:
        check_weights(model_folder(config.init_from), config.model)
