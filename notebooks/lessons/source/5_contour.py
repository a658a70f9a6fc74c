# %% [markdown]
# # Lesson 5 · The contour
#
# "Contour-aware" sounds like sharper contours. We measure how sharp they are, ask what we have measured, measure
# again, and see what a millimetre is to a prostate.
#
# * **Time**: 55 minutes. The computer works for about 20 seconds.
# * **In the paper** (He et al., *MetricUNet*, Medical Image Analysis 2021,
#   [doi:10.1016/j.media.2021.102039](https://doi.org/10.1016/j.media.2021.102039)): Section III-B.2, iii); Fig. 1 and
#   5(c); DSC and ASD, Eq. (5) and (6).
# * **We need**: lesson 3 and a little of lesson 4.
# * **Afterwards you can** find a contour in a label; say what a measure of its sharpness measures; and say what a
#   mean DSC hides.
#
# **Work cell by cell** (Shift and Enter), not with *Run All*: a guess comes before its answer, and an exercise that
# is not solved yet stops the run. You can go back and run an earlier cell at any time.

# %% [markdown]
# ## A picture first
#
# Four narrow networks, 150 steps each: two plain UNets and two MetricUNet-C, with contour-aware sampling, from two
# random seeds each. We run them over six phantoms that they have not seen, and take the mean probability of
# prostate at each distance from the true contour, in plane. Inside is to the left of 0.

# %% tags=["setup"]
import sys

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from scipy import ndimage
from torch.nn import functional as F

from mupkg import repository
from mupkg.metrics import segmentation_metrics

# %% tags=["setup"]
sys.path.append(str(repository() / "notebooks/lessons"))
from checks import check
from classroom import BLUE, SPACING_MM, VERMILION, embed, narrow, phantoms, train

# %%
volumes, unseen = phantoms(range(8)), phantoms(range(8, 14))
networks = {}
for name in ("UNet", "MetricUNet-C"):
    for seed in (0, 1):
        networks[name, seed], loss = narrow(name, seed)
        train(networks[name, seed], loss, volumes, steps=150, seed=seed)


# %% tags=["setup"]
def signed_distance(label):
    """In each slice, in mm: from a voxel's centre to the contour, which runs between voxels; below 0 inside."""
    truth, plane = label == 1, (1e6, *SPACING_MM[1:])  # slices far apart, so that none sees another
    outside, inside = (ndimage.distance_transform_edt(mask, sampling=plane) for mask in (~truth, truth))
    return outside - inside + np.where(truth, 0.5, -0.5) * SPACING_MM[1]


# %% [markdown]
# A *profile* collects voxels in bins of 2.5 mm, the edge of a voxel: their mean distance and their mean probability.

# %% tags=["setup"]
EDGES = np.arange(-12.5, 12.6, 2.5)


def profile(distances, heats):
    """Mean distance and mean heat in each bin, over all voxels of all phantoms."""
    distance, heat = (np.concatenate([part.ravel() for part in parts]) for parts in (distances, heats))
    bins = [np.digitize(distance, EDGES) == k for k in range(1, len(EDGES))]
    return tuple(np.array([values[some].mean() for some in bins]) for values in (distance, heat))


# %% [markdown]
# A heatmap, the probability of prostate, of every phantom and network; and the profile of each network.

# %% tags=["setup"]
from_truth = [signed_distance(label) for label in unseen[1]]
heatmaps, profiles = {}, {}
for run, network in networks.items():
    heatmaps[run] = [embed(network, image).logits.softmax(dim=1)[:, 1].numpy() for image in unseen[0]]
    profiles[run] = profile(from_truth, heatmaps[run])

# %%
order = np.random.default_rng(0).permutation(4)
hidden = {letter: list(profiles)[k] for letter, k in zip("abcd", order, strict=True)}
figure, ax = plt.subplots(figsize=(6.5, 3.8))
for (letter, run), style in zip(hidden.items(), ("-", "--", "-.", ":"), strict=True):
    ax.plot(*profiles[run], style, marker="o", ms=3, label=letter)
ax.axvline(0, color="gray", lw=1)
ax.set(xlabel="distance to the true contour, mm (inside < 0)", ylabel="mean probability of prostate", ylim=(0, 1))
ax.set_title("mean over 6 phantoms")
ax.legend()
plt.show()

# %% [markdown]
# **Write down your guess**: which two of a, b, c, d were trained with contour-aware sampling?

# %%
guess_c = "?"  # two letters

# %% [markdown]
# ## Step 1: what is a contour?
#
# To the sampler, the contour is the prostate voxels that have a background voxel beside them: above, below, left or
# right. There is a trap. A training patch cuts through the organ, and prostate at the *patch's border* is not at
# the organ's.
#
# **Exercise 5.1** (10 minutes). Write the contour of labels `(N, H, W)` as a mask. *Hint*: compare the labels with
# themselves, shifted by one.


# %%
def edge(labels):
    ### BEGIN SOLUTION
    prostate, found = labels == 1, torch.zeros_like(labels, dtype=torch.bool)
    found[:, 1:] |= prostate[:, 1:] & ~prostate[:, :-1]
    found[:, :-1] |= prostate[:, :-1] & ~prostate[:, 1:]
    found[:, :, 1:] |= prostate[:, :, 1:] & ~prostate[:, :, :-1]
    found[:, :, :-1] |= prostate[:, :, :-1] & ~prostate[:, :, 1:]
    return found
    ### END SOLUTION


# %% tags=["check"]
# Check of 5.1: run this cell
check("5.1", globals())

# %% [markdown]
# The sampler C draws anchors *and positives* from these voxels, and negatives from anywhere in the background.
# Before we measure: what do these triplets ask for? That contour voxels of the prostate be like each other, and
# unlike *any* background. Nothing asks that the two sides of the contour differ more than other voxels do (lesson
# 4).

# %% [markdown]
# ## Step 2: how wide is the edge?
#
# A probability that drops from 1 to 0 at one place is a sharp edge. Call *width* the distance over which a profile
# falls from 0.8 to 0.2.
#
# **Exercise 5.2** (8 minutes). Write the width in mm. `distance` grows, `probability` falls. Find both distances by
# linear interpolation. *Hint*: read what `np.interp` demands of its second argument.


# %%
def width_mm(distance, probability):
    ### BEGIN SOLUTION
    at_high, at_low = np.interp([0.8, 0.2], probability[::-1], distance[::-1])
    return at_low - at_high
    ### END SOLUTION


# %% tags=["check"]
# Check of 5.2: run this cell
check("5.2", globals())

# %%
figure, ax = plt.subplots(figsize=(6.5, 3.8))
for (letter, (name, seed)), style in zip(hidden.items(), ("-", "--", "-.", ":"), strict=True):
    colour = VERMILION if name == "MetricUNet-C" else BLUE
    ax.plot(*profiles[name, seed], style, color=colour, marker="o", ms=3, label=f"{letter}: {name}, seed {seed}")
    print(f"{letter}: {name:12} seed {seed}: {width_mm(*profiles[name, seed]):.1f} mm wide")
ax.axvline(0, color="gray", lw=1)
ax.set(xlabel="distance to the true contour, mm (inside < 0)", ylabel="mean probability of prostate", ylim=(0, 1))
ax.set_title("mean over 6 phantoms")
ax.legend()
plt.show()
print("contour-aware, your guess:", guess_c)

# %% [markdown]
# If the width were the blur of a heatmap, we could compare the two kinds now. Is it?
#
# ## Step 3: blurred, or displaced?
#
# A mean profile can be wide for two reasons. A heatmap may be *blurred*: it falls slowly, wherever its edge is. Or
# it is sharp, but *displaced*: too far out here, too far in there, so that the mean over many places falls slowly
# all the same.
#
# We take the blur away. Every heatmap is cut at 0.5, so that each voxel is 0 or 1, and we measure the profile around
# the true contour once more.
#
# **Write down your guess**: how many of the millimetres are left, on average of the four networks?

# %%
guess_sharp = "?"  # mm

# %%
widths = {}
for run, maps in heatmaps.items():
    sharp = [(heat > 0.5).astype(float) for heat in maps]
    widths[run] = width_mm(*profiles[run]), width_mm(*profile(from_truth, sharp))
    print(f"{run[0]:12} seed {run[1]}: {widths[run][0]:.1f} mm wide, {widths[run][1]:.1f} mm with no blur at all")
before, after = np.mean(list(widths.values()), axis=0)
print(f"on average {after:.1f} of {before:.1f} mm are left, {after / before:.0%} (your guess: {guess_sharp} mm)")
floor = width_mm(*profile(from_truth, [(label == 1).astype(float) for label in unseen[1]]))
print(f"the true masks themselves measure {floor:.1f} mm, which is the grid")

# %% [markdown]
# **A perfectly sharp mask still has a wide profile.** A part of it is the grid: from the last voxel inside to the
# first one outside even a faultless mask takes a step. What is left beyond the grid's part cannot be blur: it is
# displacement. So the width around the *true* contour measures both at once, and we must measure them apart:
#
# * **blur**: the width of the profile around the network's **own** contour, where its probability is 0.5. Wherever
#   that lies, a sharp edge is narrow there: as narrow as the grid allows.
# * **displacement**: how far the network's own contour lies from the true one.
#
# **Exercise 5.3** (8 minutes). Every voxel has two distances, one to the true contour and one to the network's own,
# both in mm and below 0 inside. At the network's own contour, `from_truth - from_own` says how far it has moved:
# above 0 outwards, below 0 inwards. Write the mean of its *absolute* value over the voxels that lie at most
# `within_mm` from the network's own contour. Both arrays are flat.


# %%
def displacement_mm(from_truth, from_own, within_mm=1.3):
    ### BEGIN SOLUTION
    at_own = np.abs(from_own) <= within_mm
    return np.mean(np.abs(from_truth[at_own] - from_own[at_own]))
    ### END SOLUTION


# %% tags=["check"]
# Check of 5.3: run this cell
check("5.3", globals())

# %% [markdown]
# Only slices that hold both contours are used: a slice without one has no distance to it.


# %% tags=["setup"]
def both_distances(label, heat):
    """Distance to the true contour, distance to the network's own, and heat, in the slices with both; flat."""
    own = heat > 0.5
    both = (label == 1).any(axis=(1, 2)) & own.any(axis=(1, 2))
    return [values[both].ravel() for values in (signed_distance(label), signed_distance(own), heat)]


# %%
rows, around_own = {}, {}
for run, maps in heatmaps.items():
    parts = [both_distances(label, heat) for label, heat in zip(unseen[1], maps, strict=True)]
    to_truth, to_own, heat = (np.concatenate(part) for part in zip(*parts, strict=True))
    around_own[run] = profile([to_own], [heat])
    measured = width_mm(*profiles[run]), width_mm(*around_own[run]), displacement_mm(to_truth, to_own)
    rows[run] = dict(zip(("around the truth, mm", "blur, mm", "displacement, mm"), measured, strict=True))
table = pd.DataFrame(rows).T.rename_axis(["network", "seed"])
table.round(1)

# %% [markdown]
# The same four networks, on the left around the true contour and on the right around their own:

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for ax, curves, name in zip(axes, (profiles, around_own), ("true", "network's own"), strict=True):
    for (kind, seed), style in zip(curves, ("-", "--", "-", "--"), strict=True):
        colour = VERMILION if kind == "MetricUNet-C" else BLUE
        ax.plot(*curves[kind, seed], style, color=colour, marker="o", ms=3, label=f"{kind}, seed {seed}")
    ax.axvline(0, color="gray", lw=1)
    ax.set(xlabel=f"distance to the {name} contour, mm (inside < 0)", ylim=(0, 1))
axes[0].set_ylabel("mean probability of prostate")
axes[1].legend()
plt.show()

# %% [markdown]
# Is a difference between the kinds larger than that between two seeds?

# %%
for column, values in table.items():
    unet, c = values["UNet"], values["MetricUNet-C"]
    kinds, seeds = c.mean() - unet.mean(), max(abs(c[1] - c[0]), abs(unet[1] - unet[0]))
    print(f"{column:20}: C less UNet {kinds:+.1f} mm; two seeds of one kind differ by up to {seeds:.1f} mm:", end=" ")
    print("no more than that" if abs(kinds) <= seeds else "more than that")

# %% [markdown]
# A difference between the kinds that is no larger than that between two seeds says nothing; and with two seeds each a
# larger one says little (lesson 6). (A stray island is displaced, too, and counts.) **Contour-aware does not mean
# sharp contours**: C chooses *which* voxels speak, it does not say what is to happen at the edge.
#
# The paper claims more precise boundaries for MetricUNet-HCP where they are fuzzy, and shows heatmaps for it (Fig.
# 1). Is "fuzzy" blurred or displaced? These two numbers, over all test cases and some seeds, would be the
# measurement.

# %% [markdown]
# ## Step 4: what a voxel costs
#
# Now a mask that is perfect but for its outermost layer of voxels, 2.5 mm in plane.
#
# **Write down your guess**: which DSC does it have for the smallest of 14 prostates, and for the largest?

# %%
guess_small, guess_large = "?", "?"

# %% [markdown]
# **Exercise 5.4** (8 minutes). Take the contour voxels off a label `(z, y, x)`, slice by slice, and give the DSC of
# what is left with the whole, $2 |A \cap B| / (|A| + |B|)$. Use your `edge`: a volume is a batch of slices.


# %%
def dsc_without_rim(label):
    ### BEGIN SOLUTION
    rim = edge(torch.from_numpy(label).long()).numpy()
    whole, left = np.sum(label == 1), np.sum((label == 1) & ~rim)
    return 2 * left / (whole + left)
    ### END SOLUTION


# %% tags=["check"]
# Check of 5.4: run this cell
check("5.4", globals())

# %% [markdown]
# All 14 phantoms, training ones too: this is about labels only.

# %%
labels = volumes[1] + unseen[1]
millilitres = np.array([np.sum(label == 1) * np.prod(SPACING_MM) / 1000 for label in labels])
scores = np.array([dsc_without_rim(label) for label in labels])
figure, ax = plt.subplots(figsize=(5.5, 3.4))
ax.scatter(millilitres, scores)
ax.set(title="14 phantoms", xlabel="prostate, ml", ylabel="DSC without the outermost voxels")
plt.show()
small, large = millilitres.argmin(), millilitres.argmax()
print(f"{millilitres[small]:.0f} ml: {scores[small]:.3f} (your guess: {guess_small})")
print(f"{millilitres[large]:.0f} ml: {scores[large]:.3f} (your guess: {guess_large})")

# %% [markdown]
# The same mistake in millimetres costs a small gland far more DSC than a large one, because it has more surface for
# its volume. So a mean DSC depends on *whose* prostates are in the test set, and a hundredth of DSC is a different
# distance for everyone. Distances (ASD, HD95) do not have this fault, but have others (lesson 1).

# %% [markdown]
# ## What we have learned
#
# * The border of a patch is no contour.
# * A profile around the truth mixes blur and displacement. Around the network's own contour it measures blur alone,
#   and never less than the grid's part.
# * C asks contour voxels to be like each other. It does not ask for sharp edges.
# * DSC is kind to large organs.
#
# **To think about**: the paper's last section proposes that contour-aware sampling consider how contours are
# displaced. Sketch a sampler whose triplets do speak about the two sides of the contour. What did lesson 4 suggest?

# %% [markdown] tags=["exam"]
# **Two exam questions**
#
# 1. Two networks have the same mean profile around the true contour. In one, all heatmaps are blurred and centred;
#    in the other, all are sharp and displaced. Sketch both profiles around their own contours, and say which
#    network a dose planner would rather have.
# 2. Method A has a DSC of 0.86 on 20 small prostates, method B one of 0.88 on 20 large ones. Which is better?
#    Which number would you ask for?

# %% [markdown]
# **Read next**: the paper's Section III-B.2, iii); Reinke et al., *Understanding metric-related pitfalls in image
# analysis validation* (Nature Methods 2024,
# [doi:10.1038/s41592-023-02150-0](https://doi.org/10.1038/s41592-023-02150-0)); then lesson 6: how many runs does it
# take to believe a gain?

# %% [markdown] tags=["answer"]
# ## Answers (in the solutions only)
#
# **To think about.** Take as anchor a prostate voxel at the contour, as positive a prostate voxel farther in, and as
# negative a background voxel just across the contour. Lesson 4: it is the near negative that keeps teaching. (With N
# the suite draws such negatives.) To speak of displacement, one could draw them where the network's own contour and
# the true one part.

# %% [markdown] tags=["answer", "exam"]
# **Exam 1.** The blurred one is as wide around its own contour as around the true one; the displaced one is a step.
# The planner would rather have the blurred one: cut at 0.5 its contour is in the right place; the displaced one's is
# not.
#
# **Exam 2.** Nobody knows: a small gland loses more DSC for the same millimetre. Ask for a distance (ASD, HD95) on
# the same cases, case by case.
