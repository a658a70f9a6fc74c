"""RESULTS.md and outputs/reference/README.md, written from the kept tables alone: `make results`.

RESULTS.md answers the questions of outputs/reference/questions.yaml; its sentences stand there, each with the verdict
it rests on, and the page is refused where the tables give another one. The reference page has every trial in full.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mupkg import repository
from mupkg.metrics import METRICS, metric_of
from mupkg.report import results
from mupkg.scans.writing import write_text
from mupkg.stages.cards import markdown_table
from mupkg.stages.runs import HISTORY, PLATEAU_DSC, RUN, read_run
from mupkg.trials import statistics, tables
from mupkg.trials.kept import kept_folder, kept_runs
from mupkg.trials.protocol import Study, read_yaml

REFERENCE = repository() / "outputs" / "reference"
PROTOCOLS = repository() / "notebooks" / "studies"
COST = repository() / "tests" / "benchmarks" / "results" / "cpu-x86_64-1thread-2026-11-26-cost.csv"
PAGE, QUESTIONS, RESULTS = REFERENCE / "README.md", REFERENCE / "questions.yaml", repository() / "RESULTS.md"
COLUMNS = ("DSC", "DSC_all", "SEN", "PPV", "ASD", "HD95", "surface_DSC_2mm", "Brier", "ECE")
PP_STEP = "UNet++'s step"  # as `bench.py cost` calls it
NUMBERS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NNUNET_COLUMNS = ("DSC", "DSC_all", "ASD", "HD95")

ABOUT = """# What the trials measured, in full

Written from the tables in these folders by `make results`; `make claims` fails where it no longer holds.
[RESULTS.md](../../RESULTS.md) says what follows. Nothing here is measured on patients, except where it says MR.

Only tables are left of e0, e1, e1n, e1n_again, e4 and plateau. No kept run can stand for theirs: trained again on
another machine, a UNet differed in every case. Two phantoms and their landmarks were the same to the bit there, and
so was stage 2 on the same regions. That leaves stage 1, which another processor or another number of threads rounds
otherwise, so that it cuts other regions; the old ones are gone, so this was not proven. Later trials train these arms
anew.

A row of a table of arms is the mean ± standard deviation over replicates of the mean over test cases. DSC and mm are
measured with the largest component, "all" without. A collapsed run finds no prostate in most test cases. An answer
gives the verdict, the mean difference, its interval over cases and replicates (90 % for an equivalence, else 95 %),
p after Holm over the contrasts and the outcome that the protocol names, after Benjamini and Hochberg over all others,
and collapsed runs with Clopper and Pearson's 95 % limits."""


def title(column: str) -> str:
    """A metric's name over a column: "HD95 mm", "DSC, all"."""
    name = METRICS[column].title if column in METRICS and METRICS[column].title else column.removesuffix("_all")
    unit = metric_of(column).unit
    return name + (f" {unit}" if unit else "") + (", all" if column.endswith("_all") else "")


def plus_minus(column: str, mean: float, std: float) -> str:
    digits = metric_of(column).digits
    return f"{mean:.{digits}f} ± {std:.{digits}f}" if np.isfinite(mean) else "infinite"


# A trial's kept tables


@cache
def cases(name: str, shift: str = "") -> pd.DataFrame:
    """cases.csv of a trial, or that of its test cases shifted."""
    path = REFERENCE / name / f"cases{shift and '_'}{shift}.csv"
    table = pd.read_csv(path, dtype={"case_id": str})
    return table if shift else tables.with_spread(table)


def protocol_path(name: str) -> Path:
    """The protocol as it was kept with the tables, or where it has none yet, as it stands in notebooks/studies."""
    places = REFERENCE / name / "protocol.yaml", PROTOCOLS / "trials" / f"{name}.yaml"
    return next(path for path in places if path.is_file())


@cache
def study(name: str) -> Study:
    return Study.read(protocol_path(name))


def finished_trials() -> list[str]:
    return sorted(path.parent.name for path in REFERENCE.glob("*/cases.csv"))


@cache
def answers(name: str, shift: str = "") -> pd.DataFrame:
    """The answers of a trial on all its outcomes, or on the primary one where its test cases are shifted."""
    trial, metrics = study(name).trial, cases(name, shift)
    names = [trial.primary] if shift else tables.outcomes(trial, metrics)
    return tables.answers(trial, metrics, names, shifted=bool(shift))


def answer_of(name: str, arm: str, against: str, outcome: str = "DSC", shift: str = "") -> pd.Series:
    """The row of `answers` for one contrast."""
    table = answers(name, shift)
    is_row = (table["configuration"] == arm) & (table["against"] == against) & (table["metric"] == outcome)
    return table[is_row].iloc[0]


@cache
def rankings(name: str) -> pd.DataFrame:
    return tables.rankings(study(name).trial, answers(name))


@cache
def seeds_alone(name: str) -> pd.DataFrame:
    return tables.single_seeds(study(name).trial, cases(name))


def single_seeds(name: str) -> Iterator[str]:
    """What a study with one seed would have reported of each contrast."""
    for row in seeds_alone(name).to_dict("records"):
        better, worse = row["says better"], row["says worse"]
        times = f"{better} times better and {worse} times worse"
        yield (
            f"{row['contrast']}: p < .05 in {better + worse} of {row['replicates']} replicates, {times}; differences "
            f"from {row['lowest']:+.3f} to {row['highest']:+.3f}, standard deviation {row['sd over replicates']:.3f}"
        )


def left_plateau(name: str) -> Iterator[list[str]]:
    """How many runs of each arm have left the plateau, and how good these are."""
    histories, tested = pd.read_csv(REFERENCE / name / "validations.csv"), cases(name)
    if "fold" in tested:  # k folds are k replicates
        tested = tested.assign(seed=tested["seed"] * tested["fold"].nunique() + tested["fold"])
    best = histories.groupby(["configuration", "replicate"], sort=False)["validation_dsc"].max()
    test = tested.groupby(["configuration", "seed"])["DSC"].mean()
    for arm, values in best.groupby("configuration", sort=False):
        left = values[values > PLATEAU_DSC]
        dsc = test.loc[left.index]
        yield [arm, f"{len(left)} of {len(values)}", plus_minus("DSC", dsc.mean(), dsc.std())]


def arm_rows(name: str, columns: Sequence[str]) -> Iterator[list[str]]:
    fallen = results.mostly_empty_on_test(cases(name))["configuration"].value_counts()
    means = tables.arm_means(cases(name), columns)
    for arm, row in means.iterrows():
        cells = [plus_minus(column, row[column, "mean"], row[column, "std"]) for column in columns]
        yield [arm, *cells, f"{fallen.get(arm, 0)} of {row['', 'replicates']:.0f}"]


def trial_section(name: str) -> Iterator[str]:
    """What a trial asked, as its protocol says, and everything that its tables answer."""
    trial = study(name).trial
    text = protocol_path(name).read_text(encoding="utf-8")
    comment = [line.removeprefix("#").strip() for line in text.split("\nstudy:")[0].splitlines()]
    comment = comment[: next((n for n, line in enumerate(comment) if line.startswith("make")), len(comment))]
    yield f"## {name}\n\n" + "\n".join(f"> {line}" for line in comment)
    columns = [column for column in COLUMNS if column in tables.outcomes(trial, cases(name))]
    yield markdown_table(["arm", *map(title, columns), "collapsed"], arm_rows(name, columns))
    table = answers(name)
    points = {
        "The answer": table.loc[table["metric"] == trial.primary, "answer"],
        "Each effect is mixed with interactions": [f"{k}: {v}" for k, v in statistics.aliases(trial.levels).items()],
        "On other outcomes": table.loc[table["metric"] != trial.primary, "answer"],
        "On harder scans": [
            f"{path.stem.removeprefix('cases_')}: {answer}"
            for path in sorted((REFERENCE / name).glob("cases_*.csv"))
            for answer in answers(name, path.stem.removeprefix("cases_"))["answer"]
        ],
        "What one seed would have told, by the paper's test over cases": single_seeds(name),
    }
    for heading, lines in points.items():
        if text := "\n".join(f"* {line}" for line in lines):
            yield f"**{heading}**\n\n{text}"
    yield markdown_table(["arm", f"best validation DSC above {PLATEAU_DSC}", "their test DSC"], left_plateau(name))
    yield from (f"![]({path.relative_to(REFERENCE).as_posix()})" for path in sorted((REFERENCE / name).glob("*.png")))


def nnunet_table() -> str:
    """nnU-Net without and with the branch, and ours of that replicate: mean ± std over the cases of a training."""
    theirs = pd.read_csv(REFERENCE / "nnunet" / "per_case.csv", dtype={"case_id": str})
    ours = cases("e1").query("seed == 1")
    if {*ours["case_id"]} != {*theirs["case_id"]}:
        raise ValueError(f"{REFERENCE / 'nnunet'}: was not tested on E1's cases; run notebook 11 again")
    rows = []
    for name, table in pd.concat([theirs, ours]).groupby("configuration", sort=False):
        with np.errstate(invalid="ignore"):  # inf - inf
            mean, std = (table[[*NNUNET_COLUMNS]].agg(how) for how in ("mean", "std"))
        rows.append([name, *(plus_minus(c, mean[c], std[c]) for c in NNUNET_COLUMNS), len(table)])
    return markdown_table(["run", *map(title, NNUNET_COLUMNS), "cases"], rows)


def reference_page() -> str:
    parts = [part for name in finished_trials() for part in trial_section(name)]
    nnunet = "## nnunet\n\n" + (REFERENCE / "nnunet" / "protocol.md").read_text(encoding="utf-8").strip()
    return "\n\n".join([ABOUT, *parts, nnunet, nnunet_table()]) + "\n"


# RESULTS.md


@cache
def runs_of(name: str) -> tuple[list[str], int]:
    """A trial's runs that are kept, and how many it plans: asked by every row of the page that it has."""
    planned = study(name).run_parameters
    return sorted(kept_runs(study(name).study, planned, study(name).stages)), len(planned)


def progress_of(name: str) -> str:
    """How far a trial without an answer is: how many of its runs are kept."""
    finished, planned = runs_of(name)
    return f"no answer yet: {len(finished)} of {planned} runs are kept"


def core_hours(name: str) -> list[str]:
    """Training time of the trial's kept runs times their threads, and that of its other runs at the same rate.

    Runs of before runs were kept tell none.
    """
    folder, (finished, planned) = kept_folder(study(name).study), runs_of(name)
    records = [read_run(folder / run / RUN) for run in finished]
    seconds = [r["training_seconds"] * r["threads"] for r in records if "training_seconds" in r and "threads" in r]
    spent = f"{sum(seconds) / 3600:.1f} ({len(seconds)} of {planned} runs)" if seconds else "not recorded"
    if (REFERENCE / name).is_dir():  # is answered
        return [spent, ""]
    return [spent, f"{np.mean(seconds) / 3600 * (planned - len(finished)):.1f}" if seconds else "not known"]


def result_row(spec: Mapping[str, Any]) -> list[str]:
    """One row of numbers: the contrast, its effect and interval, verdict, how many, and the command.

    Raises:
        ValueError: if the tables give another verdict than the one that the sentence rests on.
    """
    name, outcome, shift = spec["trial"], spec.get("outcome", "DSC"), spec.get("shift", "")
    command = f"`make {f'trial TRIAL={name}' if name in protocols() else f'study STUDY={name}'}`"
    contrast = f"{spec['arm']} against {spec['against']}, {outcome}{f', {shift} scans' if shift else ''}"
    if name not in finished_trials():
        return [contrast, "", progress_of(name), "", command]
    if spec.get("post_hoc"):
        row = after_the_fact().loc[side_by_side(spec)]
    else:
        row = answer_of(name, spec["arm"], spec["against"], outcome, shift)
    verdict = "not judged" if spec.get("descriptive") else row["verdict"]  # of an outcome that its protocol describes
    if verdict != spec.get("verdict"):
        expected = spec.get("verdict", "an answer that the sentence knows of")
        raise ValueError(f"questions.yaml: {contrast} is {verdict}, not {expected}; change sentence and verdict")
    effect = statistics.effect(row)
    verdict += f" within {row['margin']:g}" if verdict == "equivalent" else ""
    verdict += " (sign flip)" if np.isfinite(row["p_sign_flip"]) and verdict != "not judged" else ""
    verdict += " (post hoc)" if spec.get("post_hoc") else ""
    counts = f"{row['cases']} × {row['replicates']}{f' × {row.folds} folds' if row['folds'] else ''}"
    fallen = row["collapsed"] + row["collapsed_against"]
    counts += f"; {fallen} collapsed" if fallen else ""
    return [contrast, effect, verdict, counts, command]


def side_by_side(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a question asked after the fact from the others: two trials, two sides, an outcome."""
    return spec["trial"], spec["post_hoc"], spec["arm"], spec["against"], spec.get("outcome", "DSC")


@cache
def after_the_fact() -> pd.DataFrame:
    """The answers to all contrasts of the page that no protocol named: one family, by Benjamini and Hochberg."""
    rows = [row for question in read_yaml(QUESTIONS)["questions"] for row in question.get("rows", [])]
    specs = [row for row in rows if row.get("post_hoc")]
    table = statistics.judged(pd.concat([_after_the_fact(spec) for spec in specs], ignore_index=True))
    return table.set_index(pd.MultiIndex.from_tuples(map(side_by_side, specs)))


def _after_the_fact(spec: Mapping[str, Any]) -> pd.DataFrame:
    """A contrast that no protocol named, between arms of two trials, which may be one, in the replicates of both.

    A side is an arm, the mean of some ("UNet and UNet-again"), or a factor's level ("with normalize").
    """
    both, pair = [cases(spec["trial"]), cases(spec["post_hoc"])], (spec["arm"], spec["against"])
    metrics = pd.concat(both).drop_duplicates(["configuration", "seed", "case_id"])
    metrics = metrics[metrics["seed"].isin(both[0]["seed"]) & metrics["seed"].isin(both[1]["seed"])]
    means = study(spec["trial"]).trial.means | {side: side.split(" and ") for side in pair if " and " in side}
    means = {side: arms for side, arms in means.items() if side in pair}
    return statistics.contrasts(metrics, [pair], [spec.get("outcome", "DSC")], means=means)


def figures_in_sentences() -> dict[str, Any]:
    """The numbers that the sentences of questions.yaml name, from the tables."""
    family = pd.concat([answers("e1"), answers("e1n")]).query("metric == 'DSC' and against == 'UNet'")[
        "p_equivalence"
    ]
    first = statistics.holm(family)[0]
    shuffled = {row[0]: row[1] for row in left_plateau("e4")}["shuffled"]
    seeds = {name: seeds_alone(name).iloc[0] for name in ("e0", "e1")}
    of_arms = cases("parameters").pivot_table("DSC", "seed", "configuration")
    of_values = {
        f"means_{parameter}": ", ".join(f"{of_arms[arm].mean():.3f}" for arm in arms.values()).replace("0.", ".")
        for parameter, arms in study("parameters").trial.parameters.items()
    }
    noisy = pd.concat([cases("e1", "noise"), cases("e1n", "noise")]).groupby(["configuration", "seed"])["DSC"].mean()
    learned = pd.read_csv(REFERENCE / "e6" / "validations.csv")
    both = pd.concat([learned, pd.read_csv(REFERENCE / "e6n" / "validations.csv").query("configuration == 'HCNP'")])
    late = both.pivot_table("validation_dsc", "step", "configuration")[["UNet", "HCP", "HCNP"]].iloc[-2:].round(3)
    best = learned.groupby(["configuration", "replicate"])["validation_dsc"].max()
    small_best = of_arms[["R-lambda-0.001", "R", "R-lambda-0.1"]].idxmax(axis=1) == "R-lambda-0.001"
    ranked = rankings("table3_rows")["the paper's ranking"].value_counts()
    rows = cases("table3_rows").pivot_table("DSC", "seed", "configuration")
    off = cases("e5n").groupby("configuration")["DSC"].mean()
    of_cell, levels = cases("e3").groupby("configuration")["DSC"].mean(), study("e3").trial.means
    by_unit = {
        weight: " and ".join(
            f"{of_cell[[arm for arm in levels[unit] if arm in levels[f'metric_weight {weight}']]].mean():.3f}"
            for unit in ("with normalize", "without normalize")
        )
        for weight in (0.01, 0.1)
    }
    again = {"trial": "hcp_again", "post_hoc": "hcp_again", "arm": "HCP", "against": "UNet"}
    again |= {"outcome": "HD95_all", "verdict": "undecided"}
    separate = pd.read_csv(REFERENCE / "table3_rows" / "validations.csv").query("configuration == 'R-Sep-s1'")
    separate = separate.groupby("step")["validation_dsc"].mean()
    significant = {name: row["says better"] + row["says worse"] for name, row in seeds.items()}
    timed = pd.read_csv(COST)
    steps = timed.query("peer == \"UNet's step\" and not what.str.contains('[+]')")["ratio"]
    chances = statistics.published_rankings(results.published(3))
    sure = {sd: chances.filter(regex=f" sd {sd}$").lt(0.025).all(axis=1).sum() for sd in ("0", "0.01")}
    return {
        "margin": f"{study('e1').trial.margin:g}",
        "gain_excluded": f"{answer_of('e1', 'HCP', 'UNet')['high']:.4f}",
        "noise_lowest": f"{noisy.min():.2f}",
        "noise_highest": f"{noisy.max():.2f}",
        "real_gain_excluded": f"{answer_of('e6', 'HCP', 'UNet')['high']:.4f}",
        "pp_gain_excluded": f"{answer_of('table3', 'PP-H-s1', 'UNetPP')['high']:.4f}",
        "off_gains_excluded": " and ".join(
            f"{answer_of('e5n', f'HCP-noise-{mm}', f'UNet-noise-{mm}')['high']:.4f}" for mm in (2, 4)
        ),
        "off_dsc": " and ".join(f"{off[f'UNet-noise-{mm}']:.3f}" for mm in (2, 4)),
        "few_margin": f"{study('e2').trial.margin:g}",
        "real_near_gain_excluded": f"{answer_of('e6n', 'HCNP', 'UNet')['high']:.4f}",
        "real_margin": f"{study('e6').trial.margin:g}",
        "real_still_rising": ", ".join(f"{arm} {late[arm].iloc[0]:.3f} to {late[arm].iloc[1]:.3f}" for arm in late),
        "real_never_left": NUMBERS[(best <= PLATEAU_DSC).sum()],
        **of_values,
        "first_family": "reached" if first < statistics.LEVEL else "missed by a little" if first < 0.1 else "missed",
        "small_weight_best": f"{small_best.sum()} of {len(small_best)}",
        "near_negatives": f"{answer_of('e1n', 'HCNP', 'HCP')['mean_difference']:.4f}",
        "shuffled_left": shuffled,
        "rankings_supported": NUMBERS[ranked.get("supported", 0)],
        "rankings_contradicted": NUMBERS[ranked["contradicted"]],
        "rankings_open": NUMBERS[ranked["cannot be told"]],
        "hd95_again": result_row(again)[1],
        "unit_at_small": by_unit[0.01],
        "unit_at_large": by_unit[0.1],
        "h_leaves_r": "{} to {}".format(*h_leaves_r()),
        "h_from_r": f"{(rows['H-s1'] - rows['R-s1']).abs().max():.4f}",
        "separate_rising": f"{separate.iloc[-3]:.2f} to {separate.iloc[-1]:.2f}",
        "e1_significant": f"{significant['e1']} of {seeds['e1']['replicates']}",
        "e1_better": seeds["e1"]["says better"],
        "e1_worse": seeds["e1"]["says worse"],
        "e0_significant": f"{significant['e0']} of {seeds['e0']['replicates']}",
        "plateau_dsc": PLATEAU_DSC,
        "step_cost": f"{steps.min():.2f} to {steps.max():.2f}",
        "step_cost_pp": f"{timed.set_index('peer')['ratio'].loc[PP_STEP]:.2f}",
        "rankings_without_seed": f"{NUMBERS[sure['0']].capitalize()} of {NUMBERS[len(chances)]}",
        "rankings_with_seed": f"only {NUMBERS[sure['0.01']]}",
    }


def h_leaves_r() -> tuple[int, int]:
    """The first and the last step, among the replicates of Table III, at which H's loss was no longer R's."""
    runs, steps = kept_folder(study("table3_rows").study), []
    for seed in range(study("table3_rows").trial.replicates):
        r, h = (pd.read_csv(runs / f"{name}-s1-seed{seed}" / HISTORY) for name in "RH")
        steps.append(int(r["step"][r["metric_R"] != h["metric_H"]].min()))
    return min(steps), max(steps)


def _wrapped(text: str) -> str:
    """Paragraphs in lines of their usual length, now that their numbers stand in them."""
    options = {"width": 118, "break_on_hyphens": False, "break_long_words": False}
    return "\n\n".join(textwrap.fill(paragraph, **options) for paragraph in text.strip().split("\n\n"))


def results_page() -> str:
    said, figures = read_yaml(QUESTIONS), figures_in_sentences()
    parts = [f"# Results\n\n{said['about'].strip()}"]
    columns = ["contrast", "effect [interval]", "verdict", "cases × replicates", "command"]
    claims = []
    for question in said["questions"]:
        rows = [result_row(spec) for spec in question.get("rows", [])]
        parts.append(f"## {question['question']}\n\n{_wrapped(question['answer'].format(**figures))}")
        if rows:
            parts.append(markdown_table(columns, rows))
        if extra := question.get("table"):
            parts.append(EXTRA[extra]())
        if notes := question.get("notes"):
            notes = _wrapped(notes.format(**figures))
            parts.append(f"<details><summary>More on this</summary>\n\n{notes}\n\n</details>")
        if claim := question.get("claim"):
            effect, follows = rows[0][1:3] if rows else ("", question["short"].format(**figures))
            claims.append([claim, effect, f"{follows} {question.get('but', '').format(**figures)}".strip()])
    table = markdown_table(["the paper's claim", "ours: effect [interval]", "what follows"], claims)
    parts.insert(1, f"## The paper's claims, one by one\n\n{said['claims'].strip()}\n\n{table}")
    hours = [[name, *core_hours(name)] for name in protocols()]
    table = markdown_table(["protocol", "core-hours of training", "left, at that rate"], hours)
    parts.append(f"## Processor time\n\n{_wrapped(said['cost'])}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def protocols() -> list[str]:
    names = (path.stem for path in sorted((PROTOCOLS / "trials").glob("*.yaml")))
    return [name for name in names if not name.startswith("smoke")]


def single_seeds_table() -> str:
    return "\n".join(f"* {line}" for name in ("e0", "e1", "e1n") for line in single_seeds(name))


def plateau_table() -> str:
    rows = [*left_plateau("plateau"), *left_plateau("e0"), *list(left_plateau("e1"))[1:]]
    return markdown_table(["arm", "left the plateau", "their test DSC"], rows)


def table3_table() -> str:
    """The paper's Table III beside ours: the DSC of every row, and its difference from the row above it."""
    trial, ranked = study("table3_rows").trial, rankings("table3_rows").set_index("configuration")
    paper = results.published(3).set_index("configuration")["DSC_mean"].map("{:.3f}".format)
    ours = {arm: dsc for arm, dsc, _ in arm_rows("table3_rows", ["DSC"])}
    first, in_the_paper = trial.pairs[0][1], trial.as_in_the_paper
    rows = [[first, paper[in_the_paper[first]], ours[first], "", "", ""]]  # no row stands above it
    for arm, above in trial.pairs:
        published = paper.get(in_the_paper[arm], "")
        difference = f"{ranked['paper: difference'][arm]:+.4f}" if published else ""
        spec = {"trial": "table3_rows", "arm": arm, "against": above, "verdict": "not judged"}
        ranking = ranked["the paper's ranking"][arm]
        rows.append([arm, published, ours[arm], difference, result_row(spec)[1], ranking])
    against = "against the row above"
    return markdown_table(
        ["arm", "DSC, paper", "DSC, ours", f"{against}, paper", f"{against}, ours", "the paper's ranking"], rows
    )


EXTRA = {
    "single_seeds": single_seeds_table,
    "plateau": plateau_table,
    "nnunet": nnunet_table,
    "table3": table3_table,
}


def derived_tables(name: str) -> dict[str, pd.DataFrame]:
    """The tables of a trial that follow from its cases.csv: what notebook 10 saves beside it."""
    trial, metrics = study(name).trial, cases(name)
    derived = {"answers": answers(name), "single_seeds": seeds_alone(name)}
    derived["arms"] = tables.arms(trial, metrics).reset_index()
    derived["rankings"] = rankings(name)
    if study(name).folds is None:
        derived["power"] = tables.power(trial, metrics).reset_index(names="contrast")
    for path in (REFERENCE / name).glob("cases_*.csv"):
        shift = path.stem.removeprefix("cases_")
        derived[f"answers_{shift}"] = answers(name, shift)
    return derived


if __name__ == "__main__":
    for finished in finished_trials():
        for table_name, derived in derived_tables(finished).items():
            results.save_table(derived, REFERENCE / finished / f"{table_name}.csv", index=False)
    write_text(PAGE, reference_page())
    write_text(RESULTS, results_page())
