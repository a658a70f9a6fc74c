# %% [markdown]
# # Lesson 2 · A voxel becomes a vector
#
# A UNet turns every voxel into a list of numbers before it decides. We look at these *embeddings*, learn three ways
# to measure them, and learn to mistrust each.
#
# * **Time**: 45 minutes. The computer works for about 15 seconds.
# * **In the paper**: Section III-B.2, first paragraph; layer conv6d of Table I; Fig. 3 and 4.
# * **We need**: lesson 1, and to have heard of principal components (PCA) and logistic regression.

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
from mupkg.report.embeddings import EmbeddedVoxels, separation

sys.path.append(str(repository() / "notebooks/lessons"))
from classroom import BACKGROUND, PROSTATE, SPACING_MM, embed, exercise, expect, narrow, phantoms, same, train

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
# The rim first, then the voxels: their label, their grey value, and their embedding in each network, a list a
# phantom.

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
guess = {"grey": "?", "UNet": "?", "MetricUNet-R": "?"}

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


# %% tags=["alternative"]
def fisher_ratio(prostate, background):
    means = prostate.mean(axis=0) - background.mean(axis=0)
    return means @ means / (np.trace(np.cov(prostate.T)) + np.trace(np.cov(background.T)))  # divides by n - 1


# %% tags=["mistake"]
# hint: standard deviations
def fisher_ratio(prostate, background):
    between = ((prostate.mean(axis=0) - background.mean(axis=0)) ** 2).sum()
    return between / (prostate.std(axis=0).sum() + background.std(axis=0).sum())


# %% tags=["mistake"]
# hint: square of the distance is missing
def fisher_ratio(prostate, background):
    between = np.linalg.norm(prostate.mean(axis=0) - background.mean(axis=0))
    return between / (prostate.var(axis=0).sum() + background.var(axis=0).sum())


# %% tags=["mistake"]
# hint: both classes together
def fisher_ratio(prostate, background):
    between = ((prostate.mean(axis=0) - background.mean(axis=0)) ** 2).sum()
    return between / np.concatenate([prostate, background]).var(axis=0).sum()


# %% tags=["mistake"]
# hint: over the channels
def fisher_ratio(prostate, background):
    between = ((prostate.mean(axis=0) - background.mean(axis=0)) ** 2).mean()
    return between / (prostate.var(axis=0).sum() + background.var(axis=0).sum())


# %% tags=["check"]
rng = np.random.default_rng(0)
u, v = rng.normal(1, 2, (300, 16)), rng.normal(0, 1, (300, 16))
both, kind = np.concatenate([u, v]), np.repeat([0, 3], 300)
right = separation(EmbeddedVoxels(np.zeros((600, 3), int), kind, both))["Fisher ratio"]
between, spread = ((u.mean(0) - v.mean(0)) ** 2).sum(), u.var(0).sum() + v.var(0).sum()
mistakes = {
    "you divide by standard deviations; the width is measured by variances.": between / (u.std(0) + v.std(0)).sum(),
    "the square of the distance is missing, so that the ratio has a unit.": between**0.5 / spread,
    "you took the variance of both classes together, and their distance is in it.": between / both.var(0).sum(),
    "the squared distance is a sum over the channels, not a mean.": between / 16 / spread,
}
with exercise("2.1", "Means and variances along axis 0 give a number for each channel."):
    same(fisher_ratio(u, v), right, mistakes, "Between: squared distance of the means. Within: two variances.", 0.01)
    same(fisher_ratio(3 * u, 3 * v), right, {}, "it must not change when all embeddings are 3 times as long.", 0.01)

# %% [markdown]
# It has no unit: embeddings three times as long give the same ratio. That is why networks can be compared by it at
# all.
#
# **Guess**: which has the highest ratio?

# %%
for name, parts in vectors.items():
    x = np.concatenate(parts)
    print(f"{name:13}: Fisher ratio {fisher_ratio(x[y], x[~y]):.2f}")

# %% [markdown]
# ## Step 2: what the head could do
#
# The head that decides does not look at means and variances. It weighs channels. So the fairer question is: how
# well does the *best straight cut* tell the kinds apart? We fit one, a logistic regression (a *linear probe*), on
# some voxels and judge it on **other** voxels, of other phantoms, by the area under the ROC curve (AUC): the chance
# that it ranks a random prostate voxel above a random background voxel.
#
# **Exercise 2.2** (10 minutes). Write the probe. `LogisticRegression().fit(x, y)` has a `decision_function`, and
# `roc_auc_score(y, score)` needs *scores*.


# %%
def probe_auc(x_fit, y_fit, x_judge, y_judge):
    ### BEGIN SOLUTION
    probe = LogisticRegression(max_iter=1000).fit(x_fit, y_fit)
    return roc_auc_score(y_judge, probe.decision_function(x_judge))
    ### END SOLUTION


# %% tags=["alternative"]
def probe_auc(x_fit, y_fit, x_judge, y_judge):
    direction = np.linalg.lstsq(np.c_[x_fit, np.ones(len(x_fit))], y_fit * 2.0 - 1, rcond=None)[0][:-1]
    ranks = (x_judge @ direction).argsort().argsort() + 1
    inside = y_judge == 1
    return (ranks[inside].mean() - (inside.sum() + 1) / 2) / (~inside).sum()


# %% tags=["mistake"]
# hint: same voxels
def probe_auc(x_fit, y_fit, x_judge, y_judge):
    probe = LogisticRegression(max_iter=1000).fit(x_fit, y_fit)
    return roc_auc_score(y_fit, probe.decision_function(x_fit))


# %% tags=["mistake"]
# hint: fitted on the voxels
def probe_auc(x_fit, y_fit, x_judge, y_judge):
    probe = LogisticRegression(max_iter=1000).fit(x_judge, y_judge)
    return roc_auc_score(y_judge, probe.decision_function(x_judge))


# %% tags=["mistake"]
# hint: yes and no
def probe_auc(x_fit, y_fit, x_judge, y_judge):
    probe = LogisticRegression(max_iter=1000).fit(x_fit, y_fit)
    return roc_auc_score(y_judge, probe.predict(x_judge))


# %% tags=["mistake"]
# hint: sign
def probe_auc(x_fit, y_fit, x_judge, y_judge):
    probe = LogisticRegression(max_iter=1000).fit(x_fit, y_fit)
    return roc_auc_score(y_judge, probe.predict_proba(x_judge)[:, 0])


# %% tags=["check"]
rng = np.random.default_rng(1)
coin, noise = rng.random((2, 200)) < 0.5, rng.normal(size=(2, 200, 60))  # labels that nothing can predict
kinds = rng.random((2, 4000)) < 0.5
clouds = rng.normal(size=(2, 4000, 2)) + kinds[..., None] * [2, 0]  # two standard deviations apart: AUC is 0.92
with exercise("2.2", "Fit on x_fit and y_fit; score x_judge; compare the scores with y_judge."):
    luck = [probe_auc(noise[i], coin[i], noise[j], coin[j]) for i, j in ((0, 1), (1, 0))]
    on_itself = LogisticRegression(max_iter=1000).fit(noise[1], coin[1]).decision_function(noise[1])
    fitted_on_judge = abs(luck[0] - roc_auc_score(coin[1], on_itself)) < 1e-6
    expect(not fitted_on_judge, f"{luck[0]:.2f} for coin flips! You fitted on the voxels that judge.")
    expect(max(luck) < 0.65, f"{luck[0]:.2f} for coin flips! You judged on the same voxels that you fitted on.")
    found = probe_auc(clouds[0], kinds[0], clouds[1], kinds[1])
    expect(found > 0.5, f"an AUC of {found:.2f} is below chance: the sign of your score is the wrong way round.")
    expect(found > 0.89, f"{found:.2f}, where 0.92 is right. You judge yes and no; an AUC needs scores.")
    expect(found < 0.95, f"{found:.2f}, where 0.92 is right: too good.")

# %% [markdown]
# Two phantoms to fit the probe, two to judge it:

# %%
for name, parts in vectors.items():
    x_fit, x_judge = (np.concatenate(some) for some in (parts[:2], parts[2:]))
    y_fit, y_judge = (np.concatenate(some) for some in (is_prostate[:2], is_prostate[2:]))
    auc = probe_auc(x_fit, y_fit, x_judge, y_judge)
    print(f"{name:13}: AUC at the rim {auc:.3f} (your guess: {guess[name]})")

# %% [markdown]
# The embedding is far better than the grey value: it has seen the neighbourhood. But **a plain UNet has a good
# embedding, too.** It must have, because its head decides from nothing else. The paper claims "more representative
# voxel-level features" for metric learning, and shows heatmaps and segmentations for it, but measures no embedding.
#
# Compare the order by AUC with the order by Fisher ratio. Two sound measures, and they need not agree: the ratio
# counts *all* width, the probe only what lies across the cut.

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


# %% tags=["alternative"]
def hidden(n, rng):
    y = rng.permutation(np.arange(2 * n) % 2)
    mixed, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))
    x = rng.normal(size=(2 * n, 16)) * np.linspace(20, 1, 16)
    x[:, 15] += 6 * y
    return x @ mixed, y


# %% tags=["mistake"]
# hint: PCA shows the classes apart
def hidden(n, rng):
    y = np.repeat([0, 1], n)
    x = rng.normal(size=(2 * n, 16))
    x[:, 5] += 5 * y
    return x, y


# %% tags=["mistake"]
# hint: no straight cut
def hidden(n, rng):
    y = np.repeat([0, 1], n)
    x = rng.normal(size=(2 * n, 16))
    x[:, :2] *= 10
    return x, y


# %% tags=["mistake"]
# hint: One value
def hidden(n, rng):
    y = np.zeros(2 * n)
    x = rng.normal(size=(2 * n, 16))
    x[:, :2] *= 10
    x[n:, 5] += 5
    return x, y


# %% tags=["check"]
with exercise("2.3", "One channel in which the classes differ; other channels that vary much more than it does."):
    x_hidden, y_hidden = hidden(500, np.random.default_rng(0))
    x_other, y_other = hidden(500, np.random.default_rng(1))
    expect(np.shape(x_hidden) == (1000, 16), f"x has the shape {np.shape(x_hidden)}, but should have (1000, 16).")
    expect(np.shape(y_hidden) == (1000,), f"y has the shape {np.shape(y_hidden)}, but should have (1000,).")
    expect(set(np.unique(y_hidden)) == {0, 1}, "y must be 0 and 1, 500 times each. One value is not two classes.")
    expect(np.sum(y_hidden) == 500, "there should be 500 points of each class.")
    plane = PCA(2).fit(x_hidden)
    seen = [plane.transform(x) for x in (x_hidden, x_other)]
    in_plane = probe_auc(seen[0], y_hidden, seen[1], y_other)
    in_space = probe_auc(x_hidden, y_hidden, x_other, y_other)
    expect(in_plane < 0.65, f"PCA shows the classes apart (AUC {in_plane:.2f}). Let other channels vary more.")
    expect(in_space > 0.95, f"no straight cut separates them well (AUC {in_space:.2f}). Move the classes apart.")

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
# So a scatter plot can show that classes *are* apart. It can never show that they are *not*. The reverse trap
# exists, too: t-SNE and UMAP show gaps that are not there. Measure in all channels, and use pictures to ask
# questions.

# %% [markdown]
# ## What we have learned
#
# * An embedding is what the head decides from. At the rim it is far better than the grey value, in a plain UNet as
#   well.
# * "Better features" is no claim until one says measured how, on which voxels, against what. Fisher ratio and probe
#   answer different questions.
# * A scatter is a shadow of the space.
#
# **To think about**: we took voxels within 5 mm of the contour. What would all three numbers be for voxels from the
# whole volume, and which comparison would you find in a paper?
#
# **Read next**: the paper's Section III-B.2 up to "i) Random Sampling"; Alain and Bengio, *Understanding
# intermediate layers using linear classifier probes* (2016); then lesson 3: the loss that moves embeddings.
# Notebook `08_explore` shows embeddings alive: lasso some and see where they lie in the image.
