"""The checks of all exercises: what each answer must be, and what typical mistakes give instead.

Students need not read this: it knows the answers. A check makes its own small data, so that it says the same
whenever it is run. tests/lessons/answers holds the answers that were tried, with what their checks say.
"""

from __future__ import annotations

import numpy as np
import torch
from checking import ask, check, described, exercise, expect, same
from classroom import SPACING_MM
from scipy import ndimage, stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from mupkg.losses import VoxelMetricLoss, gather_embeddings, squared_distance
from mupkg.metrics import segmentation_metrics
from mupkg.report.embeddings import EmbeddedVoxels, separation
from mupkg.samplers import HardNegativeSampler, RandomSampler, VoxelTuples, contour
from mupkg.trials import statistics

__all__ = ["check"]  # the notebooks import this, and with it the checks


def blobs(shape: tuple[int, ...], seed: int = 0, share: float = 0.3) -> np.ndarray:
    """Masks (N, H, W) of smooth random shapes, cut by the borders; each image has others."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), (0, 2, 2))
    return noise > np.quantile(noise, 1 - share)


# Lesson 1


@exercise("1.1", "np.log and np.mean are all you need.")
def _(cross_entropy) -> None:
    rng = np.random.default_rng(0)
    p, y = rng.uniform(0.02, 0.98, (4, 10, 10)), (rng.random((4, 10, 10)) < 0.2).astype(float)
    right = F.binary_cross_entropy(torch.from_numpy(p), torch.from_numpy(y)).item()
    log_p, log_q = np.log(p), np.log(1 - p)
    with np.errstate(all="ignore"):
        exchanged = -np.mean(p * np.log(y) + (1 - p) * np.log(1 - y))
    mistakes = {
        "background voxels count nothing in yours. Where y is 0, log(1 - p) counts.": -np.mean(y * log_p),
        "you sum; the loss is a mean over the voxels.": right * p.size,
        "len(p) is the first axis; p.size counts the voxels.": right * p.size / len(p),
        "you divide by the number of prostate voxels; every voxel counts.": right * p.size / y.sum(),
        "the minus sign is missing: a loss is above 0.": -right,
        "you took the mean of the prostate only; every voxel counts.": -np.mean(log_p[y == 1]),
        "every voxel counts as prostate in yours. Where is y?": -np.mean(log_p),
        "that is the logarithm to base 10; np.log is the natural one.": right / np.log(10),
        "that is the logarithm to base 2; np.log is the natural one.": right / np.log(2),
        "that is the exponential function; np.log is the logarithm.": -np.mean(
            y * np.exp(p) + (1 - y) * np.exp(1 - p)
        ),
        "label and prediction have changed places: the logarithm is that of p.": exchanged,
        "1 - y needs brackets before it is multiplied.": -np.mean(y * log_p + 1 - y * log_q),
        "the minus sign belongs to both terms.": np.mean((1 - y) * log_q - y * log_p),
        "that is the squared error. Eq. (3) has logarithms.": np.mean((y - p) ** 2),
        "log p counts where y is 1, log(1 - p) where it is 0; yours the other way round.": (
            -np.mean((1 - y) * log_p + y * log_q)
        ),
    }
    same(ask(cross_entropy, p, y), right, mistakes, "Try one voxel by hand: p = 0.9, y = 1 gives 0.105.")


@exercise("1.2", "The rim is what a dilation adds. For the far voxels, think of the corners.")
def _(two_masks) -> None:
    z, y, x = np.indices((16, 40, 40))
    truth = ((z - 8) * 4.0) ** 2 + ((y - 19) * 2.5) ** 2 + ((x - 20) * 2.5) ** 2 < 20**2
    outside_mm = ndimage.distance_transform_edt(~truth, sampling=SPACING_MM)
    for count in (60, 150):
        both = ask(two_masks, truth, count)
        two = isinstance(both, (tuple, list)) and len(both) == 2
        expect(two, f"give back two masks, the near one and the far one. Yours is {described(both)}.")
        expect(both[0] is not both[1], "both names stand for the same array. Each mask needs a copy of its own.")
        masks = [_mask_with(truth, mask, count, which) for mask, which in zip(both, ("first", "second"), strict=True)]
        near, far = (segmentation_metrics(mask, truth, spacing_mm=SPACING_MM)["HD95"] for mask in masks)
        expect(near < 25 or far > 6, "the two masks have changed places: the near one comes first.")
        expect((masks[0] != masks[1]).any(), "both masks have the same voxels. The second should be far away.")
        expect(near < 6, f"the first mask has an HD95 of {near:.1f} mm. Stay closer to the prostate.")
        some = outside_mm[masks[1]].max() > 25 >= far
        expect(not some, f"the second mask has an HD95 of {far:.1f} mm: HD95 leaves the farthest 5 % out. Move more.")
        expect(far > 25, f"the second mask has an HD95 of {far:.1f} mm. Go farther away.")


def _mask_with(truth: np.ndarray, mask: object, count: int, which: str) -> np.ndarray:
    """Stop unless this is the truth and `count` voxels more."""
    mask = np.asarray(mask)
    expect(mask.shape == truth.shape, f"the {which} mask has the shape {mask.shape}; the truth has {truth.shape}.")
    expect(set(np.unique(mask)) <= {0, 1}, f"the {which} mask holds other values than true and false.")
    mask = mask.astype(bool)
    gone, added = int((truth & ~mask).sum()), int((mask & ~truth).sum())
    expect(
        gone < truth.sum() or not added,
        "all prostate voxels are missing. Add the wrong voxels to a copy of the truth.",
    )
    expect(not gone, f"{gone} prostate voxels are missing. Wrong voxels are background that is called prostate.")
    expect(added, f"the {which} mask is the truth. Do you write into it? `flatten` makes a copy, `ravel` does not.")
    expect(added >= count, f"there are {added} wrong voxels, not {count}. Were some drawn twice, or inside?")
    fixed = added in (60, 120, 150)
    expect(added == count or not fixed, f"there are {added} wrong voxels, where `count` is {count}. Use `count`.")
    expect(added == count, f"there are {added} wrong voxels, not {count}. Take only as many as you need.")
    return mask


@exercise("1.3", "One distance transform for voxels inside, one for those outside.")
def _(share_near) -> None:
    ball, spacing = np.hypot(*(np.mgrid[-60:61, -60:61] * [[[1.5]], [[0.9]]])) < 35, (3.0, 2.0)
    noise = np.random.default_rng(2).random(ball.shape) < 0.03
    depth, away = (ndimage.distance_transform_edt(mask, sampling=spacing) for mask in (ball, ~ball))
    distance = depth + away
    in_voxels = ndimage.distance_transform_edt(ball) + ndimage.distance_transform_edt(~ball)
    from_noise = ndimage.distance_transform_edt(~noise, sampling=spacing)
    outermost = ndimage.distance_transform_edt(~(ball & ~ndimage.binary_erosion(ball)), sampling=spacing)
    square, swapped = (
        sum(ndimage.distance_transform_edt(mask, sampling=steps) for mask in (ball, ~ball)) for steps in (3, (2, 3))
    )
    right = np.mean(distance[noise] <= 5)
    mistakes = {
        "you measure in voxels; `sampling` makes it mm.": np.mean(in_voxels[noise] <= 5),
        "voxels inside the prostate have no distance in yours. They need the other transform.": (
            np.mean(away[noise] <= 5)
        ),
        "voxels outside the prostate have no distance in yours. They need the transform of ~truth.": (
            np.mean(depth[noise] <= 5)
        ),
        "you have it the other way round: of the near voxels, the share that is wrong.": np.mean(
            noise[distance <= 5]
        ),
        "all your distances are 0: inside take the transform of truth, outside that of ~truth.": 1.0,
        "that is the number, not the share.": np.sum(distance[noise] <= 5),
        "that is a share of all voxels. Of the wrong ones only.": np.mean(noise & (distance <= 5)),
        "a voxel at 5 mm is within 5 mm: <=, not <.": np.mean(distance[noise] < 5),
        "that is the share of the far ones.": 1 - right,
        "that is a percentage; a share lies between 0 and 1.": 100 * right,
        "you take one spacing for both axes; give `sampling` all of them.": np.mean(square[noise] <= 5),
        "your spacings are in the wrong order: one for each axis, as they come.": np.mean(swapped[noise] <= 5),
        "you measure distances from the wrong voxels; measure them from the contour.": np.mean(from_noise[ball] <= 5),
        "that is the distance to the outermost prostate voxels. Measure to the nearest voxel of the *other* label.": (
            np.mean(outermost[noise] <= 5)
        ),
        "that is the mean distance. How many are 5 mm or less?": np.mean(distance[noise]),
    }
    otherwise = "Of the wrong voxels, how many have a distance of 5 or less?"
    same(ask(share_near, noise, ball, spacing), right, mistakes, otherwise)
    fixed = {"`within_mm` is not used: with 3 in place of 5, your answer stays the same.": right}
    same(ask(share_near, noise, ball, spacing, within_mm=3), np.mean(distance[noise] <= 3), fixed, otherwise)


# Lesson 2


@exercise("2.1", "Means and variances along axis 0 give a number for each channel.")
def _(fisher_ratio) -> None:
    rng, scale = np.random.default_rng(0), np.linspace(0.3, 3, 16)
    u, v = rng.normal(1, 2, (300, 16)) * scale + 1, rng.normal(0, 1, (200, 16)) * scale**2
    kinds = np.repeat([0, 3], [300, 200])
    voxels = EmbeddedVoxels(np.zeros((500, 3), int), kinds, np.concatenate([u, v]))
    right = separation(voxels)["Fisher ratio"]
    gap, var_u, var_v = u.mean(0) - v.mean(0), u.var(0), v.var(0)
    between, spread = (gap**2).sum(), (var_u + var_v).sum()
    across = ((u.mean(1).mean() - v.mean(1).mean()) ** 2, u.var(1).sum() + v.var(1).sum())
    mistakes = {
        "you divide by standard deviations; the width is measured by variances.": between
        / (u.std(0) + v.std(0)).sum(),
        "the square of the distance is missing, so that the ratio has a unit.": between**0.5 / spread,
        "you took the variance of both classes together, and their distance is in it.": (
            between / np.concatenate([u, v]).var(0).sum()
        ),
        "the squared distance is a sum over the channels, not a mean.": between / 16 / spread,
        "that is the mean of the channels' own ratios. Sum above and below first, then divide.": (
            np.mean(gap**2 / (var_u + var_v))
        ),
        "that is the sum of the channels' own ratios. Sum above and below first, then divide.": (
            np.sum(gap**2 / (var_u + var_v))
        ),
        "you give a ratio for each channel. Sum above and below first, then divide.": gap**2 / (var_u + var_v),
        "axis=0 is missing in the variances.": between / (u.var() + v.var()),
        "a total variance is the sum of the channels' variances, not their mean.": 16 * between / spread,
        "a determinant multiplies variances; the total variance is their sum.": between
        / (np.linalg.det(np.cov(u.T)) + np.linalg.det(np.cov(v.T))),
        "you sum absolute differences; square them.": np.abs(gap).sum() / spread,
        "each class counts the same, however many voxels it has. Add the two variances.": (
            between / ((300 * var_u.sum() + 200 * var_v.sum()) / 500)
        ),
        "you forgot the axis: channels and voxels are thrown together.": (u.mean() - v.mean()) ** 2
        / (u.var() + v.var()),
        "you multiply the two variances; add them.": between / (var_u.sum() * var_v.sum()),
        "the ratio is upside down.": spread / between,
        "square channel by channel, then sum; you square the sum.": gap.sum() ** 2 / spread,
        "you divide by the mean of the two variances; it is their sum.": 2 * between / spread,
        "you divide by the width of the prostate only.": between / var_u.sum(),
        "you divide by the width of the background only.": between / var_v.sum(),
        "those are sums of squares. A variance divides them by the number of voxels.": (
            between / (300 * var_u.sum() + 200 * var_v.sum())
        ),
        "the sum below the line needs brackets.": between / var_u.sum() + var_v.sum(),
        "subtract the means first, then square.": (u.mean(0) ** 2 - v.mean(0) ** 2).sum() / spread,
        "axis 1 goes over the channels. Means over the voxels are along axis 0.": across[0] / across[1],
    }
    otherwise = "Between: squared distance of the means. Within: two variances."
    same(ask(fisher_ratio, u, v), right, mistakes, otherwise, 0.01)
    same(
        ask(fisher_ratio, 3 * u, 3 * v),
        right,
        {},
        "It must not change when all embeddings are 3 times as long.",
        0.01,
    )
    alone = gap[0] ** 2 / (var_u[0] + var_v[0])  # the grey value is one channel
    same(ask(fisher_ratio, u[:, :1], v[:, :1]), alone, {}, "With a single channel it goes wrong.", 0.01)


@exercise("2.2", "Fit on x_fit and y_fit; score x_judge; compare the scores with y_judge.")
def _(probe_auc) -> None:
    rng, probe = np.random.default_rng(1), LogisticRegression(max_iter=1000)
    coin, noise = [rng.random(n) < 0.5 for n in (200, 240)], [rng.normal(size=(n, 60)) for n in (200, 240)]
    lucky = ask(probe_auc, noise[0], coin[0], noise[1], coin[1])  # labels that nothing can predict
    if np.ndim(lucky) == 0 and np.asarray(lucky).dtype.kind == "f" and 0.6 < lucky <= 1:
        other_fit, other_judge = (  # with voxels that do not belong to the labels any more
            ask(probe_auc, *mixed)
            for mixed in ((noise[0][::-1], coin[0], noise[1], coin[1]), (noise[0], coin[0], noise[1][::-1], coin[1]))
        )
        leak = "The voxels that judge were among those that you fitted on."
        if other_fit == lucky:
            leak = "You fitted on the voxels that judge."
        elif other_judge == lucky:
            leak = "You judged on the same voxels that you fitted on."
        expect(False, f"{lucky:.2f} is too good for coin flips! {leak}")
    kinds = [rng.random(n) < 0.25 for n in (4000, 3000)]
    clouds = [rng.normal(size=(len(kind), 2)) + kind[:, None] * [1.6, 1.2] for kind in kinds]  # 2 deviations apart
    score = probe.fit(clouds[0], kinds[0]).decision_function(clouds[1])
    right = roc_auc_score(kinds[1], score)
    mistakes = {
        "that is the accuracy; an AUC ranks scores.": probe.score(clouds[1], kinds[1]),
        "you judge yes and no; an AUC needs scores.": roc_auc_score(kinds[1], score > 0),
        "your score is one channel. The probe weighs all of them.": roc_auc_score(kinds[1], clouds[1][:, 0]),
        "your score has lost its side of the cut: voxels far on either side rank high.": (
            roc_auc_score(kinds[1], np.abs(score))
        ),
        "below chance: the sign of your score is the wrong way round.": 1 - right,
        "those are the scores. Rank them against y_judge.": score,
        "that is the mean score. An AUC asks which voxels have the higher scores.": score.mean(),
        "that is a percentage; an AUC lies between 0 and 1.": 100 * right,
    }
    otherwise = "Fit on the first two arguments, judge by the last two."
    same(ask(probe_auc, clouds[0], kinds[0], clouds[1], kinds[1]), right, mistakes, otherwise, 0.01)
    turned = {
        "an AUC below 0.5 is an answer, too: this probe was fitted on labels turned round. Do not hide it.": right
    }
    same(ask(probe_auc, clouds[0], ~kinds[0], clouds[1], kinds[1]), 1 - right, turned, otherwise, 0.05)


@exercise("2.3", "One channel in which the classes differ; other channels that vary much more than it does.")
def _(hidden) -> None:
    for n in (500, 200):
        made = ask(hidden, n, np.random.default_rng(0))
        two = isinstance(made, (tuple, list)) and len(made) == 2
        expect(two, f"give back two arrays, x and y. Yours is {described(made)}.")
        x, y = made
        expect(np.shape(x) != (2 * n,) or np.ndim(y) != 2, "x and y have changed places: x comes first.")
        expect(np.shape(x) == (2 * n, 16), f"x has the shape {np.shape(x)}, but should have {(2 * n, 16)}.")
        expect(np.shape(y) == (2 * n,), f"y has the shape {np.shape(y)}, but should have {(2 * n,)}.")
        arrays = isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
        expect(arrays, "x and y should be arrays. np.array and np.concatenate make them of lists.")
        values = set(np.unique(y))
        held = ", ".join(map(repr, np.unique(y).tolist()[:2]))
        expect(np.asarray(y).dtype.kind in "biuf", f"y holds {held}: the classes are numbers, 0 and 1.")
        expect(len(values) == 2, f"y holds the values {sorted(map(float, values))}. One value is not two classes.")
        expect(values == {0, 1}, f"y holds {sorted(map(float, values))}, but should hold 0 and 1.")
        expect(np.sum(y) == n, f"there are {int(np.sum(y))} points of class 1, but should be {n} of each class.")
        again = ask(hidden, n, np.random.default_rng(0))[0]
        expect(np.array_equal(x, again), "the same `rng` gives other data the second time. Draw from `rng` alone.")
        other = ask(hidden, n, np.random.default_rng(1))
        _expect_hidden(x, np.asarray(y, int), other[0], np.asarray(other[1], int))


def _expect_hidden(x: np.ndarray, y: np.ndarray, x_other: np.ndarray, y_other: np.ndarray) -> None:
    """Stop unless a straight cut separates the classes and the first two principal components do not."""

    def auc(change) -> float:
        probe = LogisticRegression(max_iter=1000).fit(change(x), y)
        return roc_auc_score(y_other, probe.decision_function(change(x_other)))

    plane = PCA(2).fit(x)
    spread = plane.transform(x).std(axis=0)

    def with_squares(points: np.ndarray) -> np.ndarray:
        """Tell clouds of other widths from each other, too."""
        seen = plane.transform(points) / spread
        return np.c_[seen, seen**2]

    def with_product(points: np.ndarray) -> np.ndarray:
        """Tell clouds that lie across each other, too."""
        seen = with_squares(points)
        return np.c_[seen, seen[:, 0] * seen[:, 1]]

    in_plane, in_space, both_sides = auc(plane.transform), auc(lambda x: x), auc(np.square)
    within = np.sqrt((x[y == 0].var(axis=0) + x[y == 1].var(axis=0)) / 2)
    lengths = np.linalg.norm(x, axis=1)
    expect(
        lengths.max() < 4 * np.sort(lengths)[-5],
        "a few points lie far out: you scaled rows. x[:, :2] are two columns.",
    )
    if in_plane >= 0.65:
        even = "No channel varies more than the others: let some that do not tell the classes apart vary more."
        widest = "The classes differ in a channel that varies most. Move them apart in another one."
        expect(False, f"PCA shows the classes apart (AUC {in_plane:.2f}). {even if np.ptp(within) < 2 else widest}")
    inside = "one class lies inside the other in PCA's plane: give both the same width there."
    expect(auc(with_squares) < 0.65, inside)
    expect(
        auc(with_product) < 0.65, "the classes lie across each other in PCA's plane: give both the same shape there."
    )
    expect(
        in_space > 0.95 or both_sides < 0.95, "one class lies on both sides of the other: no straight cut does that."
    )
    expect(in_space > 0.65, f"no straight cut tells the classes apart (AUC {in_space:.2f}). Where do they differ?")
    expect(in_space > 0.95, f"a straight cut has an AUC of {in_space:.2f}. Move the classes farther apart.")


# Lesson 3


def _triplets(seed: int, count: int = 40, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, p, n = torch.randn(3, count, channels, generator=torch.Generator().manual_seed(seed))
    return a, p, n


def _loss(a: torch.Tensor, p: torch.Tensor, n: torch.Tensor, margin: float = 0.7) -> torch.Tensor:
    tuples = VoxelTuples(*torch.arange(3 * len(a)).view(3, -1))
    return VoxelMetricLoss(margin)(torch.cat([a, p, n]).T[None], tuples)


FIXED = "`margin` is not used: with another margin your answer stays the same."


@exercise("3.1", "Begin with d(a, p) and d(a, n), a number for each triplet.")
def _(triplet_loss) -> None:
    far, near = _triplets(0), _triplets(0)
    near = (*near[:2], near[2] / 2)  # a second set, whose negatives lie near: together they tell all mistakes apart
    answers = [ask(triplet_loss, *triplets) for triplets in (far, near)]
    otherwise = "Try it by hand on one triplet."
    if np.shape(answers[0]) != ():
        same(answers[0], _loss(*far), {}, otherwise)
    mistakes = {hint: [value, _mistaken_losses(*near)[hint]] for hint, value in _mistaken_losses(*far).items()}
    same(answers, [_loss(*far), _loss(*near)], mistakes, otherwise)
    same(ask(triplet_loss, *far, margin=0.3), _loss(*far, 0.3), {FIXED: _loss(*far)}, "Margin 0.3 goes wrong.")


def _mistaken_losses(a: torch.Tensor, p: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
    near, far = squared_distance(a, p), squared_distance(a, n)
    raw, gaps = near - far + 0.7, (a - p, a - n)

    def hinged(change) -> torch.Tensor:
        return (change(gaps[0]) - change(gaps[1]) + 0.7).relu().mean()

    return {
        "the hinge is missing: a satisfied triplet must count 0, not less.": raw.mean(),
        "the mean comes before the hinge, so that satisfied triplets pay for the others.": raw.mean().relu(),
        "the square is missing: d is the squared distance.": hinged(lambda gap: gap.norm(dim=1)),
        "positive and negative have changed places.": (1.4 - raw).relu().mean(),
        "you summed over the triplets; we take the mean.": raw.relu().sum(),
        "d is a sum over the channels, not a mean.": hinged(lambda gap: gap.square().mean(dim=1)),
        "dim=0 sums over the triplets. The channels are dim=1.": hinged(lambda gap: gap.square().sum(dim=0)),
        "the margin is added, not subtracted.": (raw - 1.4).relu().mean(),
        "the margin is missing.": (raw - 0.7).relu().mean(),
        "those are products. d(u, v) is made of differences.": ((a * p).sum(1) - (a * n).sum(1) + 0.7).relu().mean(),
        "the hinge is upside down: it keeps what is below 0.": raw.clamp(max=0).mean(),
        "you summed over everything at once: each triplet has distances of its own.": (raw - 0.7)
        .sum()
        .add(0.7)
        .relu(),
        "that is the mean over the active triplets. Satisfied ones count, too, as 0.": raw[raw > 0].mean(),
        "d(a, n) starts from the anchor; yours from the positive.": (near - squared_distance(p, n) + 0.7)
        .relu()
        .mean(),
        "you sum absolute differences; square them.": hinged(lambda gap: gap.abs().sum(dim=1)),
        "the margin belongs inside the hinge.": (raw - 0.7).relu().mean() + 0.7,
        "square each channel, then sum; you square the sum.": hinged(lambda gap: gap.sum(dim=1).square()),
        "you square the hinge. The distances are squared, the hinge is not.": raw.relu().square().mean(),
        "that is softplus, a hinge without a corner. A satisfied triplet must count 0.": F.softplus(raw).mean(),
        "that is the largest loss of all triplets. The hinge compares each with 0: clamp(min=0).": raw.max(),
    }


@exercise("3.2", "The derivative of d(a, p) with respect to a is 2 (a - p).")
def _(anchor_gradient) -> None:
    a, p, n = _triplets(1)

    def gradient(margin: float) -> torch.Tensor:
        moving = a.clone().requires_grad_()
        return torch.autograd.grad(len(a) * _loss(moving, p, n, margin), moving)[0]

    right, raw = gradient(0.7), squared_distance(a, p) - squared_distance(a, n) + 0.7
    active, push = (raw > 0)[:, None], 2 * (n - p)
    roots = (a - p).norm(dim=1) - (a - n).norm(dim=1) + 0.7
    units = [(a - x) / (a - x).norm(dim=1, keepdim=True) for x in (p, n)]
    mistakes = {
        "a satisfied triplet still pushes. What is the slope of max(0, x) below 0?": push,
        "the factor 2 of the square's derivative is missing.": right / 2,
        "it points the other way. The gradient is where the loss grows.": -right,
        "you left the margin out when you asked which triplets are satisfied.": push * (raw > 0.7)[:, None],
        "the margin is added, not subtracted, when you ask which triplets are satisfied.": push
        * (raw > 1.4)[:, None],
        "d(a, n) has a derivative, too.": 2 * (a - p) * active,
        "d(a, p) has a derivative, too.": -2 * (a - n) * active,
        "d(a, n) is subtracted in the loss, and so is its derivative.": (2 * (a - p) + 2 * (a - n)) * active,
        "a triplet is satisfied as a whole, not channel by channel. Sum first.": (
            push * ((a - p).square() - (a - n).square() + 0.7 > 0)
        ),
        "that is the gradient of the mean. Here every triplet has a loss of its own.": right / len(a),
        "the satisfied triplets push in yours, and the active ones do not.": push * ~active,
        "you gave every push the length 1. How long it is matters.": push / push.norm(dim=1, keepdim=True) * active,
        "that is the sum of all rows. Each anchor has a gradient of its own.": right.sum(dim=0),
        "you multiply by the loss. The slope of max(0, x) is 1 above 0.": push * raw.relu()[:, None],
        "which triplets are satisfied is asked of squared distances.": push * (roots > 0)[:, None],
        "that is the loss. What is its derivative?": raw.relu(),
        "the hinge is around the loss, not around its gradient.": push.relu(),
        "a satisfied triplet has the factor 0; `sign` gives it -1.": push * raw.sign()[:, None],
        "that is the gradient of the distances, not of their squares.": (units[0] - units[1]) * active,
    }
    otherwise = "Two pieces: which triplets push at all, and the two derivatives."
    answer = ask(anchor_gradient, a, p, n)
    same(answer, right, mistakes, otherwise)
    tensor = isinstance(answer, torch.Tensor)
    expect(tensor, f"the numbers are right, but they stand in {described(answer)}. Give back a tensor.")
    same(ask(anchor_gradient, a, p, n, margin=3.0), gradient(3.0), {FIXED: right}, otherwise)


def _active(a: torch.Tensor, p: torch.Tensor, n: torch.Tensor, margin: float = 0.7) -> torch.Tensor:
    return (squared_distance(a, p) - squared_distance(a, n) + margin > 0).float().mean()


@exercise("3.3", "A triplet is active while d(a, p) - d(a, n) + σ is above 0.")
def _(active_share) -> None:
    seen = _triplets(2, 1000, 8)
    a, p, n = (x * scale + 0.5 for x, scale in zip(seen, (1.0, 0.7, 1.2), strict=True))
    raw = squared_distance(a, p) - squared_distance(a, n) + 0.7
    right, unit = _active(a, p, n), [F.normalize(x, dim=1) for x in (a, p, n)]
    roots = ((a - p).norm(dim=1) - (a - n).norm(dim=1) + 0.7 > 0).float().mean()
    mistakes = {
        "you count the satisfied ones. Active triplets are the others.": 1 - right,
        "you left the margin out.": (raw > 0.7).float().mean(),
        "the margin is on the wrong side of the comparison.": (raw > 1.4).float().mean(),
        "that is the number, not the share.": (raw > 0).sum(),
        "that is a percentage; a share lies between 0 and 1.": 100 * right,
        "that is the mean loss. Which share of the losses is above 0?": raw.relu().mean(),
        "you always normalise; do it if `normalize` is true.": _active(*unit),
        "the square is missing: d is the squared distance.": roots,
        "a triplet is active as a whole, not channel by channel. Sum first.": (
            ((a - p).square() - (a - n).square() + 0.7 > 0).any(dim=1).float().mean()
        ),
    }
    same(ask(active_share, a, p, n), right, mistakes, "Count the triplets whose hinged loss is above 0.")
    same(ask(active_share, a, p, n, margin=2.0), _active(a, p, n, 2.0), {FIXED: right}, "Margin 2 goes wrong.")
    together = torch.cat([a, p, n]).norm()
    scaled = [squared_distance(a, x) / squared_distance(a, x).max() for x in (p, n)]
    rows = "normalise row by row: dim=1 and keepdim=True in the norm."
    right, small = _active(a, p, n, 0.001), 0.001  # so small that no scale hides which triplets are active
    mistakes = {
        "with normalize=True nothing changes. Every embedding must come to a length of 1, and be used.": right,
        "only the anchors come to a length of 1. Positives and negatives must, too.": _active(unit[0], p, n, small),
        f"you normalise along the triplets (dim=0); {rows}": _active(*(x / x.norm(dim=0) for x in (a, p, n)), small),
        f"you divide by one length for all; {rows}": _active(*(x / x.norm() for x in (a, p, n)), small),
        f"you divide all three by the same length; {rows}": _active(*(x / together for x in (a, p, n)), small),
        "the length is the root of the sum of squares.": (
            _active(*(x / x.abs().sum(dim=1, keepdim=True) for x in (a, p, n)), small)
        ),
        "you divide by the squared length; divide by the length.": (
            _active(*(x / x.square().sum(dim=1, keepdim=True) for x in (a, p, n)), small)
        ),
        "normalise the embeddings, not their distances.": (scaled[0] - scaled[1] + small > 0).float().mean(),
    }
    same(
        ask(active_share, a, p, n, margin=small, normalize=True),
        _active(*unit, small),
        mistakes,
        f"With normalize=True {rows}",
    )


# Lesson 4


@exercise("4.1", "`gather_embeddings` of mupkg.losses shows one way to pick voxels; lesson 3 has the rest.")
def _(active_share) -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(blobs((3, 8, 10))).long()
    embeddings = torch.randn(3, 6, 8, 10, generator=rng) + labels[:, None]
    tuples = RandomSampler(500)(labels, generator=rng)

    def vectors(rows: torch.Tensor) -> list[torch.Tensor]:
        return [rows[voxels] for voxels in tuples]

    a, p, n = (gather_embeddings(embeddings, voxels) for voxels in tuples)
    raw, indices = squared_distance(a, p) - squared_distance(a, n) + 0.7, tuples
    right, rows = _active(a, p, n), embeddings.movedim(1, -1)
    flat, first = vectors(rows.flatten()), [rows[0].flatten(0, 1)[voxels % 80] for voxels in tuples]
    mistakes = {
        "your rows are not one voxel's embedding each: move the channels last, then flatten.": (
            _active(*vectors(embeddings.reshape(-1, 6)))
        ),
        "rows and columns have changed places: the last axes stay in order, height before width.": (
            _active(*vectors(embeddings.permute(0, 3, 2, 1).flatten(0, 2)))
        ),
        "you left the margin out.": (raw > 0.7).float().mean(),
        "you count the satisfied ones. Active triplets are the others.": 1 - right,
        "that is the number, not the share.": (raw > 0).sum(),
        "that is a percentage; a share lies between 0 and 1.": 100 * right,
        "you flattened the channels, too. A row for each voxel: flatten(0, 2).": (
            ((flat[0] - flat[1]).square() - (flat[0] - flat[2]).square() + 0.7 > 0).float().mean()
        ),
        "you look into the first image only. The voxels' numbers go through all images.": _active(*first),
        "positive and negative have changed places.": _active(a, n, p),
        "the square is missing: d is the squared distance.": (
            ((a - p).norm(dim=1) - (a - n).norm(dim=1) + 0.7 > 0).float().mean()
        ),
        "d is a sum over the channels, not a mean.": ((raw - 0.7) / 6 + 0.7 > 0).float().mean(),
        "dim=0 sums over the triplets. The channels are dim=1.": (
            ((a - p).square().sum(0) - (a - n).square().sum(0) + 0.7 > 0).float().mean()
        ),
        "you compare the voxels' numbers. Look their embeddings up first.": (
            ((indices[0] - indices[1]).square() - (indices[0] - indices[2]).square() + 0.7 > 0).float().mean()
        ),
        "that is the mean loss. Which share of the losses is above 0?": raw.relu().mean(),
    }
    otherwise = "Take the vectors of all voxels first, then distances."
    same(ask(active_share, embeddings, tuples), right, mistakes, otherwise)
    same(ask(active_share, embeddings, tuples, margin=3.0), _active(a, p, n, 3.0), {FIXED: right}, otherwise)


@exercise("4.2", "Two masks, joined by &: where the error is above τ, and where the label is 1.")
def _(hard_anchors) -> None:
    labels = torch.from_numpy(blobs((4, 12, 10))).long()
    probability = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    error, prostate = (probability - labels).abs(), labels == 1
    right, _, _ = HardNegativeSampler().candidates(labels, probability)
    mistakes = {
        "there are background voxels among your anchors. Intersect with the positive map.": error > 0.1,
        "your mask is empty: without the absolute value, p - y is never above 0 in the prostate.": torch.zeros_like(
            right
        ),
        "you compare the probability itself; Eq. (1) compares its error.": (probability > 0.1) & prostate,
        "you take only voxels on the wrong side of 0.5; τ is 0.1, so p = 0.8 is hard, too.": right & (error > 0.5),
        "those are the errors. A mask says yes or no: compare them with the threshold.": error * prostate,
        "those are the easy voxels. Hard ones have a large error.": (error < 0.1) & prostate,
        "those are hard voxels of the background. Anchors are prostate.": (error > 0.1) & ~prostate,
        "you compare squared errors; Eq. (1) has the absolute value.": (error**2 > 0.1) & prostate,
        "you take voxels with p below τ; the error 1 - p must be above it.": (probability < 0.1) & prostate,
        "those are places (nonzero). A mask has the shape of the labels.": right.nonzero(),
        "you take what is hard *or* prostate. Anchors must be both: &.": (error > 0.1) | prostate,
        "that is the whole prostate. Which of its voxels are hard?": prostate,
        "that is the first image only.": right[0],
        "that is one value for each prostate voxel. A mask has the shape of the labels.": (error > 0.1)[prostate],
        "your mask is the wrong way round.": ~right,
        "those are two masks. Join them by &.": torch.stack([error > 0.1, prostate]),
    }
    otherwise = "Compare it with Eq. (1) voxel by voxel."
    same(ask(hard_anchors, labels, probability), right, mistakes, otherwise)
    fixed = {"`threshold` is not used: with 0.3 in place of 0.1, your mask stays the same.": right}
    same(ask(hard_anchors, labels, probability, threshold=0.3), (error > 0.3) & prostate, fixed, otherwise)


@exercise("4.3", "Where is the largest label of the window around a voxel 1, though the voxel itself is 0?")
def _(NearSampler) -> None:
    labels = torch.from_numpy(blobs((4, 20, 24), seed=3, share=0.15)).long()
    prostate, before = labels == 1, None
    for width in (1, 2, 3):
        masks = ask(NearSampler(width=width).candidates, labels)
        three = isinstance(masks, (tuple, list)) and len(masks) == 3
        expect(three, f"give back three masks: anchors, positives, negatives. Yours is {described(masks)}.")
        for name, mask in zip(("anchors", "positives", "negatives"), masks, strict=True):
            shape = f"the {name} have the shape {tuple(np.shape(mask))}, the labels {tuple(labels.shape)}."
            expect(np.shape(mask) == labels.shape, f"{shape} They should be a mask, not places.")
            truths = getattr(mask, "dtype", None) == torch.bool  # the sampler takes nothing else
            expect(truths, f"the {name} are no truth values (torch.bool). A comparison as labels == 1 makes them.")
        anchor, positive, negative = masks
        expect(not torch.equal(negative, prostate), "the masks are in another order: anchors, positives, negatives.")
        _expect_near(negative, prostate, width, anchor)
        expect(before is None or not torch.equal(negative, before), "`width` changes nothing: use self.width.")
        expect(torch.equal(anchor, prostate), "the anchors should be R's, any prostate voxel and no other.")
        expect(torch.equal(positive, prostate), "the positives should be R's, any prostate voxel and no other.")
        before = negative


def _reach(prostate: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.max_pool2d(prostate.float(), (2 * height + 1, 2 * width + 1), 1, (height, width)) > 0


def _expect_near(negative: torch.Tensor, prostate: torch.Tensor, width: int, anchor: torch.Tensor) -> None:
    """Stop unless the negatives are the background within reach; diagonal steps may count as one or as two."""
    far = negative & ~_reach(prostate, width, width)
    if torch.equal(negative, ~prostate):
        expect(
            torch.equal(anchor, prostate), "you draw the anchors near the contour. It is the negatives that are near."
        )
        expect(False, f"the negatives are all of the background. They should lie within {width} of the prostate.")
    expect(negative.any(), "no negatives are left. Is your window wide enough to reach a neighbour?")
    expect(not (negative & prostate).any(), "there are prostate voxels among the negatives.")
    across = F.max_pool3d(prostate.float()[None, None], 2 * width + 1, 1, width)[0, 0] > 0
    other = "some negatives are near the prostate of another image of the batch. Pool in two dimensions."
    expect(not far.any() or (far & ~across).any(), other)
    expect(not far.any(), f"{int(far.sum())} negatives lie farther than {width} from the prostate.")
    beside, above = (_reach(prostate, *step) & ~prostate & ~negative for step in ((0, 1), (1, 0)))
    expect(not (above.any() and not beside.any()), "background above and below the prostate is left out.")
    inner = width > 1 and not (negative & _reach(prostate, width - 1, width - 1)).any()
    expect(not inner, f"only voxels exactly {width} from the prostate are left. Nearer ones are near, too.")
    expect(not (beside | above).any(), "some background that touches the prostate is left out.")
    steps = prostate  # to the four neighbours, step by step
    for _ in range(width):
        steps = _reach(steps, 1, 0) | _reach(steps, 0, 1)
    left_out = int((steps & ~prostate & ~negative).sum())
    expect(not left_out, f"with a width of {width}, {left_out} voxels within reach are left out. Is self.width used?")


# Lesson 5


@exercise("5.1", "A prostate voxel whose left neighbour is none: prostate[:, :, 1:] & ~prostate[:, :, :-1].")
def _(edge) -> None:
    patches = torch.from_numpy(blobs((30, 14, 16), share=0.4)).long()
    prostate, right = patches == 1, contour(patches)

    def sides(beyond: str, value: float | None = None) -> torch.Tensor:
        """The neighbours above, to the left, below and to the right, if this lies beyond the border."""
        around = F.pad(prostate.float(), (1, 1, 1, 1), mode=beyond, value=value) > 0
        return torch.stack([around[:, :-2, 1:-1], around[:, 1:-1, :-2], around[:, 2:, 1:-1], around[:, 1:-1, 2:]])

    up, left, down, beside = sides("replicate")
    wrapped = sides("circular")
    eroded = torch.from_numpy(ndimage.binary_erosion(prostate.numpy(), border_value=1))
    overwritten = prostate & ~beside
    overwritten[:, :, -1] = (prostate & ~left)[:, :, -1]
    through = prostate.clone()
    through[1:] &= ~prostate[:-1]
    back = prostate.clone()
    back[:-1] &= ~prostate[1:]
    through[0], back[-1] = False, False
    one_side = (prostate & ~up)[:, 1:]
    diagonals = F.max_pool2d((~prostate).float(), 3, stride=1, padding=1) > 0
    mistakes = {
        "the border of the patch counts as background in yours.": prostate & ~sides("constant").all(dim=0),
        "a voxel at the border sees the other end of the patch. Your shift wraps around.": prostate
        & ~wrapped.all(dim=0),
        "the index -1 is the last row or column: the first one sees the other end of the patch.": (
            prostate & ~(wrapped[:2].all(dim=0) & down & beside)
        ),
        "that is the background's side. Contour voxels are prostate.": ~prostate
        & torch.stack([up, left, down, beside]).any(0),
        "that is both sides. Contour voxels are prostate.": (
            (prostate ^ up) | (prostate ^ left) | (prostate ^ down) | (prostate ^ beside)
        ),
        "background counts in yours if its neighbour is background. Contour voxels are prostate.": (
            ~sides("constant", 1).all(dim=0)
        ),
        "a diagonal neighbour is not beside. Look at four neighbours, not at eight.": prostate & diagonals,
        "you look at two of the four sides, above and to the left.": prostate & ~(up & left),
        "you look above and below only.": prostate & ~(up & down),
        "you look to the left and right only.": prostate & ~(left & beside),
        "the first axis counts the images: their neighbours are other patches.": through
        | back
        | (prostate & ~(up & down)),
        "your erosion goes through the slices, too. Each slice by itself.": prostate & ~eroded,
        "that is the inside. The contour is what an erosion takes away.": prostate & ~diagonals,
        "all four neighbours are background in yours. One is enough.": prostate & ~(up | left | down | beside),
        "every line of yours overwrites the one before. Join them: |=.": overwritten,
        "a row is missing: put what you find into an empty mask with the shape of the labels.": one_side,
    }
    four = {"above": up, "to the left": left, "below": down, "to the right": beside}
    for side in four:
        others = [mask for name, mask in four.items() if name != side]
        mistakes[f"you look at three of the four sides. The neighbour {side} is missing."] = prostate & ~(
            torch.stack(others).all(dim=0)
        )
    found = ask(edge, patches)
    same(found, right, mistakes, "Compare one patch with its label, voxel by voxel.")
    truths = getattr(found, "dtype", None) == torch.bool  # exercise 5.4 turns them round by ~
    expect(truths, f"right voxels, but yours is {described(found)}. Give back a tensor of truth values (bool).")


@exercise("5.2", "np.interp(0.8, ...) gives the distance where the probability is 0.8.")
def _(width_mm) -> None:
    x = np.array([-9.0, -6, -4.5, -1, 1, 2.6, 5, 9])
    fall = np.array([1.0, 0.95, 0.85, 0.7, 0.5, 0.3, 0.05, 0.0])
    high, low = -4.5 + 3.5 * 0.05 / 0.15, 2.6 + 2.4 * 0.1 / 0.25  # by hand
    broken, half_turned = (np.interp([0.8, 0.2], y, z) for y, z in ((fall, x), (fall[::-1], x)))
    wider, at = np.interp([0.9, 0.1], fall[::-1], x[::-1]), np.interp([0.8, 0.2], x, fall)
    mistakes = {
        "np.interp's second argument must grow, and a probability that falls does not. Turn both round.": np.diff(
            broken
        ),
        "you turned the probability round, but not the distance: they belong together.": np.diff(half_turned),
        "a width is not negative. Which of the two distances is the larger?": high - low,
        "you take the nearest measured point. Interpolate between two points.": x[5] - x[2],
        "you take the last points beyond 0.8 and 0.2. Interpolate between two points.": x[6] - x[2],
        "you take the points between 0.8 and 0.2, which are too few. Interpolate.": x[5] - x[3],
        "that is the number of points between, not their distance.": 3,
        "you count points. They are not 2.5 mm apart everywhere.": 7.5,
        "that is the width from 0.9 to 0.1.": np.diff(wider),
        "that is the length of the whole profile.": x[-1] - x[0],
        "those are the two distances. The width is their difference.": [high, low],
        "that is the width of a straight line as steep as the steepest place.": 0.6
        / np.abs(np.diff(fall) / np.diff(x)).max(),
        "that is where it is 0.5: a place, not a width.": np.interp(0.5, fall[::-1], x[::-1]),
        "that is where it is 0.8: a place, not a width.": high,
        "that is where it is 0.2: a place, not a width.": low,
        "that is where it falls most: a place, not a width.": x[np.argmin(np.diff(fall))],
        "you asked for the probability at 0.8 and 0.2 mm. Ask for the distance at these probabilities.": at[0]
        - at[1],
        "that is half of it.": (low - high) / 2,
    }
    same(ask(width_mm, x, fall), low - high, mistakes, "0.8 is a third of the way from -4.5 to -1 mm.")


@exercise("5.3", "Select the voxels with abs(from_own) <= within_mm; there, compare both distances.")
def _(displacement_mm) -> None:
    rng = np.random.default_rng(0)
    own = rng.uniform(-12, 12, 2000)
    truth = own + 3 * np.sin(own) + rng.normal(-0.4, 2, 2000)
    gap, at, at_truth = truth - own, np.abs(own) <= 1.3, np.abs(truth) <= 1.3
    right = np.mean(np.abs(gap[at]))
    sizes = np.abs(truth) - np.abs(own)
    mistakes = {
        "inwards and outwards cancel in your mean. Take absolute values first.": np.mean(gap[at]),
        "you take the absolute value of the mean, when inwards and outwards have cancelled.": abs(np.mean(gap[at])),
        "you look at the true contour. Look at the network's own.": np.mean(np.abs(gap[at_truth])),
        "you take all voxels. Only those at the network's own contour count.": np.mean(np.abs(gap)),
        "that is the distance to the true contour alone: subtract from_own, the voxel's distance to its own.": (
            np.mean(np.abs(truth[at]))
        ),
        "you select all of the inside: from_own is below 0 there.": np.mean(np.abs(gap[own <= 1.3])),
        "you lose the side before you subtract: the distances have a sign.": np.mean(np.abs(sizes[at])),
        "that is the standard deviation. Take the mean of the absolute values.": np.std(gap[at]),
        "that is the root of the mean square. Take the mean of the absolute values.": np.sqrt(np.mean(gap[at] ** 2)),
        "you sum; take the mean.": np.sum(np.abs(gap[at])),
        "that is the largest. Take the mean.": np.max(np.abs(gap[at])),
        "that is the median. Take the mean.": np.median(np.abs(gap[at])),
        "you add the two distances; subtract them.": np.mean(np.abs(truth[at] + own[at])),
        "no voxel lies exactly on the contour. Take those that are at most within_mm away.": np.nan,
        "that is how many voxels lie there. How far has the contour moved?": np.sum(at),
    }
    otherwise = "A displacement is from_truth - from_own, at the voxels of the network's own contour."
    same(ask(displacement_mm, truth, own), right, mistakes, otherwise)
    wider = np.mean(np.abs(gap[np.abs(own) <= 6]))
    fixed = {"`within_mm` is not used: with 6 in place of 1.3, your answer stays the same.": right}
    same(ask(displacement_mm, truth, own, within_mm=6), wider, fixed, otherwise)


@exercise("5.4", "What is left lies within the whole, so |A ∩ B| is |A|.")
def _(dsc_without_rim) -> None:
    z, y, x = np.indices((8, 20, 24))
    label = (((z - 4) / 3.2) ** 2 + ((y - 9) / 8.0) ** 2 + ((x - 12) / 7.0) ** 2 < 1).astype(np.uint8)

    def without(rim: np.ndarray) -> int:
        return int(((label == 1) & ~rim).sum())

    def dsc(kept: int) -> float:
        return 2 * kept / (whole + kept)

    tensor, whole = torch.from_numpy(label).long(), int((label == 1).sum())
    rim = contour(tensor).numpy()
    left = without(rim)
    twice = rim | contour(torch.from_numpy(label * ~rim).long()).numpy()
    moved = np.moveaxis(contour(tensor.movedim(0, -1)).numpy(), -1, 0)
    batched = np.moveaxis(contour(tensor.movedim(2, 0)).numpy(), 0, 2)
    eroded = int(ndimage.binary_erosion(label == 1).sum())
    sizes, kept = (mask.sum(axis=(1, 2)) for mask in (label == 1, (label == 1) & ~rim))
    slices = (2 * kept / (sizes + kept))[sizes > 0]
    mistakes = {
        "that is left / whole, the sensitivity. The DSC divides by the mean of both sizes.": left / whole,
        "you compare the rim with the whole. Take it off first.": dsc(int(rim.sum())),
        "the factor 2 is missing: equal masks must give 1.": left / (whole + left),
        "that is the share of all voxels that agree, background included.": 1 - rim.mean(),
        "the sum below the line needs brackets.": 2 * left / whole + left,
        "that is what is lost, 1 - DSC.": 1 - dsc(left),
        "that is a percentage; a DSC lies between 0 and 1.": 100 * dsc(left),
        "a slice without prostate has no DSC (0 / 0). Count the voxels of all slices together.": np.nan,
        "that is a mean over slices. Count the voxels of all slices together.": np.mean(slices),
        "nothing is taken off: the rim lies within the prostate.": 1.0,
        "the label is a batch of slices as it is. Do not put another axis in front.": dsc(without(batched)),
        "your slices are not slices: the first axis of a label (z, y, x) counts them.": dsc(without(moved)),
        "your erosion goes through the slices, too. Slice by slice.": dsc(eroded),
        "you took two layers off.": dsc(without(twice)),
        "that is the mask. Count its voxels.": (label == 1) & ~rim,
        "you divide a mean by a sum.": 2 * (left / label.size) / (whole + left),
    }
    same(ask(dsc_without_rim, label), dsc(left), mistakes, "Count the voxels of the whole and of what is left.")


# Lesson 6


@exercise("6.1", "Begin with d = new - old.")
def _(paired_t) -> None:
    rng = np.random.default_rng(0)
    old, new = rng.normal(0.8, 0.05, (2, 12)) + rng.normal(0, 0.05, 12)
    for first, second in sorted([(old, new), (new, old)], key=lambda pair: pair[0].mean()):
        d, n = second - first, len(first)

        def both(t: float, p=lambda t, n=n: 2 * stats.t.sf(abs(t), n - 1)) -> np.ndarray:
            return np.array([t, p(t)])

        right = np.array(stats.ttest_rel(second, first))
        t, by_n, no_root = right[0], d.mean() / (d.std() / n**0.5), d.mean() / d.std(ddof=1)
        apart = np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / n)
        turned = "t has the wrong sign: d is new - old, so that a gain is above 0."
        if t < 0:
            turned = "t has lost its sign: it is below 0 for a loss. Take |t| for p only."
        in_order = np.sort(second) - np.sort(first)
        mistakes = {
            "the pairs are lost. Take the differences first, patient by patient.": stats.ttest_ind(second, first),
            "the pairs are lost: you take the standard deviation of each method, not that of the differences.": (
                both(d.mean() / apart)
            ),
            "the pairs are lost: you sorted, so that the values of different patients meet.": (
                both(in_order.mean() / (in_order.std(ddof=1) / n**0.5))
            ),
            "the sample's standard deviation divides by n - 1: ddof=1.": both(by_n),
            "the square root of n is missing: a mean of n varies less than one value.": both(no_root),
            "s / √n needs brackets below the line.": both(no_root / n**0.5),
            "divide by √n, not by n.": both(no_root * n),
            "that is the sum of d; t has its mean.": both(t * n),
            "you rounded. Give back all digits, and round when you print.": np.round(right, 2),
            "divide by the square root of n; n - 1 is for s and the degrees of freedom.": (
                both(d.mean() / (d.std(ddof=1) / (n - 1) ** 0.5))
            ),
            "you divide by the variance; t has the standard deviation.": both(d.mean() / (d.var(ddof=1) / n**0.5)),
            "a two-sided p has two sides.": right * [1, 0.5],
            turned: right * [-1, 1],
            "p is not a probability: sf needs |t|, because t may be below 0.": both(
                t, lambda t, n=n: 2 * stats.t.sf(t, n - 1)
            ),
            "the degrees of freedom are n - 1, not n.": both(t, lambda t, n=n: 2 * stats.t.sf(abs(t), n)),
            "that is the normal distribution; s was estimated, so it is Student's.": (
                both(t, lambda t: 2 * stats.norm.sf(abs(t)))
            ),
            "p is not a probability: cdf is the chance of a smaller t; sf that of a larger one.": (
                both(t, lambda t, n=n: 2 * stats.t.cdf(abs(t), n - 1))
            ),
            "p is missing: give back t and p.": t,
            "t is missing: give back t and p.": right[1],
            "t and p have changed places. Return t first.": right[::-1],
        }
        same(ask(paired_t, first, second), right, mistakes, "t is the mean of d over s / √n, p is 2 sf(|t|, n - 1).")


@exercise("6.2", "np.argsort, np.maximum.accumulate; the factors are np.arange(m, 0, -1).")
def _(holm) -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    array, order = np.array(p), np.argsort(p)

    def back(values: np.ndarray) -> np.ndarray:
        adjusted = np.empty(4)
        adjusted[order] = values
        return np.minimum(adjusted, 1)

    larger, rising, sorted_p = np.maximum.accumulate, np.arange(1, 5), array[order]
    falling = rising[::-1]
    downwards = np.empty(4)
    downwards[order[::-1]] = larger(sorted_p[::-1] * falling)
    mistakes = {
        "that is Bonferroni: all times m. Only the smallest is multiplied by m.": array * 4,
        "an adjusted p is smaller than the one before it.": back(sorted_p * falling),
        "right numbers, but sorted. Give them back in the order they came in.": larger(sorted_p * falling),
        "right numbers, but sorted back by the wrong order: adjusted[order] = ..., not ... [order].": (
            larger(sorted_p * falling)[order]
        ),
        "that holds the false discovery rate (Benjamini and Hochberg), another promise.": (
            stats.false_discovery_control(array)
        ),
        "the smallest p is multiplied by m, the largest by 1; yours the other way round.": back(
            larger(sorted_p * rising)
        ),
        "let none be smaller than the one before: a running maximum, not a minimum.": (
            back(np.minimum.accumulate(sorted_p * falling))
        ),
        "a list times 4 is the list four times. Make it an array: np.asarray(p).": np.tile(array, 4),
        "those are truth values. Give the adjusted p-values.": array < 0.02,
        "the last factor is 1, not 0: np.arange(m, 0, -1).": back(larger(sorted_p * (falling - 1))),
        "the first factor is m, not m - 1; and give them back in the order they came in.": (
            np.minimum(sorted_p * (falling - 1), 1)
        ),
        "that is Šidák's correction, all with the same exponent.": 1 - (1 - array) ** 4,
        "those are thresholds. Multiply p instead of dividing 0.05.": 0.05 / (4 - np.argsort(order)),
        "your first factor is 11. m is the number of p-values, here 4.": back(
            larger(sorted_p * np.arange(11, 7, -1))
        ),
        "sort first: your factors follow the order of the list.": larger(array * falling),
        "begin with the smallest p, not with the largest.": downwards,
        "multiply by the factors; you divide.": back(larger(sorted_p / falling)),
        "that is the smallest only. Every p has an adjusted one.": 0.02,
        "those are the p-values that came in.": array,
    }
    same(ask(holm, p), statistics.holm(p), mistakes, "By hand: 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1.")
    expect(np.max(ask(holm, [0.6, 0.7, 0.8])) <= 1, "a p-value is above 1. Cut at 1.")
    falls = np.array([0.02, 0.03, 0.025, 0.9])  # times 4, 2, 3, 1 they fall twice
    neighbours = {"none may be smaller than *any* before it: a running maximum.": [0.08, 0.075, 0.08, 0.9]}
    same(ask(holm, falls), statistics.holm(falls), neighbours, "By hand: 0.02, 0.025, 0.03, 0.9 times 4, 3, 2, 1.")


@exercise("6.3", "Case means: d.mean(axis=1). Replicate means: d.mean(axis=0).")
def _(standard_error) -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(0.01, 0.02, (20, 6)) + rng.normal(0, 0.02, (20, 1)) + rng.normal(0, 0.01, 6)
    even = d - d.mean(axis=0) - d.mean(axis=1, keepdims=True)  # cases and replicates do not differ at all
    count, of_case, of_replicate = d.size, d.mean(axis=1), d.mean(axis=0)
    rest = d - of_case[:, None] - of_replicate + d.mean()
    case, replicate, squares = 6 * of_case.var(ddof=1), 20 * of_replicate.var(ddof=1), np.sum(rest**2)
    ms_rest = squares / (19 * 5)
    right = statistics.random_effects(d).variance ** 0.5

    def root(c: float, r: float, e: float) -> float:
        return np.sqrt(max(c + r - e, c, r) / count)

    shifted = np.sum((rest - d.mean()) ** 2) / (19 * 5)
    mistakes = {
        "you take all differences for independent. Those of one training move together.": d.std(ddof=1) / count**0.5,
        "you take all differences for independent, and ddof=1 is missing.": d.std() / count**0.5,
        "that is only over cases: another training would change it.": np.sqrt(case / count),
        "that is only over replicates: other patients would change it.": np.sqrt(replicate / count),
        "it counts the rest twice. Subtract MS_e; if you do, it is 0: square the rest before you sum.": np.sqrt(
            (case + replicate) / count
        ),
        "MS_e is subtracted, not added.": np.sqrt((case + replicate + ms_rest) / count),
        "the square root is missing: that is the variance of the mean.": right**2,
        "the variances of the means need ddof=1.": root(case * 19 / 20, replicate * 5 / 6, ms_rest),
        "cases and replicates have changed places: d.shape is (cases, replicates).": (
            root(20 * of_case.var(ddof=1), 6 * of_replicate.var(ddof=1), ms_rest)
        ),
        "divide by C R.": right * count**0.5,
        "the mean of all belongs into the rest.": root(case, replicate, shifted),
        "the factors R and C of the mean squares are missing.": (
            root(of_case.var(ddof=1), of_replicate.var(ddof=1), ms_rest)
        ),
        "MS_e divides by (C - 1)(R - 1).": root(case, replicate, squares / count),
        "mean squares are made of variances, not of standard deviations.": (
            root(6 * of_case.std(ddof=1), 20 * of_replicate.std(ddof=1), ms_rest)
        ),
        "that is the half-width of a 95 % interval, 1.96 standard errors.": 1.96 * right,
    }
    answer, larger = ask(standard_error, d), np.sqrt(max(case, replicate) / count)
    turned = np.shape(answer) == () and np.allclose([answer, ask(standard_error, d.T)], larger)
    expect(not turned, "that is the larger of MS_c and MS_r. It is the floor; their sum less MS_e counts.")
    same(answer, right, mistakes, "Compute the three mean squares one by one.")
    by_replicate, by_case = even.copy(), even.copy()
    by_replicate[:, 0] += 1e-3
    by_case[0] += 1e-3
    floors = [statistics.random_effects(table).variance ** 0.5 for table in (by_replicate, by_case)]
    floorless = {
        "the floor is missing: the variance must never be less than max(MS_c, MS_r) / (C R).": [0, 0],
        "the variance must never be less than MS_r / (C R), either.": [0, floors[1]],
        "the variance must never be less than MS_c / (C R), either.": [floors[0], 0],
    }
    otherwise = "The variance must never be less than max(MS_c, MS_r) / (C R)."
    same([ask(standard_error, table) for table in (by_replicate, by_case)], floors, floorless, otherwise)
