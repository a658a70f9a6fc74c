"""Model cards (Mitchell et al., doi:10.1145/3287560.3287596): what a stranger needs to know before trusting a run.

They are written from the files in the run's folder alone, so they hold wherever it is copied to.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from mupkg.data.cohort import PHANTOMS, SPLITS, Cohort, read_cases
from mupkg.data.preprocessing import array_spacing
from mupkg.metrics import headline, with_unit
from mupkg.scans.cases import not_in_hu, patient_key
from mupkg.scans.writing import FINGERPRINT
from mupkg.stages.regions import Regions
from mupkg.stages.runs import METRICS_CSV, PLATEAU_DSC, RUN, read_run

RANGE_TOLERANCE = 0.1  # spacing and field of view may leave the range of the training scans by this share of it
UNKNOWN = "not recorded in run.json"
TEMPLATE = """\
# Model card: {run}

**For research only. This is no medical device: not for diagnosis, not for treatment planning.**

## Data and training

|  |  |
| --- | --- |
| configuration | {configuration} |
| seed, steps | {seed}, {steps} |
| cohort | {cohort} |
| fingerprint of its regions | {data_fingerprint} |
| source | {source} |
| modality | {modality} |
| split | {split} |
| training scans: voxels (z, y, x) | {voxels} |
| training scans: field (z, y, x) | {field} |
| written | {written}, commit {commit} |

## Results

{results}

## Limits

* It knows nothing of scans unlike those above, and gives no warning when it is wrong.{unfit}
* Its test cases come from the same cohort: nothing here tells how it does on another scanner's.
* Every mask has to be looked at, slice by slice.

## Licence

The software that made and reads these weights is under Apache-2.0. The weights follow the terms of the data they \
were trained on, too; whoever passes them on has to know those terms.
"""
SOURCES = {PHANTOMS: "phantoms: made-up CT, no patients"}  # in words, where the name does not do
UNFIT = {
    PHANTOMS: "\n* It was trained and tested on made-up scans: it must not be applied to patients at all.",
    None: "\n* What it was trained on is not recorded: take it for unfit for patients.",
}
UNTESTED = f"**Not tested: {METRICS_CSV} is missing, so nothing is known of how well this run does.**"


def trained_on(cohort: Cohort, regions: Regions, training_cases: int | None = None) -> dict[str, Any]:
    """What a run learns from and is tested on, for its run.json; nothing in it tells who the patients are.

    `source` is what notebook 00 was told, `cases` and (where they are known) `patients` count each split, and
    `spacing_mm` and `extent_mm` are the least and the largest of the training scans, (z, y, x) each.

    Args:
        regions: the run's own, of its replicate. training_cases: the first so many alone; None: all.
    """
    ids = {split: regions.ids(split) for split in SPLITS}
    ids["train"] = ids["train"][:training_cases]
    spacing, size = (
        np.array([json.loads(text) for text in cohort.table.loc[ids["train"], column]])
        for column in ("spacing_zyx_mm", "size_zyx")
    )
    recorded = json.loads((cohort.folder / FINGERPRINT).read_bytes())
    data = {
        "source": PHANTOMS if cohort.of_phantoms else recorded.get("source"),
        "modality": cohort.preparation.modality,
        "cases": {split: len(names) for split, names in ids.items()},
        "spacing_mm": _range(spacing),
        "extent_mm": _range(spacing * size),
    }
    if "patient" in cohort.table:
        patients = cohort.table["patient"].map(patient_key, na_action="ignore")
        data["patients"] = {split: patients[names].nunique() for split, names in ids.items()}
    return data


def _range(values: np.ndarray) -> list[list[float]]:
    return [values.min(axis=0).round(3).tolist(), values.max(axis=0).round(3).tolist()]


def card(run_folder: str | Path) -> str:
    """The model card of a run, in Markdown: data, split, results, limits and licence, as far as its files tell.

    What run.json does not record (`data` as a whole) is called unknown, and a run without metrics.csv not tested.

    Raises:
        ValueError: naming the file, if run.json is missing, or one of the two is broken.
    """
    run_folder = Path(run_folder)
    record = read_run(run_folder / RUN)
    data = record.get("data") or {}
    source = data.get("source")
    facts = {"run": run_folder.name, "results": _results(run_folder, record), "unfit": UNFIT.get(source, "")}
    facts |= {"source": SOURCES.get(source, source or UNKNOWN), "commit": record.get("commit") or UNKNOWN}
    if data:
        facts |= {"split": _split(**data), "voxels": _shown(data["spacing_mm"]), "field": _shown(data["extent_mm"])}
    return TEMPLATE.format_map(defaultdict(lambda: UNKNOWN, record | data | record["parameters"] | facts))


def unlike(run_folder: str | Path, image: sitk.Image) -> list[str]:
    """In what a scan is unlike those a run was trained on, a sentence each; also that they cannot be compared.

    The modality is the DICOM header's where the scan is a series (see `read_series`), else it is judged by the
    values. Spacing and field of view are compared in the order in which the slices are stored.
    """
    data, differences = read_run(Path(run_folder) / RUN).get("data"), []
    if not data:
        return [f"What the training scans were like is {UNKNOWN}: this scan was not compared with them."]
    trained = data["modality"]
    modality = image.GetMetaData("modality") if image.HasMetaDataKey("modality") else None
    in_hu = not not_in_hu(sitk.GetArrayViewFromImage(image))
    if modality not in (None, trained):
        differences.append(f"This scan is {modality}; the run was trained on {trained}.")
    elif in_hu != (trained == "CT"):
        values = "like those" if in_hu else "unlike those"
        differences.append(f"This scan's values are {values} of a CT in HU; the run was trained on {trained}.")
    spacing = np.array(array_spacing(image))
    extent = spacing * image.GetSize()[::-1]
    for what, key, value in (("voxels", "spacing_mm", spacing), ("field of view", "extent_mm", extent)):
        low, high = np.array(data[key])
        if (value < low * (1 - RANGE_TOLERANCE)).any() or (value > high * (1 + RANGE_TOLERANCE)).any():
            own = _shown([value.round(3).tolist()] * 2)
            differences.append(f"This scan's {what}: {own} (z, y, x); the training scans': {_shown(data[key])}.")
    return differences


def _split(cases: Mapping[str, int], patients: Mapping[str, int] | None = None, **_: Any) -> str:
    """How many cases, and patients where they are known, each split has."""
    of = {split: f" of {count} patient(s)" for split, count in (patients or {}).items()}
    return ", ".join(f"{split} {cases[split]} case(s){of.get(split, '')}" for split in SPLITS)


def _shown(span: list[list[float]]) -> str:
    """A range of sizes as text: "3 × 0.9 × 0.9 mm", or "2 to 3 × 0.9 to 1 × 0.9 to 1 mm"."""
    parts = [f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in zip(*span, strict=True)]
    return " × ".join(parts) + " mm"


def mean_and_sd(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation of at least one value, which alone has none: "0.901 ± 0.031", or "0.901".

    An infinite distance (an empty mask) makes the mean inf, without a deviation.
    """
    values = np.array([*values], dtype=float)
    has_sd = len(values) > 1 and np.isfinite(values).all()
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if has_sd else "")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as Markdown has them."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|", *lines])


def _results(run_folder: Path, record: dict[str, Any]) -> str:
    said = []
    if record.get("never_left_plateau", record.get("collapsed")):  # as older runs call it
        said.append(f"**Its validation DSC never was above {PLATEAU_DSC:g}: this run never left the plateau.**")
    if not (run_folder / METRICS_CSV).is_file():
        return "\n\n".join([*said, UNTESTED])
    metrics = read_cases(run_folder / METRICS_CSV, "test the run again with notebook 03")
    seed = record["parameters"].get("seed", UNKNOWN)
    said.append(
        f"{len(metrics)} test case(s), one training (seed {seed}); mean ± standard deviation over cases, with the "
        "largest component alone, on the scans' own grids. n is less where a metric is undefined. Another seed would "
        "give other numbers."
    )
    values = {name: metrics[name].dropna() for name in headline() if name in metrics}
    rows = [[with_unit(name), mean_and_sd(known), len(known)] for name, known in values.items() if len(known)]
    lowest = f"Lowest DSC of a case: {metrics['DSC'].min():.3f}."
    return "\n\n".join([*said, markdown_table(["metric", "mean ± sd", "n"], rows), lowest])
