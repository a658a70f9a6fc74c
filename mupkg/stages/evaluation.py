"""A run tested: on its study's test cases, on the same scans made harder, and on another cohort."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import SimpleITK as sitk

from mupkg import progress
from mupkg.data.cohort import Cohort
from mupkg.data.preprocessing import AIR, Preparation, array_spacing, prepare, to_scan_grid
from mupkg.metrics import calibration, segmentation_metrics
from mupkg.scans.cases import Case, grid_difference
from mupkg.scans.files import write_image
from mupkg.scans.writing import save_table
from mupkg.stages.inference import Pipeline, keep_largest, load_network, region_probability
from mupkg.stages.localization import NotLocated
from mupkg.stages.regions import Regions
from mupkg.stages.runs import BEST, LAST, METRICS_LAST, PREDICTIONS, Shift, metrics_name
from mupkg.stages.shifts import check_ct, shifted


def evaluate_run(
    run_folder: str | Path, cohort: Cohort, regions: Regions, shift: Shift | None = None, *, last: bool = False
) -> pd.DataFrame:
    """Predict a run's test cases and measure them on their scans' own grids; a row a case.

    Writes predictions/<case>.nii.gz (with the largest-component step) and metrics.csv: `DSC`, `ASD`, ... with that
    step, `DSC_all`, `ASD_all`, ... without; `surface_DSC_2mm` with it; `Brier` and `ECE` of the whole region.

    Args:
        shift: measure on shifted scans instead, in the regions of the scans as they are. Writes metrics_<shift>.csv
            alone.
        last: measure the last weights instead of those with the best validation DSC (reading R15). Writes
            metrics_last.csv alone.
    """
    run_folder, rows = Path(run_folder), []
    network, _ = load_network(run_folder / (LAST if last else BEST))
    for case_id in progress(regions.ids("test"), desc=f"testing {shift or ''}".strip(), unit="case"):
        case, region = cohort.case(case_id), regions.image(case_id)
        if shift is not None:
            region = _shifted_region(case, region, cohort.preparation, shift)
        mask, row = mask_and_row(case, regions, region_probability(network, region))
        rows.append(row)
        if shift is None and not last:
            write_image(mask, run_folder / PREDICTIONS / f"{case_id}.nii.gz")
    path = run_folder / (METRICS_LAST if last else metrics_name(shift))
    return save_table(pd.DataFrame(rows), path, index=False)


def mask_and_row(case: Case, regions: Regions, probability: sitk.Image) -> tuple[sitk.Image, dict[str, Any]]:
    """The mask on the scan's own grid, with the largest-component step, and a row of metrics.csv.

    Args:
        probability: of foreground, on the case's region.
    """
    mask = to_scan_grid(keep_largest(probability), case.image)
    everything = mask_metrics(to_scan_grid(probability, case.image), case)
    largest = mask_metrics(mask, case, tolerance_mm=2.0)
    near = {"surface_DSC_2mm": largest.pop("surface_DSC")}
    row = {"case_id": case.case_id} | largest | {f"{k}_all": v for k, v in everything.items()} | near
    truth = regions.volume(case.case_id, "label") == 1
    return mask, row | calibration(sitk.GetArrayFromImage(probability), truth)


def _shifted_region(case: Case, region: sitk.Image, preparation: Preparation, shift: Shift) -> sitk.Image:
    """The region of a shifted scan, on the voxels of the region as it was."""
    check_ct([shift], case.modality)
    image = shifted(case.image, shift, seed=zlib.crc32(case.case_id.encode()))
    prepared = prepare(replace(case, image=image, label=None), preparation).image
    on_region = sitk.Resample(prepared, region, sitk.Transform(), sitk.sitkLinear, AIR, sitk.sitkFloat32)
    return sitk.Cast(sitk.Round(on_region), sitk.sitkUInt8)


def mask_metrics(mask: sitk.Image, case: Case, tolerance_mm: float | None = None) -> dict[str, float]:
    """All metrics of a mask against the case's label, on the scan's own grid, in mm; see `segmentation_metrics`.

    Raises:
        ValueError: if the mask does not lie on the label's grid: another case's, or the working grid's.
    """
    if difference := grid_difference(case.label, mask):
        raise ValueError(
            f"case {case.case_id}: the mask is not on its label's grid ({difference}); resample it first"
        )
    prediction, truth = (sitk.GetArrayFromImage(image).astype(bool) for image in (mask, case.label))
    return segmentation_metrics(prediction, truth, spacing_mm=array_spacing(case.image), tolerance_mm=tolerance_mm)


def evaluate_elsewhere(run_folder: str | Path, cohort: Cohort, case_ids: Sequence[str]) -> pd.DataFrame:
    """Both stages of a run, as they were trained, on cases of another cohort; a row a case, on the scans' own grids.

    Scans are prepared as the cohort's modality asks (HU window or percentiles), on the run's working grid. A case in
    which stage 1 finds no prostate counts as an empty mask; `located` says so.

    Raises:
        ValueError: naming the file if a part of the run is missing or broken, or a case has no label.
    """
    pipeline, rows = Pipeline.load(run_folder), []
    own = {"modality": cohort.preparation.modality, "channel": None}
    pipeline = replace(pipeline, preparation=pipeline.preparation.model_copy(update=own))
    for case_id in progress(case_ids, desc="testing", unit="case"):
        case = cohort.case(case_id)
        if case.label is None:
            raise ValueError(f"case {case_id}: has no label to measure against; leave it out")
        try:
            mask, located = pipeline(case.image, name=case_id).mask, True
        except NotLocated:
            mask, located = sitk.Image(case.image.GetSize(), sitk.sitkUInt8), False
            mask.CopyInformation(case.image)
        rows.append({"case_id": case_id, "located": located} | mask_metrics(mask, case))
    return pd.DataFrame(rows)
