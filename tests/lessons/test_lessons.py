"""The lessons: notebooks are not stale, solutions run, and checks tell blanks and typical mistakes what is wrong."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest
from IPython.display import display
from matplotlib import pyplot as plt
from written_numbers import unfounded

LESSONS = Path(__file__).resolve().parents[2] / "notebooks" / "lessons"
LONGEST_CELL = 14  # lines; checks and mistakes may be longer

_spec = importlib.util.spec_from_file_location("make_lessons", LESSONS / "make_lessons.py")
make_lessons = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_lessons)
tagged = make_lessons.tagged

each_lesson = pytest.mark.parametrize("source", make_lessons.sources(), ids=lambda path: path.stem)


@each_lesson
def test_the_notebooks_are_made_from_their_source(source: Path) -> None:
    for path, text in make_lessons.notebooks(source).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: make lessons"


def test_no_notebook_is_left_without_a_source() -> None:
    made = {path for source in make_lessons.sources() for path in make_lessons.notebooks(source)}
    assert set(LESSONS.rglob("*.ipynb")) == made


@each_lesson
def test_blank_notebooks_hold_no_solution_and_the_source_every_kind_of_cell(source: Path) -> None:
    blank, solved = (nbformat.reads(text, 4) for text in make_lessons.notebooks(source).values())
    exercises = [cell for cell in solved.cells if "### BEGIN SOLUTION" in cell.source]
    assert 2 <= len(exercises) <= 3
    assert sum(tagged(cell, "check") for cell in solved.cells) == len(exercises)
    assert "SOLUTION" not in nbformat.writes(blank)
    assert nbformat.writes(blank).count("raise NotImplementedError()") == len(exercises)
    nbformat.validate(blank)


def test_the_syllabus_counts_exercises_and_mistakes() -> None:
    cells = [cell for source in make_lessons.sources() for cell in jupytext.read(source).cells]
    exercises, mistakes = (sum(tagged(cell, tag) for cell in cells) for tag in ("check", "mistake"))
    said = " ".join((LESSONS / "README.md").read_text(encoding="utf-8").split())
    assert f"checks of all {exercises} exercises know {mistakes} typical mistakes" in said


@each_lesson
def test_cells_are_small_and_explained(source: Path) -> None:
    blank, _ = (nbformat.reads(text, 4) for text in make_lessons.notebooks(source).values())
    code = [cell for cell in blank.cells if cell.cell_type == "code" and not tagged(cell, "check")]
    assert not [cell.source for cell in code if len(cell.source.splitlines()) > LONGEST_CELL]
    text = [cell.source for cell in blank.cells if cell.cell_type == "markdown"]
    assert len(text) >= len(code)
    assert text[0].startswith(f"# Lesson {source.stem[0]} ")
    assert all(f"**{word}**" in text[0] for word in ("Time", "In the paper", "We need"))
    assert any("rite down your guess" in part for part in text)
    assert "**Read next**" in text[-1]


@each_lesson
def test_the_solution_runs_to_its_end(source: Path, tmp_path: Path) -> None:
    solution = LESSONS / "solutions" / f"{source.stem}.ipynb"
    done = papermill.execute_notebook(solution, tmp_path / "done.ipynb", cwd=solution.parent, progress_bar=False)
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    passed = [line for output in outputs if "text" in output for line in re.findall("✓.*", output.text)]
    assert len(passed) == sum(tagged(cell, "check") for cell in done.cells)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert unfounded(done) == []


def run(code: str, names: dict, what: str) -> dict:
    exec(compile(code, what, "exec"), names)
    return names


def hint_of(attempt: str, check: str, names: dict) -> str:
    """What the check says to this attempt at the exercise before it."""
    names = dict(names)
    run(attempt, names, "attempt")
    with pytest.raises(AssertionError) as stopped:
        run(check, names, "check")
    assert type(stopped.value).__name__ == "Hint", stopped.value
    return str(stopped.value)


@each_lesson
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_checks_pass_what_is_right_and_tell_blanks_and_typical_mistakes_each_its_own_hint(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell by cell, in this process; before a solution, the blank cell, its mistakes and alternatives are tried."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    plt.switch_backend("agg")
    cells = [cell for cell in jupytext.read(source).cells if cell.cell_type == "code"]
    last = max(number for number, cell in enumerate(cells) if tagged(cell, "check"))
    names, attempts, alternatives = {"__name__": "__main__", "display": display}, [], []
    for cell in cells[: last + 1]:
        if tagged(cell, "mistake") or tagged(cell, "alternative"):
            (attempts if tagged(cell, "mistake") else alternatives).append(cell.source)
            continue
        if tagged(cell, "check"):
            blank, *mistakes = attempts
            assert "is not written yet" in hint_of(blank, cell.source, names)
            wanted = [re.match("# hint: (.*)\n", mistake)[1] for mistake in mistakes]
            hints = [hint_of(mistake, cell.source, names) for mistake in mistakes]
            assert mistakes
            assert not [(part, hint) for part, hint in zip(wanted, hints, strict=True) if part not in hint]
            assert len(set(hints)) == len(hints)
            for other in alternatives:
                run(cell.source, run(other, dict(names), "alternative"), "check")
            attempts, alternatives = [], []
        elif "### BEGIN SOLUTION" in cell.source:
            attempts = [make_lessons.blank(cell.source)]
        run(cell.source, names, source.name)
        plt.close("all")
