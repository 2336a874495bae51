"""Train a model on prepared data or records, on any number of workers; a stopped run continues when started again."""

from __future__ import annotations

import typer

from jobs.command import ConfigPath, Overrides, job
from pipelines.names import masked
from pipelines.training.config import TrainConfig


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a model with Ray Train (FSDP), from records or a prepared dataset to a checkpoint folder that can be served.

    Progress goes to the terminal, numbers and pictures to MLflow. A run of the same `name` and `storage` continues from its last
    checkpoint; Ctrl-C or SIGTERM saves one first, and the exit code is then 130 or 143.
    """
    settings = TrainConfig.load(config, overrides)
    from pipelines.training.places import check_places

    check_places(settings)
    # Only now what takes seconds to import: mistakes are shown at once.
    from pipelines import cluster, tracking
    from pipelines.data.batches import endless
    from pipelines.training.trainer import run_training

    streamed = streams_records(settings)
    if streamed:
        endless.internals()  # its warning would otherwise be in the workers' logs only
    cpus = cluster.cpus_for(settings.num_workers * settings.cpus_per_worker, all_cores=streamed)  # actors decode on all cores
    result = run_training(settings, num_cpus=cpus)
    print(f"{'trained' if result.finished else 'stopped at'} {result.step} of {result.steps} steps in {result.seconds:.0f} s")
    if result.checkpoint:
        print(f"model    {result.checkpoint}")
    print(f"MLflow   {masked(tracking.tracking_uri())} run {result.run_id}")
    if result.stopped_by:
        raise typer.Exit(128 + result.stopped_by)


def streams_records(settings: TrainConfig) -> bool:
    """Whether actors decode records while this run trains or validates."""
    from pipelines.data.batches.prepared import is_streamed

    return any(is_streamed(data) for data in settings.all_data())


app = job(main, TrainConfig)

if __name__ == "__main__":
    app()
