# %% [markdown]
# # Lesson 5 · The contour
#
# "Contour-aware" sounds like sharper contours. We measure how sharp they are, find out what contour-aware sampling
# asks for, and see why a millimetre is not the same to every prostate.
#
# * **Time**: 45 minutes. The computer works for about 20 seconds.
# * **In the paper**: Section III-B.2, iii); Fig. 1 and 5(c); DSC and ASD, Eq. (5) and (6).
# * **We need**: lesson 3 and a little of lesson 4.

# %% [markdown]
# ## A picture first
#
# Four narrow networks, 150 steps each: two plain UNets and two MetricUNet-C, with contour-aware sampling, from two
# random seeds each. We run them over six phantoms that they have not seen, and take the mean probability of
# prostate at each distance from the true contour, in plane. Inside is to the left of 0.

# %% tags=["setup"]
import sys

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import ndimage
from torch.nn import functional as F

from mupkg import repository
from mupkg.data import PatchSource
from mupkg.metrics import segmentation_metrics
from mupkg.samplers import contour

# %% tags=["setup"]
sys.path.append(str(repository() / "notebooks/lessons"))
from classroom import BLUE, SPACING_MM, VERMILION, embed, exercise, narrow, phantoms, same, train

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
# We collect voxels in bins of 2.5 mm, the edge of a voxel, and average the probability in each.

# %% tags=["setup"]
distance = np.concatenate([signed_distance(label).ravel() for label in unseen[1]])
edges = np.arange(-12.5, 12.6, 2.5)
number = np.digitize(distance, edges)
middle = np.array([distance[number == k].mean() for k in range(1, len(edges))])
profiles = {}
for run, network in networks.items():
    heats = [embed(network, image).logits.softmax(dim=1)[:, 1] for image in unseen[0]]
    heat = torch.cat([heat.flatten() for heat in heats]).numpy()
    profiles[run] = np.array([heat[number == k].mean() for k in range(1, len(edges))])

# %%
order = np.random.default_rng(0).permutation(4)
hidden = {letter: list(profiles)[k] for letter, k in zip("abcd", order, strict=True)}
figure, ax = plt.subplots(figsize=(6.5, 3.8))
for (letter, run), style in zip(hidden.items(), ("-", "--", "-.", ":"), strict=True):
    ax.plot(middle, profiles[run], style, marker="o", ms=3, label=letter)
ax.axvline(0, color="gray", lw=1)
ax.set(xlabel="distance to the true contour, mm (inside < 0)", ylabel="mean probability of prostate", ylim=(0, 1))
ax.set_title("mean over 6 phantoms")
ax.legend()
plt.show()

# %% [markdown]
# **Write down your guess**: which two of a, b, c, d were trained with contour-aware sampling?

# %%
guess = "?"  # two letters

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


# %% tags=["alternative"]
def edge(labels):
    prostate = F.pad((labels == 1).float(), (1, 1, 1, 1), mode="replicate")
    across = F.avg_pool2d(prostate, (1, 3), stride=1)[:, 1:-1]
    down = F.avg_pool2d(prostate, (3, 1), stride=1)[:, :, 1:-1]
    return (labels == 1) & ((across < 0.9) | (down < 0.9))


# %% tags=["mistake"]
# hint: border of the patch counts
def edge(labels):
    prostate = F.pad(labels == 1, (1, 1, 1, 1))
    inner = prostate[:, :-2, 1:-1] & prostate[:, 2:, 1:-1] & prostate[:, 1:-1, :-2] & prostate[:, 1:-1, 2:]
    return prostate[:, 1:-1, 1:-1] & ~inner


# %% tags=["mistake"]
# hint: other end of the patch
def edge(labels):
    prostate, found = labels == 1, torch.zeros_like(labels, dtype=torch.bool)
    for shift, axis in ((1, 1), (-1, 1), (1, 2), (-1, 2)):
        found |= prostate & ~prostate.roll(shift, axis)
    return found


# %% tags=["mistake"]
# hint: background's side
def edge(labels):
    prostate, found = labels == 1, torch.zeros_like(labels, dtype=torch.bool)
    found[:, 1:] |= prostate[:, :-1] & ~prostate[:, 1:]
    found[:, :-1] |= prostate[:, 1:] & ~prostate[:, :-1]
    found[:, :, 1:] |= prostate[:, :, :-1] & ~prostate[:, :, 1:]
    found[:, :, :-1] |= prostate[:, :, 1:] & ~prostate[:, :, :-1]
    return found


# %% tags=["mistake"]
# hint: diagonal
def edge(labels):
    background = (labels == 0).float()
    return (F.max_pool2d(background, 3, stride=1, padding=1) > 0) & (labels == 1)


# %% tags=["mistake"]
# hint: two of the four
def edge(labels):
    prostate, found = labels == 1, torch.zeros_like(labels, dtype=torch.bool)
    found[:, 1:] |= prostate[:, 1:] & ~prostate[:, :-1]
    found[:, :, 1:] |= prostate[:, :, 1:] & ~prostate[:, :, :-1]
    return found


# %% tags=["check"]
_, patches = PatchSource(*unseen, patch_size=(16, 16), batch_size=200, seed=0).batch(0)  # many cut through the organ
prostate = patches == 1


def sides(beyond):
    """The four neighbours of every voxel, if this lies beyond the border."""
    around = F.pad(prostate.float(), (1, 1, 1, 1), mode=beyond) > 0
    return torch.stack([around[:, :-2, 1:-1], around[:, 1:-1, :-2], around[:, 2:, 1:-1], around[:, 1:-1, 2:]])


diagonals = F.max_pool2d((~prostate).float(), 3, stride=1, padding=1) > 0
mistakes = {
    "the border of the patch counts as background in yours.": prostate & ~sides("constant").all(dim=0),
    "a voxel at the border sees the other end of the patch. Your shift wraps around.": (
        prostate & ~sides("circular").all(dim=0)
    ),
    "that is the background's side. Contour voxels are prostate.": ~prostate & sides("replicate").any(dim=0),
    "a diagonal neighbour is not beside. Look at four neighbours, not at eight.": prostate & diagonals,
    "you look at two of the four sides.": prostate & ~sides("replicate")[:2].all(dim=0),
}
with exercise("5.1", "A prostate voxel whose left neighbour is none: prostate[:, :, 1:] & ~prostate[:, :, :-1]."):
    same(edge(patches.clone()), contour(patches), mistakes, "Compare one patch with its label, voxel by voxel.")

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


# %% tags=["alternative"]
def width_mm(distance, probability):
    found = []
    for level in (0.8, 0.2):
        k = int(np.flatnonzero(probability < level)[0])
        part = (probability[k - 1] - level) / (probability[k - 1] - probability[k])
        found.append(distance[k - 1] + part * (distance[k] - distance[k - 1]))
    return found[1] - found[0]


# %% tags=["mistake"]
# hint: must grow
def width_mm(distance, probability):
    at_high, at_low = np.interp([0.8, 0.2], probability, distance)
    return at_low - at_high


# %% tags=["mistake"]
# hint: negative
def width_mm(distance, probability):
    at_high, at_low = np.interp([0.8, 0.2], probability[::-1], distance[::-1])
    return at_high - at_low


# %% tags=["mistake"]
# hint: nearest measured point
def width_mm(distance, probability):
    at_high, at_low = (distance[np.abs(probability - level).argmin()] for level in (0.8, 0.2))
    return at_low - at_high


# %% tags=["mistake"]
# hint: number of points
def width_mm(distance, probability):
    return np.sum((probability > 0.2) & (probability < 0.8))


# %% tags=["check"]
x = np.array([-9.0, -6, -4, -1, 1, 2, 5, 9])
fall = np.array([1.0, 0.95, 0.85, 0.7, 0.5, 0.3, 0.12, 0.0])
at_high, at_low = -4 + 3 * 0.05 / 0.15, 2 + 3 * 0.1 / 0.18  # by hand
broken = np.interp([0.8, 0.2], fall, x)
mistakes = {
    "np.interp's second argument must grow, and a probability that falls does not. Turn both round.": (
        broken[1] - broken[0]
    ),
    "a width is not negative. Which of the two distances is the larger?": at_high - at_low,
    "you take the nearest measured point. Interpolate between two points.": x[6] - x[2],
    "that is the number of points between, not their distance.": 3,
}
with exercise("5.2", "np.interp(0.8, ...) gives the distance where the probability is 0.8."):
    same(width_mm(x, fall), at_low - at_high, mistakes, "0.8 is a third of the way from -4 to -1 mm.")

# %%
figure, ax = plt.subplots(figsize=(6.5, 3.8))
for (letter, (name, seed)), style in zip(hidden.items(), ("-", "--", "-.", ":"), strict=True):
    profile, colour = profiles[name, seed], VERMILION if name == "MetricUNet-C" else BLUE
    ax.plot(middle, profile, style, color=colour, marker="o", ms=3, label=f"{letter}: {name}, seed {seed}")
    print(f"{letter}: {name:12} seed {seed}: {width_mm(middle, profile):.1f} mm wide")
ax.axvline(0, color="gray", lw=1)
ax.set(xlabel="distance to the true contour, mm (inside < 0)", ylabel="mean probability of prostate", ylim=(0, 1))
ax.set_title("mean over 6 phantoms")
ax.legend()
plt.show()
print("your guess:", guess)

# %% [markdown]
# Compare two widths of the same kind with two of different kinds. Is the step from UNet to C larger than the step
# from one seed to the other? With two seeds each we cannot tell a small gain from none (lesson 6). But
# **contour-aware does not mean sharp contours**: C chooses *which* voxels speak, it does not say what is to happen
# at the edge.
#
# The paper claims more precise boundaries for MetricUNet-HCP where they are fuzzy, and shows heatmaps for it (Fig.
# 1). A profile like ours, over all test cases and some seeds, would be the measurement.

# %% [markdown]
# ## Step 3: what a voxel costs
#
# Now a mask that is perfect but for its outermost layer of voxels, 2.5 mm in plane.
#
# **Write down your guess**: which DSC does it have for the smallest of 14 prostates, and for the largest?

# %%
guess_small, guess_large = "?", "?"

# %% [markdown]
# **Exercise 5.3** (8 minutes). Take the contour voxels off a label `(z, y, x)`, slice by slice, and give the DSC of
# what is left with the whole, $2 |A \cap B| / (|A| + |B|)$. Use your `edge`: a volume is a batch of slices.


# %%
def dsc_without_rim(label):
    ### BEGIN SOLUTION
    rim = edge(torch.from_numpy(label).long()).numpy()
    whole, left = np.sum(label == 1), np.sum((label == 1) & ~rim)
    return 2 * left / (whole + left)
    ### END SOLUTION


# %% tags=["alternative"]
def dsc_without_rim(label):
    kept = (label == 1) & ~edge(torch.from_numpy(label)).numpy()
    return segmentation_metrics(kept, label == 1, spacing_mm=SPACING_MM)["DSC"]


# %% tags=["mistake"]
# hint: sensitivity
def dsc_without_rim(label):
    rim = edge(torch.from_numpy(label).long()).numpy()
    return np.sum((label == 1) & ~rim) / np.sum(label == 1)


# %% tags=["mistake"]
# hint: rim with the whole
def dsc_without_rim(label):
    rim = edge(torch.from_numpy(label).long()).numpy()
    return 2 * rim.sum() / (np.sum(label == 1) + rim.sum())


# %% tags=["mistake"]
# hint: factor 2
def dsc_without_rim(label):
    rim = edge(torch.from_numpy(label).long()).numpy()
    whole, left = np.sum(label == 1), np.sum((label == 1) & ~rim)
    return left / (whole + left)


# %% tags=["check"]
label = volumes[1][2]
rim = contour(torch.from_numpy(label).long()).numpy()
whole, left = (label == 1).sum(), ((label == 1) & ~rim).sum()
right = segmentation_metrics((label == 1) & ~rim, label == 1, spacing_mm=SPACING_MM)["DSC"]
mistakes = {
    "that is left / whole, the sensitivity. The DSC divides by the mean of both sizes.": left / whole,
    "you compare the rim with the whole. Take it off first.": 2 * rim.sum() / (whole + rim.sum()),
    "the factor 2 is missing: equal masks must give 1.": left / (whole + left),
}
with exercise("5.3", "What is left lies within the whole, so |A ∩ B| is |A|."):
    same(dsc_without_rim(label), right, mistakes, "Count the voxels of the whole and of what is left.")

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
# distance for everyone. Distances (ASD, HD95) do not have this fault, but others (lesson 1).

# %% [markdown]
# ## What we have learned
#
# * The border of a patch is no contour.
# * C asks contour voxels to be like each other. It does not ask for sharp edges, and we did not measure any.
# * DSC is kind to large organs.
#
# **To think about**: the paper's last section proposes that contour-aware sampling consider how contours are
# displaced. Sketch a sampler whose triplets do speak about the two sides of the contour. What did lesson 4 suggest?
#
# **Read next**: the paper's Section III-B.2, iii); Reinke et al., *Understanding metric-related pitfalls in image
# analysis validation* (Nature Methods 2024); then lesson 6: how many runs does it take to believe a gain?
