"""The evaluation's table for people."""

from jobs.evaluate import describe


def test_table():
    types = {
        "colour": {"questions": 1200, "metric": "vqa_score", "score": 0.5},
        "pointing": {"questions": 9, "metric": "pointing", "score": 1},
    }
    report = {"questions": 1200, "overall": 0.5, "types": types, "records": 9, "rejected": 2}
    lines = describe(report).splitlines()
    assert [line.split() for line in lines[1:4]] == [["all", "1,200", "50.0%"], ["colour", "1,200", "50.0%"], ["pointing", "9", "100.0%"]]
    assert lines[4].startswith("2 of 9 records could not be used")


def test_pointing_alone():
    report = {"questions": 0, "overall": None, "types": {}, "records": 1, "rejected": 0}
    assert len(describe(report).splitlines()) == 1
