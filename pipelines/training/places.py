"""Whether everything that a run names is there. Light: it takes tenths of a second, before Ray and torch are imported."""

from __future__ import annotations

from pipelines.data.batches.prepared import PreparedDataset, reads_prepared
from pipelines.data.sources import find_records
from pipelines.model_folder import fixed_model
from pipelines.training.config import TrainConfig


def check_places(config: TrainConfig) -> None:
    """Raises ConfigError for records, prepared data or a checkpoint that are not there or not finished."""
    for data in config.all_data():
        for group in data.all_groups().values():
            for dataset in group.datasets.values():
                if reads_prepared(dataset):
                    PreparedDataset(dataset.path)
                else:
                    find_records(dataset.path)
    if config.samples is not None:
        find_records(config.samples.records)
    if config.init_from is not None:
        fixed_model(config.init_from)
