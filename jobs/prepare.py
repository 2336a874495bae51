"""Turn records into a prepared dataset: Arrow shards, rejected rows, a report."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from jobs.command import ConfigPath, Overrides, job
from pipelines.data.config import PrepareConfig

if TYPE_CHECKING:
    from pipelines.data.preparation.prepare import Preparation


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn records into a prepared dataset: Arrow shards, rejected rows, a report. Run it again to continue after a stop.

    Settings that most people need: records=FILE, FOLDER or GLOB, output=FOLDER, model=CHECKPOINT (its tokenizer is used), sequence_length,
    limit (only the first records), split.test=0.1 (hold out records), max_reject_rate. All of them are in CONFIG, with comments.
    """
    settings = PrepareConfig.load(config, overrides)
    # Only now what takes seconds to import: a mistake in the configuration is shown at once.
    from pipelines.cluster import connect
    from pipelines.data.preparation.prepare import Preparation

    preparation = Preparation(settings)
    if preparation.report is not None:
        print("Nothing to do: these records are prepared, and every shard is whole.")
        describe(preparation, preparation.report)
        return
    try:
        with connect():
            report = preparation.run()
    except KeyboardInterrupt:
        done = f"{preparation.records_done:,} of {preparation.total:,} records are prepared"
        print(f"Stopped: {done}. The same command continues from there.", file=sys.stderr)
        raise
    describe(preparation, report)


def describe(preparation: Preparation, report: dict[str, Any]) -> None:
    """Prints what a preparation gave."""
    output = preparation.config.output
    print(f"{output}: {report['rows_out']:,} of {report['rows_in']:,} records in {report['shards']} shards, ", end="")
    print(f"{report['tokens']:,} tokens, {report['bytes'] / 1e6:,.1f} MB, {report['seconds']} s ({report['rows_per_second']} records/s)")
    if preparation.held_out:
        print(f"  held out: {preparation.held_out:,} records, {output}/test.part.json (every job takes it as records)")
    if report["truncated"]:
        print(f"  {report['truncated']:,} examples lost their last annotations to fit {report['sequence_length']:,} tokens")
    for reason, count in report["rejected_by_reason"].items():
        print(f"  rejected {count:,}: {reason}, first in {report['first_details'][reason]}")
    if report["fields_not_used"]:
        print("  fields not used: " + ", ".join(f"{name} {count:,}" for name, count in report["fields_not_used"].items()))
    config = preparation.config
    print(f"  tokenizer: {f'trained on the records ({output}/tokenizer)' if config.tokenizer else f'that of {config.model}'}")
    print(f"  report: {output}/report.html")


app = job(main, PrepareConfig)

if __name__ == "__main__":
    app()
