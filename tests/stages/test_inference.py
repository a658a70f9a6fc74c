"""A trained run segments any scan on the scan's own grid, and needs nothing but its folder."""

import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import save_file
from scipy import ndimage

from mupkg.data.preprocessing import Preparation, crop_region, prepare, to_scan_grid
from mupkg.metrics import segmentation_metrics
from mupkg.scans.cases import Case
from mupkg.scans.files import read_scan
from mupkg.stages import inference
from mupkg.stages.inference import LOCALIZER, Pipeline, keep_largest, load_localizer, load_network, segment
from mupkg.stages.localization import Location
from mupkg.stages.runs import load_tensors, save_tensors
from mupkg.stages.training import BEST, LAST


@pytest.fixture(scope="module")
def scan(cohort):
    return cohort.case(cohort.ids("test")[0]).image


def array(image):
    return sitk.GetArrayFromImage(image)


def same_grid(a, b):
    return all(getattr(a, f"Get{p}")() == getattr(b, f"Get{p}")() for p in ("Size", "Spacing", "Origin", "Direction"))


def probability_of(voxels):
    image = sitk.GetImageFromArray(np.asarray(voxels, np.float32))
    image.SetSpacing((1.0, 2.0, 3.0))
    return image


# From a scan to a mask


@pytest.mark.slow
def test_a_mask_lies_on_the_scans_own_grid(scan, run_folder):
    mask = segment(scan, run_folder)
    assert same_grid(mask, scan) and mask.GetPixelID() == sitk.sitkUInt8
    assert set(np.unique(array(mask))) <= {0, 1}


def test_a_copy_of_the_run_elsewhere_says_the_same(scan, run_folder, copied, heads):
    probabilities = [array(Pipeline.load(folder)(scan).probability) for folder in (run_folder, copied)]
    np.testing.assert_array_equal(*probabilities)
    assert np.ptp(probabilities[0]) > 0
    for name in (LAST, "checkpoint.safetensors", "history.csv"):
        (copied / name).unlink()
    np.testing.assert_array_equal(array(Pipeline.load(copied)(scan).probability), probabilities[0])


def test_however_a_scan_is_stored_its_mask_is_the_same(scan, run_folder, bones):
    plain = segment(scan, run_folder)
    assert array(plain).sum() > 100
    turned = sitk.PermuteAxes(sitk.Flip(scan, (True, False, True)), (2, 0, 1))
    mask = segment(turned, run_folder)
    assert same_grid(mask, turned) and not same_grid(mask, plain)
    back = sitk.Resample(mask, plain, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert segmentation_metrics(array(back) > 0, array(plain) > 0, spacing_mm=(7, 6, 6))["DSC"] > 0.97


def test_a_mask_lies_within_its_region(scan, run_folder, bones):
    result = Pipeline.load(run_folder)(scan)
    region = result.probability
    assert region.GetSize() == (24, 24, 16)
    middle = region.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in region.GetSize()])
    np.testing.assert_allclose(middle, result.location.centre, atol=3.01)
    outside = sitk.Resample(region * 0 + 1, scan, sitk.Transform(), sitk.sitkNearestNeighbor, 0) == 0
    assert not array(sitk.And(result.mask, sitk.Cast(outside, sitk.sitkUInt8))).any()
    assert result.volume_ml == pytest.approx(array(result.mask).sum() * 7 * 6 * 6 / 1000)


def test_the_mask_is_the_largest_component_alone(scan, run_folder, bones):
    found = Pipeline.load(run_folder)(scan, everywhere=True)
    kept, everything = (array(mask) > 0 for mask in (found.mask, to_scan_grid(found.probability, scan)))
    assert 0 < kept.sum() < everything.sum() and not (kept & ~everything).any()


# Outward from the coarse mask


def balls(*centres_and_radii, shape=(30, 41, 52)):
    z, y, x = np.indices(shape)
    found = [((z - c) ** 2 + (y - b) ** 2 + (x - a) ** 2 <= r**2) for c, b, a, r in centres_and_radii]
    return np.any(found, axis=0).astype(np.float32)


@pytest.fixture
def outward(monkeypatch):
    """What stage 2 says when it begins at some box (voxels z, y, x), and how often it looked at each voxel."""

    def run(truth, start):
        looks = np.zeros(truth.shape, int)

        def look(network, volume, box, **_):
            assert all(edge.start % 2 == 0 for edge in box)
            looks[box] += 1
            return truth[box]

        monkeypatch.setattr(inference, "predict_volume", look)
        region = probability_of(truth) * 0
        region.SetSpacing((1.0, 1.0, 2.0))
        region.SetOrigin((-30.0, 5.0, 100.0))
        corners = [
            region.TransformContinuousIndexToPhysicalPoint([edge[end] - 0.5 for edge in start[::-1]])
            for end in (0, 1)
        ]
        return array(inference.region_probability(torch.nn.Identity(), region, "no", corners)), looks

    return run


@pytest.mark.parametrize(
    ("ball", "start"),
    [
        ((14, 20, 26, 6), ((10, 18), (16, 24), (22, 30))),  # inside the first look
        ((14, 20, 26, 11), ((14, 15), (20, 21), (26, 27))),  # the coarse mask saw a voxel of it
        ((3, 38, 48, 7), ((2, 4), (34, 38), (45, 47))),  # cut off by the region itself
        ((14, 20, 26, 6), ((19, 22), (25, 28), (29, 33))),  # off to a side
    ],
)
def test_stage_2_goes_outward_until_it_knows_the_largest_component(outward, ball, start):
    truth = balls(ball)
    found, looks = outward(truth, start)
    np.testing.assert_array_equal(found, truth)
    assert looks.max() == 1 and looks.mean() < 0.8
    around = ndimage.binary_dilation(truth > 0)
    assert looks[around].all()  # every neighbour was asked


def test_what_was_looked_at_grows_at_the_touched_faces_alone(outward):
    found, looks = outward(balls((14, 20, 36, 12)), ((10, 18), (12, 28), (24, 34)))
    columns = np.flatnonzero(looks.any(axis=(0, 1)))
    assert found.sum() == balls((14, 20, 36, 12)).sum() and columns.max() > 48
    assert columns.min() == 20  # 4 mm beside the start, where the ball does not reach


def test_a_larger_component_far_from_the_coarse_mask_is_not_seen(outward):
    """The one difference from looking everywhere: the component near the coarse mask is kept, not the larger one."""
    near, far = (8, 10, 10, 4), (20, 30, 40, 8)
    found, looks = outward(balls(near, far), ((6, 10), (8, 12), (8, 12)))
    np.testing.assert_array_equal(found, balls(near))
    assert looks.mean() < 0.2


@pytest.mark.parametrize(
    "start", [((2, 4), (2, 6), (2, 6)), ((90, 95), (2, 6), (2, 6)), ((-9, -7), (-40, -30), (0, 3))]
)
def test_where_there_is_nothing_the_whole_region_is_looked_at(outward, start):
    truth = balls((20, 30, 40, 8))
    found, looks = outward(truth, start)
    np.testing.assert_array_equal(found, truth)
    assert (looks == 1).all()
    nothing, looks = outward(truth * 0, start)
    assert not nothing.any() and (looks == 1).all()


def test_a_whole_probability_map_is_an_option(scan, run_folder, monkeypatch, heads):
    starts, box = [], ((0.0, 0.0, 0.0), (9.0, 9.0, 9.0))

    def look(network, region, precision, start):
        starts.append(start)
        return sitk.Cast(region, sitk.sitkFloat32) / 255

    monkeypatch.setattr(inference, "region_probability", look)
    monkeypatch.setattr(inference, "locate", lambda *_, **__: Location((0.0, 0.0, 0.0), None, None, "", box))
    pipeline = Pipeline.load(run_folder)
    for options in ({}, {"everywhere": True}):
        pipeline(scan, **options)
    assert starts == [box, None]


@pytest.mark.slow
def test_of_a_4d_scan_the_channel_that_the_run_was_trained_on_is_taken(scan, run_folder, heads, tmp_path):
    """Regression: "choose a channel" was said, where there was none to choose."""
    copied = shutil.copytree(run_folder, tmp_path / "run")
    tensors, metadata = load_tensors(copied / LOCALIZER)
    metadata["preparation"]["channel"] = 1
    save_tensors(tensors, copied / LOCALIZER, metadata)
    several = sitk.JoinSeries([scan * 0 + 40, scan])
    sitk.WriteImage(several, str(tmp_path / "several.nii.gz"))
    pipeline = Pipeline.load(copied)
    again = read_scan(tmp_path / "several.nii.gz", channel=pipeline.preparation.channel)
    for image in (several, again, scan):
        np.testing.assert_array_equal(array(segment(image, copied)), array(segment(scan, run_folder)))
    # Regression: an image of one channel failed on the way back to the scan's grid
    one = Pipeline.load(run_folder)(sitk.JoinSeries([scan]), name="P1").mask
    np.testing.assert_array_equal(array(one), array(segment(scan, run_folder)))
    with pytest.raises(ValueError, match=r"P1: has 1 channels, no channel 1; choose one from 0 to 0"):
        pipeline(sitk.JoinSeries([scan]), name="P1")
    with pytest.raises(ValueError, match=r"several\.nii\.gz: is 4D, .* choose a channel when the cohort is made"):
        read_scan(tmp_path / "several.nii.gz", channel=Pipeline.load(run_folder).preparation.channel)


def test_the_precision_of_stage_2_is_an_option(scan, run_folder, heads):
    plain, rounded = (Pipeline.load(run_folder)(scan, precision=precision) for precision in ("no", "bf16"))
    assert plain.location == rounded.location
    assert 0 < np.abs(array(plain.probability) - array(rounded.probability)).max() < 0.05
    np.testing.assert_array_equal(array(segment(scan, run_folder, precision="bf16")), array(rounded.mask))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda scan: scan * 0, "case P1: image: is constant"),
        (lambda scan: scan[:, :, :2], r"case P1: image: 2 slice\(s\)"),
        (lambda scan: sitk.Cast(scan + 1024, sitk.sitkUInt16), "case P1: image: .*no CT in HU"),
        (lambda scan: sitk.Log(sitk.Cast(scan, sitk.sitkFloat32)), "case P1: image: holds NaN"),
        (lambda scan: sitk.JoinSeries([scan, scan]), "case P1: image: .* no 3D volume"),
        (lambda scan: scan[:, :, 0], "case P1: image: .* no 3D volume"),
    ],
)
def test_a_scan_that_is_unfit_is_refused_by_name(scan, run_folder, spoil, fault):
    with pytest.raises(ValueError, match=fault):
        Pipeline.load(run_folder)(spoil(scan), name="P1")


@pytest.mark.parametrize(("image", "kind"), [("scan.nii.gz", "str"), (np.zeros((9, 9, 9), np.int16), "ndarray")])
def test_what_is_no_image_is_refused_with_how_to_read_one(run_folder, image, kind):
    with pytest.raises(
        TypeError, match=rf"must be a SimpleITK image, not {kind}; read it with mupkg.data.files.read_"
    ):
        segment(image, run_folder)


@pytest.mark.parametrize("pixel", [sitk.sitkInt32, sitk.sitkFloat64])
def test_the_type_of_the_voxels_does_not_matter(scan, run_folder, heads, pixel):
    """But for the rounding of a resampled int16."""
    pipeline = Pipeline.load(run_folder)
    np.testing.assert_allclose(
        array(pipeline(sitk.Cast(scan, pixel)).probability), array(pipeline(scan).probability), atol=0.02
    )


# Broken and foreign runs


@pytest.mark.parametrize("name", [LOCALIZER, BEST])
def test_a_missing_or_broken_part_is_named(scan, copied, name):
    path = copied / name
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}: cannot be read .*No such file"):
        segment(scan, copied)
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as a file of this suite"):
        segment(scan, copied)
    torch.save(load_tensors(copied / LAST)[0], path)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as a file of this suite"):
        segment(scan, copied)
    save_file(load_tensors(copied / LAST)[0], path)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as a file of this suite"):
        segment(scan, copied)


def test_the_weights_of_both_stages_are_not_taken_for_each_other(run_folder):
    with pytest.raises(ValueError, match=rf"{LOCALIZER}: holds weights of another network .*lacks configuration"):
        load_network(run_folder / LOCALIZER)
    with pytest.raises(ValueError, match=rf"{BEST}: holds weights of another network .*lacks filters"):
        load_localizer(run_folder / BEST)


def test_weights_that_do_not_fit_their_own_metadata_are_named(copied):
    tensors, metadata = load_tensors(copied / BEST)
    save_tensors(tensors, copied / BEST, metadata | {"configuration": "UNet++"})
    with pytest.raises(ValueError, match=rf"{BEST}: holds weights of another network"):
        load_network(copied / BEST)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("region_mm", v) for v in (None, 0, "x", 96.0, [96.0, 120.0], [96.0, -120.0, 120.0], [96.0, 120.0, 1e5])],
        *[("coarse_mm", v) for v in (None, 0, -4.0, "x", [8.0], 1e5, float("nan"), True)],
    ],
)
def test_a_grid_that_cannot_be_is_named_with_its_file(copied, name, value):
    tensors, metadata = load_tensors(copied / LOCALIZER)
    save_tensors(tensors, copied / LOCALIZER, metadata | {name: value})
    with pytest.raises(ValueError, match=rf"{LOCALIZER}: is broken \((?s:.*){name}(?s:.*)copy the file again"):
        Pipeline.load(copied)


@pytest.mark.parametrize("file", [LOCALIZER, BEST])
def test_weights_that_are_not_finite_are_refused_by_name(scan, copied, file):
    """Regression: NaN in the weights gave an empty mask without a word."""
    tensors, metadata = load_tensors(copied / file)
    tensors["head.1.bias"][1] = float("nan")
    save_tensors(tensors, copied / file, metadata)
    with pytest.raises(ValueError, match=rf"{file}: its head.1.bias is not finite"):
        segment(scan, copied)


# The largest component


def test_only_the_largest_component_keeps_its_probability():
    voxels = np.full((3, 6, 8), 0.3, np.float32)
    voxels[1, 1, 1:3], voxels[1, 4, 2:7], voxels[2, 4, 6] = 0.6, 0.9, 0.8
    kept = keep_largest(probability_of(voxels))
    expected = voxels.copy()
    expected[1, 1, 1:3] = 0
    np.testing.assert_array_equal(array(kept), expected)
    assert kept.GetSpacing() == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("value", [0.2, 0.5, 0.9])
def test_none_or_one_component_stays_as_it_is(value):
    voxels = np.full((3, 4, 5), value)
    np.testing.assert_array_equal(array(keep_largest(probability_of(voxels))), voxels.astype(np.float32))


def test_both_ways_to_a_region_are_one(cohort, regions, run_folder, monkeypatch):
    """A new scan goes the way a test case went: same preparation, same region."""
    (case_id,) = cohort.ids("test")
    case, centre = cohort.case(case_id), regions.centre(case_id)
    fed, coarse_mm = [], []

    def locate(*_, **told):
        coarse_mm.append(told["coarse_mm"])
        return Location(centre, None, None, "")

    monkeypatch.setattr(inference, "locate", locate)
    monkeypatch.setattr(
        inference, "predict_volume", lambda _, volume, box, **__: fed.append(volume) or volume[box] / np.float32(255)
    )
    Pipeline.load(run_folder)(case.image)
    assert coarse_mm == [8.0]
    np.testing.assert_array_equal(fed[0], regions.volume(case_id))


def test_an_mr_run_prepares_as_an_mr(copied, scan):
    tensors, metadata = load_tensors(copied / LOCALIZER)
    tensors["head.1.bias"] = torch.tensor([-99.0, 99.0])  # sees prostate everywhere
    preparation = Preparation(modality="MR", spacing_mm=(6.0, 5.0, 5.0))
    save_tensors(tensors, copied / LOCALIZER, metadata | {"preparation": preparation.model_dump(mode="json")})
    pipeline = Pipeline.load(copied)
    assert pipeline.preparation == preparation
    lifted = sitk.Cast(scan + 1100, sitk.sitkUInt16)
    result = pipeline(lifted)
    prepared = prepare(Case("mr", lifted, modality="MR"), preparation).image
    region = crop_region(prepared, result.location.centre, pipeline.region_mm)
    assert same_grid(result.probability, region) and same_grid(result.mask, lifted)
    assert result.location.fallback.startswith("coarse centre alone: MR")
