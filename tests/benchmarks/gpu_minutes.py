"""E1 at full width in ten minutes of one NVIDIA GPU, on a machine with PyTorch and NumPy and no network.

    python tests/benchmarks/gpu_minutes.py pack gpu_minutes.zip    here: all that it needs besides, below 64 MB
    python gpu_minutes.zip run OUT --minutes 8                     there, with the same Python; again to go on

OUT, below 64 MB, then holds the speeds that `bench.py --device cuda` measures and of every training history.csv,
metrics.csv (a row a test case, on the 1 mm grid) and run.json: for tables, and no verdict. A training that was broken
off goes on from its checkpoint, which lies there, too. All replicates have one training set, as many phantoms of E1
as fit, so that they differ in their seed alone. Their regions are centred on the label: there is no stage 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from itertools import cycle, product
from pathlib import Path
from typing import Any

HERE, LIMIT_MB = Path(__file__).parent, 64
CARRIED = ("accelerate", "filelock", "jaxtyping", "packaging", "pandas", "psutil", "python-dateutil", "PyYAML")
CARRIED += ("safetensors", "scipy", "six", "tqdm", "wadler-lindig")  # what training, metrics and bench.py import
BENCH = ("bench.py", "measuring.py", "metric_loss.py", "training.py")
ARMS = {"UNet": "UNet", "HCP": "MetricUNet-HCP"}
ORDER = ("train", "test", "train", "validation", "train", "test", "train", "train", "test")  # of phantoms, repeated
# E1's rate and its last 30 % of the steps; the rest is the paper's
AT_FULL_WIDTH = {"steps": 4000, "validate_every": 500, "learning_rate": 0.1, "choose_from": 0.7}


def python() -> str:
    """For which Python compiled packages are."""
    return f"Python {'.'.join(platform.python_version_tuple()[:2])} on {platform.system()} {platform.machine()}"


# Here


def packages() -> Iterator[tuple[str, bytes]]:
    """The files of `CARRIED` as they are installed here, but for their tests."""
    for name in CARRIED:
        for file in distribution(name).files:
            if ".." not in file.parts and file.suffix != ".pyc" and "tests" not in file.parts:
                yield file.as_posix(), Path(file.locate()).read_bytes()


def phantoms(size: str) -> Iterator[tuple[str, bytes]]:
    """Regions of E1's phantoms, those of its first replicate: name and npz, image and label uint8 (z, y, x)."""
    import numpy as np
    import SimpleITK as sitk

    from mupkg.data.build import sources_of_replicates
    from mupkg.data.preprocessing import Grid, Preparation, centroid, crop_region, prepare
    from mupkg.parameters import SIZES

    grid = SIZES[size]["cohort"]
    sources = sources_of_replicates(1_000_000, 1, 32, 100, grid["phantom_spacing_mm"])
    waiting = {split: iter([s for s in sources if s.columns["split"] == split]) for split in ORDER}
    for split in cycle(ORDER):
        if (source := next(waiting[split], None)) is None:
            return
        image, label = prepare(source.read(), Preparation(spacing_mm=grid["spacing_mm"]))
        parts = (crop_region(part, centroid(label), Grid().region_mm) for part in (image, label))
        file = io.BytesIO()
        np.savez_compressed(file, *(sitk.GetArrayFromImage(part) for part in parts))
        yield f"regions/{split}/{source.case_id}.npz", file.getvalue()


def pack(parcel: Path, size: str, most: int) -> None:
    """Write the parcel; as many phantoms as fit, but at most so many."""
    from mupkg.parameters import SIZES

    settings = SIZES[size]["stage2"] | (AT_FULL_WIDTH if size == "paper" else {})
    about = {
        "python": python(),
        "size": size,
        "settings": settings,
        "spacing_mm": SIZES[size]["cohort"]["spacing_mm"],
    }
    with zipfile.ZipFile(parcel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("parcel.json", json.dumps(about, indent=2))
        archive.write(__file__, "__main__.py")
        for path in sorted((HERE.parents[1] / "mupkg").rglob("*.py")):
            archive.write(path, f"code/{path.relative_to(HERE.parents[1]).as_posix()}")
        for name in BENCH:
            archive.write(HERE / name, f"code/{name}")
        for name, content in packages():
            archive.writestr(f"site/{name}", content)
        number = 0
        for name, content in phantoms(size):
            if number == most or archive.fp.tell() + len(content) > (LIMIT_MB - 2) * 1e6:
                break
            archive.writestr(name, content, zipfile.ZIP_STORED)
            number += 1
            print(f"{name}: {archive.fp.tell() / 1e6:.1f} MB", flush=True)
    print(f"{parcel}: {number} phantoms, {parcel.stat().st_size / 1e6:.1f} MB, for Python {about['python']}")


# There


class TimeIsUp(Exception):
    """Raised within a training, which goes on from its last checkpoint the next time."""


@dataclass
class Machine:
    """The unpacked parcel, what it says, and until when its trainings may run."""

    folder: Path
    about: dict[str, Any]
    device: str
    end: float  # of time.monotonic()

    def check(self, *_: Any) -> None:
        if time.monotonic() > self.end:
            raise TimeIsUp

    def volumes(self, split: str) -> dict[str, list]:
        """Image and label of every phantom of a split."""
        import numpy as np

        files = sorted((self.folder / "regions" / split).glob("*.npz"))
        return {file.stem: [*np.load(file).values()] for file in files}


def unpacked(parcel: Path, folder: Path) -> dict[str, Any]:
    """What the parcel says; its code and packages can then be imported, before any that are installed.

    Raises:
        SystemExit: if its packages were compiled for another Python or processor.
    """
    with zipfile.ZipFile(parcel) as archive:
        about = json.loads(archive.read("parcel.json"))
        if about["python"] != python():
            raise SystemExit(
                f"the parcel is for {about['python']}, this is {python()}; start it with that Python, or pack it "
                "where this one is"
            )
        archive.extractall(folder)
    places = [str(folder / "code"), str(folder / "site")]
    sys.path[:0] = places
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    return about


def measure_speed(machine: Machine, out: Path) -> None:
    """`bench.py`, once; of a smoke parcel one of its benchmarks, small."""
    from bench import ON_A_GPU

    names = ["loader", "--quick"] if machine.about["size"] == "smoke" else [*ON_A_GPU]
    command = [sys.executable, str(machine.folder / "code" / "bench.py"), "--device", machine.device, *names]
    left_s = max(1, machine.end - time.monotonic())
    done = subprocess.run(command, capture_output=True, text=True, timeout=left_s)
    if done.returncode:
        raise SystemExit(f"bench.py failed:\n{done.stdout}\n{done.stderr}")
    kept = machine.folder / "code" / "results"
    kept.mkdir(exist_ok=True)
    (kept / "bench.txt").write_text(done.stdout, encoding="utf-8")
    shutil.move(kept, out)


def train_and_test(machine: Machine, arm: str, seed: int, run: Path) -> None:
    """One training and its test cases; what tables need stays, weights and checkpoint go."""
    import pandas as pd
    import torch

    from mupkg.configurations import build, configuration
    from mupkg.data.patches import PatchSource
    from mupkg.metrics import calibration, segmentation_metrics
    from mupkg.scans.writing import save_table
    from mupkg.stages.prediction import mean_dice, predict_volume
    from mupkg.stages.runs import BEST, CHECKPOINT, LAST, METRICS_CSV, RUN, load_tensors, load_weights, write_json
    from mupkg.stages.training import train

    settings, cuda = machine.about["settings"], machine.device == "cuda"
    torch.manual_seed(seed)
    sizes = {name: settings[name] for name in ("base_filters", "embedding_dim")}
    network, loss = build(configuration(ARMS[arm]), **sizes)
    patches = {"patch_size": (settings["patch_size"],) * 2, "batch_size": settings["batch_size"], "seed": seed}
    source = PatchSource(*zip(*machine.volumes("train").values(), strict=True), **patches)
    watched = [[*part] for part in zip(*machine.volumes("validation").values(), strict=True)]
    options = {name: settings[name] for name in AT_FULL_WIDTH} | {"precision": "bf16" if cuda else "no", "seed": seed}
    options |= {"validate": lambda n: mean_dice(n, *watched, channels=3), "on_step": machine.check}
    history = train(network, loss, source, run, metadata={"arm": arm, **settings}, **options)
    load_weights(network, load_tensors(run / BEST)[0], run / BEST)
    rows = []
    for case_id, (image, label) in machine.volumes("test").items():
        probability, truth = predict_volume(network, image), label == 1
        row = segmentation_metrics(probability > 0.5, truth, spacing_mm=machine.about["spacing_mm"])
        rows.append({"case_id": case_id} | {f"{k}_all": v for k, v in row.items()} | calibration(probability, truth))
    seconds = (history["seconds"] * history["step"].diff().fillna(history["step"])).sum()
    record = {"arm": arm, "seed": seed, "settings": settings, "training_seconds": round(float(seconds), 1)}
    record |= {"device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"}
    record |= {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if cuda else {}
    cases = {split: len(machine.volumes(split)) for split in sorted({*ORDER})}
    write_json(run / RUN, record | {"torch": torch.__version__, "cases": cases})
    for name in (BEST, LAST, CHECKPOINT):
        (run / name).unlink(missing_ok=True)
    table = save_table(pd.DataFrame(rows).round(5), run / METRICS_CSV, index=False)
    print(f"{run.name}: {seconds:.0f} s, mean DSC {table['DSC_all'].mean():.3f}", flush=True)


def run(parcel: Path, out: Path, minutes: float, replicates: int, device: str) -> None:
    """Speeds, then replicate after replicate until the time is up."""
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()  # else a training would take the GPU by itself
    with tempfile.TemporaryDirectory() as scratch:
        machine = Machine(Path(scratch), unpacked(parcel, Path(scratch)), device, end)
        try:
            if not (out / "bench").exists():
                measure_speed(machine, out / "bench")
            for seed, arm in product(range(replicates), ARMS):
                machine.check()
                if not (out / f"{arm}-seed{seed}" / "metrics.csv").exists():
                    train_and_test(machine, arm, seed, out / f"{arm}-seed{seed}")
        except (TimeIsUp, subprocess.TimeoutExpired):
            finished = len([*out.glob("*-seed*/metrics.csv")])
            print(f"{minutes:g} minutes are over: {finished} training(s) in {out}; start it again to go on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the parcel, in the suite's environment")
    packing.add_argument("parcel", type=Path)
    packing.add_argument("--size", default="paper", choices=("smoke", "quick", "paper"))
    packing.add_argument("--phantoms", type=int, default=132, dest="most", help="at most; else as many as fit")
    running = commands.add_parser("run", help="on the machine with the GPU")
    running.add_argument("out", type=Path)
    running.add_argument("--minutes", type=float, default=8)
    running.add_argument("--replicates", type=int, default=20, help="at most")
    running.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    given = vars(parser.parse_args())
    if given.pop("command") == "pack":
        pack(**given)
    else:
        run(HERE, **given)  # within the parcel, this file's folder is the parcel itself


if __name__ == "__main__":
    main()
