"""A run's networks on another cohort: external validation, without any training there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import SimpleITK as sitk

from mupkg import progress
from mupkg.data.cohort import Cohort
from mupkg.stages.inference import Pipeline, measure
from mupkg.stages.localization import NotLocated


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
        rows.append({"case_id": case_id, "located": located} | measure(mask, case))
    return pd.DataFrame(rows)
