import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from absl import flags

from revnet_jax.data import eval_batches, train_batches
from revnet_jax.data.affine import random_affine
from revnet_jax.data.dataset import ArraySplit, in_memory_dataset
from revnet_jax.data.pipeline import pad_crop_flip

NUM_TRAIN, NUM_TEST = 50, 22


@pytest.fixture(scope="module")
def numbered():
    """Small random images whose label is their index, so that batches show what they hold."""
    rng = np.random.default_rng(0)
    return in_memory_dataset(
        "numbered",
        train_images_NHWC=rng.integers(0, 256, (NUM_TRAIN, 6, 7, 3), dtype=np.uint8),
        train_labels=np.arange(NUM_TRAIN),
        test_images_NHWC=rng.integers(0, 256, (NUM_TEST, 6, 7, 3), dtype=np.uint8),
        test_labels=np.arange(NUM_TEST),
        class_names=[str(i) for i in range(NUM_TRAIN)],
    )


def take(dataset, num_batches, **overrides):
    arguments = {
        "batch_size": 12,
        "seed": 3,
        "start_step": 0,
        "crop_padding": 2,
        "flip": True,
        "affine": 0.0,
        "min_crop_area": 1.0,
        "num_threads": 2,
        "prefetch": 4,
    }
    with contextlib.closing(train_batches(dataset, **arguments | overrides)) as batches:
        return list(itertools.islice(batches, num_batches))


def assert_equal_batches(got, expected):
    assert len(got) == len(expected)
    for got_batch, expected_batch in zip(got, expected, strict=True):
        assert got_batch.keys() == expected_batch.keys()
        for key, value in expected_batch.items():
            np.testing.assert_array_equal(got_batch[key], value, strict=True)


def shares(batch_size, processes):
    """Rows for each process: not neighbours."""
    return [np.arange(process, batch_size, processes) for process in range(processes)]


def join(parts, rows):
    """The global batches of processes that each produced some rows."""
    order = np.argsort(np.concatenate(rows))
    return [
        {key: np.concatenate([part[key] for part in step])[order] for key in step[0]}
        for step in zip(*parts, strict=True)
    ]


def plain(dataset, labels):
    return dataset.normalise(dataset.train.read(labels))


def test_shapes_and_types(numbered):
    (batch,) = take(numbered, 1, rows=np.asarray([1, 4, 5, 11]))
    assert batch["image"].shape == (4, 6, 7, 3)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (4,)
    assert batch["label"].dtype == np.int32


def test_without_augmentation_images_are_those_of_their_labels(numbered):
    for batch in take(numbered, 5, crop_padding=0, flip=False):
        np.testing.assert_array_equal(batch["image"], plain(numbered, batch["label"]))


@pytest.mark.parametrize("batch_size", [10, 12])
def test_every_example_once_per_epoch(numbered, batch_size):
    batches = take(numbered, 4 * NUM_TRAIN // batch_size + 1, batch_size=batch_size)
    labels = np.concatenate([batch["label"] for batch in batches])
    epochs = labels[: 4 * NUM_TRAIN].reshape(4, NUM_TRAIN)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(NUM_TRAIN))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(np.arange(NUM_TRAIN)) not in {tuple(epoch) for epoch in epochs}


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_who_reads_which_rows(numbered, processes):
    rows = shares(12, processes)
    parts = [take(numbered, 10, rows=each) for each in rows]
    assert_equal_batches(join(parts, rows), take(numbered, 10))


@pytest.mark.parametrize("step", [2, 7])  # in the first epoch, in the second
def test_resume_inside_an_epoch(numbered, step):
    uninterrupted = take(numbered, 12)
    assert_equal_batches(take(numbered, 12 - step, start_step=step), uninterrupted[step:])


def test_resume_with_another_process_count(numbered):
    rows = shares(12, 2)
    parts = [take(numbered, 3, start_step=5, rows=each) for each in rows]
    assert_equal_batches(join(parts, rows), take(numbered, 8)[5:])


def test_threads_do_not_change_the_batches(numbered):
    assert_equal_batches(take(numbered, 12, num_threads=0, prefetch=0), take(numbered, 12))


def test_seed_changes_order_and_augmentation(numbered):
    (a,), (b,) = take(numbered, 1), take(numbered, 1, seed=4)
    assert not np.array_equal(a["label"], b["label"])


def test_augmentation_changes_every_epoch(numbered):
    """The same image comes back cropped and mirrored differently."""
    seen = {}
    for batch in take(numbered, 40):
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            seen.setdefault(label, set()).add(image.tobytes())
    assert np.mean([len(variants) for variants in seen.values()]) > 7  # of about 9.6 drawn


def test_every_crop_and_flip_occurs_and_no_other(numbered):
    """Batches hold exactly the naive crops of the padded image and their mirror images."""
    padding = 1
    counts = np.zeros((2, 3, 3), int)
    for batch in take(numbered, 60, crop_padding=padding):
        whole = plain(numbered, batch["label"])
        for image, source in zip(batch["image"], whole, strict=True):
            padded = np.zeros((8, 9, 3), np.float32)
            padded[1:-1, 1:-1] = source
            matches = [
                (mirrored, top, left)
                for mirrored, top, left in itertools.product(range(2), range(3), range(3))
                if np.array_equal(
                    image[:, ::-1] if mirrored else image, padded[top : top + 6, left : left + 7]
                )
            ]
            assert len(matches) == 1
            counts[matches[0]] += 1
    assert counts.sum() == 720  # 18 variants, 40 expected of each
    assert counts.min() >= 18
    assert counts.max() <= 65


def test_pad_crop_flip_against_one_image_at_a_time():
    rng = np.random.default_rng(0)
    image_BHWC = rng.standard_normal((40, 5, 6, 2), np.float32)
    offsets_B2 = rng.integers(0, 7, (40, 2))
    flips_B = rng.random(40) < 0.5
    result = pad_crop_flip(image_BHWC, offsets_B2, flips_B, crop_padding=3)
    assert result.flags.c_contiguous
    for image, got, (top, left), mirrored in zip(
        image_BHWC, result, offsets_B2, flips_B, strict=True
    ):
        for y, x, channel in np.ndindex(5, 6, 2):
            source_x = left - 3 + (5 - x if mirrored else x)
            source_y = top - 3 + y
            inside = 0 <= source_y < 5 and 0 <= source_x < 6
            assert got[y, x, channel] == (image[source_y, source_x, channel] if inside else 0)


def test_affine_maps_against_one_pixel_at_a_time():
    """In float64; every pixel of an image counts by its distance from the place that is read."""
    rng = np.random.default_rng(0)
    image_BHWC = rng.standard_normal((6, 4, 5, 2), np.float32)
    uniforms_B6 = rng.random((6, 6), np.float32)
    result = random_affine(image_BHWC, uniforms_B6, strength=0.8)
    assert result.dtype == np.float32
    for image, got, uniforms in zip(image_BHWC, result, uniforms_B6.astype(float), strict=True):
        (ay, by, cy), (ax, bx, cx) = 0.8 * (2 * uniforms.reshape(2, 3) - 1)
        for row, column in np.ndindex(4, 5):
            y, x = row - 1.5, column - 2
            source_y, source_x = y + ay * y + by * x + cy * 2, x + ax * y + bx * x + cx * 2.5
            near = lambda source, size: np.maximum(0, 1 - abs(source - np.arange(size)))
            expected = near(source_y + 1.5, 4) @ np.tensordot(near(source_x + 2, 5), image, (0, 1))
            np.testing.assert_allclose(got[row, column], expected, rtol=1e-5, atol=1e-5)
    same = random_affine(image_BHWC, np.full((6, 6), 0.5, np.float32), strength=0.8)
    np.testing.assert_array_equal(same, image_BHWC)


def test_affine_maps_are_drawn_for_the_whole_batch(numbered):
    """Whichever rows a process makes, and no other random number changes."""
    whole = take(numbered, 2, affine=0.2)
    rows = shares(12, 3)
    parts = [take(numbered, 2, affine=0.2, rows=each) for each in rows]
    assert_equal_batches(join(parts, rows), whole)
    without = take(numbered, 2)
    assert not np.array_equal(whole[1]["image"], without[1]["image"])
    np.testing.assert_array_equal(whole[1]["label"], without[1]["label"])


@pytest.mark.parametrize(("batch_size", "processes"), [(8, 1), (8, 2), (8, 4), (22, 1), (44, 2)])
def test_eval_covers_every_example_once(numbered, batch_size, processes):
    rows, parts = shares(batch_size, processes), []
    for each in rows:
        with contextlib.closing(eval_batches(numbered, batch_size=batch_size, rows=each)) as it:
            parts.append(list(it))
    assert {len(part) for part in parts} == {-(-NUM_TEST // batch_size)}
    joined = join(parts, rows)
    for batch in itertools.chain(*parts):
        assert batch["image"].shape == (batch_size // processes, 6, 7, 3)
        assert batch["image"].dtype == batch["weight"].dtype == np.float32
        assert batch["label"].dtype == np.int32
    image, label, weight = (
        np.concatenate([batch[key] for batch in joined]) for key in ("image", "label", "weight")
    )
    np.testing.assert_array_equal(weight, np.arange(len(weight)) < NUM_TEST)
    np.testing.assert_array_equal(label[:NUM_TEST], np.arange(NUM_TEST))
    expected = numbered.normalise(numbered.test.read(np.arange(NUM_TEST)))
    np.testing.assert_array_equal(image[:NUM_TEST], expected)
    assert not image[NUM_TEST:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 51}, "batch_size=51.*at most the 50 training images"),
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"batch_size": 4, "rows": [3, 4]}, r"rows=\[3, 4\], expected ascending ones of the 4"),
        ({"rows": [1, 0]}, r"rows=\[1, 0\]"),
        ({"rows": []}, r"rows=\[\]"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"start_step": -1}, "start_step=-1"),
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"affine": 1.0}, r"affine=1.0, expected a strength in \[0, 1\)"),
        ({"min_crop_area": 0.0}, "min_crop_area=0.0"),
        ({"min_crop_area": 0.5}, "min_crop_area=0.5 for numbered, expected 1.0"),
        ({"crop_padding": 10**6}, "crop_padding=1000000, expected 0 to"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"num_threads": 5}, "num_threads=5 and prefetch=4, expected prefetch of 5 at least"),
        ({"prefetch": -1}, "prefetch=-1"),
    ],
)
def test_bad_train_arguments(numbered, arguments, message):
    with pytest.raises(ValueError, match=message):
        take(numbered, 1, **arguments)


def test_no_test_images(numbered):
    nothing = ArraySplit(numbered.test.images_NHWC[:0], numbered.test.labels[:0])
    with pytest.raises(ValueError, match="got a data set of 0 test images, expected one at least"):
        eval_batches(dataclasses.replace(numbered, test=nothing), batch_size=10)


def test_bad_eval_arguments(numbered):
    with pytest.raises(ValueError, match=r"rows=\[-1\], expected ascending ones of the 10"):
        eval_batches(numbered, batch_size=10, rows=[-1])


def test_works_before_absl_flags_are_parsed(numbered):
    was_parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.unparse_flags()
    try:
        assert len(take(numbered, 3)) == 3
    finally:
        if was_parsed:
            flags.FLAGS.mark_as_parsed()
