"""A version becomes @champion if it passes the gate; the one before stays as @previous, and why is written down. And back again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from molmo_core.config import ConfigError, nearest
from pipelines import cluster, tracking
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records
from pipelines.evaluation.columns import mapped
from pipelines.evaluation.evaluate import Evaluation
from pipelines.evaluation.questions import questions
from pipelines.evaluation.report import Report
from pipelines.files import write_text
from pipelines.names import file_name
from pipelines.registry.aliases import CHAMPION, OUTCOME, PREVIOUS, Aliases, AliasLock, Move, aliases, holder
from pipelines.registry.config import OVERALL, PromoteConfig
from pipelines.registry.gate import Decision, decide
from pipelines.registry.promotion_report import report_text

WHY, RUN, REPLACED, BEFORE = "promotion.why", "promotion.run", "promotion.replaced", "promotion.previous_before"
"""Tags of a version: why, the MLflow run with the report, and where @champion and @previous were before it was promoted."""
MAX_WHY = 2000
"""Characters; while aliases move, it is part of a tag of the model, for which MLflow's databases have 5,000."""
MARKDOWN, DATA = "promotion.md", "promotion.json"


@dataclasses.dataclass(frozen=True)
class Promotion:
    """What came of it."""

    version: str
    champion: str | None
    """Before."""
    decision: Decision
    notes: list[str]
    text: str
    """The report, Markdown."""
    run_id: str | None
    """The MLflow run that holds it; None: a dry run."""


def promote(name: str, candidate: str, config: PromoteConfig, dry_run: bool = False) -> Promotion:
    """Evaluates a candidate and the champion on the same records, and moves @champion to the candidate if it passes the gate.

    Args:
        name: the registered model.
        candidate: a version, or an alias of it.
        config: the gate.
        dry_run: only says what would happen; writes nothing in MLflow.

    Raises:
        ConfigError: no such model, version, records or metric; the candidate is the champion; somebody else moves this model's aliases.
    """
    client, version = _version(name, candidate)
    before = aliases(client, name)
    if before.champion == version:
        raise ConfigError(f"version {version} of {name!r} is @{CHAMPION} already")
    check_metrics(config)
    lock = AliasLock(client, name, f"promotion of version {version}")
    with contextlib.nullcontext() if dry_run else lock.hold():
        before = aliases(client, name)  # also after what an earlier promotion had left was brought to an end
        if before.champion == version:
            raise ConfigError(f"version {version} of {name!r} is @{CHAMPION} already. {' '.join(lock.notes)}")
        reports = _evaluated(name, [version] if before.champion is None else [version, before.champion], config)
        scores = [report.scores() for report in reports]
        decision = decide(config, scores[0], scores[1] if before.champion is not None else None)
        if dry_run and (found := holder(client, name)) is not None:
            lock.notes.append(f"There is a {found}")
        text = report_text(name, version, before.champion, config, decision, lock.notes)
        folder = Path(config.output) / file_name(name)
        write_text(folder / MARKDOWN, text)
        if dry_run:
            return Promotion(version, before.champion, decision, lock.notes, text, None)
        run_id = _record(name, version, before.champion, config, decision, text)
        tags = {OUTCOME: "promoted" if decision.passed else "refused", WHY: decision.why[:MAX_WHY], RUN: run_id}
        if decision.passed:
            tags |= {REPLACED: before.champion or "", BEFORE: before.previous or ""}
            after = Aliases(version, before.champion if before.champion is not None else before.previous)
            lock.move(Move(version, before, after, tags))
        else:
            for tag, value in tags.items():
                client.set_model_version_tag(name, version, tag, value)
        return Promotion(version, before.champion, decision, lock.notes, text, run_id)


def rollback(name: str, dry_run: bool = False) -> tuple[str, str, list[str]]:
    """Moves @champion back to @previous, and @previous to where it was before that promotion. A promotion that still evaluates is
    overtaken: it then moves nothing.

    Returns:
        the version that was @champion, the one that is now (or would be), and notes.

    Raises:
        ConfigError: no such model, or nothing to go back to.
    """
    tracking.check_names(name)
    client = tracking.client()
    tracking.check_model(client, name)
    lock = AliasLock(client, name, "rollback")
    with contextlib.nullcontext() if dry_run else lock.hold(urgent=True):
        before = aliases(client, name)
        if before.champion is None or before.previous is None or before.champion == before.previous:
            told = f"@{CHAMPION} is {before.champion or 'nowhere'}, @{PREVIOUS} {before.previous or 'nowhere'}"
            raise tracking.TrackingError(f"{name!r} has nothing to go back to: {told}. {' '.join(lock.notes)}".strip())
        tags = client.get_model_version(name, before.champion).tags
        older = tags.get(BEFORE) if tags.get(REPLACED) == before.previous else None
        after = Aliases(before.previous, older if older and _exists(client, name, older) else None)
        if not dry_run:
            lock.move(Move(before.champion, before, after, {OUTCOME: "rolled back"}))
        return before.champion, before.previous, lock.notes


def check_metrics(config: PromoteConfig) -> None:
    """Raises ConfigError for a metric that no record is about."""
    wanted, seen = set(config.metrics) - {OVERALL}, {OVERALL}
    settings = config.evaluation("-", "-")
    records = mapped(open_records(settings.records, settings.format), settings.fields)
    for i in range(min(len(records), settings.limit or len(records))):
        if wanted <= seen:
            return
        with contextlib.suppress(Rejected):  # the evaluation reports them
            seen |= {question.type for question in questions(read_record(records[i]))}
    if missing := sorted(wanted - seen):
        there = ", ".join(sorted(seen))
        raise ConfigError(
            f"promote: no question of {config.records} is of type {missing[0]!r}.{nearest(missing[0], seen)} There are: {there}"
        )


def _version(name: str, candidate: str) -> tuple[mlflow.MlflowClient, str]:
    tracking.check_names(name, None if candidate.isdigit() else candidate)
    client = tracking.client()
    return client, tracking.version_of(client, f"models:/{name}{'/' if candidate.isdigit() else '@'}{candidate}")[1]


def _exists(client: mlflow.MlflowClient, name: str, version: str) -> bool:
    try:
        client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def evaluations_of(name: str, versions: list[str], config: PromoteConfig) -> list[Evaluation]:
    """How versions are evaluated. The folder is made of all that matters, so what an earlier promotion found is found again."""
    settings = config.evaluation("-", "-")
    stamp = json.dumps([config.evaluate, open_records(settings.records, settings.format).stamp], sort_keys=True)
    same = Path(config.output) / file_name(name) / hashlib.sha256(stamp.encode()).hexdigest()[:8]
    return [Evaluation(config.evaluation(f"models:/{name}/{version}", str(same / f"version-{version}"))) for version in versions]


def _evaluated(name: str, versions: list[str], config: PromoteConfig) -> list[Report]:
    """The reports of versions; those that were evaluated before in the same way are read."""
    evaluations = evaluations_of(name, versions, config)
    needs_ray = any(evaluation.report is None for evaluation in evaluations)
    with cluster.connect() if needs_ray else contextlib.nullcontext():
        return [evaluation.run() for evaluation in evaluations]


def _record(name: str, version: str, champion: str | None, config: PromoteConfig, decision: Decision, text: str) -> str:
    """The promotion as an MLflow run."""
    with tracking.Run("promotion", f"{name} version {version}") as run:
        run.log_params({"name": name, "candidate": version, "champion": champion, "gate": config.as_dict()})
        figures: dict[str, Any] = {}
        for check in decision.checks:
            figures[f"candidate/{check.metric}"] = check.candidate
            if check.difference is not None:
                figures[f"champion/{check.metric}"] = check.champion
                figures |= dict(zip((f"{part}/{check.metric}" for part in ("difference", "low", "high")), check.difference))
        run.log_metrics(figures)
        run.log_text(text, MARKDOWN)
        told = {"passed": decision.passed, "why": decision.why, "checks": [dataclasses.asdict(check) for check in decision.checks]}
        run.log_text(json.dumps({"name": name, "candidate": version, "champion": champion, **told}, indent=2, ensure_ascii=False), DATA)
    return run.id
