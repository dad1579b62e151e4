import contextlib
import functools
import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from revnet_jax.data import DataError, eval_batches, load_dataset, train_batches
from revnet_jax.data.image_file import (
    NUM_CROP_UNIFORMS,
    centre_crop_box,
    check_image_files,
    random_crop_box,
    read_image,
)

COLOURS = {"blue": (10, 20, 220), "green": (10, 200, 30), "red": (230, 20, 10)}


def encoded(image, format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width, height):
    """A smooth image: red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))


@pytest.fixture
def tree(tmp_path):
    for split, num_images in (("train", 3), ("val", 2)):
        for name, colour in COLOURS.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(num_images):
                image = Image.new("RGB", (40 + i, 30), colour)
                (folder / f"{i}.jpg").write_bytes(encoded(image))
    return tmp_path


def load(tree, **overrides):
    arguments = {"image_size": 16, "verify_images": True} | overrides
    return load_dataset("image_folder", dir=tree, **arguments)


def assert_data_error(tree, *parts, **overrides):
    with pytest.raises(DataError) as caught:
        load(tree, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_reads_a_tree(tree):
    (tree / "train" / "blue" / ".DS_Store").write_bytes(b"junk")
    (tree / "train" / ".DS_Store").write_bytes(b"junk")
    (tree / "train" / "blue" / "._0.jpg").write_bytes(b"junk")
    (tree / "train" / "blue" / "notes.txt").write_bytes(b"junk")
    dataset = load(tree)
    assert dataset.class_names == ("blue", "green", "red")
    assert dataset.image_shape == (16, 16, 3)
    assert dataset.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for split in (dataset.train, dataset.test):
        pixels = split.read(np.arange(len(split)))
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(split), 16, 16, 3)
        expected = np.asarray(list(COLOURS.values()))[split.labels][:, None, None]
        assert np.abs(pixels.astype(int) - expected).max() <= 4  # JPEG rounds


def test_another_normalisation(tree):
    dataset = load(tree).normalised_by((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    pixels_BHWC = np.arange(16 * 16 * 3, dtype=np.int64).reshape(1, 16, 16, 3).astype(np.uint8)
    expected = (pixels_BHWC / 255 - (0.5, 0.25, 0.0)) / (0.5, 0.25, 1.0)
    np.testing.assert_allclose(dataset.normalise(pixels_BHWC), expected, rtol=0, atol=1e-6)
    for mean, std in (((0.5,) * 3, ()), ((), (0.5,) * 3), ((0.5,), (0.5,))):
        with pytest.raises(ValueError, match="expected 3 numbers in each, one per channel, or no"):
            load(tree).normalised_by(mean, std)


def test_test_folder_and_missing_test_class(tree):
    (tree / "val").rename(tree / "test")
    for path in (tree / "test" / "green").iterdir():
        path.unlink()
    (tree / "test" / "green").rmdir()
    assert load(tree).test.labels.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.new("RGB", (20, 20), "white").convert(mode), "TIFF"))
    pixels = read_image(str(path), lambda width, height: (0, 0, width, height), 8)
    assert pixels.shape == (8, 8, 3)
    assert pixels.min() >= 254


@pytest.mark.parametrize("size", [(60, 40), (400, 300), (1200, 900)])  # the last two are drafted
def test_centre_crop_is_resize_then_crop(tmp_path, size):
    path = tmp_path / "image.jpg"
    image = gradient(*size)
    path.write_bytes(encoded(image, quality=95))
    pixels = read_image(str(path), lambda w, h: centre_crop_box(w, h, 56), 56)
    width, height = (round(64 * side / min(size)) for side in size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - 56) // 2, (height - 56) // 2
    expected = resized.crop((left, top, left + 56, top + 56))
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 6


@pytest.mark.parametrize("size", [(90, 60), (900, 600)])
def test_crop_box_is_what_is_read(tmp_path, size):
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(gradient(*size), quality=95))
    box = (size[0] // 3, size[1] // 2, size[0] * 2 // 3, size[1])
    pixels = read_image(str(path), lambda width, height: box, 16).astype(float)
    red, green = pixels[:, :, 0].mean(0), pixels[:, :, 1].mean(1)
    centres = (np.arange(16) + 0.5) / 16
    assert np.abs(red - 255 * (1 + centres) / 3).max() < 5
    assert np.abs(green - 255 * (1 + centres) / 2).max() < 5


def test_random_crop_boxes_keep_their_promises():
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for _ in range(2000):
        uniforms_U = rng.random(NUM_CROP_UNIFORMS, np.float32)
        left, top, right, bottom = random_crop_box(200, 160, uniforms_U, 0.1)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 160
        areas.append((right - left) * (bottom - top) / (200 * 160))
        aspects.append((right - left) / (bottom - top))
    assert 0.097 < min(areas) < 0.12
    assert max(areas) > 0.9
    assert 0.73 < min(aspects) < 0.77
    assert 1.3 < max(aspects) < 1.36


@pytest.mark.parametrize(("size", "expected"), [((40, 400), (40, 53)), ((400, 30), (40, 30))])
def test_crop_of_a_strip_is_its_centre(size, expected):
    left, top, right, bottom = random_crop_box(*size, np.full(NUM_CROP_UNIFORMS, 0.5), 0.9)
    assert (right - left, bottom - top) == expected
    assert abs((left + right) - size[0]) <= 1
    assert abs((top + bottom) - size[1]) <= 1


def test_training_batches_do_not_depend_on_process_count(tree):
    for path in (tree / "train").rglob("*.jpg"):
        path.write_bytes(encoded(gradient(50, 40)))
    dataset = load(tree)
    arguments = {
        "batch_size": 4,
        "seed": 0,
        "start_step": 1,
        "crop_padding": 0,
        "flip": True,
        "affine": 0.1,
        "min_crop_area": 0.2,
        "num_threads": 2,
        "prefetch": 2,
    }
    with contextlib.closing(train_batches(dataset, **arguments)) as whole:
        batch = next(whole)
    halves = []
    for index in range(2):
        rows = np.arange(2) + 2 * index
        with contextlib.closing(train_batches(dataset, **arguments, rows=rows)) as half:
            halves.append(next(half))
    for key, value in batch.items():
        np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), value)
    # All files hold one image, so that only the crops differ.
    assert len({image.tobytes() for image in batch["image"]}) == 4


def test_imagenet_normalisation(tree):
    dataset = load(tree)
    with contextlib.closing(eval_batches(dataset, batch_size=6)) as batches:
        image = next(batches)["image"]
    pixels = dataset.test.read(np.arange(6)) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_missing_folders(tree):
    assert_data_error(tree / "absent", tree / "absent", "train/<class>/")
    assert_data_error(tree / "train", tree / "train" / "train", "got blue, green, red")
    (tree / "val").rename(tree / "validation")
    assert_data_error(tree, tree / "test", tree / "val", "train, validation")


def test_both_test_and_val(tree):
    (tree / "test").mkdir()
    assert_data_error(tree, tree / "test", tree / "val", "one of them")


def test_class_unknown_to_training(tree):
    (tree / "val" / "violet").mkdir()
    assert_data_error(tree, tree / "val" / "violet", "blue, green, red")


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder(tree, split):
    for path in (tree / split / "green").iterdir():
        path.unlink()
    (tree / split / "green" / "readme.txt").write_text("soon")
    assert_data_error(tree, tree / split / "green", "no images", ".jpg")


def test_no_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert_data_error(tmp_path, tmp_path / "train", "no class folders")


def place(tree, where):
    """An image of its own at the path given below the tree."""
    path = tree / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.new("RGB", (20, 20))))
    return path


def link(tree, where, target):
    path = tree / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target if os.path.isabs(target) else tree / target)
    return path


def test_hidden_folders_are_passed_over(tree):
    place(tree, "train/blue/.ipynb_checkpoints/0-checkpoint.jpg")
    place(tree, "train/.trash/old.jpg")
    place(tree, "train/blue/more/deep/3.jpg")
    names = [os.path.relpath(path, tree / "train/blue") for path in load(tree).train.paths[:4]]
    assert names == ["0.jpg", "1.jpg", "2.jpg", "more/deep/3.jpg"]


@pytest.mark.parametrize(
    ("where", "target", "why"),
    [
        ("train/blue/loop", "train/blue", "which holds the link"),
        ("train/blue/more/loop", "train/blue/more", "which holds the link"),
        ("train/blue/up", "train", "which holds the link"),
        ("train/blue/root", "/", "which holds the link"),
        ("train/blue/other", "train/green", "not searched for"),
        ("val/blue/other", "train/blue", "not searched for"),
        ("train/blue/out", "kept", "not searched for"),
        ("train/blue/hidden", "train/blue/.cache", "not searched for"),
        ("train/violet", "train/blue", "holds other classes or belongs to one"),
        ("train/violet", "train", "holds other classes or belongs to one"),
        ("train/violet", ".", "holds other classes or belongs to one"),
        ("val/red", "train/red", "holds other classes or belongs to one"),
        ("train/blue/9.jpg", "train/red/0.jpg", "is an image of"),
        ("train/red/9.jpg", "train/blue/0.jpg", "is an image of"),
        ("val/blue/9.jpg", "train/blue/0.jpg", "is an image of"),
        ("val", "train", "holds it, or is in it"),
        ("val", "train/blue", "holds it, or is in it"),
        ("val", ".", "holds it, or is in it"),
        ("train/blue/gone", "nowhere", "does not exist"),
        ("train/blue/gone.jpg", "nowhere.jpg", "does not exist"),
        ("train/gone", "nowhere", "does not exist"),
        ("train/blue/self.jpg", "train/blue/self.jpg", "leads back to the link"),
    ],
)
def test_links_that_lead_astray_are_named(tree, where, target, why):
    place(tree, "train/blue/more/1.jpg")
    place(tree, "train/blue/.cache/1.jpg")
    place(tree, "kept/1.jpg")
    if (tree / where).exists():
        shutil.rmtree(tree / where)
    assert_data_error(tree, link(tree, where, target), why)


@pytest.mark.parametrize(
    ("first", "second"),
    [("train/violet", "train/white"), ("train/blue/7.jpg", "val/blue/8.jpg")],
)
def test_two_links_to_one_place(tree, first, second):
    target = "kept/1.jpg" if first.endswith("jpg") else "kept"
    place(tree, "kept/1.jpg")
    link(tree, first, target)
    assert_data_error(tree, link(tree, second, target), "kept")


def test_links_to_where_things_are_kept(tree):
    """Splits, classes and images may be links; a link that stays in its class adds nothing."""
    (tree / "train").rename(tree / "images")
    link(tree, "train", "images")
    place(tree, "kept/violet/1.jpg")
    link(tree, "train/violet", "kept/violet")
    place(tree, "kept/2.jpg")
    link(tree, "train/violet/2.jpg", "kept/2.jpg")
    link(tree, "train/violet/again", "train/violet/more")
    place(tree, "train/violet/more/3.jpg")
    dataset = load(tree)
    assert dataset.class_names == ("blue", "green", "red", "violet")
    names = [os.path.relpath(path, tree / "train/violet") for path in dataset.train.paths[9:]]
    assert names == ["1.jpg", "2.jpg", "more/3.jpg"]


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_no_file(tree, verify):
    os.mkfifo(tree / "train/blue/pipe.png")
    assert_data_error(tree, tree / "train/blue/pipe.png", "got a pipe", verify_images=verify)
    (tree / "train/blue/pipe.png").unlink()
    device = link(tree, "train/blue/zero.png", "/dev/zero")
    assert_data_error(tree, device, "got a pipe", verify_images=verify)


def test_folder_that_cannot_be_read(tree, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("green"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_data_error(tree, tree / "train/green", "Permission denied")


@pytest.mark.parametrize("name", ["new\nline.jpg", os.fsdecode(b"\xff.jpg"), "löwe 🦁.jpg"])
def test_odd_names(tree, name):
    path = place(tree, f"train/blue/{name}")
    assert len(load(tree).train) == 10
    path.write_bytes(b"")
    assert_data_error(tree, name.split("\n")[-1], "0 bytes")


def test_the_list_of_files_has_a_fingerprint(tree, tmp_path_factory):
    first = load(tree).sha256
    moved = tmp_path_factory.mktemp("moved") / "tree"
    shutil.copytree(tree, moved)
    (moved / "val").rename(moved / "test")
    assert load(moved).sha256 == first
    (moved / "train/blue/0.jpg").rename(moved / "train/blue/00.jpg")
    renamed = load(moved).sha256
    (moved / "train/blue/00.jpg").rename(moved / "test/blue/0.jpg.jpg")
    assert len({first, renamed, load(moved).sha256}) == 3


@functools.cache
def damaged_files():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole, end = encoded(noise), b"\xff\xd9"
    thirds = encoded(noise, progressive=True)
    parts = encoded(noise, restart_marker_rows=1)
    files = {
        "half.jpg": whole[:2000],
        "half.png": encoded(noise, "PNG")[:5000],
        "half.bmp": encoded(noise, "BMP")[:5000],
        "ended.png": encoded(noise, "PNG")[:5000] + b"\0\0\0\0IEND\xae\x42\x60\x82",
        "text.jpg": b"<html>not found</html>",
        "empty.png": b"",
        "deep.png": encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        # With an end marker, libjpeg takes grey for what is missing, without an error.
        "ended.jpg": whole[:2000] + end,
        "nearly.jpg": whole[: int(0.93 * len(whole))] + end,
        "after_ff.jpg": whole[:2000] + b"\xff" + end,
        "zeros.jpg": whole[:2000] + bytes(len(whole)),
        "grey.jpg": encoded(noise.convert("L"))[:1500] + end,
        "cmyk.jpg": encoded(noise.convert("CMYK"))[:3000] + end,
        "parts.jpg": parts[: parts.index(b"\xff\xd1")] + end,
        "progressive.jpg": thirds[: len(thirds) // 3] + end,
        "scans.jpg": thirds[: thirds.rindex(b"\xff\xda")] + end,
    }
    for name in ("ended.jpg", "nearly.jpg", "zeros.jpg", "scans.jpg", "parts.jpg"):
        Image.open(io.BytesIO(files[name])).load()  # Pillow alone has nothing to say
    return files


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_file_is_named_at_load(tree, name):
    path = tree / "val" / "green" / name
    path.write_bytes(damaged_files()[name])
    assert_data_error(tree, path, f"{path.stat().st_size} bytes")


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_file_is_named_when_read(tree, name):
    path = tree / "val" / "green" / name
    path.write_bytes(damaged_files()[name])
    dataset = load(tree, verify_images=False)
    with (
        contextlib.closing(eval_batches(dataset, batch_size=7)) as batches,
        pytest.raises(DataError, match=f"green/{name}"),
    ):
        next(batches)


def test_bytes_after_the_end_are_accepted(tree):
    path = tree / "train" / "blue" / "0.jpg"
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert len(load(tree).train) == 9


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("size", [16, 64])  # decoded at 1/8, and as it is
def test_grey_images_are_complete(tmp_path, options, size):
    image = gradient(160, 120)
    image.paste((128, 128, 128), (40, 60, 160, 120))
    path = tmp_path / "grey.jpg"
    path.write_bytes(encoded(image, **options))
    assert Image.open(path).getpixel((159, 119)) == (128, 128, 128)
    check_image_files([str(path)])
    box = (0, 0, 160, 120) if size == 16 else (0, 0, size, size)
    assert read_image(str(path), lambda width, height: box, size).shape == (size, size, 3)


def test_where_a_cut_jpeg_is_found(tmp_path):
    """Wherever the data are cut, up to the last block of pixels."""
    whole = encoded(gradient(80, 64).effect_spread(9), quality=90, subsampling=0)
    start = whole.index(b"\xff\xda") + 14
    path = tmp_path / "cut.jpg"
    missed = []
    for cut in [*range(start, len(whole) - 40, 37), *range(len(whole) - 40, len(whole) - 2)]:
        path.write_bytes(whole[:cut] + b"\xff\xd9")
        with contextlib.suppress(DataError):
            check_image_files([str(path)])
            missed.append(len(whole) - cut)
    assert max(missed) < 2 * (len(whole) - start) / (10 * 8)  # of its 80 blocks
