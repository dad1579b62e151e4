"""An imported model is used like a run: generated from, evaluated, fine-tuned, exported."""

import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from revnet_jax.data.shards import tokenize_files
from revnet_jax.errors import UserError
from revnet_jax.models.int8 import quantized
from revnet_jax.pretrained.exporting import export_weights
from revnet_jax.pretrained.importing import import_weights
from revnet_jax.training.generate import generate_text
from revnet_jax.training.loop import train
from revnet_jax.training.restore import evaluate_run, restore_run
from tests.pretrained import published
from tests.pretrained.test_bad_files import tokenizer_of
from tests.small_run import ROOT

pytest.importorskip("safetensors", reason="needs the extra pretrained")
pytest.importorskip("tokenizers", reason="needs the extra pretrained")
MODEL = published.MODELS["qwen3"]
SIZE = published.V - 5  # the last rows of the embedding have no token


@pytest.fixture
def source(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    published.write(tmp_path / "source", MODEL)
    tokenizer = tokenizer_of(SIZE)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    return tmp_path / "source"


def test_from_published_weights_to_fine_tuned_ones(source, tmp_path):
    imported, tokens, tuned = (tmp_path / name for name in ("imported", "tokens", "tuned"))
    assert import_weights(source, imported, context=16)["tokenizer"]

    # Text in and text out, with the tokenizer that came along.
    token_T, found = [5, 6], published.tensors(MODEL)
    for _ in range(8):
        token_T.append(int(np.argmax(published.logits(MODEL, found, token_T)[-1])))
    text = "".join(generate_text(imported, "w5 w6", num_tokens=8, temperature=0))
    assert text.split() == [f"w{i}" for i in token_T[2:] if i < SIZE]

    (tmp_path / "text").write_text("\n".join(["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 300))
    tokenize_files([tmp_path / "text"], imported / "tokenizer.json", tokens, test_share=0.2)
    before = evaluate_run(imported, data_dir=str(tokens))["eval_loss"]

    config = runpy.run_path(str(ROOT / "configs" / "lm_finetune.py"))["get_config"](str(imported))
    config.num_steps = config.eval_every_steps = config.checkpoint_every_steps = 40
    config.schedule.update({"warmup_steps": 5, "learning_rate": 0.01})
    config.data.dir = str(tokens)
    config.ema_decay = 0.5  # so what is exported is the average
    assert train(config, tuned)["eval_loss"] < before - 1

    assert export_weights(tuned, tmp_path / "out")["step"] == 40
    import_weights(tmp_path / "out", tmp_path / "again")
    expected, got = (restore_run(workdir).variables for workdir in (tuned, tmp_path / "again"))
    np.testing.assert_array_equal(got.params["embed"], expected.params["embed"])


@pytest.mark.thorough
@pytest.mark.parametrize("frozen_dtype", ["", "int8"])
def test_fine_tuning_reversibly_and_by_adapters(source, tmp_path, frozen_dtype):
    """BDIA starts as the imported network, trains its adapters alone, and is exported merged."""
    imported, tokens, tuned = (tmp_path / name for name in ("imported", "tokens", "tuned"))
    import_weights(source, imported, context=16)
    (tmp_path / "text").write_text("\n".join(["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 300))
    tokenize_files([tmp_path / "text"], imported / "tokenizer.json", tokens, test_share=0.2)
    before = evaluate_run(imported, data_dir=str(tokens))["eval_loss"]

    config = runpy.run_path(str(ROOT / "configs" / "lm_finetune.py"))["get_config"](str(imported))
    config.num_steps = config.eval_every_steps = config.checkpoint_every_steps = 30
    config.schedule.update({"warmup_steps": 5, "learning_rate": 0.02})
    config.data.dir = str(tokens)
    config.model.update({"reversible": True, "integrator": "bdia", "backprop": "reverse"})
    config.model.update({"lora_rank": 4, "frozen_dtype": frozen_dtype})
    config.optimizer.trainable = "lora"
    last = train(config, tuned)
    assert last["eval_loss"] < before - 0.3
    assert last["exact_mismatches"] == 0

    run, start = restore_run(tuned), restore_run(imported)
    qkv, kernel = (r.variables.params["layers"][0]["qkv"] for r in (run, start))
    if frozen_dtype:
        expected = jax.jit(jax.vmap(quantized))(kernel["kernel"])
        np.testing.assert_array_equal(qkv["kernel"], expected[0])
        np.testing.assert_array_equal(qkv["kernel_scale"], expected[1])
    else:
        np.testing.assert_array_equal(qkv["kernel"], kernel["kernel"])
    np.testing.assert_array_equal(run.variables.params["embed"], start.variables.params["embed"])

    export_weights(tuned, tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "again", context=16)
    again = evaluate_run(tmp_path / "again", data_dir=str(tokens))["eval_loss"]
    assert again == pytest.approx(last["eval_loss"], abs=1e-5)

    # A second run of the same kind starts from the adapters of the first.
    config.init_from, config.num_steps, config.schedule.warmup_steps = str(tuned), 1, 0
    assert train(config, tmp_path / "longer")["eval_loss"] < before - 0.3


@pytest.mark.thorough
def test_without_a_tokenizer_one_line_says_so(source, tmp_path, run_program):
    (source / "tokenizer.json").unlink()
    flags = f"--source={source}", f"--workdir={tmp_path / 'run'}"
    status, _, said = run_program("import_weights", *flags)
    assert status == 0
    assert said.startswith(f"note: {source} has no tokenizer.json: ")
    assert said.count("\n") == 1
    with pytest.raises(UserError, match="has no vocabulary, expected a run on a text, or weights"):
        next(generate_text(tmp_path / "run", "w1", num_tokens=1))
    status, _, said = run_program("import_weights", *flags)
    assert status == 1
    assert said == (
        f"error: {tmp_path / 'run'} holds a run already (config.json), expected a new folder: "
        "choose another --workdir\n"
    )


def test_other_tokens_are_refused_at_fine_tuning(source, tmp_path):
    import_weights(source, tmp_path / "imported")
    tokenizer_of(9).save(str(tmp_path / "other.json"))
    (tmp_path / "text").write_text("w1\n" * 900)
    tokens = tmp_path / "tokens"
    tokenize_files([tmp_path / "text"], tmp_path / "other.json", tokens, test_share=0.5)
    with pytest.raises(UserError, match=r"got a vocabulary of 9 tokenizer \(\w+\), expected that"):
        evaluate_run(tmp_path / "imported", data_dir=str(tokens))


@pytest.mark.parametrize("program", ["import_weights", "export_weights"])
def test_the_programs_are_in_the_package(program):
    command = [sys.executable, "-m", "revnet_jax", program, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--workdir" in done.stdout
