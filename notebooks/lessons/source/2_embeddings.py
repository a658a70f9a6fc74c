# %% [markdown]
# # Lesson 2 · A voxel becomes a vector
#
# A UNet turns every voxel into a list of numbers before it decides. We look at these *embeddings*, learn three ways
# to measure them, and learn to mistrust each.
#
# * **Time**: 45 minutes. The computer works for about 15 seconds.
# * **In the paper** (He et al., *MetricUNet*, Medical Image Analysis 2021,
#   [doi:10.1016/j.media.2021.102039](https://doi.org/10.1016/j.media.2021.102039)): Section III-B.2, first paragraph;
#   layer conv6d of Table I; Fig. 3 and 4.
# * **We need**: lesson 1, and to have heard of principal components (PCA) and logistic regression.
# * **Afterwards you can** compute a Fisher ratio and a linear probe; say what each of them overlooks; and build data
#   that fool a scatter plot.
#
# **Work cell by cell** (Shift and Enter), not with *Run All*: a guess comes before its answer, and an exercise that
# is not solved yet stops the run. You can go back and run an earlier cell at any time.

# %% [markdown]
# ## A picture first
#
# We train two narrow networks for 150 steps: a plain UNet, and a MetricUNet-R, whose loss also compares embeddings.
# Then we take voxels *at the rim* of four phantoms that neither has seen: prostate and background, at most 5 mm
# from the contour. Each voxel has a grey value, and in each network an embedding of 16 numbers (in the paper, 256).

# %% tags=["setup"]
import sys

import numpy as np
from matplotlib import pyplot as plt
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mupkg import repository

sys.path.append(str(repository() / "notebooks/lessons"))
from checks import check
from classroom import BACKGROUND, PROSTATE, SPACING_MM, embed, narrow, phantoms, train

# %% [markdown]
# Both networks begin with the same weights and see the same patches.

# %%
volumes, unseen = phantoms(range(8)), phantoms(range(8, 12))
networks = {}
for name in ("UNet", "MetricUNet-R"):
    networks[name], loss = narrow(name)
    train(networks[name], loss, volumes, steps=150)


# %% tags=["setup"]
def rim(label, within_mm=5):
    truth = label == 1
    depth = [ndimage.distance_transform_edt(mask, sampling=SPACING_MM) for mask in (truth, ~truth)]
    return sum(depth) <= within_mm


# %% [markdown]
# The rim first, then the voxels: their label, their grey value, and their embedding in each network, one list for
# each phantom.

# %% tags=["setup"]
at_rim = [rim(label) for label in unseen[1]]
is_prostate = [label[where] == 1 for label, where in zip(unseen[1], at_rim, strict=True)]
vectors = {"grey": [image[where][:, None] / 255 for image, where in zip(unseen[0], at_rim, strict=True)]}
for name, network in networks.items():
    maps = [embed(network, image).embeddings.movedim(1, -1).numpy() for image in unseen[0]]
    vectors[name] = [values[where] for values, where in zip(maps, at_rim, strict=True)]
y = np.concatenate(is_prostate)
print(f"{len(y)} voxels at the rim, {y.mean():.0%} of them prostate")


# %% tags=["setup"]
def scatter(ax, points, y, title):
    for kind, colour, marker, name in ((False, BACKGROUND, "s", "background"), (True, PROSTATE, "o", "prostate")):
        some = points[y == kind][:400]
        ax.scatter(some[:, 0], some[:, 1], s=7, c=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
    ax.set(title=title, xlabel="first principal component", ylabel="second principal component")


# %% [markdown]
# On the left, one number a voxel; in the other two, 16 numbers a voxel, of which we see the two directions in which
# they vary most.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
grey = np.concatenate(vectors["grey"])[:, 0] * 400 - 160
for kind, colour, name in ((False, BACKGROUND, "background"), (True, PROSTATE, "prostate")):
    axes[0].hist(grey[y == kind], bins=np.arange(-160, 245, 10), color=colour, alpha=0.6, density=True, label=name)
axes[0].set(title="grey value", xlabel="HU", ylabel="density")
for ax, name in zip(axes[1:], networks, strict=True):
    x = np.concatenate(vectors[name])
    order = np.random.default_rng(0).permutation(len(y))
    scatter(ax, PCA(2).fit_transform(x)[order], y[order], f"embeddings of {name}")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# **Write down your guess**: put the three in order. In which can prostate and background be told apart best, by a
# straight cut? How often would each rank a random prostate voxel above a random background voxel (0.5 is chance, 1
# is always)?

# %%
guess_auc = {"grey": "?", "UNet": "?", "MetricUNet-R": "?"}

# %% [markdown]
# ## Step 1: one number for "separated"
#
# The *Fisher ratio* compares the distance of the two classes with their width: the squared distance of the class
# means, over the sum of the two classes' total variances. (The total variance is the sum of the channels'
# variances.)
#
# **Exercise 2.1** (8 minutes). Write it in five lines. Rows are voxels, columns channels.


# %%
def fisher_ratio(prostate, background):
    ### BEGIN SOLUTION
    between = ((prostate.mean(axis=0) - background.mean(axis=0)) ** 2).sum()
    within = prostate.var(axis=0).sum() + background.var(axis=0).sum()
    return between / within
    ### END SOLUTION


# %% tags=["check"]
# Check of 2.1: run this cell
check("2.1", globals())

# %% [markdown]
# It has no unit: embeddings three times as long give the same ratio. That is why networks can be compared by it at
# all.
#
# **Write down your guess**: which has the highest ratio?

# %%
guess_ratio = "?"  # "grey", "UNet" or "MetricUNet-R"

# %%
ratios = {}
for name, parts in vectors.items():
    x = np.concatenate(parts)
    ratios[name] = fisher_ratio(x[y], x[~y])
    print(f"{name:13}: Fisher ratio {ratios[name]:.2f}")
print(f"the highest has {max(ratios, key=ratios.get)}; your guess: {guess_ratio}")

# %% [markdown]
# ## Step 2: what a straight cut can do
#
# The head that decides does not look at means and variances. It weighs channels, in two layers. We ask a simpler
# question: how well does the *best straight cut* tell the kinds apart? We fit one, a logistic regression (a *linear
# probe*), on some voxels and judge it on **other** voxels, of other phantoms, by the area under the ROC curve (AUC):
# the chance that it ranks a random prostate voxel above a random background voxel.
#
# **Exercise 2.2** (10 minutes). Write the probe. `LogisticRegression().fit(x, y)` has a `decision_function`, and
# `roc_auc_score(y, score)` needs *scores*.


# %%
def probe_auc(x_fit, y_fit, x_judge, y_judge):
    ### BEGIN SOLUTION
    probe = LogisticRegression(max_iter=1000).fit(x_fit, y_fit)
    return roc_auc_score(y_judge, probe.decision_function(x_judge))
    ### END SOLUTION


# %% tags=["check"]
# Check of 2.2: run this cell
check("2.2", globals())

# %% [markdown]
# Two phantoms to fit the probe, two to judge it:

# %%
aucs = {}
for name, parts in vectors.items():
    x_fit, x_judge = (np.concatenate(some) for some in (parts[:2], parts[2:]))
    y_fit, y_judge = (np.concatenate(some) for some in (is_prostate[:2], is_prostate[2:]))
    aucs[name] = probe_auc(x_fit, y_fit, x_judge, y_judge)
    print(f"{name:13}: AUC at the rim {aucs[name]:.3f}, where 0.5 is chance (your guess: {guess_auc[name]})")
by_auc, by_ratio = (sorted(values, key=values.get, reverse=True) for values in (aucs, ratios))
print("best first, by AUC:", ", ".join(by_auc), "and by Fisher ratio:", ", ".join(by_ratio), end=" ")
print("(the same order)" if by_auc == by_ratio else "(another order)")

# %% [markdown]
# The embeddings are far better than the grey value: they have seen the neighbourhood. But **a plain UNet has a good
# embedding, too.** It has to separate the classes somehow, because its head decides from nothing else. The paper
# claims "more representative voxel-level features" for metric learning, and shows heatmaps and segmentations for it,
# but measures no embedding.
#
# Which of the two *networks* comes first, by either measure, means nothing here: we trained each of them once.
# **One seed shows nothing** about a method (lesson 6). Change `seed` in `narrow` and in `train`, and look at the
# order again.
#
# Two sound measures need not agree on an order. The ratio counts *all* width, the probe only what lies across the
# cut.

# %% [markdown]
# ## Step 3: the scatter is not the space
#
# PCA shows where the points vary most. Whether the classes differ *there* is another question.
#
# **Exercise 2.3** (12 minutes). Make data that fool the eye: 16 channels, two classes of `n` points each, which
# overlap completely in the first two principal components, and which a straight cut separates almost perfectly all
# the same. Return `x` of shape `(2 n, 16)` and `y` of shape `(2 n,)`, 0 and 1.


# %%
def hidden(n, rng):
    ### BEGIN SOLUTION
    y = np.repeat([0, 1], n)
    x = rng.normal(size=(2 * n, 16))
    x[:, :2] *= 10  # what PCA will show
    x[:, 5] += 5 * y  # what it will not
    return x, y
    ### END SOLUTION


# %% tags=["check"]
# Check of 2.3: run this cell
check("2.3", globals())

# %%
x_hidden, y_hidden = hidden(500, np.random.default_rng(0))
cut = LogisticRegression(max_iter=1000).fit(x_hidden, y_hidden).decision_function(x_hidden)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
scatter(axes[0], PCA(2).fit_transform(x_hidden), y_hidden == 1, "what PCA shows")
for kind, colour, name in ((0, BACKGROUND, "background"), (1, PROSTATE, "prostate")):
    axes[1].hist(cut[y_hidden == kind], bins=40, color=colour, alpha=0.6, label=name)
axes[1].set(title="along the probe's direction", xlabel="probe's score", ylabel="points")
axes[1].legend()
plt.show()

# %% [markdown]
# So a PCA scatter can show that classes *are* apart. It can never show that they are *not*. t-SNE and UMAP have the
# reverse trap: they show gaps that are not there (Wattenberg et al., *How to use t-SNE effectively*, 2016,
# [doi:10.23915/distill.00002](https://doi.org/10.23915/distill.00002)). Measure in all channels, and use pictures to
# ask questions.

# %% [markdown]
# ## What we have learned
#
# * An embedding is what the head decides from. At the rim it is far better than the grey value, in a plain UNet as
#   well.
# * "Better features" is no claim until one says how it was measured, on which voxels, and against what. Fisher ratio
#   and probe answer different questions.
# * A PCA scatter is a shadow of the space.
#
# **To think about**: we took voxels within 5 mm of the contour. What would all three numbers be for voxels from the
# whole volume, and which comparison would you find in a paper?

# %% [markdown] tags=["exam"]
# **Two exam questions**
#
# 1. All 16 channels of an embedding are multiplied by 10. What happens to the Fisher ratio, to the AUC of a probe,
#    and to a scatter of the first two principal components? What if only channel 3 is multiplied by 10?
# 2. A paper shows t-SNE plots of a baseline and of its own network; in the second the classes form two islands.
#    Which two measurements would you ask for, and on which voxels?

# %% [markdown]
# **Read next**: the paper's Section III-B.2 up to "i) Random Sampling"; Alain and Bengio, *Understanding intermediate
# layers using linear classifier probes* (2016,
# [doi:10.48550/arXiv.1610.01644](https://doi.org/10.48550/arXiv.1610.01644)); then lesson 3: the loss that moves
# embeddings. Notebook `08_explore` shows embeddings alive: lasso some and see where they lie in the image.

# %% [markdown] tags=["answer"]
# ## Answers (in the solutions only)
#
# **To think about.** All three would be higher, the grey value's, too: most voxels of a volume are fat, muscle or
# bone far from the prostate, and easy. That flattering comparison is the one that is usually printed. At the rim
# the networks must show what they have beyond the grey value.

# %% [markdown] tags=["answer", "exam"]
# **Exam 1.** The Fisher ratio: nothing. The AUC of the best straight cut: nothing; that of a penalised probe
# (`LogisticRegression` is one) may change, because the penalty weighs less. The scatter: only the numbers along the
# axes. With one channel alone: the ratio changes, because that channel's gap and width now count a hundred times; the
# best straight cut does not, but a penalised probe may; the scatter will show little else than channel 3.
#
# **Exam 2.** For instance a linear probe's AUC on other cases, and the Fisher ratio, in all channels, for both
# networks and several seeds, on voxels near the contour and on all voxels. t-SNE shows gaps that are not there, and
# the islands' distance and size mean nothing.
