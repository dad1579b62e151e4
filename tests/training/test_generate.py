"""Text from a trained model."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import ConfigError, language_model
from revnet_jax.data.shards import tokenize_files
from revnet_jax.errors import UserError
from revnet_jax.models import LanguageModel, LanguageModelShape
from revnet_jax.training import generate as generating
from revnet_jax.training import restore
from revnet_jax.training.generate import generate, generate_text, sample
from revnet_jax.training.loop import train
from revnet_jax.training.restore import evaluate_run

TEXT = "abcdefgh" * 200
TINY = {
    "num_steps": 60,
    "batch_size": 8,
    "eval_batch_size": 8,
    "eval_every_steps": 60,
    "checkpoint_every_steps": 60,
    "data.name": "characters",
    "data.vocab_size": 8,
    "data.context": 8,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.hidden": 16,
    "schedule.learning_rate": 0.02,
    "schedule.warmup_steps": 5,
}


def test_from_text_to_a_model_to_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text(TEXT)
    config = language_model()
    config.update_from_flattened_dict(
        {**TINY, "data.dir": str(tmp_path / "text"), "model.feed_forward_chunks": 2}
    )
    workdir = tmp_path / "run"
    summary = train(config, workdir)
    assert summary["exact_mismatches"] == 0
    assert summary["eval_perplexity"] < 1.2
    assert summary["eval_bits_per_byte"] == pytest.approx(summary["eval_loss"] / np.log(2))
    assert evaluate_run(workdir)["eval_loss"] == summary["eval_loss"]
    # The alphabet goes on, beyond what the model was trained to look back on.
    pieces = list(generate_text(workdir, "efg", num_tokens=21, temperature=0))
    assert "".join(pieces) == "habcdefgh" + "abcdefghabcd"
    with pytest.raises(UserError, match="got 'z' in the prompt 'az'"):
        next(generate_text(workdir, "az", num_tokens=1))
    with pytest.raises(UserError, match="got prompt '', expected one token at least"):
        next(generate_text(workdir, "", num_tokens=1))
    for temperature in (-1, np.nan):
        with pytest.raises(UserError, match=f"got temperature={temperature}"):
            next(generate_text(workdir, "a", num_tokens=1, temperature=temperature))
    with pytest.raises(UserError, match="got seed=-1"):
        next(generate_text(workdir, "a", num_tokens=1, seed=-1))
    (tmp_path / "other").write_text("abcdefgi" * 200)
    with pytest.raises(UserError, match="got a vocabulary of 8 characters, expected that of"):
        evaluate_run(workdir, data_dir=str(tmp_path / "other"))
    config.data.dir = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds a run on other data: got a text of sha256"):
        train(config, workdir)
    # Another text of the same characters is evaluated, and a longer prompt is read, with a word.
    assert "note:" not in capsys.readouterr().err
    (tmp_path / "other").write_text("hgfedcba" * 200)
    monkeypatch.setattr(restore, "evaluate", lambda *_: {"loss": 1.0})
    assert evaluate_run(workdir, data_dir=str(tmp_path / "other"))["eval_loss"] == 1
    note = capsys.readouterr().err
    assert "note: other data than those of the run" in note
    assert note.count("a text of sha256") == 2
    monkeypatch.setattr(generating, "generate", lambda *_, **__: iter(()))
    assert list(generate_text(workdir, "abcdefgha", num_tokens=1)) == []
    assert "got a prompt of 9 tokens for a context of 8" in capsys.readouterr().err


@pytest.mark.thorough
def test_from_shards_of_tokens_to_text_by_way_of_a_crash(tmp_path):
    """Experts, updates in lockstep: interrupted and resumed, a run ends with the same figures."""
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "text").write_text(TEXT)
    letters = {letter: i for i, letter in enumerate("abcdefgh")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenize_files([tmp_path / "text"], tmp_path / "tokenizer.json", tmp_path / "shards")
    config = language_model()
    config.update_from_flattened_dict(
        {
            **TINY,
            "data.name": "shards",
            "data.dir": str(tmp_path / "shards"),
            "checkpoint_every_steps": 20,
            "model.experts": 4,
            "optimizer.lockstep": True,
            "optimizer.clip": "layer",
        }
    )
    alone = train(config, tmp_path / "alone")
    assert alone["exact_mismatches"] == 0
    assert alone["eval_perplexity"] < 1.2
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for name in ("config.json", "metrics.jsonl", "checkpoints/40"):
        copy = shutil.copytree if name.endswith("40") else shutil.copy
        copy(tmp_path / "alone" / name, resumed / name)
    again = train(config, resumed)
    assert again["train_loss"] == alone["train_loss"]
    assert again["eval_loss"] == alone["eval_loss"]
    write = functools.partial(generate_text, resumed, "efg", num_tokens=6, temperature=0)
    assert "".join(write(tokenizer=tmp_path / "tokenizer.json")) == "habcde"
    with pytest.raises(UserError, match="--tokenizer"):
        next(write())


@pytest.mark.thorough
def test_microbatches_learn_what_the_batch_does(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    config = language_model()
    config.update_from_flattened_dict({**TINY, "data.dir": str(tmp_path / "text"), "num_steps": 6})
    whole = train(config, tmp_path / "whole")
    config.microbatches = 4
    parts = train(config, tmp_path / "parts")
    assert parts["exact_mismatches"] == 0
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)


@pytest.mark.thorough
def test_tokens_are_those_of_the_whole_forward_pass():
    """While all fit into the cache; afterwards, those of the later half of the context."""
    sizes = {"vocab_size": 11, "layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "hidden": 16}
    lm = LanguageModel(LanguageModelShape(**sizes))
    variables = jax.jit(lm.init)(jax.random.key(0))
    context, prompt = 8, [3, 1, 4]
    got = list(generate(lm, variables, prompt, context=context, num_tokens=12, temperature=0))
    logits = jax.jit(lm.logits)
    text, start = list(prompt), 0
    for token in got:
        if len(text) - start > context:
            start = len(text) - context // 2
        expected = logits(variables, jnp.asarray([text[start:]]))[0, -1]
        assert token == jnp.argmax(expected)
        text.append(token)
    draws = [
        list(generate(lm, variables, prompt, context=8, num_tokens=5, seed=s)) for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_sampling_from_the_likeliest():
    logits = jnp.log(jnp.asarray([0.1, 0.5, 0.15, 0.25]))
    draw = jax.jit(sample, static_argnames=("temperature", "top_p"))
    keys = jax.random.split(jax.random.key(0), 300)

    def frequencies(**settings):
        drawn = [int(draw(logits, key, **settings)) for key in keys]
        return np.bincount(drawn, minlength=4) / len(keys)

    np.testing.assert_allclose(
        frequencies(temperature=1.0, top_p=1.0), [0.1, 0.5, 0.15, 0.25], atol=0.1
    )
    np.testing.assert_allclose(
        frequencies(temperature=1.0, top_p=0.7), [0, 2 / 3, 0, 1 / 3], atol=0.1
    )
    assert frequencies(temperature=0.0, top_p=1.0)[1] == 1
    sharp = frequencies(temperature=0.5, top_p=1.0)
    assert sharp[1] > 0.6
