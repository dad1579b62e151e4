"""The command line: keys that are mistaken, tuples, help, and files that are no config."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from absl import flags
from ml_collections import config_flags

from revnet_jax.config import cli, flatten, image_classification, language_model
from revnet_jax.errors import UserError
from revnet_jax.figures import load_figure_class

ROOT = pathlib.Path(__file__).parents[2]
TEXTS, IMAGES = ([*flatten(knobs())] for knobs in (language_model, image_classification))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lr", ["schedule.learning_rate"]),
        ("bs", ["batch_size"]),
        ("wd", ["optimizer.weight_decay"]),
        ("batch", ["batch_size"]),
        ("steps", ["num_steps"]),
        ("schedule.num_steps", ["num_steps", "profile.num_steps"]),
        ("depth", ["model.layers"]),
        ("width", ["model.width"]),
        ("dtype", ["model.compute_dtype", "model.param_dtype", "optimizer.state_dtype"]),
        ("optimizer.lr", ["schedule.learning_rate"]),
        ("optimizer.learning_rate", ["schedule.learning_rate"]),
        ("model.dropuot", ["model.dropout"]),
        ("mdoel.layers", ["model.layers"]),
        ("rate", ["schedule.learning_rate"]),
        ("optimizer", ["optimizer.name"]),
        ("model", ["model.family"]),
        ("mesh", ["mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"]),
        ("xyzzy", []),
        ("", []),
    ],
)
def test_what_a_mistaken_key_is_taken_for(key, expected):
    assert cli.near_keys(key, TEXTS) == expected


def test_depth_and_width_of_networks_of_stages():
    assert cli.near_keys("layers", IMAGES) == cli.near_keys("depth", IMAGES) == ["model.units"]
    assert cli.near_keys("width", IMAGES) == ["model.channels"]


def parsed(*argv):
    known = flags.FlagValues()
    argv = ["program", *argv]
    holder = config_flags.DEFINE_config_dict(
        "config", image_classification(), flag_values=known, sys_argv=argv
    )
    known(argv)
    return holder.value


def test_the_last_flag_of_a_tuple_counts():
    config = parsed(
        "--config.model.units=(1,)",
        "--config.model.channels=8,8",
        "--config.model.units=(2, 2)",
        "--config.schedule.boundaries=7",
    )
    assert config.model.units == (2, 2)
    assert config.model.channels == (8, 8)
    assert config.schedule.boundaries == (7,)


def test_settings_are_listed_with_what_they_are():
    lines = cli.list_settings(language_model()).splitlines()
    assert [line.split("=")[0].split(".", 1)[1] for line in lines[2:]] == TEXTS
    listed = {line.split("=")[0].strip(): line for line in lines[2:]}
    assert listed["--config.data.name"].split(maxsplit=1) == [
        "--config.data.name=bytes",
        "bytes | characters | shards",
    ]
    assert listed["--config.optimizer.momentum"].split(maxsplit=1)[1] == "of sgd"
    assert not any("resnet" in line for line in lines)  # comments of other families
    images = cli.list_settings(image_classification())
    assert re.search(r" --config.schedule.boundaries='\(300, 450\)' +piecewise: steps", images)
    assert "digits | cifar10" in images
    assert "by channel: 0.5,0.5,0.5" in images
    assert re.search(r" --config.data.std='\(\)' +standard deviation", images)


def run(*argv, program="train"):
    command = [sys.executable, f"scripts/{program}.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help():
    result = run("--config=configs/digits.py", "--config.batch_size=7", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Trains a model")
    for flag in (
        "  --config: FILE",
        "  --workdir: ",
        "  --process_id: ",
        "  --config.batch_size=7\n",
    ):
        assert flag in result.stdout


@pytest.mark.parametrize(
    ("program", "flag", "expected"),
    [
        ("benchmark", "--seconds=nan", "a finite number, 0 or more"),
        ("generate", "--top_p=0", "a number in (0, 1]"),
        ("timeline", "--layers=2", "a whole number, 3 to 100,000"),
    ],
)
def test_flags_have_ranges(program, flag, expected):
    result = run("--workdir=w" if program == "generate" else "--json", flag, program=program)
    assert result.returncode == 1
    assert re.fullmatch(f"error: flag {flag}[.0]*: expected {re.escape(expected)}\n", result.stderr)


def test_an_empty_list_is_a_mistake():
    """It would stand for the default, and compile every strategy; or scale on this machine."""
    for flag in ("strategies", "scaling"):
        result = run("--config=configs/digits.py", f"--{flag}=", program="plan")
        assert result.returncode == 1
        assert result.stderr == (
            f"error: got an empty --{flag}, expected a list: leave it out for the default\n"
        )


def test_every_number_of_a_script_has_a_range():
    """Those of processes are checked together, in `training.distributed.start`."""
    number = re.compile(r"^(\w+) = flags\.DEFINE_(?:integer|float)\((.*?)\)$", re.S | re.M)
    found = 0
    for script in sorted((ROOT / "scripts").glob("*.py")):
        text = script.read_text()
        for name, arguments in number.findall(text):
            found += 1
            limited = f"cli.limit({name}, " in text or "lower_bound=" in arguments
            assert limited, f"{script.name}: {name} has no range"
    assert found > 15


def test_a_path_that_cannot_be_used_is_one_line(tmp_path):
    code = "from revnet_jax.config import cli; cli.run(lambda argv: open('{}'), required=())"
    for path, reason in ((tmp_path, "Is a directory"), ("a" * 300, "File name too long")):
        command = [sys.executable, "-c", code.format(path)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (1, f"error: {path}: {reason}\n")


def test_where_a_file_can_be_written(tmp_path):
    (tmp_path / "folder.png").mkdir()
    cli.check_output("plot", str(tmp_path / "a.png"), suffix=".png")
    cli.check_output("jsonl", str(tmp_path / "a"))
    for path in ("a.jpg", "folder.png", "none/a.png"):
        with pytest.raises(UserError, match=r"got --plot=.*, expected a .png file in a folder"):
            cli.check_output("plot", str(tmp_path / path), suffix=".png")
    with pytest.raises(UserError, match=r"got --jsonl=.*, expected a file in a folder that exists"):
        cli.check_output("jsonl", str(tmp_path))


def test_plots_say_which_extra_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--out needs matplotlib: run scripts/setup.sh plots"):
        load_figure_class("out", "a.png")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert [name.split(">")[0] for name in extras["plots"]] == ["matplotlib"]
    named = (ROOT / "scripts" / "setup.sh").read_text().split("extras: ")[1].split("\n# Needs")[0]
    assert {*re.findall(r"\w+", named)} == extras.keys()


FILES = {
    "nothing.py": (
        "def get_config(): return None",
        "got None from get_config of {path}, exp",
    ),
    "lambda.py": ("x = 1", "{path}: got no function get_config, expected one"),
    "name.py": (
        "def get_config():\n    return foo",
        "{path}, line 2: NameError: name 'foo'",
    ),
    "syntax.py": ("x =\n", "{path}, line 1: SyntaxError: invalid syntax"),
    "missing.py": ("open('/no/file')", "{path}, line 1: FileNotFoundError: .*/no/file"),
    "value.py": ("raise ValueError('a\\nb')", "{path}, line 1: ValueError: a b"),
    "import.py": ("import no_such_module", "{path}, line 1: ModuleNotFoundError: No module named"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_with_a_file_of_settings(name, tmp_path):
    """In one line; `_parse` calls this for whatever goes wrong."""
    text, message = FILES[name]
    path = tmp_path / name
    path.write_text(text)
    mistake = cli._file_mistake(["program", "--workdir=w", f"--config={path}"])
    assert re.match(message.format(path=re.escape(str(path))), mistake)
    assert "\n" not in mistake


def test_a_file_of_settings_that_fails_is_one_line(tmp_path):
    path = tmp_path / "settings.py"
    path.write_text("def get_config(): return None")
    result = run(f"--config={path}", "--config.seed=1")
    assert result.returncode == 1
    assert result.stderr == f"error: got None from get_config of {path}, expected a ConfigDict\n"
