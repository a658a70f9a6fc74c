"""The bright study, built once, and a copy of it for every test."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import SimpleITK as sitk
from bright_study import BRIGHT, REGION_MM, SPLITS, WORKING, Study, bright_case

from mupkg.data.build import Source, write_cohort
from mupkg.data.preprocessing import centroid
from mupkg.models import light_unet
from mupkg.report import figures
from mupkg.stages import evaluation, inference
from mupkg.stages import regions as regions_module
from mupkg.stages.localization import COARSE_CHANNELS, Location
from mupkg.stages.runs import save_tensors, write_run
from mupkg.stages.training import BEST


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The cohort, and stage 1 of a study that found every prostate."""
    folder = tmp_path_factory.mktemp("built")
    sources = [Source(i, lambda i=i: bright_case(i), {"split": split}) for i, split in SPLITS.items()]
    cohort = write_cohort(folder / "cohort", sources, WORKING, split_seed=0)
    stage1 = folder / "study" / "stage1"
    save_tensors(light_unet(COARSE_CHANNELS, 2).state_dict(), stage1 / BEST, {"filters": 2})
    write_run(stage1, {"region_mm": REGION_MM})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions_module, "locate", lambda case, *_, **__: Location(centroid(case.label), None, None, ""))
        regions_module.write_regions(cohort, None, stage1, coarse_mm=8.0, region_mm=REGION_MM)
    return folder


@pytest.fixture
def study(built, tmp_path, monkeypatch) -> Study:
    shutil.copytree(built, tmp_path / "copy")
    study = Study(tmp_path / "copy")
    left = []

    def oracle(network: object, region: sitk.Image) -> sitk.Image:
        left[:] = left or study.regions.ids("test")
        seen = sitk.Cast(region > BRIGHT, sitk.sitkFloat32)
        if study.island:
            seen[17:19, 7:9, 6:8] = 1  # the region is centred on the prostate, which ends before x = 16
        study.said.append(seen * 0 if left.pop(0) == study.blank else seen)
        return study.said[-1]

    for module in (inference, evaluation):
        monkeypatch.setattr(module, "load_network", lambda path: (study.loaded.append(Path(path).name), {}))
    monkeypatch.setattr(evaluation, "region_probability", oracle)
    monkeypatch.setattr(figures, "save", lambda figure, *_, **__: plt.close(figure))
    plt.switch_backend("Agg")
    return study
