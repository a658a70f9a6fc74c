"""Inputs from the field are read rightly or refused, never wrong in silence."""

from pathlib import Path

import pytest
from field_cases import CASES


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_case_from_the_field_holds(name: str, tmp_path: Path) -> None:
    _, wanted, case = CASES[name]
    assert case(tmp_path).startswith(("ok", "refused") if wanted == "either" else wanted)
