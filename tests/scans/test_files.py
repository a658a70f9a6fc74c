"""Files are whole or not there; scans are read, or refused with the file's name and the way out."""

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mupkg.scans.files import read_scan, write_image


def volume(shape=(5, 8, 10), dtype=np.int16) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1000, shape).astype(dtype))
    image.SetSpacing((2.0, 3.0, 4.0))
    image.SetOrigin((-10.0, 20.0, 30.0))
    return image


def write_series(folder: Path, image: sitk.Image, *, uid="1.2.3.4", missing=()) -> None:
    """A DICOM series with file names that run against the slices' order."""
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in sorted(set(range(image.GetSize()[2])) - set(missing)):
        slice_ = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags = {"0008|0060": "CT", "0020|000d": "1.2.3", "0020|000e": uid, "0008|0018": f"{uid}.{z + 1}"}
        tags |= {"0020|0013": str(z), "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0032": "\\".join(map(str, position))}
        for key, value in tags.items():
            slice_.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}-{99 - z}.dcm"))
        writer.Execute(slice_)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.mha", "scan.nrrd", "scan.nii"])
def test_an_image_comes_back_as_it_was_written(tmp_path, name):
    write_image(volume(), tmp_path / name)
    again = read_scan(tmp_path / name)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(volume()))
    assert (again.GetSpacing(), again.GetOrigin()) == (volume().GetSpacing(), volume().GetOrigin())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_format_of_two_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scan\.mhd: would be two files; choose \.mha"):
        write_image(volume(), tmp_path / "scan.mhd")
    assert not list(tmp_path.iterdir())


def test_one_channel_of_a_4d_file(tmp_path):
    both = [volume(), volume() + 5]
    sitk.WriteImage(sitk.JoinSeries(both), str(tmp_path / "mr.nii.gz"))
    for channel, wanted in enumerate(both):
        image = read_scan(tmp_path / "mr.nii.gz", channel=channel)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(wanted))
        assert image.GetSpacing() == wanted.GetSpacing()
    with pytest.raises(ValueError, match=r"mr\.nii\.gz: is 4D, .* choose a channel"):
        read_scan(tmp_path / "mr.nii.gz")
    for channel in (2, -1):
        with pytest.raises(ValueError, match=rf"mr\.nii\.gz: has 2 channels, no channel {channel}"):
            read_scan(tmp_path / "mr.nii.gz", channel=channel)


@pytest.mark.parametrize("kind", [sitk.sitkFloat32, sitk.sitkFloat64])
def test_only_the_chosen_volume_must_hold_numbers(tmp_path, kind):
    good = sitk.Cast(volume(), kind)
    (bad := sitk.Image(good))[1, 2, 3] = np.nan
    sitk.WriteImage(sitk.JoinSeries([good, bad]), str(tmp_path / "mr.nii.gz"))
    found = read_scan(tmp_path / "mr.nii.gz", channel=0)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(good))
    with pytest.raises(ValueError, match=r"mr\.nii\.gz: 1 voxel\(s\) in it are NaN or infinite; export"):
        read_scan(tmp_path / "mr.nii.gz", channel=1)


def test_what_is_no_scan_is_refused_by_name(tmp_path):
    (tmp_path / "text.nii.gz").write_text("hello")
    sitk.WriteImage(volume()[:, :, 0], str(tmp_path / "flat.mha"))
    sitk.WriteImage(sitk.Compose(volume(), volume()), str(tmp_path / "vectors.mha"))
    (tmp_path / "empty").mkdir()
    for name, fault in {
        "text.nii.gz": "cannot be read as an image",
        "absent.nii.gz": "there is no such file",
        "flat.mha": "is 2D, .* no 3D volume of single values",
        "vectors.mha": "is 3D, .*, of vector of 16-bit signed integer: no 3D volume of single values",
        "empty": "holds no DICOM series",
    }.items():
        with pytest.raises(ValueError, match=fault) as error:
            read_scan(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_a_cut_off_file_is_refused(tmp_path):
    path = tmp_path / "scan.mha"
    write_image(volume((30, 30, 30)), path, compress=False)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"scan\.mha: cannot be read"):
        read_scan(path)


@pytest.mark.parametrize("place", ["file", "folder", "series"])
def test_what_may_not_be_read_says_so(tmp_path, place, monkeypatch):
    """Read as nobody, for root may read all; a closed file was told to be exported again."""
    (folder := tmp_path / "in").mkdir()
    write_image(volume(), folder / "scan.mha") if place != "series" else write_series(folder, volume())
    path = folder if place == "series" else folder / "scan.mha"
    shut = {"file": path, "folder": folder, "series": next(folder.iterdir())}[place]
    shut.chmod(0)
    if os.geteuid() == 0:
        opened, stat = Path.open, Path.stat

        def refuse(self, what, *args, **options):
            if self == shut or (shut in self.parents and place == "folder"):
                raise PermissionError(13, "Permission denied", str(self))
            return what(self, *args, **options)

        monkeypatch.setattr(Path, "open", lambda self, *args, **options: refuse(self, opened, *args, **options))
        if place == "folder":
            monkeypatch.setattr(Path, "stat", lambda self, **options: refuse(self, stat, **options))
    with pytest.raises(
        ValueError, match=r"in.*: cannot be read \(Permission denied\); give yourself read permission"
    ):
        read_scan(path)
    shut.chmod(0o700)


def test_one_slice_of_a_series_asks_for_its_folder(tmp_path):
    write_series(tmp_path, volume())
    with pytest.raises(ValueError, match=r"\.dcm: is one slice of a DICOM series; give the folder of the series"):
        read_scan(next(tmp_path.iterdir()))


def test_an_mhd_is_read_with_the_voxels_beside_it(tmp_path):
    for compress in (False, True):  # as PROMISE12 has them
        sitk.WriteImage(volume(), str(tmp_path / "scan.mhd"), useCompression=compress)
        again = read_scan(tmp_path / "scan.mhd")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(again), sitk.GetArrayFromImage(volume()))


def test_a_dicom_series_is_put_in_order_of_position(tmp_path):
    write_series(tmp_path, volume())
    image = read_scan(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(volume()))
    assert (image.GetSpacing(), image.GetOrigin()) == (volume().GetSpacing(), volume().GetOrigin())


def test_two_dicom_series_in_a_folder_are_not_mixed(tmp_path):
    write_series(tmp_path, volume())
    write_series(tmp_path, volume(), uid="1.2.3.5")
    with pytest.raises(ValueError, match=r"holds 2 DICOM series: .*exactly one"):
        read_scan(tmp_path)


def test_a_dicom_series_with_a_slice_missing_is_refused(tmp_path):
    """ITK stretches the slice distance over the gap and only warns."""
    write_series(tmp_path, volume(), missing=[2])
    with pytest.raises(ValueError, match="not evenly spaced"):
        read_scan(tmp_path)


def test_a_real_dicom_series_is_the_nifti_made_of_it(real_scan):
    series = read_scan(real_scan("mr_ucla/dicom/T2"))
    nifti = read_scan(real_scan("mr_ucla/UCLA0001_image.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(series), sitk.GetArrayFromImage(nifti))
    np.testing.assert_allclose(series.GetOrigin(), nifti.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(series.GetSpacing(), nifti.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(series.GetDirection(), nifti.GetDirection(), atol=1e-6)
