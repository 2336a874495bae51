"""Measure the media of records from their headers, for packing while streaming."""

from __future__ import annotations

from pathlib import Path

from jobs.command import ConfigPath, Overrides, job
from molmo_core.config import ConfigError, read_yaml
from pipelines.cluster import connect
from pipelines.data.batches.prepared import is_prepared
from pipelines.data.config import DataConfig
from pipelines.data.preparation.inventory import inventory_path, take_inventory
from pipelines.data.sources import open_records


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the media of records from their headers, for packing while streaming. CONFIG is a data or a training configuration."""
    data = load_data(config, overrides)
    streamed = [d for group in data.all_groups().values() for d in group.datasets.values() if not is_prepared(d.path)]
    if not streamed:
        raise ConfigError(f"{config}: all datasets are prepared; their lengths are known")
    with connect():
        for dataset in streamed:
            path = inventory_path(dataset.path)
            counts = take_inventory(open_records(dataset.path, dataset.format), path)
            print(f"{path}: {counts.pop('usable'):,} of {counts.pop('rows'):,} records usable")
            for reason, count in counts.items():
                print(f"  {count:,}: {reason}")


def load_data(path: Path, overrides: list[str] | None) -> DataConfig:
    """The data of a data configuration, or of a training configuration (its `data`: a part of it or the path of a file)."""
    content = read_yaml(path).get("data")
    if isinstance(content, str):
        beside = path.parent / content
        return DataConfig.load(beside if beside.exists() else content, overrides)
    return DataConfig.load(path, overrides, key=None if content is None else "data")


app = job(main)

if __name__ == "__main__":
    app()
