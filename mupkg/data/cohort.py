"""Cohorts: a folder with `cohort.csv` and the volumes it names, and where cohorts come from.

data/<cohort>/cohort.csv          case_id, image, label, split, modality and whatever else is known
              images/, labels/    the scans on their own grids
              prepared/           the same on the working grid (see `preprocessing`), made once
              preparation.json    how they were prepared
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from mupkg.data.cases import Case, Point, checked_case
from mupkg.data.files import read_scan, whole_file, write_image, write_text
from mupkg.data.preprocessing import Preparation, Prepared, prepare

__all__ = ["Case", "Cohort", "CohortError", "Point", "Source", "split_cases", "write_cohort"]

SPLITS = ("train", "validation", "test")
COLUMNS = ("case_id", "image", "label", "split")
_HEADS = [f"head_{side}_{axis}" for side in ("left", "right") for axis in "xyz"]
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CohortError(ValueError):
    """Everything that is wrong with a cohort, in one go; a line for each fault."""

    def __init__(self, faults: Iterable[str], advice: str = ""):
        self.faults = [line for fault in faults for line in str(fault).splitlines()]
        super().__init__("\n".join([*self.faults, *([advice] if advice else [])]))


@dataclass(frozen=True)
class Cohort:
    """A cohort on disk; `table` has one row a case, indexed by case_id."""

    folder: Path
    table: pd.DataFrame

    @classmethod
    def read(cls, folder: str | Path, *, check_voxels: bool = True) -> Cohort:
        """Read and check a cohort.

        Args:
            check_voxels: also read every volume (same grid, binary label, not empty, finite); stages that run
                on a cohort that notebook 00 has just checked leave this out.

        Raises:
            CohortError: with every fault of every case, each naming the case, the file and the way out.
        """
        folder = Path(folder)
        path = folder / "cohort.csv"
        try:
            table = pd.read_csv(
                path, dtype={"case_id": str, "image": str, "label": str, "split": str, "patient": str}
            )
        except FileNotFoundError:
            raise CohortError([f"{path}: there is no such table; notebook 00 makes one"]) from None
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise CohortError([f"{path}: is not a CSV table ({error})"]) from error
        missing = [column for column in COLUMNS if column not in table]
        if missing:
            raise CohortError([f"{path}: lacks the column(s) {', '.join(missing)}; it has {', '.join(table)}"])
        faults = list(_table_faults(folder, table))
        if not faults:
            cohort = cls(folder, table.set_index("case_id", drop=False).rename_axis(None))
            for case_id in cohort.table.index if check_voxels else ():
                try:
                    cohort.case(case_id)
                except ValueError as error:
                    faults.append(str(error))
        if faults:
            raise CohortError(faults)
        return cohort

    @property
    def preparation(self) -> Preparation:
        """How the cohort's prepared volumes were made."""
        path = self.folder / "preparation.json"
        if not path.is_file():
            raise CohortError([f"{path}: missing; run notebook 00 on this cohort to prepare it"])
        return Preparation.model_validate_json(path.read_text())

    def ids(self, split: str | None = None) -> list[str]:
        """Case names of one split, or all, in the table's order."""
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        return list(self.table.index if split is None else self.table.index[self.table["split"] == split])

    def case(self, case_id: str) -> Case:
        """One case with its scan and label on their own grid, checked."""
        if case_id not in self.table.index:
            raise CohortError([f"case {case_id}: is not in {self.folder / 'cohort.csv'}"])
        row = self.table.loc[case_id]
        try:
            image = read_scan(self.folder / row["image"])
            label = read_scan(self.folder / row["label"]) if isinstance(row["label"], str) else None
        except ValueError as error:
            raise CohortError([f"case {case_id}: {error}"]) from error
        known: dict[str, object] = {"split": row["split"] if isinstance(row["split"], str) else None}
        if isinstance(row.get("modality"), str):
            known["modality"] = row["modality"]
        if all(column in row and np.isfinite(row[column]) for column in _HEADS):
            heads = [float(row[column]) for column in _HEADS]
            known["femoral_heads"] = (tuple(heads[:3]), tuple(heads[3:]))
        return checked_case(case_id, image, label, image_name=row["image"], label_name=str(row["label"]), **known)

    def cases(self, split: str | None = None) -> Iterator[Case]:
        """The cases of one split, or all, read one after the other."""
        return map(self.case, self.ids(split))

    def prepared(self, case_id: str) -> Prepared:
        """One case on the working grid, as notebook 00 left it."""
        image = self.folder / "prepared" / f"{case_id}_image.mha"
        label = image.with_name(f"{case_id}_label.mha")
        return Prepared(read_scan(image), read_scan(label) if label.is_file() else None)


def _table_faults(folder: Path, table: pd.DataFrame) -> Iterator[str]:
    if table.empty:
        yield f"{folder / 'cohort.csv'}: has no cases"
    for case_id in table["case_id"][table["case_id"].duplicated()].unique():
        yield f"case {case_id}: is listed more than once; give every scan a name of its own"
    for row in table.itertuples():
        if not isinstance(row.case_id, str) or not _SAFE_ID.fullmatch(row.case_id):
            yield f"case {row.case_id}: the name must be letters, digits, '.', '_' or '-' (line {row.Index + 2})"
        if isinstance(row.split, str) and row.split not in SPLITS:
            yield f"case {row.case_id}: split is {row.split!r}; it must be one of {', '.join(SPLITS)}"
        for column, name in (("image", row.image), ("label", row.label)):
            if not isinstance(name, str):
                if column == "image":
                    yield f"case {row.case_id}: no image is named; fill the column 'image'"
            elif not (folder / name).resolve().is_relative_to(folder.resolve()):
                yield f"case {row.case_id}: {column} {name} leads out of {folder}; copy the file into the folder"
            elif not (folder / name).exists():
                yield f"case {row.case_id}: {column} {name} is not there; check the name in cohort.csv"


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
    progress: Callable[[Iterable], Iterable] = iter,
) -> Cohort:
    """Check, store and prepare every case; the table comes last, so that a broken-off build is not taken for whole.

    A split that the sources bring along is kept; otherwise it is drawn by patient (`patient`, else the case).
    Cases without any label get no split.

    Raises:
        CohortError: after all cases were tried, with every fault of every case. No table is written then.
    """
    folder = Path(folder)
    if (folder / "cohort.csv").exists():
        (folder / "cohort.csv").unlink()  # from here on the folder is in the making
    rows, faults = [], []
    for source in progress(list(sources)):
        try:
            case = source.read()
        except ValueError as error:
            faults.append(str(error))
            continue
        rows.append(_store(folder, case, preparation) | source.columns)
    if faults:
        raise CohortError(faults, f"{len(rows)} case(s) are fine. Mend or remove these and run again.")
    table = pd.DataFrame(rows)
    if "split" not in table:
        patient = table.get("patient", table["case_id"]).astype(str)
        labelled = table["label"].notna()
        drawn = split_cases(patient[labelled], split_seed) if labelled.any() else {}
        table.insert(3, "split", patient.where(labelled).map(drawn))
    write_text(folder / "preparation.json", preparation.model_dump_json(indent=2))
    with whole_file(folder / "cohort.csv") as temporary:
        table.to_csv(temporary, index=False)
    return Cohort.read(folder, check_voxels=False)


def _store(folder: Path, case: Case, preparation: Preparation) -> dict[str, object]:
    """Write one case's scan, label and prepared volumes; its row of the table."""
    row: dict[str, object] = {"case_id": case.case_id, "image": f"images/{case.case_id}.nii.gz", "label": None}
    prepared = prepare(case, preparation)
    write_image(case.image, folder / row["image"])
    write_image(prepared.image, folder / "prepared" / f"{case.case_id}_image.mha", compress=False)
    if case.label is not None:
        row["label"] = f"labels/{case.case_id}.nii.gz"
        write_image(case.label, folder / row["label"])
        write_image(prepared.label, folder / "prepared" / f"{case.case_id}_label.mha", compress=False)
        row["prostate_ml"] = round(label_volume_ml(case.label), 3)
    row["modality"] = case.modality
    size, spacing = case.image.GetSize()[::-1], case.image.GetSpacing()[::-1]
    row |= {"size_zyx": json.dumps(size), "spacing_zyx_mm": json.dumps([round(s, 5) for s in spacing])}
    if case.femoral_heads is not None:
        row |= dict(zip(_HEADS, np.round(np.concatenate(case.femoral_heads), 3).tolist(), strict=True))
    return row


def label_volume_ml(label: sitk.Image) -> float:
    """The foreground's volume in millilitres."""
    return float(np.count_nonzero(sitk.GetArrayFromImage(label)) * np.prod(label.GetSpacing()) / 1000)
