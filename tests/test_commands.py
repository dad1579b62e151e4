"""Commands in README.md, CONTRIBUTING.md and docs/*.md: their flags, settings and files exist.

Each is taken apart as a shell would, and given to the parsers of the program that it starts.
Words in capitals, and "...", stand for what the reader fills in.
"""

import inspect
import math
import pathlib
import re
import runpy
import shlex
import tomllib
from typing import NamedTuple

import pytest
from absl import flags
from ml_collections import config_flags

from revnet_jax.config import ConfigError, cli, flatten
from revnet_jax.config.experiments import locate
from revnet_jax.config.ranges import check_ranges
from revnet_jax.planning.topology import TopologyError, parse_topology
from revnet_jax.training.sharding import mesh_sizes

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = set(PROJECT["project"]["optional-dependencies"])
MARKERS = {each.split(":")[0] for each in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
STARTS = r"(?:[A-Z_]+=\S+ )*(?:(?:\.venv/bin/)?python3? )?(?:-m )?(scripts/|docs/|pytest|revnet )"
PLACEHOLDER = re.compile(r"\.\.\.|\$?[A-Z][A-Z_]*\b(?!\w*[a-z])")


class Command(NamedTuple):
    page: str
    words: list[str]


def in_blocks(text):
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()


def in_text(text):
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))


def commands():
    for page in PAGES:
        text = page.read_text()
        for line in (*in_blocks(text), *in_text(text)):
            if re.match(STARTS, line) and " " in line:
                words = shlex.split(line, comments=True)
                start = re.compile(r"(scripts|docs)/|pytest$|revnet$")
                first = next(i for i, word in enumerate(words) if start.match(word))
                yield Command(page.name, words[first:])


COMMANDS = list(commands())
each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.words[0]}")


def program(word):
    """The Python program that a word starts; None for others."""
    if word == "scripts/train.sh":
        return ROOT / "scripts" / "train.py"
    return ROOT / word if word.endswith(".py") else None


def flags_of(file):
    """Names of the flags of a program of scripts/."""
    text = file.read_text()
    # Those that scripts share are defined by functions of `cli`.
    shared = (cli.define_config_flag, cli.define_process_flags, cli.define_checkpoint_flag)
    texts = [text, *(inspect.getsource(each) for each in shared if each.__name__ in text)]
    return {"help"}.union(*(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", each) for each in texts))


def given(words):
    """{flag: value} of words; those of a config as `config.KEY`."""
    pairs = (word.removeprefix("--").partition("=") for word in words if word.startswith("--"))
    return {name: value for name, _, value in pairs if name}


def check_settings(path, values):
    """Gives settings to the parser of a config file and checks their ranges. Returns the config."""
    file, _, arm = path.partition(":")
    assert (ROOT / file).is_file(), f"{path} is not there"
    arms = [arm] if arm and "/" not in arm else []  # one with a slash is a folder of the reader's
    config = runpy.run_path(str(ROOT / file))["get_config"](*arms)
    settings = {name: value for name, value in values.items() if not PLACEHOLDER.search(value)}
    argv = ["program", *(f"--{name}={value}" for name, value in settings.items())]
    for name in values:
        assert name.removeprefix("config.") in flatten(config), f"{name} is no setting"
    known = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=known, sys_argv=argv)
    known(argv)
    check_ranges(config)
    return config


def check_topology(name):
    """Raises for an unknown topology; its compiler need not be installed."""
    try:
        parse_topology(name)
    except TopologyError as error:
        if "compiler is not installed" not in str(error):
            raise


def check_mesh(config, topology):
    """Raises ConfigError if the mesh does not fit the devices of a topology, as of 2xv5e:4x4."""
    slices, shape = re.fullmatch(r"(?:(\d+)x)?\w+:(.*)", topology).groups()
    mesh_sizes(math.prod(int(n) for n in [slices or "1", *shape.split("x")]), **config.mesh)


def check_program(file, words):
    values = given(words)
    settings = {name: value for name, value in values.items() if name.startswith("config.")}
    unknown = {*values} - {*settings} - flags_of(file)
    assert not unknown, f"{file.name} has no flag {', '.join(unknown)}"
    given_to = lambda name: "" if PLACEHOLDER.search(values.get(name, "")) else values.get(name, "")
    topologies = [each for name in ("topology", "scaling") for each in given_to(name).split(",")]
    for topology in filter(None, topologies):
        check_topology(topology)
    if path := given_to("config"):
        config = check_settings(locate(path).removeprefix(f"{ROOT}/"), settings)
        if topology := given_to("topology"):
            check_mesh(config, topology)


def check_launcher(file, words):
    """The flags of a launcher, and those of the run behind `--`."""
    own, dashes, run = list(words), "--" in words, []
    if dashes:
        own, run = words[: words.index("--")], words[words.index("--") + 1 :]
    texts = file.read_text() + (file.parent / "common.sh").read_text()
    texts += (file.parent / "tpu_common.sh").read_text() if "tpu" in file.name else ""
    for name in given(own):
        assert re.search(rf"--{name}(?!\w)", texts), f"{file.name} has no flag {name}"
    check_program(ROOT / "scripts" / "train.py", run)


def check_tests(words):
    for word, before in zip(words, ["", *words], strict=False):
        if before == "-m":
            assert set(re.findall(r"\w+", word)) - {"and", "or", "not"} <= MARKERS
        elif word.startswith("tests/"):
            assert (ROOT / word).exists(), f"{word} is not there"


def test_there_are_commands():
    assert len(COMMANDS) > 60
    assert {"README.md", "running.md", "clusters.md"} <= {command.page for command in COMMANDS}


@each_command
def test_a_command_can_be_given(command):
    first, *words = command.words
    if first == "pytest":
        check_tests(words)
    elif first == "revnet":
        check_program(ROOT / "scripts" / f"{words[0]}.py", words[1:])
    elif first == "scripts/setup.sh":
        assert set(words[0].split(",")) <= EXTRAS
    elif first.startswith("scripts/launch/"):
        check_launcher(ROOT / first, words)
    elif file := program(first):
        check_program(file, words)
    else:
        assert (ROOT / first).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("scripts/plan.py --config=configs/digits.py --topolgy=h100:1", "no flag topolgy"),
        ("scripts/plan.py --config=configs/digits.py --topology=h100:3", "got topology 'h100:3'"),
        ("scripts/plan.py --config=configs/lm_1b.py --topology=h100:8", "fsdp=16"),
        ("scripts/train.sh --config=configs/digit.py", "configs/digit.py is not there"),
        ("scripts/train.sh --config=digits --checkpoint=best", "no flag checkpoint"),
        ("scripts/train.sh --config=digits --config.batchsize=3", "config.batchsize is no setting"),
        ("scripts/train.sh --config=digits --config.batch_size=0", "config.batch_size: got 0"),
        ("scripts/train.sh --config=digits --config.batch_size=x", "batch_size=x"),
        ("scripts/launch/slurm.sh --node=2 -- --config=digits", "no flag node"),
        ("scripts/launch/slurm.sh --nodes=2 -- --confg=digits", "no flag confg"),
        ("scripts/setup.sh cuda12", "cuda12"),
        ("pytest -m slowly", "slowly"),
        ("pytest tests/nothing.py", "tests/nothing.py is not there"),
    ],
)
def test_mistakes_are_found(words, message):
    with pytest.raises((AssertionError, ConfigError, TopologyError, flags.Error), match=message):
        test_a_command_can_be_given(Command("", words.split()))
