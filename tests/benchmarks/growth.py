"""How time and memory grow with the cohort, with k, and with the image; the exponents are fits on logarithms."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import exponent, isolated, memory_mb, seconds
from metric_loss import labelled_patches

from mupkg.data.cohort import TABLE, Cohort
from mupkg.data.patches import PatchSource
from mupkg.losses import SegmentationMetricLoss, VoxelMetricLoss
from mupkg.models import SegmentationOutput, UNet
from mupkg.report import figures
from mupkg.samplers import RandomSampler
from mupkg.scans.writing import save_table
from mupkg.stages.prediction import predict_volume
from mupkg.stages.regions import Regions

RESULTS = Path(__file__).parent / "results"
REGION = (32, 51, 51)  # voxels of the quick study's regions
BATCHES = 50


def median_ms(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    return 1e3 * statistics.median(seconds(call) for _ in range(repeats))


def write_table(folder: Path, cases: int) -> list[str]:
    """A cohort's table, whose scans are empty files: only notebook 00 reads them. Returns the cases' names."""
    ids = [f"case-{number:05d}" for number in range(cases)]
    table = {"case_id": ids, "split": ["validation", "test", *["train"] * (cases - 2)]}
    for kind in ("image", "label"):
        table[kind] = [f"{kind}s/{i}.nii.gz" for i in ids]
        (folder / f"{kind}s").mkdir()
        for name in table[kind]:
            (folder / name).touch()
    save_table(pd.DataFrame(table), folder / TABLE, index=False)
    return ids


def write_study(folder: Path, cases: int) -> None:
    """A cohort's table and stage 1's regions."""
    ids = write_table(folder, cases)
    centres = {f"centre_{axis}": 0.0 for axis in "xyz"}
    geometry = {"origin": "[0, 0, 0]", "spacing": "[1, 1, 1]", "direction": "[1, 0, 0, 0, 1, 0, 0, 0, 1]"}
    pd.DataFrame({"case_id": ids, "split": "train", "fallback": "", **centres, **geometry}).to_csv(
        folder / "regions.csv", index=False
    )
    rng = np.random.default_rng(0)
    (folder / "regions").mkdir()
    for case_id in ids:
        np.save(folder / "regions" / f"{case_id}_image.npy", rng.integers(0, 256, REGION, dtype=np.uint8))
        np.save(folder / "regions" / f"{case_id}_label.npy", rng.integers(0, 2, REGION, dtype=np.uint8))


def of_a_cohort(folder: str, threads: int) -> dict:
    """Reading a cohort, opening its regions, and batches from them; memory without the pages of mapped files."""
    torch.set_num_threads(threads)
    before = memory_mb("RssAnon")
    reading = seconds(lambda: Cohort.read(folder))
    volumes: list = []
    opening = seconds(lambda: volumes.extend(Regions.read(folder).volumes("train")))
    source = PatchSource(*volumes, patch_size=(48, 48), batch_size=16)
    first = seconds(lambda: source.batch(0))
    batches = [seconds(lambda step=step: source.batch(step)) for step in range(1, BATCHES)]
    source.batch(source.epoch_length // source.batch_size + 1)  # the next epoch
    own = memory_mb("RssAnon")
    return {
        "read the cohort's table": 1e3 * reading,
        "open all regions": 1e3 * opening,
        "the epoch's plan and the first batch": 1e3 * first,
        "a batch": 1e3 * statistics.median(batches),
        "own_mb": own,
        "added_mb": own - before,
    }


def of_the_loss(anchors: int, edge: int, batch: int, threads: int) -> dict:
    """Random sampling, metric loss and backward; peak MB above the embeddings and their gradient."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, labels = labelled_patches(batch, edge)
    embeddings = torch.rand(batch, 256, edge, edge).to(memory_format=torch.channels_last).requires_grad_()
    loss = SegmentationMetricLoss([RandomSampler(anchors)], VoxelMetricLoss())
    output = SegmentationOutput(torch.zeros(batch, 2, edge, edge), embeddings)
    idle = memory_mb("VmRSS")
    return {"ms": median_ms(lambda: loss(output, labels).total.backward()), "idle_mb": idle}


def of_prediction(edge: int, slices: int, filters: int, threads: int) -> dict:
    """`predict_volume` on slices of one size, ms for each; at the paper's width."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = UNet(3, filters, 8 * filters).to(memory_format=torch.channels_last)
    volume = np.random.default_rng(0).integers(0, 256, (slices, edge, edge), dtype=np.uint8)
    idle = memory_mb("VmRSS")
    return {"ms": median_ms(lambda: predict_volume(network, volume), 2) / slices, "idle_mb": idle}


def measured(quick: bool, threads: int) -> pd.DataFrame:
    """One row a measurement: series, what grows, its size, ms, and MB above the idle process."""
    rows = []

    def add(series: str, grows: str, size: int, ms: float, mb: float | None = None) -> None:
        rows.append({"series": series, "grows": grows, "size": size, "ms": ms, "mb": mb})

    for cases in (10, 30) if quick else (10, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            write_study(Path(folder), cases)
            found = isolated(of_a_cohort, folder, threads)
        for part in list(found)[:4]:
            add(part, "cases of the cohort", cases, found[part])
        for part, memory in (("all of it", "added_mb"), ("the whole process", "own_mb")):
            add(part, "cases of the cohort", cases, sum(list(found.values())[:4]), found[memory])
    for anchors in (20, 200) if quick else (20, 60, 200, 600, 2000):
        found = isolated(of_the_loss, anchors, 64, 4, threads)
        add("sampler and metric loss", "anchors k", anchors, found["ms"], found["peak_mb"] - found["idle_mb"])
    for edge in (32, 64) if quick else (64, 128, 256, 512):
        found = isolated(of_the_loss, 20, edge, 1, threads)
        add("sampler and loss of one patch", "image edge", edge, found["ms"], found["peak_mb"] - found["idle_mb"])
        found = isolated(of_prediction, edge, max(1, 512 // edge), 4 if quick else 32, threads)
        add("prediction of one slice", "image edge", edge, found["ms"], found["peak_mb"] - found["idle_mb"])
    return pd.DataFrame(rows)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """The exponents of time and memory of every series; NaN where no memory was measured."""
    return pd.DataFrame(
        {
            "series": series,
            "grows": grows,
            "time": exponent(found["size"], found["ms"]),
            "memory": exponent(found["size"], found["mb"]) if (found["mb"] > 0).all() else float("nan"),
        }
        for (series, grows), found in table.groupby(["series", "grows"], sort=False)
    )


def plot(table: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Time above, memory below, a column for each thing that grows; both axes logarithmic."""
    kinds = list(table["grows"].unique())
    figure, axes = plt.subplots(2, len(kinds), figsize=(4.5 * len(kinds), 7), layout="constrained", squeeze=False)
    for line, (value, fit, name) in enumerate((("ms", "time", "time (ms)"), ("mb", "memory", "memory (MB)"))):
        for ax, kind in zip(axes[line], kinds, strict=True):
            for one in fits[fits["grows"] == kind].itertuples():
                found = table[table["series"] == one.series].dropna(subset=value)
                if len(found):
                    label = f"{one.series}: exponent {getattr(one, fit):.2f}"
                    ax.plot(found["size"], found[value], "o-", label=label)
            ax.set(xscale="log", yscale="log", xlabel=kind, ylabel=name)
            ax.legend(fontsize=7)
    return figure


def growth(repeats: int, quick: bool = False) -> list[dict]:
    """A row a series with its exponents; every measurement goes to growth.csv, the picture to growth.png and .svg."""
    return kept(measured(quick, torch.get_num_threads()), None if quick else "growth")


def kept(table: pd.DataFrame, name: str | None) -> list[dict]:
    """A row a series with its exponents; the table and its picture go to results under this name, if there is one."""
    fits = exponents(table)
    if name:
        save_table(table.round(4), RESULTS / f"{name}.csv", index=False)
        figures.save(plot(table, fits), RESULTS / f"{name}.png")
    rows = []
    for fit in fits.itertuples():
        found = table[table["series"] == fit.series]
        note = f"time grows with exponent {fit.time:.2f}"
        note += "" if np.isnan(fit.memory) else f", memory with {fit.memory:.2f}"
        last = found.iloc[-1]
        what = f"{fit.series}, {fit.grows} {found['size'].iloc[0]} to {last['size']}"
        rows.append({"what": what, "ours_ms": last["ms"], "ours_mb": last["mb"], "note": note})
    return rows
