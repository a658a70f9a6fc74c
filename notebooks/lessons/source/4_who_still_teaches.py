# %% [markdown]
# # Lesson 4 · Who still teaches?
#
# A satisfied triplet has no gradient (lesson 3). So we ask of each sampler how many of its triplets still teach,
# and find out what "focal hard negative sampling" samples.
#
# * **Time**: 45 minutes. The computer works for about 15 seconds.
# * **In the paper** (He et al., *MetricUNet*, Medical Image Analysis 2021,
#   [doi:10.1016/j.media.2021.102039](https://doi.org/10.1016/j.media.2021.102039)): Section III-B.2, Eq. (1), Fig. 5.
#   How we read it: `METHOD.md`, "Samplers" and reading R5.
# * **We need**: lesson 3, and the shapes of PyTorch's tensors.
# * **Afterwards you can** count the triplets that still teach; say what each sampler of the paper samples; and write
#   a sampler of your own.
#
# **Work cell by cell** (Shift and Enter), not with *Run All*: a guess comes before its answer, and an exercise that
# is not solved yet stops the run. You can go back and run an earlier cell at any time.

# %% [markdown]
# ## A picture first
#
# We train a narrow MetricUNet-R for 150 steps. In every step we draw up to 100 more random triplets an image, only
# to look at them: a triplet is *active* while $d(a, p) - d(a, n) + \sigma > 0$. The line is the share of R's
# triplets that are active.

# %% tags=["setup"]
import sys

import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from mupkg import repository
from mupkg.data import PatchSource
from mupkg.samplers import ContourSampler, HardNegativeSampler, RandomSampler

sys.path.append(str(repository() / "notebooks/lessons"))
from checks import check
from classroom import VERMILION, activity, narrow, phantoms, show_slice, train

# %%
samplers = [RandomSampler(100), HardNegativeSampler(100), ContourSampler(100)]  # anchors an image
volumes = phantoms(range(8))
network, loss = narrow("MetricUNet-R")
history = train(network, loss, volumes, steps=150, measure=activity(*samplers))

figure, ax = plt.subplots(figsize=(6, 3.4))
ax.plot(history["R"].rolling(5, min_periods=1).mean(), label="R, random")
ax.set(xlabel="SGD step", ylabel="share of active triplets\n(mean of 5 steps)", ylim=(0, 0.5))
ax.legend()
plt.show()

# %% [markdown]
# Two things to notice. The line falls, as it should: the network learns. But look where it starts: *before the
# first step* most random triplets are satisfied already. Most of the background is fat, muscle or bone, and looks
# like no prostate even to a network that has learned nothing.
#
# The paper expects this: with random sampling, tuples that are satisfied already dominate (Section III-B.2, ii).
# Its remedy is H. C has another purpose, the contour; we look at it as well.
#
# **Write down your guess**: which share of H's and of C's triplets is active at the end? And of R's, if the network
# is a plain UNet that has never seen a triplet?

# %%
guess_h, guess_c, guess_unet = "?", "?", "?"  # shares between 0 and 1, mean of the last 20 steps

# %% [markdown]
# ## Step 1: look at it ourselves
#
# We take 16 patches of phantoms that the network has not seen, and draw with R. A sampler gives no vectors, only
# *where* to look: flat indices into `labels.flatten()`, so that no gradient runs through the choice.

# %%
source = PatchSource(*phantoms(range(8, 12)), patch_size=(32, 32), batch_size=16, seed=1)
images, labels = source.batch(0)
with torch.no_grad():
    logits, embeddings = network(images)
probability = logits.softmax(dim=1)[:, 1]
tuples = RandomSampler(100)(labels, generator=torch.Generator().manual_seed(0))
print("labels", tuple(labels.shape), " embeddings", tuple(embeddings.shape), " tuples", len(tuples.anchors))
print("the first anchor is voxel", tuples.anchors[0].item(), "of", labels.numel())

# %% [markdown]
# **Exercise 4.1** (8 minutes). Write the share of active triplets from the embeddings `(N, E, H, W)` and the
# tuples. Mind the order of the axes: voxel number $i$ of `labels.flatten()` has its embedding in the *second* axis.


# %%
def active_share(embeddings, tuples, margin=0.7):
    ### BEGIN SOLUTION
    rows = embeddings.movedim(1, -1).flatten(0, 2)  # a row a voxel
    anchors, positives, negatives = (rows[voxels] for voxels in tuples)
    to_positive = (anchors - positives).square().sum(dim=1)
    to_negative = (anchors - negatives).square().sum(dim=1)
    return (to_positive - to_negative + margin > 0).float().mean()
    ### END SOLUTION


# %% tags=["check"]
# Check of 4.1: run this cell
check("4.1", globals())

# %% [markdown]
# ## Step 2: focal hard negative sampling
#
# Eq. (1) calls a voxel hard if $|\hat y - y| > \tau$ with $\tau = 0.1$: the head is off by more than a tenth. The
# anchors are the hard voxels among the positive ones.
#
# **Exercise 4.2** (8 minutes). Write the mask of H's anchor candidates, `(N, H, W)`, from labels and foreground
# probabilities.


# %%
def hard_anchors(labels, probability, threshold=0.1):
    ### BEGIN SOLUTION
    hard = (probability - labels).abs() > threshold
    return hard & (labels == 1)
    ### END SOLUTION


# %% tags=["check"]
# Check of 4.2: run this cell
check("4.2", globals())

# %% [markdown]
# In the prostate $y = 1$, so "hard" means $p < 0.9$.
#
# **Write down your guess**: how much of the prostate is hard at the beginning of training, and what does H then
# have in common with R?

# %%
guess_hard = {"share": "?", "in common": "?"}

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
smooth = history.rolling(5, min_periods=1).mean()
axes[0].plot(smooth["H anchors"], color=VERMILION)
axes[0].set(xlabel="SGD step", ylabel="share of the prostate that is hard", ylim=(0, 1.05))
for letter, style in {"R": "-", "H": "--", "C": ":"}.items():
    axes[1].plot(smooth[letter], style, label=letter)
axes[1].set(xlabel="SGD step", ylabel="share of active triplets\n(mean of 5 steps)", ylim=(0, 0.5))
axes[1].legend()
plt.show()

# %%
end, alike = history.tail(20).mean(), (history["R"] == history["H"]).cumprod().sum()
print(f"hard at the beginning: {history['H anchors'].iloc[0]:.0%} of the prostate (you: {guess_hard})")
print(f"in the first {alike} steps H's triplets are R's, because the whole prostate is hard")
print(f"active at the end: R {end['R']:.3f}, H {end['H']:.3f} (you: {guess_h}), C {end['C']:.3f} (you: {guess_c}),")
print(f"H's {end['H'] / end['R']:.1f} and C's {end['C'] / end['R']:.1f} times as often as R's;", end=" ")
print(f"but {1 - end['H']:.0%} of H's and {1 - end['C']:.0%} of C's triplets teach nothing")

# %% [markdown]
# As long as the head calls no voxel prostate with $p > 0.9$, **H is R**. And later? Look at the last
# line. Hard negative sampling was to find the triplets that still teach. Why does most of what it finds teach
# nothing?

# %% [markdown]
# We look where the negatives come from. We draw with R and with H from the *same* random numbers.

# %%
draws = {}
for name, sampler in {"R": RandomSampler(100), "H": HardNegativeSampler(100)}.items():
    draws[name] = sampler(labels, probability, torch.Generator().manual_seed(0))
for role in ("anchors", "positives", "negatives"):
    equal = (getattr(draws["R"], role) == getattr(draws["H"], role)).float().mean()
    print(f"{role:9}: {equal:.2f} of H's are R's, voxel by voxel")

# %%
number = int(labels.flatten(1).sum(dim=1).argmax())  # the patch with most prostate
figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), sharey=True)
for ax, name in zip(axes, draws, strict=True):
    show_slice(ax, images[number, 1], {"truth": labels[number]}, f"{name}: 100 triplets of one patch")
    for role, marker, colour in (("negatives", "o", VERMILION), ("anchors", "x", "white")):
        here = getattr(draws[name], role).numpy()
        here = here[here // labels[0].numel() == number] % labels[0].numel()
        y, x = here // 32, here % 32
        ax.scatter(2.5 * x + 1.25, 2.5 * y + 1.25, c=colour, marker=marker, s=16, linewidths=1.2, label=role)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, facecolor="lightgray")
plt.show()

# %% [markdown]
# Every negative of H is the one that R drew. **Hard negative sampling does not sample hard negatives**: it samples
# hard *anchors*, prostate voxels that look too little like prostate, and sets them against any background. R and C
# set theirs against any background, too. The name promises something else, and Fig. 5(b) hides it, because it draws
# the anchors only.

# %% [markdown]
# ## Step 3: near negatives
#
# Which background is hard to tell from prostate? What touches it: the neighbouring organ, and voxels that hold
# both.
#
# **Exercise 4.3** (12 minutes). Write a sampler that draws anchors and positives as R does, and negatives among the
# background voxels at most `width` voxels from the prostate (diagonal steps may count as one or as two). `candidates`
# gives three masks `(N, H, W)` of truth values: who may be anchor, positive, negative. *Hint*: the largest label in a
# window of $2 \cdot \mathrm{width} + 1$ voxels, `F.max_pool2d` with `stride=1`.


# %%
class NearSampler(RandomSampler):
    def __init__(self, anchors=20, width=1):
        super().__init__(anchors)
        self.width = width

    def candidates(self, labels, foreground_probability=None):
        ### BEGIN SOLUTION
        prostate = labels == 1
        around = F.max_pool2d(prostate.float(), 2 * self.width + 1, stride=1, padding=self.width) > 0
        return prostate, prostate, around & (labels == 0)
        ### END SOLUTION


# %% tags=["check"]
# Check of 4.3: run this cell
check("4.3", globals())

# %% [markdown]
# **Write down your guess**: by what factor is the share of active triplets larger than R's, if the negatives touch
# the prostate?

# %%
guess_near = "?"

# %%
shares = {}
for width in (1, 2, 3, 4, 6, 8, 12):
    near = NearSampler(100, width)(labels, generator=torch.Generator().manual_seed(0))
    shares[width] = float(active_share(embeddings, near))
lines = {letter: float(active_share(embeddings, drawn)) for letter, drawn in draws.items()}
figure, ax = plt.subplots(figsize=(6, 3.4))
ax.plot(shares.keys(), shares.values(), "o-", label="near negatives")
for (letter, share), style in zip(lines.items(), ("--", ":"), strict=True):
    ax.axhline(share, color=VERMILION, ls=style, label=f"{letter}: negatives from anywhere")
ax.set(xlabel="negatives lie at most this many voxels from the prostate", ylabel="share of active triplets", ylim=0)
ax.legend()
plt.show()

# %%
times = {"harder anchors": lines["H"] / lines["R"], "nearer negatives": shares[1] / lines["R"]}
print(", ".join(f"{name}: {factor:.1f} times R's share" for name, factor in times.items()), end=" ")
print(f"(your guess: {guess_near}); {max(times, key=times.get)} do more")

# %% [markdown]
# It is above all the *negative* that decides whether a triplet teaches, and it has to be near. The prostate voxels,
# in which the paper's three samplers differ, decide less.

# %% [markdown]
# ## Step 4: who satisfied the triplets?
#
# The share of R's active triplets fell during training. Was it the metric loss that did it? We train a plain UNet,
# with the same patches and the same first weights, and only *look* at its triplets.

# %%
plain, cross_entropy = narrow("UNet")
alone = train(plain, cross_entropy, volumes, steps=150, measure=activity(*samplers))
figure, ax = plt.subplots(figsize=(6, 3.4))
for name, table, style in (("MetricUNet-R", history, "-"), ("UNet", alone, "--")):
    ax.plot(table["R"].rolling(5, min_periods=1).mean(), style, label=name)
ax.set(xlabel="SGD step", ylabel="share of R's triplets that are active\n(mean of 5 steps)", ylim=(0, 0.5))
ax.legend()
plt.show()
last = {name: table["R"].tail(20).mean() for name, table in {"MetricUNet-R": history, "UNet": alone}.items()}
print(", ".join(f"{name}: {share:.3f}" for name, share in last.items()), f"(your guess for the UNet: {guess_unet})")

# %% [markdown]
# Cross-entropy satisfies random triplets all by itself. It has to: a head of two small layers can only tell the
# kinds apart if their embeddings differ. What the metric loss adds must come from the few triplets that
# cross-entropy leaves open.

# %% [markdown]
# ## What we have learned
#
# * Most random triplets teach nothing from the very first step, and plain cross-entropy satisfies most of the
#   others.
# * H is R until some voxel is predicted with $p > 0.9$. Afterwards it picks harder anchors, never harder negatives.
# * Near negatives keep teaching.
#
# **To think about**: more active triplets are more gradient. Is that a better segmentation? Configurations with an
# N (`MetricUNet-RN`) draw near negatives; train one with `narrow` and `train`. Then read lesson 6 before you
# believe what you see.

# %% [markdown] tags=["exam"]
# **Two exam questions**
#
# 1. A colleague says: "We use focal hard negative sampling, so our negatives are hard." Correct this in two
#    sentences, and say in which phase of a training H and R do exactly the same.
# 2. With N = 4 images, k = 20 anchors and one pair each, 5 % of the triplets are active. How many triplets have a
#    gradient in one step? Name two ways to get more, and one reason why more need not be better.

# %% [markdown]
# **Read next**: the paper's Section III-B.2; Wu et al., *Sampling Matters in Deep Embedding Learning* (ICCV 2017,
# [doi:10.1109/ICCV.2017.309](https://doi.org/10.1109/ICCV.2017.309)), on how the choice of negatives decides; then
# lesson 5: does contour-aware sampling sharpen contours?

# %% [markdown] tags=["answer"]
# ## Answers (in the solutions only)
#
# **To think about.** Not necessarily. In the suite's trials near negatives kept far more triplets active and were
# better than the paper's HCP. Against a plain UNet the first trial could not decide, and a second one, with new
# seeds, found them no better within a hundredth of DSC (`RESULTS.md`, "Do near negatives help"). A gradient says that
# something moves, not where to.

# %% [markdown] tags=["answer", "exam"]
# **Exam 1.** H chooses hard *anchors*, prostate voxels with p < 0.9, and draws their negatives anywhere in the
# background, as R does. As long as no prostate voxel has p > 0.9, all of them are hard, and H is R.
#
# **Exam 2.** 4 · 20 · 0.05 = 4 triplets. More: nearer negatives, a larger margin, more anchors. More need not be
# better because the hardest voxels are often those with a doubtful label, and because the metric loss then weighs
# more against the cross-entropy.
