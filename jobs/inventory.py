"""Measure the media of records from their headers, for packing while streaming."""

from __future__ import annotations

from pathlib import Path

from jobs.command import ConfigPath, Overrides, job
from molmo_core.config import ConfigError, read_yaml
from pipelines.data.config import DataConfig
from pipelines.training.config import TrainConfig


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the media of records from their headers, for packing while streaming. CONFIG is a data or a training configuration (then the
    records that validate are measured, too); changes are those of jobs.train (data.datasets.mine.path=...)."""
    found = load_data(config, overrides)
    from pipelines.cluster import connect
    from pipelines.data.batches.prepared import reads_prepared
    from pipelines.data.preparation.inventory import inventory_path, take_inventory
    from pipelines.data.sources import open_records

    datasets = [dataset for data in found for group in data.all_groups().values() for dataset in group.datasets.values()]
    streamed = {inventory_path(dataset.path): dataset for dataset in datasets if not reads_prepared(dataset)}
    if not streamed:
        raise ConfigError(f"{config}: all datasets are prepared; their lengths are known")
    opened = {path: open_records(dataset.path, dataset.format) for path, dataset in streamed.items()}
    with connect():
        for path, records in opened.items():
            counts = take_inventory(records, path)
            print(f"{path}: {counts.pop('usable'):,} of {counts.pop('rows'):,} records usable")
            for reason, count in counts.items():
                print(f"  {count:,}: {reason}")


def load_data(path: Path, overrides: list[str] | None) -> list[DataConfig]:
    """All data of a training configuration, with the overrides of `jobs.train`, or of a data configuration, with those of its `data`."""
    if "data" in read_yaml(path):
        return TrainConfig.load(path, overrides).all_data()
    if others := [o for o in overrides or () if not o.startswith("data.")]:
        raise ConfigError(f"{path} is a data configuration: changes begin with data., as in jobs.train: data.{others[0]}")
    return [DataConfig.load(path, [o.removeprefix("data.") for o in overrides or ()])]


app = job(main)

if __name__ == "__main__":
    app()
