"""The samplers: which voxels may be drawn, how likely each is, and what happens when there are few."""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import distance_transform_edt
from scipy.stats import chisquare

from mupkg.samplers import (
    SAMPLERS,
    ContourSampler,
    HardNegativeSampler,
    RandomSampler,
    VoxelTuples,
    contour,
    distance_to_contour,
    draw_with_replacement,
    draw_without_replacement,
    shuffle_roles,
)

IGNORE = 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voxels(mask) -> set[int]:
    """Flat indices of a mask's voxels."""
    return set(np.flatnonzero(np.asarray(mask)).tolist())


def naive_contour(labels: np.ndarray) -> np.ndarray:
    """One image's contour, voxel by voxel."""
    result = np.zeros(labels.shape, bool)
    for voxel in np.ndindex(labels.shape):
        for axis in range(labels.ndim):
            for step in (-1, 1):
                neighbour = list(voxel)
                neighbour[axis] += step
                inside = 0 <= neighbour[axis] < labels.shape[axis]
                if labels[voxel] == 1 and inside and labels[tuple(neighbour)] == 0:
                    result[voxel] = True
    return result


def looks_uniform(drawn, candidates) -> bool:
    """Chi-square test that `drawn` holds each candidate equally often, and nothing else."""
    counts = Counter(drawn)
    return set(counts) == set(candidates) and chisquare([counts[c] for c in candidates]).pvalue > 1e-3


# Two images with a foreground of 6 and 4 voxels; the first has a patch of voxels to ignore beside it.
LABELS = torch.zeros(2, 5, 6, dtype=torch.int64)
LABELS[0, 1:4, 2:4] = 1
LABELS[0, 0] = IGNORE
LABELS[1, 3:5, 4:6] = 1
PROBABILITY = torch.linspace(0, 1, 60).reshape(2, 5, 6)


# --- candidates ---


def test_random_draws_anchors_and_positives_in_the_foreground_negatives_in_the_background():
    anchors, positives, negatives = RandomSampler(anchors=500)(LABELS, generator=seeded())
    assert voxels(LABELS == 1) == set(anchors.tolist()) == set(positives.tolist())
    assert voxels(LABELS == 0) == set(negatives.tolist())


def test_hard_negative_takes_anchors_only_where_the_head_errs_in_the_foreground():
    sampler = HardNegativeSampler(anchors=500, threshold=0.7)
    anchors, positives, negatives = sampler(LABELS, PROBABILITY, seeded())
    wrong = ((PROBABILITY - (LABELS == 1).float()).abs() > 0.7) & (LABELS == 1)
    first = set(range(30))  # the second image lies at probabilities above 0.7: no anchors, so no tuples at all
    assert voxels(wrong) == set(anchors.tolist()) <= first
    assert voxels(LABELS == 1) & first == set(positives.tolist())
    assert voxels(LABELS == 0) & first == set(negatives.tolist())


def test_contour_takes_anchors_and_positives_on_the_contour_negatives_anywhere_in_the_background():
    labels = torch.zeros(1, 7, 7, dtype=torch.int64)
    labels[0, 1:6, 1:6] = 1
    anchors, positives, negatives = ContourSampler(anchors=500)(labels, generator=seeded())
    edge = labels.clone()
    edge[0, 2:5, 2:5] = 0
    assert voxels(edge) == set(anchors.tolist()) == set(positives.tolist())
    assert voxels(labels == 0) == set(negatives.tolist())


@pytest.mark.parametrize("letter", SAMPLERS)
def test_voxels_to_ignore_are_never_drawn(letter):
    labels = torch.randint(0, 2, (3, 6, 6), generator=seeded())
    labels[:, ::2] = IGNORE
    tuples = SAMPLERS[letter](anchors=200)(labels, torch.full((3, 6, 6), 0.5), seeded())
    assert len(tuples.anchors) == 600
    assert (labels.flatten()[torch.cat(tuples)] != IGNORE).all()


def test_an_error_of_exactly_tau_is_not_hard():
    labels = torch.tensor([[[1, 1, 1, 0, 0]]])
    probability = torch.tensor([[[0.75, 0.749, 1.0, 0.25, 1.0]]])  # 1 - 0.75 is 0.25 without rounding
    anchors, _, _ = HardNegativeSampler(anchors=50, threshold=0.25)(labels, probability, seeded())
    assert set(anchors.tolist()) == {1}


def test_hard_negative_without_probability_or_with_one_of_another_shape_is_refused(unchecked):
    with pytest.raises(ValueError, match="needs foreground_probability"):
        HardNegativeSampler()(LABELS)
    with pytest.raises(ValueError, match=r"labels are \(2, 5, 6\) but the probabilities \(1, 5, 6\)"):
        HardNegativeSampler().draw(LABELS, PROBABILITY[:1])


@pytest.mark.parametrize("letter", SAMPLERS)
def test_labels_without_a_batch_axis_are_refused(letter):
    """Regression: the rows of an image were taken for images."""
    with pytest.raises(ValueError, match=r"labels must be \(N, \*spatial\), not \(5, 6\); of one image, labels"):
        SAMPLERS[letter]()(LABELS[0], PROBABILITY[0], seeded())
    assert len(SAMPLERS[letter](4)(LABELS[:1], PROBABILITY[:1], seeded()).anchors) == 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("letter", SAMPLERS)
def test_labels_of_any_whole_or_boolean_type_give_the_same_tuples(letter, dtype):
    labels = (LABELS == 1).long()
    sampler = SAMPLERS[letter](5)
    expected = sampler(labels, PROBABILITY, seeded())
    assert all(map(torch.equal, sampler(labels.to(dtype), PROBABILITY, seeded()), expected))


def test_gradients_stay_out_of_the_choice():
    probability = PROBABILITY.clone().requires_grad_()
    assert not any(t.requires_grad for t in HardNegativeSampler(3)(LABELS, probability, seeded()))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"anchors": value} for value in (0, -1, 2.5, np.float64(20), "20", None, np.True_)),
        {"pairs": 0},
        {"pairs": True},
        *({"threshold": value} for value in (1.0, -0.1, float("nan"), False, "0.1", None)),
        {"near_negatives": 1},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_by_name(wrong, unchecked):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HardNegativeSampler(**wrong)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor])
def test_whole_numbers_of_any_type_are_taken(kind, unchecked):
    sampler = HardNegativeSampler(kind(20), kind(2), np.float32(0.25))
    assert (sampler.anchors, sampler.pairs, sampler.threshold) == (20, 2, 0.25)
    assert type(sampler.anchors) is type(sampler.pairs) is int


# --- contours ---


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 7), (1, 4, 5), (4, 5, 6)])
@pytest.mark.parametrize("foreground", [0.3, 0.6, 0.95])
def test_contour_agrees_with_a_naive_loop(shape, foreground):
    rng = np.random.default_rng(0)
    labels = (rng.random((4, *shape)) < foreground).astype(np.int64)
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    expected = np.stack([naive_contour(image) for image in labels])
    assert np.array_equal(contour(torch.from_numpy(labels)).numpy(), expected)


def test_the_patchs_own_border_is_no_contour():
    labels = torch.zeros(1, 4, 5, dtype=torch.int64)
    labels[:, :, :3] = 1  # touches three sides; only column 2 has a background neighbour
    assert contour(labels).nonzero()[:, 2].unique().tolist() == [2]
    assert not contour(torch.ones(1, 4, 5, dtype=torch.int64)).any()


def test_contour_looks_along_axes_not_diagonals_and_not_into_the_next_image():
    labels = torch.ones(3, 3, 3, dtype=torch.int64)
    labels[0] = 0
    labels[1, 0, 0] = 0
    assert contour(labels)[1].tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert not contour(labels)[2].any()


def test_a_single_voxel_is_anchor_and_positive_at_once():
    labels = torch.zeros(1, 3, 3, 3, dtype=torch.int64)
    labels[0, 1, 1, 1] = 1
    for sampler in RandomSampler(4), ContourSampler(4), HardNegativeSampler(4):
        anchors, positives, negatives = sampler(labels, torch.zeros(1, 3, 3, 3), seeded())
        assert anchors.tolist() == positives.tolist() == [13] * 4
        assert 13 not in negatives


# --- near negatives: N ---


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 9), (2, 3), (9, 11), (3, 6, 7), (7, 6, 8)])
@pytest.mark.parametrize("foreground", [0.02, 0.1, 0.5, 0.98])
def test_near_the_contour_is_within_two_voxels_of_it(shape, foreground):
    rng = np.random.default_rng(0)
    labels = (rng.random((6, *shape)) < foreground).astype(np.int64)
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    labels[0] = 0  # no contour, so nothing is near it
    found = (distance_to_contour(torch.from_numpy(labels), 2) <= 2).numpy()
    for image, near in zip(labels, found, strict=True):
        edge = naive_contour(image)
        expected = distance_transform_edt(~edge) <= 2 if edge.any() else edge
        assert np.array_equal(near, expected)


def test_near_negatives_are_the_background_within_two_voxels_of_the_contour():
    """By hand: around a single voxel the two steps along an axis and the diagonal one, not the knight's move."""
    picture = [".......", "...n...", "..nnn..", ".nn#nn.", "..nnn..", "...n...", "......."]
    expected = {7 * y + x for y, row in enumerate(picture) for x, mark in enumerate(row) if mark == "n"}
    labels = torch.zeros(1, 7, 7, dtype=torch.int64)
    labels[0, 3, 3] = 1
    assert set(RandomSampler(500, near_negatives=True)(labels, generator=seeded()).negatives.tolist()) == expected


@pytest.mark.parametrize("letter", SAMPLERS)
def test_near_negatives_change_the_negatives_alone_and_are_uniform(letter):
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    labels[0, :4, 5:9] = 1  # touches the border, which is a cut and no contour
    labels[1, 6:9, 6:9] = 1
    labels[1, 5] = IGNORE
    probability = torch.full(labels.shape, 0.5)
    far, near = (SAMPLERS[letter](2, 2000, near_negatives=n)(labels, probability, seeded()) for n in (False, True))
    assert torch.equal(near.anchors, far.anchors)
    assert torch.equal(near.positives, far.positives)
    for image in range(2):
        edge = naive_contour(labels[image].numpy())
        candidates = voxels((distance_transform_edt(~edge) <= 2) & (labels[image].numpy() == 0))
        drawn = near.negatives[near.negatives // 256 == image] % 256
        assert len(drawn) == 4000
        assert looks_uniform(drawn.tolist(), candidates)


def test_an_image_without_background_near_the_contour_contributes_no_tuple():
    """Ignored voxels part the organ of image 0 from its background: it has no contour, and nothing is near it."""
    labels = torch.zeros(3, 9, 9, dtype=torch.int64)
    labels[:2, 4, 4] = 1  # image 2 is all background
    labels[0, 3:6, 3:6] = torch.where(labels[0, 3:6, 3:6] == 1, 1, IGNORE)
    assert (RandomSampler(3)(labels, generator=seeded()).anchors // 81).tolist() == [0] * 3 + [1] * 3
    tuples = RandomSampler(3, near_negatives=True)(labels, generator=seeded())
    assert all((t // 81).tolist() == [1] * 3 for t in tuples)


# --- probabilities ---


def test_positives_and_negatives_are_uniform_and_independent():
    tuples = RandomSampler(anchors=1, pairs=20_000)(LABELS[:1], generator=seeded())
    foreground, background = sorted(voxels(LABELS[0] == 1)), sorted(voxels(LABELS[0] == 0))
    positives, negatives = tuples.positives.tolist(), tuples.negatives.tolist()
    assert looks_uniform(positives, foreground)
    assert looks_uniform(negatives, background)
    both = list(zip(positives, negatives, strict=True))
    assert looks_uniform(both, [(p, n) for p in foreground for n in background])


def test_anchors_come_without_replacement_and_every_set_is_equally_likely():
    images = 4000
    labels = torch.tensor([[[1, 1, 1, 0, 1]]]).expand(images, 1, 5)
    anchors = RandomSampler(anchors=2)(labels, generator=seeded()).anchors.view(images, 2) % 5
    assert looks_uniform([tuple(sorted(row)) for row in anchors.tolist()], list(combinations([0, 1, 2, 4], 2)))


def test_as_many_anchors_as_candidates_are_all_the_candidates():
    anchors = RandomSampler(anchors=6)(LABELS[:1], generator=seeded()).anchors
    assert sorted(anchors.tolist()) == sorted(voxels(LABELS[0] == 1))


def test_too_few_candidates_are_drawn_with_replacement_uniformly():
    """Reading R5: three anchors of two candidates, independent of each other."""
    images = 4000
    labels = torch.tensor([[[1, 0, 0, 1]]]).expand(images, 1, 4)
    anchors = RandomSampler(anchors=3)(labels, generator=seeded()).anchors.view(images, 3) % 4
    every = [(a, b, c) for a in (0, 3) for b in (0, 3) for c in (0, 3)]
    assert looks_uniform([tuple(row) for row in anchors.tolist()], every)


def test_each_image_of_a_batch_decides_for_itself_whether_to_replace():
    """Image 0 has six candidates, image 1 four: five anchors are distinct in the first alone."""
    anchors = RandomSampler(anchors=5)(LABELS, generator=seeded()).anchors.view(2, 5)
    assert len(set(anchors[0].tolist())) == 5
    assert len(set(anchors[1].tolist())) < 5


def test_more_anchors_than_voxels():
    labels = torch.tensor([[[1, 0]], [[0, 1]]])
    tuples = RandomSampler(anchors=7)(labels, generator=seeded())
    assert [t.tolist() for t in tuples] == [[0] * 7 + [3] * 7, [0] * 7 + [3] * 7, [1] * 7 + [2] * 7]


def test_every_voxel_of_a_large_scan_can_be_drawn():
    """Regression: a float32 random number has 24 bits, so that of 2^25 candidates only every second came up."""
    drawn = draw_with_replacement(torch.ones(1, 2**25, dtype=torch.bool), 2000, seeded())
    assert looks_uniform((drawn % 2).flatten().tolist(), [0, 1])
    assert looks_uniform((drawn // 2**22).flatten().tolist(), range(8))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_keys_of_a_large_scan_tell_its_voxels_apart(extra, monkeypatch):
    """Regression: of 2^25 candidates float32 keys are half as many, and of equal ones the first were drawn."""
    rand, keys = torch.rand, []
    monkeypatch.setattr(torch, "rand", lambda *a, **k: keys.append(rand(*a, **k)) or keys[-1].clone())
    candidates = torch.ones(1, 2**22 + extra, dtype=torch.bool)
    drawn = draw_without_replacement(candidates, 20, seeded())
    assert torch.equal(drawn, keys[0].topk(20).indices)
    assert (len(keys[0].unique()) == candidates.numel()) is bool(extra)


def test_the_draws_of_a_patch_are_by_float32_keys():
    """So that a training repeats what was trained before there were others."""
    candidates, generator = torch.rand(3, 4096, generator=seeded(1)) < 0.3, seeded()
    drawn = draw_without_replacement(candidates, 20, generator)
    generator = seeded()
    draw_with_replacement(candidates, 20, generator)
    assert torch.equal(drawn, torch.rand(3, 4096, generator=generator).where(candidates, -1).topk(20).indices)


MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(mask=MASKS, count=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_no_draw_ever_gives_a_voxel_that_is_no_candidate(mask, count, seed):
    candidates = torch.from_numpy(mask)
    for draw in draw_with_replacement, draw_without_replacement:
        drawn = draw(candidates, count, seeded(seed))
        assert drawn.shape == (len(mask), count)
        assert ((drawn >= 0) & (drawn < mask.shape[1])).all()
        assert candidates.gather(1, drawn)[candidates.any(dim=1)].all()
    distinct = [len(set(row)) for row in drawn.tolist()]  # of the draw without replacement
    assert all(d == count for d, total in zip(distinct, mask.sum(axis=1), strict=True) if total >= count)


# --- tuples and images ---

LABEL_BATCHES = arrays(
    np.uint8, array_shapes(min_dims=3, max_dims=4, max_side=6), elements=st.sampled_from([0, 1, 255])
)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    labels=LABEL_BATCHES,
    letter=st.sampled_from("HCR"),
    anchors=st.integers(1, 6),
    pairs=st.integers(1, 3),
    near=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_tuples_of_any_batch_are_what_they_should_be(labels, letter, anchors, pairs, near, seed):
    probability = torch.rand(labels.shape, generator=seeded(seed))
    sampler = SAMPLERS[letter](anchors, pairs, near_negatives=near)
    tuples = sampler(torch.from_numpy(labels), probability, seeded(seed))

    edge = np.stack([naive_contour(image) for image in labels])
    hard = (labels == 1) & (np.abs(probability.numpy() - 1) > 0.1)
    anchor_set = {"R": labels == 1, "H": hard, "C": edge}[letter]
    positive_set, negative_set = edge if letter == "C" else labels == 1, labels == 0
    if near:
        negative_set &= np.stack([distance_transform_edt(~e) <= 2 if e.any() else e for e in edge])
    for drawn, allowed in zip(tuples, (anchor_set, positive_set, negative_set), strict=True):
        assert drawn.dtype == torch.int64
        assert allowed.flatten()[drawn.numpy()].all()

    images = [(drawn // labels[0].size).tolist() for drawn in tuples]
    complete = [
        i for i in range(len(labels)) if all(s[i].any() for s in (anchor_set, positive_set, negative_set))
    ]  # exactly these contribute, k * m tuples each
    assert images[0] == images[1] == images[2] == [i for i in complete for _ in range(anchors * pairs)]


@pytest.mark.parametrize("letter", SAMPLERS)
def test_an_image_that_lacks_a_candidate_set_contributes_no_tuple(letter):
    labels = torch.zeros(4, 4, 4, dtype=torch.int64)
    labels[1] = 1  # no background
    labels[2, 1:3, 1:3] = 1  # the only complete one
    labels[3, 1:3, 1:3] = 1
    labels[3][labels[3] == 0] = IGNORE
    tuples = SAMPLERS[letter](3, 2)(labels, torch.zeros(4, 4, 4), seeded())
    assert all((t // 16).tolist() == [2] * 6 for t in tuples)


@pytest.mark.parametrize("letter", SAMPLERS)
@pytest.mark.parametrize("value", [0, 1, IGNORE])
def test_a_batch_without_any_tuple_gives_empty_index_tensors(letter, value):
    tuples = SAMPLERS[letter]()(torch.full((2, 4, 4), value), torch.zeros(2, 4, 4), seeded())
    assert all(t.shape == (0,) and t.dtype == torch.int64 for t in tuples)


def test_every_anchor_has_its_m_pairs_side_by_side():
    anchors, positives, negatives = RandomSampler(anchors=4, pairs=3)(LABELS, generator=seeded())
    assert len(anchors) == len(positives) == len(negatives) == 2 * 4 * 3
    groups = anchors.view(8, 3)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:4, 0].tolist())) == 4


@pytest.mark.parametrize("letter", SAMPLERS)
def test_calling_a_sampler_gives_the_valid_part_of_its_draw(letter):
    labels = torch.cat([LABELS, torch.zeros_like(LABELS)])
    probability = torch.rand(labels.shape, generator=seeded())
    sampler = SAMPLERS[letter](3, 2)
    drawn, valid = sampler.draw(labels, probability, seeded())
    assert valid.view(4, 6)[:, 0].tolist() == [True, True, False, False]
    assert all(len(t) == 4 * 3 * 2 for t in drawn)
    called = sampler(labels, probability, seeded())
    assert all(torch.equal(t[valid], c) for t, c in zip(drawn, called, strict=True))


# --- shuffled roles: a control ---


def test_shuffling_deals_an_images_own_voxels_to_other_roles():
    drawn, _ = RandomSampler(4, 3).draw(LABELS, generator=seeded())
    dealt = shuffle_roles(drawn, len(LABELS), seeded())
    for image in range(2):
        before, after = (torch.stack(t).view(3, 2, 12)[:, image].flatten() for t in (drawn, dealt))
        assert sorted(before.tolist()) == sorted(after.tolist())
        assert not torch.equal(before, after)
    assert all(map(torch.equal, dealt, shuffle_roles(drawn, len(LABELS), seeded())))


def test_every_deal_of_three_voxels_is_equally_likely():
    images = 6000
    drawn = VoxelTuples(*(torch.arange(images) * 3 + role for role in range(3)))
    dealt = torch.stack(shuffle_roles(drawn, images, seeded())) - 3 * torch.arange(images)
    assert looks_uniform([tuple(deal) for deal in dealt.T.tolist()], list(permutations(range(3))))


# --- the generator ---


@pytest.mark.parametrize("letter", SAMPLERS)
def test_the_generator_alone_decides(letter):
    sampler = SAMPLERS[letter](5)
    torch.manual_seed(1)
    first = sampler(LABELS, PROBABILITY, seeded())
    torch.manual_seed(2)
    assert all(map(torch.equal, first, sampler(LABELS, PROBABILITY, seeded())))
    assert not all(map(torch.equal, first, sampler(LABELS, PROBABILITY, seeded(1))))


@pytest.mark.parametrize("letter", SAMPLERS)
def test_a_draw_with_a_generator_leaves_the_global_one_alone_and_moves_its_own(letter):
    state, generator = torch.get_rng_state(), seeded()
    sampler = SAMPLERS[letter](5)
    first, second = (sampler(LABELS, PROBABILITY, generator) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not all(map(torch.equal, first, second))  # drawn anew at every step


def test_without_a_generator_the_global_seed_decides():
    torch.manual_seed(3)
    first = RandomSampler()(LABELS)
    torch.manual_seed(3)
    assert all(map(torch.equal, first, RandomSampler()(LABELS)))
