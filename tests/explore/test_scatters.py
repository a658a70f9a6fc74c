"""A cohort's voxels in one view and in one file: what is there, how it is chosen, and that nothing is mixed up."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mupkg.explore import scatters
from mupkg.explore.predictions import Cases
from mupkg.explore.scatters import CohortExplorer
from mupkg.explore.voxels import draw_split, embedded, patch, voxels_table
from mupkg.models import UNet
from mupkg.report.embeddings import principal_axes
from mupkg.report.figures import CHOSEN
from mupkg.stages.voxels import KINDS


class AllTested(Cases):
    """Every case of the smoke study counts as a test case, so that there are several."""

    def __init__(self, regions, networks):
        super().__init__(regions, networks)
        self.table["split"] = "test"


@pytest.fixture(scope="module")
def cases(regions):
    torch.manual_seed(0)
    return AllTested(regions, {name: UNet(3, 2, 4).eval() for name in ("UNet", "MetricUNet-H")})


@pytest.fixture(scope="module")
def explorer(cases):
    explorer = CohortExplorer(cases, per_kind=20)
    assert explorer.widget
    return explorer


@pytest.mark.slow
def test_all_cases_lie_in_one_plane_that_is_fitted_on_all(explorer, cases):
    assert set(explorer.table["case"]) == set(cases.table.index) and len(cases.table) == 3
    for name in explorer.names:
        sample = embedded(explorer.table, name)
        assert len(sample.embedding) == len(explorer.table)
        expected = principal_axes(sample).transform(sample.embedding)
        np.testing.assert_allclose(explorer.points[name], expected)
        for row in range(0, len(explorer.table), 17):  # each voxel has its own case's embedding
            case_id, z, y, x = explorer.table.loc[row, ["case", "z", "y", "x"]]
            case = cases.open(case_id)
            np.testing.assert_allclose(sample.embedding[row], case.embedding(name, z)[y, x], rtol=1e-4, atol=1e-5)
            assert explorer.table.loc[row, f"p {name}"] == case.heat[name][z, y, x]


def test_a_brush_chooses_a_case_a_kind_and_a_region_of_errors(explorer):
    case_id = explorer.case.options[2]
    explorer.case.value, explorer.kind.value = case_id, "contour"
    table = explorer.table
    expected = np.flatnonzero((table["case"] == case_id) & (table["kind"] == "contour"))
    assert explorer.rows.tolist() == expected.tolist() and len(expected)
    assert [sorted(s.widget.selection) for s in explorer.scatters] == [expected.tolist()] * 2
    explorer.case.value = explorer.kind.value = "all"
    assert not len(explorer.rows)
    worst = table[["error UNet", "error MetricUNet-H"]].max(axis=1)
    low, high = round(float(worst.quantile(0.4)), 2), round(float(worst.quantile(0.9)), 2)
    explorer.error.value = (low, high)
    assert explorer.rows.tolist() == np.flatnonzero((worst >= low) & (worst <= high)).tolist()
    assert 0 < explorer.patches.value.count("<img") <= scatters.PATCHES
    explorer.error.value = (0, 1)


def test_a_lasso_in_one_scatter_chooses_in_the_other_and_the_mouse_is_told(explorer):
    first, second = explorer.scatters
    second.widget.selection = np.array([9, 4])
    assert explorer.rows.tolist() == [4, 9] == sorted(first.widget.selection)
    assert "2 of" in explorer.status.value and explorer.patches.value.count("<img") == 2
    first.widget.hovering = 4
    row = explorer.table.loc[4]
    assert row["case"] in explorer.words.value and f"{row['z']}, {row['y']}, {row['x']}" in explorer.words.value


@pytest.mark.parametrize("colour", ["case", "error", "probability", "kind"])
def test_points_take_a_colour_by_what_is_chosen(explorer, colour):
    explorer.colour.value = colour
    shown = explorer.scatters[0].widget.points[:, 2]
    if colour == "case":
        ranked = explorer.cases.worst_first(explorer.runs.names)
        np.testing.assert_allclose(shown, explorer.table["case"].map(ranked.index) / 2, atol=1e-6)
        assert "worst" in explorer.legend.value
    elif colour == "kind":
        assert len(np.unique(shown)) == len(KINDS)
    else:
        column = {"error": "error UNet", "probability": "p UNet"}[colour]
        np.testing.assert_allclose(shown, explorer.table[column], atol=1e-6)


def test_other_runs_come_into_the_same_view(regions):
    networks = {}
    for n, name in enumerate("xyz"):
        torch.manual_seed(n)
        networks[name] = UNet(3, 2, 4).eval()
    explorer = CohortExplorer(Cases(regions, networks), per_kind=10)
    assert list(explorer.points) == ["x", "z"]
    explorer.runs.lists[0].value = "y"
    assert list(explorer.points) == ["y", "z"] and "error y" in explorer.table


def test_without_a_browser_it_is_a_picture(explorer):
    for rows, patches in (([], 0), (np.arange(30), scatters.PATCHES // 2)):
        explorer.choose(rows)
        axes = explorer.figure.axes
        assert sum(ax.axison for ax in axes) == 6  # two scatters a run, and a colour bar for kinds and for errors
        assert sum(bool(ax.images) for ax in axes) == patches


def test_a_split_without_cases_is_refused(cases):
    with pytest.raises(ValueError, match="there is no validation case with prostate"):
        CohortExplorer(cases, split="validation")


def test_the_table_has_a_row_a_voxel_and_run_that_says_where_it_lies_in_the_scan(cases, regions, tmp_path):
    table = voxels_table(cases, per_kind=10)
    drawn, _ = draw_split(cases, per_kind=10)
    assert len(table) == 2 * len(drawn) and not table.duplicated(["case", "run", "z", "y", "x"]).any()
    for row in table.sample(20, random_state=0).itertuples():
        index = (row.x, row.y, row.z)
        image, label = regions.image(row.case), regions.image(row.case, "label")
        expected = image.TransformIndexToPhysicalPoint([int(i) for i in index])
        np.testing.assert_allclose((row.x_mm, row.y_mm, row.z_mm), expected)
        assert row.label == label[[int(i) for i in index]]
        case = cases.open(row.case)
        assert row.probability == case.heat[row.run][row.z, row.y, row.x]
        np.testing.assert_allclose(row.embedding, case.embedding(row.run, row.z)[row.y, row.x], rtol=1e-4, atol=1e-5)
        pixels = np.asarray(Image.open(io.BytesIO(row.thumbnail)))
        np.testing.assert_array_equal(pixels, patch(case, (row.z, row.y, row.x)))


def test_a_parquet_of_it_says_the_same(explorer):
    explorer.kind.value = "contour"
    chosen = explorer.rows
    path = explorer.keep.click() or explorer.save()
    assert path.name == f"voxels_3-cases_contour-{len(chosen)}_UNet_MetricUNet-H.parquet"
    saved = pd.read_parquet(path)
    assert set(saved["kind"]) == {"contour"} and len(saved) == 2 * len(chosen)
    for row in (0, len(saved) - 1):  # the nearest of the same run, by hand
        mine = saved[saved["run"] == saved.loc[row, "run"]].drop(index=row)
        distances = np.linalg.norm(np.stack(mine["embedding"]) - saved.loc[row, "embedding"], axis=1)
        near = saved.loc[row, "neighbors"]
        np.testing.assert_allclose(near["distances"], np.sort(distances)[:10], rtol=1e-4, atol=1e-5)
        assert row not in near["ids"] and set(saved.loc[near["ids"], "run"]) == {saved.loc[row, "run"]}
    assert saved["thumbnail"].iloc[0].startswith(b"\x89PNG") and len(saved["embedding"].iloc[0]) == 4


@pytest.fixture(autouse=True)
def _written_elsewhere(explorer, tmp_path):
    explorer.folder = tmp_path


def test_a_patch_is_the_slice_around_its_voxel_also_at_the_border(cases):
    case = cases.open()
    z = case.widest
    pixels = patch(case, (z, 0, 0))
    reach = (np.array(pixels.shape[:2]) - 1) // 2
    assert (
        pixels[tuple(reach)] == [round(255 * v) for v in (0xB2 / 255, 0x1A / 255, 1.0)]
    ).all() and CHOSEN == "#B21AFF"
    assert not pixels[: reach[0]].any() and not pixels[:, : reach[1]].any()  # beyond the region
    inside = case.region[z, : reach[0] + 1, : reach[1] + 1]
    grey = case.kind[z, : reach[0] + 1, : reach[1] + 1] != KINDS.index("contour")
    grey[0, 0] = False  # the voxel itself
    np.testing.assert_array_equal(pixels[reach[0] :, reach[1] :, 0][grey], inside[grey])
