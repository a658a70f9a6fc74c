"""A cohort is checked as a whole, split by patient, and there only if it is complete."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from mupkg.data.build import (
    Source,
    _drawn_folds,
    sources_from_phantoms,
    sources_from_table,
    sources_of_replicates,
    split_cases,
    write_cohort,
)
from mupkg.data.cohort import (
    Cohort,
    CohortError,
    _file_faults,
    of_replicate,
    patients,
    read_cases,
    read_table,
    recorded,
    table_faults,
)
from mupkg.data.preprocessing import Preparation, array_spacing
from mupkg.scans import cases as cases_module
from mupkg.scans.cases import MOST_LETTERS, Case, patient_key

SHAPE = (6, 12, 14)
PREPARATION = Preparation(spacing_mm=(5.0, 4.0, 4.0))


def scan(case_id: str = "") -> sitk.Image:
    """Another one for every name."""
    rng = np.random.default_rng(list(case_id.encode()))
    image = sitk.GetImageFromArray(rng.integers(-200, 200, SHAPE).astype(np.int16))
    image.SetSpacing((4.0, 4.0, 5.0))
    return image


def mask(value=1) -> sitk.Image:
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[2:5, 4:9, 3:8] = value
    label = sitk.GetImageFromArray(voxels)
    label.CopyInformation(scan())
    return label


def table_of(names: str, **columns) -> pd.DataFrame:
    table = pd.DataFrame({"case_id": list(names)})
    table["image"], table["label"] = table["case_id"] + ".nii.gz", table["case_id"] + "_label.nii.gz"
    table["split"] = (["train", "validation", "test"] * len(table))[: len(table)]
    return table.assign(**columns)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good cases a, b, c."""
    for case_id in "abc":
        sitk.WriteImage(scan(), str(tmp_path / f"{case_id}.nii.gz"))
        sitk.WriteImage(mask(), str(tmp_path / f"{case_id}_label.nii.gz"))
    table_of("abc").to_csv(tmp_path / "cohort.csv", index=False)
    return tmp_path


def source(case_id: str, **columns) -> Source:
    return Source(case_id, lambda: Case(case_id, scan(case_id), mask()), columns)


def broken(case_id: str) -> Source:
    def read() -> Case:
        raise ValueError(f"case {case_id}: {case_id}.nii.gz: is torn; mend it")

    return Source(case_id, read, {})


def faults_of(folder: Path) -> list[str]:
    with pytest.raises(CohortError) as error:
        Cohort.read(folder)
    return error.value.faults


# Reading


def test_a_good_cohort_is_read(folder):
    cohort = Cohort.read(folder)
    assert cohort.ids() == ["a", "b", "c"]
    assert cohort.ids("test") == ["c"]
    (case,) = cohort.cases("validation")
    assert (case.case_id, case.split, case.modality) == ("b", "validation", "CT")
    with pytest.raises(ValueError, match="train, validation, test, not 'tset'"):
        cohort.ids("tset")
    with pytest.raises(CohortError, match="case z: is not in"):
        cohort.case("z")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["phantom-0001", "phantom-0002"], "PHANTOMS (made-up CT), not patients"),
        (["phantom-0001", "Case02"], "cohort mine"),
    ],
)
def test_only_phantoms_alone_are_called_phantoms(names, said):
    assert Cohort(Path("data/mine"), pd.DataFrame({"case_id": names})).described == said


def test_no_table_no_cases_no_columns(tmp_path):
    assert "notebook 00 makes one" in faults_of(tmp_path)[0]
    (tmp_path / "cohort.csv").write_text("")
    assert "is not a CSV table" in faults_of(tmp_path)[0]
    (tmp_path / "cohort.csv").write_text("case_id,image\na,a.nii.gz\n")
    assert "lacks the column(s) label, split; it has case_id, image" in faults_of(tmp_path)[0]
    (tmp_path / "cohort.csv").write_text("case_id,image,label,split\n")
    assert "has no cases" in faults_of(tmp_path)[0]


@pytest.mark.parametrize(
    ("columns", "case_id", "fault"),
    [
        ({"split": ["train", "tset", "test"]}, "b", "split is 'tset'; it must be one of train, validation, test"),
        ({"split": ["train", None, "test"]}, "b", "has a label but no split; fill it"),
        ({"label": ["a_label.nii.gz", None, "c_label.nii.gz"]}, "b", "has a split but no label; name its label"),
        ({"case_id": ["a", "b", "b"]}, "b", "is listed 2 times; give every scan a name of its own"),
        ({"case_id": ["a", "b/../x", "c"]}, "b/../x", "the name must be letters"),
        ({"image": ["a.nii.gz", None, "c.nii.gz"]}, "b", "no image is named; fill the column"),
        ({"image": ["a.nii.gz", "x.nii.gz", "c.nii.gz"]}, "b", "image x.nii.gz is not there, or may not be read; "),
        ({"modality": ["CT", "PET", "CT"]}, "b", "modality is 'PET'; it must be CT or MR"),
    ],
)
def test_a_wrong_entry_is_named_with_its_case_and_the_way_out(folder, columns, case_id, fault):
    table_of("abc", **columns).to_csv(folder / "cohort.csv", index=False)
    found = [line for line in faults_of(folder) if fault in line]
    assert len(found) == 1 and found[0].startswith(f"case {case_id}")


@pytest.mark.parametrize("way", ["dots", "absolute", "link"])
@pytest.mark.parametrize("column", ["image", "label"])
def test_paths_that_lead_out_of_the_folder_are_refused(folder, tmp_path_factory, column, way):
    outside = tmp_path_factory.mktemp("outside") / "x.nii.gz"
    sitk.WriteImage(mask(), str(outside))
    os.symlink(outside, folder / "link.nii.gz")
    name = {"dots": os.path.relpath(outside, folder), "absolute": str(outside), "link": "link.nii.gz"}[way]
    table = table_of("abc")
    table.loc[1, column] = name
    table.to_csv(folder / "cohort.csv", index=False)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"case b: {column} {name} leads out of") and "copy the file" in fault


def test_one_patient_in_two_splits_is_a_leak(folder):
    table_of("abc", patient=["01", "02", "01"]).to_csv(folder / "cohort.csv", index=False)
    (fault,) = faults_of(folder)
    assert fault == "cases a, c: are of one patient (01) but differ in split; put them into one"


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"replicate": [0, 0, 1]}, "case c: is tested in one replicate alone; test cases belong to all, leave it"),
        ({"replicate": [0, "x", None]}, "case b: replicate is 'x'; it must be a whole number from 0 on, or empty"),
        ({"replicate": [0.5, None, None]}, "case a: replicate is 0.5; it must be a whole number"),
        (
            {"replicate": [0, 1, None]},
            "replicate 0 (column replicate): no case is in validation; give each split a case",
        ),
        (
            {"fold_0": [0, 2, 2]},
            "replicate 1 (column fold_0): no case is in test; give each split a case, or empty the column",
        ),
        ({"fold_0": [0, 1, 2], "fold_1": [0, 1, 1]}, "replicate 5 (column fold_1): no case is in test"),
        ({"fold_0": [0, 1, None]}, "case c: has a label but no fold_0; fill it"),
        ({"fold_0": [0, 1, -1]}, "case c: fold_0 is -1; it must be a whole number from 0 on"),
        ({"fold_0": [0, 1, 2], "fold_2": [0, 1, 2]}, "columns fold_0, fold_2: must be called fold_0, fold_1, ..."),
        ({"fold_0": [0, 1, 10**9]}, "replicate 2 (column fold_0): no case is in test"),
        ({"fold_0": [0, 1, 1]}, "replicate 1 (column fold_0): no case is in train"),
        (
            {"fold_0": [0, 1, 2], "split": None, "patient": ["p", "q", "P"]},
            "cases a, c: are of one patient (p) but differ in fold_0; put them into one",
        ),
        (
            {"fold_0": [0, 1, 2], "split": None, "label": ["a_label.nii.gz", "b_label.nii.gz", None]},
            "case c: has a fold_0 but no label; name its label, or leave its fold_0 empty",
        ),
    ],
)
def test_replicates_and_folds_that_cannot_be_trained_or_share_a_case_are_refused(folder, columns, fault):
    table_of("abc", **columns).to_csv(folder / "cohort.csv", index=False)
    assert [line for line in faults_of(folder) if line.startswith(fault)]


def test_good_replicates_and_folds_are_read(folder):
    for columns in ({"replicate": [0, 0, None]}, {"fold_0": [0, 1, 2], "fold_1": [2, 1, 0], "fold_width": "x"}):
        table_of("abc", **columns).to_csv(folder / "cohort.csv", index=False)
        Cohort.read(folder).of_replicate(0)
    tested = [Cohort.read(folder).of_replicate(n).ids("test") for n in range(6)]
    assert tested == [["a"], ["b"], ["c"], ["c"], ["b"], ["a"]]


def test_several_broken_cases_are_all_told_at_once(folder):
    sitk.WriteImage(mask(0), str(folder / "a_label.nii.gz"))
    (folder / "b.nii.gz").write_text("torn")
    sitk.WriteImage(scan()[:, :, :1], str(folder / "c.nii.gz"))
    with pytest.raises(CohortError) as error:
        write_cohort(folder / "built", sources_from_table(folder, modality="CT"), PREPARATION, split_seed=0)
    for line, parts in zip(
        error.value.faults,
        (
            ("case a: ", "a_label.nii.gz: its foreground measures 0 of", "correct the contour"),
            ("case b: ", "b.nii.gz: cannot be read"),
            ("case c: ", "c.nii.gz: 1 slice(s)", "leave it out"),
            ("case c: ", "c_label.nii.gz: is not on its image's grid", "resample it onto"),
        ),
        strict=True,
    ):
        assert all(part in line for part in parts)


def test_a_case_is_checked_when_its_cohort_is_built_and_trusted_since(tmp_path, monkeypatch):
    cohort = write_cohort(tmp_path, [source(i) for i in "abc"], PREPARATION, split_seed=0)
    monkeypatch.setattr(cases_module, "not_in_hu", lambda voxels: pytest.fail("looked at the voxels again"))
    case = cohort.case("a")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(case.image), sitk.GetArrayFromImage(scan("a")))
    sitk.WriteImage(mask()[1:], str(tmp_path / "labels" / "a.nii.gz"))
    with pytest.raises(
        CohortError,
        match=r"case a: .*labels/a\.nii\.gz: does not lie on the grid of a\.nii\.gz .*; run notebook 00 again",
    ):
        cohort.case("a")


# Splitting


@pytest.mark.parametrize(("n", "sizes"), [(40, (28, 4, 8)), (3, (1, 1, 1)), (5, (3, 1, 1)), (339, (237, 34, 68))])
def test_shares_of_the_split(n, sizes):
    drawn = split_cases([f"p{i}" for i in range(n)], seed=0)
    assert tuple(list(drawn.values()).count(name) for name in ("train", "validation", "test")) == sizes


def test_the_split_is_the_seeds_and_not_the_orders():
    names = [f"p{i}" for i in range(40)]
    assert split_cases(names, 1) == split_cases(reversed(names), 1)
    assert split_cases(names, 1) != split_cases(names, 2)


def test_two_patients_cannot_be_split():
    with pytest.raises(ValueError, match=r"2 patient\(s\) of a cohort cannot be split"):
        split_cases(["a", "b", "a"], 0)


@pytest.mark.parametrize("seed", range(5))
def test_scans_of_one_patient_stay_together(tmp_path, seed):
    patients = {"a": "1", "b": "1", "c": "2", "d": "2", "e": "3"}
    sources = [source(case_id, patient=patient) for case_id, patient in patients.items()]
    table = write_cohort(tmp_path, sources, PREPARATION, split_seed=seed).table
    assert table["split"]["a"] == table["split"]["b"] and table["split"]["c"] == table["split"]["d"]
    assert set(table["split"]) == {"train", "validation", "test"}


def test_cases_of_unknown_patients_are_patients_of_their_own(tmp_path):
    """They were one patient called nan, all in one split."""
    sources = [source("a", patient="1"), *(source(i, patient=float("nan")) for i in "bc")]
    table = write_cohort(tmp_path, sources, PREPARATION, split_seed=0).table
    assert set(table["split"]) == {"train", "validation", "test"}


# Writing


def test_a_written_cohort_passes_its_own_checks(tmp_path):
    sources = [source(i, seed=n) for n, i in enumerate("abcd")]
    cohort = write_cohort(tmp_path, sources, PREPARATION, split_seed=3)
    assert Cohort.read(tmp_path).table.equals(cohort.table)
    assert list(cohort.table.columns[:4]) == ["case_id", "image", "label", "split"]
    assert cohort.table["split"].to_dict() == split_cases("abcd", 3)
    assert list(cohort.table["seed"]) == [0, 1, 2, 3]
    assert cohort.preparation == PREPARATION
    assert cohort.table["prostate_ml"]["a"] == pytest.approx(3 * 5 * 5 * 80 / 1000)
    prepared = cohort.prepared("a")
    assert sitk.GetArrayFromImage(prepared.label).sum() == 3 * 5 * 5


def test_the_same_seed_gives_the_same_cohort(tmp_path):
    tables = []
    for name in ("one", "two"):
        write_cohort(tmp_path / name, [source(i) for i in "abcde"], PREPARATION, split_seed=3)
        tables.append((tmp_path / name / "cohort.csv").read_bytes())
    assert tables[0] == tables[1]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_failure_leaves_the_former_cohort_as_it_was_and_nothing_of_the_new(tmp_path):
    write_cohort(tmp_path, [source(i) for i in "abc"], PREPARATION, split_seed=0)
    before = contents(tmp_path)
    bad = [source("a", seed=1), broken("b"), broken("c"), source("d")]
    with pytest.raises(CohortError) as error:
        write_cohort(tmp_path, bad, PREPARATION.model_copy(update={"spacing_mm": (5.0, 5.0, 5.0)}), split_seed=1)
    assert error.value.faults == [f"case {i}: {i}.nii.gz: is torn; mend it" for i in "bc"]
    assert "2 case(s) are fine" in str(error.value)
    assert contents(tmp_path) == before
    assert Cohort.read(tmp_path).fingerprint() == recorded("cohort", tmp_path, 0)


def test_a_failure_leaves_nothing_in_a_fresh_folder(tmp_path):
    with pytest.raises(CohortError):
        write_cohort(tmp_path / "data" / "new", [source("a"), broken("b"), source("c")], PREPARATION, split_seed=0)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_build_left_aside_is_cleared_away(tmp_path):
    (tmp_path / ".making" / "images").mkdir(parents=True)
    (tmp_path / ".making" / "images" / "z.nii.gz").write_text("of a case that is no longer in the cohort")
    write_cohort(tmp_path, [source(i) for i in "abc"], PREPARATION, split_seed=0)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".") or path.name.startswith("z")]


def test_too_few_patients_are_told_before_any_scan_is_read(tmp_path):
    def untouched():
        raise AssertionError("read")

    told = [
        Source(i, untouched, {"label": f"{i}.mha", "patient": patient})
        for i, patient in zip("abc", "112", strict=True)
    ]
    with pytest.raises(CohortError, match=r"2 patient\(s\) of a cohort cannot be split .*\. Add labelled scans"):
        write_cohort(tmp_path / "new", told, PREPARATION, split_seed=0)
    with pytest.raises(CohortError, match="no case is in validation and test; give each split a case, or empty"):
        write_cohort(
            tmp_path / "new",
            [Source(i, untouched, {"label": i, "split": "train"}) for i in "abc"],
            PREPARATION,
            split_seed=0,
        )
    three = [Source(i, untouched, {"label": i}) for i in "abc"]
    with pytest.raises(CohortError, match=r"3 patient\(s\) cannot be dealt out to 4 folds; choose fewer folds"):
        write_cohort(tmp_path / "new", three, PREPARATION, split_seed=0, folds=4)
    phantoms = sources_from_phantoms(range(3), None)  # of the paper's size: seconds each
    with pytest.raises(CohortError, match=r"3 patient\(s\) cannot be dealt out to 5 folds"):
        write_cohort(tmp_path / "new", phantoms, PREPARATION, split_seed=0, folds=5)
    with pytest.raises(
        CohortError, match=r"2 patient\(s\) of a cohort cannot be split"
    ):  # only reading tells who has a label
        write_cohort(tmp_path / "new", [source("a"), source("b")], PREPARATION, split_seed=0)
    assert not list(tmp_path.iterdir())


def test_a_case_may_be_called_na(tmp_path):
    """It was read back as a case without a name."""
    cohort = write_cohort(tmp_path, [source(i) for i in ("NA", "null", "nan")], PREPARATION, split_seed=0)
    assert Cohort.read(tmp_path).ids() == cohort.ids() == ["NA", "null", "nan"]


def test_a_label_of_a_former_cohort_is_not_taken_for_the_cases(tmp_path):
    write_cohort(tmp_path, [source(i) for i in "abcx"], PREPARATION, split_seed=0)
    bare = Source("x", lambda: Case("x", scan("x")), {})
    cohort = write_cohort(tmp_path, [bare, *(source(i) for i in "abc")], PREPARATION, split_seed=0)
    assert (tmp_path / "prepared" / "x_label.mha").is_file() and cohort.prepared("x").label is None


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_missing_prepared_volume_is_named_with_the_notebook_that_makes_it(tmp_path, kind):
    cohort = write_cohort(tmp_path, [source(i) for i in "abc"], PREPARATION, split_seed=0)
    (tmp_path / "prepared" / f"b_{kind}.mha").unlink()
    with pytest.raises(CohortError, match=rf"case b: .*b_{kind}\.mha: .*no such file.* run notebook 00 again"):
        cohort.prepared("b")
    with pytest.raises(ValueError, match=rf"b_{kind}\.mha: cannot be read"):
        cohort.fingerprint()


def test_a_table_that_may_not_be_read_says_so(folder, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pd, "read_csv", closed)
    (fault,) = faults_of(folder)
    assert "cohort.csv: cannot be read (Permission denied); give yourself read permission" in fault


def test_a_file_told_in_two_spellings_is_one_file(folder):
    table_of("abc", image=["a.nii.gz", "./a.nii.gz", "c.nii.gz"]).to_csv(folder / "cohort.csv", index=False)
    (fault,) = faults_of(folder)
    assert fault == "cases a, b: have one and the same image a.nii.gz and ./a.nii.gz; give each its own"


LONG = "a" * (MOST_LETTERS + 1)


@pytest.mark.parametrize(
    "names",
    [["a", "a", "b"], ["Case 1", "b", "c"], ["../a", "b", "c"], [".a", "b", "c"], [LONG, "b", "c"], []],
)
def test_bad_names_are_refused_before_anything_is_written(tmp_path, names):
    with pytest.raises(CohortError):
        write_cohort(tmp_path / "cohort", [source(name) for name in names], PREPARATION, split_seed=0)
    assert not (tmp_path / "cohort").exists()


def test_a_split_that_is_brought_along_is_kept(tmp_path):
    given = dict(zip("abcd", ["test", "train", "validation", "test"], strict=True))
    sources = [source(i, split=split) for i, split in given.items()]
    assert write_cohort(tmp_path, sources, PREPARATION, split_seed=0).table["split"].to_dict() == given


def test_cases_without_a_label_get_no_split(tmp_path):
    bare = Source("x", lambda: Case("x", scan("x")), {})
    cohort = write_cohort(tmp_path, [bare, *(source(i) for i in "abc")], PREPARATION, split_seed=0)
    assert pd.isna(cohort.table["split"]["x"]) and cohort.table["split"].notna().sum() == 3
    assert cohort.case("x").label is None and cohort.prepared("x").label is None


def test_a_scan_of_the_other_modality_is_refused(tmp_path):
    with pytest.raises(CohortError, match="case a: is CT, not MR; set modality"):
        write_cohort(tmp_path, [source("a")], Preparation(modality="MR"), split_seed=0)


def test_a_working_grid_that_loses_the_prostate_is_refused(tmp_path):
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[1, 1, 1] = 1
    label = sitk.GetImageFromArray(voxels)
    label.CopyInformation(scan())
    with pytest.raises(CohortError, match=r"case a: preparing it loses the prostate.*finer spacing_mm"):
        write_cohort(
            tmp_path,
            [Source("a", lambda: Case("a", scan(), label), {})],
            Preparation(spacing_mm=(30,) * 3),
            split_seed=0,
        )


def test_what_is_known_of_a_phantom_comes_back(cohort):
    case = cohort.case(cohort.ids()[0])
    assert case.femoral_heads[0][0] > case.femoral_heads[1][0]  # the patient's left is +x
    assert case.case_id == "phantom-0000" and cohort.table["seed"][case.case_id] == 0


@pytest.mark.slow
def test_the_fingerprint_is_of_the_table_and_its_cases_volumes(tmp_path):
    def written(name, letters="abcd", preparation=PREPARATION):
        return write_cohort(tmp_path / name, [source(i) for i in letters], preparation, split_seed=0)

    first = written("first").fingerprint()
    assert first == written("again").fingerprint() == recorded("cohort", tmp_path / "again", 0)
    other = PREPARATION.model_copy(update={"window_hu": (-300.0, 500.0)})  # of which the table says nothing
    assert first != written("window", preparation=other).fingerprint()
    assert first != written("more", "abcde").fingerprint()
    assert first == written("more").fingerprint()  # what a former cohort left in the folder does not count
    (tmp_path / "first" / "prepared" / "b_image.mha").unlink()
    with pytest.raises(ValueError, match=r"b_image\.mha: cannot be read"):
        Cohort.read(tmp_path / "first").fingerprint()


def test_a_cohort_in_the_making_has_neither_table_nor_fingerprint(tmp_path, monkeypatch):
    """It ends while the new volumes take the place of the old: no table may claim the mixture."""
    write_cohort(tmp_path, [source(i) for i in "abc"], PREPARATION, split_seed=0)
    replace = os.replace

    def killed(old, new):
        if Path(new) == tmp_path / "prepared" / "b_image.mha":
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path, [source(i) for i in "abc"], PREPARATION, split_seed=0)
    with pytest.raises(CohortError, match="notebook 00 makes one"):
        Cohort.read(tmp_path)
    with pytest.raises(ValueError, match=r"fingerprint\.json: does not tell the cohort .*; run notebook 00 again"):
        recorded("cohort", tmp_path, 0)


# Replicates of a trial


def cases_with(**columns) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    ids = [f"c{i}" for i in range(count)]
    return pd.DataFrame({"case_id": ids, **columns}, index=ids)


def test_a_replicate_has_its_own_training_cases_and_all_test_cases():
    table = cases_with(split=["test", "train", "train", "validation"], replicate=[np.nan, 0, 1, 1])
    assert list(of_replicate(table, 1).index) == ["c0", "c2", "c3"]
    with pytest.raises(ValueError, match="no replicate 2 in this cohort, which has from 0 to 1"):
        of_replicate(table, 2)


def test_a_table_s_own_folds_are_kept_and_no_others_are_drawn(tmp_path):
    """Regression: they were drawn anew without a word."""
    own = {"a": 2, "b": 0, "c": 1}
    splits = dict(zip(own, ("train", "validation", "test"), strict=True))
    sources = [source(case_id, fold_0=fold, split=splits[case_id]) for case_id, fold in own.items()]
    cohort = write_cohort(tmp_path / "kept", sources, PREPARATION, split_seed=0, folds=3)
    assert cohort.table["fold_0"].to_dict() == own
    with pytest.raises(CohortError, match=r"has 3 folds in 1 repeat\(s\) of its own; set folds and repeats to these"):
        write_cohort(tmp_path / "other", sources, PREPARATION, split_seed=0, folds=3, repeats=2)


def test_as_many_folds_are_drawn_as_asked_for_and_by_the_seed(tmp_path):
    sources = [source(case_id) for case_id in "abcdef"]
    drawn = [
        write_cohort(tmp_path / str(seed), sources, PREPARATION, split_seed=seed, folds=3, repeats=2).table
        for seed in (1, 2)
    ]
    for table in drawn:
        assert [sorted(table[f"fold_{repeat}"]) for repeat in range(2)] == [[0, 0, 1, 1, 2, 2]] * 2
        assert "fold_2" not in table and not table["fold_0"].equals(table["fold_1"])
    assert not drawn[0]["fold_0"].equals(drawn[1]["fold_0"])


def test_a_replicate_validates_on_an_eighth_of_its_phantoms():
    columns = pd.DataFrame([s.columns for s in sources_of_replicates(5, 2, 64, 10, None)])
    counts = columns.groupby(["split", "replicate"], dropna=False).size().to_dict()
    own = {(split, n): count for n in (0, 1) for split, count in (("train", 56), ("validation", 8))}
    assert {key: count for key, count in counts.items() if key[0] != "test"} == own
    assert columns["seed"].tolist() == [*range(5, 143)] and (columns["split"] == "test").sum() == 10


def test_folds_test_every_patient_once_a_repeat_and_never_share_one():
    names = [f"P{i // 2}" for i in range(40)]
    table = cases_with(patient=names, split=["train"] * 40, label=["x"] * 40)
    table = table.assign(**_drawn_folds(patients(table), 5, 2, seed=3))
    assert not table["fold_0"].equals(table["fold_1"])
    for repeat in range(2):
        tested = []
        for fold in range(5):
            split = of_replicate(table, 5 * repeat + fold)["split"]
            assert set(split) == {"train", "validation", "test"}
            for patient in set(names):
                assert len(set(split[table["patient"] == patient])) == 1
            tested += list(split.index[split == "test"])
        assert sorted(tested) == sorted(table.index)
    with pytest.raises(ValueError, match="no replicate 10"):
        of_replicate(table, 10)


def test_more_folds_than_patients_are_refused():
    with pytest.raises(CohortError, match="2 patient"):
        _drawn_folds(pd.Series(["a", "a", "b"]), 3, 1, seed=0)


def test_a_cohort_without_replicates_says_who_makes_them():
    with pytest.raises(ValueError, match="which has none; notebook 00 makes replicates and folds"):
        of_replicate(cases_with(split=["train"]), 0)


# Patients

SPELLINGS = [("P1", "P1 "), ("P1", "p1"), ("P1", "\uff30\uff11"), ("P1", "P1\u200b"), ("P1", "P1\u00a0")]
SPELLINGS += [("Anna  B", " anna b"), ("P1", "P01"), ("P1", "P-1"), ("P_1", "P 1"), ("1", "001"), ("AB.1", "ab1")]
SPELLINGS += [("0", "00"), ("12", "12.0"), ("12", "012.00"), ("12", "12,0"), ("12.0", "012"), ("12", "'12")]
SPELLINGS += [("1234", "1,234"), ("1234567", "1.234.567,00"), ("1234", "1'234.0"), ("0012", '="0012"')]


@pytest.mark.slow
@pytest.mark.parametrize("spellings", SPELLINGS)
def test_a_patient_is_one_in_any_spelling(folder, spellings, tmp_path_factory):
    """Regression: they were told apart by their raw strings, one in training and one in the test."""
    one, other = spellings
    assert patient_key(one) == patient_key(other) == patient_key(patient_key(one))
    table_of("abc", patient=[one, "Q2", other]).to_csv(folder / "cohort.csv", index=False)
    (fault,) = faults_of(folder)
    assert fault.startswith("cases a, c: are of one patient (") and "but differ in split; put them into one" in fault
    named = dict(zip("abcde", (one, other, "Q2", "Q3", "Q4"), strict=True))
    sources = [source(case_id, patient=patient) for case_id, patient in named.items()]
    place = tmp_path_factory.mktemp("built")
    splits = {seed: write_cohort(place, sources, PREPARATION, split_seed=seed).table["split"] for seed in (0, 1)}
    assert [split["a"] == split["b"] for split in splits.values()] == [True, True]
    assert Cohort.read(place).table["split"].to_dict() == splits[1].to_dict()


OTHERS = [("P1", "P10"), ("1-11", "11-1"), ("A1", "B1"), ("P1a", "P1b"), ("Ann", "Anna"), ("A", "A0"), ("-", "--")]
OTHERS += [("12", "120"), ("12.0", "12.1"), ("1.2", "12"), ("12.0", "1200"), ("1,23", "123"), ("0", "1")]


@pytest.mark.parametrize("names", OTHERS)
def test_patients_of_other_names_are_others(names):
    table = cases_with(patient=list(names), label=["x"] * 2)
    assert not table_faults(table) and len(set(patients(table))) == 2


@pytest.mark.parametrize("patient", ["1.23457E+11", "1,2E+05", "1e+16", 1e16])
def test_a_patient_whom_a_table_program_rounded_is_refused(tmp_path, patient):
    """Several patients may have the same digits, and one may have two spellings: 123456789012 and 1.23457E+11."""
    sources = [source(i, patient=p, label=i) for i, p in zip("abcd", (patient, "5E12", "E+05", "1.5E+"), strict=True)]
    with pytest.raises(CohortError, match=r"^case a: patient is .* a table program rounded it; format the column as"):
        write_cohort(tmp_path / "out", sources, PREPARATION, split_seed=0)


def test_the_split_is_drawn_as_before_in_the_order_of_the_spellings(tmp_path):
    """A cohort made again keeps its split: patients are put in order as they are spelt, not by their key."""
    names = ["P-9", "p 10", "P11", "007", "12.0", "1,234", "Ann"]
    table = cases_with(patient=names, label=["x"] * len(names))
    assert sorted(patients(table)) == sorted(["p-9", "p 10", "p11", "007", "12.0", "1,234", "ann"])


@pytest.mark.parametrize(
    ("column", "meant"),
    [("patient_id", "patient"), ("PatientID", "patient"), ("subject", "patient"), ("Patient", "patient")]
    + [("participant_id", "patient"), ("MRN", "patient"), ("patinet", "patient"), ("Modality", "modality")],
)
def test_a_column_that_nothing_reads_though_it_was_meant_is_told(folder, column, meant):
    table_of("abc", **{column: ["CT"] * 3}).to_csv(folder / "cohort.csv", index=False)
    (fault,) = faults_of(folder)
    assert fault.endswith(f"cohort.csv: nothing reads the column {column!r}; call it {meant!r}, or leave it out")
    table_of("abc", **{column: [1] * 3, meant: "CT"}, age=70).to_csv(folder / "cohort.csv", index=False)
    assert not [fault for fault in faults_of_table(folder) if "nothing reads" in fault]


def faults_of_table(folder: Path) -> list[str]:
    try:
        read_table(folder / "cohort.csv")
    except CohortError as error:
        return error.faults
    return []


# Tables as they come

ROWS = "case_id,image,label,split\n" + "".join(
    f"{case_id},{case_id}.nii.gz,{case_id}_label.nii.gz,{split}\n"
    for case_id, split in zip("abc", ("train", "validation", "test"), strict=True)
)
AS_THEY_COME = {
    "byte order mark": "\ufeff" + ROWS,
    "Windows' line ends": ROWS.replace("\n", "\r\n"),
    "old Macs' line ends": ROWS.replace("\n", "\r"),
    "rows of commas alone": ROWS + ",,,\n , ,,\n",
    "blank lines": ROWS.replace("\n", "\n\n"),
    "blanks after commas": ROWS.replace(",", ", "),
    "blanks before commas": ROWS.replace(",", " ,"),
    "quoted blanks": ROWS.replace("a.nii.gz", '" a.nii.gz "').replace("train", '"train "'),
    "all quoted": "\n".join(",".join(f'"{entry}"' for entry in row.split(",")) for row in ROWS.split()),
    "a column without a name": ROWS.replace("\n", ",\n"),
    "no line end at the end": ROWS.rstrip(),
    "blanks after names": ROWS.replace("case_id,", "case_id ,").replace("split\n", "split \n"),
}


@pytest.mark.parametrize("blank", ["", " "])
def test_names_of_cases_stay_text_and_no_column_is_there_twice(folder, blank):
    """Regression: with a blank after the column's name, 007 became 7, and the table ended in an AttributeError."""
    (folder / "cohort.csv").write_text(f"case_id{blank},image,label,split\n007,a.nii.gz,a_label.nii.gz,test\n")
    assert [*read_cases(folder / "cohort.csv", "")["case_id"]] == ["007"]
    (folder / "cohort.csv").write_text(f"case_id,image,label,split,split{blank}\n1,a,b,train,test\n")
    with pytest.raises(CohortError, match=r"cohort\.csv: .*there are two columns 'split'; leave one out"):
        Cohort.read(folder)


@pytest.mark.parametrize("how", AS_THEY_COME)
def test_a_table_is_read_as_spreadsheets_write_it(folder, how):
    (folder / "cohort.csv").write_bytes(AS_THEY_COME[how].encode())
    table = Cohort.read(folder).table
    assert table.to_csv(index=False) == ROWS


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (ROWS.replace(",", ";"), r"lacks the column\(s\) case_id, image, label, split; .*set off by commas"),
        (ROWS.replace(",", "\t"), "set off by commas"),
        (ROWS.replace("train\n", "train,12\n"), "is not a CSV table .*save it as CSV"),
        (ROWS.replace("\n", ",12\n").replace("split,12", "split"), "is not a CSV table .*save it as CSV"),
        (
            ROWS.replace("label,split", "label,split,split").replace("\n", ",x\n").replace("split,x", "split"),
            "two columns",
        ),
    ],
)
def test_a_table_that_would_be_misread_is_refused(folder, text, fault):
    """Regression: an entry too many in every row, and each column was read as its neighbour."""
    (folder / "cohort.csv").write_text(text)
    with pytest.raises(CohortError, match=fault):
        Cohort.read(folder)


def test_a_path_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "cohort.csv").write_text(ROWS.replace(",b.nii", ",~/b.nii"))
    assert Cohort.read(folder).ids() == ["a", "b", "c"]


NAMES = ["NA", "null", "nan", "None", "1e5", "007", "True", "1.0", "inf", "N-A"]


def test_a_case_keeps_its_name_in_every_table(tmp_path):
    """Regression: NA and null passed notebook 00 and ended 02, when it read its own regions.csv."""
    cohort = write_cohort(tmp_path, [source(name) for name in NAMES], PREPARATION, split_seed=0)
    assert cohort.ids() == NAMES
    numbers = pd.DataFrame({"case_id": NAMES, "fallback": [None, "NA"] * 5, "DSC": [np.inf, np.nan] * 5})
    numbers.to_csv(tmp_path / "numbers.csv", index=False)
    found = read_cases(tmp_path / "numbers.csv", "make it again")
    assert found["case_id"].tolist() == NAMES
    pd.testing.assert_series_equal(found["DSC"], numbers["DSC"])
    assert found["fallback"].dropna().tolist() == ["NA"] * 5


# Two builds at once


def test_two_builds_of_one_cohort_do_not_mix(tmp_path):
    """Regression: their volumes lay in one folder, and fingerprint and all checks passed."""
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Case:
        begun.set()
        go_on.wait(60)
        return Case("a", scan("a"), mask())

    def build(spacing: float, *sources: Source) -> Cohort:
        preparation = PREPARATION.model_copy(update={"spacing_mm": (spacing,) * 3})
        return write_cohort(tmp_path / "c", [*sources, source("b"), source("c")], preparation, split_seed=0)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(build, 4.0, Source("a", slow, {}))
        assert begun.wait(60)
        with pytest.raises(CohortError, match="c: another process is making this cohort; wait for it"):
            build(5.0, source("a"))
        go_on.set()
        cohort = first.result()
    assert {array_spacing(cohort.prepared(case_id).image) for case_id in "abc"} == {(4.0,) * 3}
    build(5.0, source("a"))  # the lock is free again
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_prepared_volume_of_another_build_is_refused(tmp_path, kind):
    sources = [source(i) for i in "abc"]
    other = PREPARATION.model_copy(update={"spacing_mm": (4.0, 4.0, 4.0)})
    cohort, _ = (
        write_cohort(tmp_path / n, sources, p, split_seed=0) for n, p in (("one", PREPARATION), ("two", other))
    )
    shutil.copy(tmp_path / "two" / "prepared" / f"b_{kind}.mha", tmp_path / "one" / "prepared")
    with pytest.raises(
        CohortError,
        match=r"case b: .*does not lie on the grid of (\(5\.0, 4\.0, 4\.0\) mm|b_image\.mha) .*; run notebook 00",
    ):
        cohort.prepared("b")
    assert cohort.prepared("a").label is not None


def test_a_name_with_a_nul_is_a_file_that_is_not_there(folder):
    table = pd.read_csv(folder / "cohort.csv", dtype=str)
    table.loc[0, "image"] += "\0"
    assert "is not there, or may not be read" in next(_file_faults(folder, table))
