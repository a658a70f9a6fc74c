"""Stage 1: the centre is the average of two, a fallback is said, and the region is measured honestly."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from mupkg.data.cohort import FINGERPRINT, Cohort
from mupkg.data.preprocessing import (
    Preparation,
    array_spacing,
    centroid,
    crop_region,
    label_on,
    prepare,
    whole_label,
)
from mupkg.models import SegmentationOutput
from mupkg.scans.cases import Case
from mupkg.scans.writing import write_text
from mupkg.stages import localization
from mupkg.stages import regions as regions_module
from mupkg.stages.landmarks import FemoralHeads
from mupkg.stages.localization import coarse, coarse_mask, locate
from mupkg.stages.regions import Regions, coverage, write_regions


class Bright(nn.Module):
    """Foreground is what is brighter than a grey value in the middle slice."""

    def __init__(self, value=128):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value / 255))

    def forward(self, images):
        logit = 1000 * (images[:, images.shape[1] // 2] - self.value)
        return SegmentationOutput(torch.stack([-logit, logit], dim=1), images)


NOTHING = Bright(300)


def prepared_image(shape=(40, 50, 60), spacing=(2.0, 1.0, 1.0)) -> sitk.Image:
    image = sitk.Image(shape[::-1], sitk.sitkUInt8)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-20.0, 30.0, 400.0))
    return image


def with_balls(image: sitk.Image, *balls) -> sitk.Image:
    """Balls of 255 given by centre (z, y, x) and radius in voxels."""
    voxels = sitk.GetArrayFromImage(image)
    grid = np.indices(voxels.shape)
    for *centre, radius in balls:
        voxels[sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2] = 255
    painted = sitk.GetImageFromArray(voxels)
    painted.CopyInformation(image)
    return painted


def heads_at(monkeypatch, left=None, right=None, reason="said so"):
    monkeypatch.setattr(localization, "femoral_heads", lambda image: FemoralHeads(left, right, 0.5, reason))


# Coarse grid and centre


@pytest.mark.parametrize(
    ("shape", "spacing", "wanted"),
    [
        ((100, 80, 80), (1.0, 1.0, 1.0), (4.0, 4.0, 4.0)),
        ((100, 80, 80), (5.0, 2.0, 6.0), (5.0, 4.0, 6.0)),  # coarser already: stays
        ((24, 80, 80), (2.5, 1.0, 1.0), (3.75, 4.0, 4.0)),  # never fewer than 16 slices
        ((12, 80, 80), (2.5, 1.0, 1.0), (2.5, 4.0, 4.0)),
    ],
)
def test_stage_1_works_on_4_mm_but_keeps_slices(shape, spacing, wanted):
    image = prepared_image(shape, spacing)
    assert array_spacing(coarse(image)) == pytest.approx(wanted)
    assert coarse(image).GetSize()[2] >= min(16, shape[0])


def test_the_coarse_mask_is_the_largest_component():
    image = with_balls(prepared_image(), (20, 30, 22, 12), (5, 8, 50, 6))
    expected = image.TransformContinuousIndexToPhysicalPoint((22.0, 30.0, 20.0))
    np.testing.assert_allclose(centroid(coarse_mask(Bright(), image)), expected, atol=1)
    assert centroid(coarse_mask(NOTHING, image)) is None


def test_stage_1_sees_the_scan_as_coarse_as_it_was_told(cohort, regions, tmp_path, monkeypatch):
    (case_id,) = cohort.ids("test")
    case, prepared, seen = cohort.case(case_id), cohort.prepared(case_id), []

    def look(network, volume, **_):
        seen.append(volume.shape)
        return np.ones(volume.shape, np.float32)

    monkeypatch.setattr(localization, "predict_volume", look)
    heads_at(monkeypatch)
    locate(case, prepared.image, NOTHING, coarse_mm=9.0)
    only_one = dataclasses.replace(cohort, table=cohort.table.loc[[case_id]])
    write_regions(only_one, NOTHING, tmp_path / "stage1", coarse_mm=11.0, region_mm=(96, 120, 120))
    assert seen == [coarse(prepared.image, mm).GetSize()[::-1] for mm in (9.0, 11.0)]
    assert len({*seen}) == 2


# The two parts of the centre


def test_the_centre_is_the_average_of_mask_and_heads(monkeypatch):
    image = with_balls(prepared_image(), (20, 30, 22, 12))
    heads_at(monkeypatch, (100.0, 0.0, 500.0), (-60.0, 10.0, 520.0))
    found = locate(Case("a", image), image, Bright())
    rough = centroid(image > 128)
    np.testing.assert_allclose(found.coarse_centre, rough, atol=1)
    assert found.heads_centre == (20.0, 5.0, 510.0)
    # to the four digits of a millimetre that regions.csv keeps
    np.testing.assert_allclose(found.centre, (np.array(found.coarse_centre) + found.heads_centre) / 2, atol=1e-4)
    assert found.fallback == ""
    low, high = (np.array(corner) for corner in found.coarse_box)
    np.testing.assert_allclose((low + high) / 2, rough, atol=4)  # a ball's box, on a grid of 4 mm
    assert ((high - low) > 0).all()


def test_without_heads_the_mask_alone_and_it_is_said(monkeypatch):
    image = with_balls(prepared_image(), (20, 30, 22, 12))
    heads_at(monkeypatch, reason="metal everywhere")
    found = locate(Case("a", image), image, Bright())
    np.testing.assert_allclose(found.centre, found.coarse_centre, atol=1e-4)
    assert found.heads_centre is None
    assert found.fallback == "coarse centre alone: metal everywhere"


def test_without_a_mask_the_heads_alone_and_it_is_said(monkeypatch):
    heads_at(monkeypatch, (100.0, 0.0, 500.0), (-60.0, 10.0, 520.0))
    found = locate(Case("a", prepared_image()), prepared_image(), NOTHING)
    assert found.centre == (20.0, 5.0, 510.0) and found.coarse_centre is None
    assert "heads alone" in found.fallback and found.coarse_box is None


def test_without_both_the_case_is_named(monkeypatch):
    heads_at(monkeypatch, reason="metal everywhere")
    with pytest.raises(ValueError, match=r"case a77: .*cannot be located.*metal everywhere"):
        locate(Case("a77", prepared_image()), prepared_image(), NOTHING)


def test_no_heads_are_sought_in_an_mr(monkeypatch):
    monkeypatch.setattr(localization, "femoral_heads", lambda image: pytest.fail("sought"))
    image = with_balls(prepared_image(), (20, 30, 22, 12))
    found = locate(Case("a", image, modality="MR"), image, Bright())
    assert found.fallback == "coarse centre alone: MR: no femoral heads are sought"


@pytest.mark.slow
def test_the_centre_does_not_depend_on_how_the_scan_is_stored(cohort):
    case = cohort.case("phantom-0001")
    turned = sitk.PermuteAxes(sitk.Flip(case.image, (True, False, True)), (1, 2, 0))
    centres = [
        locate(Case("a", image), prepare(Case("a", image), cohort.preparation).image, Bright(200)).centre
        for image in (case.image, turned)
    ]
    np.testing.assert_allclose(*centres, atol=1)


# Coverage


def test_coverage_by_hand():
    label = sitk.GetImageFromArray(np.pad(np.ones((4, 4, 4), np.uint8), 8))  # voxels 8 to 11, centre 9.5
    assert coverage(label, (9.5, 9.5, 9.5), (4, 4, 4)) == 1
    assert coverage(label, (9.5, 9.5, 9.5), (2, 4, 4)) == 0.5
    assert coverage(label, (9.5, 9.5, 9.5), (2, 2, 2)) == 0.125
    assert coverage(label, (11.5, 9.5, 9.5), (4, 4, 4)) == 0.5
    assert coverage(label, (40.0, 9.5, 9.5), (4, 4, 4)) == 0
    assert np.isnan(coverage(label * 0, (9.5, 9.5, 9.5), (4, 4, 4)))


def test_what_the_body_crop_has_cost_is_not_covered():
    voxels = np.full((8, 100, 100), -1000, np.int16)
    voxels[:, 20:80, 20:80] = 40
    image, label = (sitk.GetImageFromArray(array) for array in (voxels, np.zeros(voxels.shape, np.uint8)))
    label[70:90, 45:55, 2:6] = 1  # 20 columns, of which 10 lie in the body
    case, preparation = Case("cut", image, label), Preparation(spacing_mm=(1.0, 1.0, 1.0))
    prepared, whole = prepare(case, preparation).label, whole_label(case, preparation)
    centre = centroid(label)
    assert coverage(prepared, centre, (40, 40, 40)) == 1
    assert coverage(prepared, centre, (40, 40, 40), whole) == pytest.approx(
        0.5, abs=0.11
    )  # the body's own grid is coarse
    assert coverage(prepared, centre, (40, 40, 6), whole) < 0.3


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (2.5, 1.25, 1.25)])
def test_a_prostate_that_is_there_whole_is_covered_whole(spacing):
    """Regression: sampled twice, ties between two voxels of an oblique grid gave shares of .990 and of 1.013."""
    z, y, x = np.indices((90, 90, 90))
    inside = ((z - 41) / 17) ** 2 + ((y - 44) / 21) ** 2 + ((x - 47) / 19) ** 2 < 1
    voxels = np.full(inside.shape, 40, np.int16), inside.astype(np.uint8)
    image, label = map(sitk.GetImageFromArray, voxels)
    for angle in (0.13, 0.31, 0.57):
        turned = sitk.Euler3DTransform((0, 0, 0), angle, angle / 2, -angle / 3).GetMatrix()
        for volume in (image, label):
            volume.SetDirection(turned)
            volume.SetSpacing([s / 2 for s in spacing[::-1]])
        case, preparation = Case("turned", image, label), Preparation(spacing_mm=spacing)
        whole = whole_label(case, preparation)
        left = label_on(prepare(case, preparation).label, whole)
        assert coverage(left, centroid(label), (128, 128, 128), whole) == 1


def test_what_the_body_crop_has_cost_shows_in_the_table(cohort, regions, tmp_path, monkeypatch):
    def twice_as_much(case, preparation):
        label = whole_label(case, preparation)
        voxels = sitk.GetArrayFromImage(label)
        voxels.ravel()[: voxels.sum()] = 1  # in the air before the body
        twice = sitk.GetImageFromArray(voxels)
        twice.CopyInformation(label)
        return twice

    monkeypatch.setattr(regions_module, "whole_label", twice_as_much)
    network, told = localization_network(regions), {"coarse_mm": 8.0, "region_mm": (96, 120, 120)}
    again = write_regions(cohort, network, tmp_path / "stage1", **told).table
    np.testing.assert_allclose(again["covered"], regions.table["covered"] / 2, atol=1e-4)


def test_a_single_voxel_that_is_missing_shows():
    label = sitk.Image((70, 60, 60), sitk.sitkUInt8) + 1
    label.SetSpacing((1.0, 1.0, 1.0))
    whole = sitk.Image(label)
    label[0, 0, 0] = 0
    assert 0.99999 <= coverage(label, centroid(whole), (90, 90, 90), whole) < 1


def test_coverage_is_never_above_one(cohort):
    """Array views of images that were gone gave such numbers."""
    label, rng = cohort.prepared("phantom-0000").label, np.random.default_rng(0)
    for _ in range(30):
        centre = np.array(centroid(label)) + rng.normal(0, 30, 3)
        assert 0 <= coverage(label, centre.tolist(), rng.uniform(30, 150, 3)) <= 1
    assert coverage(label, centroid(label), (150, 150, 150)) == 1


# Regions on disk


def test_the_regions_of_a_cohort_are_written_and_reported(cohort, regions):
    table = regions.table
    assert list(table["split"]) == ["train", "validation", "test"]
    for split in table["split"]:
        assert regions.ids(split) == cohort.ids(split)
    for case_id in table.index:
        prepared, centre = cohort.prepared(case_id), regions.centre(case_id)
        for kind, volume in zip(("image", "label"), prepared, strict=True):
            voxels = regions.volume(case_id, kind)
            assert isinstance(voxels, np.memmap) and voxels.shape == (16, 24, 24) and voxels.dtype == np.uint8
            cut, kept = crop_region(volume, centre, (96, 120, 120)), regions.image(case_id, kind)
            np.testing.assert_array_equal(voxels, sitk.GetArrayFromImage(cut))
            assert sitk.Hash(kept) == sitk.Hash(cut)
            assert [kept.GetOrigin(), kept.GetSpacing(), kept.GetDirection()] == [
                cut.GetOrigin(),
                cut.GetSpacing(),
                cut.GetDirection(),
            ]
        assert regions.spacing_mm(case_id) == (6.0, 5.0, 5.0)
        truth = centroid(cohort.case(case_id).label)
        assert table["centre_distance_mm"][case_id] == pytest.approx(
            np.linalg.norm(np.subtract(truth, centre)), abs=0.01
        )
        inside, whole = regions.volume(case_id, "label").sum(), sitk.GetArrayFromImage(prepared.label).sum()
        assert table["covered"][case_id] == pytest.approx(inside / whole, abs=1e-5)
        parts = [[table[f"{part}_{axis}"][case_id] for axis in "xyz"] for part in ("coarse", "heads")]
        parts = [part for part in parts if np.isfinite(part).all()]
        np.testing.assert_allclose(centre, np.mean(parts, axis=0), atol=1e-3)
        assert (len(parts) == 2) == (table["fallback"][case_id] == "")
    images, labels = regions.volumes("train")
    np.testing.assert_array_equal(images[0], regions.volume(cohort.ids("train")[0]))
    assert len(images) == len(labels) == 1 and set(np.unique(labels[0])) <= {0, 1}


@pytest.mark.slow
def test_no_label_has_a_say_in_where_a_region_lies(cohort, regions, tmp_path):
    """Every label is moved: centres stay what they are, only their distances change."""
    moved = tmp_path / "cohort"
    shutil.copytree(cohort.folder, moved)
    for path in [*moved.glob("labels/*"), *moved.glob("prepared/*_label.mha")]:
        label = sitk.ReadImage(str(path))
        shifted = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(label), 3, axis=0))
        shifted.CopyInformation(label)
        sitk.WriteImage(shifted, str(path))
    network = localization_network(regions)
    again = write_regions(Cohort.read(moved), network, tmp_path / "s", coarse_mm=8.0, region_mm=(96, 120, 120)).table
    centre = [f"centre_{axis}" for axis in "xyz"]
    pd.testing.assert_frame_equal(again[centre], regions.table[centre])
    assert (again["centre_distance_mm"] != regions.table["centre_distance_mm"]).all()


def localization_network(regions):
    from mupkg.stages.inference import load_localizer

    return load_localizer(regions.folder / "weights.safetensors")[0]


def test_when_a_case_fails_no_table_of_before_is_left(cohort, regions, tmp_path, monkeypatch):
    shutil.copytree(regions.folder, tmp_path / "stage1")
    heads_at(monkeypatch)
    with pytest.raises(ValueError, match=r"case phantom-.* cannot be located"):
        write_regions(cohort, NOTHING, tmp_path / "stage1", coarse_mm=8.0, region_mm=(96, 120, 120))
    with pytest.raises(ValueError, match=r"regions\.csv: there is no such table; run notebook 02"):
        Regions.read(tmp_path / "stage1")


def test_a_cohort_without_labelled_cases_of_a_split_is_refused_by_name(cohort):
    unlabelled = dataclasses.replace(cohort, table=cohort.table.assign(split=None))
    with pytest.raises(ValueError, match="has no labelled train cases"):
        localization.coarse_volumes(unlabelled, "train")


def test_regions_of_a_cohort_that_was_prepared_anew_are_refused(cohort, regions, tmp_path):
    assert Regions.read(regions.folder, cohort).table.equals(regions.table)
    shutil.copytree(cohort.folder, tmp_path / "anew")
    write_text(tmp_path / "anew" / FINGERPRINT, '{"cohort": "0123"}')
    anew = Cohort.read(tmp_path / "anew")
    with pytest.raises(
        ValueError, match=r"regions\.csv: its regions were not cut from .*anew.*; run notebook 02 again"
    ):
        Regions.read(regions.folder, anew)
    moved = dataclasses.replace(cohort, table=cohort.table.assign(split="train"))
    with pytest.raises(ValueError, match=r"phantom-\d+, phantom-\d+ no longer in its split.*notebook 00 if it"):
        Regions.read(regions.folder, moved)
    with pytest.raises(ValueError, match=r"phantom-\d+ no longer in its split"):
        Regions.read(regions.folder, dataclasses.replace(cohort, table=cohort.table.iloc[:2]))
    shutil.copytree(regions.folder, tmp_path / "stage1")
    (tmp_path / "stage1" / FINGERPRINT).unlink()
    with pytest.raises(ValueError, match=r"stage1/fingerprint\.json: does not tell the cohort .*run notebook 02"):
        Regions.read(tmp_path / "stage1", cohort)


def test_the_regions_fingerprint_is_of_the_table_and_its_volumes(regions, tmp_path):
    shutil.copytree(regions.folder, tmp_path / "stage1")
    copy = Regions.read(tmp_path / "stage1")
    assert copy.fingerprint() == regions.fingerprint()
    np.save(tmp_path / "stage1/regions/left.npy", np.zeros(3))  # of a case that is no longer there
    assert copy.fingerprint() == regions.fingerprint()
    np.save(tmp_path / "stage1/regions" / f"{regions.ids('test')[0]}_image.npy", np.zeros(3))
    assert copy.fingerprint() != regions.fingerprint()


def test_regions_of_one_fold_are_no_other_replicate_s(regions, tmp_path):
    """Regression: a stage 1 for all replicates was taken for every fold's own."""
    folder = tmp_path / "stage1"
    shutil.copytree(regions.folder, folder)
    for cut_for, told in ((None, "no replicate"), (1, "replicate 1")):
        (folder / "run.json").write_text(json.dumps({"parameters": {"replicate": cut_for}}))
        with pytest.raises(ValueError, match=f"cut for {told}, not for replicate 0; in a trial on folds set folds"):
            Regions.read(folder).of_replicate(0)
    assert Regions.read(folder).of_replicate(1).table.equals(regions.table)


def test_regions_of_a_fold_are_compared_with_that_fold_s_split(cohort, regions, tmp_path):
    shutil.copytree(regions.folder, tmp_path / "stage1")
    (tested,), (validated,) = regions.ids("test"), regions.ids("validation")
    order = [*(i for i in cohort.ids() if i not in (tested, validated)), validated, tested]
    folds = cohort.table.assign(fold_0=[order.index(i) for i in cohort.table.index], split=None)
    in_folds = dataclasses.replace(cohort, table=folds)
    now = {n: {*in_folds.of_replicate(n).ids("test")} for n in range(3)}
    assert now == {0: {order[0]}, 1: {validated}, 2: {tested}}
    for replicate in now:
        write_text(tmp_path / "stage1" / "run.json", json.dumps({"parameters": {"replicate": replicate}}))
        split = in_folds.of_replicate(replicate).table["split"]
        regions.table.assign(split=split).to_csv(tmp_path / "stage1" / "regions.csv", index=False)
        Regions.read(tmp_path / "stage1", in_folds)
        other = dataclasses.replace(in_folds, table=folds.assign(fold_0=(folds["fold_0"] + 1) % 3))
        with pytest.raises(ValueError, match="no longer in its split"):
            Regions.read(tmp_path / "stage1", other)


def test_a_replicate_s_regions_are_its_own_and_the_test_cases(regions):
    table = pd.concat([regions.table] * 2).reset_index(drop=True)
    table["case_id"] = [f"{case_id}-{n // 3}" for n, case_id in enumerate(table["case_id"])]
    table["replicate"] = [None if split == "test" else n // 3 for n, split in enumerate(table["split"])]
    both = dataclasses.replace(regions, table=table.set_index("case_id", drop=False))
    for replicate in (0, 1):
        own = both.of_replicate(replicate)
        assert own.ids("train") == [i for i in both.ids("train") if i.endswith(f"-{replicate}")] != []
        assert len(own.ids("validation")) == 1 and own.ids("test") == both.ids("test")
