"""Finished runs kept as small tables, so that no batch trains them again: `make keep STUDY=trials`.

A kept run is a run's folder without weights and predictions: run.json, history.csv, metrics.csv and its like. It
stands for the run itself in a batch and in notebook 10, if it was told the same and saw the same regions. Another
processor rounds otherwise, so that a stage 1 trained there cuts other regions: a study's stage 1 is kept too, weights
and centres, and a batch cuts its regions anew at these centres.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mupkg import progress, repository
from mupkg.data.cohort import Cohort, recorded
from mupkg.parameters import Stage1Settings, Stage2Settings, StudySettings, Tag, tagged
from mupkg.scans.writing import FINGERPRINT, whole_file
from mupkg.settings import Settings
from mupkg.stages.regions import Regions, save_region, unmark
from mupkg.stages.runs import (
    BEST,
    HISTORY,
    LAST,
    METRICS_CSV,
    METRICS_LAST,
    NNUNET_RUNS,
    REGIONS,
    RUN,
    SHIFT_FILES,
    STAGE1,
    load_tensors,
    processor_name,
    read_run,
    write_json,
)

KEPT = Path("outputs") / "reference" / "runs"  # in the repository; below it <study>/<run>
TABLES = (HISTORY, METRICS_LAST, *SHIFT_FILES, METRICS_CSV)  # the last one tells that a run is kept whole
STAGE1_FILES = (BEST, RUN, FINGERPRINT, REGIONS)  # the last one tells that a stage 1 is kept whole
PRECISION = "%.6g"
TRAIN_ANEW = "remove its folder, and the batch trains it anew"


def kept_folder(study: str) -> Path:
    """Where the kept runs of a study lie."""
    return repository() / KEPT / study


def parameter_fault(run: Path, parameters: Mapping[str, Any], settings: type[Settings] = Stage2Settings) -> str:
    """How a run's record differs from what the study tells it, defaults included; empty if it does not.

    The folders may differ, and so may what changes no weight. Of a parameter that the suite did not have yet when the
    run was made, its default is expected.
    """
    made = read_run(run / RUN, cure=TRAIN_ANEW)["parameters"]
    free = tagged(StudySettings, Tag.NAME) | (tagged(settings, Tag.SPEED) - tagged(settings, Tag.TRAINING))
    asked = settings.checked(parameters).model_dump(mode="json", exclude=free)
    was = {name: made.get(name, None if name in parameters else value) for name, value in asked.items()}
    return ", ".join(f"{name} is {was[name]!r}, not {value!r}" for name, value in asked.items() if was[name] != value)


def kept_runs(
    study: str,
    runs: Mapping[str, Mapping[str, Any]],
    stages: Mapping[str, Mapping[str, Any]],
    outputs: Path | None = None,
) -> set[str]:
    """Which of a study's runs need not be trained: they are kept, they and their first stage were told the same.

    Args:
        runs, stages: their parameters by folder, `Study.run_parameters` and `Study.stages`.
        outputs: the study's folder; where it has regions already, a kept run must have seen these.
    """
    kept, cut = kept_folder(study), {}  # of each stage 1: its regions' fingerprints; one, unless here are others
    for name, parameters in stages.items():
        if not (kept / name / REGIONS).is_file() or not parameter_fault(kept / name, parameters, Stage1Settings):
            places = [place / name for place in (kept, outputs) if place and (place / name / FINGERPRINT).is_file()]
            cut[name] = {recorded("regions", place, 2) for place in places}

    def stands(run: Path, parameters: Mapping[str, Any]) -> bool:
        stage1 = parameters.get("stage1", STAGE1)
        if stage1 not in cut or not (run / METRICS_CSV).is_file() or parameter_fault(run, parameters):
            return False
        return cut[stage1] <= {read_run(run / RUN, "data_fingerprint", cure=TRAIN_ANEW)["data_fingerprint"]}

    return {name for name, parameters in runs.items() if stands(kept / name, parameters)}


def kept_stages(study: str, stages: Mapping[str, Mapping[str, Any]], outputs: Path) -> set[str]:
    """Which of a study's first stages need not be trained: kept, told the same, and not trained to their end here.

    Args:
        stages: by folder what they are told. outputs: the study's folder.
    """
    kept = {name for name in stages if (kept_folder(study) / name / REGIONS).is_file()}
    same = {n for n in kept if not parameter_fault(kept_folder(study) / n, stages[n], Stage1Settings)}
    return {name for name in same if not (outputs / name / LAST).is_file()}


def keep(study: Path, destination: Path) -> list[str]:
    """Copy the small tables of a study's finished runs; returns the names of those that were not kept before.

    A kept run or first stage that had other parameters or other regions is replaced. nnU-Net's runs are left out:
    they are no arms of a trial.

    Numbers are rounded to six digits. The record tells the processor, and what the weights were made on. The table
    of centres and the weights of a first stage are kept as they are.

    Raises:
        ValueError: naming the run, if its record or weights cannot be read.
    """
    new = []
    for metrics in sorted(study.glob(f"*-seed*/{METRICS_CSV}")):
        run, target = metrics.parent, destination / metrics.parent.name
        if run.name.rpartition("-seed")[0] in NNUNET_RUNS:
            continue
        record = read_run(run / RUN, cure=TRAIN_ANEW)
        if (target / METRICS_CSV).is_file():
            before = read_run(target / RUN, cure=TRAIN_ANEW)
            if all(before.get(name) == record.get(name) for name in ("parameters", "data_fingerprint")):
                continue
            shutil.rmtree(target)  # no table of the other run may stay beside these
        record.setdefault("processor", processor_name())
        record["made_on"] = load_tensors(run / BEST)[1].get("made_on", [])
        write_json(target / RUN, record)
        for name in (name for name in TABLES if (run / name).is_file()):
            table = pd.read_csv(run / name, dtype={"case_id": str}, keep_default_na=False, na_values=[""])
            with whole_file(target / name) as temporary:
                table.to_csv(temporary, index=False, float_format=PRECISION)
        new.append(run.name)
    for table in sorted(study.glob(f"{STAGE1}*/{FINGERPRINT}")):
        stage1, target = table.parent, destination / table.parent.name
        if (target / REGIONS).is_file() and recorded("regions", target, 2) == recorded("regions", stage1, 2):
            continue
        _copy(stage1, target)
        new.append(stage1.name)
    return new


def _copy(stage1: Path, folder: Path) -> None:
    for name in STAGE1_FILES:
        with whole_file(folder / name) as temporary:
            shutil.copyfile(stage1 / name, temporary)


def restore_stage1(cohort: Cohort, source: Path, folder: Path) -> Regions:
    """A kept stage 1 as if it had been trained here: its regions are cut anew, at its centres.

    Raises:
        ValueError: naming the kept folder, if this cohort's volumes, or the regions, differ from those of then.
    """
    cure = f"remove {source} and the runs kept beside it, and all of them are trained anew"
    if recorded("cohort", source, 2) != recorded("cohort", cohort.folder, 0):
        raise ValueError(f"{source}: was trained on other volumes than {cohort.folder} has; {cure}")
    regions, region_mm = Regions.read(source), read_run(source / RUN)["parameters"]["region_mm"]
    unmark(folder)
    for case_id in progress(regions.table.index, desc="cutting", unit="case"):
        save_region(cohort.prepared(case_id), regions.centre(case_id), region_mm, folder, case_id)
    _copy(source, folder)
    if (again := Regions.read(folder)).fingerprint() != recorded("regions", source, 2):
        unmark(folder)
        raise ValueError(f"{source}: its regions, cut anew from {cohort.folder}, are not the same; {cure}")
    return again


def main() -> None:
    """`STUDY ...` keeps the runs of these studies; `restore COHORT KEPT FOLDER` makes a kept stage 1 anew."""
    try:
        if sys.argv[1:2] == ["restore"]:
            cohort, kept, folder = map(Path, sys.argv[2:])
            restore_stage1(Cohort.read(cohort), kept, folder)
            return
        for study in map(Path, sys.argv[1:]):
            names = keep(study, kept_folder(study.name))
            listed = f"{': ' * bool(names)}{', '.join(names)}"
            print(f"{study}: {len(names)} more run(s) kept in {KEPT / study.name}{listed}")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
