import os
import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest

from revnet_jax.data import DataError, load_dataset
from revnet_jax.data.safe_pickle import _Dtype, load_pickled_dict

CIFAR10_CLASSES = [f"class{i}" for i in range(10)]
CIFAR100_CLASSES = [f"fine{i}" for i in range(100)]


def random_batch(rng, num_images, num_classes):
    rows = rng.integers(0, 256, (num_images, 3072), dtype=np.uint8)
    return rows, rng.integers(0, num_classes, num_images)


@pytest.fixture(scope="module")
def cifar10_batches():
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {name: random_batch(rng, 6, 10) for name in names}


@pytest.fixture(scope="module")
def cifar100_batches():
    rng = np.random.default_rng(1)
    return {"train": random_batch(rng, 20, 100), "test": random_batch(rng, 4, 100)}


def binary_records(rows, labels, coarse):
    columns = [np.asarray(labels, np.uint8)[:, None], rows]
    if coarse:
        columns.insert(0, np.full((len(rows), 1), 19, np.uint8))
    return np.hstack(columns).tobytes()


def python2_pickle(batch):
    """The bytes that Python 2's cPickle writes at protocol 2, as in the published archives."""

    def encode(value):
        if isinstance(value, bytes):
            if len(value) < 256:
                return b"U" + bytes([len(value)]) + value
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(encode, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in value.items()) + b"u"
        assert value.dtype == np.uint8
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + encode(-1) * 2
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            + b"(K\x01"
            + b"".join(map(encode, value.shape))
            + b"\x86"
            + (dtype + b"K\x00tb")
            + b"\x89"
            + encode(value.tobytes())
            + b"tb"
        )

    return b"\x80\x02" + encode(batch) + b"."


def python3_pickle(batch):
    return pickle.dumps(batch, protocol=2)


def write_binary10(folder, batches):
    folder.mkdir(parents=True)
    for name, (rows, labels) in batches.items():
        (folder / f"{name}.bin").write_bytes(binary_records(rows, labels, coarse=False))
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")


def write_python(folder, batches, dumps, labels_key, names_key, names, names_file):
    folder.mkdir(parents=True)
    for name, (rows, labels) in batches.items():
        batch = {b"data": rows, labels_key: labels.tolist(), b"batch_label": name.encode()}
        (folder / name).write_bytes(dumps(batch))
    (folder / names_file).write_bytes(dumps({names_key: [name.encode() for name in names]}))


def write_python10(folder, batches, dumps=python3_pickle):
    keys = (b"labels", b"label_names")
    write_python(folder, batches, dumps, *keys, CIFAR10_CLASSES, "batches.meta")


def write_binary100(folder, batches):
    folder.mkdir(parents=True)
    for name, (rows, labels) in batches.items():
        (folder / f"{name}.bin").write_bytes(binary_records(rows, labels, coarse=True))
    (folder / "fine_label_names.txt").write_text("\n".join(CIFAR100_CLASSES))


def write_python100(folder, batches, dumps=python3_pickle):
    keys = (b"fine_labels", b"fine_label_names")
    write_python(folder, batches, dumps, *keys, CIFAR100_CLASSES, "meta")


def assert_holds(dataset, train, test):
    """Compares with rows of channel, row, column bytes, pixel by pixel."""
    for split, (rows, labels) in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(split.labels, labels)
        assert split.labels.dtype == np.int32
        image_NHWC = split.read(np.arange(len(split)))
        assert image_NHWC.dtype == np.uint8
        for channel in range(3):
            plane = rows[:, 1024 * channel : 1024 * (channel + 1)].reshape(-1, 32, 32)
            np.testing.assert_array_equal(image_NHWC[..., channel], plane)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("layout", ["binary", "python3", "python2"])
def test_cifar10_layouts(tmp_path, cifar10_batches, layout, inside):
    folder = tmp_path / ("cifar-10-batches-bin" if layout == "binary" else "cifar-10-batches-py")
    if layout == "binary":
        write_binary10(folder, cifar10_batches)
    else:
        dumps = python2_pickle if layout == "python2" else python3_pickle
        write_python10(folder, cifar10_batches, dumps)
    dataset = load_dataset("cifar10", dir=folder if inside else tmp_path, image_size=32)
    parts = list(cifar10_batches.values())
    train = tuple(np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    assert_holds(dataset, train, parts[-1])
    assert dataset.class_names == tuple(CIFAR10_CLASSES)


@pytest.mark.parametrize("layout", ["binary", "python3", "python2"])
def test_cifar100_layouts_use_fine_labels(tmp_path, cifar100_batches, layout):
    folder = tmp_path / "renamed"
    if layout == "binary":
        write_binary100(folder, cifar100_batches)
    else:
        dumps = python2_pickle if layout == "python2" else python3_pickle
        write_python100(folder, cifar100_batches, dumps)
    dataset = load_dataset("cifar100", dir=folder)
    assert_holds(dataset, cifar100_batches["train"], cifar100_batches["test"])
    assert dataset.num_classes == 100
    assert dataset.class_names == tuple(CIFAR100_CLASSES)


def assert_data_error(dir, *parts, name="cifar10"):
    with pytest.raises(DataError) as caught:
        load_dataset(name, dir=dir)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_missing_folder(tmp_path):
    layouts = ("cifar-10-batches-bin", "cifar-10-batches-py")
    assert_data_error(tmp_path / "absent", tmp_path / "absent", *layouts, "no such folder")
    assert_data_error(tmp_path, tmp_path, *layouts)
    assert_data_error(tmp_path, "cifar-100-binary", "cifar-100-python", name="cifar100")


@pytest.mark.parametrize("file", ["data_batch_3.bin", "test_batch.bin", "batches.meta.txt"])
def test_missing_file(tmp_path, cifar10_batches, file):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary10(folder, cifar10_batches)
    (folder / file).unlink()
    assert_data_error(tmp_path, folder / file, "missing")


@pytest.mark.parametrize("num_bytes_cut", [1, 3072, 6 * 3073])
def test_truncated_binary_file(tmp_path, cifar10_batches, num_bytes_cut):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary10(folder, cifar10_batches)
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-num_bytes_cut])
    assert_data_error(tmp_path, path, f"got {6 * 3073 - num_bytes_cut} bytes", 3073)


@pytest.mark.parametrize("file", ["data_batch_2.bin", "test_batch.bin"])
def test_file_truncated_between_records(tmp_path, cifar10_batches, file):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary10(folder, cifar10_batches)
    path = folder / file
    path.write_bytes(path.read_bytes()[:-3073])
    assert_data_error(tmp_path, file, "truncated", "got", "1 to 1")


def test_truncated_pickle(tmp_path, cifar10_batches):
    folder = tmp_path / "cifar-10-batches-py"
    write_python10(folder, cifar10_batches)
    path = folder / "data_batch_4"
    path.write_bytes(path.read_bytes()[:5000])
    assert_data_error(tmp_path, path, "5000 bytes")


def test_pickle_without_images_for_its_labels(tmp_path, cifar10_batches):
    folder = tmp_path / "cifar-10-batches-py"
    write_python10(folder, cifar10_batches)
    rows, labels = cifar10_batches["data_batch_4"]
    path = folder / "data_batch_4"
    path.write_bytes(python3_pickle({b"data": rows[:-1], b"labels": labels.tolist()}))
    assert_data_error(tmp_path, path, "(5, 3072)", "(6, 3072)")
    path.write_bytes(python3_pickle({b"data": rows}))
    assert_data_error(tmp_path, path, "'labels'")


def test_label_out_of_range_in_binary_file(tmp_path, cifar10_batches):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary10(folder, cifar10_batches)
    path = folder / "test_batch.bin"
    records = bytearray(path.read_bytes())
    records[4 * 3073] = 10
    path.write_bytes(records)
    assert_data_error(tmp_path, path, "label 10 at image 4", "0 to 9")


def test_label_out_of_range_in_pickle(tmp_path, cifar100_batches):
    rows, labels = cifar100_batches["test"]
    labels = labels.copy()
    labels[2] = -1
    folder = tmp_path / "cifar-100-python"
    write_python100(folder, cifar100_batches | {"test": (rows, labels)})
    assert_data_error(tmp_path, folder / "test", "label -1 at image 2", "0 to 99", name="cifar100")


def test_wrong_number_of_class_names(tmp_path, cifar10_batches):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary10(folder, cifar10_batches)
    (folder / "batches.meta.txt").write_text("cat\ndog\n")
    assert_data_error(tmp_path, folder / "batches.meta.txt", "got 2", "expected 10")


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_that_calls_a_function(tmp_path, cifar10_batches):
    folder = tmp_path / "cifar-10-batches-py"
    write_python10(folder, cifar10_batches)
    path = folder / "data_batch_1"
    path.write_bytes(python3_pickle({b"data": _Attack(tmp_path / "made")}))
    assert_data_error(tmp_path, path, f"{os.mkdir.__module__}.mkdir")
    assert not (tmp_path / "made").exists()


def nested(make_pair, levels):
    """A value that holds the one below it twice, and so on: a few bytes a level."""
    parts = [b"K\x01"]
    for level in range(levels):
        parts.append(bytes([ord("q"), level]) + bytes([ord("h"), level]) + make_pair)
    return b"".join(parts)


ANY = b"\x80\x02}(U\x04data"  # a dictionary with an entry to come
BOMBS = {
    # Hashed element by element, without end.
    "tuples as a key": (b"\x80\x02}" + nested(b"\x86", 60) + b"Ns.", "in two places"),
    # numpy would copy every path through them.
    "lists as labels": (
        b"\x80\x02}U\x06labels]K\x01a"
        + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60))
        + b"s.",
        "in two places",
    ),
    "a list in itself": (ANY + b"]q\x00h\x00au.", "in two places"),
    "deep": (b"\x80\x02}K\x01" + b"\x85" * 500_000 + b"Ns.", "more than 100"),
    "number of a value": (ANY + b"K\x01r\xff\xff\xff\x7fu.", "number 2,147,483,647"),
    "many values": (b"\x80\x02}U\x06labels](" + b"K\x01" * 2**20 + b"es.", "more than 1,048,576"),
    "many references": (
        b"\x80\x02}U\x04dataNsU\x06labels](T"
        + struct.pack("<i", 10**6)
        + b"x" * 10**6
        + b"q\x00"
        + b"h\x00" * 100_000
        + b"es.",
        "not a list of integers",
    ),
    "a set": (b"\x80\x04\x8f.", "the instruction EMPTY_SET"),
    "a string of 2**60 bytes": (b"\x80\x04\x8e" + struct.pack("<q", 2**60) + b"x.", "is damaged"),
    "an array of another type": (
        ANY + b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x01\x85cnumpy\ndtype\nU\x03V99\x85R"
        b"\x89U\x00tbu.",
        "an array of =V99",
    ),
    "an array too large": (
        ANY + b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\n"
        b"U\x02u8\x85R\x89U\x08aaaaaaaatbu.",
        "is damaged",
    ),
    # An instruction between a tuple and its number must not hide that it is one.
    "tuples with a state": (
        b"\x80\x02}" + nested(b"\x86Nb", 18) + b"Ns.",
        "BUILD of tuple, constant",
    ),
    "tuples after a protocol": (
        b"\x80\x02}" + nested(b"\x86\x80\x02", 18) + b"Ns.",
        "in two places",
    ),
    "tuples after a frame": (
        b"\x80\x04}" + nested(b"\x86\x95" + bytes(8), 18) + b"Ns.",
        "in two places",
    ),
    # All of them have the hash 0.
    "numbers as keys": (
        b"\x80\x02}("
        + b"".join(
            b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(999)
        )
        + b"u.",
        "SETITEMS of dictionary, number",
    ),
    "one text encoded often": (
        ANY
        + b"(X\x10\x27\0\0"
        + b"x" * 10_000
        + b"q\0"
        + b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R" * 200
        + b"tu.",
        "more bytes than the file has",
    ),
    "a key in another encoding": (b"\x80\x02}U\x01\xffNs.", "'utf-8' codec"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_of_more_than_a_data_set_is_refused_quickly(tmp_path, cifar10_batches, name):
    folder = tmp_path / "cifar-10-batches-py"
    write_python10(folder, cifar10_batches)
    path = folder / "data_batch_1"
    content, message = BOMBS[name]
    path.write_bytes(content)
    start = time.process_time()
    assert_data_error(tmp_path, path, message)
    assert time.process_time() - start < 20  # they would take hours, or all memory


def test_pickle_that_sets_an_attribute_of_a_function(tmp_path):
    path = tmp_path / "train"
    # BUILD with the state (None, {"__doc__": b"mine"}).
    path.write_bytes(b"\x80\x02}cnumpy\ndtype\nN}X\x07\0\0\0__doc__U\x04mines\x86b0.")
    before = _Dtype.__doc__
    with pytest.raises(DataError, match="BUILD of function, tuple"):
        load_pickled_dict(path)
    assert _Dtype.__doc__ == before


def test_names_of_dtypes_are_not_decoded_again_and_again(tmp_path):
    size, count = 10**5, 1000
    name = b"T" + struct.pack("<i", size) + b"x" * size + b"q\0"
    path = tmp_path / "train"
    path.write_bytes(b"\x80\x02}U\x01a(" + name + b"cnumpy\ndtype\nh\0\x85R" * count + b"tNs.")
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            load_pickled_dict(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * size
    finally:
        tracemalloc.stop()


def test_pickle_of_more_bytes_than_any_published_file(tmp_path, cifar10_batches):
    folder = tmp_path / "cifar-10-batches-py"
    write_python10(folder, cifar10_batches)
    with open(folder / "data_batch_1", "r+b") as file:
        file.truncate(2**40)  # which takes no room on the disk
    assert_data_error(tmp_path, folder / "data_batch_1", "1,099,511,627,776 bytes")


def test_pickle_as_large_as_the_published_ones(tmp_path):
    path = tmp_path / "train"
    labels = list(range(50_000))
    batch = {b"fine_labels": labels, b"coarse_labels": labels[::-1]}
    batch[b"filenames"] = [b"%i.png" % i for i in labels]
    path.write_bytes(python3_pickle(batch))
    assert load_pickled_dict(path)["filenames"] == batch[b"filenames"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_labels(tmp_path, protocol):
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps({"a": array, "b": array.astype("<u2").T}, protocol))
    found = load_pickled_dict(path)
    np.testing.assert_array_equal(found["a"], array)
    np.testing.assert_array_equal(found["b"], array.T)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (5, "not a list of strings"),
        ([b"a", 5], "not a list of strings"),
        ([[b"a"], [b"b"]], "not a list of strings"),
        ([b"\xff"] * 10, "not UTF-8"),
    ],
)
def test_class_names_of_another_kind(tmp_path, cifar10_batches, names, message):
    folder = tmp_path / "cifar-10-batches-py"
    write_python10(folder, cifar10_batches)
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=3))
    assert_data_error(tmp_path, folder / "batches.meta", message)


def test_class_names_that_are_no_text(tmp_path, cifar10_batches):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary10(folder, cifar10_batches)
    (folder / "batches.meta.txt").write_bytes(b"\xff\n" * 10)
    assert_data_error(tmp_path, folder / "batches.meta.txt", "not UTF-8")


def test_real_archive():
    dir = os.environ.get("REVNET_JAX_CIFAR10_DIR")
    if not dir:
        pytest.skip("REVNET_JAX_CIFAR10_DIR is not set")
    dataset = load_dataset("cifar10", dir=dir)
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    # Published means of the channels; a copy that went through JPEG keeps them closely.
    np.testing.assert_allclose(dataset.mean_HWC.mean((0, 1)), [125.3, 123.0, 113.9], atol=0.5)
