# %% [markdown]
# # Lesson 3 · Triplets, the margin, and Eq. 2 as printed
#
# We train with Eq. (2) as it is printed and as we use it, find out what each of its parts is for, and what the margin
# is measured in.
#
# * **Time**: 45 minutes. The computer works for about 15 seconds.
# * **In the paper** (He et al., *MetricUNet*, Medical Image Analysis 2021,
#   [doi:10.1016/j.media.2021.102039](https://doi.org/10.1016/j.media.2021.102039)): Section III-B.3, Eq. (2). How we
#   read it: `METHOD.md`, readings R6 and R7.
# * **We need**: gradients by hand, a little PyTorch, and lesson 2.
# * **Afterwards you can** write a triplet loss and its gradient; say what each part of it does to a training; and
#   tell in which unit a margin is given.
#
# **Work cell by cell** (Shift and Enter), not with *Run All*: a guess comes before its answer, and an exercise that
# is not solved yet stops the run. You can go back and run an earlier cell at any time.

# %% [markdown]
# ## A picture first
#
# Sixty points in the plane stand for the embeddings of sixty voxels, 30 of the prostate and 30 of the background.
# We let a triplet loss move them, and nothing else. A triplet is an *anchor* and a *positive*, both from the
# prostate, and a *negative* from the background. In every step the loss pulls 20 anchors to their positives and
# pushes them away from their negatives.

# %% tags=["setup"]
import sys

import torch
from matplotlib import pyplot as plt

from mupkg import repository
from mupkg.losses import VoxelMetricLoss, gather_embeddings, squared_distance
from mupkg.metrics import segmentation_metrics
from mupkg.samplers import RandomSampler, VoxelTuples
from mupkg.stages import predict_volume

sys.path.append(str(repository() / "notebooks/lessons"))
from checks import check
from classroom import BACKGROUND, PROSTATE, SPACING_MM, narrow, phantoms, train


# %% tags=["setup"]
def move(loss, steps=60):
    generator = torch.Generator().manual_seed(3)
    points, values = torch.randn(60, 2, generator=generator) / 2, []
    points[:30] += torch.tensor([0.6, 0.3])  # the prostate's; they overlap with the others
    for _ in range(steps):
        anchors, positives = torch.randint(30, (2, 20), generator=generator)
        negatives = torch.randint(30, 60, (20,), generator=generator)
        moving = points.requires_grad_()
        value = loss(moving.T[None], VoxelTuples(anchors, positives, negatives))
        points = (points - 0.3 * torch.autograd.grad(value, moving)[0]).detach()
        values.append(value.item())
    return points, values


# %% [markdown]
# Loss A is the first term of Eq. (2) as it is printed, as a mean over the triplets. Loss B is the one we use. Both
# begin with the same points and see the same triplets.

# %%
losses = {"A": VoxelMetricLoss(hinge=False), "B": VoxelMetricLoss()}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.7))
for ax, (name, steps) in zip(axes, {"start": 0, "A": 60, "B": 60}.items(), strict=True):
    points, values = move(losses.get(name, losses["B"]), steps)
    ax.scatter(*points[30:].T, c=BACKGROUND, marker="s", s=18, label="background")
    ax.scatter(*points[:30].T, c=PROSTATE, marker="o", s=18, label="prostate")
    ending = f", after {steps} steps: the loss is {values[-1]:.2f}" if values else ""
    ax.set(title=name + ending, xlabel="channel 1", ylabel="channel 2", aspect="equal", box_aspect=1)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Look at the numbers along the axes, too.
#
# **Write down your guess** before you go on: which of the two has learned more? And where will A's loss be after
# another 60 steps?

# %%
guess_120 = "?"  # your number for A's loss after 120 steps

# %%
for name, loss in losses.items():
    print(f"{name}: the loss is {move(loss, 120)[1][-1]:.2f} after 120 steps")
print(f"your guess for A was {guess_120}")

# %% [markdown]
# A's loss has no lower end. It falls faster and faster, and more of it means nothing: the two kinds were apart long
# ago. B came to rest. The rest of this lesson is about that difference.

# %% [markdown]
# ## Step 1: the loss
#
# Write $d(u, v) = \lVert u - v \rVert_2^2$ for the **squared** distance of two embeddings. For one triplet, Eq. (2)
# prints
#
# $$d(a, p) - d(a, n) + \sigma .$$
#
# The triplet losses that the paper cites put a *hinge* around it,
#
# $$\max\bigl(0,\; d(a, p) - d(a, n) + \sigma\bigr),$$
#
# so that a triplet has nothing more to say once its negative is farther away than its positive by the margin
# $\sigma$. Eq. (2) sums over triplets. We take the mean.

# %% [markdown]
# **Exercise 3.1** (8 minutes). Write the triplet loss with its hinge. The three tensors are `(triplets, channels)`,
# and the answer is one number: the mean over all triplets.


# %%
def triplet_loss(anchors, positives, negatives, margin=0.7):
    ### BEGIN SOLUTION
    to_positive = (anchors - positives).square().sum(dim=1)
    to_negative = (anchors - negatives).square().sum(dim=1)
    return (to_positive - to_negative + margin).clamp(min=0).mean()
    ### END SOLUTION


# %% tags=["check"]
# Check of 3.1: run this cell
check("3.1", globals())

# %% [markdown]
# ## Step 2: how hard does a triplet push?
#
# Training follows gradients, not losses. So look at the gradient of $d(a, p) - d(a, n) + \sigma$ with respect to
# the anchor.
#
# **Write down your guess**: we move the negative twice as far away. Does it push harder, as hard as before, or less?

# %%
guess_push = {"A, as printed": "?", "B, with hinge": "?"}  # "harder", "equal" or "less"

# %% [markdown]
# **Exercise 3.2** (10 minutes). Work the gradient of *one* triplet's loss **with the hinge** out on paper, then
# write it down for all triplets at once, a row each. Do not call autograd: the check does.


# %%
def anchor_gradient(anchors, positives, negatives, margin=0.7):
    ### BEGIN SOLUTION
    to_positive = (anchors - positives).square().sum(dim=1)
    to_negative = (anchors - negatives).square().sum(dim=1)
    active = to_positive - to_negative + margin > 0
    return 2 * (negatives - positives) * active[:, None]
    ### END SOLUTION


# %% tags=["check"]
# Check of 3.2: run this cell
check("3.2", globals())

# %% [markdown]
# The anchor itself has dropped out: the gradient is $2(n - p)$, twice as long as the distance between negative and
# positive. Descent pushes the anchor the other way, along $p - n$. Now we draw the gradient's length for a negative
# that moves away.

# %%
away = torch.linspace(0.1, 3, 100)[:, None]
here, close = torch.zeros(100, 1), torch.full((100, 1), 0.5)  # the anchor, and its positive
with_hinge = anchor_gradient(here, close, -away).abs()
figure, ax = plt.subplots(figsize=(5.5, 3.2))
ax.plot(away, 2 * (away + close), "--", label="A, as printed")
ax.plot(away, with_hinge, label="B, with hinge")
ax.axvline((0.25 + 0.7) ** 0.5, color="gray", lw=1, label="d(a, n) = d(a, p) + σ")
ax.set(xlabel="distance from anchor to negative", ylabel="push on the anchor (gradient's length)")
ax.legend()
plt.show()
print("your guess:", guess_push)

# %% [markdown]
# Without the hinge the push *grows* with the distance: what is far apart already is driven apart fastest. That is
# exponential growth. With the hinge the push ends where the margin is met.

# %% [markdown]
# ## Step 3: in a network
#
# Now a real training: a narrow UNet, eight phantoms, 150 steps, random triplets (MetricUNet-R), and the paper's
# weight of $\lambda = 0.01$. That is a hundredth, so perhaps the missing hinge does not matter?
#
# **Write down your guess**: the mean squared length of an embedding, $\lVert e \rVert^2$, starts near 8. What is it
# after 150 steps with A, and with B? And what happens to the cross-entropy?

# %%
guess_a, guess_b = "?", "?"  # mean squared length after 150 steps


# %%
def length(output, labels):
    return {"squared length": output.embeddings.square().sum(dim=1).mean().item()}


volumes, networks, histories = phantoms(range(8)), {}, {}
for name, hinge in {"A": False, "B": True}.items():
    networks[name], loss = narrow("MetricUNet-R", hinge=hinge)
    histories[name] = train(networks[name], loss, volumes, steps=150, measure=length)
    first, last = histories[name].iloc[0], histories[name].tail(20).mean()  # single patches differ
    print(f"{name}: squared length {first['squared length']:.3g}, then {last['squared length']:.3g}", end=", ")
    print(f"metric loss {last['metric']:.3g}, cross-entropy {last['cross-entropy']:.3f}")
print("your guesses for the squared length:", guess_a, guess_b)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for ax, column in zip(axes, ("squared length", "cross-entropy"), strict=True):
    for name, style in {"A": "--", "B": "-"}.items():
        smooth = histories[name][column].rolling(10, min_periods=1).mean()
        ax.plot(smooth, style, label={"A": "A, as printed", "B": "B, with hinge"}[name])
    ax.set(xlabel="SGD step", ylabel=f"{column} (mean of 10 steps)")
    ax.legend()
axes[0].set_yscale("log")
plt.show()

# %% [markdown]
# What the two are worth, on four phantoms that neither has seen:

# %%
images, labels = phantoms(range(8, 12))
scores = {}
for name, network in networks.items():
    masks = [predict_volume(network, image) > 0.5 for image in images]
    pairs = zip(masks, labels, strict=True)
    scores[name] = [segmentation_metrics(mask, label, spacing_mm=SPACING_MM)["DSC"] for mask, label in pairs]
    print(f"{name}: DSC {', '.join(f'{value:.2f}' for value in scores[name])}")
worse = sum(a < b for a, b in zip(scores["A"], scores["B"], strict=True))
print(f"A is worse than B on {worse} of {len(images)} phantoms")

# %% [markdown]
# A's loss is by far the lower one, and its network the worse one. Its embeddings grow, and the cross-entropy has less
# and less say. A hundredth of a term without an end is still a term without an end.
#
# **A lower value means nothing if the loss has no lower end.** We doubt that Eq. (2) was trained as it is printed,
# and read it with the hinges of the losses that the paper cites (reading R6).

# %% [markdown]
# ## Step 4: what is the margin measured in?
#
# The paper sets $\sigma = 0.7$ (and 1.0 in Table III). Is that much? We take B's network and draw triplets from a
# slice of a phantom that it has not seen.

# %%
middle = torch.from_numpy(images[0][7:10])[None].float() / 255  # three neighbouring slices
label = torch.from_numpy(labels[0][8])[None].long()
with torch.no_grad():
    embeddings = networks["B"](middle).embeddings
tuples = RandomSampler(anchors=500, pairs=10)(label, generator=torch.Generator().manual_seed(0))
seen = [gather_embeddings(embeddings, voxels) for voxels in tuples]  # anchors, positives, negatives
to_positive, to_negative = (squared_distance(seen[0], other) for other in seen[1:])
print(f"{len(to_positive)} triplets: d(a, p) is {to_positive.mean():.2f}", end=" ")
print(f"and d(a, n) is {to_negative.mean():.2f} on average; the margin is 0.7")

# %% [markdown]
# A triplet that the hinge has not silenced is *active*: only active triplets teach.
#
# **Write down your guess**: we multiply all embeddings by 10. Nothing moves against anything else. What happens to
# the share of active triplets?

# %%
guess_scale = "?"  # the share with embeddings × 10

# %% [markdown]
# **Exercise 3.3** (10 minutes). Write the share of active triplets. With `normalize=True` bring every embedding to
# length 1 first, each by itself.


# %%
def active_share(anchors, positives, negatives, margin=0.7, normalize=False):
    ### BEGIN SOLUTION
    if normalize:
        anchors, positives, negatives = (x / x.norm(dim=1, keepdim=True) for x in (anchors, positives, negatives))
    to_positive = (anchors - positives).square().sum(dim=1)
    to_negative = (anchors - negatives).square().sum(dim=1)
    return (to_positive - to_negative + margin > 0).float().mean()
    ### END SOLUTION


# %% tags=["check"]
# Check of 3.3: run this cell
check("3.3", globals())

# %%
for scale in (0.1, 1, 10):
    raw, unit = (active_share(*(scale * x for x in seen), normalize=k) for k in (False, True))
    print(f"embeddings × {scale:<4}: {raw:.3f} of the triplets are active, {unit:.3f} if normalised")
print("your guess for × 10:", guess_scale)

# %% [markdown]
# The same geometry, and anything between all and almost none of the triplets teach. So **σ has no meaning by
# itself**. It is a length (squared) to be compared with the distances in the network at hand, and these depend on
# the number of channels and on batch norm. Whoever compares two margins, or one margin in two networks, compares
# scales as well. `VoxelMetricLoss(normalize=True)` takes the scale away; the paper does not. What that is worth on
# phantoms was asked in the trial E3: see "Which part of the method matters?" in `RESULTS.md`.

# %% [markdown]
# ## What we have learned
#
# * A triplet loss without a hinge has no lower end; its push grows with the distance, and it drowns the
#   cross-entropy.
# * A satisfied triplet has a gradient of exactly zero. It teaches nothing.
# * The margin is measured in the embeddings' own units.
#
# **To think about**: Eq. (2) adds ε in its second term (the P of HCP), $d(a, p) + \varepsilon$, though the text
# calls ε the greatest distance of positive pairs. What is the gradient of an added constant? What would a hinge make
# of it?

# %% [markdown] tags=["exam"]
# **Two exam questions**
#
# 1. One triplet: a = (0, 0), p = (1, 0), n = (0, 2), σ = 0.7. Compute the loss with and without the hinge and the
#    gradient with respect to a in both cases. At which distance of n from a does B fall silent?
# 2. Two groups report their best margin: 0.7 with 256 channels, 1.0 with 64 channels. A third group concludes that
#    fewer channels need a larger margin. What do you ask before you believe it?

# %% [markdown]
# **Read next**: the paper's Section III-B.3 once more, now with R6 and R7 of `METHOD.md`; *FaceNet* (Schroff et al.,
# CVPR 2015, [doi:10.1109/CVPR.2015.7298682](https://doi.org/10.1109/CVPR.2015.7298682)), Section 3, for where the
# hinge comes from; then lesson 4: of the triplets we draw, who still teaches?

# %% [markdown] tags=["answer"]
# ## Answers (in the solutions only)
#
# **To think about.** An added constant has the gradient zero: as printed, ε does nothing. In a hinge,
# $\max(0, d(a, p) - \varepsilon)$, it becomes what the text calls it: pairs nearer than ε are left alone.

# %% [markdown] tags=["answer", "exam"]
# **Exam 1.** d(a, p) = 1, d(a, n) = 4: without a hinge 1 - 4 + 0.7 = -2.3, with it 0. The gradient is
# 2 (n - p) = (-2, 4) without and (0, 0) with it. B falls silent once d(a, n) reaches 1.7, that is at a distance of
# √1.7, about 1.3.
#
# **Exam 2.** How large are d(a, p) and d(a, n) in both networks? The margin is compared with them, and a sum over
# more channels is larger to begin with. Were the embeddings normalised? Which share of the triplets is active? And
# how many seeds stand behind each "best"?
