"""Turn records into a prepared dataset: Arrow shards, rejected rows, a report."""

from __future__ import annotations

from jobs.command import ConfigPath, Overrides, job
from pipelines.data.config import PrepareConfig


def main(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn records into a prepared dataset: Arrow shards, rejected rows, a report. Run it again to continue after a stop.

    Settings that most people need: records=FILE, FOLDER or GLOB, output=FOLDER, model=CHECKPOINT, tokenizer=null (the model's own),
    sequence_length, limit (only the first records), max_reject_rate. All of them are in CONFIG, with comments.
    """
    settings = PrepareConfig.load(config, overrides)
    # Only now what takes seconds to import: a mistake in the configuration is shown at once.
    from pipelines.cluster import connect
    from pipelines.data.preparation.prepare import prepare

    with connect():
        report = prepare(settings)
    print(f"{settings.output}: {report['rows_out']:,} of {report['rows_in']:,} records in {report['shards']} shards, ", end="")
    print(f"{report['tokens']:,} tokens, {report['bytes'] / 1e6:,.1f} MB, {report['seconds']} s ({report['rows_per_second']} records/s)")
    if report["truncated"]:
        print(f"  {report['truncated']:,} examples lost their last annotations to fit {report['sequence_length']:,} tokens")
    for reason, count in report["rejected_by_reason"].items():
        print(f"  rejected {count:,}: {reason}")
    if report["fields_not_used"]:
        print("  fields not used: " + ", ".join(f"{name} {count:,}" for name, count in report["fields_not_used"].items()))
    print(f"  report: {settings.output}/report.html")


app = job(main)

if __name__ == "__main__":
    app()
