"""The lessons: notebooks are not stale, solutions run, cells can be run again, and texts keep their manners."""

from __future__ import annotations

import re
from pathlib import Path
from symtable import symtable

import jupytext
import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from tried import FOLDER, LESSONS, module, read
from written_numbers import unfounded

LONGEST_CELL = 14  # lines
PAPER = "https://doi.org/10.1016/j.media.2021.102039"
make_lessons = module("make_lessons")
tagged = make_lessons.tagged

each_lesson = pytest.mark.parametrize("source", make_lessons.sources(), ids=lambda path: path.stem)


def blank_and_solved(source: Path) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode]:
    return tuple(nbformat.reads(text, 4) for text in make_lessons.notebooks(source).values())


def code_cells(source: Path) -> list[str]:
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]


@each_lesson
def test_the_notebooks_are_made_from_their_source(source: Path) -> None:
    for path, text in make_lessons.notebooks(source).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: make lessons"


def test_no_notebook_is_left_without_a_source() -> None:
    made = {path for source in make_lessons.sources() for path in make_lessons.notebooks(source)}
    path, text = make_lessons.slides()
    assert {*LESSONS.glob("*.ipynb"), *LESSONS.glob("solutions/*.ipynb")} == made | {path}
    assert path.read_text(encoding="utf-8") == text, f"{path} is stale: make lessons"


@each_lesson
def test_blank_notebooks_hold_no_solution_and_solved_ones_every_answer(source: Path) -> None:
    blank, solved = blank_and_solved(source)
    exercises = [cell for cell in solved.cells if "### BEGIN SOLUTION" in cell.source]
    assert len(exercises) >= 2
    assert sum(tagged(cell, "check") for cell in solved.cells) == len(exercises)
    assert "SOLUTION" not in nbformat.writes(blank)
    assert nbformat.writes(blank).count("raise NotImplementedError()") == len(exercises)
    nbformat.validate(blank)

    (questions,) = (cell.source for cell in blank.cells if tagged(cell, "exam"))
    assert re.findall(r"^(\d)\.", questions, re.MULTILINE) == ["1", "2"]
    answers = "\n".join(cell.source for cell in solved.cells if tagged(cell, "answer"))
    assert all(f"**{name}.**" in answers for name in ("To think about", "Exam 1", "Exam 2"))
    assert not [cell for cell in blank.cells if tagged(cell, "answer")]


def test_the_syllabus_counts_exercises_and_mistakes() -> None:
    exercises = sum(code.startswith("# Check of") for source in make_lessons.sources() for code in code_cells(source))
    mistakes = sum(not answer.title.startswith("right") for path in FOLDER.glob("*.md") for answer in read(path))
    said = " ".join((LESSONS / "README.md").read_text(encoding="utf-8").split())
    assert f"{mistakes} mistakes were tried on the checks of all {exercises} exercises, and nearly all" in said


@each_lesson
def test_the_timetable_adds_up_to_the_lesson(source: Path) -> None:
    blank, _ = blank_and_solved(source)
    text = "\n".join(cell.source for cell in blank.cells)
    lasts = int(re.search(r"\*\*Time\*\*: (\d+) minutes", text)[1])
    handbook = (LESSONS / "LECTURERS.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### Lesson {source.stem[0]}\b.*?(?=^##)", handbook + "\n##", re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| (\d+) \| (.*?) \|$", section, re.MULTILINE)
    assert sum(int(minutes) for minutes, _ in rows) == lasts
    assert re.search(rf"^\| \[{source.stem[0]} .*\| {lasts} \|", (LESSONS / "README.md").read_text(), re.MULTILINE)
    exercises = dict(re.findall(r"\*\*Exercise (\d\.\d)\*\* \((\d+) minutes\)", text))
    assert set(exercises) == set(re.findall(r"exercise (\d\.\d)", section))
    assert sum(map(int, exercises.values())) <= 0.7 * lasts


@each_lesson
def test_cells_are_small_and_explained(source: Path) -> None:
    blank, _ = blank_and_solved(source)
    code = [cell for cell in blank.cells if cell.cell_type == "code" and not tagged(cell, "check")]
    assert not [cell.source for cell in code if len(cell.source.splitlines()) > LONGEST_CELL]
    text = [cell.source for cell in blank.cells if cell.cell_type == "markdown"]
    assert len(text) >= len(code)
    assert text[0].startswith(f"# Lesson {source.stem[0]} ")
    assert all(f"**{word}**" in text[0] for word in ("Time", "We need", "Afterwards you can", "Work cell by cell"))
    assert "**In the paper**" in text[0] and PAPER in text[0]
    assert "**Read next**" in text[-1]


@each_lesson
def test_checks_are_seen_say_what_they_are_and_hold_no_answer(source: Path) -> None:
    blank, _ = blank_and_solved(source)
    for cell in blank.cells:
        if tagged(cell, "check"):
            assert re.fullmatch(r'# Check of (\d\.\d): run this cell\ncheck\("\1", globals\(\)\)', cell.source)
            assert "jupyter" not in cell.metadata


@each_lesson
def test_each_guess_is_written_down_and_printed_once_the_answer_is_known(source: Path) -> None:
    cells = [cell for cell in jupytext.read(source).cells]
    guesses = {}
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown" and re.search(r"\bguess\b", cell.source, re.IGNORECASE) and number:
            assert "**Write down your guess**" in cell.source, cell.source
            names = re.findall(r"\bguess_\w+", cells[number + 1].source.split("=")[0])
            assert names, cells[number + 1].source
            guesses |= dict.fromkeys(names, number + 1)
    assert guesses
    for name, number in guesses.items():
        later = [cell.source for cell in cells[number + 1 :] if cell.cell_type == "code"]
        assert any(re.search(rf"print\(.*\b{name}\b", code) for code in later), f"{name} is not printed"


def names_of(code: str) -> tuple[set[str], set[str]]:
    """The names that a cell binds, and those that it needs from other cells, in its functions, too."""
    table = symtable(code, "cell", "exec")
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    needed = {s.get_name() for s in table.get_symbols() if s.is_referenced()} - bound
    inner = [*table.get_children()]
    while inner:
        function = inner.pop()
        inner += function.get_children()
        later = function.get_type() == "function" and function.get_name() not in ("genexpr", "listcomp", "lambda")
        needed |= {
            s.get_name() for s in function.get_symbols() if s.is_global() and (later or s.get_name() not in bound)
        }
    return bound, needed


@each_lesson
def test_a_name_that_one_cell_takes_from_another_has_one_meaning(source: Path) -> None:
    """Otherwise going back gives another answer, silently."""
    cells = [names_of(code) for code in code_cells(source)]
    for name in set().union(*(needed for _, needed in cells)):
        assert sum(name in bound for bound, _ in cells) <= 1, f"`{name}` is bound in several cells and used in others"


# The same phantoms and trainings a second time take no time in the kernel: it gives back those of the first.
TRAINED_ONCE = f"""
import sys
sys.path.append({str(LESSONS)!r})
import classroom

def train_once(network, loss, volumes, train=classroom.train, kept={{}}, **options):
    start = sum(weights.detach().double().sum().item() for weights in network.parameters())
    key = start, len(loss.samplers), options.get("seed"), options.get("steps"), "measure" in options
    if key not in kept:
        history = train(network, loss, volumes, **options)
        kept[key] = {{name: value.clone() for name, value in network.state_dict().items()}}, history
    network.load_state_dict(kept[key][0])
    return kept[key][1].copy()

def make_once(seeds, phantoms=classroom.phantoms, kept={{}}):
    seeds = tuple(seeds)
    if seeds not in kept:
        kept[seeds] = phantoms(seeds)
    return tuple([volume.copy() for volume in volumes] for volumes in kept[seeds])

classroom.train, classroom.phantoms = train_once, make_once
"""
ONE_THREAD = "import torch\nassert torch.get_num_threads() == 1"


@pytest.mark.usefixtures("warm")
@each_lesson
def test_the_solution_runs_to_its_end_and_every_cell_once_more_after_all_that_follow(
    source: Path, tmp_path: Path
) -> None:
    """Once in order, then from the last cell to the first, as a student goes back."""
    notebook = nbformat.read(LESSONS / "solutions" / f"{source.stem}.ipynb", 4)
    lesson, cell = notebook.cells, nbformat.v4.new_code_cell
    again = [cell(code.source) for code in reversed(lesson) if code.cell_type == "code"]
    notebook.cells = [cell(TRAINED_ONCE), *lesson, *again, cell(ONE_THREAD)]
    nbformat.write(notebook, tmp_path / "twice.ipynb")
    done = papermill.execute_notebook(
        tmp_path / "twice.ipynb",
        tmp_path / "done.ipynb",
        cwd=LESSONS / "solutions",
        progress_bar=False,
        start_timeout=300,
        shutdown_kernel="immediate",
    )
    done.cells = done.cells[1 : 1 + len(lesson)]
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    passed = [line for output in outputs if "text" in output for line in re.findall("✓.*", output.text)]
    assert len(passed) == sum(tagged(cell, "check") for cell in done.cells)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    done.cells = [cell for cell in done.cells if not tagged(cell, "exam")]  # whose numbers are made up
    assert unfounded(done) == []


def test_in_a_kernel_an_error_in_a_student_s_code_becomes_a_hint_with_line_and_shapes() -> None:
    source = next(path for path in make_lessons.sources() if path.stem.startswith("4"))
    cells = code_cells(source)
    start = cells[: next(k for k, code in enumerate(cells) if "classroom" in code) + 1]
    check = next(code for code in cells if "Check of 4.2" in code)
    blank = next(make_lessons.blank(code) for code in cells if "def hard_anchors" in code)
    wrong = "def hard_anchors(labels, probability, threshold=0.1):\n    return probability > threshold & labels == 1"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in ("\n".join(start), check, blank, check, wrong, check)]
    )
    NotebookClient(notebook, allow_errors=True, kernel_name="python3", startup_timeout=300).execute(cwd=str(LESSONS))
    said = ["\n".join(output["traceback"]) for cell in notebook.cells for output in cell.outputs]
    missing, unwritten, broken = said
    assert missing.startswith("✗ Exercise 4.2: there is no `hard_anchors` here.")
    assert unwritten.startswith("✗ Exercise 4.2 is not written yet.")
    assert broken.startswith("✗ Exercise 4.2: line 2 stops:\n    return probability > threshold & labels == 1\n")
    assert "labels is a tensor (4, 12, 10) of int64" in broken and "brackets" in broken


def test_every_slide_shows_what_one_cell_of_a_solved_lesson_puts_out() -> None:
    slides = nbformat.reads(make_lessons.slides()[1], 4)
    assert sum(cell.metadata.slideshow.slide_type == "slide" for cell in slides.cells) == 10
    calls = re.findall(
        r'^(picture|printed)\("(\w+)", "(.*?)"', "\n".join(c.source for c in slides.cells), re.MULTILINE
    )
    for kind, lesson, text in calls:
        solved = nbformat.read(LESSONS / "solutions" / f"{lesson}.ipynb", 4)
        (cell,) = (cell for cell in solved.cells if cell.cell_type == "code" and text in cell.source)
        assert ("plt.show()" if kind == "picture" else "print(") in cell.source, text
    assert {lesson for _, lesson, _ in calls} == {source.stem for source in make_lessons.sources()}
