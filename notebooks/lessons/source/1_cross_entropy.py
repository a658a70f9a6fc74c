# %% [markdown]
# # Lesson 1 · Cross-entropy cannot see neighbours
#
# We find out what a voxel-wise loss knows of a shape, which is nothing, and what that means for a network that is
# trained by it.
#
# * **Time**: 40 minutes. The computer works for about 10 seconds.
# * **In the paper**: Abstract and Section I; Eq. (3); the metrics, Eq. (5) to (8) in Section IV-C.
# * **We need**: NumPy, and to have seen a UNet. It is the first lesson.

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
from classroom import SPACING_MM, embed, exercise, expect, narrow, phantoms, same, show_slice, train

# %%
(image,), (label,) = phantoms([8])
truth = label == 1
beside = ndimage.binary_dilation(truth) & ~truth
masks = {}
for name, where in {"rim": beside, "scattered": ~truth}.items():
    wrong = np.random.default_rng(0).choice(np.flatnonzero(where), 120, replace=False)
    masks[name] = truth | np.isin(np.arange(truth.size), wrong).reshape(truth.shape)
middle = int(truth.sum(axis=(1, 2)).argmax())
figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
for ax, (name, mask) in zip(axes, masks.items(), strict=True):
    outlines = {"prediction": mask[middle], "truth": truth[middle]}
    show_slice(ax, image[middle], outlines, f"120 wrong voxels: {name} (slice {middle} of {len(image)})")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Suppose both networks say "prostate" with a probability of 0.9 inside their masks and with 0.1 outside.
#
# **Write down your guess** before you go on. Which of the two has the lower cross-entropy? The higher DSC? The
# lower HD95 (the 95th percentile of the distances between both surfaces)?

# %%
guess = {"cross-entropy": "?", "DSC": "?", "HD95": "?"}  # "rim", "scattered" or "equal"

# %%
for name, mask in masks.items():
    probability = torch.from_numpy(np.where(mask, 0.9, 0.1))
    loss = F.binary_cross_entropy(probability, torch.from_numpy(truth).double())
    scores = segmentation_metrics(mask, truth, spacing_mm=SPACING_MM)
    print(f"{name:9}: cross-entropy {loss:.4f}, DSC {scores['DSC']:.3f}, HD95 {scores['HD95']:.1f} mm")
print("your guess:", guess)

# %% [markdown]
# The loss and the DSC cannot tell the two apart. HD95 can. A radiotherapist could, too: the first mask is a little
# fat, the second one would irradiate half of the pelvis.

# %% [markdown]
# ## Step 1: why
#
# Eq. (3) is a mean over voxels. With $p$ the predicted probability of prostate and $y$ the label, 0 or 1, one voxel
# counts
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


# %% tags=["alternative"]
def cross_entropy(p, y):
    return float(np.log(1 / np.where(np.asarray(y) == 1, p, 1 - p)).mean())


# %% tags=["mistake"]
# hint: background voxels count nothing
def cross_entropy(p, y):
    return -np.mean(y * np.log(p))


# %% tags=["mistake"]
# hint: a mean
def cross_entropy(p, y):
    return -np.sum(y * np.log(p) + (1 - y) * np.log(1 - p))


# %% tags=["mistake"]
# hint: minus sign
def cross_entropy(p, y):
    return np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))


# %% tags=["mistake"]
# hint: of the prostate only
def cross_entropy(p, y):
    return -np.log(p[y == 1]).mean()


# %% tags=["check"]
rng = np.random.default_rng(0)
p, y = rng.uniform(0.02, 0.98, (4, 10, 10)), (rng.random((4, 10, 10)) < 0.2).astype(float)
right = F.binary_cross_entropy(torch.from_numpy(p), torch.from_numpy(y)).item()
mistakes = {
    "background voxels count nothing in yours. Where y is 0, log(1 - p) counts.": -np.mean(y * np.log(p)),
    "you sum; the loss is a mean over the voxels.": right * p.size,
    "the minus sign is missing: a loss is above 0.": -right,
    "you took the mean of the prostate only; every voxel counts.": -np.log(p[y == 1]).mean(),
}
with exercise("1.1", "np.log and np.mean are all you need."):
    same(cross_entropy(p, y), right, mistakes, "Try one voxel by hand: p = 0.9, y = 1 gives 0.105.")

# %% [markdown]
# Now we shuffle *all voxels* of the volume, label and prediction in the same way.
#
# **Guess**: what becomes of the cross-entropy and of the DSC?

# %%
order = np.random.default_rng(1).permutation(truth.size)


def shuffled(volume):
    return volume.ravel()[order].reshape(volume.shape)


mask, figure = masks["rim"], plt.figure(figsize=(5, 4.3))
for name, change in {"as it was": np.array, "shuffled": shuffled}.items():
    p, y = np.where(change(mask), 0.9, 0.1), change(truth)
    dice = segmentation_metrics(change(mask), y, spacing_mm=SPACING_MM)["DSC"]
    print(f"{name:10}: cross-entropy {cross_entropy(p, y):.12f}, DSC {dice:.12f}")
show_slice(figure.gca(), shuffled(image)[middle], {}, "the same slice, all voxels shuffled")
plt.show()

# %% [markdown]
# Nothing has changed but the last digit's rounding. To the loss, an organ and this confetti are the same problem.
# That is the paper's starting point: a voxel-wise loss takes every voxel for itself (Section I).
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


# %% tags=["alternative"]
def two_masks(truth, count):
    near, far = truth.copy(), truth.copy()
    z, y, x = np.nonzero(ndimage.binary_dilation(truth) & ~truth)
    near[z[:count], y[:count], x[:count]] = True
    far[0, : count // 10, :10] = True  # a block in a corner
    return near, far


# %% tags=["mistake"]
# hint: prostate voxels are missing
def two_masks(truth, count):
    rim = np.flatnonzero(ndimage.binary_dilation(truth) & ~truth)[:count]
    far = np.flatnonzero(~truth)[:count]
    return tuple(np.isin(np.arange(truth.size), wrong).reshape(truth.shape) for wrong in (rim, far))


# %% tags=["mistake"]
# hint: drawn twice
def two_masks(truth, count):
    near, far = truth.copy(), truth.copy()
    rng = np.random.default_rng(0)
    near.ravel()[rng.choice(np.flatnonzero(ndimage.binary_dilation(truth) & ~truth), count)] = True
    far.ravel()[rng.choice(np.flatnonzero(~truth), count)] = True
    return near, far


# %% tags=["mistake"]
# hint: first mask
def two_masks(truth, count):
    near, far = truth.copy(), truth.copy()
    near.ravel()[np.flatnonzero(~truth)[:count]] = True
    far.ravel()[np.flatnonzero(~truth)[-count:]] = True
    return near, far


# %% tags=["mistake"]
# hint: second mask
def two_masks(truth, count):
    near, far = truth.copy(), truth.copy()
    rim = np.flatnonzero(ndimage.binary_dilation(truth) & ~truth)
    near.ravel()[rim[:count]] = True
    far.ravel()[rim[-count:]] = True
    return near, far


# %% tags=["check"]
with exercise("1.2", "The rim is what a dilation adds. For the far voxels, think of the corners."):
    for count in (60, 150):
        both = two_masks(truth.copy(), count)
        for mask in both:
            expect(mask[truth].all(), "prostate voxels are missing. Add the wrong voxels to the truth.")
            added = int((mask & ~truth).sum())
            expect(added == count, f"there are {added} wrong voxels, not {count}. Were some drawn twice?")
        near, far = (segmentation_metrics(mask, truth, spacing_mm=SPACING_MM)["HD95"] for mask in both)
        expect(near < 6, f"the first mask has an HD95 of {near:.1f} mm. Stay closer to the prostate.")
        expect(far > 25, f"the second mask has an HD95 of {far:.1f} mm. Go farther away.")

# %%
for name, mask in zip(("near", "far"), two_masks(truth, 120), strict=True):
    loss = cross_entropy(np.where(mask, 0.9, 0.1), truth)
    scores = segmentation_metrics(mask, truth, spacing_mm=SPACING_MM)
    print(f"{name:4}: cross-entropy {loss:.4f}, DSC {scores['DSC']:.3f}, HD95 {scores['HD95']:.1f} mm")

# %% [markdown]
# So **a lower loss is no better shape**. Nor is a higher DSC.

# %% [markdown]
# ## Step 3: what a trained network does
#
# If the loss cannot see neighbours, does a network trained by it make confetti? We train a narrow UNet by
# cross-entropy alone and look where it errs on phantoms that it has not seen.
#
# **Guess**: of how many separate pieces is one of its masks made? And which share of its wrong voxels lies within 5
# mm of the true contour?

# %%
guess_pieces, guess_near = "?", "?"

# %%
volumes, unseen = phantoms(range(8)), phantoms(range(8, 12))
network, loss = narrow("UNet")
history = train(network, loss, volumes)
truths = [label == 1 for label in unseen[1]]
masks = [embed(network, image).logits.argmax(dim=1).numpy() == 1 for image in unseen[0]]
wrong = [mask != truth for mask, truth in zip(masks, truths, strict=True)]
print(f"cross-entropy {history['cross-entropy'].tail(20).mean():.3f}; {np.mean(wrong):.1%} of the voxels are wrong")

# %% [markdown]
# **Exercise 1.3** (10 minutes). Write the share of the wrong voxels that are near. The distance of a voxel is that
# to the nearest voxel of the *other* label, in mm, centre to centre. `ndimage.distance_transform_edt(mask,
# sampling=spacing_mm)` gives each voxel *in* the mask its distance to the nearest one outside.


# %%
def share_near(wrong, truth, spacing_mm, within_mm=5):
    ### BEGIN SOLUTION
    inside = ndimage.distance_transform_edt(truth, sampling=spacing_mm)
    outside = ndimage.distance_transform_edt(~truth, sampling=spacing_mm)
    distance = np.where(truth, inside, outside)
    return np.mean(distance[wrong] <= within_mm)
    ### END SOLUTION


# %% tags=["mistake"]
# hint: in voxels
def share_near(wrong, truth, spacing_mm, within_mm=5):
    distance = ndimage.distance_transform_edt(truth) + ndimage.distance_transform_edt(~truth)
    return np.mean(distance[wrong] <= within_mm)


# %% tags=["mistake"]
# hint: inside the prostate
def share_near(wrong, truth, spacing_mm, within_mm=5):
    distance = ndimage.distance_transform_edt(~truth, sampling=spacing_mm)
    return np.mean(distance[wrong] <= within_mm)


# %% tags=["mistake"]
# hint: other way round
def share_near(wrong, truth, spacing_mm, within_mm=5):
    distance = sum(ndimage.distance_transform_edt(mask, sampling=spacing_mm) for mask in (truth, ~truth))
    return np.mean(wrong[distance <= within_mm])


# %% tags=["check"]
rng = np.random.default_rng(2)
ball = np.hypot(*np.mgrid[-15:16, -15:16]) < 9.5
noise, spacing = rng.random(ball.shape) < 0.3, (3.0, 2.0)
depth, away = (ndimage.distance_transform_edt(mask, sampling=spacing) for mask in (ball, ~ball))
in_voxels = ndimage.distance_transform_edt(ball) + ndimage.distance_transform_edt(~ball)
mistakes = {
    "you measure in voxels; `sampling` makes it mm.": np.mean(in_voxels[noise] <= 5),
    "voxels inside the prostate have no distance in yours. They need the other transform.": np.mean(away[noise] <= 5),
    "you have it the other way round: of the near voxels, the share that is wrong.": np.mean(
        noise[depth + away <= 5]
    ),
}
with exercise("1.3", "One distance transform for voxels inside, one for those outside."):
    right = np.mean((depth + away)[noise] <= 5)
    same(
        share_near(noise, ball, spacing),
        right,
        mistakes,
        "Of the wrong voxels, how many have a distance of 5 or less?",
    )

# %%
pairs = list(zip(wrong, truths, strict=True))
of_errors = np.mean([share_near(errors, truth, SPACING_MM) for errors, truth in pairs])
of_all = np.mean([share_near(np.ones_like(truth), truth, SPACING_MM) for truth in truths])
print(f"{of_errors:.0%} of the wrong voxels lie within 5 mm of the contour (your guess: {guess_near}),")
print(f"where {of_all:.0%} of all voxels lie")

# %% [markdown]
# Most of what goes wrong goes wrong at the contour, where grey values do not tell and labels themselves are least
# certain. A cure for cross-entropy has to prove itself *there* (lesson 5). And the rest? We count the pieces of
# each mask, and throw all but the largest away.

# %%
print(f"your guess: {guess_pieces} pieces")
for mask, truth in zip(masks, truths, strict=True):
    pieces, count = ndimage.label(mask)
    largest = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    print(f"{count:2} pieces", end="")
    for name, shown in {"all": mask, "largest": largest}.items():
        scores = segmentation_metrics(shown, truth, spacing_mm=SPACING_MM)
        print(f"; {name}: DSC {scores['DSC']:.3f}, HD95 {scores['HD95']:4.1f} mm", end="")
    print()

# %% [markdown]
# Some islands, as the paper says of networks trained like this, but no confetti: convolutions make neighbours
# answer alike, whatever the loss. And one line of clean-up removes the islands. So ask of every comparison whether
# *both* sides were cleaned up; the paper does not say (reading R10 of `METHOD.md`).

# %% [markdown]
# ## Step 4: and the metric loss?
#
# The paper's cure compares voxels with each other: triplets of embeddings, which the next lessons take apart. It is
# to model "inter-voxel relationships". But which? We take the trained network's embeddings, draw triplets with the
# paper's three samplers, and shuffle all voxels once again.
#
# **Guess**: which of R (random), H (hard) and C (contour) notices?

# %%
logits, embeddings = embed(network, unseen[0][0])
labels, probability = torch.from_numpy(unseen[1][0]).long(), logits.softmax(dim=1)[:, 1]
slices = labels.flatten(1).any(dim=1)
labels, probability, embeddings = labels[slices], probability[slices], embeddings[slices]
mixed = torch.randperm(labels[0].numel(), generator=torch.Generator().manual_seed(0))
for sampler in (RandomSampler(2000), HardNegativeSampler(2000), ContourSampler(2000)):
    losses = []
    for order in (torch.arange(len(mixed)), mixed):
        here = [x.flatten(-2)[..., order].unflatten(-1, (40, 40)) for x in (labels, probability, embeddings)]
        tuples = sampler(*here[:2], torch.Generator().manual_seed(0))
        losses.append(VoxelMetricLoss()(here[2], tuples).item())
    print(f"{sampler.letter}: metric loss {losses[0]:.3f}, with shuffled voxels {losses[1]:.3f}")

# %% [markdown]
# R and H do not notice (the small differences come from the draws). They relate voxels by their *label*, not by
# their place: two prostate voxels are to have like embeddings, wherever they are. Only C looks at places at all, to
# find the contour. **The metric loss is as blind to shape as cross-entropy.** If it makes better shapes, it is in
# some other way.

# %% [markdown]
# ## What we have learned
#
# * Cross-entropy and DSC do not change when all voxels are shuffled. Surface distances do.
# * A network trained by cross-entropy errs at the contour and makes some islands, but no confetti.
# * The metric loss relates voxels by label, not by place.
#
# **To think about**: in the paper's Table III the UNet has an ASD of 3.9 mm and MetricUNet-HCP 1.4 mm, but a DSC of
# 0.84 and 0.88. Could islands explain the difference in ASD? What would you need to know?
#
# **Read next**: the paper's Section I; Maier-Hein et al., *Metrics reloaded* (Nature Methods 2024), on what each
# metric cannot see; then lesson 2: how a voxel becomes a vector.
