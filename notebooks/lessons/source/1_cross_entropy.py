# %% [markdown]
# # Lesson 1 · What does a loss know of a shape?
#
# We find out what a voxel-wise loss, the cross-entropy, knows of a shape, and what that means for a network that is
# trained by it.
#
# * **Time**: 45 minutes. The computer works for about 10 seconds.
# * **In the paper** (He et al., *MetricUNet*, Medical Image Analysis 2021,
#   [doi:10.1016/j.media.2021.102039](https://doi.org/10.1016/j.media.2021.102039)): Abstract and Section I; Eq. (3);
#   the metrics, Eq. (5) to (8) in Section IV-C.
# * **We need**: NumPy, and to have seen a UNet. It is the first lesson.
# * **Afterwards you can** write the cross-entropy; say what it, the DSC and HD95 each see of a mask; and tell what a
#   voxel-wise loss leaves to the network.
#
# **Work cell by cell** (Shift and Enter), not with *Run All*: a guess comes before its answer, and an exercise that
# is not solved yet stops the run. You can go back and run an earlier cell at any time.

# %% [markdown]
# ## A picture first
#
# Below is a slice of a made-up CT (a *phantom*) with its true prostate. Two imaginary networks segment it. Both
# find the whole prostate, and both call the same number of background voxels prostate by mistake: one along the
# rim, the other anywhere.

# %% tags=["setup"]
import sys

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import ndimage
from torch.nn import functional as F

from mupkg import repository
from mupkg.losses import VoxelMetricLoss
from mupkg.metrics import segmentation_metrics
from mupkg.samplers import ContourSampler, HardNegativeSampler, RandomSampler

# %% tags=["setup"]
sys.path.append(str(repository() / "notebooks/lessons"))
from checks import check
from classroom import SPACING_MM, embed, narrow, phantoms, show_slice, train

# %%
(image,), (label,) = phantoms([8])
truth = label == 1
beside = ndimage.binary_dilation(truth) & ~truth
masks = {}
for name, where in {"rim": beside, "scattered": ~truth}.items():
    chosen = np.random.default_rng(0).choice(np.flatnonzero(where), 120, replace=False)
    masks[name] = truth | np.isin(np.arange(truth.size), chosen).reshape(truth.shape)
middle = int(truth.sum(axis=(1, 2)).argmax())
figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
for ax, (name, mask) in zip(axes, masks.items(), strict=True):
    title = f"{name}: 120 wrong voxels,\n{(mask & ~truth)[middle].sum()} of them in slice {middle} of {len(image)}"
    show_slice(ax, image[middle], {"prediction": mask[middle], "truth": truth[middle]}, title)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Suppose both networks say "prostate" with a probability of 0.9 inside their masks and with 0.1 outside.
#
# **Write down your guess** before you go on. Which of the two has the lower cross-entropy? The higher DSC? The
# lower HD95 (the 95th percentile of the distances between both surfaces)?

# %%
guess_masks = {"cross-entropy": "?", "DSC": "?", "HD95": "?"}  # "rim", "scattered" or "equal"

# %%
for name, mask in masks.items():
    certainty = torch.from_numpy(np.where(mask, 0.9, 0.1))
    loss = F.binary_cross_entropy(certainty, torch.from_numpy(truth).double())
    scores = segmentation_metrics(mask, truth, spacing_mm=SPACING_MM)
    print(f"{name:9}: cross-entropy {loss:.4f}, DSC {scores['DSC']:.3f}, HD95 {scores['HD95']:.1f} mm")
print("your guess:", guess_masks)

# %% [markdown]
# The loss and the DSC cannot tell the two apart. HD95 can. A radiotherapist could, too: the first mask is a little
# fat, the second one would irradiate half of the pelvis.

# %% [markdown]
# ## Step 1: why
#
# Eq. (3) is a mean over voxels. With $p$ the predicted probability of prostate and $y$ the label, 0 or 1, one voxel
# contributes
#
# $$-\bigl(y \log p + (1 - y) \log (1 - p)\bigr).$$
#
# (Eq. (3) prints $\log(\hat p_n, l_n)$, with a comma; this is what it abbreviates.)
#
# **Exercise 1.1** (8 minutes). Write it, for arrays of any shape.


# %%
def cross_entropy(p, y):
    ### BEGIN SOLUTION
    return -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    ### END SOLUTION


# %% tags=["check"]
# Check of 1.1: run this cell
check("1.1", globals())

# %% [markdown]
# Now we shuffle *all voxels* of the volume, label and prediction in the same way.
#
# **Write down your guess**: what becomes of the cross-entropy and of the DSC?

# %%
guess_shuffled = {"cross-entropy": "?", "DSC": "?"}  # "lower", "equal" or "higher"

# %%
permutation = np.random.default_rng(1).permutation(truth.size)


def shuffled(volume):
    return volume.ravel()[permutation].reshape(volume.shape)


# %% [markdown]
# The loss and the DSC of the mask with the fat rim, and a slice of the shuffled volume:

# %%
losses, figure = [], plt.figure(figsize=(5, 4.3))
for name, change in {"as it was": np.array, "shuffled": shuffled}.items():
    p, y = change(masks["rim"]), change(truth)
    losses.append(cross_entropy(np.where(p, 0.9, 0.1), y.astype(float)))
    dice = segmentation_metrics(p, y, spacing_mm=SPACING_MM)["DSC"]
    print(f"{name:10}: cross-entropy {losses[-1]:.12f}, DSC {dice:.12f}")
print(f"the two losses differ by {abs(np.diff(losses)[0]):.0e}; your guess: {guess_shuffled}")
show_slice(figure.gca(), shuffled(image)[middle], {}, "the same slice, all voxels shuffled")
plt.show()

# %% [markdown]
# Nothing has changed, but for rounding at the far end of the digits. To the loss, an organ and this confetti are the
# same problem. That is the paper's starting point: a voxel-wise loss takes every voxel for itself (Section I).
#
# Mind what this does *not* say. The **network** does see neighbours, by its convolutions. The **loss** does not
# tell it what to do with them.

# %% [markdown]
# ## Step 2: as bad a shape as we like
#
# **Exercise 1.2** (10 minutes). Write a function that adds `count` wrong voxels to the truth in two ways. Both
# masks have the same cross-entropy and DSC, but HD95 is below 6 mm for the first and above 25 mm for the second.
# You may place the voxels as you like.


# %%
def two_masks(truth, count):
    ### BEGIN SOLUTION
    distance = ndimage.distance_transform_edt(~truth, sampling=SPACING_MM)
    outside = np.flatnonzero(~truth)
    by_distance = outside[np.argsort(distance.ravel()[outside])]
    near, far = truth.copy(), truth.copy()
    near.ravel()[by_distance[:count]] = True
    far.ravel()[by_distance[-count:]] = True
    return near, far
    ### END SOLUTION


# %% tags=["check"]
# Check of 1.2: run this cell
check("1.2", globals())

# %%
for name, mask in zip(("below 6 mm", "above 25 mm"), two_masks(truth, 120), strict=True):
    loss = cross_entropy(np.where(mask, 0.9, 0.1), truth.astype(float))
    scores = segmentation_metrics(mask, truth, spacing_mm=SPACING_MM)
    print(f"cross-entropy {loss:.4f}, DSC {scores['DSC']:.3f}, HD95 {scores['HD95']:.1f} mm, wanted {name}")

# %% [markdown]
# So **a lower loss does not mean a better shape**, and neither does a higher DSC.

# %% [markdown]
# ## Step 3: what a trained network does
#
# If the loss cannot see neighbours, does a network trained by it make confetti? We train a narrow UNet by
# cross-entropy alone and look where it errs on phantoms that it has not seen.
#
# **Write down your guess**: of how many separate pieces is one of its masks made? And which share of its wrong
# voxels lies within 5 mm of the true contour?

# %%
guess_pieces, guess_near = "?", "?"

# %%
volumes, unseen = phantoms(range(8)), phantoms(range(8, 12))
network, loss = narrow("UNet")
history = train(network, loss, volumes)
truths = [label == 1 for label in unseen[1]]
predicted = [embed(network, image).logits.argmax(dim=1).numpy() == 1 for image in unseen[0]]
wrong = [mask != truth for mask, truth in zip(predicted, truths, strict=True)]
print(f"cross-entropy {history['cross-entropy'].tail(20).mean():.3f}; {np.mean(wrong):.1%} of the voxels are wrong")

# %% [markdown]
# **Exercise 1.3** (10 minutes). Write the share of the wrong voxels that are at most `within_mm` away. The distance
# of a voxel is that to the nearest voxel of the *other* label, in mm, centre to centre.
# `ndimage.distance_transform_edt(mask, sampling=spacing_mm)` gives each voxel *in* the mask its distance to the
# nearest one outside.


# %%
def share_near(wrong, truth, spacing_mm, within_mm=5):
    ### BEGIN SOLUTION
    inside = ndimage.distance_transform_edt(truth, sampling=spacing_mm)
    outside = ndimage.distance_transform_edt(~truth, sampling=spacing_mm)
    distance = np.where(truth, inside, outside)
    return np.mean(distance[wrong] <= within_mm)
    ### END SOLUTION


# %% tags=["check"]
# Check of 1.3: run this cell
check("1.3", globals())

# %%
pairs = list(zip(wrong, truths, strict=True))
of_errors = np.mean([share_near(errors, truth, SPACING_MM) for errors, truth in pairs])
of_all = np.mean([share_near(np.ones_like(truth), truth, SPACING_MM) for truth in truths])
print(f"{of_errors:.0%} of the wrong voxels lie within 5 mm of the contour (your guess: {guess_near}),")
print(f"where {of_all:.0%} of all voxels lie")

# %% [markdown]
# Compare the two shares: what goes wrong gathers at the contour, where grey values do not tell and labels themselves
# are least certain. A remedy for this weakness of cross-entropy has to prove itself *there* (lesson 5). And the rest?
# We count the pieces of each mask, and throw all but the largest away.

# %%
falls = 0
for mask, actual in zip(predicted, truths, strict=True):
    pieces, count = ndimage.label(mask)
    largest = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    before, after = (segmentation_metrics(m, actual, spacing_mm=SPACING_MM) for m in (mask, largest))
    falls += after["HD95"] < before["HD95"]
    print(f"{count:2} pieces: DSC {before['DSC']:.3f}, HD95 {before['HD95']:4.1f} mm;", end=" ")
    print(f"the largest: DSC {after['DSC']:.3f}, HD95 {after['HD95']:4.1f} mm")
print(f"HD95 falls in {falls} of {len(predicted)} masks; your guess: {guess_pieces} pieces")

# %% [markdown]
# Some islands, as the paper says of networks trained like this, but no confetti: convolutions make neighbours
# answer alike, whatever the loss. And one line of clean-up removes the islands; where they lay far away, HD95 falls.
# So ask of every comparison whether *both* sides were cleaned up. The paper does not say (reading R10 of
# `METHOD.md`).

# %% [markdown]
# ## Step 4: and the metric loss?
#
# The paper's remedy compares voxels with each other: triplets of embeddings, which the next lessons take apart. It is
# to model "inter-voxel relationships". But which? We take the trained network's embeddings, draw triplets with the
# paper's three samplers, and shuffle all voxels once again.
#
# **Write down your guess**: which of R (random), H (hard) and C (contour) notices?

# %%
guess_notices = "?"  # letters

# %% tags=["setup"]
labels = torch.from_numpy(unseen[1][0]).long()
slices = labels.flatten(1).any(dim=1)
logits, embeddings = (values[slices] for values in embed(network, unseen[0][0]))
labels, probability = labels[slices], logits.softmax(dim=1)[:, 1]
mixed = torch.randperm(labels[0].numel(), generator=torch.Generator().manual_seed(0))

# %% [markdown]
# The metric loss over eight draws each, 500 anchors an image, first with all voxels in place and then shuffled:

# %%
print("your guess:", guess_notices)
for sampler in (RandomSampler(500), HardNegativeSampler(500), ContourSampler(500)):
    for name, order in {"in place": torch.arange(len(mixed)), "shuffled": mixed}.items():
        here = [x.flatten(-2)[..., order].unflatten(-1, (40, 40)) for x in (labels, probability, embeddings)]
        draws = (sampler(*here[:2], torch.Generator().manual_seed(k)) for k in range(8))
        losses = [VoxelMetricLoss()(here[2], tuples).item() for tuples in draws]
        print(f"{sampler.letter}: {name:8} {np.mean(losses):.4f} (8 draws: ± {np.std(losses):.4f})", end="  ")
    print()

# %% [markdown]
# Compare each difference with what the draws alone do (±). R and H do not notice. They relate voxels by their
# *label*, not by their place: two prostate voxels are to have like embeddings, wherever they are. **With R and H the
# metric loss is as blind to shape as cross-entropy; with C it uses places, but only to find the contour.** If it
# makes better shapes, it is in some other way.

# %% [markdown]
# ## What we have learned
#
# * Cross-entropy and DSC do not change when all voxels are shuffled. Surface distances do.
# * A network trained by cross-entropy errs at the contour and makes some islands, but no confetti.
# * R and H relate voxels by label; C looks at places only to find the contour.
#
# **To think about**: in the paper's Table III the UNet has an ASD of 3.9 mm and MetricUNet-HCP 1.4 mm, but a DSC of
# 0.84 and 0.88. (HCP: samplers H and C, and P, a second term that pulls positive pairs together.) Could islands
# explain the difference in ASD? What would you need to know?

# %% [markdown] tags=["exam"]
# **Two exam questions**
#
# 1. Two masks have the same DSC, 0.90, with the same truth. Draw (in 2D) a pair of which one is useful to a
#    radiotherapist and the other is not. Name a metric that tells them apart, and a pair that *it* cannot tell apart.
# 2. "We added a term to the cross-entropy and the number of islands fell, so the term models the neighbourhood."
#    Name two other explanations, and an experiment for each.

# %% [markdown]
# **Read next**: the paper's Section I; Maier-Hein et al., *Metrics reloaded* (Nature Methods 2024,
# [doi:10.1038/s41592-023-02151-z](https://doi.org/10.1038/s41592-023-02151-z)), on what each metric cannot see; then
# lesson 2: how a voxel becomes a vector.

# %% [markdown] tags=["answer"]
# ## Answers (in the solutions only)
#
# **To think about.** Islands can: a few voxels far away move an average of distances much and a DSC hardly, as the
# pieces above show. To know, one needs both rows with the largest component only, or the masks. The paper gives
# neither, nor does it say whether both were cleaned up.

# %% [markdown] tags=["answer", "exam"]
# **Exam 1.** A ring one voxel wide around the truth against the same number of voxels in a far corner: HD95 (or
# HD, ASD) tells them apart, the DSC does not. HD95 cannot tell apart, for instance, a far island of 4 % of the
# surface from none, and the maximum HD cannot tell one stray voxel from a hundred in the same place.
#
# **Exam 2.** Clean-up or its absence on one side (repeat with and without the largest component on both); the draw
# of the seed (train several times, lesson 6); a longer or better training (compare at the same cross-entropy). For
# the claim itself: shuffle the voxels and look whether the term changes, as in Step 4. If it does not, it knows of no
# neighbours. If it does, ask what it uses them for: C looks at them only to find the contour.
