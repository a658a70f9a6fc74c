"""Ours against what a user would take instead, side by side in one run: `make bench`.

    python tests/benchmarks/bench.py [NAME ...] [--quick] [--threads N] [--device cuda]

With a GPU those of `ON_A_GPU` run there; they need PyTorch, NumPy, pandas and Accelerate, no peer and no SimpleITK.

Every comparison is interleaved (ours, peer, ours, peer, ...), because a machine's speed drifts; the ratio is the
median of the pairs' ratios and the spread their quartiles. Each table is kept under results/ with device and date.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from mupkg.scans.writing import save_table, write_text

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {  # and the module of each; imported when it runs, so that nobody needs every peer
    "metric_branch": "metric_loss",
    "cost": "metric_loss",
    "against_all_pairs": "metric_loss",
    "step": "metric_loss",
    "patches": "against_peers",
    "metrics": "against_peers",
    "processor": "processor",
    "training_loop": "training",
    "loader": "training",
    "repeating": "training",
    "growth": "growth",
    "at_scale": "at_scale",
    "whole_chain": "whole_chain",
    "exploring": "exploring",
}
ON_A_GPU = ("metric_branch", "cost", "step", "training_loop", "loader")
TWO_THREADS = ("whole_chain",)  # minutes on one
COLUMNS = {
    "benchmark": "the function of tests/benchmarks that measured it; its first line says what and by which bar",
    "what": "the work",
    "peer": "who did the same work beside ours, or with which of our own variants it is compared",
    "ours_ms": "median milliseconds, ours",
    "peer_ms": "the peer's; empty where there is none or it did not finish (see note)",
    "ratio": "ours / peer: the median over interleaved pairs; below 1 ours is faster",
    "quartiles": "of the pairs' ratios",
    "repeats": "pairs; empty where every side ran once, or five times in a process of its own",
    "ours_mb": "peak memory in MB: the process's in `metrics` and `whole_chain`, else what it adds to an idle one",
    "peer_mb": "the peer's",
    "note": "what else there is to say",
}


def in_words(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows).reindex(columns=list(COLUMNS))


def as_markdown(table: pd.DataFrame, command: str, device: str) -> str:
    """The table with what is needed to read it: command, device, date, and what each column is."""
    lines = [f"# {date.today():%Y-%m-%d}, {device}", "", f"`{command}`", ""]
    lines += [f"- `{name}`: {said}" for name, said in COLUMNS.items()]
    shown = [name for name in COLUMNS if name != "repeats"]
    lines += ["", f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
    for found in table.to_dict("records"):
        cells = [found[name] for name in shown]
        lines.append(
            "| "
            + " | ".join("" if pd.isna(c) else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
            + " |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all of them")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help=f"of PyTorch; {', '.join(TWO_THREADS)}: at least 2")
    parser.add_argument("--quick", action="store_true", help="small versions, to see that they run; nothing is kept")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=f"of {', '.join(ON_A_GPU)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    cuda = arguments.device == "cuda"
    arguments.names = arguments.names or list(ON_A_GPU if cuda else BENCHMARKS)
    if cuda and (elsewhere := set(arguments.names) - set(ON_A_GPU)):
        parser.error(f"{', '.join(sorted(elsewhere))}: not on a GPU, where there are {', '.join(ON_A_GPU)}")
    os.environ["ACCELERATE_USE_CPU"] = str(not cuda).lower()  # else a training would take the GPU by itself
    rows = []
    for name in arguments.names:
        started = time.perf_counter()
        torch.set_num_threads(max(2, arguments.threads) if name in TWO_THREADS else arguments.threads)
        options = {"device": arguments.device} if name in ON_A_GPU else {}
        benchmark = getattr(importlib.import_module(BENCHMARKS[name]), name)
        found = benchmark(arguments.repeats, arguments.quick, **options)
        rows += [{"benchmark": name, **row} for row in found]
        print(in_words(rows).tail(len(found)).dropna(axis=1, how="all").round(4).to_string(index=False))
        print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)
        if not arguments.quick:
            keep(rows, arguments)  # at once: a later one may fail


def keep(rows: list[dict], arguments: argparse.Namespace) -> None:
    """Write what has been measured so far as CSV, and as a table to read."""
    processor = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()} CPU"
    threads = f"{arguments.threads} thread(s), in {', '.join(TWO_THREADS)} {max(2, arguments.threads)}"
    device = f"{processor}, {threads}, {platform.system()}, PyTorch {torch.__version__}"
    whole = arguments.names == list(ON_A_GPU if arguments.device == "cuda" else BENCHMARKS)
    stem = "-".join([arguments.device, platform.machine(), f"{arguments.threads}thread", f"{date.today():%Y-%m-%d}"])
    stem += "" if whole else "-" + "-".join(arguments.names)
    save_table(in_words(rows).round(5), RESULTS / f"{stem}.csv", index=False)
    command = " ".join(["python tests/benchmarks/bench.py", *([] if whole else arguments.names)])
    command += f" --threads {arguments.threads} --repeats {arguments.repeats} --device {arguments.device}"
    write_text(RESULTS / f"{stem}.md", as_markdown(in_words(rows), command, device))
    print(f"kept in tests/benchmarks/results/{stem}.csv and .md", flush=True)


if __name__ == "__main__":
    main()
