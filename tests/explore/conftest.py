"""What several tests of the views look at."""

import pytest
from a_case import case_of_two_runs

from mupkg.explore.predictions import CasePredictions


@pytest.fixture
def seen() -> CasePredictions:
    return case_of_two_runs()
