"""Building a cohort: where scans come from, the split by patient, and a folder written whole."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mupkg.data.cases import Case, checked_case, label_volume_ml
from mupkg.data.cohort import (
    FINGERPRINT,
    HEADS,
    SPLITS,
    Cohort,
    CohortError,
    name_faults,
    read_table,
    split_faults,
)
from mupkg.data.files import closed, read_scan, readable, write_image
from mupkg.data.phantom import make_phantom
from mupkg.data.preprocessing import Preparation, prepare
from mupkg.data.writing import whole_file, write_text

ASIDE = ".making."  # begins the names of a cohort's files until all of them are there
VOLUMES = ("images", "labels", "prepared")
LEAST_KEPT = 0.5  # of the prostate's volume; preparing a scan that loses more has gone wrong


@dataclass(frozen=True)
class Source:
    """One case to be: its name, how to read it, and further columns for the table."""

    case_id: str
    read: Callable[[], Case]
    columns: dict[str, object]


def split_cases(patients: Iterable[str], seed: int, shares: tuple[float, float] = (0.7, 0.1)) -> dict[str, str]:
    """Patients to train / validation / test (70 / 10 / 20), drawn once from a seed; each split gets at least one.

    Raises:
        ValueError: with fewer than three patients.
    """
    patients = sorted(set(patients))
    n = len(patients)
    if n < 3:
        raise ValueError(f"{n} patient(s) cannot be split into train, validation and test; at least three are needed")
    n_validation = max(1, round(shares[1] * n))
    n_train = min(max(1, round(shares[0] * n)), n - n_validation - 1)
    names = np.repeat(SPLITS, [n_train, n_validation, n - n_train - n_validation])
    order = np.random.default_rng(seed).permutation(n)
    return {patients[i]: str(name) for i, name in zip(order, names, strict=True)}


def write_cohort(
    folder: str | Path,
    sources: Iterable[Source],
    preparation: Preparation,
    *,
    split_seed: int,
    folds: int | None = None,
    repeats: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Cohort:
    """Check, store and prepare every case; the table comes last, so that a broken-off build is not taken for whole.

    All is written aside first: what fails leaves a cohort that was there as it was, and nothing of its own.
    A split that the sources bring along is kept; without any it is drawn by patient (`patient`, else the case).
    Cases without any label get no split. `folds` adds columns for a k-fold by patient, `repeats` times over.

    Raises:
        CohortError: after all cases were tried, with every fault of every case; before, if the names or, as far as
            the sources tell, the labels and splits are wrong already.
    """
    folder, sources = Path(folder), list(sources)
    faults = list(name_faults(source.case_id for source in sources)) if sources else ["there are no cases"]
    if faults:
        raise CohortError(faults)
    if all("label" in source.columns for source in sources):  # so that too few patients are told before hours of work
        told = [{"case_id": source.case_id, "image": None} | source.columns for source in sources]
        _with_split(folder, pd.DataFrame(told), split_seed)
    with _written_aside(folder):
        rows = []
        for source in progress(sources):
            try:
                row = _store(folder, source.read(), preparation)
            except ValueError as error:
                faults.append(str(error))
                continue
            rows.append(row | source.columns | row)  # what was found in the files counts
        if faults:
            raise CohortError(faults, f"{len(rows)} case(s) are fine. Mend or remove these and run again.")
        table = _with_split(folder, pd.DataFrame(rows), split_seed)
        if folds is not None:
            table = table.assign(**_drawn_folds(table, folds, repeats, split_seed))
        write_text(folder / f"{ASIDE}preparation.json", preparation.model_dump_json(indent=2))
        with whole_file(folder / f"{ASIDE}cohort.csv") as temporary:
            table.to_csv(temporary, index=False)
        for name in ("cohort.csv", FINGERPRINT):  # from here on the folder is in the making
            (folder / name).unlink(missing_ok=True)
        for path in sorted(_aside(folder), key=lambda path: path.name == f"{ASIDE}cohort.csv"):
            os.replace(path, path.with_name(path.name.removeprefix(ASIDE)))
    cohort = Cohort.read(folder, check_voxels=False)
    write_text(folder / FINGERPRINT, json.dumps({"cohort": cohort.fingerprint()}) + "\n")
    return cohort


def _aside(folder: Path) -> list[Path]:
    """What of a cohort in the making lies beside the one that counts."""
    places = (folder, *(folder / name for name in VOLUMES))
    return [path for place in places for path in place.glob(f"{ASIDE}*")]


@contextmanager
def _written_aside(folder: Path) -> Iterator[None]:
    """Nothing stays of what the block wrote aside unless it ends well, nor of what a killed one left."""
    new = [p for p in (*(folder / name for name in VOLUMES), folder, *folder.parents) if not p.exists()]
    for path in _aside(folder):
        path.unlink()
    try:
        yield
    except BaseException:
        for path in _aside(folder):
            path.unlink(missing_ok=True)
        for place in new:
            with suppress(OSError):
                place.rmdir()
        raise


def _with_split(folder: Path, table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The table with its split, drawn if there is none; CohortError if that cannot be."""
    if "split" not in table or table["split"].isna().all():
        try:
            drawn = _drawn_split(table, seed)
        except ValueError as error:
            raise CohortError([f"{folder}: with a label, {error}. Add labelled scans of more patients"]) from error
        table = table.drop(columns="split", errors="ignore")
        table.insert(3, "split", drawn)
    if faults := list(split_faults(table)):
        raise CohortError(faults)
    return table


def _labelled_patients(table: pd.DataFrame) -> pd.Series:
    """The patient of every case with a label; where none is known, the case itself."""
    patient = table["case_id"]
    if "patient" in table:
        patient = table["patient"].astype(object).where(table["patient"].notna(), patient).astype(str)
    return patient[table["label"].notna()]


def _drawn_folds(table: pd.DataFrame, folds: int, repeats: int, seed: int) -> dict[str, pd.Series]:
    """For each repeat a column with the fold of every case with a label, the patients dealt out at random."""
    patient = _labelled_patients(table)
    patients = sorted(set(patient))
    if len(patients) < folds:
        raise CohortError([f"{len(patients)} patient(s) cannot be dealt out to {folds} folds; choose fewer folds"])
    columns = {}
    for repeat in range(repeats):
        order = np.random.default_rng([seed, repeat]).permutation(len(patients))
        fold = {patients[i]: number % folds for number, i in enumerate(order)}
        columns[f"fold_{repeat}"] = patient.map(fold).reindex(table.index).astype("Int64")
    return columns


def _drawn_split(table: pd.DataFrame, seed: int) -> pd.Series:
    """A split for every case with a label, by patient where it is known."""
    patient = _labelled_patients(table)
    drawn = split_cases(patient, seed) if len(patient) else {}
    return patient.map(drawn).reindex(table.index)


def _store(folder: Path, case: Case, preparation: Preparation) -> dict[str, object]:
    """Write one case's scan, label and prepared volumes aside; its row of the table."""
    if case.modality != preparation.modality:
        raise ValueError(f"case {case.case_id}: is {case.modality}, not {preparation.modality}; set modality to it")
    row: dict[str, object] = {"case_id": case.case_id, "image": f"images/{case.case_id}.nii.gz", "label": None}
    prepared = prepare(case, preparation)
    if case.label is not None and label_volume_ml(prepared.label) < LEAST_KEPT * label_volume_ml(case.label):
        raise ValueError(
            f"case {case.case_id}: preparing it loses the prostate, because the working grid is too coarse or the "
            "body's outline wrong; choose a finer spacing_mm, or look at the scan"
        )
    write_image(case.image, folder / "images" / f"{ASIDE}{case.case_id}.nii.gz")
    write_image(prepared.image, folder / "prepared" / f"{ASIDE}{case.case_id}_image.mha", compress=False)
    if case.label is not None:
        row["label"] = f"labels/{case.case_id}.nii.gz"
        write_image(case.label, folder / "labels" / f"{ASIDE}{case.case_id}.nii.gz")
        write_image(prepared.label, folder / "prepared" / f"{ASIDE}{case.case_id}_label.mha", compress=False)
        row["prostate_ml"] = round(label_volume_ml(case.label), 3)
    row["modality"] = case.modality
    size, spacing = case.image.GetSize()[::-1], case.image.GetSpacing()[::-1]
    row |= {"size_zyx": json.dumps(size), "spacing_zyx_mm": json.dumps([round(s, 5) for s in spacing])}
    if case.femoral_heads is not None:
        row |= dict(zip(HEADS, np.round(np.concatenate(case.femoral_heads), 3).tolist(), strict=True))
    return row


def sources_from_phantoms(seeds: Iterable[int], spacing_mm: tuple[float, float, float] | None) -> list[Source]:
    """Phantoms of these seeds; on grids as in the paper if no spacing (z, y, x) is given."""
    return [
        Source(f"phantom-{seed:04d}", lambda seed=seed: make_phantom(seed, spacing_mm=spacing_mm), {"seed": seed})
        for seed in seeds
    ]


def sources_of_replicates(
    first_seed: int,
    replicates: int,
    phantoms: int,
    test_phantoms: int,
    spacing_mm: tuple[float, float, float] | None,
) -> list[Source]:
    """Phantoms for a trial: test phantoms for all; for each replicate fresh ones to train and validate (7 : 1)."""
    validating = max(1, round(phantoms / 8))
    columns = [{"split": "test", "replicate": None}] * test_phantoms
    for replicate in range(replicates):
        columns += [{"split": "train", "replicate": replicate}] * (phantoms - validating)
        columns += [{"split": "validation", "replicate": replicate}] * validating
    sources = sources_from_phantoms(range(first_seed, first_seed + len(columns)), spacing_mm)
    return [Source(s.case_id, s.read, s.columns | more) for s, more in zip(sources, columns, strict=True)]


def _file_source(
    case_id: str, image: Path, label: Path | None, modality: str, values: tuple[int, ...] | None, channel: int | None
) -> Source:
    def read() -> Case:
        try:
            scan = read_scan(image, channel=channel)
            mask = read_scan(label) if label else None
        except ValueError as error:
            raise ValueError(f"case {case_id}: {error}") from error
        return checked_case(
            case_id, scan, mask, image_name=str(image), label_name=str(label), label_values=values, modality=modality
        )

    return Source(case_id, read, {"source": image.name, "label": label.name if label else None})


def check_pattern(pattern: str) -> str:
    """The pattern, if it can name a file in a folder for every case."""
    inside = not pattern.startswith("/") and ".." not in pattern.split("/")
    if pattern.count("{case}") != 1 or not pattern.isprintable() or not inside:
        raise ValueError(
            "must hold {case} once, for example {case}_image.nii.gz, and must not lead out of the folder by / or ..; "
            f"it is {pattern!r}"
        )
    return pattern


def files_below(folder: Path, faults: list[str]) -> Iterator[Path]:
    """Every file below a folder, through links too; what may not be read is added to the faults."""
    walk = os.walk(folder, followlinks=True, onerror=lambda error: faults.append(closed(error.filename, error)))
    for place, folders, names in walk:
        above = {os.path.realpath(path) for path in (Path(place), *Path(place).parents)}
        folders[:] = [name for name in folders if os.path.realpath(Path(place, name)) not in above]  # no circles
        yield from (Path(place, name) for name in names if not name.startswith("."))  # "._x": a Mac's leftovers


def sources_from_pattern(
    folder: str | Path,
    image_pattern: str,
    label_pattern: str,
    *,
    modality: str,
    label_values: tuple[int, ...] | None = None,
    channel: int | None = None,
) -> list[Source]:
    """Image / label pairs found by name, for example "{case}_image.nii.gz" and "{case}_label.nii.gz".

    A file that matches both patterns is a label; folders may be links.

    Raises:
        CohortError: if nothing is found, labels are missing, folders may not be read, or cases share a file.
    """
    folder = Path(folder)
    with readable(folder):
        there = folder.is_dir()
    if not there:
        raise CohortError([f"{folder}: there is no such folder"])
    for name, pattern in (("image_pattern", image_pattern), ("label_pattern", label_pattern)):
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise CohortError([f"{name} {error}"]) from error
    if image_pattern == label_pattern:
        raise CohortError([f"image_pattern and label_pattern are both {image_pattern!r}; give labels another one"])
    matcher = re.compile(re.escape(image_pattern).replace(re.escape("{case}"), "(?P<case>[^/]+)"))
    label_matcher = re.compile(re.escape(label_pattern).replace(re.escape("{case}"), "[^/]+"))
    found, faults, files = [], [], defaultdict(list)
    for path in sorted(files_below(folder, faults)):
        name = path.relative_to(folder).as_posix()
        match = matcher.fullmatch(name)
        if match is None or label_matcher.fullmatch(name):
            continue
        case_id = match["case"]
        label = folder / label_pattern.replace("{case}", case_id)
        if not os.path.isfile(label):
            faults.append(
                f"case {case_id}: no label {label.relative_to(folder)} beside {name}; add it or move the image"
            )
        found.append(_file_source(case_id, path, label, modality, label_values, channel))
        files[os.path.realpath(path)].append(case_id)
    for path, cases in files.items():
        if len(cases) > 1:
            faults.append(f"cases {', '.join(cases)}: have one and the same image {path}; remove the links to it")
    if not found:
        faults.append(f"{folder}: no file there matches {image_pattern!r}")
    if faults:
        raise CohortError(faults)
    return found


def sources_from_table(
    path: str | Path, *, modality: str, label_values: tuple[int, ...] | None = None, channel: int | None = None
) -> list[Source]:
    """Cases listed in a CSV beside the volumes: case_id, image, label and, if known, split and patient.

    Args:
        path: the table, or the folder in which it is called cohort.csv.
    """
    path = Path(path)
    with readable(path):
        path = path / "cohort.csv" if path.is_dir() else path
    sources, faults = [], []
    for row in read_table(path, ("case_id", "image", "label")).to_dict("records"):
        told = row.get("modality")
        if isinstance(told, str) and told != modality:
            faults.append(f"case {row['case_id']}: is {told} in {path}, not {modality}; set modality to it")
        label = path.parent / row["label"] if isinstance(row["label"], str) else None
        source = _file_source(row["case_id"], path.parent / row["image"], label, modality, label_values, channel)
        sources.append(Source(source.case_id, source.read, source.columns | row))
    if faults:
        raise CohortError(faults)
    return sources


def sources_from_promise12(folder: str | Path) -> list[Source]:
    """The PROMISE12 layout: CaseNN.mhd and CaseNN_segmentation.mhd in one folder."""
    return sources_from_pattern(folder, "{case}.mhd", "{case}_segmentation.mhd", modality="MR")


def sources_from_decathlon(
    folder: str | Path,
    *,
    modality: str = "MR",
    label_values: tuple[int, ...] | None = (1, 2),
    channel: int | None = 0,
) -> list[Source]:
    """The Medical Segmentation Decathlon's layout: imagesTr/ and labelsTr/.

    The defaults fit its prostate task: channel 0 is T2, and both zones (1, 2) make the prostate.
    """
    label = "labelsTr/{case}.nii.gz"
    return sources_from_pattern(
        folder, "imagesTr/{case}.nii.gz", label, modality=modality, label_values=label_values, channel=channel
    )


def source_from_dicom(folder: str | Path, *, modality: str) -> list[Source]:
    """One DICOM series as a case without a label (contours from RTSTRUCT are not read yet)."""
    folder = Path(folder)
    case_id = re.sub(r"[^A-Za-z0-9._-]", "_", folder.resolve().name).lstrip("._-") or "scan"
    return [_file_source(case_id, folder, None, modality, None, None)]
