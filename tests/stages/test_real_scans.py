"""The whole chain on real scans, when they are at hand: from files to metrics and back through `segment`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from mupkg.configurations import build, configuration
from mupkg.data import Cohort, PatchSource, Preparation
from mupkg.data.build import Source, sources_from_pattern, write_cohort
from mupkg.data.preprocessing import prepare, resample
from mupkg.losses import SegmentationMetricLoss
from mupkg.models import light_unet
from mupkg.scans.cases import grid_difference
from mupkg.scans.files import read_scan
from mupkg.stages import localization, runs, segment, training
from mupkg.stages import regions as regions_module
from mupkg.stages.evaluation import evaluate_run
from mupkg.stages.inference import copy_localizer, load_localizer
from mupkg.stages.prediction import mean_dice

REGION_MM = (100.0, 100.0, 100.0)


def mr_sources(real_scan) -> list[Source]:
    folder = real_scan("promise12_128")
    return sources_from_pattern(folder, "{case}_image.nii.gz", "{case}_label.nii.gz", modality="MR")


@pytest.fixture(scope="module")
def chain(real_scan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cohort]:
    """Both stages trained for a few seconds on four real MR cases."""
    sources = mr_sources(real_scan)
    folder = tmp_path_factory.mktemp("real")
    chosen = [source for source in sources if source.case_id in ("Case13", "Case14", "Case16", "Case21")]
    cohort = write_cohort(
        folder / "cohort", chosen, Preparation(modality="MR", spacing_mm=(3, 2.5, 2.5)), split_seed=0
    )

    torch.manual_seed(0)
    localizer = light_unet(filters=8)
    coarse = localization.coarse_volumes(cohort, "train")
    source = PatchSource(*coarse, patch_size=(32, 32), channels=5, batch_size=16)
    told = {"filters": 8, "coarse_mm": 4.0, "region_mm": REGION_MM, "preparation": cohort.preparation.model_dump()}
    validation = localization.coarse_volumes(cohort, "validation")
    how = {"steps": 150, "validate_every": 50, "learning_rate": 0.5}
    training.train(
        localizer,
        SegmentationMetricLoss(),
        source,
        folder / "stage1",
        validate=lambda net: mean_dice(net, *validation, channels=5),
        metadata=told,
        **how,
    )
    runs.write_run(folder / "stage1", told)
    localizer, _ = load_localizer(folder / "stage1" / training.BEST)
    regions = regions_module.write_regions(cohort, localizer, folder / "stage1", coarse_mm=4.0, region_mm=REGION_MM)

    network, loss = build(configuration("MetricUNet-HCP"), base_filters=4, embedding_dim=8)
    validation = regions.volumes("validation")
    history = training.train(
        network,
        loss,
        PatchSource(*regions.volumes("train"), patch_size=(32, 32), batch_size=16),
        folder / "run",
        validate=lambda net: mean_dice(net, *validation, channels=3),
        metadata={"configuration": "MetricUNet-HCP", "base_filters": 4, "embedding_dim": 8},
        steps=60,
        validate_every=30,
        learning_rate=0.1,
    )
    assert history["cross_entropy"].iloc[-1] < history["cross_entropy"].iloc[0]
    copy_localizer(folder / "stage1", folder / "run")
    evaluate_run(folder / "run", cohort, regions)
    return folder, cohort


def test_regions_hold_the_prostate_and_say_that_heads_are_not_sought(chain):
    folder, cohort = chain
    table = regions_module.Regions.read(folder / "stage1").table
    assert len(table) == len(cohort.table) == 4
    assert (table["covered"] > 0.9).all()
    assert table["fallback"].str.contains("MR: no femoral heads are sought").all()


def test_predictions_lie_on_the_scans_own_grid_and_segment_repeats_them(chain):
    folder, cohort = chain
    for case in cohort.cases("test"):
        prediction = read_scan(folder / "run" / "predictions" / f"{case.case_id}.nii.gz")
        assert grid_difference(case.image, prediction) is None
        again = segment(case.image, folder / "run")
        assert (sitk.GetArrayFromImage(again) == sitk.GetArrayFromImage(prediction)).all()


def test_a_dicom_series_is_the_same_scan_as_its_nifti(real_scan):
    series, nifti = read_scan(real_scan("mr_ucla/dicom/T2")), read_scan(real_scan("mr_ucla/UCLA0001_image.nii.gz"))
    assert grid_difference(sitk.DICOMOrient(nifti, "LPS"), sitk.DICOMOrient(series, "LPS")) is None
    same = [sitk.GetArrayFromImage(sitk.DICOMOrient(i, "LPS")).astype(float) for i in (nifti, series)]
    assert np.array_equal(*same)


def test_the_body_outline_keeps_every_real_prostate_whole(real_scan):
    preparation = Preparation(modality="MR", spacing_mm=(3, 2.5, 2.5))
    for source in mr_sources(real_scan):
        case = source.read()
        kept = np.count_nonzero(sitk.GetArrayFromImage(prepare(case, preparation).label))
        whole = np.count_nonzero(sitk.GetArrayFromImage(resample(case.label, preparation.spacing_mm, label=True)))
        assert kept == pytest.approx(whole, rel=0.02), case.case_id
