"""Runs with pieces missing, broken, or of something else are refused before anything is written."""

from __future__ import annotations

import shutil

import pytest
from bad_runs import RUNS
from spoiling import assert_refused


@pytest.mark.parametrize("bad", RUNS, ids=lambda bad: bad.id)
def test_it_is_refused_by_name_with_the_way_out_and_leaves_no_trace(bad, tmp_path, trained):
    shutil.copytree(trained, tmp_path / "in")
    assert_refused(bad, tmp_path)


def test_every_entry_has_a_name_of_its_own():
    assert len({bad.id for bad in RUNS}) == len(RUNS)
