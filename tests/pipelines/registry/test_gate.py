"""The gate, on scores whose differences are known."""

import numpy as np
import pyarrow as pa
import pytest

from molmo_core.config import ConfigError
from pipelines.registry.config import PromoteConfig
from pipelines.registry.gate import decide, scores_of
from pipelines.registry.promotion_report import report_text


def table(scores, kind="colour", metric="exact_match", first=0):
    """A question a record."""
    count = len(scores)
    columns = {"record": range(first, first + count), "number": [0] * count, "type": [kind] * count, "metric": [metric] * count}
    return pa.table({**{name: list(values) for name, values in columns.items()}, "score": list(map(float, scores))})


def gate(**settings):
    return PromoteConfig(records="r.jsonl", **{"not_worse": {}, **settings})


RIGHT, WRONG = np.ones(100), np.zeros(100)
MOSTLY = np.arange(100) >= 10


@pytest.mark.parametrize(
    ("settings", "candidate", "champion", "failures"),
    [
        ({"not_worse": {"overall": 0.01}}, RIGHT, RIGHT, []),
        ({"not_worse": {"overall": 0.0}}, RIGHT, RIGHT, []),
        ({"not_worse": {"overall": 0.01}}, MOSTLY, RIGHT, ["may be worse by more than 1.0%: the difference is -10.0 % ["]),
        ({"not_worse": {"overall": 0.3}}, MOSTLY, RIGHT, []),
        ({"better": ["overall"]}, RIGHT, MOSTLY, []),
        ({"better": ["overall"]}, RIGHT, RIGHT, ["is not shown to be better: the difference is +0.0 % [+0.0, +0.0]"]),
        ({"better": ["overall"]}, MOSTLY, MOSTLY[::-1], ["is not shown to be better: the difference is +0.0 % [-"]),
        ({"at_least": {"overall": 0.95}}, MOSTLY, WRONG, ["90.0% is less than 95.0%"]),
        ({"at_least": {"colour": 0.9}, "better": ["colour"]}, MOSTLY, WRONG, []),
    ],
)
def test_what_passes(settings, candidate, champion, failures):
    decision = decide(gate(**settings), table(candidate), table(champion))
    found = [failure for check in decision.checks for failure in check.failures]
    assert [failure[: len(expected)] for failure, expected in zip(found, failures, strict=True)] == failures
    assert decision.passed == (not failures)
    assert all(failure in decision.why for failure in found)
    assert decision == decide(gate(**settings), table(candidate), table(champion)), "the same scores, the same decision"


def test_metrics_choose_their_questions():
    both = pa.concat_tables([table(RIGHT), table(WRONG, "pointing", "pointing", first=100)])
    assert scores_of("overall", both, both).candidate.mean() == 1.0, "all but pointing"
    assert scores_of("pointing", both, both).candidate.mean() == 0.0
    decision = decide(gate(better=["shape"]), both, both)
    assert decision.why == "shape: no question of this kind could be asked"


def test_a_question_that_only_one_could_be_asked_counts_against_the_other():
    decision = decide(gate(not_worse={"overall": 0.01}), table(RIGHT[:50]), table(RIGHT))
    assert (decision.passed, decision.checks[0].candidate) == (False, 0.5)
    assert "50 of 100 questions could be asked to only one of both" in decision.why


def test_without_a_champion_the_absolute_figures_count():
    config = gate(not_worse={"overall": 0.01}, at_least={"overall": 0.8})
    assert decide(config, table(MOSTLY), None).passed
    assert "no champion to compare with. Only at_least decides" in decide(config, table(MOSTLY), None).why
    assert not decide(gate(at_least={"overall": 0.95}), table(MOSTLY), None).passed
    assert "names no absolute figures" in decide(gate(not_worse={"overall": 0.01}), table(MOSTLY), None).why


def test_the_report_shows_every_metric():
    config = gate(not_worse={"overall": 0.01}, better=["colour"])
    text = report_text("mine", "3", "2", config, decide(config, table(RIGHT), table(MOSTLY)), ["A note."])
    assert text.startswith("# mine: version 3 against version 2: passes\n")
    assert "| overall | 100 | 100.0% | 90.0% | +10.0 % [" in text
    assert "| better | ok |" in text
    assert text.endswith("- A note.\n")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"records": ""}, "records must be given"),
        ({"evaluate": {"model": "m"}}, "evaluate: model cannot be set here"),
        ({"evaluate": {"metrik": "vqa_score"}}, "Did you mean 'metric'"),
        ({"not_worse": {"overall": 2}}, "not_worse"),
    ],
)
def test_mistakes_in_a_gate_are_told_when_it_is_read(settings, told):
    with pytest.raises(ConfigError, match=told):
        PromoteConfig.from_dict({"records": "r.jsonl", **settings})
