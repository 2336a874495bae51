"""Names that people choose, made to fit: what fits stays, and two names never become one."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.names import MAX_FILE_NAME, file_name, masked

ODD = [
    "",
    ".",
    "..",
    "a/b",
    "../a",
    "~a",
    "~",
    "läuf",
    "run@1",
    "a:b",
    'q"q',
    "it's",
    "a#b?c=%20",
    "日本",
    "🎈",
    "x" * 5000,
    "a\nb",
    "\ud800",
    " a",
    "a ",
]


@pytest.mark.parametrize("name", ["run", "my run", "a.b-c_d", "vqa@v2", "a+b=(c),d", "2026-11-27", "demo-20261127"])
def test_what_fits_stays(name):
    assert file_name(name) == name


def test_what_does_not_fit_can_be_read():
    assert re.fullmatch("lauf-sha[0-9a-f]{8}", file_name("läuf"))
    assert re.fullmatch("a_b-sha[0-9a-f]{8}", file_name("a/b"))


@given(st.lists(st.one_of(st.text(), st.sampled_from(ODD), st.from_regex(r"[a-z]-sha[0-9a-f]{8}")), unique=True, max_size=20))
def test_any_name_is_one_folder_of_its_own(names):
    changed = [file_name(name) for name in names]
    assert len(set(changed)) == len(names)
    for name in changed:
        assert name.isascii()
        assert name.isprintable()
        assert not re.search(r'[/\\:?#%*"<>|\[\]]', name)
        assert name.strip(". ~") == name != ""
        assert len(name) <= MAX_FILE_NAME


@given(st.text())
def test_a_changed_name_and_its_result_as_a_name_differ(name):
    once = file_name(name)
    assert once == name or file_name(once) != once


def test_passwords_are_not_shown():
    assert masked("http://me:secret@host:5000/x@y") == "http://***@host:5000/x@y"
    assert masked("postgresql://me@host/db") == "postgresql://***@host/db"
    assert masked("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"
