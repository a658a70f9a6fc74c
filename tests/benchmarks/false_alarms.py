"""How often normal theory errs in a trial of 100 cases and 20 replicates with E1's components: METHOD.md's rows.

python tests/benchmarks/false_alarms.py    writes outputs/reference/simulation/alarms.csv, two minutes
"""

from pathlib import Path

import numpy as np
import pandas as pd

from mupkg.report.results import save_table
from mupkg.trials.statistics import random_effects
from mupkg.trials.tables import MEASURED_BEFORE as E1

CASES, REPLICATES, TABLES, CHUNK, SEED, MARGIN = 100, 20, 20_000, 1000, 20261127, 0.01
SKEWNESS = 0.73  # of the replicates' means of HCP - UNet in E1; those of the other trials are .1 to .5
COLLAPSED, LOST = 0.05, 0.5  # share of an arm's runs that collapse, and the DSC that such a run loses


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A gamma distribution moved to mean 0 and scaled to variance 1."""
    k = 4 / SKEWNESS**2
    return (rng.gamma(k, size=shape) - k) / np.sqrt(k)


def collapsing(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal, and one arm collapses now and then; in units of the replicates' standard deviation."""
    return rng.standard_normal(shape) - LOST / np.sqrt(E1.replicate) * (rng.random(shape) < COLLAPSED)


def simulated(effects, mean: float = 0.0) -> dict[str, float]:
    """Percent of tables: false alarms, intervals that hold the true mean, and "equivalent" at the margin's ends."""
    rng, parts = np.random.default_rng(SEED), []
    for _ in range(TABLES // CHUNK):
        d = np.sqrt(E1.case) * normal(rng, (CHUNK, CASES, 1))
        d = d + np.sqrt(E1.replicate) * effects(rng, (CHUNK, 1, REPLICATES))
        found = random_effects(d + np.sqrt(E1.rest) * normal(rng, (CHUNK, CASES, REPLICATES)))
        low, high = found.interval
        ends = {}
        for name, shift in (("above", MARGIN - mean), ("below", -MARGIN - mean), ("as it is", 0.0)):
            at_end = type(found)(found.mean + shift, found.variance, found.df)
            ends[f"equivalent, {name}"] = at_end.p_equivalence(MARGIN) < 0.05
        parts.append(pd.DataFrame({"alarms": found.p < 0.05, "covered": (low < mean) & (mean < high)} | ends))
    return (100 * pd.concat(parts).mean()).round(1).to_dict()


def table() -> pd.DataFrame:
    rows = {
        "normal": simulated(normal),
        "skewed": simulated(skewed),
        "collapsing": simulated(collapsing, -COLLAPSED * LOST),
    }
    found = pd.DataFrame.from_dict(rows, orient="index").rename_axis("trials").reset_index()
    one, other, third = (found.loc[n] for n in range(3))
    ends = sorted((other["equivalent, above"], other["equivalent, below"]))
    found["sentence"] = [
        f"normal effects {one['alarms']} % false alarms, {one['covered']} % coverage, "
        f"{max(one['equivalent, above'], one['equivalent, below'])} % equivalent at the margin",
        f"skewed as E1's replicates are, {other['alarms']} % false alarms, and {ends[1]} % equivalent at one end of "
        f"the margin, {ends[0]} % at the other",
        f"one arm collapsing in {100 * COLLAPSED:.0f} % of its runs (true mean {-COLLAPSED * LOST:+.3f}), "
        f"{third['covered']} % coverage, and {third['equivalent, as it is']} % called equivalent",
    ]
    return found.assign(tables=TABLES, seed=SEED)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    print(save_table(table(), root / "outputs" / "reference" / "simulation" / "alarms.csv", index=False))
