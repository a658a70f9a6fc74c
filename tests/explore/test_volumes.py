"""ipyniivue gets what it should show; itkwidgets is never imported where it would do harm."""

import io
import subprocess
import sys
import urllib.error
import urllib.request
from http.client import BadStatusLine
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
import SimpleITK as sitk

from mupkg.explore import volumes
from mupkg.explore.panels import CaseViewer
from mupkg.explore.predictions import CasePredictions

TRUTH = np.zeros((6, 8, 10), np.uint8)
TRUTH[2:4, 2:6, 3:8] = 1


@pytest.fixture
def seen() -> CasePredictions:
    heat = {"UNet": TRUTH * np.float32(0.9), "MetricUNet-H": TRUTH * np.float32(0.7)}
    return CasePredictions("made up", TRUTH * 200, TRUTH == 1, (3.0, 2.0, 1.0), {}, heat)


def read_back(content: bytes, tmp_path) -> sitk.Image:
    (tmp_path / "volume.nii.gz").write_bytes(content)
    return sitk.ReadImage(str(tmp_path / "volume.nii.gz"))


def test_volumes_keep_voxels_and_spacing(tmp_path):
    volume = np.random.default_rng(0).integers(0, 256, (4, 5, 6)).astype(np.uint8)
    image = read_back(volumes.nifti(volume, (3.0, 2.0, 1.0)), tmp_path)
    assert image.GetSpacing() == (1.0, 2.0, 3.0)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), volume)


def test_every_run_has_a_view_with_four_layers_and_the_sliders_reach_them(seen, tmp_path):
    view = CaseViewer(seen)
    assert view.widget
    assert len(view.volumes.views) == 2
    for niivue, heat in zip(view.volumes.views, seen.heat.values(), strict=True):
        region, glow, cut, edge = niivue.volumes
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_back(region.data, tmp_path)), seen.region)
        for layer in (glow, cut):
            shown = sitk.GetArrayFromImage(read_back(layer.data, tmp_path)) / 255
            np.testing.assert_allclose(shown, heat, atol=0.5 / 255 + 1e-6)
        inner = np.zeros_like(TRUTH)
        inner[2:4, 3:5, 4:7] = 1  # the contour is one within each slice
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read_back(edge.data, tmp_path)), TRUTH - inner)
    view.threshold.value, view.opacity.value, view.slice.value = 0.3, 0.8, 5
    for niivue in view.volumes.views:
        assert niivue.volumes[2].cal_min == pytest.approx(0.3 * 255) and niivue.volumes[1].opacity == pytest.approx(
            0.8
        )
        assert niivue.scene.crosshair_pos[2] == pytest.approx(5.5 / 6)


def test_a_place_in_mm_is_a_slice(seen):
    viewer = volumes.NiivueViewer(seen)
    for mm, z in ((-4.0, 0), (0.0, 0), (1.4, 0), (1.6, 1), (15.0, 5), (99.0, 5)):
        viewer._located({"frac": [0.5, 0.5, 0.5], "mm": [0, 0, mm, 1]})
        assert seen.slice.value == z


def test_a_click_keeps_its_place_in_the_plane_and_reaches_all_runs(seen):
    view = CaseViewer(seen)
    assert view.widget
    view.volumes._located({"frac": [0.2, 0.7, 0.9], "mm": [1.0, 2.0, 15.0, 1.0]})  # as a click in a coronal plane
    assert view.slice.value == 5
    assert [v.scene.crosshair_pos for v in view.volumes.views] == [pytest.approx([0.2, 0.7, 5.5 / 6])] * 2
    view.slice.value = 0
    assert view.volumes.views[0].scene.crosshair_pos == pytest.approx([0.2, 0.7, 0.5 / 6])


def test_itkwidgets_outside_jupyterlab_is_refused_without_importing_it(seen, monkeypatch, capsys):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    volumes.show_itkwidgets(seen)
    line = capsys.readouterr().out
    assert "itkwidgets works in JupyterLab only" in line and line.count("\n") == 1
    assert "itkwidgets" not in sys.modules


def test_itkwidgets_that_is_not_installed_is_named_with_the_cure(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "x")
    monkeypatch.setattr(volumes.importlib.util, "find_spec", lambda name: None)
    assert 'pip install -c constraints.txt -e ".[itkwidgets]"' in volumes.why_no_itkwidgets()


@pytest.fixture
def in_lab_with_itkwidgets(monkeypatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "x")
    monkeypatch.setattr(volumes.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize("missing", volumes.ITK_FILES)
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError("no route"), "no route"),
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.HTTPError("", 504, "gateway timeout", None, None), "504"),
        (BadStatusLine("<html>log in</html>"), "log in"),
    ],
    ids=["no route", "silent", "error", "not HTTP"],
)
def test_one_host_that_does_not_answer_is_one_line_and_no_import(
    in_lab_with_itkwidgets, seen, monkeypatch, capsys, missing, error, words
):
    def answer(url, timeout):
        assert timeout < 10
        if url == missing:
            raise error
        return io.BytesIO()

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    volumes.show_itkwidgets(seen)
    line = capsys.readouterr().out
    assert f"{missing} does not answer" in line and words in line and line.count("\n") == 1
    assert "itkwidgets" not in sys.modules


def test_itkwidgets_is_used_where_all_of_it_is_there(in_lab_with_itkwidgets, monkeypatch):
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO())
    assert volumes.why_no_itkwidgets() == "" and asked == list(volumes.ITK_FILES)
    assert len({urlsplit(url).hostname for url in asked}) == 4


def test_itkwidgets_gets_voxels_with_their_spacing_and_the_slice_that_is_chosen(seen, monkeypatch):
    shown = {}
    monkeypatch.setattr(volumes, "why_no_itkwidgets", str)
    viewer = SimpleNamespace(view=lambda image, **given: shown.update(image=image, **given))
    monkeypatch.setitem(sys.modules, "itkwidgets", viewer)
    ngff = SimpleNamespace(to_ngff_image=lambda array, dims, scale: (array, dims, scale))
    monkeypatch.setitem(sys.modules, "ngff_zarr", ngff)
    seen.slice.value = 2
    volumes.show_itkwidgets(seen)
    assert shown["z_slice"] == 6.0
    for name, expected in {"image": seen.region, "label_image": TRUTH}.items():
        array, dims, scale = shown[name]
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == np.uint8 and dims == ["z", "y", "x"] and scale == {"z": 3.0, "y": 2.0, "x": 1.0}


@pytest.mark.slow
def test_nothing_of_the_package_imports_a_viewer_before_it_is_asked_for():
    code = "import sys; import mupkg.explore.workbench, mupkg.explore.volumes, mupkg.explore.samplers_and_film; "
    code += "slow = ('itkwidgets', 'ipyniivue', 'jscatter', 'ipyevents', 'umap', 'openTSNE'); "
    code += "print([name for name in slow if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
