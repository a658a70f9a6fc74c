"""Cohorts: a folder with `cohort.csv` and the volumes it names, and where cohorts come from.

data/<cohort>/cohort.csv          case_id, image, label, split, modality and whatever else is known
              images/, labels/    the scans on their own grids
              prepared/           the same on the working grid (see `preprocessing`), made once
              preparation.json    how they were prepared
              fingerprint.json    what cohort.csv and prepared/ hold, so that who depends on it sees a change
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from mupkg.data.cases import Case, Point, checked_case
from mupkg.data.files import closed, read_scan, readable, write_image
from mupkg.data.preprocessing import Preparation, Prepared, prepare
from mupkg.data.writing import fingerprint, whole_file, write_text

__all__ = ["Case", "Cohort", "CohortError", "Point", "Source", "split_cases", "write_cohort"]

SPLITS = ("train", "validation", "test")
COLUMNS = ("case_id", "image", "label", "split")
FINGERPRINT = "fingerprint.json"
ASIDE = ".making."  # begins the names of a cohort's files until all of them are there
VOLUMES = ("images", "labels", "prepared")
LEAST_KEPT = 0.5  # of the prostate's volume; preparing a scan that loses more has gone wrong
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
        table = read_table(Path(folder) / "cohort.csv")
        cohort = cls(Path(folder), table.set_index("case_id", drop=False).rename_axis(None))
        faults = []
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
        with readable(path):
            if not path.is_file():
                raise CohortError([f"{path}: missing; run notebook 00 on this cohort to prepare it"])
            content = path.read_bytes()
        try:
            return Preparation.model_validate_json(content)
        except ValueError as error:
            raise CohortError([f"{path}: is broken; run notebook 00 on this cohort again ({error})"]) from error

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

    def fingerprint(self) -> str:
        """Of the table and of its cases' prepared volumes."""
        volumes = [path for case_id in self.table.index for path in self._prepared(case_id)]
        return fingerprint([self.folder / "cohort.csv", *volumes])

    def _prepared(self, case_id: str) -> list[Path]:
        """The case's prepared image, and its label if the table names one."""
        kinds = ("image", "label") if isinstance(self.table["label"][case_id], str) else ("image",)
        return [self.folder / "prepared" / f"{case_id}_{kind}.mha" for kind in kinds]

    def prepared(self, case_id: str) -> Prepared:
        """One case on the working grid, as notebook 00 left it; CohortError if a volume is missing."""
        paths = self._prepared(case_id)
        for path in paths:
            with readable(path):
                there = path.exists()
            if not there:
                raise CohortError([f"case {case_id}: {path}: missing; run notebook 00 again on this cohort"])
        return Prepared(*map(read_scan, paths), *[None] * (2 - len(paths)))


def recorded_cohort(folder: Path, notebook: int) -> str:
    """The cohort's fingerprint as this notebook, 0 or 2, left it in its folder; ValueError if it did not."""
    path = folder / FINGERPRINT
    try:
        return json.loads(path.read_bytes())["cohort"]
    except PermissionError as error:
        raise ValueError(closed(path, error)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: does not tell the cohort ({error!r}); run notebook 0{notebook} again") from error


def read_table(path: Path, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """A table of cases and of the files beside it; CohortError with everything that is wrong with it."""
    text = dict.fromkeys([*COLUMNS, "patient", "modality"], str)
    try:  # a case may be called NA: only an empty entry is a missing one
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    except PermissionError as error:
        raise CohortError([closed(path, error)]) from error
    except FileNotFoundError:
        raise CohortError([f"{path}: there is no such table; notebook 00 makes one"]) from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise CohortError([f"{path}: is not a CSV table ({error}); save it as CSV with commas, in UTF-8"]) from error
    missing = [column for column in columns if column not in table]
    if missing:
        found = f"it has {', '.join(map(str, table))}"
        raise CohortError([f"{path}: lacks the column(s) {', '.join(missing)}; {found}. Add them, set off by commas"])
    faults = [*_name_faults(table["case_id"]), *_file_faults(path.parent, table), *_split_faults(table)]
    for column in _HEADS:
        if column in table and not pd.api.types.is_numeric_dtype(table[column]):
            faults.append(f"{path}: column {column} holds more than numbers; mend it, or leave the column out")
    if faults or table.empty:
        raise CohortError(faults or [f"{path}: has no cases; list at least one"])
    return table


def _name_faults(case_ids: Iterable[object]) -> Iterator[str]:
    for number, (case_id, times) in enumerate(Counter(case_ids).items(), start=1):
        if times > 1:
            yield f"case {case_id}: is listed {times} times; give every scan a name of its own"
        if not isinstance(case_id, str) or not _SAFE_ID.fullmatch(case_id):
            yield (
                f"case {case_id} (number {number}): the name must be letters, digits, '.', '_' or '-', "
                "a letter or digit first; rename it"
            )


def _split_faults(table: pd.DataFrame) -> Iterator[str]:
    """A split may be missing altogether, or there for exactly the cases with a label, each patient in one.

    None of the three may be empty then.
    """
    split = table["split"] if "split" in table else pd.Series(None, table.index, dtype=object)
    for case_id, name in zip(table["case_id"], split, strict=True):
        if isinstance(name, str) and name not in SPLITS:
            yield f"case {case_id}: split is {name!r}; it must be one of {', '.join(SPLITS)}"
    for row in table[split.notna() & table["label"].isna()].itertuples():
        yield f"case {row.case_id}: has a split but no label; name its label, or leave its split empty"
    for row in table[split.isna() & table["label"].notna() & split.notna().any()].itertuples():
        yield f"case {row.case_id}: has no split, others have; fill it, or empty the column to have it drawn"
    if "patient" in table:
        for patient, names in split.groupby(table["patient"]):
            if len(set(names.dropna())) > 1:
                cases = ", ".join(map(str, table["case_id"][names.index]))
                yield f"cases {cases}: are of one patient ({patient}) but in several splits; put them into one"
    given = set(split.dropna())
    if (
        given and given < set(SPLITS) and not split[table["label"].notna()].isna().any()
    ):  # else that is to be mended first
        missing = " and ".join(name for name in SPLITS if name not in given)
        yield f"column split: no case is in {missing}; give each split a case, or empty the column to have it drawn"


def _file_faults(folder: Path, table: pd.DataFrame) -> Iterator[str]:
    for column in ("image", "label"):
        files: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for case_id, name in zip(table["case_id"], table[column], strict=True):
            if isinstance(name, str):
                files[os.path.realpath(folder / name.replace("\0", ""))].append((str(case_id), name))
        for same in files.values():
            if len(same) > 1:
                cases, names = ", ".join(case_id for case_id, _ in same), " and ".join(dict(map(reversed, same)))
                yield f"cases {cases}: have one and the same {column} {names}; give each its own"
    for row in table.itertuples():
        modality = getattr(row, "modality", None)
        if isinstance(modality, str) and modality not in ("CT", "MR"):
            yield f"case {row.case_id}: modality is {modality!r}; it must be CT or MR"
        for column, name in (("image", row.image), ("label", row.label)):
            if not isinstance(name, str):
                if column == "image":
                    yield f"case {row.case_id}: no image is named; fill the column 'image'"
                continue
            try:
                inside = (folder / name).resolve().is_relative_to(folder.resolve())
                there = (folder / name).exists()
            except PermissionError as error:
                yield f"case {row.case_id}: {closed(folder / name, error)}"
                continue
            except (OSError, RuntimeError, ValueError) as error:  # a loop of links, too long, a zero byte
                yield f"case {row.case_id}: {column} {name!r} is no path ({error}); mend it in cohort.csv"
                continue
            if not inside:
                yield f"case {row.case_id}: {column} {name} leads out of {folder}; copy the file into the folder"
            elif not there:
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

    All is written aside first: what fails leaves a cohort that was there as it was, and nothing of its own.
    A split that the sources bring along is kept; without any it is drawn by patient (`patient`, else the case).
    Cases without any label get no split.

    Raises:
        CohortError: after all cases were tried, with every fault of every case; before, if the names or, as far as
            the sources tell, the labels and splits are wrong already.
    """
    folder, sources = Path(folder), list(sources)
    faults = list(_name_faults(source.case_id for source in sources)) if sources else ["there are no cases"]
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
    if faults := list(_split_faults(table)):
        raise CohortError(faults)
    return table


def _drawn_split(table: pd.DataFrame, seed: int) -> pd.Series:
    """A split for every case with a label, by patient where it is known."""
    patient = table["case_id"]
    if "patient" in table:
        patient = table["patient"].astype(object).where(table["patient"].notna(), patient).astype(str)
    patient = patient[table["label"].notna()]
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
        row |= dict(zip(_HEADS, np.round(np.concatenate(case.femoral_heads), 3).tolist(), strict=True))
    return row


def label_volume_ml(label: sitk.Image) -> float:
    """The foreground's volume in millilitres."""
    return float(np.count_nonzero(sitk.GetArrayFromImage(label)) * np.prod(label.GetSpacing()) / 1000)
