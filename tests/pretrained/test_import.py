"""Published weights become a run, and come back: values against plain NumPy in float64."""

import functools
import json
import pathlib
import runpy
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.models import LanguageModel, ModelOptions, Variables
from revnet_jax.pretrained.exporting import export_weights
from revnet_jax.pretrained.families import FAMILIES
from revnet_jax.pretrained.importing import import_weights
from revnet_jax.runs.manifest import by_path
from revnet_jax.runs.workdir import load_config
from revnet_jax.training.restore import restore_run
from tests import by_default
from tests.pretrained import published

pytest.importorskip("safetensors", reason="needs the extra pretrained")
ROOT = pathlib.Path(__file__).parents[2]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
each_model = pytest.mark.parametrize("name", by_default(published.MODELS, "llama", "qwen3", "gpt2"))


def stored(folder):
    """All tensors of a folder, read by the library."""
    from safetensors.numpy import load_file

    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].dtype == x.dtype
        assert got[name].shape == x.shape
        assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_arrays_are_in_memory_a_second_time_one_by_one(tmp_path, monkeypatch, start_program):
    def peak_bytes(name):
        model = {**published.MODELS["qwen2"], "hidden_size": published.D, "num_hidden_layers": 32}
        model |= {"intermediate_size": published.F, "num_attention_heads": published.N}
        model |= {"num_key_value_heads": published.G}
        found = published.write(tmp_path / name, model)
        program = start_program(
            "import_weights", f"--source={tmp_path / name}", f"--workdir={tmp_path / name}_run"
        )
        peak = 0
        ends = time.monotonic() + 300
        while program.poll() is None and time.monotonic() < ends:
            status = pathlib.Path(f"/proc/{program.pid}/status").read_text()
            # Anonymous memory, since the pages of mapped files can be dropped at any time.
            used = [int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")]
            peak = max([peak, *used])
            time.sleep(0.002)
        program.kill()  # only if it is late
        _, stderr = program.communicate()
        assert program.returncode == 0, stderr
        return 1024 * peak, found

    # One arena of malloc uses again what was freed in it; how much each thread's own arena keeps
    # depends on timing.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setattr(published, "LAYERS", 32)
    small, _ = peak_bytes("small")
    for name, size in {"D": 512, "F": 1408, "N": 8, "G": 4}.items():
        monkeypatch.setattr(published, name, size)
    large, found = peak_bytes("large")
    model = sum(x.nbytes for x in found.values())
    kernel = 32 * 512 * 1408 * 4
    assert model > 4 * kernel
    # XLA gives the memory of one checksum back while it computes the next; 100 MB for what is being
    # compressed and written.
    assert large - small < model + 2 * kernel + 100e6


@each_model
def test_logits_are_those_of_the_naive_model(name, tmp_path):
    model = published.MODELS[name]
    found = published.write(tmp_path / "source", model, files=3)
    report = import_weights(tmp_path / "source", tmp_path / "run")
    assert report["num_params"] == sum(x.size for x in found.values())
    run = restore_run(tmp_path / "run")
    assert run.step == 0
    token_T = np.random.default_rng(1).integers(0, published.V, 90)
    expected = published.logits(model, found, token_T)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        network = LanguageModel(
            run.task.network.shape, ModelOptions(backprop="remat", compute_dtype=jnp.float64)
        )
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), run.variables.params)
        logits_BTV = jit(network.logits)(Variables(params, {}), token_T[None])
        np.testing.assert_allclose(logits_BTV[0], expected, rtol=0, atol=1e-9)
    narrow_BTV = jit(run.task.network.logits)(run.variables, jnp.asarray(token_T[None], jnp.int32))
    np.testing.assert_allclose(narrow_BTV[0], expected, rtol=0, atol=1e-4)


@each_model
def test_what_was_imported_is_exported_bit_for_bit(name, tmp_path):
    model = published.MODELS[name]
    found = published.write(tmp_path / "source", model)
    import_weights(tmp_path / "source", tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "whole")
    same_bits(stored(tmp_path / "whole"), found)
    header = (tmp_path / "whole" / "model.safetensors").read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0  # so that tensors are aligned
    export_weights(tmp_path / "run", tmp_path / "parts", shard_bytes=9_000)
    assert len(list((tmp_path / "parts").glob("model-0*.safetensors"))) > 3
    same_bits(stored(tmp_path / "parts"), found)
    # And the config.json that was written is that of the same model.
    import_weights(tmp_path / "parts", tmp_path / "again")
    assert load_config(tmp_path / "again") == load_config(tmp_path / "run")
    params = [by_path(restore_run(tmp_path / n).variables.params) for n in ("run", "again")]
    same_bits(*({path: np.asarray(x) for path, x in leaves.items()} for leaves in params))


def test_config_json_is_kept(tmp_path):
    for name, model in published.MODELS.items():
        published.write(tmp_path / name, model)
        import_weights(tmp_path / name, tmp_path / f"{name}_run", context=32)
        export_weights(tmp_path / f"{name}_run", tmp_path / f"{name}_out")
        written = json.loads((tmp_path / f"{name}_out" / "config.json").read_text())
        length = FAMILIES[model["model_type"]].context
        expected = {**model, length: 96 if name == "gpt2" else 32}
        if parameters := expected.pop("rope_parameters", None):
            expected["rope_theta"] = parameters["rope_theta"]
        expected.pop("use_sliding_window", None)
        assert expected.items() <= written.items()


def test_bfloat16_files_stay_what_they_are(tmp_path):
    model = published.MODELS["qwen2"]
    narrow = jnp.dtype(jnp.bfloat16)
    found = published.write(tmp_path / "source", model, published.tensors(model, narrow))
    for dtype in ("float32", "bfloat16"):
        import_weights(tmp_path / "source", tmp_path / dtype, dtype=dtype)
        params = restore_run(tmp_path / dtype).variables.params
        assert params["embed"].dtype == dtype
        assert params["head"]["scale"].dtype == jnp.float32
        export_weights(tmp_path / dtype, tmp_path / f"{dtype}_out", dtype="bfloat16")
        same_bits(stored(tmp_path / f"{dtype}_out"), found)


@each_model
def test_every_parameter_is_in_one_tensor(name, tmp_path):
    published.write(tmp_path / "source", published.MODELS[name])
    import_weights(tmp_path / "source", tmp_path / "run")
    network = restore_run(tmp_path / "run").task.network
    shapes = by_path(jax.eval_shape(network.init, jax.random.key(0)).params)
    leaves = {path: np.zeros(leaf.shape, int) for path, leaf in shapes.items()}
    family = FAMILIES[published.MODELS[name]["model_type"]]
    for tensor in family.tensors(network.shape):
        view = tensor.view(leaves[tensor.path])
        assert view.size == np.prod(tensor.shape)
        view += 1
    assert all(np.all(leaf == 1) for leaf in leaves.values())


def test_names_without_prefix_and_tensors_without_weights(tmp_path):
    """As the first GPT-2 was published, with the causal mask of each layer."""
    model = published.MODELS["gpt2"]
    found = published.tensors(model)
    bare = {name.removeprefix("transformer."): x for name, x in found.items()}
    masks = {f"h.{i}.attn.bias": np.tri(96, dtype=np.float32)[None, None] for i in range(2)}
    published.write(tmp_path / "bare", model, bare | masks)
    import_weights(tmp_path / "bare", tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "out")
    same_bits(stored(tmp_path / "out"), found)


def test_a_tied_embedding_may_be_there_twice(tmp_path):
    model = published.MODELS["llama"]
    found = published.tensors(model)
    twice = found | {"lm_head.weight": found["model.embed_tokens.weight"]}
    published.write(tmp_path / "source", model, twice)
    import_weights(tmp_path / "source", tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "out")
    same_bits(stored(tmp_path / "out"), found)


def test_context_is_at_most_that_of_the_model(tmp_path):
    published.write(tmp_path / "source", published.MODELS["gpt2"])
    for context, expected in ((16, 16), (1000, 96)):
        import_weights(tmp_path / "source", tmp_path / str(context), context=context)
        assert load_config(tmp_path / str(context)).data.context == expected


def test_the_config_of_fine_tuning_takes_the_imported_model(tmp_path):
    published.write(tmp_path / "source", published.MODELS["llama"])
    import_weights(tmp_path / "source", tmp_path / "run", dtype="bfloat16")
    get_config = runpy.run_path(str(ROOT / "configs" / "lm_finetune.py"))["get_config"]
    config, imported = get_config(str(tmp_path / "run")), load_config(tmp_path / "run")
    assert config.model == imported.model
    assert config.data == imported.data
    assert config.init_from == str(tmp_path / "run")
