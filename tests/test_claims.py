"""Every figure of a trial that README, RESULTS and METHOD state follows from kept tables: `make claims`.

`make results` writes RESULTS.md and outputs/reference anew, from each trial's cases.csv alone.
"""

from __future__ import annotations

import re
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pages
import pandas as pd
import pytest

from mupkg.report import results
from mupkg.stages.runs import PLATEAU_DSC
from mupkg.trials import statistics

ROOT = Path(__file__).resolve().parents[1]
TRIALS = pages.finished_trials()


def unwrapped(path: str) -> str:
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


# The pages and the tables they are made of


@pytest.mark.parametrize(("path", "made"), [(pages.PAGE, pages.reference_page), (pages.RESULTS, pages.results_page)])
def test_the_page_is_what_the_tables_say(path, made):
    assert path.read_text(encoding="utf-8") == made(), "run `make results`"


@pytest.mark.parametrize("name", TRIALS)
def test_every_shipped_table_is_what_the_cases_give(name):
    derived = pages.derived_tables(name)
    shipped = {path.stem for path in (pages.REFERENCE / name).glob("*.csv")}
    assert {*derived} <= shipped
    for table, expected in derived.items():
        made, kept = as_read(StringIO(expected.to_csv(index=False))), as_read(pages.REFERENCE / name / f"{table}.csv")
        assert made.shape == kept.shape, table
        cells = zip(made.to_numpy().ravel(), kept.to_numpy().ravel(), strict=True)
        assert [pair for pair in cells if not same(*pair)] == [], table


def as_read(source: Path | StringIO) -> pd.DataFrame:
    return pd.read_csv(source, header=None, dtype=str, keep_default_na=False)


def same(ours: str, theirs: str) -> bool:
    try:
        return bool(np.isclose(float(ours), float(theirs), rtol=1e-6, atol=1e-12, equal_nan=True))
    except ValueError:
        return ours == theirs


# README.md: its figures are RESULTS.md's


WORDS = ("equivalent", "benefit", "harm", "undecided", "not judged")
FIGURE = r"[+-]?\d*\.\d+(?: ± \d+\.\d+)?(?: \[[^\]]*\d[^\]]*\])?(?: \(90 %\))?|\d+ of \d+"


def finding() -> str:
    return unwrapped("README.md").split("**What it found")[1].split("<!-- end of the finding -->")[0]


@cache
def statements() -> str:
    return unwrapped("RESULTS.md")


def unfounded(text: str) -> list[str]:
    """The figures of a text that RESULTS.md lacks, and the verdicts that stand beside another effect there."""
    judged = re.findall(rf"({FIGURE}), ({'|'.join(WORDS)})", text)
    rows = [f"{effect} | {verdict}" for effect, verdict in judged]
    return [claim for claim in [*re.findall(FIGURE, text), *rows] if claim not in statements()]


def test_what_the_readme_found_stands_in_the_results():
    assert len(re.findall(rf"(?:{FIGURE}), (?:{'|'.join(WORDS)})", finding())) == 3
    assert unfounded(finding()) == []


def test_every_question_is_answered_in_one_sentence_without_a_p_value():
    for question in pages.read_yaml(pages.QUESTIONS)["questions"]:
        answer = question["answer"]
        assert re.fullmatch(r"[^.?!]+(?:\.\d+[^.?!]*)*\.", answer) and len(answer.split()) <= 35, answer
        assert not re.search(r"\bp\b", answer + question.get("notes", "")), question["question"]


# METHOD.md: figures of two sections, from the tables


@cache
def validations(name: str) -> pd.Series:
    table = pd.read_csv(pages.REFERENCE / name / "validations.csv")
    return table.groupby(["configuration", "replicate"])["validation_dsc"]


def measured_in_method() -> list[str]:
    """Sentences of METHOD.md that state what was measured, with their figures from the tables."""
    best = validations("plateau").max()
    never = int((best <= PLATEAU_DSC).sum())
    e1 = validations("e1").max()
    chances = statistics.published_rankings(results.published(3)).set_index("row")
    seeds_move = chances.filter(regex=" sd 0.01$")
    after_c = chances.loc["MetricUNet-HR":].filter(regex=" sd 0$")
    lowest, highest = after_c.min(axis=None), after_c.max(axis=None)
    fourth = results.published(3).set_index("configuration", drop=False).loc[["UNet", "MetricUNet-HCP"]]
    hcp = statistics.published_rankings(fourth, replicate_sds=(0.01,)).filter(like="r = ").max(axis=None)
    simulated = pd.read_csv(pages.REFERENCE / "simulation" / "alarms.csv").set_index("trials")
    return [
        f"{never} of the 40 never left",
        f"At 0.1 and 1200 steps all {int((e1 > PLATEAU_DSC).sum())} of E1 left",
        f"only R over UNet++ ({seeds_move.loc['MetricUNet-R'].max():.3f})".replace("(0.", "(."),
        f"the chance that the ranking is false is {lowest:.2f} to {highest:.2f}".replace(" 0.", " ."),
        f"HCP over UNet (.046) is beyond chance even at .010 ({hcp:.4f})".replace("(0.", "(."),
        *(row.sentence for row in simulated.itertuples()),
    ]


def test_method_says_what_the_tables_say():
    text = unwrapped("METHOD.md")
    assert [sentence for sentence in measured_in_method() if sentence not in text] == []


# Thirty mutations of numbers and verdict words are caught


def mutations(text: str, number: int, rng: np.random.Generator, figure: str = FIGURE) -> list[str]:
    """Copies of a text with one digit of a figure, or one verdict, changed."""
    places = [*re.finditer(rf"{figure}|{'|'.join(WORDS)}", text)]
    changed = []
    for place in rng.choice(len(places), number, replace=False):
        old = places[place][0]
        if old in WORDS:
            new = WORDS[(WORDS.index(old) + 1) % len(WORDS)]
        else:
            digit = rng.choice([n for n, letter in enumerate(old) if letter.isdigit()])
            new = f"{old[:digit]}{(int(old[digit]) + 1) % 10}{old[digit + 1 :]}"
        changed.append(text[: places[place].start()] + new + text[places[place].end() :])
    return changed


def test_mutations_of_the_results_are_caught(tmp_path):
    truth, page = pages.results_page(), tmp_path / "RESULTS.md"
    page.write_text(truth, encoding="utf-8")
    test_the_page_is_what_the_tables_say(page, lambda: truth)
    for text in mutations(truth, 20, rng()):
        page.write_text(text, encoding="utf-8")
        with pytest.raises(AssertionError, match="run `make results`"):
            test_the_page_is_what_the_tables_say(page, lambda: truth)


def rng() -> np.random.Generator:
    return np.random.default_rng(30)


def test_mutations_of_the_readme_are_caught():
    for text in mutations(finding(), 7, rng()):
        assert unfounded(text), text


def test_mutations_of_the_method_are_caught():
    for sentence in measured_in_method():
        for text in mutations(sentence, 1, rng(), r"\d"):
            assert text not in unwrapped("METHOD.md")


def test_a_sentence_with_another_verdict_is_refused():
    spec = {"trial": "e1", "arm": "HCP", "against": "UNet", "verdict": "benefit"}
    with pytest.raises(ValueError, match="is equivalent, not benefit"):
        pages.result_row(spec)
