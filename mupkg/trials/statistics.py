"""Is a difference between two arms more than chance? Cases and replicates are both random draws.

An arm is a configuration, a replicate a seed (and training set) that all arms share. One model throughout, derived in
METHOD.md, "How a difference is judged": d(case, replicate) = difference + case + replicate + rest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import nctdtr, nctdtrinc
from scipy.stats import binomtest, false_discovery_control, permutation_test, rankdata, t, ttest_1samp, wilcoxon

from mupkg.metrics import METRICS, headline, metric_of
from mupkg.report.results import mostly_empty_on_test, trainings
from mupkg.stages.runs import run_name

LEVEL = 0.05  # of every test; intervals hold 95 %
POWER = 0.8  # a difference that counts as found is seen four times in five
FEW = 5  # with fewer cases or replicates Satterthwaite's approximation is too generous: up to 13 % false alarms
EQUIVALENT_DSC = 0.01  # of the DSC: a smaller difference does not matter
MARGINS = {"DSC": EQUIVALENT_DSC, "DSC_all": EQUIVALENT_DSC}  # without a margin, no equivalence
PILOT_SD = {"DSC": 0.010, "DSC_all": 0.010}  # of a difference over replicates: the least of a pilot, quick phantoms
SIGN_FLIPS = 20_000
FEWEST_SIGNS = 6  # replicates: with five, no choice of signs is rarer than 1 in 16
PAPERS_T_TEST = "paper's t-test over cases, one replicate"
ONE_REPLICATE = "one seed cannot tell the method from the draw of the seed"


# One difference


@dataclass(frozen=True)
class Estimate:
    """A mean difference, the variance of this mean, its degrees of freedom; arrays for a stack of tables.

    `case`, `replicate` and `rest` are the variance components, not below zero (NaN where they are not estimated).
    """

    mean: Any
    variance: Any = np.nan
    df: Any = np.nan
    case: Any = np.nan
    replicate: Any = np.nan
    rest: Any = np.nan

    @property
    def p(self) -> Any:
        """Two-sided p of no difference. Half of it is the chance, under a flat prior, that the sign is wrong."""
        return 2 * t.sf(np.abs(self.mean) / np.sqrt(self.variance), self.df)

    def p_equivalence(self, margin: float) -> Any:
        """p of the two one-sided tests (TOST, Schuirmann 1987) of a difference at least as large as the margin."""
        return t.sf((margin - np.abs(self.mean)) / np.sqrt(self.variance), self.df)

    @property
    def interval(self) -> tuple[Any, Any]:
        """The 95 % confidence interval."""
        return self.interval_at(1 - LEVEL)

    def interval_at(self, level: float) -> tuple[Any, Any]:
        """The confidence interval of this level; at 90 % it is what the two one-sided tests at 5 % stand for."""
        half = t.ppf((1 + level) / 2, self.df) * np.sqrt(self.variance)
        return self.mean - half, self.mean + half


def _variance_of_mean(ms_case: Any, ms_replicate: Any, ms_rest: Any, cases: Any, replicates: Any) -> tuple[Any, Any]:
    """Variance of the mean from the mean squares, and its degrees of freedom (Satterthwaite 1946)."""
    of_cases, of_replicates = np.maximum(cases - 1, 1), replicates - 1
    total, larger = ms_case + ms_replicate - ms_rest, np.maximum(ms_case, ms_replicate)
    parts = ms_case**2 / of_cases + ms_replicate**2 / of_replicates + ms_rest**2 / (of_cases * of_replicates)
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing varies
        df = np.where(total > larger, total**2 / parts, np.where(ms_case > ms_replicate, of_cases, of_replicates))
    fewer = np.where(cases > 1, np.minimum(cases, replicates), replicates)
    df = np.where(fewer < FEW, np.minimum(df, fewer - 1), df)
    return np.maximum(total, larger) / (cases * replicates), df[()]


def random_effects(table: Float[np.ndarray, "*stack cases replicates"]) -> Estimate:
    """The balanced two-way random-effects analysis of a table of differences, or of each of a stack of tables.

    A single row, one number a replicate, gives the t-test over replicates. Where all differences are the same there
    is nothing to test: variance and p are NaN.

    Raises:
        ValueError: with one replicate.
    """
    d = np.asarray(table, dtype=float)
    cases, replicates = d.shape[-2:]
    if replicates < 2:
        raise ValueError(f"{ONE_REPLICATE}: train at least {FEW} replicates of both arms")
    mean = d.mean((-2, -1), keepdims=True)
    by_case, by_replicate = d.mean(-1, keepdims=True) - mean, d.mean(-2, keepdims=True) - mean
    ms_case = replicates * (by_case**2).sum((-2, -1)) / max(cases - 1, 1)
    ms_replicate = cases * (by_replicate**2).sum((-2, -1)) / (replicates - 1)
    ms_rest = ((d - mean - by_case - by_replicate) ** 2).sum((-2, -1)) / (max(cases - 1, 1) * (replicates - 1))
    variance, df = _variance_of_mean(ms_case, ms_replicate, ms_rest, cases, replicates)
    same = _all_the_same(d, axis=(-2, -1))
    components = np.maximum(ms_case - ms_rest, 0) / replicates, np.maximum(ms_replicate - ms_rest, 0) / cases
    return Estimate(mean[..., 0, 0], np.where(same, np.nan, variance)[()], df, *components, ms_rest)


def _all_the_same(d: Float[np.ndarray, "..."], axis: int | tuple[int, ...]) -> Any:
    return np.ptp(d, axis=axis) <= 1e-9 * np.abs(d).max(axis)  # but for rounding


def one_replicate(table: Float[np.ndarray, "cases 1"], replicate_sd: float) -> Estimate:
    """The mean of one replicate, without a test, and components for `replicates_needed`.

    How far replicates spread cannot be seen in one, so a pilot's figure is taken. All that varies over the cases is
    taken for rest, which replicates average out: the number of replicates comes out as the least possible.
    """
    d = np.asarray(table, dtype=float)
    rest = d.var(ddof=1) if len(d) > 1 else np.nan
    return Estimate(d.mean(), case=0.0, replicate=replicate_sd**2, rest=rest)


def sign_flip(means: Float[np.ndarray, " replicates"]) -> float:
    """p of the sign-flip test of the replicates' mean differences: no normal theory, so a collapsed run may be in it.

    If nothing differs, each replicate's difference is as likely to have the other sign. p is the share of all 2^R
    choices of signs (of 20 000 draws, where R is above 14) with a mean as far from zero. It speaks of these test
    cases: METHOD.md, "Where normal theory is not enough".
    """
    options = {"permutation_type": "samples", "n_resamples": SIGN_FLIPS, "rng": 0}
    return float(permutation_test((means,), np.mean, **options).pvalue)


def nadeau_bengio(fold_differences: Float[np.ndarray, " trainings"], folds: int) -> Estimate:
    """The corrected resampled t-test (Nadeau & Bengio, Machine Learning 52, 2003), for repeated k-fold.

    Training sets that overlap are no independent replicates: the variance of the mean of J trainings is taken as
    (1/J + test cases / training cases) times their sample variance, with J - 1 degrees of freedom.

    Args:
        fold_differences: of each training the mean difference over its own test cases.
        folds: k, so test cases / training cases = 1 / (k - 1).

    Raises:
        ValueError: if the trainings are not whole repeats of k folds.
    """
    d = np.asarray(fold_differences, dtype=float)
    if folds < 2 or not len(d) or len(d) % folds:
        raise ValueError(f"{len(d)} trainings are not whole repeats of {folds} folds; train the missing folds")
    variance = np.nan if _all_the_same(d, axis=0) else d.var(ddof=1)
    return Estimate(d.mean(), (1 / len(d) + 1 / (folds - 1)) * variance, len(d) - 1)


# How large a trial must be


def promised(estimate: Estimate, margin: float) -> dict[str, float]:
    """What a trial with an estimate of this variance and df can say, whatever its mean turns out to be.

    Returns:
        `half_width` of the 95 % interval; `power_at_0.01`, ...: the chance to see such a difference; `equivalent`:
        about the chance of this verdict where nothing differs. Before Holm's correction.
    """
    error = np.sqrt(estimate.variance)
    seen = t.ppf(1 - LEVEL / 2, estimate.df)
    power = {f"power_at_{effect:g}": 1 - nctdtr(estimate.df, effect / error, seen) for effect in (0.01, 0.02)}
    equivalent = 2 * t.cdf(margin / error - t.ppf(1 - LEVEL, estimate.df), estimate.df) - 1
    return {"half_width": seen * error, **power, "equivalent": max(0.0, float(equivalent))}


def balanced(measured: Estimate, cases: Any, replicates: Any, arms: int = 1, against: int = 1) -> Estimate:
    """The variance and df that a balanced table of this size is to be expected to have.

    Args:
        measured: the components of a difference between two single arms, measured before.
        arms, against: how many arms either side is the mean of.
    """
    share = (1 / arms + 1 / against) / 2
    case, replicate, rest = (part * share for part in (measured.case, measured.replicate, measured.rest))
    parts = rest + replicates * case, rest + cases * replicate, rest
    return Estimate(0.0, *_variance_of_mean(*parts, cases, replicates), case, replicate, rest)


def smallest_effect(measured: Estimate, cases: Any, replicates: Any) -> Any:
    """The smallest difference that so many cases and replicates find at `POWER`, given components measured before."""
    size = balanced(measured, cases, replicates)
    return nctdtrinc(size.df, 1 - POWER, t.ppf(1 - LEVEL / 2, size.df)) * np.sqrt(size.variance)  # noncentral t


def replicates_needed(measured: Estimate, effect: float, cases: int) -> float:
    """How many replicates find this difference at `POWER`; inf: no number up to 1000, it takes more cases."""
    tried = range(2, 1001)  # the more, the smaller what they find
    if np.isnan(smallest_effect(measured, cases, tried[0]) * effect):
        return np.nan
    number = bisect_left(tried, -abs(effect), key=lambda n: -smallest_effect(measured, cases, n))
    return float(tried[number]) if number < len(tried) else np.inf


# Tables of runs: `metrics` is what results.case_metrics gives (configuration, seed, case_id, metrics)


def of_arms(metrics: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """The rows of these arms, which can be compared: the same cases in the same seeds and folds, each once.

    Raises:
        ValueError: if they cannot; it names every run and case that is missing, or there twice, or in two folds.
    """
    rows, run = metrics[metrics["configuration"].isin(arms)], ["configuration", "seed"]
    wanted = pd.MultiIndex.from_product([arms, *(sorted(rows[name].unique()) for name in ("seed", "case_id"))])
    times = rows.value_counts([*run, "case_id"]).reindex(wanted, fill_value=0).rename_axis([*run, "case_id"])
    odd = times[times != 1].rename("times").reset_index().groupby([*run, "times"])["case_id"]
    count = rows["case_id"].nunique()
    faults = [
        f"{run_name(arm, seed)} has {'every case' if len(cases) == count else ', '.join(map(str, cases))} {n} times"
        for (arm, seed, n), cases in odd
    ]
    if "fold" in rows:
        folds = rows.groupby(["seed", "case_id"])["fold"].nunique()
        faults += [f"{case} is in {n} folds of repeat {seed}" for (seed, case), n in folds[folds > 1].items()]
    if faults or rows.empty:
        raise ValueError(
            f"{', '.join(arms)}: all need the same seeds and cases, each once, but "
            f"{'; '.join(faults) or 'there is no run of them'}; train or test what is missing with notebook 03, or "
            "take that seed or case out of all"
        )
    return rows


def differences(metrics: pd.DataFrame, arm: str, against: str, metric: str) -> pd.DataFrame:
    """One metric of `arm` minus that of `against`: case x replicate; ValueError as `of_arms`."""
    return _differences(of_arms(metrics, (arm, against)), arm, against, metric)


def _differences(both: pd.DataFrame, arm: str, against: str, metric: str) -> pd.DataFrame:
    values = both.pivot_table(metric, "case_id", ["configuration", "seed"], dropna=False)
    return values[arm] - values[against]


def with_means(metrics: pd.DataFrame, means: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The table with every mean of several arms as an arm of its own, case by case and replicate by replicate.

    What failed in one arm fails in the mean.

    Args:
        means: `Trial.means`: pooled controls, and the levels of a design's factors.

    Raises:
        ValueError: as `of_arms`.
    """
    parts = [metrics]
    for name, arms in means.items():
        rows = of_arms(metrics, arms).drop(columns="configuration")
        of = rows.groupby([*trainings(rows), "case_id"], sort=False)
        mean = of.sum(min_count=len(arms)) / len(arms)
        parts.append(mean.reset_index().assign(configuration=name))
    return pd.concat(parts, ignore_index=True)


def aliases(levels: Mapping[str, Mapping[str, Sequence[str]]]) -> pd.Series:
    """With which interactions, of two or three other factors, each main effect is mixed: C × P, H × N × hinge, ...

    An interaction's contrast is the product of its factors' signs over the arms. Where this product goes along with
    the sign of another factor, an effect of that factor may as well be the interaction.
    """
    arms = sorted({arm for of in levels.values() for group in of.values() for arm in group})
    sign = {name: np.where(np.isin(arms, next(iter(of.values()))), 1, -1) for name, of in levels.items()}
    mixed_with = {
        name: [
            " × ".join(others)
            for order in (2, 3)
            for others in combinations([other for other in sign if other != name], order)
            if sign[name] @ np.prod([sign[other] for other in others], axis=0)
        ]
        for name in sign
    }
    return pd.Series({name: "; ".join(mixed) or "none" for name, mixed in mixed_with.items()}, name="mixed with")


def fold_differences(metrics: pd.DataFrame, arm: str, against: str, metric: str) -> pd.Series:
    """The mean difference of every training of a repeated k-fold: seed is the repeat, and there is a column `fold`.

    ValueError as `of_arms`.
    """
    values = of_arms(metrics, (arm, against)).set_index(["configuration", "seed", "fold", "case_id"])[metric]
    return (values[arm] - values[against]).groupby(["seed", "fold"]).agg(lambda d: d.mean(skipna=False))


def papers_t_test(table: pd.DataFrame) -> pd.Series:
    """p of the paper's test in each replicate alone: a paired t-test over cases.

    It takes the draw of the seed for an effect: METHOD.md says how often. Only to compare with.
    """
    testable = np.isfinite(table).all() & (table.max() > table.min())
    return pd.Series({seed: ttest_1samp(table[seed], 0).pvalue if testable[seed] else np.nan for seed in table})


def holm(p: Sequence[float]) -> Float[np.ndarray, " tests"]:
    """p adjusted so that the chance of any false alarm among these tests is at most 5 % (Holm 1979)."""
    smallest_first = pd.Series(np.asarray(p, dtype=float)).sort_values()
    return (smallest_first * np.arange(len(p), 0, -1)).cummax().clip(upper=1).sort_index().to_numpy()


def contrasts(
    metrics: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    *,
    margins: Mapping[str, float] = MARGINS,
    primary: str | None = None,
    means: Mapping[str, Sequence[str]] | None = None,
    descriptive: bool = False,
) -> pd.DataFrame:
    """Every pair (arm, against) on every metric: a row each, with its test, verdict and answer in one sentence.

    `p_adjusted` is Holm's over the contrasts on `primary`, Benjamini-Hochberg's (1995) over the rest;
    `p_equivalence_adjusted` likewise. The verdict rests on these two: "equivalent" if the difference is surely
    smaller than the margin, *even if it is surely not zero* (`answer` then says both); else "benefit" or "harm" if
    it is surely not zero; else "undecided". One replicate has no p, only the paper's, in a column that says so.
    Where a run of either side has collapsed, no equivalence is claimed, and `p_sign_flip` takes the place of p; in
    folds, or with fewer than six replicates, nothing is decided then.

    Failures are counted, never dropped in silence. An infinite distance makes the mean infinite and leaves no p; a
    case with a NaN (PPV without prediction) cannot be compared, and `cases` is how many could. `failed` and
    `failed_against` count both kinds; `collapsed` and `collapsed_against` count runs that are mostly empty on test
    scans, out of `runs` and `runs_against`; they stay in the mean.
    `p_rank` ranks the replicates' means (Wilcoxon), failures last: .06 at best with five replicates.
    `replicates_needed` is for a difference as large as the margin; with one replicate it is a lower bound.
    With a column `fold`, `replicates` counts the repeats of the k-fold; the test is `nadeau_bengio`'s, and the mean
    that of the folds' means, each fold counting alike.

    Args:
        margins: by metric; a metric without one is never equivalent.
        primary: the metric on which the protocol names all of these pairs.
        means: what is compared beside the table's own arms: `Trial.means`.
        descriptive: intervals alone; the verdict is "not judged".

    Raises:
        ValueError: as `of_arms`; an unknown metric; nothing to compare.
    """
    if not (pairs and names):
        raise ValueError("there is nothing to compare; name two arms or configurations, and a metric")
    if unknown := [name for name in names if name.removesuffix("_all") not in METRICS]:
        raise ValueError(f"{', '.join(unknown)}: is more of it better or worse? Say so in metrics.METRICS")
    counts = _collapses(metrics, means or {})
    metrics = with_means(metrics, means or {})
    both = {pair: of_arms(metrics, pair) for pair in pairs}
    rows = [_contrast(both[pair], *pair, name, margins.get(name, np.nan), counts) for name in names for pair in pairs]
    table = pd.DataFrame(rows)
    table["correction"] = np.where(table["metric"] == primary, "Holm", "Benjamini-Hochberg")
    return judged(table, descriptive)


def judged(table: pd.DataFrame, descriptive: bool = False) -> pd.DataFrame:
    """The rows of `contrasts` with corrected p, verdict and answer: all rows of a `correction` are one family."""
    table = table.copy()
    fallen = _fallen(table)
    decide = {"p": deciding_p(table).mask(fallen & table["p_sign_flip"].isna(), 1.0)}
    decide["p_equivalence"] = table["p_equivalence"].mask(fallen & table["p_equivalence"].notna(), 1.0)
    for p, values in decide.items():
        for correction, adjust in (("Holm", holm), ("Benjamini-Hochberg", false_discovery_control)):
            tests = values[table["correction"].eq(correction) & values.notna()]
            table.loc[tests.index, f"{p}_adjusted"] = adjust(tests)
    table["verdict"] = ["not judged" if descriptive else _verdict(row) for row in table.itertuples()]
    table["answer"] = [_answer(row) for row in table.itertuples()]
    return table


def _fallen(table: pd.DataFrame) -> pd.Series:
    """Where a run of either side has collapsed, so that normal theory misleads."""
    return (table["collapsed"] + table["collapsed_against"] > 0) & table["p"].notna()


def deciding_p(table: pd.DataFrame) -> pd.Series:
    """p of the t-test; after a collapse that of the sign-flip test, NaN where that decides nothing."""
    return table["p"].mask(_fallen(table), table["p_sign_flip"])


def _collapses(metrics: pd.DataFrame, means: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """How many runs of each arm are mostly empty on test scans, and of how many; a mean counts those of its arms."""
    fallen = mostly_empty_on_test(metrics)["configuration"].value_counts()
    runs = metrics[["configuration", *trainings(metrics)]].drop_duplicates()["configuration"].value_counts()
    counts = pd.DataFrame({"collapsed": fallen.reindex(runs.index, fill_value=0), "runs": runs})
    return pd.concat([counts, pd.DataFrame({name: counts.loc[[*arms]].sum() for name, arms in means.items()}).T])


def _contrast(
    both: pd.DataFrame, arm: str, against: str, metric: str, margin: float, counts: pd.DataFrame
) -> dict[str, Any]:
    """One row of `contrasts`, of the rows `of_arms`, without what depends on the other rows."""
    table = _differences(both, arm, against, metric)
    table = table.drop(index=both.loc[both[metric].isna(), "case_id"].unique())
    d, (cases, replicates) = table.to_numpy(), table.shape
    folds = both["fold"].nunique() if "fold" in both else 0
    finite = bool(cases and np.isfinite(d).all())
    with np.errstate(invalid="ignore"):  # inf - inf: both failed, so the mean is unknown
        estimate = Estimate(d.mean() if cases else np.nan)
    if finite and folds:
        of_folds = fold_differences(both[both["case_id"].isin(table.index)], arm, against, metric)
        if len(of_folds) == replicates * folds:  # else no case of a fold can be compared
            estimate = nadeau_bengio(of_folds.to_numpy(), folds)
    elif finite:
        estimate = random_effects(d) if replicates > 1 else one_replicate(d, PILOT_SD.get(metric, np.nan))
    (low, high), (low_90, high_90) = estimate.interval, estimate.interval_at(1 - 2 * LEVEL)
    failed = (~np.isfinite(both[metric])).groupby(both["configuration"]).sum()
    counts = counts.loc[[arm, against]].assign(failed=failed)
    flips = finite and counts["collapsed"].any() and replicates >= FEWEST_SIGNS and not folds
    return {
        "configuration": arm,
        "against": against,
        "metric": metric,
        "mean_difference": float(estimate.mean),
        "low": float(low),
        "high": float(high),
        "low_90": float(low_90),
        "high_90": float(high_90),
        "df": float(estimate.df),
        "p": float(estimate.p),
        "p_sign_flip": sign_flip(d.mean(0)) if flips else np.nan,
        "p_rank": _rank_test(d),
        "margin": margin,
        "p_equivalence": float(estimate.p_equivalence(margin)),
        PAPERS_T_TEST: papers_t_test(table).iloc[0] if replicates == 1 else np.nan,
        "cases": cases,
        "replicates": replicates,
        "folds": folds,
        **{f"{part}_sd": float(getattr(estimate, part)) ** 0.5 for part in ("case", "replicate", "rest")},
        "replicates_needed": replicates_needed(estimate, margin, cases),
        **{
            name if side == arm else f"{name}_against": counts.loc[side, name]
            for name in ("failed", "collapsed", "runs")
            for side in (arm, against)
        },
    }


def _rank_test(d: Float[np.ndarray, "cases replicates"]) -> float:
    """p of Wilcoxon's signed ranks of the replicates' means; infinite ones rank last, inf - inf (NaN) is none."""
    if len(d) == 0 or d.shape[1] < 2:
        return np.nan
    with np.errstate(invalid="ignore"):
        mean = np.nan_to_num(d.mean(0), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return float(wilcoxon(np.sign(mean) * rankdata(np.abs(mean))).pvalue) if mean.any() else np.nan


def _verdict(row: Any) -> str:
    """Equivalence first: the margin was set beforehand as the smallest difference that matters."""
    if row.p_equivalence_adjusted < LEVEL:
        return "equivalent"
    if row.p_adjusted < LEVEL:
        return "benefit" if row.mean_difference * metric_of(row.metric).better > 0 else "harm"
    return "undecided"


def effect(row: Any) -> str:
    """A difference with its interval in the metric's digits and unit: "+2.24 [-1.24, +5.72] mm".

    An equivalence shows its 90 % interval, any other answer the 95 % interval.
    """
    if np.isnan(row.mean_difference):
        return "unknown, because both sides have cases without prediction"
    unit, digits, equal = metric_of(row.metric).unit, metric_of(row.metric).digits, row.verdict == "equivalent"
    number = f"+.{digits if unit else 4}f"  # a hundredth of DSC is much, and its hundredth is not nothing
    low, high = (row.low_90, row.high_90) if equal else (row.low, row.high)
    interval = f" [{low:{number}}, {high:{number}}]" if np.isfinite(row.p) else ""
    return f"{row.mean_difference:{number}}{interval}" + f" {unit}" * bool(unit) + " (90 %)" * equal


def _answer(row: Any) -> str:
    """The row as one sentence."""
    verdict = "" if row.verdict == "not judged" else f" {row.verdict},"
    answer = [f"{row.configuration} against {row.against}, {row.metric}:{verdict} {effect(row)}"]
    if np.isfinite(row.p):
        how = f"{row.correction}, sign flip" if np.isfinite(row.p_sign_flip) else row.correction
        answer += [f"p = {row.p_adjusted:.2g} ({how})"] * bool(verdict)
    times = "repeat" if row.folds else "replicate"
    answer += [f"{row.cases} cases", f"{row.replicates} {times}" + "s" * (row.replicates > 1)]
    answer[-1] += f" of {row.folds} folds" if row.folds else ""
    if row.verdict == "equivalent":
        answer += [f"smaller than {row.margin:g} (TOST: p = {row.p_equivalence_adjusted:.2g})"]
        answer += ["but surely not zero"] * (row.p_adjusted < LEVEL)
    if row.replicates == 1 and not row.folds:
        answer += [ONE_REPLICATE]
        if np.isfinite(row.replicates_needed):
            seen = f"are needed to see {row.margin:g} if they spread by {PILOT_SD[row.metric]:g}, as in a pilot"
            answer += [f"at least {row.replicates_needed:.0f} replicates {seen}"]
    answer += [f"failed: {row.failed} against {row.failed_against}"] * bool(row.failed or row.failed_against)
    if row.replicates > 1 or row.collapsed or row.collapsed_against:
        sides = collapse_rate(row.collapsed, row.runs), collapse_rate(row.collapsed_against, row.runs_against)
        answer += [f"collapsed: {' against '.join(sides)}"]
    return "; ".join(answer)


def collapse_rate(collapsed: int, runs: int) -> str:
    """So many runs of so many, with Clopper and Pearson's (1934) 95 % limits: "1 of 20 [0 to 25 %]"."""
    limits = binomtest(int(collapsed), int(runs)).proportion_ci(method="exact")
    return f"{collapsed} of {runs} [{100 * limits.low:.0f} to {100 * limits.high:.0f} %]"


def paired_tests(metrics: pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Every configuration against the first, on every metric: the rows of `contrasts`.

    With several seeds the seeds are the replicates; with one there is no p but the paper's, in a column that says so.
    """
    first, *others = dict.fromkeys(metrics["configuration"])
    return contrasts(metrics, [(other, first) for other in others], headline() if names is None else names)


# The paper's own tables


def published_rankings(
    table: pd.DataFrame,
    *,
    cases: int = 68,
    correlations: Sequence[float] = (0.3, 0.8),
    replicate_sds: Sequence[float] = (0.0, 0.003, 0.010),
) -> pd.DataFrame:
    """The chance that each row's ranking by DSC against the row above is false, from printed means and sd alone.

    Every row was trained once and tested on the same cases. The variance of a difference is taken as
    (s1² + s2² - 2 r s1 s2) / cases + replicate_sd²; the chance is the tail of Student's t beyond it (cases - 1
    degrees of freedom), which is the probability of the other sign under a flat prior on the true difference.

    Args:
        table: results.published(3), or those rows of results.published(4) that share the test cases (its figures are
            rounded to two digits: a difference of .01 may be anything up to .02), or any two rows.
        cases: 20 % of 339 are 68.
        correlations: r, of two rows' values over the cases, which the paper does not give.
        replicate_sds: of the difference over replicates; 0: as if the seed did not matter.
    """
    rows, mean, variance = table.iloc[:, 0], table["DSC_mean"], table["DSC_std"] ** 2
    pairs = pd.DataFrame({"row": rows, "against": rows.shift(), "difference": mean.diff()})
    for r in correlations:
        of_cases = (variance + variance.shift() - 2 * r * np.sqrt(variance * variance.shift())) / cases
        for sd in replicate_sds:
            pairs[f"r = {r:g}, replicate sd {sd:g}"] = t.sf(mean.diff().abs() / np.sqrt(of_cases + sd**2), cases - 1)
    return pairs.iloc[1:].reset_index(drop=True)
