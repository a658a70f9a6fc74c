"""Patches are uniform, lie inside, carry the middle slice's label, and depend on seed and step alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from watching import Watch

from mupkg.data.patches import PatchSource


def coded(shape, number=0):
    """A volume whose voxels tell where they lie: the value is a hash of volume, z, y and x."""
    index = np.arange(np.prod(shape)).reshape(shape)
    return ((index * 7919 + number * 104729) % 251).astype(np.uint8)


def source_of(shapes, **options):
    images = [coded(shape, number) for number, shape in enumerate(shapes)]
    options = {"patch_size": (4, 6), "batch_size": 5, "patches_per_image": 20, "seed": 3} | options
    return PatchSource(images, [(image % 2).astype(np.uint8) for image in images], **options)


def test_a_batch_has_the_shapes_types_and_values_of_a_networks_input():
    images, labels = source_of([(7, 12, 14)]).batch(0)
    assert (images.shape, images.dtype) == ((5, 3, 4, 6), torch.float32)
    assert (labels.shape, labels.dtype) == ((5, 4, 6), torch.int64)
    full = PatchSource([np.full((3, 4, 6), 255, np.uint8)], [np.ones((3, 4, 6), np.uint8)], patch_size=(4, 6))
    images, labels = full.batch(0)
    assert (images == 1).all() and (labels == 1).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patches_are_cut_where_positions_say_and_labels_are_the_middle_slices(channels):
    source = source_of([(7, 12, 14), (9, 10, 11)], channels=channels)
    for step in (0, 3, 9):
        images, labels = source.batch(step)
        for row in range(5):
            epoch, number = divmod(5 * step + row, source.epoch_length)
            volume, z, y, x = source.positions(epoch)[number]
            cut = source.images[volume][z : z + channels, y : y + 4, x : x + 6]
            assert cut.shape == (channels, 4, 6)
            np.testing.assert_array_equal((images[row].numpy() * 255).round(), cut)
            np.testing.assert_array_equal(labels[row].numpy(), cut[channels // 2] % 2)


def test_every_position_is_equally_likely():
    """3 * 2 * 4 positions in a tiny volume: each has probability 1 / 24."""
    source = source_of([(5, 5, 9)], patches_per_image=24 * 500)
    counts = Counter(map(tuple, source.positions(0)[:, 1:].tolist()))
    assert set(counts) == {(z, y, x) for z in range(3) for y in range(2) for x in range(4)}
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_an_epoch_takes_500_patches_of_each_volume_as_in_the_paper():
    volumes = [np.ones((3, 4, 6), np.uint8)] * 2
    assert PatchSource(volumes, volumes, patch_size=(4, 6)).epoch_length == 2 * 500


def test_every_volume_gives_its_share_of_an_epoch_in_shuffled_order():
    source = source_of([(7, 12, 14), (3, 4, 6), (9, 30, 30)], patches_per_image=50)
    for epoch in (0, 1):
        volumes = source.positions(epoch)[:, 0]
        assert Counter(volumes.tolist()) == {0: 50, 1: 50, 2: 50}
        assert (np.diff(volumes) != 0).sum() > 60
    assert (source.positions(0) != source.positions(1)).any()
    assert source.epoch_length == 150


def test_a_batch_does_not_depend_on_what_was_drawn_before():
    jumping, walking = source_of([(7, 12, 14), (9, 10, 11)]), source_of([(7, 12, 14), (9, 10, 11)])
    walked = [walking.batch(step) for step in range(20)]  # more than two epochs
    for step in (19, 0, 7, 8, 19):
        for a, b in zip(jumping.batch(step), walked[step], strict=True):
            assert torch.equal(a, b)


def test_a_batch_may_reach_over_the_end_of_an_epoch():
    source = source_of([(7, 12, 14)], patches_per_image=7)
    images, _ = source.batch(1)  # patches 5, 6 of epoch 0 and 0, 1, 2 of epoch 1
    _, z, y, x = source.positions(1)[2]
    np.testing.assert_array_equal(
        (images[4].numpy() * 255).round(), source.images[0][z : z + 3, y : y + 4, x : x + 6]
    )


def test_the_seed_decides():
    shapes = [(7, 12, 14)]
    assert torch.equal(source_of(shapes).batch(2)[0], source_of(shapes).batch(2)[0])
    assert not torch.equal(source_of(shapes).batch(2)[0], source_of(shapes, seed=4).batch(2)[0])


def test_iterating_gives_the_batches_in_order_without_end():
    source = source_of([(7, 12, 14)], patches_per_image=5)
    for step, (images, _) in zip(range(4), source, strict=False):
        assert torch.equal(images, source.batch(step)[0])


def test_a_flipped_volume_is_cut_as_it_lies():
    """Regression: PyTorch takes no array of negative strides."""
    image, label = np.random.default_rng(0).integers(0, 2, (2, 6, 16, 16), dtype=np.uint8)
    as_it_lies = PatchSource([np.flip(image)], [np.flip(label)], patch_size=(8, 8))
    copied = PatchSource([np.flip(image).copy()], [np.flip(label).copy()], patch_size=(8, 8))
    assert all(torch.equal(*parts) for parts in zip(as_it_lies.batch(0), copied.batch(0), strict=True))


def test_a_small_volume_is_padded_with_air_in_plane_and_its_end_slices_across():
    image = np.arange(1, 13, dtype=np.uint8).reshape(2, 2, 3)
    source = PatchSource([image], [image % 2], patch_size=(4, 6), channels=5, batch_size=2)
    assert source.images[0].shape == source.labels[0].shape == (5, 4, 6)
    padded = source.images[0]
    np.testing.assert_array_equal(padded[[1, 2]][:, 1:3, 1:4], image)
    np.testing.assert_array_equal(padded[[0, 3, 4]][:, 1:3, 1:4], image[[0, 1, 1]])
    assert np.count_nonzero(padded) == 5 * 6  # the rest is air
    images, labels = source.batch(0)
    np.testing.assert_array_equal((images[0].numpy() * 255).round(), padded)
    np.testing.assert_array_equal(labels[0].numpy(), padded[2] % 2)


def test_memory_mapped_volumes_are_read_in_place(tmp_path):
    plain = source_of([(7, 12, 14)])
    np.save(tmp_path / "image.npy", plain.images[0])
    np.save(tmp_path / "label.npy", plain.labels[0])
    image, label = (np.load(tmp_path / f"{kind}.npy", mmap_mode="r") for kind in ("image", "label"))
    mapped = PatchSource([image], [label], patch_size=(4, 6), batch_size=5, patches_per_image=20, seed=3)
    assert mapped.images[0].data_ptr() == image.ctypes.data
    for a, b in zip(mapped.batch(4), plain.batch(4), strict=True):
        assert torch.equal(a, b)


# 3D blocks


@pytest.mark.parametrize("there", [False, True])
def test_blocks_are_cut_where_positions_say_with_the_labels_of_all_their_slices(there):
    source = source_of([(7, 12, 14), (9, 10, 11)], depth=4)
    cutting = source.to("cpu") if there else source
    for step in (0, 3, 9):
        images, labels = cutting.batch(step)
        assert images.shape == (5, 1, 4, 4, 6) and labels.shape == (5, 4, 4, 6)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        for row in range(5):
            epoch, number = divmod(5 * step + row, source.epoch_length)
            volume, z, y, x = source.positions(epoch)[number]
            cut = source.images[volume][z : z + 4, y : y + 4, x : x + 6]
            np.testing.assert_array_equal((images[row, 0].numpy() * 255).round(), cut)
            np.testing.assert_array_equal(labels[row].numpy(), cut % 2)


def test_every_place_of_a_block_is_equally_likely():
    """2 * 2 * 4 places: each has probability 1 / 16."""
    source = source_of([(5, 5, 9)], patches_per_image=16 * 500, depth=4)
    counts = Counter(map(tuple, source.positions(0)[:, 1:].tolist()))
    assert set(counts) == {(z, y, x) for z in range(2) for y in range(2) for x in range(4)}
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_a_volume_flatter_than_a_block_is_padded_with_its_end_slices():
    image = coded((3, 4, 6))
    images, labels = PatchSource([image], [image % 2], patch_size=(4, 6), depth=6, batch_size=1).batch(0)
    wanted = image[[0, 0, 1, 2, 2, 2]]
    np.testing.assert_array_equal((images[0, 0].numpy() * 255).round(), wanted)
    np.testing.assert_array_equal(labels[0].numpy(), wanted % 2)


# In a device's memory


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("shapes", [[(7, 12, 14)], [(7, 12, 14), (2, 3, 40), (9, 10, 11)]])
def test_volumes_in_a_devices_memory_give_batches_of_the_same_kind_there(shapes, channels):
    here = source_of(shapes, channels=channels, patches_per_image=7)
    there = here.to("meta")  # every machine has this one; it holds no values
    assert (there.device.type, here.device.type) == ("meta", "cpu")
    for step in (0, 1, 2, 9):  # over the end of epochs too
        for moved, own in zip(there.batch(step), here.batch(step), strict=True):
            assert moved.device.type == "meta" and moved.is_contiguous() and own.is_contiguous()
            assert (moved.shape, moved.dtype) == (own.shape, own.dtype)


def test_memory_mapped_volumes_are_cut_like_others(tmp_path):
    here = source_of([(7, 12, 14)])
    np.save(tmp_path / "image.npy", here.images[0])
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    label = here.labels[0].numpy()
    there = PatchSource([mapped], [label], patch_size=(4, 6), batch_size=5, patches_per_image=20, seed=3)
    assert there.nbytes == 2 * 7 * 12 * 14
    assert torch.equal(there.batch(2)[0], here.batch(2)[0])


@pytest.mark.slow
def test_cutting_there_never_waits_for_the_device():
    source = source_of([(7, 12, 14), (9, 10, 11)])
    with Watch() as watch:
        source.batch(0)
    assert watch.largest_new and watch.waits == []


@pytest.mark.parametrize(
    ("images", "labels", "options", "fault"),
    [
        ([], [], {}, "0 images and 0 labels"),
        ([(5, 9, 9)], [], {}, "1 images and 0 labels"),
        ([(5, 9, 9)], [(5, 9, 8)], {}, "volume 0: image uint8 .* must be 3D and of one shape"),
        ([(9, 9)], [(9, 9)], {}, "must be 3D and of one shape"),
        ([(5, 9, 9)], [(5, 9, 9)], {"channels": 2}, "channels must be odd"),
    ],
)
def test_what_cannot_be_is_refused(images, labels, options, fault):
    volumes = [[np.zeros(shape, np.uint8) for shape in shapes] for shapes in (images, labels)]
    with pytest.raises(ValueError, match=fault):
        PatchSource(*volumes, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.int16, np.int8, np.uint16])
def test_labels_that_would_be_wrapped_or_cut_off_are_refused(dtype):
    """Regression: 0.9 was trained on as 0, and 257 as 1."""
    image, label = np.zeros((5, 9, 9), np.uint8), np.ones((5, 9, 9))
    with pytest.raises(ValueError, match=rf"volume 1: .* label {np.dtype(dtype)} .* the label uint8 or bool"):
        PatchSource([image] * 2, [label.astype(np.uint8), label.astype(dtype)], patch_size=(4, 4))


def test_boolean_labels_are_labels():
    image, label = coded((5, 9, 9)), coded((5, 9, 9), 1) % 2
    plain, boolean = (
        PatchSource([image], [of], patch_size=(4, 4), batch_size=3) for of in (label, label.astype(bool))
    )
    labels = boolean.batch(0)[1]
    assert labels.dtype == torch.int64 and torch.equal(labels, plain.batch(0)[1])


def test_unprepared_volumes_are_refused():
    """Values 0 to 1 would all become 0 without a word."""
    with pytest.raises(ValueError, match=r"image float32 .* the image uint8 \(prepared"):
        PatchSource([np.ones((5, 9, 9), np.float32)], [np.ones((5, 9, 9), np.uint8)], patch_size=(4, 4))
