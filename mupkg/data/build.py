"""Building a cohort: where scans come from, the split by patient, and a folder written whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from filelock import Timeout

from mupkg.data.cohort import (
    HEADS,
    SPLITS,
    TABLE,
    Cohort,
    fold_columns,
    patients,
    read_table,
    shared_files,
    table_faults,
)
from mupkg.data.preprocessing import Preparation, prepare
from mupkg.scans.cases import Case, CohortError, checked_case, label_volume_ml, name_faults, phantom_name
from mupkg.scans.files import files_below, read_scan, write_image
from mupkg.scans.writing import FINGERPRINT, machine_lock, save_table, write_text

MAKING = ".making"  # the folder of a cohort in the making
LEAST_KEPT = 0.5  # of the prostate's volume; preparing a scan that loses more has gone wrong


@dataclass(frozen=True)
class Source:
    """One case to be: its name, how to read it, and further columns for the table."""

    case_id: str
    read: Callable[[], Case]
    columns: dict[str, object]


def split_cases(patients: Iterable[str], seed: int) -> dict[str, str]:
    """Patients to train / validation / test (70 / 10 / 20), drawn once from a seed; each split gets at least one.

    Raises:
        CohortError: with fewer than three patients.
    """
    patients = sorted(set(patients))
    n = len(patients)
    if n < 3:
        ask = "at least three with a label are needed. Add labelled scans of more patients"
        raise CohortError([f"{n} patient(s) of a cohort cannot be split into train, validation and test; {ask}"])
    n_validation = max(1, round(0.1 * n))
    n_train = min(max(1, round(0.7 * n)), n - n_validation - 1)
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
    source: str | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Cohort:
    """Check, store and prepare every case; the table comes last, so that a broken-off build is not taken for whole.

    All is written aside first: what fails leaves a cohort that was there as it was, and nothing of its own.
    A split that the sources bring along is kept; without any it is drawn by patient (`patient`, else the case).
    Cases without any label get no split. `folds` adds columns for a k-fold by patient, `repeats` times over, unless
    the sources bring along as many of their own.
    `source`, as notebook 00 calls it, is recorded with the fingerprint, for the cards of runs.

    Raises:
        CohortError: after all cases were tried, with every fault of every case; before, if the names or, as far as
            the sources tell, the labels and splits are wrong already.
    """
    folder, sources = Path(folder), list(sources)
    faults = list(name_faults(case.case_id for case in sources)) if sources else ["there are no cases"]
    if faults:
        raise CohortError(faults)
    if all("label" in case.columns for case in sources):  # so that too few patients are told before hours of work
        rows = [{"case_id": case.case_id, "image": None} | case.columns for case in sources]
        _with_split(pd.DataFrame(rows), split_seed, folds, repeats)
    with _made_aside(folder) as making:
        table = _with_split(_stored(making, progress(sources), preparation), split_seed, folds, repeats)
        write_text(making / "preparation.json", preparation.model_dump_json(indent=2))
        save_table(table, making / TABLE, index=False)
        for name in (TABLE, FINGERPRINT):  # from here on the folder is in the making
            (folder / name).unlink(missing_ok=True)
        files = [path for path in making.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == TABLE):
            target = folder / path.relative_to(making)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)  # alone: what may enter the folder is its owner's to say
        cohort = Cohort.read(folder)
        write_text(folder / FINGERPRINT, json.dumps({"cohort": cohort.fingerprint(), "source": source}) + "\n")
    return cohort


@contextmanager
def _made_aside(folder: Path) -> Iterator[Path]:
    """A folder in the cohort's for what is being made; it goes when the block ends, and so do those of killed builds.

    Raises:
        CohortError: if another process on this machine is making this cohort.
    """
    lock = machine_lock(f"cohort {folder.resolve()}")
    try:
        lock.acquire()
    except Timeout:
        raise CohortError(
            [f"{folder}: another process is making this cohort; wait for it, or choose another name"]
        ) from None
    new, making = [place for place in (folder, *folder.parents) if not place.exists()], folder / MAKING
    try:
        if making.exists():  # of a killed build
            shutil.rmtree(making)
        yield making
    finally:
        shutil.rmtree(making, ignore_errors=True)
        for place in new:
            with suppress(OSError):  # something was made in it
                place.rmdir()
        lock.release()


def _with_split(table: pd.DataFrame, seed: int, folds: int | None, repeats: int) -> pd.DataFrame:
    """The table with its split, drawn if there is none, and the folds asked for; CohortError if that cannot be."""
    if faults := table_faults(table):
        raise CohortError(faults)
    patient, own = patients(table)[table["label"].notna()], fold_columns(table)
    if "split" not in table or table["split"].isna().all():
        split = split_cases(patient, seed) if len(patient) else {}
        table = table.drop(columns="split", errors="ignore")
        table.insert(3, "split", patient.map(split).reindex(table.index))
    if folds is not None and not own:
        table = table.assign(**_drawn_folds(patient, folds, repeats, seed))
    if faults := table_faults(table):
        raise CohortError(faults)
    if own and folds is not None and (has := (int(table[own].max(axis=None)) + 1, len(own))) != (folds, repeats):
        has = "the table has {} folds in {} repeat(s) of its own".format(*has)
        raise CohortError([f"{has}; set folds and repeats to these numbers, or take its columns fold_... out"])
    return table


def _drawn_folds(patient: pd.Series, folds: int, repeats: int, seed: int) -> dict[str, pd.Series]:
    """For each repeat a column with the fold of every case with a label, the patients dealt out at random."""
    names = sorted(set(patient))
    if len(names) < folds:
        raise CohortError([f"{len(names)} patient(s) cannot be dealt out to {folds} folds; choose fewer folds"])
    columns = {}
    for repeat in range(repeats):
        order = np.random.default_rng([seed, repeat]).permutation(len(names))
        fold = {names[i]: number % folds for number, i in enumerate(order)}
        columns[f"fold_{repeat}"] = patient.map(fold).astype("Int64")
    return columns


def _stored(folder: Path, sources: Iterable[Source], preparation: Preparation) -> pd.DataFrame:
    """A row of the table for every case, its volumes written; CohortError with every fault of every case."""
    rows, faults = [], []
    cases_of: dict[str, str] = {}  # voxels -> the case that has them
    for source in sources:
        try:
            row, voxels = _store(folder, source.read(), preparation)
        except ValueError as error:
            faults.append(str(error))
            continue
        if (same := cases_of.setdefault(voxels, source.case_id)) != source.case_id:
            faults.append(f"cases {same}, {source.case_id}: have the same voxels; leave one of them out")
            continue
        rows.append(row | source.columns | row)  # what was found in the files counts
    if faults:
        raise CohortError(faults, f"{len(rows)} case(s) are fine. Mend or remove these and run again.")
    return pd.DataFrame(rows)


def _store(folder: Path, case: Case, preparation: Preparation) -> tuple[dict[str, object], str]:
    """Write one case's scan, label and prepared volumes; its row of the table, and a digest of its prepared voxels.

    So the same scan has the same digest in whatever format, type and direction it is stored.
    """
    if case.modality != preparation.modality:
        raise ValueError(f"case {case.case_id}: is {case.modality}, not {preparation.modality}; set modality to it")
    row: dict[str, object] = {"case_id": case.case_id, "image": f"images/{case.case_id}.nii.gz", "label": None}
    prepared = prepare(case, preparation)
    if case.label is not None and label_volume_ml(prepared.label) < LEAST_KEPT * label_volume_ml(case.label):
        raise ValueError(
            f"case {case.case_id}: preparing it loses the prostate, because the working grid is too coarse or the "
            "body's outline wrong; choose a finer spacing_mm, or look at the scan"
        )
    write_image(case.image, folder / "images" / f"{case.case_id}.nii.gz")
    write_image(prepared.image, folder / "prepared" / f"{case.case_id}_image.mha", compress=False)
    if case.label is not None:
        row["label"] = f"labels/{case.case_id}.nii.gz"
        write_image(case.label, folder / "labels" / f"{case.case_id}.nii.gz")
        write_image(prepared.label, folder / "prepared" / f"{case.case_id}_label.mha", compress=False)
        row["prostate_ml"] = round(label_volume_ml(case.label), 3)
    row["modality"] = case.modality
    size, spacing = case.image.GetSize()[::-1], case.image.GetSpacing()[::-1]
    row |= {"size_zyx": json.dumps(size), "spacing_zyx_mm": json.dumps([round(s, 5) for s in spacing])}
    if case.femoral_heads is not None:
        row |= dict(zip(HEADS, np.round(np.concatenate(case.femoral_heads), 3).tolist(), strict=True))
    return row, sitk.Hash(prepared.image)


def sources_from_phantoms(seeds: Iterable[int], spacing_mm: tuple[float, float, float] | None) -> list[Source]:
    """Phantoms of these seeds; on grids as in the paper if no spacing (z, y, x) is given.

    That each has a label is told before it is drawn, so that too few of them are refused at once.
    """
    from mupkg.data.phantom import make_phantom  # a wing: cohorts of scans do without it

    return [
        Source(name, lambda seed=seed: make_phantom(seed, spacing_mm=spacing_mm), {"label": name, "seed": seed})
        for seed, name in ((seed, phantom_name(seed)) for seed in seeds)
    ]


def sources_of_replicates(
    first_seed: int, replicates: int, phantoms: int, test_phantoms: int, spacing_mm: tuple[float, float, float] | None
) -> list[Source]:
    """Phantoms for a trial: test phantoms for all; for each replicate fresh ones to train and validate (7 : 1)."""
    validating = max(1, round(phantoms / 8))
    columns = [{"split": "test", "replicate": None}] * test_phantoms
    for replicate in range(replicates):
        columns += [{"split": "train", "replicate": replicate}] * (phantoms - validating)
        columns += [{"split": "validation", "replicate": replicate}] * validating
    sources = sources_from_phantoms(range(first_seed, first_seed + len(columns)), spacing_mm)
    return [Source(s.case_id, s.read, s.columns | more) for s, more in zip(sources, columns, strict=True)]


def file_source(
    case_id: str,
    image: Path,
    label: Path | None,
    *,
    modality: str,
    label_values: tuple[int, ...] | None = None,
    channel: int | None = None,
) -> Source:
    """A case of two files; of a label with several values those that are prostate, of a 4D file the channel."""

    def read() -> Case:
        try:
            scan, mask = read_scan(image, channel=channel), read_scan(label) if label else None
        except ValueError as error:
            raise ValueError(f"case {case_id}: {error}") from error
        told = {"image_name": str(image), "label_name": str(label), "label_values": label_values}
        return checked_case(case_id, scan, mask, modality=modality, **told)

    return Source(case_id, read, {"source": image.name, "label": label.name if label else None})


def check_pattern(pattern: str) -> str:
    """The pattern, if it can name a file in a folder for every case; CohortError if not."""
    inside = not pattern.startswith("/") and ".." not in pattern.split("/")
    if not (re.findall(r"{(?:case|patient)}", pattern) == ["{case}"] and inside and pattern.isprintable()):
        fault = "a pattern must hold {case} once, as in {case}.nii.gz, and not lead out of the folder by / or .."
        cure = "list files that are named in another way, or whose patients are known, in a table"
        raise CohortError([f"{fault}; {cure}; it is {pattern!r}"])
    return pattern


def sources_from_pattern(folder: str | Path, image_pattern: str, label_pattern: str, **reading: Any) -> list[Source]:
    """Image / label pairs found by name, for example "{case}_image.nii.gz" and "{case}_label.nii.gz".

    A file that matches both patterns is what the longer one says, or a label. Folders may be links.

    Args:
        reading: what `file_source` is told of all cases.

    Raises:
        CohortError: if nothing is found, an image lacks its label or a label its image, folders may not be read, or
            cases share a file.
    """
    folder = Path(folder)
    patterns = check_pattern(label_pattern), check_pattern(image_pattern)
    if image_pattern == label_pattern:
        raise CohortError([f"image_pattern and label_pattern are both {image_pattern!r}; give labels another one"])
    faults: list[str] = []
    found: dict[str, dict[str, Path]] = {pattern: {} for pattern in sorted(patterns, key=len, reverse=True)}
    for path in sorted(files_below(folder, faults)):
        for pattern, paths in found.items():
            regex = re.escape(pattern).replace(re.escape("{case}"), "([^/]+)")
            if match := re.fullmatch(regex, path.relative_to(folder).as_posix()):
                paths[match[1]] = path
                break
    images, labels = found[image_pattern], found[label_pattern]
    for case_id in sorted({*images} - {*labels}):
        label, image = label_pattern.replace("{case}", case_id), images[case_id].relative_to(folder)
        faults.append(f"case {case_id}: no label {label} beside {image}; add it or move the image")
    for case_id in sorted({*labels} - {*images}):
        fault = f"no image matching {image_pattern!r} belongs to this label; name it so, or move the label"
        faults.append(f"{labels[case_id].relative_to(folder)}: {fault}")
    for column, paths in (("image", images), ("label", labels)):
        faults += shared_files(column, ((name, path, os.path.realpath(path)) for name, path in paths.items()))
    if not images:
        faults.append(f"{folder}: no file there matches {image_pattern!r}")
    if faults:
        raise CohortError(faults)
    return [file_source(case_id, image, labels[case_id], **reading) for case_id, image in images.items()]


def sources_from_table(path: str | Path, *, modality: str, **reading: Any) -> list[Source]:
    """Cases listed in a CSV beside the volumes: case_id, image, label and, if known, split and patient.

    Args:
        path: the table, or the folder in which it is called cohort.csv. reading: what `file_source` is told.
    """
    path = Path(path, TABLE) if os.path.isdir(path) else Path(path)
    sources, faults = [], []
    for row in read_table(path, ("case_id", "image", "label")).to_dict("records"):
        if isinstance(own := row.get("modality"), str) and own != modality:
            faults.append(f"case {row['case_id']}: is {own} in {path}, not {modality}; set modality to it")
        label = path.parent / row["label"] if isinstance(row["label"], str) else None
        source = file_source(row["case_id"], path.parent / row["image"], label, modality=modality, **reading)
        sources.append(Source(source.case_id, source.read, source.columns | row))
    if faults:
        raise CohortError(faults)
    return sources


LAYOUTS: dict[str, dict[str, Any]] = {  # of public cohorts of MR, as `sources_from_pattern` is told
    "promise12": {"image_pattern": "{case}.mhd", "label_pattern": "{case}_segmentation.mhd"},
    # The Medical Segmentation Decathlon: of its prostates both zones (1, 2) are taken, and channel 0, which is T2.
    "decathlon": {"image_pattern": "imagesTr/{case}.nii.gz", "label_pattern": "labelsTr/{case}.nii.gz"}
    | {"label_values": (1, 2), "channel": 0},
}


def sources_from_dicom_rt(
    folder: str | Path,
    roi: str | Sequence[str] = "Prostate",
    *,
    modality: str = "CT",
    hash_patients: bool = False,
    fill_gaps: bool = False,
) -> list[Source]:
    """Every series of a modality below a folder that an ROI was drawn on, with that ROI as its label.

    Folders may be nested in any way. Only the patient's ID and the ROI's name enter the table from a header.
    Cases are called by the patient's pseudonym, because their names appear in figures and as names of files.

    Args:
        roi: the ROI's name; or several names or patterns such as "prostate_*", of which the first that fits counts.
            As in TG-263, case does not matter.
        hash_patients: give pseudonyms instead of IDs in the table, too.
        fill_gaps: interpolate contours on slices that were left out; the table then says so, under `roi_notes`.

    Raises:
        CohortError: with every damaged file, every patient without contours, every series without exactly one such
            ROI, every structure set whose series is not there, and all that is wrong with the other cases then.
    """
    from mupkg.scans.dicom_rt import contoured_cases  # a wing: cohorts of masks do without it

    cases = contoured_cases(folder, roi, modality=modality, hash_patients=hash_patients, fill_gaps=fill_gaps)
    return [Source(*case) for case in cases]
