"""Files are whole or not there."""

import pytest

from mupkg.data.writing import whole_file, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="broke off"), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("broke off")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in path.parent.iterdir()] == ["table.csv"]


def test_until_the_end_the_file_is_not_there(tmp_path):
    with whole_file(tmp_path / "scan.nii.gz") as temporary:
        temporary.write_text("whole")
        assert temporary.name.endswith(".nii.gz") and temporary.parent == tmp_path
        assert not (tmp_path / "scan.nii.gz").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]
