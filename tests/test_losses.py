"""The losses: each against a naive loop over tuples, the degenerate cases, and what a step may cost."""

import itertools

import jaxtyping
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F
from watching import Watch

from mupkg.losses import (
    BoundaryTaskLoss,
    DrawnCrossEntropy,
    InfoNCELoss,
    SegmentationMetricLoss,
    VoxelMetricLoss,
    contour_distance,
    gather_embeddings,
    voxel_cross_entropy,
)
from mupkg.models import BoundaryFCN, SegmentationOutput
from mupkg.samplers import (
    SAMPLERS,
    ContourSampler,
    HardNegativeSampler,
    RandomSampler,
    VoxelTuples,
    contour,
    shuffle_roles,
)

SHAPES = {"2D": (3, 6, 4, 5), "3D": (2, 6, 3, 4, 5)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tuples(shape: tuple[int, ...], count: int, seed: int = 0) -> VoxelTuples:
    """Any voxels of any image: the loss itself does not care."""
    voxels = shape[0] * int(np.prod(shape[2:]))
    return VoxelTuples(*torch.randint(0, voxels, (3, count), generator=seeded(seed)))


def naive_loss(embeddings, tuples, margin, pair_weight, pair_distance, normalize, hinge=True):
    """Section III-B.3 read aloud: one tuple after the other, one channel after the other."""
    grid = (embeddings.shape[0], *embeddings.shape[2:])

    def vector(flat_index):
        image, *position = np.unravel_index(int(flat_index), grid)
        values = embeddings[(image, slice(None), *position)]
        return values / values.square().sum().sqrt() if normalize else values

    def distance(u, v):
        return sum((x - y) ** 2 for x, y in zip(u, v, strict=True))

    total = embeddings.new_zeros(())
    for a, p, n in zip(*tuples, strict=True):
        a, p, n = vector(a), vector(p), vector(n)
        triplet, pair = distance(a, p) - distance(a, n) + margin, distance(a, p) - pair_distance
        if hinge:
            triplet, pair = max(triplet, total.new_zeros(())), max(pair, total.new_zeros(()))
        else:  # as printed, epsilon added
            pair = distance(a, p) + pair_distance
        total = total + triplet + pair_weight * pair
    return total / len(tuples.anchors)


OPTIONS = [
    {"margin": margin, "pair_weight": weight, "pair_distance": distance, "normalize": normalize, "hinge": hinge}
    for margin, (weight, distance), normalize, hinge in itertools.product(
        (0.0, 0.7, 3.0), ((0.0, 0.01), (0.1, 0.01), (0.5, 2.0)), (False, True), (True, False)
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_voxel_metric_loss_and_its_gradient_agree_with_a_naive_loop(shape, options):
    embeddings = torch.randn(shape, generator=seeded()).requires_grad_()
    tuples = random_tuples(shape, 12)
    loss, expected = VoxelMetricLoss(**options)(embeddings, tuples), naive_loss(embeddings, tuples, **options)
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, embeddings)[0] for value in (loss, expected))
    assert expected_gradient.any()
    torch.testing.assert_close(gradient, expected_gradient)


def test_by_hand():
    """a = (0, 0), p = (1, 0), n = (0, 2): distances 1 and 4."""
    embeddings = torch.tensor([[[[0.0, 1.0, 0.0]], [[0.0, 0.0, 2.0]]]])
    tuples = VoxelTuples(*torch.tensor([[0], [1], [2]]))
    assert VoxelMetricLoss(margin=1.0)(embeddings, tuples) == 0  # 1 - 4 + 1 < 0: the hinge (R6)
    assert VoxelMetricLoss(margin=5.0)(embeddings, tuples) == 2
    # P: 0.1 * (1 - 0.01) beside a triplet term that is at rest; the pair's distance is allowed to be 2
    assert VoxelMetricLoss(pair_weight=0.1)(embeddings, tuples).item() == pytest.approx(0.099)
    assert VoxelMetricLoss(pair_weight=0.1, pair_distance=2.0)(embeddings, tuples) == 0
    # Eq. (2) as printed: 1 - 4 + 0.7, and 0.1 * (1 + 0.01)
    assert VoxelMetricLoss(hinge=False)(embeddings, tuples).item() == pytest.approx(-2.3)
    assert VoxelMetricLoss(pair_weight=0.1, hinge=False)(embeddings, tuples).item() == pytest.approx(-2.199)


def test_a_tuple_that_satisfies_the_margin_gives_no_gradient():
    embeddings = torch.tensor([[[[0.0, 1.0, 5.0]]]], requires_grad=True)
    VoxelMetricLoss(margin=0.7)(embeddings, VoxelTuples(*torch.tensor([[0], [1], [2]]))).backward()
    assert not embeddings.grad.any()


def test_the_defaults_are_the_papers():
    loss = VoxelMetricLoss()
    assert (loss.margin, loss.pair_weight, loss.pair_distance, loss.normalize) == (0.7, 0.0, 0.01, False)
    assert SegmentationMetricLoss().weight == 0.01


@pytest.mark.parametrize("pair_weight", [0.0, 0.1])
@pytest.mark.parametrize("normalize", [False, True])
def test_no_tuples_give_a_zero_that_back_propagates(pair_weight, normalize):
    embeddings = torch.randn(2, 3, 4, 4, requires_grad=True)
    none = VoxelTuples(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    loss = VoxelMetricLoss(pair_weight=pair_weight, normalize=normalize)(embeddings, none)
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_normalising_a_zero_vector_gives_finite_gradients():
    embeddings = torch.zeros(1, 3, 2, 2, requires_grad=True)
    VoxelMetricLoss(normalize=True)(embeddings, VoxelTuples(*torch.tensor([[0], [1], [2]]))).backward()
    assert embeddings.grad.isfinite().all()


LAYOUTS = {
    "contiguous": lambda e: e,
    "channels last": lambda e: e.movedim(1, -1).contiguous().movedim(-1, 1),
    "cut out": lambda e: F.pad(e, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "half the channels": lambda e: torch.cat([e, e], dim=1)[:, : e.shape[1]],
}


def test_memory_layout_does_not_matter():
    embeddings = torch.randn(2, 6, 8, 8, generator=seeded())
    tuples, loss = random_tuples(embeddings.shape, 40), VoxelMetricLoss(pair_weight=0.1)
    values, gradients = {}, {}
    for name, layout in LAYOUTS.items():
        leaf = layout(embeddings).detach().requires_grad_()
        values[name] = loss(leaf, tuples)
        gradients[name] = torch.autograd.grad(values[name], leaf)[0]
    assert all(torch.equal(value, values["contiguous"]) for value in values.values())
    assert all(torch.equal(gradient, gradients["contiguous"]) for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 6, 4, 5), (1, 5, 3, 4), (4, 1, 3, 2), (2, 6, 3, 4, 5)], ids=str)
def test_gathering_and_its_gradient_are_the_same_in_every_layout(shape, layout, dtype):
    embeddings = LAYOUTS[layout](torch.randn(shape, generator=seeded()).to(dtype)).requires_grad_()
    voxels = random_tuples(shape, 40).anchors
    gathered, expected = gather_embeddings(embeddings, voxels), embeddings.movedim(1, -1).flatten(0, -2)[voxels]
    assert torch.equal(gathered, expected.float())
    weights = torch.randn(gathered.shape, generator=seeded())
    gradient, wanted = (torch.autograd.grad((g * weights).sum(), embeddings)[0] for g in (gathered, expected))
    torch.testing.assert_close(gradient, wanted, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gathering_picks_the_voxel_of_the_flattened_labels(shape):
    position = torch.arange(shape[0] * int(np.prod(shape[2:]))).reshape(shape[0], 1, *shape[2:])
    embeddings = torch.cat([position, 1000 + position], dim=1).float()
    picked = gather_embeddings(embeddings, torch.tensor([0, 7, 59]))
    assert picked.tolist() == [[0, 1000], [7, 1007], [59, 1059]]


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("spatial", [(32, 32), (4, 16, 16)])
def test_embeddings_are_gathered_without_a_copy_of_them_all(spatial, layout):
    """Regression: contiguous ones, as a stranger's network gives them, were copied in every step."""
    embeddings = LAYOUTS[layout](torch.zeros(4, 16, *spatial))
    with Watch() as watch:
        gather_embeddings(embeddings, torch.arange(10))
    assert watch.largest_new <= 10 * 16


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": -0.1},
        {"margin": True},
        {"margin": "0.7"},
        {"margin": None},
        {"pair_weight": float("nan")},
        {"pair_weight": False},
        {"pair_distance": float("inf")},
        {"normalize": "no"},
        {"normalize": 1},
        {"hinge": None},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_by_name(wrong, unchecked):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VoxelMetricLoss(**wrong)


def test_shapes_of_the_signatures_are_checked_in_these_tests():
    """Guards conftest.py: without its import hook all signature checks would be gone in silence."""
    with pytest.raises(jaxtyping.TypeCheckError):
        VoxelMetricLoss()(torch.zeros(2, 3, 4, 4, dtype=torch.int64), random_tuples((2, 3, 4, 4), 2))


# --- InfoNCE: a control ---


def naive_infonce(embeddings, tuples, temperature):
    """One anchor after the other: its own positive against every negative drawn."""
    vectors = embeddings.movedim(1, -1).flatten(0, -2)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    total = embeddings.new_zeros(())
    for a, p in zip(tuples.anchors, tuples.positives, strict=True):
        own = (unit[a] @ unit[p] / temperature).exp()
        others = sum((unit[a] @ unit[n] / temperature).exp() for n in tuples.negatives)
        total = total - (own / (own + others)).log()
    return total / len(tuples.anchors)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.3, 2.0])
def test_infonce_and_its_gradient_agree_with_a_naive_loop(shape, temperature):
    embeddings = torch.randn(shape, generator=seeded()).requires_grad_()
    tuples = random_tuples(shape, 9)
    loss, expected = InfoNCELoss(temperature)(embeddings, tuples), naive_infonce(embeddings, tuples, temperature)
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, embeddings)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)


def test_infonce_by_hand():
    """The positive is the anchor's like, one negative is opposite, the other at right angles: similarity 1, -1, 0."""
    embeddings = torch.tensor([[[[1.0, 2.0, -3.0, 0.0]], [[0.0, 0.0, 0.0, 4.0]]]])
    tuples = VoxelTuples(*torch.tensor([[0, 0], [1, 1], [2, 3]]))
    e = np.exp
    assert InfoNCELoss(0.5)(embeddings, tuples).item() == pytest.approx(-np.log(e(2) / (e(2) + e(-2) + 1)))


def test_infonce_without_tuples_is_a_zero_that_back_propagates():
    embeddings = torch.randn(2, 3, 4, 4, requires_grad=True)
    none = VoxelTuples(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)))
    loss = InfoNCELoss()(embeddings, none)
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), float("inf"), True, "0.1"])
def test_a_temperature_that_makes_no_sense_is_refused(temperature, unchecked):
    with pytest.raises(ValueError, match="the temperature of InfoNCE must be"):
        InfoNCELoss(temperature)


# --- the multi-task loss ---


def batch(spatial: tuple[int, ...] = (8, 8)) -> tuple[SegmentationOutput, torch.Tensor]:
    """Four images: two with an organ (of 16 and 4 voxels in 2D), one without, one that is nothing else."""
    logits = torch.randn(4, 2, *spatial, generator=seeded(1)).requires_grad_()
    embeddings = torch.randn(4, 5, *spatial, generator=seeded(2)).requires_grad_()
    labels = torch.zeros(4, *spatial, dtype=torch.int64)
    labels[(0, *(slice(2, 6),) * len(spatial))] = 1
    labels[(1, *(slice(0, 2),) * len(spatial))] = 1
    labels[3] = 1
    return SegmentationOutput(logits, embeddings), labels


@pytest.mark.parametrize("spatial", [(8, 8), (6, 7, 8)], ids=["2D", "3D"])
@pytest.mark.parametrize("letters", ["H", "C", "R", "HC", "HR", "HCR"])
@pytest.mark.parametrize(
    "options", [{}, {"pair_weight": 0.1}, {"normalize": True, "margin": 0.2}, {"hinge": False}], ids=str
)
def test_every_term_agrees_with_naive_ones_from_the_same_draws(spatial, letters, options):
    output, labels = batch(spatial)
    samplers = [SAMPLERS[letter](anchors=3, pairs=2) for letter in letters]
    terms = SegmentationMetricLoss(samplers, VoxelMetricLoss(**options), weight=0.05)(output, labels, seeded())

    probability, generator = output.logits.softmax(dim=1)[:, 1], seeded()
    assert tuple(terms.metric) == tuple(letters)
    every = {"margin": 0.7, "pair_weight": 0.0, "pair_distance": 0.01, "normalize": False} | options
    for sampler in samplers:
        tuples = sampler(labels, probability, generator)  # images 2 and 3 contribute none
        assert len(tuples.anchors) == 2 * 3 * 2
        torch.testing.assert_close(terms.metric[sampler.letter], naive_loss(output.embeddings, tuples, **every))

    own = -output.logits.log_softmax(dim=1).gather(1, labels[:, None]).mean()
    torch.testing.assert_close(terms.cross_entropy, own)
    torch.testing.assert_close(terms.total, own + 0.05 * sum(terms.metric.values()))


def naive_cross_entropy(logits, labels, voxels):
    """One voxel after the other, with its own label."""
    grid, total = labels.shape, logits.new_zeros(())
    for image, *position in (np.unravel_index(int(voxel), grid) for voxel in voxels):
        scores = logits[(image, slice(None), *position)]
        total = total - scores.log_softmax(dim=0)[labels[(image, *position)]]
    return total / len(voxels)


@pytest.mark.parametrize("spatial", [(8, 8), (6, 7, 8)], ids=["2D", "3D"])
@pytest.mark.parametrize("control", ["voxels", "balanced", "shuffled", "infonce"])
@pytest.mark.parametrize("near", [False, True])
def test_a_control_learns_from_the_very_voxels_that_would_be_drawn_without_it(spatial, control, near):
    output, labels = batch(spatial)
    samplers = [SAMPLERS[letter](3, 2, near_negatives=near) for letter in "HC"]
    losses = {"voxels": DrawnCrossEntropy(), "balanced": DrawnCrossEntropy(balanced=True), "shuffled": None}
    metric_loss = (losses | {"infonce": InfoNCELoss(0.3)})[control]
    shuffled = control == "shuffled"
    terms = SegmentationMetricLoss(samplers, metric_loss, 0.05, shuffled=shuffled)(output, labels, seeded())

    probability, generator = output.logits.softmax(dim=1)[:, 1], seeded()
    draws = [sampler.draw(labels, probability, generator) for sampler in samplers]
    for sampler, (drawn, valid) in zip(samplers, draws, strict=True):
        assert valid.sum() == 2 * 3 * 2  # images 2 and 3 contribute none
        if shuffled:
            drawn = shuffle_roles(drawn, len(labels), generator)
        tuples = VoxelTuples(*(t[valid] for t in drawn))
        if control == "voxels":
            expected = naive_cross_entropy(output.logits, labels, torch.cat(tuples))
        elif control == "balanced":
            sides = torch.cat([tuples.anchors, tuples.positives]), tuples.negatives
            expected = sum(naive_cross_entropy(output.logits, labels, voxels) for voxels in sides) / 2
        elif shuffled:
            expected = naive_loss(output.embeddings, tuples, 0.7, 0.0, 0.01, False)
        else:
            expected = naive_infonce(output.embeddings, tuples, 0.3)
        torch.testing.assert_close(terms.metric[sampler.letter], expected)
    torch.testing.assert_close(terms.total, terms.cross_entropy + 0.05 * sum(terms.metric.values()))


def test_the_mean_is_over_tuples_not_over_images():
    """R7: images without tuples do not dilute the loss, so leaving them out changes nothing."""
    output, labels = batch()
    loss = SegmentationMetricLoss([RandomSampler(8)], VoxelMetricLoss())
    whole = loss(output, labels, seeded()).metric["R"]
    tuples = RandomSampler(8)(labels, generator=seeded())
    assert len(tuples.anchors) == 16 < len(labels) * 8
    torch.testing.assert_close(whole, VoxelMetricLoss()(output.embeddings, tuples))
    alone = VoxelMetricLoss()(output.embeddings[:2], tuples)  # same flat indices: the empty images come last
    torch.testing.assert_close(whole, alone)


def naive_dice_loss(logits, labels):
    """1 - soft Dice of each foreground class over all known voxels of the batch, and its mean."""
    known = labels != -100
    losses = []
    for c in range(1, logits.shape[1]):
        p, y = logits.softmax(dim=1)[:, c][known], (labels == c)[known].float()
        losses.append(1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("samplers", [[], [RandomSampler(3)]], ids=["UNet", "R"])
@pytest.mark.parametrize("spatial", [(8, 8), (6, 7, 8)], ids=["2D", "3D"])
@pytest.mark.parametrize("classes", [2, 3])
def test_soft_dice_is_added_to_the_total(samplers, spatial, classes):
    output, labels = batch(spatial)
    logits = torch.randn(4, classes, *spatial, generator=seeded()).requires_grad_()
    output = SegmentationOutput(logits, output.embeddings)
    labels[:, 5:] = -100
    plain, with_dice = (SegmentationMetricLoss(samplers, dice=d)(output, labels, seeded()) for d in (False, True))
    assert with_dice.cross_entropy == plain.cross_entropy
    added, expected = with_dice.total - plain.total, naive_dice_loss(logits, labels)
    torch.testing.assert_close(added, expected)
    gradient, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (added, expected))
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_soft_dice_of_a_batch_without_prostate_is_finite(dtype):
    output, labels = batch()
    terms = SegmentationMetricLoss(dice=True)(output, torch.zeros_like(labels, dtype=dtype))
    terms.total.backward()
    assert output.logits.grad.isfinite().all()
    assert terms.total.item() == pytest.approx(terms.cross_entropy.item() + 1, abs=1e-5)


def test_without_samplers_the_total_is_the_cross_entropy():
    output, labels = batch()
    terms = SegmentationMetricLoss()(output, labels)
    assert terms.total == terms.cross_entropy == F.cross_entropy(output.logits, labels)
    assert terms.metric == {}


def test_every_term_keeps_its_graph_and_reaches_what_it_should():
    output, labels = batch()
    samplers = [HardNegativeSampler(5), ContourSampler(5), RandomSampler(5)]
    terms = SegmentationMetricLoss(samplers, weight=0.01)(output, labels, seeded())

    def gradients(value):
        return torch.autograd.grad(value, list(output), retain_graph=True, allow_unused=True)

    to_logits, to_embeddings = gradients(terms.cross_entropy)
    assert to_logits.any()
    assert to_embeddings is None
    summed = torch.zeros_like(output.embeddings)
    for value in terms.metric.values():  # H too: the probability that chooses its anchors is detached
        to_logits, to_embeddings = gradients(value)
        assert to_logits is None
        assert to_embeddings.any()
        summed += 0.01 * to_embeddings
    torch.testing.assert_close(gradients(terms.total)[1], summed)


def test_only_voxels_of_valid_tuples_get_a_gradient():
    output, labels = batch()
    terms = SegmentationMetricLoss([RandomSampler(50)], VoxelMetricLoss(margin=100.0))(output, labels, seeded())
    terms.metric["R"].backward()
    touched = output.embeddings.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert touched.tolist() == [True, True, False, False]


@pytest.mark.parametrize("value", [0, 1])
def test_a_batch_without_tuples_still_back_propagates(value):
    output, labels = batch()
    samplers = [HardNegativeSampler(), ContourSampler(), RandomSampler()]
    terms = SegmentationMetricLoss(samplers)(output, torch.full_like(labels, value), seeded())
    assert list(terms.metric.values()) == [0, 0, 0]
    terms.total.backward()
    assert output.logits.grad.any()
    assert torch.equal(output.embeddings.grad, torch.zeros_like(output.embeddings))


def test_hard_negatives_follow_the_heads_foreground_probability():
    """The head is sure and right but for one voxel: that one is every anchor."""
    _, labels = batch()
    labels, at = labels[:1], (0, 3, 4)
    logits = torch.stack([-10.0 * (2 * labels - 1), 10.0 * (2 * labels - 1)], dim=1)
    logits[0, :, 3, 4] = 0.0
    embeddings = torch.randn(1, 5, 8, 8).requires_grad_()
    loss = SegmentationMetricLoss([HardNegativeSampler(7)], VoxelMetricLoss(margin=100.0))
    loss(SegmentationOutput(logits, embeddings), labels, seeded()).metric["H"].backward()
    expected = HardNegativeSampler(7)(labels, logits.softmax(dim=1)[:, 1], seeded())
    assert set(expected.anchors.tolist()) == {3 * 8 + 4}
    assert embeddings.grad[at[0], :, at[1], at[2]].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_any_whole_or_boolean_type(dtype):
    output, labels = batch()
    loss = SegmentationMetricLoss([HardNegativeSampler(3), ContourSampler(3)])
    assert loss(output, labels.to(dtype), seeded()).total == loss(output, labels, seeded()).total


def test_voxels_marked_minus_100_count_nowhere():
    output, labels = batch()
    labels[:, 5:] = -100
    terms = SegmentationMetricLoss([RandomSampler(50)], VoxelMetricLoss(margin=100.0))(output, labels, seeded())
    terms.total.backward()
    assert not output.logits.grad[:, :, 5:].any()
    assert not output.embeddings.grad[:, :, 5:].any()


@pytest.mark.parametrize("options", [{}, {"dice": True}, {"samplers": [HardNegativeSampler(), ContourSampler()]}])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_batch_of_nothing_but_ignored_voxels_gives_a_zero_that_back_propagates(options, deterministic):
    """Regression: the mean of no voxels was NaN, and so were all weights after the step."""
    output, labels = batch()
    torch.use_deterministic_algorithms(deterministic)
    try:
        terms = SegmentationMetricLoss(**options)(output, torch.full_like(labels, -100), seeded())
        terms.total.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert terms.total == terms.cross_entropy == 0
    assert torch.equal(output.logits.grad, torch.zeros_like(output.logits))


def test_logits_that_are_no_numbers_still_give_a_loss_that_is_none():
    output, labels = batch()
    assert SegmentationMetricLoss()(output._replace(logits=output.logits * torch.nan), labels).total.isnan()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("value", [255, 3, -1, -101])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("spatial", [(8, 8), (6, 7, 8)], ids=["2D", "3D"])
def test_labels_of_no_class_are_named_with_the_way_out(spatial, deterministic, value, classes):
    """Regression: an IndexError, "Target 255 is out of bounds"."""
    output, labels = batch(spatial)
    logits = torch.zeros(4, classes, *spatial)
    labels[0, 0], labels[1, 0] = value, -100
    torch.use_deterministic_algorithms(deterministic)
    try:
        with pytest.raises(ValueError) as error:
            SegmentationMetricLoss([RandomSampler()], dice=True)(output._replace(logits=logits), labels, seeded())
    finally:
        torch.use_deterministic_algorithms(False)
    assert str(error.value) == (
        f"labels must be 0 to {classes - 1} or -100, but hold [{value}]; "
        f"to ignore voxels, labels.long().masked_fill(labels == {value}, -100)"
    )
    cured = labels.long().masked_fill(labels == value, -100)
    assert SegmentationMetricLoss([RandomSampler()])(output._replace(logits=logits), cured).total.isfinite()


def test_every_label_of_no_class_is_named():
    output, labels = batch()
    labels[0, 0, :3] = torch.tensor([2, 255, -1])
    with pytest.raises(ValueError, match=r"0 to 1 or -100, but hold \[-1, 2, 255\]"):
        SegmentationMetricLoss()(output, labels.to(torch.int16))


def test_labels_that_are_no_whole_numbers_are_refused(unchecked):
    """Else 0.7, as resampling may give it, would be background."""
    output, labels = batch()
    with pytest.raises(ValueError, match="labels must be whole numbers or boolean, not torch"):
        SegmentationMetricLoss()(output, labels * 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_give_a_float32_loss(dtype):
    output, labels = batch()
    halves = SegmentationOutput(*(tensor.detach().to(dtype).requires_grad_() for tensor in output))
    loss = SegmentationMetricLoss([RandomSampler(5)], VoxelMetricLoss(pair_weight=0.1))
    terms, rounded = (loss(o, labels, seeded()) for o in (halves, SegmentationOutput(*(t.float() for t in halves))))
    assert terms.total.dtype == terms.metric["R"].dtype == torch.float32
    assert terms.total == rounded.total  # nothing is lost but the rounding of the network's own output
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(halves, labels, seeded()).total == terms.total
    terms.total.backward()
    assert halves.embeddings.grad.dtype == dtype


@pytest.mark.parametrize("spatial", [(8, 8), (6, 7, 8)], ids=["2D", "3D"])
@pytest.mark.parametrize(
    ("spoil", "cure"),
    [
        (lambda logits, embeddings, labels: (logits, embeddings, labels[:, None]), "without a channel axis"),
        (lambda logits, embeddings, labels: (logits, embeddings, labels[1]), "on one grid"),
        (lambda logits, embeddings, labels: (logits, embeddings, labels[:2]), "on one grid"),
        (lambda logits, embeddings, labels: (logits[..., 1:], embeddings, labels), "on one grid"),
        (lambda logits, embeddings, labels: (logits[:, :1], embeddings, labels), "2 or more classes"),
        (lambda logits, embeddings, labels: (logits, embeddings[..., ::2], labels), "EmbeddingTap brings"),
        (lambda logits, embeddings, labels: (logits, embeddings.repeat_interleave(2, -1), labels), "EmbeddingTap"),
        (lambda logits, embeddings, labels: (logits, embeddings[:2], labels), "on one grid"),
    ],
)
def test_shapes_that_do_not_fit_are_told_with_the_way_out(spatial, spoil, cure, unchecked):
    """Regression: embeddings on a larger grid gave a loss of the wrong voxels; the others raw errors of torch."""
    output, labels = batch(spatial)
    logits, embeddings, labels = spoil(*output, labels)
    with pytest.raises(ValueError, match=cure) as error:
        SegmentationMetricLoss([RandomSampler(3)])(SegmentationOutput(logits, embeddings), labels, seeded())
    shapes = (tuple(tensor.shape) for tensor in (logits, embeddings, labels))
    assert "logits {}, embeddings {} and labels {}".format(*shapes) in str(error.value)


def test_a_single_image_of_a_single_row_or_slice_is_no_channel_axis():
    for spatial in ((1, 8), (1, 7, 8)):
        labels = torch.zeros(1, *spatial, dtype=torch.int64)
        labels[..., :3] = 1
        output = SegmentationOutput(torch.zeros(1, 2, *spatial), torch.zeros(1, 4, *spatial))
        assert SegmentationMetricLoss([RandomSampler(3)])(output, labels, seeded()).total.isfinite()


def test_a_sampler_may_not_be_there_twice():
    with pytest.raises(ValueError, match="once, not R, R"):
        SegmentationMetricLoss([RandomSampler(), RandomSampler(5)])


@pytest.mark.parametrize("weight", [-0.01, float("nan"), float("inf"), True])
def test_a_weight_that_makes_no_sense_is_refused(weight, unchecked):
    with pytest.raises(ValueError, match="weight"):
        SegmentationMetricLoss([RandomSampler()], weight=weight)


@pytest.mark.parametrize("name", ["shuffled", "dice"])
def test_a_switch_is_true_or_false(name, unchecked):
    with pytest.raises(ValueError, match=f"{name} must be True or False, not 'no'"):
        SegmentationMetricLoss([RandomSampler()], **{name: "no"})


# --- what a step costs ---


SAMPLERS_HCR = [HardNegativeSampler(), ContourSampler(), RandomSampler()]


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"metric_loss": DrawnCrossEntropy()}, {"shuffled": True}, {"dice": True}, {"metric_loss": InfoNCELoss()}],
    ids=str,
)
def test_a_training_step_never_waits_for_the_device(near, options):
    output, labels = batch()
    samplers = [kind(near_negatives=near) for kind in SAMPLERS.values()]
    loss = SegmentationMetricLoss(samplers, **({"metric_loss": VoxelMetricLoss(pair_weight=0.1)} | options))
    with Watch() as watch:
        loss(output, labels, seeded()).total.backward()
    assert watch.largest_new  # it did watch
    assert watch.waits == []
    with Watch() as watch:  # and would have seen it: the public call leaves invalid tuples out
        RandomSampler()(labels, generator=seeded())
    assert watch.waits


def test_no_tensor_of_a_step_is_larger_than_the_embeddings():
    """No N x N distances: a slice of 256 x 256 voxels would have 4.3 billion of them."""
    labels = torch.zeros(1, 256, 256, dtype=torch.int64)
    labels[:, 90:160, 100:170] = 1
    output = SegmentationOutput(*(torch.randn(1, c, 256, 256).requires_grad_() for c in (2, 8)))
    with Watch() as watch:
        SegmentationMetricLoss(SAMPLERS_HCR)(output, labels, seeded()).total.backward()
    assert watch.largest_new <= output.embeddings.numel()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_gradients_are_the_same_to_the_bit_in_every_run_on_several_threads(layout):
    """Regression: indexing's backward adds up a voxel drawn more than once in any order if there are threads."""
    embeddings = LAYOUTS[layout](torch.randn(16, 64, 32, 32)).requires_grad_()
    drawn = torch.randint(0, 60, (9, 16, 20)) + 1024 * torch.arange(16)[:, None]  # each voxel about three times
    weights = torch.randn(drawn.numel(), 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        gradients = [
            torch.autograd.grad((gather_embeddings(embeddings, drawn.flatten()) * weights).sum(), embeddings)[0]
            for _ in range(20)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_cross_entropy_is_the_same_in_the_deterministic_mode():
    logits, labels = torch.randn(2, 2, 4, 5, 6), torch.randint(0, 2, (2, 4, 5, 6))
    usual = voxel_cross_entropy(logits, labels)
    torch.use_deterministic_algorithms(True)
    try:
        torch.testing.assert_close(voxel_cross_entropy(logits, labels), usual)
    finally:
        torch.use_deterministic_algorithms(False)


# --- VNet's loss, and the boundary task ---


def test_vnets_loss_is_its_papers_dice_alone():
    logits = torch.randn(2, 2, 4, 6, 5, requires_grad=True)
    labels = torch.randint(2, (2, 4, 6, 5))
    terms = SegmentationMetricLoss(dice_alone=True)(SegmentationOutput(logits, logits), labels)
    p, g = logits.softmax(dim=1)[:, 1], labels.float()
    expected = 1 - 2 * (p * g).sum() / (p.square().sum() + g.square().sum())
    assert terms.total.item() == pytest.approx(expected.item(), abs=1e-5)
    assert terms.metric == {}
    assert terms.cross_entropy.item() == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)
    (ours,), (naive,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (terms.total, expected))
    torch.testing.assert_close(ours, naive, atol=1e-6, rtol=1e-3)


def ball(size: int, radius: float, axes: int) -> torch.Tensor:
    """The distance of every voxel to the middle one."""
    place = torch.arange(size) - size // 2
    return torch.stack(torch.meshgrid([place] * axes, indexing="ij")).square().sum(dim=0).sqrt()


@pytest.mark.parametrize(("axes", "size"), [(2, 61), (3, 41)])
def test_the_distance_to_a_spheres_contour_is_that_of_the_closed_form(axes, size):
    centre, radius, reach = ball(size, 10.0, axes), 10.0, 8
    distance, known = contour_distance((centre <= radius).long()[None], reach)
    # The contour's voxels lie in the ball, less than one voxel from its surface.
    expected = (centre - (radius - 0.5)).abs().clamp(max=reach)
    inside = known[0] & (expected < reach - 1)
    assert inside.sum() > 800
    assert (distance[0] - expected)[inside].abs().max() < 1
    assert (distance[0] - expected)[inside].mean().abs() < 0.25
    assert (distance[0][(centre > radius + reach)] == reach).all()


def test_distances_are_those_of_scipy_and_what_lies_beyond_a_patch_is_unknown():
    rng, reach = np.random.default_rng(0), 5
    for _ in range(10):
        whole = ndimage.gaussian_filter(rng.normal(size=(2, 40, 46)), (0, 3, 3)) > 0.02
        edge = contour(torch.from_numpy(whole).long()).numpy()
        true = np.stack([ndimage.distance_transform_edt(~slice_) for slice_ in edge]).clip(max=reach)
        distance, known = contour_distance(torch.from_numpy(whole).long(), reach)
        np.testing.assert_allclose(distance.numpy(), true, atol=1e-6)
        cut = np.s_[:, 9:30, 12:37]
        distance, known = contour_distance(torch.from_numpy(whole[cut]).long(), reach)
        known = known.numpy()
        np.testing.assert_allclose(distance.numpy()[known], true[cut][known], atol=1e-6)
        assert 0.2 < known.mean() < 1
        assert known[:, reach:-reach, reach:-reach].all()
    distance, known = contour_distance(torch.zeros(1, 24, 24, dtype=torch.long), reach)
    assert (distance == reach).all() and known.sum() == 14**2


def test_the_boundary_task_learns_the_distance_where_it_is_known():
    network, labels = BoundaryFCN(1, 2, 4), torch.zeros(2, 32, 32, dtype=torch.long)
    labels[0, 8:20, 10:24] = 1
    output = network(torch.rand(2, 1, 32, 32))
    terms = BoundaryTaskLoss(weight=1.0)(output, labels)
    distance, known = contour_distance(labels, BoundaryTaskLoss.REACH)
    wanted = (output.embeddings[:, -1] - distance / 8)[known].square().mean()
    assert terms.metric["distance"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert terms.total.item() == pytest.approx((terms.cross_entropy + wanted).item(), rel=1e-5)
    terms.total.backward()
    assert all(p.grad is not None for p in network.parameters())
    small = torch.ones(2, 8, 8, dtype=torch.long)  # no distance is known
    assert BoundaryTaskLoss(weight=1.0)(network(torch.rand(2, 1, 8, 8)), small).metric["distance"] == 0


def test_the_second_decoder_learns_from_the_distance_alone_and_from_the_cross_entropy():
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    labels[0, 8:20, 10:24] = 1
    learns = {}
    for name in ("distance", "cross-entropy"):
        network = BoundaryFCN(1, 2, 4)
        terms = BoundaryTaskLoss(weight=1.0)(network(torch.rand(1, 1, 32, 32)), labels)
        (terms.metric["distance"] if name == "distance" else terms.cross_entropy).backward()
        learns[name] = {n.split(".")[0] for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    second = {"boundary_up", "boundary_merge", "distance"}
    assert learns == {"distance": {"down"} | second, "cross-entropy": {"down", "up", "merge", "head"} | second}


def test_the_active_share_is_that_of_valid_tuples_with_a_positive_triplet_term():
    """By hand: d(a,p) - d(a,n) + .7 is below zero, above, above but not valid, below."""
    anchors = torch.tensor([[0.0, 0.0]] * 4)
    positives = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    negatives = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [3.0, 0.0]])
    valid = torch.tensor([True, True, False, True])
    loss = VoxelMetricLoss(pair_weight=0.1)  # its pair term is above zero for the first two
    assert loss.active_share(anchors, positives, negatives, valid) == pytest.approx(1 / 3)
    assert loss.active_share(anchors, positives, negatives, torch.zeros(4, dtype=torch.bool)) == 0


def test_the_loss_keeps_the_active_share_of_each_sampler():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[:, 2:6, 2:6] = 1
    output = SegmentationOutput(torch.randn(2, 2, 8, 8), torch.zeros(2, 3, 8, 8))  # all distances 0: sigma is left
    loss = SegmentationMetricLoss([RandomSampler(), ContourSampler()])
    loss(output, labels)
    assert loss.active_shares == {"R": 1.0, "C": 1.0}
    far = SegmentationOutput(output.logits, 9.0 * labels[:, None].expand(2, 3, 8, 8))  # d(a,n) is 243
    loss(far, labels)
    assert loss.active_shares == {"R": 0.0, "C": 0.0}
