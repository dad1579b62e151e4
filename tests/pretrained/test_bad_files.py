"""Files that cannot be imported, runs that cannot be exported: one line, and nothing written."""

import json

import numpy as np
import pytest

from revnet_jax.config import language_model
from revnet_jax.errors import UserError
from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.exporting import export_weights, family_for
from revnet_jax.pretrained.importing import import_weights
from tests.pretrained import published
from tests.small_run import file_limit

pytest.importorskip("safetensors", reason="needs the extra pretrained")
LLAMA = published.MODELS["llama"]
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def source(tmp_path):
    published.write(tmp_path / "source", LLAMA)
    return tmp_path / "source"


def files_under(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refusal(source, workdir, **options):
    """The message of a refused import, which has left everything as it was."""
    before = files_under(source.parent)
    with pytest.raises(UserError) as caught:
        import_weights(source, workdir, **options)
    assert "\n" not in str(caught.value)
    assert files_under(source.parent) == before
    return str(caught.value)


TENSORS = {
    "missing": ({NORM: None}, f"got no {NORM}, expected the tensors of a llama as its config.json"),
    "extra": ({"model.extra": np.ones(3, np.float32)}, "got the unknown model.extra, expected the"),
    "shape": ({NORM: np.ones(25, np.float32)}, f"got {NORM} of (25,), expected (24,)"),
    "dtype": ({NORM: np.ones(24, np.int8)}, f"got {NORM} in I8, expected F32, BF16, F16, F64"),
    "untied": (
        {"lm_head.weight": np.ones((published.V, 24), np.float32)},
        "got lm_head.weight that differs from the embedding, expected the same, since config.json",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_model(name, source, tmp_path):
    changes, message = TENSORS[name]
    found = published.tensors(LLAMA) | changes
    published.write(source, LLAMA, {name: x for name, x in found.items() if x is not None})
    assert message in refusal(source, tmp_path / "run")


DESCRIPTIONS = {
    "another family": ({"model_type": "mistral"}, "got model_type=mistral, expected 'llama' or"),
    "no family": ({"model_type": None}, "got model_type=None, expected a string"),
    "the other's tensors": ({"model_type": "qwen3"}, "self_attn.q_norm.weight"),
    "no width": ({"hidden_size": None}, "got hidden_size=None, expected a whole number from 1"),
    "a width of text": ({"hidden_size": "24"}, "got hidden_size=24, expected a whole number"),
    "negative layers": ({"num_hidden_layers": -2}, "got num_hidden_layers=-2, expected a whole"),
    "another depth": ({"num_hidden_layers": 1}, "got the unknown 9, such as model.layers.1."),
    "heads": ({"num_key_value_heads": 3}, "got kv_heads=3, expected a divisor of heads=4"),
    "activation": ({"hidden_act": "gelu"}, "got hidden_act=gelu, expected 'silu'"),
    "scaling": ({"rope_scaling": {"type": "yarn"}}, "expected of type default or llama3"),
    "half a scaling": ({"rope_scaling": {"rope_type": "llama3"}}, "got factor=None, expected a"),
    "scaling of text": ({"rope_scaling": "llama3"}, "got rope_scaling=llama3, expected an object"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, expect"),
    "biases": ({"mlp_bias": True}, "got mlp_bias=True, expected False"),
    "a number too large": ({"rms_norm_eps": 10**400}, "got rms_norm_eps=1000"),
    "a base too large": ({"rope_parameters": {"rope_theta": 10**400}}, "got rope_theta=1000"),
    "eps": ({"rms_norm_eps": 0}, "got rms_norm_eps=0, expected a number above 0"),
    "tied in words": ({"tie_word_embeddings": "yes"}, "got tie_word_embeddings=yes, expected true"),
    "a window": (
        {"model_type": "qwen2", "use_sliding_window": True},
        "got use_sliding_window=True, expected False",
    ),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_of_another_model(name, source, tmp_path):
    changes, message = DESCRIPTIONS[name]
    (source / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    assert message in refusal(source, tmp_path / "run")


def test_null_counts_as_absent(tmp_path):
    path = tmp_path / "config.json"
    empty = {"rope_type": None, "partial_rotary_factor": None, "rope_theta": None, "factor": None}
    path.write_text(json.dumps({"rope_theta": 5.0, "rope_parameters": empty}))
    assert Description(path).rotary() == {"rotary_base": 5.0, "rotary_scaling": ()}
    older = {"type": "default", "rope_theta": 7.0}
    path.write_text(json.dumps({"rope_scaling": older, "rope_parameters": empty}))
    assert Description(path).rotary() == {"rotary_base": 7.0, "rotary_scaling": ()}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("size", [None, 0, 5, -40])
def test_files_that_are_missing_or_cut_short(name, size, source, tmp_path):
    path = source / name
    content = path.read_bytes()
    path.unlink() if size is None else path.write_bytes(content[:size])
    assert str(path if size is not None else source) in refusal(source, tmp_path / "run")


def test_an_index_that_is_wrong(source, tmp_path):
    (source / "model.safetensors").unlink()
    published.write(source, LLAMA, files=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = {
        "got part0.safetensors, expected part1.safetensors": {EMBED: "part1.safetensors"},
        "names part7.safetensors, expected a file in its folder": {NORM: "part7.safetensors"},
        "names ../config.json, expected a file in its folder": {NORM: "../config.json"},
        "such as new: got no file, expected part0.safetensors": {"new": "part0.safetensors"},
    }
    for message, changes in wrong.items():
        path.write_text(json.dumps({"weight_map": index["weight_map"] | changes}))
        assert message in refusal(source, tmp_path / "run")
    for broken in ("{", "[]", "{}", '{"weight_map": {"a": 1}}'):
        path.write_text(broken)
        assert str(path) in refusal(source, tmp_path / "run")


def test_a_tensor_in_two_files(source, tmp_path):
    (source / "model.safetensors").unlink()
    found = published.write(source, LLAMA, files=2)
    from safetensors.numpy import load_file, save_file

    second = load_file(source / "part1.safetensors") | {EMBED: found[EMBED]}
    save_file(second, source / "part1.safetensors")
    assert f"part1.safetensors: got {EMBED} again" in refusal(source, tmp_path / "run")


def test_a_workdir_that_holds_a_run(source, tmp_path):
    workdir = tmp_path / "run"
    import_weights(source, workdir)
    assert "holds a run already (config.json), expected a new folder" in refusal(source, workdir)
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refusal(source, tmp_path / "file")


def tokenizer_of(size):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(size)}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))


def test_a_tokenizer_that_does_not_fit(source, tmp_path):
    path = source / "tokenizer.json"
    tokenizer_of(published.V + 1).save(str(path))
    message = f"got a tokenizer of {published.V + 1} ids, expected at most {published.V}"
    assert message in refusal(source, tmp_path / "run")
    path.write_text('{"model": 1}')
    assert f"{path}: " in refusal(source, tmp_path / "run")


EXPORTS = {
    "streams": ({"reversible": True}, "got True with integrator='streams', expected False, or"),
    "meft": ({"reversible": True, "integrator": "meft"}, "got True with integrator='meft', exp"),
    "experts": ({"experts": 4}, "config.model.experts: got 4, expected 0"),
    "window": ({"window": 8}, "config.model.window: got 8, expected 0"),
    "norms": ({"norm": "layer"}, "config.model.norm: got 'layer', expected 'rms': a llama"),
    "a qwen with other biases": ({"qk_norm": True, "bias": "qkv"}, "got bias='qkv'"),
    "a qwen2 with norms": ({"bias": "qkv", "norm": "layer"}, "expected 'rms': a qwen2"),
    "a gpt2 with SwiGLU": ({"learned_positions": 8}, "config.model.norm: got 'rms', expected 'lay"),
    "a gpt2 with groups": (
        {
            **{"learned_positions": 8, "norm": "layer", "activation": "gelu", "bias": "all"},
            "kv_heads": 2,
        },
        "heads=4 and kv_heads=2",
    ),
    "another network": ({"family": "resnet"}, "got a run of resnet, expected one of decoder, vit"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_runs_that_no_family_has(name):
    changes, message = EXPORTS[name]
    config = language_model()
    config.model.update({"reversible": False, **changes})
    with pytest.raises(UserError) as caught:
        family_for(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_target_that_holds_files(source, tmp_path):
    import_weights(source, tmp_path / "run")
    before = files_under(source)
    for target in (source, source / "config.json"):
        with pytest.raises(UserError, match="exists, expected a new or an empty folder"):
            export_weights(tmp_path / "run", target)
    assert files_under(source) == before
    with pytest.raises(UserError, match=r"cannot read .*/nothing/config\.json"):
        export_weights(tmp_path / "nothing", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_target_that_cannot_be_made_is_one_line(source, tmp_path):
    import_weights(source, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="Not a directory"):
        export_weights(tmp_path / "run", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_tokenizer_of_the_user_is_kept(source, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text("mine")
    assert "holds a run already (tokenizer.json)" in refusal(source, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "mine"


def test_an_empty_target_stays_when_the_export_fails(source, tmp_path):
    import_weights(source, tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "out")  # fills JAX's cache of compiled programs
    (tmp_path / "target").mkdir()
    with file_limit(12_000), pytest.raises(UserError, match="Make room"):
        export_weights(tmp_path / "run", tmp_path / "target")
    assert not any((tmp_path / "target").iterdir())


def test_a_full_disk_leaves_nothing_behind(source, tmp_path):
    """So that the same command works once there is room."""
    import_weights(source, tmp_path / "first")  # which fills JAX's cache of compiled programs
    export_weights(tmp_path / "first", tmp_path / "out")
    with file_limit(12_000), pytest.raises(UserError, match="Make room"):
        import_weights(source, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock"}
    import_weights(source, tmp_path / "run")
    with file_limit(12_000), pytest.raises(UserError, match="Make room"):
        export_weights(tmp_path / "run", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    export_weights(tmp_path / "run", tmp_path / "target")
