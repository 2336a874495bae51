"""Makes a version the champion if it passes a gate, or takes that back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import Overrides, job
from molmo_core.config import ConfigError
from pipelines.names import masked
from pipelines.registry.config import PromoteConfig

REFUSED = 3
"""Exit code: the candidate does not pass the gate."""


def main(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The registered model.", show_default=False)],
    overrides: Overrides = None,
    candidate: Annotated[str | None, typer.Option(metavar="VERSION", help="The version (or an alias of it) to promote.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="CONFIG", help="YAML file of the gate.")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Take the last promotion back: @champion moves to @previous.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would happen, with the same exit code.")] = False,
) -> None:
    """Evaluates a version and the champion on the same records; if the version passes the gate, @champion moves to it.

    The version before stays as @previous. Exit code: 0 promoted (or would be), 3 refused by the gate, 2 a mistake.
    """
    if rollback == (candidate is not None):
        raise ConfigError("promote: give either --candidate VERSION (with --config CONFIG) or --rollback")
    if rollback:
        if config is not None or overrides:
            raise ConfigError("promote: --rollback takes no --config and no settings")
        _rollback(name, dry_run)
        return
    if config is None:
        raise ConfigError("promote: --config CONFIG is missing: the gate, for example configs/promote/gate.yaml")
    settings = PromoteConfig.load(config, overrides)
    # Only now what takes seconds to import: mistakes are shown at once.
    from pipelines.data.sources import find_records

    find_records(settings.records)
    from pipelines import tracking
    from pipelines.registry.promote import promote

    result = promote(name, str(candidate), settings, dry_run)
    print(result.text, flush=True)
    outcome = f"version {result.version} of {name!r}"
    if dry_run:
        print(f"Dry run: {outcome} {'would be' if result.decision.passed else 'would not be'} promoted; nothing was changed")
    elif result.decision.passed:
        old = f"; version {result.champion} is @previous (--rollback goes back to it)" if result.champion else ""
        print(f"@champion is {outcome}{old}")
    else:
        print(f"@champion stays where it is: {outcome} does not pass the gate")
    if result.run_id:
        print(f"MLflow   {masked(tracking.tracking_uri())} run {result.run_id}")
    if not result.decision.passed:
        raise typer.Exit(REFUSED)


def _rollback(name: str, dry_run: bool) -> None:
    from pipelines.registry.promote import rollback

    old, new, notes = rollback(name, dry_run)
    for note in notes:
        print(note)
    print(f"@champion {'would move' if dry_run else 'moved'} back from version {old} to version {new} of {name!r}")


app = job(main, PromoteConfig)

if __name__ == "__main__":
    app()
