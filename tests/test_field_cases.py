"""Inputs from the field are read rightly or refused, never wrong in silence."""

from pathlib import Path

import pytest
from field_cases import CASES

MENDED = ("RT", "RW", "S09", "N02", "Y01", "F11")  # how names begin: structure sets, writing them, notebook 09, names


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(MENDED)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_case_from_the_field_holds(name: str, tmp_path: Path) -> None:
    _, wanted, case = CASES[name]
    assert case(tmp_path).startswith(("ok", "refused") if wanted == "either" else wanted)
