"""Prompts and answers: shards that say which tokens are trained on, and the loss on those."""

import contextlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import language_model
from revnet_jax.data import answers
from revnet_jax.data.answers import tokenize_answers
from revnet_jax.data.dataset import DataError
from revnet_jax.data.shards import load_shards, tokenize_files
from revnet_jax.data.text import Text, eval_windows, load_text, train_windows
from revnet_jax.data.vocabulary import Vocabulary
from revnet_jax.families import DTYPES
from revnet_jax.training.build import build_recipe
from revnet_jax.training.loop import train
from revnet_jax.training.program import jit_step
from revnet_jax.training.restore import evaluate_run, restore_run
from revnet_jax.training.sharding import make_mesh, put_batch, shapes_on_mesh
from revnet_jax.training.step import init_state, make_train_step
from tests import thorough

READ = {"num_threads": 0, "prefetch": 0}
EXAMPLES = [{"prompt": "w1 " * (i % 3) + "w2", "answer": f"w{3 + i % 4} w3"} for i in range(20)]
END = "w0"
SMALL = {
    "batch_size": 8,
    "data.vocab_size": 9,
    "data.context": 8,
    "data.end_token": 0,
    "model.separate_documents": True,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.hidden": 16,
    "schedule.warmup_steps": 0,
}


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w8")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(example | {"id": 5}) + "\n" for example in EXAMPLES))
    return path


def everything(split):
    return split[np.arange(len(split))]


def test_shards_mark_the_answers(lines, tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_LINES", 3)
    out = tmp_path / "out"
    options = {"end_token": END, "test_share": 0.25, "shard_tokens": 20}
    written = tokenize_answers([lines], tokenizer_file, out, **options)
    assert len(written["splits"]["train"]) > 2
    documents = [
        ([int(word[1]) for word in e["prompt"].split()], [int(w[1]) for w in e["answer"].split()])
        for e in EXAMPLES
    ]
    text = load_text("shards", path=str(out))
    parts = ((text.train, text.train_weight, 0, 15), (text.test, text.test_weight, 15, 20))
    for tokens, weights, first, last in parts:
        expected = [[*p, *a, 0] for p, a in documents[first:last]]
        np.testing.assert_array_equal(everything(tokens), np.concatenate(expected))
        expected = [[0] * len(p) + [1] * len(a) + [1] for p, a in documents[first:last]]
        np.testing.assert_array_equal(everything(weights), np.concatenate(expected))
    # "w3 w3" and the end token: 5 bytes in 3 trained tokens.
    assert written["test_bytes_per_token"] == text.bytes_per_token == 5 / 3
    assert written["end_token"] == text.vocabulary.end_token == 0

    one = tokenize_answers([lines], tokenizer_file, tmp_path / "one", end_token=END)
    assert sum(one["splits"]["test"].values()) == len(documents[-1][0]) + 3  # one line at least
    name = next(iter(written["answers"]["train"]))
    (out / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name}: got 0 bytes, expected"):
        load_shards(out)
    found = json.loads((out / "tokens.json").read_text())
    found["answers"]["train"][name] = 0
    (out / "tokens.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"tokens.json: ValueError: got .* for the answers of"):
        load_shards(out)


def test_shards_of_text_have_no_weights(tokenizer_file, tmp_path):
    (tmp_path / "text").write_text("w1 w2\n" * 300)
    written = tokenize_files([tmp_path / "text"], tokenizer_file, tmp_path / "out", test_share=0.25)
    assert "answers" not in written
    text = load_text("shards", path=str(tmp_path / "out"))
    assert text.train_weight is text.test_weight is None
    options = {"context": 4, "batch_size": 2, "seed": 0, "start_step": 0, **READ}
    with contextlib.closing(train_windows(text, **options)) as windows:
        assert next(windows).keys() == {"token", "target"}


BAD = {
    "": r"got '\\n', which is no JSON",
    '{"prompt": "w1"': r"got '{\"prompt.*, which is no JSON \(Expecting",
    '["w1", "w2"]': "which is no object",
    '{"prompt": "w1", "answers": "w2"}': "got no answer",
    '{"prompt": ["w1"], "answer": "w2"}': r"got prompt \"\['w1'\]\", no string",
    '{"prompt": "w1", "answer": ""}': "got an empty answer",
    '{"prompt": "\\ud800", "answer": "w2"}': "surrogates not allowed",
    "[" * 200_000: "recursion",
    b"\xff": "got bytes that are not UTF-8",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_and_nothing_is_written(line, lines, tokenizer_file, tmp_path):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "bad.jsonl").write_bytes(lines.read_bytes() + line + b"\n" + lines.read_bytes())
    key = line.decode() if line != b"\xff" else line
    with pytest.raises(DataError, match=rf"bad.jsonl, line 21: .*{BAD[key]}.*expected a line") as e:
        tokenize_answers(
            [lines, tmp_path / "bad.jsonl"], tokenizer_file, tmp_path / "out", end_token=END
        )
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500 + len(str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_other_mistakes(lines, tokenizer_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="got no end_token with answers, expected a token"):
        tokenize_answers([lines], tokenizer_file, out, end_token=None)
    with pytest.raises(ValueError, match="got end_token='no', expected a token of"):
        tokenize_answers([lines], tokenizer_file, out, end_token="no")
    with pytest.raises(DataError, match="nothing: no such file; expected a line such as"):
        tokenize_answers([tmp_path / "nothing"], tokenizer_file, out, end_token=END)
    (tmp_path / "short").write_text(json.dumps(EXAMPLES[0]) + "\n")
    with pytest.raises(DataError, match=r"got 1 lines in .*short, expected two at least"):
        tokenize_answers([tmp_path / "short"], tokenizer_file, out, end_token=END)
    assert not out.exists()
    with pytest.raises(DataError, match="got 3 weights for 4 tokens, expected one each"):
        text_of(np.arange(4), np.ones(3))


def text_of(tokens, weights):
    vocabulary = Vocabulary("bytes", 256)
    return Text(tokens, tokens, vocabulary, 1.0, "", weights, weights)


def test_windows_carry_the_weight_of_each_target():
    tokens = np.arange(50)
    text = text_of(tokens, (tokens % 3 == 0).astype(np.uint8))
    options = {"context": 6, "batch_size": 4, **READ}
    with contextlib.closing(train_windows(text, seed=3, start_step=0, **options)) as windows:
        batches = list(itertools.islice(windows, 3))
    for batch in batches:
        counts = batch["target"] % 3 == 0
        expected = (counts / counts.mean()).astype(np.float32)
        np.testing.assert_array_equal(batch["weight"], expected, strict=True)
        assert batch["weight"].mean() == pytest.approx(1, rel=1e-6)
    rows = {**options, "rows": np.asarray([1, 2])}  # those of one process
    with contextlib.closing(train_windows(text, seed=3, start_step=2, **rows)) as windows:
        np.testing.assert_array_equal(next(windows)["weight"], batches[2]["weight"][1:3])
    with contextlib.closing(train_windows(text, seed=3, start_step=2, **options)) as windows:
        np.testing.assert_array_equal(next(windows)["weight"], batches[2]["weight"])
    with contextlib.closing(eval_windows(text, **options)) as windows:
        batches = list(windows)
    target, weight = (np.concatenate([b[name] for b in batches]) for name in ("target", "weight"))
    np.testing.assert_array_equal(target[weight == 1], np.arange(3, 50, 3))  # each once

    none = text_of(tokens, np.zeros(50, np.uint8))
    with contextlib.closing(train_windows(none, seed=3, start_step=0, **options)) as windows:
        np.testing.assert_array_equal(next(windows)["weight"], np.zeros((4, 6)))
    none = text_of(tokens, (tokens == 40).astype(np.uint8))
    with contextlib.closing(eval_windows(none, **options)):
        pass
    with pytest.raises(ValueError, match="got weight 0 for all 36 evaluated tokens, expected an"):
        eval_windows(none, **options, max_windows=6)


def naive_loss(task, variables, batch):
    """The mean over the whole batch of the losses of targets that count, from all logits."""
    logits = task.network.logits(variables, batch["token"])
    picked = jax.nn.one_hot(batch["target"], logits.shape[-1], dtype=logits.dtype)
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(picked * logits, axis=-1)
    return jnp.sum(batch["weight"] * nll) / jnp.sum(batch["weight"])


@pytest.mark.parametrize(
    ("microbatches", "devices", "lockstep"),
    [thorough(1, 1, False), thorough(4, 1, False), thorough(2, 2, False), thorough(1, 2, True)],
)
def test_the_loss_is_the_mean_over_the_answers_of_the_batch(microbatches, devices, lockstep):
    """In value and gradient, in float64, however few answers a part of the batch has."""
    config = language_model()
    config.update_from_flattened_dict(
        SMALL
        | {
            "microbatches": microbatches,
            "model.compute_dtype": "float64",
            "model.grid": False,
            "model.check_exactness": False,
            "optimizer.lockstep": lockstep,
            "optimizer.name": "sgd",
            "optimizer.momentum": 0.0,
            "optimizer.weight_decay": 0.0,
            "schedule.name": "constant",
            "schedule.learning_rate": 1.0,
        }
    )
    rng = np.random.default_rng(0)
    token = rng.integers(9, size=(8, 9)).astype(np.int32)
    weight = (rng.random((8, 8)) < 0.5).astype(np.float64)
    weight[1::4] = 0  # a microbatch without answers, if there are four
    weight[:4, 1:] = 0  # and a device with few
    weight /= weight.mean()  # as `train_windows` does
    batch = {"token": token[:, :-1], "target": token[:, 1:], "weight": weight}
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),  # positions are 32 bit integers
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setitem(DTYPES, "float64", jnp.float64)
        task, schedule, optimizer = build_recipe(config)

        def init():
            state = init_state(task.network, optimizer, seed=0)
            variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.variables)
            opt_state = optimizer.init(variables.params)
            return state._replace(variables=variables, opt_state=opt_state)

        mesh = make_mesh(jax.devices()[:devices])
        there = shapes_on_mesh(init, task.network.rules, mesh)
        step = jit_step(make_train_step(task, optimizer, schedule), mesh, there, jax.jit)
        state = jax.jit(init)()
        of_variables = lambda variables: naive_loss(task, variables, batch)
        expected, gradient = jax.jit(jax.value_and_grad(of_variables))(state.variables)
        before = jax.tree.map(np.asarray, state.variables)
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, there))
        after, metrics = step(state, put_batch(batch, mesh))
        assert float(metrics["train_loss"]) == pytest.approx(float(expected), rel=1e-12)
        moved = jax.tree.map(lambda old, new: old - np.asarray(new), before, after.variables)
        for got, right in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-9, atol=1e-12)

        before = jax.tree.map(np.asarray, after.variables)
        after, metrics = step(after, put_batch({**batch, "weight": 0 * weight}, mesh))
        assert float(metrics["train_loss"]) == 0  # no answers: no NaN, and nothing is learned
        jax.tree.map(np.testing.assert_array_equal, before, after.variables)
        # Evaluation adds up sums and counts, which must be finite too.
        sums = jax.jit(task.sums)(after.variables, {**batch, "weight": 0 * weight})
        assert {name: float(x) for name, x in sums.items()} == {"loss": 0, "count": 0}
        sums = jax.jit(task.sums)(before, batch)
        naive = naive_loss(task, before, batch)
        assert float(sums["loss"] / sums["count"]) == pytest.approx(float(naive), rel=1e-12)


@pytest.mark.thorough
def test_a_run_on_answers_resumes_and_is_evaluated(lines, tokenizer_file, tmp_path):
    tokens = tmp_path / "tokens"
    written = tokenize_answers([lines], tokenizer_file, tokens, end_token=END, test_share=0.25)
    config = language_model()
    config.update_from_flattened_dict(
        SMALL
        | {
            "num_steps": 4,
            "eval_batch_size": 2,
            "log_every_steps": 1,
            "eval_every_steps": 2,
            "checkpoint_every_steps": 2,
            "data.name": "shards",
            "data.dir": str(tokens),
            "schedule.name": "constant",
        }
    )
    train(config, tmp_path / "whole")
    config.num_steps = 2
    train(config, tmp_path / "resumed")
    config.num_steps = 4
    train(config, tmp_path / "resumed")
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "resumed")]
    assert metrics[0] == metrics[1]

    # Every answer of the test split counts once, and nothing else.
    run = restore_run(tmp_path / "whole")
    text = load_text("shards", path=str(tokens))
    logits = jax.jit(run.task.network.logits)
    total = 0.0
    for start in range(0, len(text.test) - 1, config.data.context):
        there = np.arange(start, min(start + config.data.context + 1, len(text.test)))
        token = text.test[there].astype(np.int32)
        picked = jax.nn.log_softmax(logits(run.variables, token[None, :-1])[0])
        nll = -np.asarray(picked)[np.arange(len(token) - 1), token[1:]]
        total += np.sum(nll * text.test_weight[there[1:]])
    mean = total / everything(text.test_weight)[1:].sum()
    found = evaluate_run(tmp_path / "whole")
    assert found["eval_loss"] == pytest.approx(mean, rel=1e-5)
    per_byte = mean / np.log(2) / written["test_bytes_per_token"]
    assert found["eval_bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)
