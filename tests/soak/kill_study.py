"""Kill a smoke study and a smoke trial again and again with SIGKILL, and compare them with undisturbed ones.

    python tests/soak/kill_study.py FOLDER [--kills 20] [--seed 0]      in an empty folder, or one that is not there

A kill takes Snakemake, papermill and the kernels at once, as a power cut would. Its moment is told by a file: a
notebook begins, a training has left its checkpoint, or a file is being written (its writer then stops before the
file takes its name, so that the kill surely falls into the writing). After each kill the study is started again.
Where the work that a moment falls into is done already, this is said, and the work is removed and done again. Every
file that bears a final name must be whole, and what was finished before a kill must not be made again. At the end
weights, tables and predictions must be those of the undisturbed study, to the bit. Times are left out.
The kills are listed in FOLDER/kills.csv, the files and how they compare in FOLDER/compared.csv.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import fnmatch
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import SimpleITK as sitk

from mupkg.scans import writing
from mupkg.stages.runs import load_tensors

ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable, "-m")
MARK = "MUPKG_SOAK"
OUT = "outputs/smoke"
STUDY, TRIAL = "smoke", "trials/smoke"  # of notebooks/studies
SAME, WHOLE, TIMED = "the same to the bit", "whole, not compared", "with times in it, not compared"
RENAMED = "        os.replace(temporary, path)\n"  # of `whole_file`: what was written takes its name
ORDER = "stop"  # a file beside the study's Snakefile: the pattern of temporary files whose writer stops before that
STOPS = f"""        _stop_if_told(temporary)
{RENAMED}"""
STOP = f"""

def _stop_if_told(temporary):
    import fnmatch, signal

    study = Path(os.environ[{MARK!r}]).resolve()
    pattern = (study / {ORDER!r}).read_text(encoding="utf-8") if (study / {ORDER!r}).exists() else ""
    if temporary.resolve().is_relative_to(study):
        if fnmatch.fnmatch(str(temporary.resolve().relative_to(study)), pattern):
            os.kill(os.getpid(), signal.SIGSTOP)
"""


@dataclass(frozen=True)
class Moment:
    """As soon as a file of this pattern is there that was not when the study was started, and `delay` seconds on."""

    notebook: str  # whose work it falls into
    folder: str  # of the executed notebook
    file: str  # a pattern, in this folder or below
    delay: float = 0.0

    @property
    def in_a_file(self) -> bool:
        return ".part." in self.file


def begins(notebook: str, folder: str, delay: float = 0.0) -> Moment:
    return Moment(notebook, folder, f"{notebook}_*.running.ipynb", delay)


def writes(notebook: str, folder: str, file: str) -> Moment:
    return Moment(notebook, folder, str(Path(file).with_name(f".*.part.{Path(file).name}")))


DATA, STAGE1, REPORT = "data/phantoms-smoke", f"{OUT}/stage1", f"{OUT}/report"
UNET, RUN = f"{OUT}/UNet-seed0", f"{OUT}/MetricUNet-HCP-seed0"
MOMENTS = (  # in the order of a study; every notebook at least once
    begins("00", DATA, 4.0),
    writes("00", DATA, ".making/images/*"),
    writes("00", DATA, ".making/prepared/*"),
    Moment("00", DATA, "cohort.csv"),
    begins("01", REPORT, 5.0),
    begins("02", STAGE1),
    writes("02", STAGE1, "*.safetensors"),
    Moment("02", STAGE1, "checkpoint.safetensors"),
    writes("02", STAGE1, "regions/*"),
    Moment("02", STAGE1, "regions.csv"),
    begins("03", UNET, 3.0),
    Moment("03", RUN, "film/000000.safetensors"),
    Moment("03", RUN, "checkpoint.safetensors", 0.05),
    writes("03", RUN, "*.safetensors"),
    writes("03", RUN, "predictions/*"),
    Moment("03", RUN, "metrics.csv"),
    begins("04", REPORT, 3.0),
    writes("04", REPORT, "*.csv"),
    begins("05", REPORT, 6.0),
    writes("05", REPORT, "*.svg"),
    begins("07", REPORT, 4.0),
    begins("08", REPORT, 6.0),
    begins("09", REPORT, 5.0),
)

T_DATA, T_OUT = "data/phantoms-smoke-trials", "outputs/smoke-trials"
FIRST_ARM, SECOND_ARM = f"{T_OUT}/UNet-seed0", f"{T_OUT}/HCNP-seed1000"
TRIAL_MOMENTS = (  # each with the notebook's own target, so that the runs come in this order
    writes("00", T_DATA, ".making/images/*"),
    Moment("02", f"{T_OUT}/stage1", "checkpoint.safetensors"),
    begins("03", FIRST_ARM, 3.0),
    Moment("03", FIRST_ARM, "metrics.csv"),
    Moment("03", SECOND_ARM, "checkpoint.safetensors", 0.05),
    writes("03", SECOND_ARM, "*.safetensors"),
    Moment("03", f"{T_OUT}/UNet-seed1", "checkpoint.safetensors"),
    writes("03", f"{T_OUT}/HCNP-seed1001", "predictions/*"),
    begins("10", f"{T_OUT}/report/smoke", 6.0),
    writes("10", f"{T_OUT}/report/smoke", "*.csv"),
)


def workplace(folder: Path) -> Path:
    """A copy of what a study runs, so that data, outputs and Snakemake's notes are its own; writers stop if told."""
    folder.mkdir(parents=True)
    shutil.copyfile(ROOT / "Snakefile", folder / "Snakefile")
    for name in ("notebooks", "mupkg"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    shutil.copytree(ROOT / "data" / "demo", folder / "data" / "demo")  # notebook 07 tests one of its runs
    copy = folder / Path(writing.__file__).relative_to(ROOT)
    before, after = copy.read_text(encoding="utf-8").split(RENAMED)
    # some temporary files live for 0.2 ms, too short to be seen and their writer stopped from outside
    copy.write_text(before + STOPS + after + STOP, encoding="utf-8")
    return folder


def start(
    folder: Path, targets: Sequence[str] = (), study: str = STUDY, python: Sequence[str] = PYTHON
) -> subprocess.Popen:
    """Start the study, or go on with it; what it says goes to study.log."""
    command = [*python, "snakemake", "--cores", "2", "--configfile", f"notebooks/studies/{study}.yaml"]
    command += ["--workflow-profile", "notebooks/studies/profiles/laptop", *targets]
    environment = os.environ | {MARK: str(folder), "CUDA_VISIBLE_DEVICES": "", "JPY_SESSION_NAME": ""}
    with (folder / "study.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(folder: Path, targets: Sequence[str] = (), study: str = STUDY, python: Sequence[str] = PYTHON) -> None:
    """Run the study to its end."""
    (folder / ORDER).unlink(missing_ok=True)
    process = start(folder, targets, study, python)
    try:
        if process.wait(timeout=900):
            raise AssertionError(f"the study failed:\n{(folder / 'study.log').read_text(encoding='utf-8')[-4000:]}")
    finally:
        kill(folder)


def alive(folder: Path) -> list[psutil.Process]:
    """Every process of this study, kernels in sessions of their own too: they all inherit the mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill(folder: Path) -> int:
    """SIGKILL to every process of the study until there is none; how many there were."""
    number = 0
    while processes := alive(folder):
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)  # all stand still before the first dies: nobody sees it happen
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
                number += 1
        psutil.wait_procs(processes, timeout=5)
    return number


def stamps(folder: Path, pattern: str) -> dict[Path, int]:
    """The files of a pattern, and when each was written; the folder may be a pattern too."""
    found, parent = {}, str(Path(pattern).parent)
    for place in folder.glob(parent) if "*" in parent else [folder / parent]:
        with suppress(FileNotFoundError):
            for name in fnmatch.filter(os.listdir(place), Path(pattern).name):  # quick: some files live for 0.2 ms
                with suppress(FileNotFoundError):
                    found[place / name] = (place / name).stat().st_mtime_ns
    return found


def stopped_while_writing(path: Path) -> bool:
    """Stop the process that writes this temporary file; False if the file is done by then, and it goes on."""
    with suppress(psutil.NoSuchProcess):
        writer = psutil.Process(int(path.name.split(".")[1]))
        writer.suspend()
        while writer.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            pass  # it takes the signal a little later
        if path.exists():
            return True
        writer.resume()
    return False


def executed(folder: Path, moment: Moment) -> dict[Path, int]:
    """The moment's notebook, if it has been run to its end, and when that was."""
    notebooks = stamps(folder, f"{moment.folder}/{moment.notebook}_*.ipynb")
    return {path: stamp for path, stamp in notebooks.items() if ".running." not in path.name}


def wait_for(folder: Path, moment: Moment, start_study: Callable[[], subprocess.Popen]) -> Path | None:
    """Start the study; the new file that tells the moment. None if its notebook, or the study, ended before it."""
    pattern = f"{moment.folder}/{moment.file}"
    before, executed_before = stamps(folder, pattern), executed(folder, moment)
    (folder / ORDER).write_text(pattern if moment.in_a_file else "", encoding="utf-8")
    process = start_study()
    while process.poll() is None:
        for path in (path for path, stamp in stamps(folder, pattern).items() if before.get(path) != stamp):
            if not moment.in_a_file or stopped_while_writing(path):
                time.sleep(moment.delay)
                return path if executed(folder, moment) == executed_before else None
        if executed(folder, moment) != executed_before:
            return None
        time.sleep(0.001 if moment.in_a_file else 0.02)
    return None


def undo(folder: Path, moment: Moment) -> None:
    """Remove what the moment's notebook has made, so that it is made again; of a folder of reports, the notebook."""
    if "report" in Path(moment.folder).parts:
        for path in executed(folder, moment):
            path.unlink()
    else:
        shutil.rmtree(folder / moment.folder, ignore_errors=True)


def finished(folder: Path) -> dict[Path, int]:
    """The files of what Snakemake takes for done, and when each was written: cohort, stage 1, and every run."""
    done, begun = (_noted(folder / ".snakemake" / kind) for kind in ("metadata", "incomplete"))
    places = {Path(name).parent for name in done - begun if "report" not in Path(name).parts}
    files = [path for place in places for path in (folder / place).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def _noted(folder: Path) -> set[str]:
    """The targets that Snakemake keeps a note of: their paths are the notes' names."""
    found = set()
    for path in folder.rglob("*") if folder.is_dir() else ():
        with suppress(binascii.Error, UnicodeDecodeError):
            found.add(base64.b64decode(path.name, altchars=b"-_", validate=True).decode())
    return found


def half_written(folder: Path) -> list[str]:
    """Files with a final name that cannot be read to their end."""
    faults = []
    for path in (path for top in ("data", "outputs") for path in (folder / top).rglob("*")):
        if path.is_dir() or path.name.startswith(".") or path.name.endswith(".running.ipynb"):
            continue
        try:
            read_whole(path)
        except Exception as error:  # noqa: BLE001 - whatever a reader says about a cut file
            faults.append(f"{path.relative_to(folder)}: {error}")
    return faults


def read_whole(path: Path) -> object:
    """A file's content, times left out; an exception if it is cut short."""
    match "".join(path.suffixes[-2:]) if path.name.endswith(".nii.gz") else path.suffix:
        case ".safetensors":
            tensors, metadata = load_tensors(path)
            for row in metadata.get("history", ()):
                row.pop("seconds")
            return metadata, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        case ".csv":
            table = pd.read_csv(path)
            assert path.read_bytes().endswith(b"\n")
            return table.drop(columns=[name for name in table if "seconds" in name]).to_csv()
        case ".nii.gz":
            return gzip.decompress(path.read_bytes())  # SimpleITK reads a cut one without a word
        case ".parquet":
            assert len(pd.read_parquet(path))
            return path.read_bytes()
        case ".mha":
            return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).tobytes()
        case ".npy":
            return np.load(path).tobytes()
        case ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        case ".ipynb":
            return nbformat.read(path, 4)
        case ".md" | ".yaml":
            text = path.read_text(encoding="utf-8")
            assert text.endswith("\n")
            return [line for line in text.splitlines() if not line.startswith("| written |")]
        case ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        case ".svg":
            assert path.read_text(encoding="utf-8").endswith("</svg>\n")
        case _:
            raise AssertionError("a kind of file that nobody writes")
    return None


def compared(folder: Path, wanted: Path) -> pd.DataFrame:
    """Every file of two finished studies, its kind and how it compares; whole pictures count as whole, no more."""
    rows = []
    names = [
        {p.relative_to(f) for top in ("data", "outputs") for p in (f / top).rglob("*") if p.is_file()}
        for f in (folder, wanted)
    ]
    visible, expected = ({name for name in some if not name.name.startswith(".")} for some in names)
    for name in sorted(visible | expected):
        if name not in visible & expected:
            outcome = "is in one of them only"
        elif name.suffix == ".ipynb" or name.name == "run.json":
            outcome = TIMED
        else:
            contents = [read_whole(place / name) for place in (folder, wanted)]
            outcome = "differs" if contents[0] != contents[1] else SAME if contents[0] is not None else WHOLE
        rows.append({"file": str(name), "kind": name.suffix, "outcome": outcome})
    return pd.DataFrame(rows)


def differences(table: pd.DataFrame) -> list[str]:
    """What is not the same: files that are not in both studies, or not to the bit."""
    return [f"{row.file}: {row.outcome}" for row in table.itertuples() if row.outcome not in (SAME, WHOLE, TIMED)]


def summary(table: pd.DataFrame) -> str:
    """How many files of which kinds compare how, a line an outcome."""
    lines = []
    for outcome, kinds in pd.crosstab(table["kind"], table["outcome"]).items():
        share = ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
        lines.append(f"  {kinds.sum()} {outcome}: {share}")
    return "\n".join(lines)


def says_nothing(folder: Path) -> list[str]:
    """Why a finished study would be the same whatever its weights are; nothing if it would not.

    That no prediction is empty and that the best weights came late. (Stage 1 is too short at this size to see a
    prostate: of it the weights alone are compared.)
    """
    faults = []
    for path in (folder / OUT).glob("*-seed0/predictions/*.nii.gz"):
        if not sitk.GetArrayFromImage(sitk.ReadImage(str(path))).any():
            faults.append(f"{path.relative_to(folder)}: is empty")
    for path in (folder / OUT).glob("*-seed0/history.csv"):
        scores = pd.read_csv(path)["validation_dsc"].dropna().tolist()
        if scores.index(max(scores)) == 0:
            faults.append(f"{path.relative_to(folder)}: the first validation was the best")
    return faults


def meet(folder: Path, moment: Moment, study: str) -> tuple[Path | None, int, set[Path]]:
    """Kill the study at this moment: the file that told it, how many processes, and whose work was done again for it.

    A moment that did not come before its notebook's end gets a second chance, in work that is done again.
    """
    undone = set()
    # the notebook alone: what ran beside it could be past its own moment
    targets = [f"{moment.folder}/{path.name}" for path in (ROOT / "notebooks").glob(f"{moment.notebook}_*.ipynb")]
    for delay in (moment.delay, moment.delay / 2):
        if executed(folder, moment):
            print(f"{moment.notebook} {moment.file}: is past; the notebook's work is done again", flush=True)
            undo(folder, moment)
            undone.add(folder / moment.folder)
        try:
            told_by = wait_for(folder, replace(moment, delay=delay), partial(start, folder, targets, study))
        finally:
            killed = kill(folder)
        if told_by:
            break
    return told_by, killed, undone


def kill_study(
    folder: Path, moments: Sequence[Moment], targets: Sequence[str] = (), study: str = STUDY
) -> pd.DataFrame:
    """Kill a study at these moments, one after the other, then let it end; a row for each kill.

    `redone` names what was finished at that kill and was made again afterwards.
    """
    rows, kept = [], []
    for number, moment in enumerate(moments, start=1):
        begun = time.monotonic()
        told_by, killed, undone = meet(folder, moment, study)
        kept = [{p: stamp for p, stamp in done.items() if not undone & {*p.parents}} for done in kept]
        files = [path for top in ("data", "outputs") for path in (folder / top).rglob("*") if path.is_file()]
        parts = [path for path in files if ".part." in path.name]
        row = {"kill": number, **asdict(moment), "met": told_by is not None}
        row |= {"told_by": told_by.name if told_by else "", "after_s": round(time.monotonic() - begun, 1)}
        row["processes"] = killed
        row["running"] = " ".join(sorted(path.name.split(".")[0] for path in files if ".running." in path.name))
        row["parts"] = " ".join(f"{path.name} ({path.stat().st_size})" for path in parts)
        row |= {"files": len(files) - len(parts), "half_written": "; ".join(half_written(folder))}
        rows.append(row)
        kept.append(finished(folder))
        print(", ".join(f"{name}: {value}" for name, value in row.items() if value != ""), flush=True)
    finish(folder, targets, study)
    for row, before in zip(rows, kept, strict=True):
        redone = [path for path, stamp in before.items() if not path.exists() or path.stat().st_mtime_ns != stamp]
        row |= {"done": len(before), "redone": " ".join(str(path.relative_to(folder)) for path in sorted(redone))}
    return pd.DataFrame(rows)


def chosen(kills: int, seed: int) -> list[Moment]:
    """That many moments in their order; fewer than all are drawn, one of each notebook first and one in a file."""
    drawn = random.Random(seed)
    shuffled = drawn.sample(MOMENTS, len(MOMENTS))
    first = list({moment.notebook: moment for moment in shuffled if not moment.in_a_file}.values())
    first = [next(moment for moment in shuffled if moment.in_a_file), *first]
    order = [*first, *(moment for moment in shuffled if moment not in first)]
    return sorted((order * (kills // len(order) + 1))[:kills], key=MOMENTS.index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=len(MOMENTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, tables, comparisons, faults = arguments.folder.resolve() / uuid.uuid4().hex[:8], [], [], []
    for study, moments in ((STUDY, chosen(arguments.kills, arguments.seed)), (TRIAL, TRIAL_MOMENTS)):
        whole, killed = (workplace(folder / study / name) for name in ("whole", "killed"))
        finish(whole, study=study)
        if cut := half_written(whole):  # or of a kind that is not known here: told before the kills, not after them
            sys.exit("\n".join(cut))
        tables.append(kill_study(killed, moments, study=study).assign(study=study))
        comparisons.append(compared(killed, whole).assign(study=study))
        faults += differences(comparisons[-1])
        print(f"{study}, killed {len(moments)} times and undisturbed:\n{summary(comparisons[-1])}", flush=True)
    table = pd.concat(tables)
    table.to_csv(arguments.folder / "kills.csv", index=False)
    pd.concat(comparisons).to_csv(arguments.folder / "compared.csv", index=False)
    faults += [fault for column in ("half_written", "redone") for fault in table[column] if fault]
    faults += says_nothing(folder / STUDY / "whole")
    faults += [f"{row.notebook} {row.file}: this moment did not come" for row in table[~table["met"]].itertuples()]
    faults += [f"kill {row.kill}: there was no process" for row in table[table["processes"] == 0].itertuples()]
    print(f"{table['met'].sum()} moments of {len(table)} came and were met")
    sys.exit("\n".join(faults) if faults else print("nothing is lost, half written or made twice"))


if __name__ == "__main__":
    main()
