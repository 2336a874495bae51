"""The report of a promotion for people."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.registry.aliases import CHAMPION
from pipelines.registry.config import PromoteConfig
from pipelines.registry.gate import Check, Decision, interval_text


def report_text(name: str, version: str, champion: str | None, config: PromoteConfig, decision: Decision, notes: Sequence[str] = ()) -> str:
    """Markdown: the outcome, a table of the metrics, what is not fulfilled.

    Args:
        name: the registered model.
        version: the candidate.
        champion: the version it is compared with; None: there is none.
        config: the gate.
        decision: what it says.
        notes: of the promotion itself.
    """
    against = f"against version {champion}" if champion else f"without a @{CHAMPION} to compare with"
    lines = [f"# {name}: version {version} {against}: {'passes' if decision.passed else 'does not pass'}", ""]
    lines += [f"Questions: `{config.records}`. Differences are candidate minus champion with their 95 % intervals, from a bootstrap"]
    lines += [f"over the records that both were asked about (seed {config.seed}).", ""]
    lines += ["| metric | questions | candidate | champion | difference | asked for | |", "|---|---:|---:|---:|---:|---|---|"]
    lines += [_row(check, config) for check in decision.checks]
    failures = [f"- **{check.metric}** {failure}" for check in decision.checks for failure in check.failures]
    return "\n".join([*lines, "", *failures, *(f"- {note}" for note in (*decision.notes, *notes))]).rstrip() + "\n"


def _row(check: Check, config: PromoteConfig) -> str:
    asked = [f"not worse by {config.not_worse[check.metric]:.1%}"] if check.metric in config.not_worse else []
    asked += ["better"] if check.metric in config.better else []
    asked += [f"at least {config.at_least[check.metric]:.1%}"] if check.metric in config.at_least else []
    cells = [
        check.metric.replace("|", "\\|"),
        f"{check.questions:,}",
        f"{check.candidate:.1%}" if check.questions else "",
        f"{check.champion:.1%}" if check.champion is not None else "",
        interval_text(check.difference) if check.difference else "",
        ", ".join(asked),
        "fails" if check.failures else "ok",
    ]
    return f"| {' | '.join(cells)} |"
