"""Text as tokens: of files, of shards, and back."""

import contextlib
import dataclasses
import itertools
import json
import os
import resource

import jax
import numpy as np
import pytest

from revnet_jax.config import ConfigError, language_model
from revnet_jax.data import shards
from revnet_jax.data.dataset import DataError
from revnet_jax.data.shards import Shards, load_shards, tokenize_files
from revnet_jax.data.text import Text, eval_windows, load_text, train_windows
from revnet_jax.data.vocabulary import Vocabulary, codec, load_tokenizer, vocabulary_from
from revnet_jax.errors import StorageError
from revnet_jax.families import build_task
from revnet_jax.training.inputs import build_data
from revnet_jax.training.sharding import make_mesh

TEXT = "Ein Löwe, ein Bär.\n" * 20
READ = {"num_threads": 0, "prefetch": 0}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def text_of(train, test=(), size=256):
    tokens = [np.asarray(list(part), np.uint16) for part in (train, test)]
    return Text(*tokens, Vocabulary("bytes", size), 1.0, "")


def test_the_text_that_comes_with_python():
    text = load_text("bytes")
    assert len(text.train) + len(text.test) > 300_000
    assert bytes(text.train[:200].astype(np.uint8)).isascii()
    assert text.vocabulary.size == 256
    assert "é" not in text.vocabulary.characters
    assert len(text.sha256) == 64


def test_characters(path):
    text = load_text("characters", path=str(path), train_share=0.75)
    known = "".join(sorted(set(TEXT)))
    assert text.vocabulary == Vocabulary("characters", len(known), known)
    split = int(0.75 * len(TEXT))
    assert "".join(known[i] for i in text.train) == TEXT[:split]
    assert "".join(known[i] for i in text.test) == TEXT[split:]
    assert text.bytes_per_token == pytest.approx(len(TEXT[split:].encode()) / len(TEXT[split:]))


def test_training_windows_depend_on_seed_and_step_alone():
    text = text_of(np.arange(50))
    options = {"context": 6, "batch_size": 4, "seed": 3, **READ}

    def batches(**changes):
        with contextlib.closing(train_windows(text, **options | changes)) as windows:
            return list(itertools.islice(windows, 5))

    whole = batches(start_step=0)
    for batch in whole:
        assert batch["token"].shape == batch["target"].shape == (4, 6)
        np.testing.assert_array_equal(batch["token"][:, 1:], batch["target"][:, :-1])
        np.testing.assert_array_equal(np.diff(batch["target"]), 1)  # consecutive, in this text
    np.testing.assert_array_equal(batches(start_step=3)[0]["token"], whole[3]["token"])
    some = batches(start_step=0, rows=np.asarray([0, 3]))[2]["token"]
    np.testing.assert_array_equal(some, whole[2]["token"][[0, 3]])
    assert not np.array_equal(batches(start_step=0, seed=4)[0]["token"], whole[0]["token"])
    starts = {int(row[0]) for batch in whole for row in batch["token"]}
    assert len(starts) > 10


def test_every_token_but_the_first_is_a_target_once():
    test = np.arange(40) % 7
    with contextlib.closing(
        eval_windows(text_of([], test), context=6, batch_size=4, **READ)
    ) as windows:
        batches = list(windows)
    weight = np.concatenate([batch["weight"] for batch in batches])
    target, token = (np.concatenate([b[name] for b in batches]) for name in ("target", "token"))
    np.testing.assert_array_equal(target[weight == 1], test[1:])
    np.testing.assert_array_equal(token[weight == 1], test[:-1])
    assert target.shape == (8, 6)  # two full batches
    for batch_size in (2, 4, 5):  # the same windows, however many are read at a time
        options = {"context": 6, "batch_size": batch_size, "max_windows": 4, **READ}
        with contextlib.closing(eval_windows(text_of([], test), **options)) as windows:
            batches = list(windows)
        found = np.concatenate([batch["target"] for batch in batches])
        weight = np.concatenate([batch["weight"] for batch in batches])
        assert found.shape == (max(4, batch_size), 6)
        np.testing.assert_array_equal(found[:4], target[:4])
        np.testing.assert_array_equal(weight, np.arange(len(found))[:, None] < 4 + np.zeros(6))


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_shards_hold_the_text(path, tokenizer_file, tmp_path):
    out = tmp_path / "shards"
    written = tokenize_files([path, path], tokenizer_file, out, test_share=0.25, shard_tokens=50)
    assert len(written["splits"]["train"]) > 2
    train, test, vocabulary, per_token, *_ = load_shards(out)
    assert sum(written["splits"]["train"].values()) == len(train)
    everything = np.concatenate([split[np.arange(len(split))] for split in (train, test)])
    decode = codec(vocabulary, tokenizer_file).decoder([])
    assert "".join(decode(int(i)) for i in everything) == 2 * TEXT
    test_tokens = test[np.arange(len(test))]
    decode = codec(vocabulary, tokenizer_file).decoder([])
    num_bytes = len("".join(decode(int(i)) for i in test_tokens).encode())
    assert per_token == pytest.approx(num_bytes / len(test))
    assert load_text("shards", path=str(out)).vocabulary.tokenizer_sha256

    options = {"test_share": 0.25, "end_token": "a"}
    ended = tokenize_files([path, path], tokenizer_file, tmp_path / "ended", **options)
    count = lambda written: sum(sum(files.values()) for files in written["splits"].values())
    assert count(ended) == count(written) + 2
    end = load_shards(tmp_path / "ended")[2].end_token
    train, test, *_ = load_shards(tmp_path / "ended")
    assert written["end_token"] is vocabulary.end_token is None
    assert ended["end_token"] == end == test[np.asarray([len(test) - 1])][0]
    # The end of a document is no text for the test split.
    with pytest.raises(DataError, match=r"text\.txt, \.\.\.: got 840 bytes of text, "):
        tokenize_files([path, path], tokenizer_file, tmp_path / "short", end_token="a")
    with pytest.raises(ValueError, match="got end_token='<end>', expected a token of"):
        tokenize_files([path], tokenizer_file, tmp_path / "none", end_token="<end>")
    with pytest.raises(DataError, match="holds tokens already: choose another folder"):
        tokenize_files([path], tokenizer_file, out)
    first = out / next(iter(written["splits"]["train"]))
    first.write_bytes(first.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train_00000.bin: got \d+ bytes, expected \d+"):
        load_shards(out)


def test_sizes_of_pieces_are_bytes(tokenizer_file, tmp_path, monkeypatch):
    """A character may have several; one that is cut is whole in the next piece."""
    path = tmp_path / "text"
    text = "ß€😀" * 100 + "\r\n" + "€\n" * 10
    path.write_bytes(text.encode())
    for size in (1, 2, 7, 50):
        monkeypatch.setattr(shards, "_PIECE_BYTES", size)
        *pieces, end = shards._pieces([path], 0)
        assert "".join(pieces) == text
        assert end is None
        size = min(size, 1 + len(text.encode()) // 100)
        # A piece is up to `size` bytes, as many again up to a line end, and a character before.
        assert max(len(piece.encode()) for piece in pieces) <= 2 * size + 3
    path.write_bytes(text.encode() + "€".encode()[:2])
    with pytest.raises(DataError, match="got bytes that are not UTF-8"):
        list(shards._pieces([path], 0))


def test_shards_that_find_no_room_are_written_again(path, tokenizer_file, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(StorageError, match=r"cannot write .*train_00000.bin: File too large"):
            tokenize_files([path], tokenizer_file, tmp_path / "out", test_share=0.25)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    written = tokenize_files([path], tokenizer_file, tmp_path / "out", test_share=0.25)
    undisturbed = tokenize_files([path], tokenizer_file, tmp_path / "other", test_share=0.25)
    assert written == undisturbed
    for name in ("train_00000.bin", "test_00000.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_separate_documents_need_to_know_the_end_token(path, tokenizer_file, tmp_path):
    """As tokens.json says; those that were written before it did still load."""
    out = tmp_path / "shards"
    end = tokenize_files([path], tokenizer_file, out, test_share=0.25, end_token="a")["end_token"]
    config = language_model()
    config.data.update({"name": "shards", "dir": str(out), "vocab_size": 269})
    load = lambda: build_data(config, make_mesh(jax.devices())).record["vocabulary"]
    load()
    config.model.separate_documents = True
    with pytest.raises(ConfigError, match=r"config.data.end_token: got -1 and model.separate_docu"):
        build_task(config)
    config.data.end_token = end + 1
    with pytest.raises(ConfigError, match=f"end_token: got {end + 1}, expected {end}, as in the"):
        load()
    config.data.end_token = end
    vocabulary = vocabulary_from(load())
    assert build_task(config).network.shape.end_token == end
    written = json.loads((out / "tokens.json").read_text())
    del written["end_token"]
    (out / "tokens.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match=r"tokens.json names no end_token, expected False, or"):
        load()
    config.model.separate_documents = False
    vocabulary_from(load()).check_same_ids(vocabulary, "a run")  # ids mean what they did
    assert build_task(config).network.shape.end_token is None


def test_what_a_tokenizer_file_may_hold(tokenizer_file, tmp_path):
    """Truncation, as published files have it; text without ends of lines; spaces that lead."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(16)
    tokenizer.save(str(tokenizer_file))
    (tmp_path / "line").write_text("ein Bär, " * 300, encoding="utf-8")
    out = tmp_path / "shards"
    tokenize_files([tmp_path / "line"], tokenizer_file, out, test_share=0.2)
    train, test, vocabulary, *_ = load_shards(out)
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    decode = codec(vocabulary, tokenizer_file).decoder([])
    pieces = [decode(int(i)) for split in (train, test) for i in split[np.arange(len(split))]]
    assert "".join(pieces) == "ein Bär, " * 300
    # A share that is smaller than a piece of it.
    tokenize_files([tmp_path / "line"], tokenizer_file, tmp_path / "few", test_share=0.004)
    train, test, *_ = load_shards(tmp_path / "few")
    pieces = [decode(int(i)) for split in (train, test) for i in split[np.arange(len(split))]]
    assert "".join(pieces) == "ein Bär, " * 300
    assert 5 < len("".join(pieces[-len(test) :]).encode()) < 15  # of 3,000 bytes

    tokenizer.no_truncation()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.model = tokenizers.models.WordLevel({"▁ein": 0, "▁Wort": 1, "?": 2}, unk_token="?")
    tokenizer.save(str(tmp_path / "words.json"))
    _, sha256 = load_tokenizer(tmp_path / "words.json")
    words = codec(Vocabulary("tokenizer", 3, tokenizer_sha256=sha256), tmp_path / "words.json")
    decode = words.decoder(words.encode("ein"))
    assert [decode(1), decode(0)] == [" Wort", " ein"]


def test_places_in_several_files():
    parts = [np.arange(3, dtype=np.uint16), np.arange(3, 4), np.arange(4, 9)]
    places = np.asarray([[8, 2, 3], [4, 0, 3]])
    np.testing.assert_array_equal(Shards(parts)[places], places)
    assert len(Shards(parts)) == 9


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_prompt_there_and_back(path, kind):
    coder = codec(load_text(kind, path=str(path)).vocabulary)
    decode = coder.decoder([])
    assert "".join(map(decode, coder.encode("Löwe"))) == "Löwe"
    seen = "byte 122" if kind == "bytes" else "'z'"
    with pytest.raises(DataError, match=f"got {seen} in the prompt 'zebra', which the training"):
        coder.encode("zebra")


def test_mistakes(path, tokenizer_file, tmp_path):
    train = {"batch_size": 2, "seed": 0, "start_step": 0, **READ}
    with pytest.raises(ValueError, match="got context=10 for 10 tokens of training text"):
        train_windows(text_of(np.arange(10)), context=10, **train)
    with pytest.raises(ValueError, match="got 1 tokens of test text"):
        eval_windows(text_of([], [1]), context=10, batch_size=2)
    with (
        contextlib.closing(
            train_windows(text_of([1, 9, 1], size=9), context=2, **train)
        ) as batches,
        pytest.raises(DataError, match="got token id 9, expected 0 to 8, the ids"),
    ):
        next(batches)
    text = dataclasses.replace(text_of([1, 2, 1]), train=np.array([1, -100, 1]))
    with (
        contextlib.closing(train_windows(text, context=2, **train)) as batches,
        pytest.raises(DataError, match="got token id -100, expected 0 to 255"),
    ):
        next(batches)
    with pytest.raises(DataError, match="got tokens of dtype float64, expected whole numbers"):
        dataclasses.replace(text, test=np.ones(3))
    with pytest.raises(ValueError, match="got name='words', expected one of bytes"):
        load_text("words")
    with pytest.raises(ValueError, match="got no dir for shards, expected the folder that"):
        load_text("shards")
    with pytest.raises(ValueError, match="got no dir for characters"):
        load_text("characters")
    with pytest.raises(ValueError, match="got seed=-1, expected 0 or more"):
        train_windows(text_of(np.arange(10)), context=2, **train | {"seed": -1})
    reading = {"num_threads": 3, "prefetch": 2}
    with pytest.raises(ValueError, match="got num_threads=3 and prefetch=2, expected"):
        train_windows(text_of(np.arange(10)), context=2, **train | reading)
    with pytest.raises(StorageError, match=r"cannot write .*text.txt: File exists"):
        tokenize_files([path], tokenizer_file, path)
    with pytest.raises(DataError, match="expected UTF-8"):
        codec(Vocabulary("bytes", 256, "a")).encode("\udcff")
    with pytest.raises(DataError, match="No such file or directory; expected a text file"):
        load_text("bytes", path=str(tmp_path / "nothing"))
    (tmp_path / "latin").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(DataError, match="got bytes that are not UTF-8"):
        load_text("characters", path=str(tmp_path / "latin"))
    with pytest.raises(DataError, match=r"tokens.json: .*expected what tokenize_text.py wrote"):
        load_text("shards", path=str(tmp_path))
    with pytest.raises(DataError, match="nothing: no such file"):
        tokenize_files([tmp_path / "nothing"], tokenizer_file, tmp_path / "out")
    with pytest.raises(DataError, match="expected a tokenizer file"):
        tokenize_files([path], path, tmp_path / "out")
    other = Vocabulary("tokenizer", 270, tokenizer_sha256="0" * 64)
    with pytest.raises(DataError, match=r"tokenizer \(00000000\): take the data or tokenizer file"):
        codec(other, tokenizer_file)
    with pytest.raises(DataError, match="got no --tokenizer"):
        codec(other)
    damaged = json.loads((tokenizer_file).read_text()) | {"model": {}}
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    with pytest.raises(DataError, match=r"damaged.json: .*expected a tokenizer file"):
        codec(other, tmp_path / "damaged.json")


DESCRIPTION = {
    "dtype": "uint16",
    "vocab_size": 5,
    "tokenizer_sha256": "ab",
    "splits": {"train": {"a.bin": 4}, "test": {"b.bin": 4}},
    "test_bytes_per_token": 1.5,
}
DAMAGED = {
    "brackets": "[" * 200_000,
    "null": None,
    "no vocabulary": DESCRIPTION | {"vocab_size": float("inf")},
    "half a token": DESCRIPTION | {"vocab_size": 1.5},
    "no bytes": DESCRIPTION | {"test_bytes_per_token": 0},
    "not a number": DESCRIPTION | {"test_bytes_per_token": float("nan")},
    "too large": DESCRIPTION | {"test_bytes_per_token": 10**400},
    "another sum": DESCRIPTION | {"tokenizer_sha256": ["ab"]},
    "no size": DESCRIPTION | {"splits": {"train": {"a.bin": None}, "test": {"b.bin": 4}}},
    "pairs": DESCRIPTION | {"splits": {"train": [["a.bin", 4]], "test": {"b.bin": 4}}},
    "elsewhere": DESCRIPTION | {"splits": {"train": {"../a.bin": 4}, "test": {"b.bin": 4}}},
}


def write_shards(folder, description, num_bytes=8):
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(bytes(num_bytes))
    text = description if isinstance(description, str) else json.dumps(description)
    (folder / "tokens.json").write_text(text)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_description_of_shards_is_named(tmp_path, name):
    write_shards(tmp_path, DESCRIPTION)
    assert len(load_text("shards", path=str(tmp_path)).train) == 4
    write_shards(tmp_path, DAMAGED[name])
    with pytest.raises(DataError, match=r"tokens\.json: [A-Z].*expected what tokenize") as caught:
        load_text("shards", path=str(tmp_path))
    assert len(str(caught.value)) < 500


def test_files_of_shards(tmp_path):
    none = {"splits": {"train": {"a.bin": 0}, "test": {"b.bin": 0}}}
    write_shards(tmp_path, DESCRIPTION | none, num_bytes=0)
    assert len(load_text("shards", path=str(tmp_path)).train) == 0
    write_shards(tmp_path, DESCRIPTION)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(DataError, match=r"b\.bin: got no file, expected 8 bytes"):
        load_text("shards", path=str(tmp_path))


def test_files_that_never_end_or_hold_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "tokens.json")
    for name, path in (("bytes", tmp_path / "pipe"), ("shards", tmp_path)):
        with pytest.raises(DataError, match="got a pipe, socket or device; expected"):
            load_text(name, path=str(path))
    with pytest.raises(DataError, match="zero: got a pipe, socket or device"):
        load_text("characters", path="/dev/zero")
    (tmp_path / "nothing").touch()
    with pytest.raises(DataError, match="nothing: got an empty file"):
        load_text("bytes", path=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="File name too long; expected a text file"):
        load_text("bytes", path=str(tmp_path / ("a" * 300)))


def test_tokenizers_and_records_that_are_none(path, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(DataError, match=r"empty\.json: got a tokenizer without tokens"):
        tokenize_files([path], tmp_path / "empty.json", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match=r"pipe\.json: got a pipe"):
        load_tokenizer(tmp_path / "pipe.json")


def test_a_record_of_no_vocabulary():
    with pytest.raises(DataError, match=r"^config.json: got .*argument 'a'\), expected what"):
        vocabulary_from({"a": 5})


def test_a_disk_that_is_full(path, tokenizer_file, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "train_00000.bin")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(DataError, match="bin: No space left on device; expected files that"):
        tokenize_files([path], tokenizer_file, tmp_path / "out")
