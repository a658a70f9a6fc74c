"""Finished runs kept as small tables, so that no batch trains them again: `make keep STUDY=trials`.

A kept run is a run's folder without weights and predictions: run.json, history.csv, metrics.csv and its like. It
stands for the run itself in a batch and in notebook 10, if it was told the same and saw the same regions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mupkg import repository
from mupkg.parameters import Stage2Settings, Tag, tagged
from mupkg.scans.writing import whole_file
from mupkg.stages.runs import (
    BEST,
    HISTORY,
    METRICS,
    METRICS_LAST,
    RUN,
    SHIFT_FILES,
    load_tensors,
    processor_name,
    read_run,
    write_json,
)

KEPT = Path("outputs") / "reference" / "runs"  # in the repository; below it <study>/<run>
TABLES = (HISTORY, METRICS_LAST, *SHIFT_FILES, METRICS)  # the last one tells that a run is kept whole
PRECISION = "%.6g"


def kept_folder(study: str) -> Path:
    """Where the kept runs of a study lie."""
    return repository() / KEPT / study


def told_otherwise(run: Path, told: Mapping[str, Any]) -> str:
    """How a run's record differs from what the study tells it; empty if it does not."""
    made = read_run(run / RUN)["parameters"]
    reach = {*told} - (tagged(Stage2Settings, Tag.SPEED) - tagged(Stage2Settings, Tag.TRAINING))
    asked = Stage2Settings.checked(told).model_dump(mode="json", include=reach)
    return ", ".join(
        f"{name} is {made.get(name)!r}, not {value!r}" for name, value in asked.items() if made.get(name) != value
    )


def kept_runs(study: str, runs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Which of a study's runs need not be trained, because they are kept and were told the same."""
    folders = {name: kept_folder(study) / name for name in runs}
    return {
        name
        for name, folder in folders.items()
        if (folder / METRICS).is_file() and not told_otherwise(folder, runs[name])
    }


def keep(study: Path, destination: Path) -> list[str]:
    """Copy the small tables of a study's finished runs; returns the names of those that were not kept before.

    Numbers are rounded to six digits. The record tells the processor, and what the weights were made on.

    Raises:
        ValueError: naming the run, if its record or weights cannot be read.
    """
    new = []
    for metrics in sorted(study.glob(f"*-seed*/{METRICS}")):
        run, kept = metrics.parent, destination / metrics.parent.name
        if (kept / METRICS).is_file():
            continue
        record = read_run(run / RUN)
        record.setdefault("processor", processor_name())
        record["made_on"] = load_tensors(run / BEST)[1].get("made_on", [])
        write_json(kept / RUN, record)
        for name in (name for name in TABLES if (run / name).is_file()):
            table = pd.read_csv(run / name, dtype={"case_id": str})
            with whole_file(kept / name) as temporary:
                table.to_csv(temporary, index=False, float_format=PRECISION)
        new.append(run.name)
    return new


if __name__ == "__main__":
    for study in map(Path, sys.argv[1:]):
        names = keep(study, kept_folder(study.name))
        print(f"{study}: {len(names)} more run(s) kept in {KEPT / study.name}{': ' * bool(names)}{', '.join(names)}")
