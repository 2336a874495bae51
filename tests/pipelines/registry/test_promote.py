"""jobs.promote on a real database, with what two real models answer: what is moved, written and told. Their answers are made here, without
Ray, and lie where a promotion looks for those of an earlier one."""

import copy
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from jobs.promote import REFUSED, app
from pipelines import tracking
from pipelines.evaluation.evaluate import Evaluation
from pipelines.evaluation.worker import Worker
from pipelines.registry import aliases as module
from pipelines.registry.aliases import OUTCOME, TAG, Aliases, aliases
from pipelines.registry.config import PromoteConfig
from pipelines.registry.promote import RUN, WHY, evaluations_of
from pipelines.registry.pyfunc import Predictor

LIMIT = 8


@pytest.fixture(scope="module")
def place(empty_database, tiny_model, tiny_checkpoint, tmp_path_factory):
    """Versions 1 and 2 of `mine`, without an alias, and records that the second answers right."""
    folder = tmp_path_factory.mktemp("promote")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setattr(module, "SETTLE_S", 0.05)
        patch.chdir(folder)
        other = copy.deepcopy(tiny_model)
        other.transformer.ff_out.weight.data = other.transformer.ff_out.weight.data.roll(1, 1)
        other.save_checkpoint(folder / "other")
        for checkpoint in (folder / "other", tiny_checkpoint):
            tracking.register(checkpoint, "mine")
        prompts = [f"What is number {i}?" for i in range(20)]
        asked = pd.DataFrame({"prompt": prompts})
        right, wrong = (Predictor(str(c)).predict(asked, {"max_tokens": LIMIT}) for c in (tiny_checkpoint, folder / "other"))
        pairs = [(prompt, a) for prompt, a, b in zip(prompts, right, wrong) if a and a != b][:10]
        rows = [{"message_list": [{"messages": pair, "type": "what"}]} for pair in pairs]
        Path("records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        gate = {"records": "records.jsonl", "not_worse": {"overall": 0.0}, "better": ["what"], "at_least": {"overall": 0.9}}
        Path("gate.yaml").write_text(json.dumps({**gate, "evaluate": {"max_new_tokens": LIMIT, "metric": "exact_match"}}))
        for evaluation in evaluations_of("mine", ["1", "2"], PromoteConfig.load("gate.yaml")):
            worker = Worker(evaluation.config, evaluation.model, evaluation.records, evaluation.total)
            for file in worker({"shard": list(evaluation.results.shards)})["file"]:
                evaluation.results.commit(0, file)
            assert Evaluation(evaluation.config).run().figures["questions"] == 10
        yield folder


def promote(*arguments):
    result = CliRunner().invoke(app, ["mine", *arguments])
    assert "Traceback" not in result.output, result.output
    return result


def test_a_life(place):
    """No champion yet, a first one, a better one, a worse candidate, back and back again."""
    client, gate = tracking.client(), ("--config", "gate.yaml")
    result = promote("--candidate", "1", *gate)
    assert (result.exit_code, aliases(client, "mine")) == (REFUSED, Aliases(None, None)), result.output
    assert "**overall** 0.0% is less than 90.0%" in result.output
    client.set_registered_model_alias("mine", "champion", "1")
    result = promote("--candidate", "2", *gate, "--dry-run")
    assert (result.exit_code, aliases(client, "mine")) == (0, Aliases("1", None)), result.output
    assert "Dry run: version 2 of 'mine' would be promoted" in result.output
    assert OUTCOME not in client.get_model_version("mine", "2").tags
    client.set_registered_model_alias("mine", "candidate", "2")
    result = promote("--candidate", "candidate", *gate)
    assert (result.exit_code, aliases(client, "mine")) == (0, Aliases("2", "1")), result.output
    assert "| what | 10 | 100.0% | 0.0% | +100.0 % [+100.0, +100.0] | better | ok |" in result.output
    assert "@champion is version 2 of 'mine'; version 1 is @previous" in result.output
    tags = client.get_model_version("mine", "2").tags
    assert tags[OUTCOME] == "promoted"
    run = client.get_run(tags[RUN])
    assert (run.info.status, run.data.metrics["difference/what"], run.data.metrics["champion/overall"]) == ("FINISHED", 1.0, 0.0)
    assert {"promotion.md", "promotion.json"} <= {artifact.path for artifact in client.list_artifacts(tags[RUN])}
    result = promote("--candidate", "1", *gate)
    assert (result.exit_code, aliases(client, "mine")) == (REFUSED, Aliases("2", "1")), result.output
    tags = client.get_model_version("mine", "1").tags
    assert (tags[OUTCOME], tags[WHY][:46]) == ("refused", "overall: 0.0% is less than 90.0%; overall: may")
    result = promote("--rollback", "--dry-run")
    assert (result.exit_code, aliases(client, "mine")) == (0, Aliases("2", "1"))
    assert "@champion would move back from version 2 to version 1" in result.output
    assert (promote("--rollback").exit_code, aliases(client, "mine")) == (0, Aliases("1", None))
    assert (promote("--rollback").exit_code, aliases(client, "mine")) == (2, Aliases("1", None))
    assert TAG not in client.get_registered_model("mine").tags


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--candidate", "7", "--config", "gate.yaml"), "version=7"),
        (("--candidate", "two words", "--config", "gate.yaml"), "alias='two words'"),
        (("--candidate", "2", "--config", "gate.yaml", "better=[wat]"), "records.jsonl is of type 'wat'. Did you mean 'what'"),
        (("--candidate", "2", "--config", "gate.yaml", "records=nowhere.jsonl"), "nowhere.jsonl"),
        (("--candidate", "1", "--config", "gate.yaml"), "version 1 of 'mine' is @champion already"),
        (("--candidate", "2"), "--config CONFIG is missing"),
        (("--rollback", "--candidate", "2"), "give either --candidate"),
        (("--rollback",), "has nothing to go back to"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(place, arguments, told):
    client = tracking.client()
    client.set_registered_model_alias("mine", "champion", "1")
    before = client.get_experiment_by_name("promotion")
    runs = client.search_runs([before.experiment_id]) if before else []
    result = promote(*arguments)
    assert (result.exit_code, told in result.stderr) == (2, True), result.output
    after = client.get_experiment_by_name("promotion")
    assert len(client.search_runs([after.experiment_id]) if after else []) == len(runs)
    assert TAG not in client.get_registered_model("mine").tags
