# %% [markdown]
# # Lesson 6 · Is the gain real?
#
# A new method has a higher mean than the old one. We learn what can produce such a difference, beside the method.
#
# * **Time**: 50 minutes. The computer works for about 10 seconds.
# * **In the paper** (He et al., *MetricUNet*, Medical Image Analysis 2021,
#   [doi:10.1016/j.media.2021.102039](https://doi.org/10.1016/j.media.2021.102039)): Table III, and Section IV-D and
#   IV-E, "pair-wise t-test". How we judge a difference: `METHOD.md`, "How a difference is judged".
# * **We need**: mean, standard deviation, and the idea of a p-value. Lesson 1 for the DSC.
# * **Afterwards you can** test a difference over patients, correct for many tests, and judge it over patients *and*
#   trainings; and say what a high DSC is worth.
#
# **Work cell by cell** (Shift and Enter), not with *Run All*: a guess comes before its answer, and an exercise that
# is not solved yet stops the run. You can go back and run an earlier cell at any time.

# %% [markdown]
# ## A picture first
#
# Eight patients, segmented by a method A and by a method B; a line for each patient. The numbers are **simulated**,
# so that we know the truth. We shall tell it further down.

# %% tags=["setup"]
import sys

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from scipy import stats

from mupkg import repository
from mupkg.metrics import segmentation_metrics
from mupkg.report import results
from mupkg.trials import statistics

# %% tags=["setup"]
sys.path.append(str(repository() / "notebooks/lessons"))
from checks import check
from classroom import BLUE, SPACING_MM, VERMILION, eight_patients, phantoms

a, b = eight_patients()

# %% [markdown]
# Look at the lines, and at the mean.

# %%
figure, ax = plt.subplots(figsize=(4.5, 3.6))
ax.plot([0, 1], [a, b], "o-", color=BLUE, alpha=0.7)
ax.plot([0, 1], [a.mean(), b.mean()], "s--", color=VERMILION, label="mean")
ax.set(xticks=[0, 1], xticklabels=["A", "B"], xlim=(-0.3, 1.3), ylabel="DSC", title="n = 8 patients, simulated")
ax.legend()
plt.show()
print(f"mean DSC: A {a.mean():.3f}, B {b.mean():.3f}; B gains {np.mean(b - a):+.3f}")

# %% [markdown]
# **Write down your guess**: is B the better method? And how much of B's gain is left if we leave out one patient,
# the one of our choice?

# %%
guess_gain = {"B is better": "?", "gain that is left": "?"}

# %%
without = np.array([np.delete(b - a, k).mean() for k in range(8)])
print(f"leaving out one patient, B's gain is between {without.min():+.3f} and {without.max():+.3f}")
print("your guess:", guess_gain)

# %% [markdown]
# One patient carries the gain. In the simulation B has no advantage; A has a stray island in that patient,
# which costs it 0.10. Look at the lines before the means.

# %% [markdown]
# ## Step 1: the paired t-test
#
# The paper tests "pair-wise": the same patients, two methods. With the differences $d_i$ of $n$ patients, $t = \bar
# d / (s / \sqrt n)$, where $s$ is the standard deviation of the differences (dividing by $n - 1$). The two-sided
# p-value is the chance of a $|t|$ at least as large *if the methods do not differ*, from Student's distribution with
# $n - 1$ degrees of freedom: `2 * stats.t.sf(abs(t), n - 1)`.
#
# **Exercise 6.1** (8 minutes). Write t and p by hand. Do not call `stats.ttest_rel`: the check does.


# %%
def paired_t(old, new):
    ### BEGIN SOLUTION
    d = new - old
    t = d.mean() / (d.std(ddof=1) / np.sqrt(len(d)))
    return t, 2 * stats.t.sf(abs(t), len(d) - 1)
    ### END SOLUTION


# %% tags=["check"]
# Check of 6.1: run this cell
check("6.1", globals())

# %%
t, p = paired_t(a, b)
print(f"A against B: t = {t:.2f}, p = {p:.2f}")

# %% [markdown]
# ## Step 2: which rankings of Table III are beyond chance?
#
# The paper prints means and standard deviations over its test patients, 20 % of 339, so $n = 68$. To compare two
# rows we also need the correlation $\rho$ of their values over the patients, which it does not print: $s^2 = s_1^2 +
# s_2^2 - 2 \rho s_1 s_2$. We take $\rho = 0.3$ and $\rho = 0.8$.

# %%
table = results.published(3).set_index("configuration")
best, others = table.loc["MetricUNet-HCP"], table.drop("MetricUNet-HCP")


def p_against_best(rho, n=68):
    s1, s2 = best["DSC_std"], others["DSC_std"]
    t = (best["DSC_mean"] - others["DSC_mean"]) / np.sqrt((s1**2 + s2**2 - 2 * rho * s1 * s2) / n)
    return 2 * stats.t.sf(np.abs(t), n - 1)


# %% [markdown]
# HCP: samplers H and C, and P, the second term of Eq. (2), which pulls positive pairs together. The other rows are
# named in the same way.
#
# **Write down your guess**: HCP has the highest mean of the table. Against how many of the other eleven rows is p
# below 0.05?

# %%
guess_rows = "?"

# %% [markdown]
# That makes eleven tests, and with eleven tests of nothing, one will often fall below 0.05. *Holm's* method holds
# the chance of **any** false alarm at 5 %: sort the m p-values; multiply the smallest by m, the next by m - 1, and
# so on; let none be smaller than the one before; cut at 1.
#
# **Exercise 6.2** (10 minutes). Write it. The adjusted p-values come back in the order in which they were given.


# %%
def holm(p):
    ### BEGIN SOLUTION
    p, order = np.asarray(p), np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)
    ### END SOLUTION


# %% tags=["check"]
# Check of 6.2: run this cell
check("6.2", globals())

# %%
columns = {"HCP gains": best["DSC_mean"] - others["DSC_mean"]}
for rho in (0.3, 0.8):
    p = p_against_best(rho)
    columns |= {f"p, ρ = {rho}": p, f"Holm, ρ = {rho}": holm(p)}
shown = pd.DataFrame(columns, index=others.index)
for rho in (0.3, 0.8):
    behind = shown.index[shown[f"Holm, ρ = {rho}"] < 0.05]
    alone = np.sum(shown[f"p, ρ = {rho}"] < 0.05)
    print(f"ρ = {rho}: p is below 0.05 against {alone} of {len(shown)} rows, Holm's against {len(behind)}:", end=" ")
    print(", ".join(behind))
print("your guess:", guess_rows)
shown.round(3)

# %% [markdown]
# UNet, UNet++, the training in two parts (Sep) and the other backbone are behind. Among the UNets that learn from
# both losses together, only row H is told from the best, and that row is probably misprinted (`METHOD.md`,
# "Misprints"). So **the ranking of the samplers, on which the paper builds its discussion, is within chance**.
#
# Compare both counts of a line: a correction changes a verdict only where p is a little below 0.05. Here most p are
# tiny or large. And no correction helps against what comes next: all this still assumes that a row *is* its method.

# %% [markdown]
# ## Step 3: one training is one draw
#
# A row is not its method. As far as the paper says, every row was trained once. Another seed gives other weights, and
# all its patients move together. So the difference in patient $c$ and training $r$ is
#
# $$d_{cr} = \delta + \mathrm{case}_c + \mathrm{replicate}_r + \mathrm{rest}_{cr}.$$
#
# We **simulate** two *equal* methods, $\delta = 0$, with standard deviations of 0.005 for cases, 0.010 for
# replicates and 0.020 for the rest: 68 patients, one training each, and then the paper's paired t-test over
# patients.
#
# **Write down your guess**: in what share of such comparisons is p below 0.05?

# %%
guess_alarms = "?"  # an honest test gives 0.05


# %%
def simulate(rng, cases=68, replicates=1, delta=0.0):
    """Simulated DSC differences (cases, replicates); 0.005, 0.010 and 0.020 are our assumptions."""
    case, replicate = rng.normal(0, 0.005, (cases, 1)), rng.normal(0, 0.010, (1, replicates))
    return delta + case + replicate + rng.normal(0, 0.020, (cases, replicates))


rng = np.random.default_rng(0)
alarms = [stats.ttest_1samp(simulate(rng)[:, 0], 0).pvalue < 0.05 for _ in range(1000)]
print(f"equal methods, one training: p < 0.05 in {np.mean(alarms):.0%} of 1000 simulated comparisons", end=" ")
print(f"(your guess: {guess_alarms})")

# %% [markdown]
# The test is not broken. It answers another question: "would *these two trained networks* differ on other
# patients?" They would. Whether the *methods* differ, one training cannot tell, however many patients there are.

# %% [markdown]
# ## Step 4: over cases and replicates
#
# So we train several replicates, and ask how much the mean of all $d_{cr}$ varies, over patients *and* trainings.
# In a table of $C$ cases and $R$ replicates, take three mean squares:
#
# * $MS_c = R \cdot$ (variance of the case means), $MS_r = C \cdot$ (variance of the replicate means), both with
#   `ddof=1`;
# * $MS_e = \sum \mathrm{rest}^2 / ((C - 1)(R - 1))$, where the rest is $d$ minus its case mean, minus its replicate
#   mean, plus the mean of all.
#
# Then $\mathrm{var}(\bar d) = (MS_c + MS_r - MS_e) / (C R)$, and never less than $\max(MS_c, MS_r) / (C R)$.
#
# **Exercise 6.3** (12 minutes). Write the standard error of the mean, the square root of that.


# %%
def standard_error(d):
    ### BEGIN SOLUTION
    cases, replicates = d.shape
    of_case, of_replicate = d.mean(axis=1), d.mean(axis=0)
    rest = d - of_case[:, None] - of_replicate + d.mean()
    ms_case, ms_replicate = replicates * of_case.var(ddof=1), cases * of_replicate.var(ddof=1)
    ms_rest = np.sum(rest**2) / ((cases - 1) * (replicates - 1))
    total = max(ms_case + ms_replicate - ms_rest, ms_case, ms_replicate)
    return np.sqrt(total / (cases * replicates))
    ### END SOLUTION


# %% tags=["check"]
# Check of 6.3: run this cell
check("6.3", globals())

# %% [markdown]
# Does it keep its promise? Equal methods once more, with five trainings each. Student's t with 4 degrees of freedom
# serves us here; `statistics.random_effects` computes better ones.

# %%
rng, alarms = np.random.default_rng(0), {"over cases only": [], "over cases and replicates": []}
for _ in range(1000):
    d = simulate(rng, replicates=5)
    alarms["over cases only"].append(stats.ttest_1samp(d.mean(axis=1), 0).pvalue < 0.05)
    t = abs(d.mean()) / standard_error(d)
    alarms["over cases and replicates"].append(2 * stats.t.sf(t, 4) < 0.05)
for name, found in alarms.items():
    print(f"{name:26}: false alarms in {np.mean(found):.1%} of 1000 simulated trials")

# %% [markdown]
# Averaging over five trainings and testing over patients hardly helps. The mean of five trainings lies closer to the
# truth, but the test's yardstick, the spread of the patients, shrinks with it, and the draw of the seeds is still
# not in it. Counting both keeps the promise. And a real
# trial? The suite's E1 compares MetricUNet-HCP with UNet on the same test phantoms, in many trainings of both.
#
# **Write down your guess**: the paper's test, over the cases of one training, calls some differences significant. Do
# they all favour the same method?

# %%
guess_favour = "?"

# %%
trial = pd.read_csv(repository() / "outputs/reference/e1/cases.csv", dtype={"case_id": str})
d = statistics.differences(trial, "HCP", "UNet", "DSC").to_numpy()
p, means = stats.ttest_1samp(d, 0).pvalue, d.mean(axis=0)
better, worse = np.sum((p < 0.05) & (means > 0)), np.sum((p < 0.05) & (means < 0))
print(f"trial E1, phantoms: {d.shape[0]} cases, {d.shape[1]} trainings of each method")
print(f"p < 0.05 over the cases of one training: {better} times HCP is better, {worse} times worse", end=" ")
print(f"(your guess: {guess_favour})")
found = statistics.random_effects(d)
low, high = found.interval
print(f"over both: {found.mean:+.4f} with your standard error {standard_error(d):.4f};", end=" ")
print(f"95 % interval {low:+.4f} to {high:+.4f}, p = {found.p:.2f}")

# %% [markdown]
# With one training each, we could have published either answer, significant both times. Over cases and trainings
# together E1 has no difference to publish. One trial is not the last word either: its arms were trained again later,
# and once more with other seeds; both HCPs together were a little worse than both UNets (`RESULTS.md`, "Does voxel
# metric learning help?").

# %% [markdown]
# ## Step 5: an answer that never looks
#
# Last, what does a DSC of 0.8 mean? We take 12 training prostates, place their regions on each other (by the
# femoral heads), and call prostate what is prostate in at least half of them. That is the answer for *every*
# patient. It never looks at the scan.
#
# **Write down your guess**: its mean DSC on eight other patients.

# %%
guess_floor = "?"

# %%
mean_shape = np.mean(phantoms(range(12))[1], axis=0) >= 0.5
scores = []
for label in phantoms(range(12, 20))[1]:
    scores.append(segmentation_metrics(mean_shape, label == 1, spacing_mm=SPACING_MM)["DSC"])
print(f"never looking at the scan: DSC {np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}", end=" ")
print(f"(your guess: {guess_floor})")

# %% [markdown]
# That is the floor to measure a network's DSC from, not 0. Notebook 04 prints it beside every table.

# %% [markdown]
# ## What we have learned
#
# * Look at the cases before the mean.
# * Eleven tests need a correction; "p < .05 somewhere" is no result.
# * A method is judged over patients *and* trainings. Without replicates there is no p-value for a method.
# * A DSC needs a floor beside it.
#
# **To think about**: the paper finds p = 0.014 against nnU-Net (Table IV). Which of the sentences above apply?

# %% [markdown] tags=["exam"]
# **Two exam questions**
#
# 1. A paper trains its method and the baseline once each, and finds p = 0.001 over 200 test patients. The authors of
#    a second paper train both methods ten times, test over the ten means, and find p = 0.2 with the same mean
#    difference. What has each of them tested?
# 2. You can afford 40 trainings. Name two ways of spending them on the question "is B better than A?", and what each
#    of them lets you say.

# %% [markdown]
# **Read next**: `METHOD.md`, "How a difference is judged"; Bouthillier et al., *Accounting for variance in machine
# learning benchmarks* (MLSys 2021, [doi:10.48550/arXiv.2103.03098](https://doi.org/10.48550/arXiv.2103.03098));
# notebook `10_does_it_help`, which does all this for real.

# %% [markdown] tags=["answer"]
# ## Answers (in the solutions only)
#
# **To think about.** All four. One training of each stands behind the number; it is one test of several; the cases
# are not shown; and no floor is given. It says that these two trained networks differ on such patients.

# %% [markdown] tags=["answer", "exam"]
# **Exam 1.** The first: whether these two *trained networks* differ on other patients. The second: whether the
# *methods* differ, over the draw of a training (with the patients fixed). Only the second speaks about methods, and
# its p does not say that there is no difference: look at the interval.
#
# **Exam 2.** For instance 20 pairs of replicates of A and B: a narrow interval for one comparison. Or 10 pairs, and
# 10 pairs again with new draws if the first are promising: an honest second look. Or ten folds of two methods twice.
# Thirty-nine trainings of B and one of A say nothing.
