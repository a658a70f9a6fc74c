"""Files are whole or not there, and a fingerprint tells what they hold."""

import os
import subprocess
import sys
import tempfile

import pytest
from filelock import Timeout

from mupkg.scans.writing import fingerprint, machine_lock, whole_file, write_text


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


def test_a_fingerprint_is_of_contents_alone(tmp_path):
    def cohort(name, **files):
        for file, text in files.items():
            path = tmp_path / name / f"{file}.mha"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return fingerprint(list((tmp_path / name).glob("*.mha"))[::-1])

    here = cohort("here", a="1", b="2")
    assert here == cohort("there", a="1", b="2") and len(here) == 16
    assert here != cohort("other", a="1", b="3")
    assert here != cohort("swapped", a="2", b="1")
    assert here != cohort("glued", a="12", b="")
    assert here != cohort("more", a="1", b="2", c="")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.mha: cannot be read \(No such file.*make it again"):
        fingerprint([tmp_path / "a.mha"])


def test_what_a_killed_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path):
    parts = [tmp_path / f".{pid}.part.scan[1].mha" for pid in (2**30, os.getppid())]  # no process has the first
    other = tmp_path / f".{2**30}.part.scan1.mha"
    for path in (*parts, other):
        path.write_text("half")
    with whole_file(tmp_path / "scan[1].mha") as temporary:
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["scan[1].mha", parts[1].name, other.name])


HOLD = """
import sys
from mupkg.scans.writing import machine_lock
with machine_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", HOLD, "a name"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"TMPDIR": str(tmp_path)}}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        with machine_lock("another name"), pytest.raises(Timeout):
            machine_lock("a name").acquire()
        holder.kill()
    with machine_lock("a name", timeout_s=5):
        assert all(path.name.startswith("mupkg-") for path in tmp_path.iterdir())
