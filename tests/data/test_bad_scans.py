"""Malformed scans, labels, files, DICOM series, tables and paths are refused before anything is written."""

from __future__ import annotations

import gzip
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from bad_scans import CORPUS, HUGE, huge_slices
from spoiling import MOST_MEMORY, ROOT, assert_refused, forget_peak, peak_memory, scan, stored


@pytest.mark.slow
@pytest.mark.parametrize("bad", CORPUS, ids=lambda bad: bad.id)
def test_it_is_refused_by_name_with_the_way_out_and_leaves_no_trace(bad, tmp_path):
    assert_refused(bad, tmp_path)


def test_the_corpus_is_large_and_every_entry_has_a_name_of_its_own():
    assert len({bad.id for bad in CORPUS}) == len(CORPUS) >= 60


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system's peak cannot be reset")
def test_a_peak_of_before_does_not_hide_one_of_now():
    bytes(2 * MOST_MEMORY)
    forget_peak()
    before = peak_memory()
    assert np.ones(MOST_MEMORY, np.uint8).all()
    assert peak_memory() - before > MOST_MEMORY // 2


# Headers that must not bring the process down


def with_little_memory(paths: Iterable[Path]) -> list[str]:
    """What reading each of these says, "" if it is read; by one process that may not ask for more than 256 MB."""
    script = f"""
import resource, sys
from mupkg.scans.files import read_scan
most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + {MOST_MEMORY}
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for path in sys.stdin.read().splitlines():
    print(path, end=": ", flush=True)
    try:
        read_scan(path)
        print(flush=True)
    except ValueError as error:
        print(repr(str(error)), flush=True)
"""
    command, names = [sys.executable, "-c", script], "\n".join(map(str, paths))
    done = subprocess.run(
        ["timeout", "60", *command], input=names, capture_output=True, text=True, errors="replace", cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} ended it: {done.stderr[-2000:]}"
    return [row.partition(": ")[2] for row in done.stdout.splitlines()]


only_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux holds a process to RLIMIT_AS"
)


@pytest.mark.slow
@only_linux
def test_a_huge_header_is_refused_before_any_memory_is_asked_for(tmp_path):
    for number, bad in enumerate(HUGE):
        bad.make(tmp_path / str(number))
    (huge := tmp_path / "series").mkdir()
    huge_slices(huge)
    said = with_little_memory([*(tmp_path / str(number) / bad.named for number, bad in enumerate(HUGE)), huge])
    assert len(said) == len(HUGE) + 1 and all("claims" in row for row in said), said


NASTY = [
    b"-1",
    b"0",
    b"99",
    b"513",
    b"2147483647",
    b"-2147483648",
    b"18446744073709551615",
    b"1e308",
    b"nan",
    b"",
    b"%n",
]
HEADERS = {".mha": b"LOCAL\n", ".mhd": b".raw\n", ".nrrd": b"\n\n", ".nii": None}  # what ends each


def mutation(header: bytes, rng: random.Random) -> bytes:
    """A bit, a byte, a number or a line of a header changed, dropped or told again."""
    at, lines, numbers = rng.randrange(len(header)), header.split(b"\n"), [*re.finditer(rb"-?\d+", header)]
    row, number = rng.randrange(len(lines)), rng.choice(numbers) if numbers else re.match(b"", header)
    return rng.choice(
        [
            lambda: header[:at] + bytes([header[at] ^ 1 << rng.randrange(8)]) + header[at + 1 :],
            lambda: header[:at] + header[at + rng.randint(1, 4) :],
            lambda: header[:at] + rng.randbytes(rng.randint(1, 4)) + header[at:],
            lambda: (
                header[:at]
                + rng.choice([b"\0\0\0\0", b"\xff" * 4, b"\xff\x7f" * 2, b"\0\0\xc0\x7f"])
                + header[at + 4 :]
            ),
            lambda: header[: number.start()] + rng.choice(NASTY) + header[number.end() :],
            lambda: b"\n".join([*lines[:row], *lines[row + 1 :]]),
            lambda: b"\n".join([*lines[:row], lines[row] * rng.choice([2, 100]), *lines[row:]]),
        ]
    )()


@pytest.mark.slow
@only_linux
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", HEADERS)
def test_no_change_to_a_header_brings_the_process_down(ending, compress, tmp_path):
    """ITK trusts some headers: NDims = -1 was a segmentation fault."""
    good = stored(scan(), tmp_path / f"good{ending}", compress=compress).read_bytes()
    mark = HEADERS[ending] if not (compress and ending == ".mhd") else b".zraw\n"
    size = 352 if mark is None else good.index(mark) + len(mark)
    rng, paths, pack = random.Random(0), [], gzip.compress if mark is None and compress else bytes
    for number in range(100):
        header = good[:size]
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            header = mutation(header, rng)
        paths.append(tmp_path / f"{number}{ending}{'.gz' * (pack is gzip.compress)}")
        paths[-1].write_bytes(pack(header + good[size:]))
    said = with_little_memory(paths)
    assert len(said) == len(paths)
    assert all(not row or str(tmp_path) in row for row in said), said  # each refusal names a file
