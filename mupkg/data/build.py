"""Building a cohort: where scans come from, the split by patient, and a folder written whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from filelock import Timeout

from mupkg.data.cohort import (
    FINGERPRINT,
    HEADS,
    SPLITS,
    Cohort,
    fold_columns,
    fold_faults,
    patient_faults,
    patients,
    read_table,
    replicate_faults,
    split_faults,
)
from mupkg.data.preprocessing import Preparation, prepare
from mupkg.scans.cases import Case, CohortError, checked_case, label_volume_ml, name_faults
from mupkg.scans.files import access_named, files_below, read_scan, write_image
from mupkg.scans.writing import machine_lock, whole_file, write_text

ASIDE = ".making."  # begins the name of the folder of a cohort in the making
DECATHLON_T2 = 0  # the channel that is T2
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
    kind: str | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Cohort:
    """Check, store and prepare every case; the table comes last, so that a broken-off build is not taken for whole.

    All is written aside first: what fails leaves a cohort that was there as it was, and nothing of its own.
    A split that the sources bring along is kept; without any it is drawn by patient (`patient`, else the case).
    Cases without any label get no split. `folds` adds columns for a k-fold by patient, `repeats` times over, unless
    the sources bring along as many of their own.
    `kind` of source: it is recorded with the fingerprint, for the cards of runs.

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
        _with_split(folder, pd.DataFrame(told), split_seed, folds, repeats)
    with _made_aside(folder) as making:
        rows: list[dict[str, object]] = []
        cases_of: dict[str, str] = {}  # voxels -> the case that has them
        for source in progress(sources):
            try:
                row, voxels = _store(making, source.read(), preparation)
            except ValueError as error:
                faults.append(str(error))
                continue
            if (same := cases_of.setdefault(voxels, source.case_id)) != source.case_id:
                faults.append(f"cases {same}, {source.case_id}: have the same voxels; leave one of them out")
                continue
            rows.append(row | source.columns | row)  # what was found in the files counts
        if faults:
            raise CohortError(faults, f"{len(rows)} case(s) are fine. Mend or remove these and run again.")
        table = _with_split(folder, pd.DataFrame(rows), split_seed, folds, repeats)
        write_text(making / "preparation.json", preparation.model_dump_json(indent=2))
        with whole_file(making / "cohort.csv") as temporary:
            table.to_csv(temporary, index=False)
        for name in ("cohort.csv", FINGERPRINT):  # from here on the folder is in the making
            (folder / name).unlink(missing_ok=True)
        files = [path for path in making.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "cohort.csv"):
            target = folder / path.relative_to(making)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        cohort = Cohort.read(folder)
        write_text(folder / FINGERPRINT, json.dumps({"cohort": cohort.fingerprint(), "source": kind}) + "\n")
    return cohort


@contextmanager
def _made_aside(folder: Path) -> Iterator[Path]:
    """A folder in the cohort's for what is being made; it goes when the block ends, and so do those of killed builds.

    Raises:
        CohortError: if another process is making this cohort.
    """
    lock = machine_lock(f"cohort {folder.resolve()}")
    try:
        lock.acquire()
    except Timeout:
        raise CohortError(
            [f"{folder}: another process is making this cohort; wait for it, or choose another name"]
        ) from None
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        for left in folder.glob(f"{ASIDE}*"):
            shutil.rmtree(left)
        yield folder / f"{ASIDE}{os.getpid()}"
    finally:
        shutil.rmtree(folder / f"{ASIDE}{os.getpid()}", ignore_errors=True)
        for place in new:
            with suppress(OSError):  # something was made in it
                place.rmdir()
        lock.release()


def _with_split(folder: Path, table: pd.DataFrame, seed: int, folds: int | None, repeats: int) -> pd.DataFrame:
    """The table with its split, drawn if there is none, and the folds asked for; CohortError if that cannot be."""
    if faults := list(patient_faults(table)):
        raise CohortError(faults)
    if "split" not in table or table["split"].isna().all():
        try:
            drawn = _drawn_split(table, seed)
        except ValueError as error:
            raise CohortError([f"{folder}: with a label, {error}. Add labelled scans of more patients"]) from error
        table = table.drop(columns="split", errors="ignore")
        table.insert(3, "split", drawn)
    own = fold_columns(table)
    if folds is not None and not own:
        table = table.assign(**_drawn_folds(table, folds, repeats, seed))
    if faults := [*split_faults(table), *replicate_faults(table), *fold_faults(table)]:
        raise CohortError(faults)
    if own and folds is not None and (there := (int(table[own].max(axis=None)) + 1, len(own))) != (folds, repeats):
        told = "the table has {} folds in {} repeat(s) of its own".format(*there)
        raise CohortError([f"{told}; set folds and repeats to these numbers, or take its columns fold_... out"])
    return table


def _drawn_folds(table: pd.DataFrame, folds: int, repeats: int, seed: int) -> dict[str, pd.Series]:
    """For each repeat a column with the fold of every case with a label, the patients dealt out at random."""
    patient = patients(table)[table["label"].notna()]
    names = sorted(set(patient))
    if len(names) < folds:
        raise CohortError([f"{len(names)} patient(s) cannot be dealt out to {folds} folds; choose fewer folds"])
    columns = {}
    for repeat in range(repeats):
        order = np.random.default_rng([seed, repeat]).permutation(len(names))
        fold = {names[i]: number % folds for number, i in enumerate(order)}
        columns[f"fold_{repeat}"] = patient.map(fold).reindex(table.index).astype("Int64")
    return columns


def _drawn_split(table: pd.DataFrame, seed: int) -> pd.Series:
    """A split for every case with a label, by patient where it is known."""
    patient = patients(table)[table["label"].notna()]
    drawn = split_cases(patient, seed) if len(patient) else {}
    return patient.map(drawn).reindex(table.index)


def _store(folder: Path, case: Case, preparation: Preparation) -> tuple[dict[str, object], str]:
    """Write one case's scan, label and prepared volumes; its row of the table, and a digest of its prepared voxels.

    Of the prepared ones: the same scan has the same digest in whatever format, type and direction it is stored.
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
        for seed, name in ((seed, f"phantom-{seed:04d}") for seed in seeds)
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
    told = pattern.count("{case}") == 1 or (pattern.count("{case}") == 0 and "{patient}" in pattern)
    if not (told and inside and pattern.isprintable()):
        raise ValueError(
            "must hold {case} once, for example {case}_image.nii.gz, or {patient}, or both, for example "
            f"{{patient}}/{{case}}.nii.gz, and must not lead out of the folder by / or ..; it is {pattern!r}"
        )
    return pattern


def _placeholders(pattern: str) -> set[str]:
    return {*re.findall(r"{(case|patient)}", pattern)}


def _matches(pattern: str, name: str) -> list[dict[str, str]]:
    """How a pattern fits a file's name: not at all, in one way, or in two, as {patient}_{case} fits a_b_c."""
    found = []
    for length in ("+", "+?"):
        expression = re.escape(pattern)
        for part in _placeholders(pattern):
            escaped = re.escape(f"{{{part}}}")
            expression = expression.replace(escaped, f"(?P<{part}>[^/]{length})", 1).replace(escaped, f"(?P={part})")
        if (match := re.fullmatch(expression, name)) and match.groupdict() not in found:
            found.append(match.groupdict())
    return found


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

    {patient} in the patterns tells the patients; a case is then called <patient>_<case>. A file that matches both
    patterns is what the longer one says, or a label. Folders may be links.

    Raises:
        CohortError: if nothing is found, an image lacks its label or a label its image, folders may not be read, or
            cases share a file.
    """
    folder = Path(folder)
    with access_named(folder):
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
    if unknown := _placeholders(label_pattern) - _placeholders(image_pattern):
        raise CohortError(
            [f"label_pattern holds {{{unknown.pop()}}}, which image_pattern lacks; let it hold that, too"]
        )
    found, faults, labels, files = [], [], {}, defaultdict(list)
    for path in sorted(files_below(folder, faults)):
        name = path.relative_to(folder).as_posix()
        fits, of_label = _matches(image_pattern, name), _matches(label_pattern, name)
        if of_label and (not fits or len(label_pattern) >= len(image_pattern)):
            labels[path] = name
        elif len(fits) > 1:
            faults.append(f"{name}: fits {image_pattern} in two ways, as {fits[0]} and {fits[1]}; rename the files")
        elif fits:
            found.append((name, path, fits[0]))
    sources = []
    for name, path, parts in found:
        case_id = "_".join(parts[part] for part in ("patient", "case") if part in parts)
        label_name = label_pattern
        for part, text in parts.items():
            label_name = label_name.replace(f"{{{part}}}", text)
        label = folder / label_name
        if not os.path.isfile(label):
            faults.append(f"case {case_id}: no label {label_name} beside {name}; add it or move the image")
        labels.pop(label, None)
        source = _file_source(case_id, path, label, modality, label_values, channel)
        sources.append(replace(source, columns=source.columns | {k: v for k, v in parts.items() if k == "patient"}))
        for kind, file in (("image", path), ("label", label)):
            files[kind, os.path.realpath(file)].append(case_id)
    for name in labels.values():
        faults.append(
            f"{name}: no image matching {image_pattern!r} belongs to this label; name it so, or move the label"
        )
    for (kind, path), cases in files.items():
        if len(cases) > 1:
            shared = f"have one and the same {kind} {path}"
            faults.append(f"cases {', '.join(cases)}: {shared}; remove the links, or give each its own")
    if not sources:
        faults.append(f"{folder}: no file there matches {image_pattern!r}")
    if faults:
        raise CohortError(faults)
    return sources


def sources_from_table(
    path: str | Path, *, modality: str, label_values: tuple[int, ...] | None = None, channel: int | None = None
) -> list[Source]:
    """Cases listed in a CSV beside the volumes: case_id, image, label and, if known, split and patient.

    Args:
        path: the table, or the folder in which it is called cohort.csv.
    """
    path = Path(path)
    with access_named(path):
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
    channel: int | None = DECATHLON_T2,
) -> list[Source]:
    """The Medical Segmentation Decathlon's layout: imagesTr/ and labelsTr/.

    The defaults fit its prostate task: channel 0 is T2, and both zones (1, 2) make the prostate.
    """
    label = "labelsTr/{case}.nii.gz"
    return sources_from_pattern(
        folder, "imagesTr/{case}.nii.gz", label, modality=modality, label_values=label_values, channel=channel
    )


def source_from_dicom(folder: str | Path, *, modality: str) -> list[Source]:
    """One DICOM series as a case without a label (with contours: `sources_from_dicom_rt`)."""
    folder = Path(folder)
    case_id = re.sub(r"[^A-Za-z0-9._-]", "_", folder.resolve().name).lstrip("._-") or "scan"
    return [_file_source(case_id, folder, None, modality, None, None)]


def sources_from_dicom_rt(
    folder: str | Path,
    roi: str | Sequence[str] = "Prostate",
    *,
    modality: str = "CT",
    hash_patients: bool = False,
    fill_gaps: bool = False,
) -> list[Source]:
    """Every series of a modality below a folder that an ROI was drawn on, with that ROI as its label.

    Folders may be nested in any way. Of a header nothing enters the table but the patient's ID and the ROI's name.
    Cases are called by the patient's pseudonym, for their names appear in figures and as names of files.

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
