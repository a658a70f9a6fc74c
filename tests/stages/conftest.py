"""What the tests of a trained run share."""

import shutil

import numpy as np
import pytest

from mupkg.stages import inference, localization
from mupkg.stages.landmarks import FemoralHeads


@pytest.fixture
def heads(cohort, monkeypatch):
    """The femoral heads are known: looking for them takes a second."""
    left, right = cohort.case(cohort.ids("test")[0]).femoral_heads
    monkeypatch.setattr(localization, "femoral_heads", lambda image: FemoralHeads(left, right, 1.0, ""))


@pytest.fixture
def copied(run_folder, tmp_path):
    """The run's folder alone, somewhere else."""
    shutil.copytree(run_folder, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.fixture
def bones(monkeypatch, heads):
    """Instead of stage 2's network: bones are foreground. So masks are not empty and in several pieces."""
    monkeypatch.setattr(
        inference, "predict_volume", lambda network, volume, box, **_: (volume[box] > 200).astype(np.float32)
    )
