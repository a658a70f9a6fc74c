"""Inputs from the field are read rightly or refused, never wrong in silence."""

from pathlib import Path

import pytest
from field_cases import CASES

# Where a reader may take an input or refuse it: what ours does with it. All others say it themselves.
OURS = {
    "refused": "RT03 RT06 RT10 RT43 RT47 RW01 F11 S09 D03",
    "ok": "RT01 RT09 RT17 RT19 RT48 RT54 RT55 W01 N09",
}
OURS = {number: answer for answer, numbers in OURS.items() for number in numbers.split()}


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_case_from_the_field_holds(name: str, tmp_path: Path) -> None:
    _, wanted, case = CASES[name]
    assert case(tmp_path).startswith(OURS[name.partition("_")[0]] if wanted == "either" else wanted)


def test_no_answer_is_written_down_for_a_case_that_says_it_itself() -> None:
    assert {*OURS} == {name.partition("_")[0] for name, (_, wanted, _) in CASES.items() if wanted == "either"}
