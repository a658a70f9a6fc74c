"""The grammar of Table II's names, and that building passes everything on."""

import dataclasses
import itertools

import numpy as np
import pytest

from mupkg.configurations import TABLE_II, Configuration, build, configuration
from mupkg.losses import BoundaryTaskLoss, DrawnCrossEntropy, InfoNCELoss, SegmentationMetricLoss, VoxelMetricLoss
from mupkg.models import BoundaryFCN, UNet, UNetPlusPlus, is_3d
from mupkg.samplers import ContourSampler, HardNegativeSampler, RandomSampler

# name: backbone, samplers, triplet, positive pair, gradient cut at the sampling layer
EXPECTED = {
    "UNet": ("UNet", "", False, False, False),
    "UNet++": ("UNet++", "", False, False, False),
    "MetricUNet-R-Sep": ("UNet", "R", True, False, True),
    "MetricUNet-R": ("UNet", "R", True, False, False),
    "MetricUNet-H": ("UNet", "H", True, False, False),
    "MetricUNet++-H": ("UNet++", "H", True, False, False),
    "MetricUNet-C": ("UNet", "C", True, False, False),
    "MetricUNet-HR": ("UNet", "HR", True, False, False),
    "MetricUNet-HC": ("UNet", "HC", True, False, False),
    "MetricUNet-HP": ("UNet", "H", True, True, False),
    "MetricUNet-HRP": ("UNet", "HR", True, True, False),
    "MetricUNet-HCP": ("UNet", "HC", True, True, False),
}
ALSO = {
    "MetricUNet-HCR": ("UNet", "HCR", True, False, False),  # the paper's figure and Table I
    "MetricUNet++-HCRP-Sep": ("UNet++", "HCR", True, True, True),
    "MetricUNet++-CP": ("UNet++", "C", True, True, False),
}


def test_table_ii_has_the_papers_twelve_names_in_order():
    assert list(TABLE_II) == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED | ALSO)
def test_a_name_switches_on_what_the_paper_says(name):
    backbone, letters, triplet, pair, separate = (EXPECTED | ALSO)[name]
    assert configuration(name) == Configuration(name, backbone, tuple(letters), triplet, pair, separate)


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("MetricUNet-RN-Sep", "MetricUNet-R-Sep"),
        ("MetricUNet-HCNP", "MetricUNet-HCP"),
        ("MetricUNet++-HCRN", "MetricUNet++-HCR"),
    ],
)
def test_n_switches_on_near_negatives_and_nothing_else(name, without):
    assert configuration(name) == dataclasses.replace(configuration(without), name=name, near_negatives=True)
    assert not configuration(without).near_negatives
    loss = build(name, base_filters=2, embedding_dim=4)[1]
    assert all(sampler.near_negatives for sampler in loss.samplers)
    assert not any(sampler.near_negatives for sampler in build(without)[1].samplers)


def test_every_order_of_letters_is_accepted_and_normalised():
    orders = [order for number in (1, 2, 3) for order in itertools.permutations("HCR", number)]
    for backbone, order, n, p, sep in itertools.product(
        ["UNet", "UNet++"], orders, ["", "N"], ["", "P"], ["", "-Sep"]
    ):
        letters = tuple(letter for letter in "HCR" if letter in order)
        normal = configuration(f"Metric{backbone}-{''.join(letters)}{n}{p}{sep}")
        assert configuration(f"Metric{backbone}-{''.join(order)}{n}{p}{sep}") == normal
        assert normal == Configuration(normal.name, backbone, letters, True, p == "P", sep == "-Sep", n == "N")
        assert normal.name == f"Metric{backbone}-{''.join(letters)}{n}{p}{sep}"


WRONG = [
    "",
    "unet",
    "UNet+",
    "UNet-H",
    "UNet-Sep",
    "UNet++-H",
    "MetricUNet",
    "MetricUNet-",
    "MetricUNet-P",
    "MetricUNet-N",
    "MetricUNet-NH",
    "MetricUNet-HNC",
    "MetricUNet-HPN",
    "MetricUNet-HNN",
    "UNet-N",
    "MetricUNet-Sep",
    "MetricUNet-hcp",
    "metricunet-HCP",
    "MetricUNet-HH",
    "MetricUNet-HCH",
    "MetricUNet-HCRH",
    "MetricUNet-HX",
    "MetricUNet-PH",
    "MetricUNet-HPC",
    "MetricUNet-HPP",
    "MetricUNet-H-P",
    "MetricUNet-HSep",
    "MetricUNet-H-Sep-Sep",
    "MetricUNet-H-SepP",
    "MetricUNet-H-sep",
    "MetricUNet HCP",
    "MetricUNet-HCP ",
    "MetricUNet-HCP\n",
    "MetricUNet+-H",
    "MetricVNet-H",
    "VNet-H",
    "VNet++",
    "BoundaryFCN-P",
    "MetricBoundaryFCN-H",
]


@pytest.mark.parametrize("name", WRONG)
def test_any_other_name_is_refused_with_itself_and_the_grammar(name):
    with pytest.raises(ValueError, match="valid names are") as error:
        configuration(name)
    assert repr(name) in str(error.value)
    for part in (
        "'UNet'",
        "'UNet++'",
        "'VNet'",
        "'BoundaryFCN'",
        "'MetricUNet'",
        "H (focal",
        "C (contour",
        "R (random",
        "'N' (near",
        "'P'",
        "'-Sep'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", [None, 3, ["UNet"]])
def test_what_is_no_text_is_refused_like_any_other_name(name, unchecked):
    with pytest.raises(ValueError, match="unknown configuration"):
        configuration(name)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configuration("UNet").separate = True


# --- build ---


@pytest.mark.parametrize("name", [*EXPECTED, *ALSO])
def test_build_follows_the_configuration(name):
    backbone, letters, _, pair, separate = (EXPECTED | ALSO)[name]
    network, loss = build(configuration(name), base_filters=2, embedding_dim=4)
    assert type(network) is {"UNet": UNet, "UNet++": UNetPlusPlus}[backbone]
    assert network.separate is separate
    assert isinstance(loss, SegmentationMetricLoss)
    kinds = {"H": HardNegativeSampler, "C": ContourSampler, "R": RandomSampler}
    assert [type(s) for s in loss.samplers] == [kinds[letter] for letter in letters]
    assert loss.metric_loss.pair_weight == (0.1 if pair else 0.0)


def test_the_defaults_are_the_papers():
    network, loss = build(configuration("MetricUNet-HCRP"))
    assert sum(p.numel() for p in network.parameters()) == 3_279_842
    assert [(s.anchors, s.pairs) for s in loss.samplers] == [(20, 1)] * 3
    assert loss.samplers[0].threshold == 0.1
    metric = loss.metric_loss
    assert (metric.margin, metric.pair_weight, metric.pair_distance, metric.normalize) == (0.7, 0.1, 0.01, False)
    assert loss.weight == 0.01


@pytest.mark.parametrize("backbone", ["UNet", "UNet++"])
def test_build_passes_every_parameter_on(backbone):
    network, loss = build(
        configuration(f"Metric{backbone}-HCRP"),
        in_channels=5,
        base_filters=3,
        embedding_dim=7,
        anchors=11,
        pairs=2,
        threshold=0.3,
        margin=0.9,
        weight=0.05,
        pair_weight=0.2,
        pair_distance=0.04,
        normalize=True,
    )
    first, last = network.down[0][0][0], network.head[-1]
    assert (first.in_channels, first.out_channels, last.in_channels, last.out_channels) == (5, 3, 7, 2)
    assert [(s.anchors, s.pairs) for s in loss.samplers] == [(11, 2)] * 3
    assert loss.samplers[0].threshold == 0.3
    metric = loss.metric_loss
    assert (metric.margin, metric.pair_weight, metric.pair_distance, metric.normalize) == (0.9, 0.2, 0.04, True)
    assert loss.weight == 0.05


def test_build_takes_a_name_too():
    (network, loss), (wanted, wanted_loss) = (
        build(chosen, base_filters=2, embedding_dim=4)
        for chosen in ("MetricUNet++-CHP-Sep", configuration("MetricUNet++-HCP-Sep"))
    )
    assert str(network) == str(wanted) and network.separate is wanted.separate is True
    assert [s.letter for s in loss.samplers] == [s.letter for s in wanted_loss.samplers] == ["H", "C"]
    with pytest.raises(ValueError, match="unknown configuration 'WNet'; valid names are"):
        build("WNet")


@pytest.mark.slow
def test_the_rows_of_table_iv_are_built():
    network, loss = build("VNet", base_filters=4, embedding_dim=5)
    assert is_3d(network) and network.network.in_tr.conv_block.conv.out_channels == 2
    assert (loss.dice_alone, loss.soft_dice.squared_pred, loss.samplers) == (True, True, ())
    network, loss = build("BoundaryFCN", base_filters=4, embedding_dim=5)
    assert type(network) is BoundaryFCN and network.down[0][0][0].in_channels == 3
    assert type(loss) is BoundaryTaskLoss and (loss.weight, loss.soft_dice) == (1.0, None)
    assert build("BoundaryFCN", base_filters=2, embedding_dim=2, dice=True)[1].soft_dice
    with pytest.raises(ValueError, match="VNet: dice would do nothing"):
        build("VNet", base_filters=4, dice=True)


def test_build_passes_the_controls_on():
    sizes = {"base_filters": 2, "embedding_dim": 4}
    plain = build("MetricUNet-HCP", **sizes)[1]
    assert (plain.shuffled, plain.soft_dice, plain.metric_loss.hinge) == (False, None, True)
    assert type(plain.metric_loss) is VoxelMetricLoss
    shuffled = build("MetricUNet-HCP", **sizes, control="shuffled")[1]
    assert shuffled.shuffled
    assert shuffled.metric_loss.pair_weight == 0.1
    for control, background in (("voxels", 1), ("balanced", 2)):
        drawn = build("MetricUNet-HCN", **sizes, control=control)[1].metric_loss
        assert isinstance(drawn, DrawnCrossEntropy) and drawn.background == background
    assert build("MetricUNet-HCP", **sizes, hinge=False)[1].metric_loss.hinge is False
    assert build("UNet", **sizes, dice=True)[1].soft_dice
    infonce = build("MetricUNet-HC", **sizes, infonce_temperature=0.3)[1].metric_loss
    assert isinstance(infonce, InfoNCELoss)
    assert infonce.temperature == 0.3


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("UNet", {"control": "voxels"}, "UNet: control would do nothing, because it draws no voxels"),
        ("UNet", {"control": "shuffled", "dice": True}, "UNet: control would do nothing"),
        ("UNet", {"hinge": False}, "UNet: hinge False would do nothing"),
        (
            "UNet++",
            {"hinge": False, "infonce_temperature": 0.1},
            "infonce_temperature would .*; hinge False would do nothing",
        ),
        ("MetricUNet-HP", {"control": "voxels"}, "the P in the name would do nothing, because another loss"),
        ("MetricUNet-H", {"control": "voxels", "hinge": False}, "hinge False would do nothing"),
        ("MetricUNet-H", {"control": "voxels", "normalize": True}, "normalize True would do nothing"),
        ("MetricUNet-H", {"control": "voxels", "infonce_temperature": 0.1}, "infonce_temperature would do nothing"),
        ("MetricUNet-R-Sep", {"control": "voxels"}, "only the head would learn; leave out -Sep"),
        ("MetricUNet-R-Sep", {"weight": 0}, "MetricUNet-R-Sep: with a weight of 0 only the head would learn"),
        ("MetricUNet-HCP", {"pair_weight": 0}, "the P in the name would do nothing, because pair_weight is 0"),
        ("MetricUNet-HCP", {"infonce_temperature": 0.1}, "the P in the name would do nothing, because another"),
        ("MetricUNet-HC", {"infonce_temperature": 0.1, "hinge": False}, "hinge False would do nothing"),
        ("MetricUNet-HC", {"infonce_temperature": 0.1, "normalize": True}, "normalize True would do nothing"),
        ("MetricUNet-HC", {"infonce_temperature": 0}, "temperature of InfoNCE must be above 0"),
        ("MetricUNet-R-Sep", {"control": "balanced"}, "only the head would learn; leave out -Sep"),
        ("MetricUNet-H", {"control": "balanced", "infonce_temperature": 0.1}, "infonce_temperature would do nothing"),
        ("MetricUNet-H", {"control": "voxel"}, "None or one of voxels, balanced, shuffled, not 'voxel'"),
    ],
)
def test_a_control_that_would_do_nothing_or_is_none_is_refused(name, options, said, unchecked):
    with pytest.raises(ValueError, match=said):
        build(name, base_filters=2, embedding_dim=4, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("threshold", 7),
        ("threshold", 1),
        ("anchors", 0),
        ("anchors", 2.0),
        ("pairs", True),
        ("margin", True),
        ("margin", -1),
        ("weight", float("nan")),
        ("pair_weight", float("inf")),
        ("pair_distance", "0.01"),
        ("normalize", "yes"),
        ("hinge", 0),
        ("dice", 1),
    ],
)
def test_options_are_checked_whether_or_not_the_configuration_uses_them(option, value, unchecked):
    """Regression: a threshold of 7 passed for R, which has none, and 0 anchors for UNet."""
    for name in ("UNet", "UNet++", "VNet", "BoundaryFCN", "MetricUNet-R", "MetricUNet-HCP"):
        with pytest.raises(ValueError, match=option):
            build(name, base_filters=2, embedding_dim=4, **{option: value})


def test_numbers_of_numpy_are_taken(unchecked):
    sizes = dict.fromkeys(("in_channels", "base_filters", "embedding_dim", "anchors"), np.int64(2))
    network, loss = build("MetricUNet-H", **sizes, margin=np.float32(0.5), weight=np.int64(1))
    assert (network.down[0][0][0].in_channels, loss.samplers[0].anchors) == (2, 2)
    assert (loss.metric_loss.margin, loss.weight) == (0.5, 1)


@pytest.mark.parametrize("name", ["in_channels", "base_filters", "embedding_dim"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "8"])
def test_sizes_that_make_no_sense_are_refused_by_name(name, value, unchecked):
    """Regression: with 0 filters there was a network without weights."""
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not {value!r}"):
        build(configuration("UNet"), **{name: value})
