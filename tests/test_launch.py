"""The launchers, with programs in the place of gcloud, xpk and Slurm that note their arguments."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"

# What the launchers use of the system; nothing else is on their PATH.
TOOLS = "bash basename cat cp date dirname env flock git gzip id mkdir rm sed setsid sleep"
TOOLS = [*TOOLS.split(), "tail", "tar", "true"]
if any(shutil.which(tool) is None for tool in TOOLS):
    pytest.skip("the launchers need Linux with git and util-linux", allow_module_level=True)

# Notes its arguments, a line of quoted words in `calls`. Answers by the first line of `plan` whose
# key is among them: its status and what to print. A line is used up if another has the same key.
FAKE = """
called="${{0##*/}} $*" used='' rest='' status=0 out=''
printf '%q ' "${{0##*/}}" "$@" >>{folder}/calls
echo >>{folder}/calls
while IFS='|' read -r key code text; do
  if [[ -z $used && $called == *"$key"* ]]; then
    used="$key|$code|$text" status=$code out=$text
    if [[ $(<{folder}/plan) != *"$used"*$'\\n'"$key|"* ]]; then rest+="$used"$'\\n'; fi
  else
    rest+="$key|$code|$text"$'\\n'
  fi
done <{folder}/plan
printf %s "$rest" >{folder}/plan
echo "$out"
exit "$status"
"""

# A run's flags, with what a shell would like to meddle with.
NASTY = '--config.data.dir=/data/it\'s "here" $HOME $(x) `x` {a,b} * \\ ; &'
TRAIN = ["--config=configs/lm.py:big", "--workdir=runs/w", NASTY]
ON_BUCKET = ["--config=configs/lm.py:big", "--workdir=/mnt/bucket/runs/w", NASTY]

TPU = ["--name=rev", "--zone=us-west4-a", "--type=v5litepod-16", "--bucket=b-1", "--poll_seconds=0"]
LAUNCHERS = {
    "tpu_vm": [*TPU, "--delete"],
    "tpu_queued": [*TPU, "--spot", "--delete", "--project=my-project"],
    "gke_xpk": [
        *("--name=rev", "--cluster=c", "--zone=us-west4-a", "--type=v6e-16", "--num_slices=2"),
        "--storage=s",
    ],
    "slurm": ["--name=rev", "--nodes=2", "--gpus_per_node=8", "--time=12:00:00", "--account=a"],
}


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)


class Place:
    """A clone, a home and a PATH of their own."""

    def __init__(self, folder: Path, clone: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.clone = shutil.copytree(clone, folder / "clone")
        self.bin.mkdir()
        self.home.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.env = {"HOME": str(self.home), "PATH": str(self.bin), "TMPDIR": str(folder)}
        self.plan({})

    def fake(self, *names: str) -> None:
        for name in names:
            write_script(self.bin / name, FAKE.format(folder=self.folder))

    def plan(self, answers: dict) -> None:
        """answers: by key, pairs of a status and what to print; the last of them stays."""
        lines = [f"{key}|{code}|{out}\n" for key in answers for code, out in answers[key]]
        (self.folder / "plan").write_text("".join(lines))

    def run(self, name: str, *args: str) -> subprocess.CompletedProcess:
        (self.folder / "calls").write_text("")
        return subprocess.run(
            [str(self.clone / "scripts" / "launch" / f"{name}.sh"), *args],
            capture_output=True,
            text=True,
            env=self.env,
            cwd=self.home,  # a launcher finds its clone
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        return parse((self.folder / "calls").read_text())

    def verbs(self) -> list[str]:
        """What was done with the slice, without the questions asked before."""
        words = {"create", "delete", "scp", "rsync"}
        verbs = []
        for call in self.calls():
            remote = [arg for arg in call if arg.startswith("--command=")]
            if remote:
                verbs.append(remote[0].split("tpu_worker.sh ")[1].split()[0])
            elif "describe" not in call:
                verbs += [word for word in call if word in words]
        return verbs


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A git clone with the launchers, a config, and a setup.sh that makes a Python of no use."""
    clone = tmp_path_factory.mktemp("launch") / "clone"
    shutil.copytree(LAUNCH, clone / "scripts" / "launch")
    (clone / "configs").mkdir()
    (clone / "configs" / "lm.py").touch()
    setup = "mkdir -p .venv/bin; [ -e .venv/bin/python ] || cp scripts/setup.sh .venv/bin/python"
    write_script(clone / "scripts" / "setup.sh", f"echo setup $* ${{PYTHON:-}}; {setup}")
    me = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    for command in (["init", "-q", "--template="], ["add", "."], [*me, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    return clone


@pytest.fixture
def place(tmp_path, clone):
    return Place(tmp_path, clone)


@pytest.fixture
def cloud(place):
    """With gcloud, xpk and sbatch that find an empty project and do whatever they are asked."""
    place.fake("gcloud", "xpk", "sbatch")
    place.plan(EMPTY)
    return place


EMPTY = {
    "auth list": [[0, "me@example.com"]],
    "config get-value": [[0, "my-project"]],
    "queued-resources list": [[0, ""], [0, "ACTIVE"]],
    "tpu-vm list": [[0, ""], [0, "READY"]],
}


def parse(text: str) -> list[list[str]]:
    """Printed commands, as the shell reads them."""
    return [shlex.split(line) for line in text.splitlines()]


def remote_command(commands: list[list[str]], marker: str) -> list[str]:
    """What another shell makes of the --command=... in which `marker` is, after the marker."""
    (command,) = [
        arg.removeprefix("--command=")
        for words in commands
        for arg in words
        if arg.startswith("--command=") and marker in arg
    ]
    quoted = command.split(marker, 1)[1]
    bash = ["bash", "-c", f"printf '%s\\0' {quoted}"]
    read = subprocess.run(bash, capture_output=True, text=True, check=True)
    return read.stdout.split("\0")[:-1]


# -- Dry runs: the commands, and arguments that arrive as they were ------------------------------


def test_dry_run_of_a_slice(place):
    result = place.run("tpu_vm", *LAUNCHERS["tpu_vm"], "--dry_run", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    commands = parse(result.stdout)
    gcloud = [" ".join(words[1:5]) for words in commands if words[0] == "gcloud"]
    assert gcloud == [
        "auth list --filter=status:ACTIVE --format=value(account)",
        "config get-value project",
        "storage buckets describe gs://b-1",
        "compute tpus tpu-vm list",
        "compute tpus tpu-vm create",
        "compute tpus tpu-vm scp",
        "compute tpus tpu-vm ssh",
        "compute tpus tpu-vm ssh",
        "storage rsync --recursive --exclude=^checkpoints/",
        "compute tpus tpu-vm delete",
    ]
    create = next(words for words in commands if "create" in words)
    assert {"--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"} <= set(create)
    assert all("--worker=all" in words for words in commands if "ssh" in words or "scp" in words)
    assert remote_command(commands, "tpu_worker.sh install ") == ["b-1"]
    assert remote_command(commands, "tpu_worker.sh run ") == ON_BUCKET


def test_dry_run_of_a_queued_slice(place):
    result = place.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--dry_run", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    commands = parse(result.stdout)
    create = next(words for words in commands if "create" in words)
    assert create[1:6] == ["compute", "tpus", "queued-resources", "create", "rev"]
    assert {"--spot", "--node-id=rev", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(create)
    assert "--project=my-project" in create
    assert remote_command(commands, "tpu_worker.sh run ") == ON_BUCKET
    assert commands[-1][3:] == [
        *("queued-resources", "delete", "rev", "--zone=us-west4-a", "--project=my-project"),
        *("--quiet", "--force"),
    ]


def test_dry_run_of_a_workload(place):
    result = place.run("gke_xpk", *LAUNCHERS["gke_xpk"], "--dry_run", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    create = parse(result.stdout)[-1]
    assert create[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v6e-16", "--num-slices=2", "--storage=s"} <= set(create)
    assert {"--max-restarts=100", "--restart-on-exit-codes=75"} <= set(create)
    assert remote_command([create], "exec .venv/bin/python -u scripts/train.py ") == ON_BUCKET


def test_dry_run_of_a_job(place):
    result = place.run("slurm", *LAUNCHERS["slurm"], "--dry_run", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    sbatch = parse(result.stdout)[-1]
    assert sbatch[0] == "sbatch"
    assert {"--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--account=a"} <= set(sbatch)
    assert sbatch[-5:] == ["scripts/launch/slurm_job.sh", "100", *TRAIN]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_run_makes_the_calls_that_its_dry_run_prints(cloud, name):
    dry = cloud.run(name, *LAUNCHERS[name], "--dry_run", "--", *TRAIN)
    assert cloud.calls() == []
    real = cloud.run(name, *LAUNCHERS[name], "--", *TRAIN)
    assert real.returncode == 0, real.stderr
    programs = {"gcloud", "xpk", "sbatch"}
    assert cloud.calls() == [words for words in parse(dry.stdout) if words[0] in programs]
    told = [line[2:] for line in real.stderr.splitlines() if line.startswith("+ ")]
    assert told == [line for line in dry.stdout.splitlines() if line in told]


@pytest.mark.parametrize(
    ("type_", "workers", "devices"),
    [("v5litepod-8", 1, 8), ("v6e-16", 4, 16), ("v5p-8", 1, 4), ("v4-32", 4, 16), ("v3-8", 1, 8)],
)
def test_workers_and_devices_of_a_type(place, type_, workers, devices):
    write_script(place.clone / ".venv" / "bin" / "python", "exit 0")
    args = ["--name=rev", "--zone=us-west4-a", f"--type={type_}", "--dry_run", "--", *TRAIN]
    result = place.run("tpu_vm", *args)
    if workers > 1:  # which have no workdir in common
        assert f"--bucket is missing: the {workers} workers" in result.stderr
        result = place.run("tpu_vm", "--bucket=b-1", *args)
    assert f" --dry_run --platform=tpu --num_devices={devices} --num_slices=1\n" in result.stdout


# -- Mistakes: one line, before anything runs ----------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHERS)
def test_mistakes_are_one_line_and_run_nothing(cloud, name):
    good = LAUNCHERS[name]
    (cloud.clone / "configs" / "new.py").touch()
    without = lambda flag: [arg for arg in good if not arg.startswith(flag)]
    cases = [
        ([*good, "--nmae=x", "--", *TRAIN], "got --nmae, expected one of --"),
        (without("--name"), "--name is missing"),
        ([*without("--name"), "--name=No_Name!"], "got --name=No_Name!, expected "),
        ([*good, "--name"], "got --name, expected --name=VALUE"),
        ([*good, "--dry_run=1"], "got --dry_run=1, expected --dry_run without a value"),
        ([*good, "rev"], "got rev, expected --name=value"),
        ([*good, "--", "--workdir=w"], "--config is missing"),
        ([*good, "--", "--config", "configs/lm.py"], "got --config, expected --config=VALUE"),
        ([*good, "--", "--config=configs/lm.py"], "--workdir is missing"),
        ([*good, "--", "--config=no.py", "--workdir=w"], "got --config=no.py, expected a file"),
        ([*good, "--", *TRAIN, "--dry_run"], "got --dry_run after --, expected flags of the run"),
        ([*good, "--", *TRAIN, "--num_processes=2"], "got --num_processes=2 after --"),
    ]
    if name != "slurm":
        cases += [
            ([*good, "--", "--config=configs/new.py", "--workdir=w"], "HEAD, which is what"),
            ([*good, "--", "--config=configs/lm.py", "--workdir=/w"], "expected a relative path"),
            ([*good, "--", "--config=configs/lm.py", "--workdir=../w"], "expected a relative path"),
            ([*good, "--", "--config=configs/lm.py", "--workdir=."], "expected a relative path"),
            ([*good, "--", "--config=configs/lm.py", "--workdir=gs://b/w"], "a relative path"),
            ([*good, "--zone=us-west4", "--", *TRAIN], "expected a zone, such as us-west4-a"),
            ([*without("--type"), "--type=v7-8", "--", *TRAIN], "got --type=v7-8, expected"),
            ([*without("--delete")], "got nothing to do"),
            ([*good, "--fetch=w", "--", *TRAIN], "expected them alone"),
        ]
    for args, message in cases:
        result = cloud.run(name, *args)
        assert (result.returncode, result.stdout, cloud.calls()) == (1, "", []), args
        assert message in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_what_gcloud_lacks_is_said_before_anything_is_created(place):
    args = [*LAUNCHERS["tpu_vm"], "--", *TRAIN]
    assert "got no gcloud on PATH" in place.run("tpu_vm", *args).stderr
    place.fake("gcloud")
    for plan, message in [
        ({**EMPTY, "auth list": [[0, ""]]}, "gcloud auth login"),
        ({**EMPTY, "config get-value": [[0, ""]]}, "--project is missing"),
        ({**EMPTY, "buckets describe": [[1, ""]]}, "got --bucket=b-1, expected a bucket"),
    ]:
        place.plan(plan)
        result = place.run("tpu_vm", *args)
        assert result.returncode == 1
        assert message in result.stderr
        assert "create" not in place.verbs()


MESHES = {
    "tpu_vm": ["--platform=tpu", "--num_devices=16", "--num_slices=1"],
    "tpu_queued": ["--platform=tpu", "--num_devices=16", "--num_slices=1"],
    "gke_xpk": ["--platform=tpu", "--num_devices=32", "--num_slices=2"],
    "slurm": ["--platform=gpu", "--num_devices=16", "--num_slices=1"],
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_config_that_train_refuses_costs_nothing(cloud, name):
    write_script(cloud.clone / ".venv" / "bin" / "python", 'echo "error: $*" >&2; exit 1')
    result = cloud.run(name, *LAUNCHERS[name], "--", *TRAIN)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: " + " ".join(
        ["scripts/train.py", *TRAIN, "--dry_run", *MESHES[name]]
    )
    assert "create" not in cloud.verbs()
    assert "sbatch" not in [call[0] for call in cloud.calls()]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_names_every_flag(place, name):
    result = place.run(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    known = place.run(name, "--no_such_flag").stderr.split("expected one of ")[1].split(";")[0]
    assert [flag for flag in known.split() if flag not in result.stdout] == []


def test_uncommitted_changes_are_told(cloud):
    (cloud.clone / "configs" / "lm.py").write_text("# changed\n")
    result = cloud.run("tpu_vm", *LAUNCHERS["tpu_vm"], "--dry_run", "--", *TRAIN)
    assert "warning: uncommitted changes stay here; the machines get HEAD" in result.stderr


def test_what_is_copied_is_a_clone_that_can_run(cloud):
    cloud.run("tpu_vm", *LAUNCHERS["tpu_vm"], "--", *TRAIN)
    subprocess.run(["tar", "-xzf", cloud.folder / "revnet_jax-rev.tgz"], cwd=cloud.home, check=True)
    assert os.access(cloud.home / "revnet_jax" / "scripts" / "launch" / "tpu_worker.sh", os.X_OK)


# -- A slice ------------------------------------------------------------------------------------


def test_a_slice_that_is_there_is_taken_and_kept(cloud):
    cloud.plan({**EMPTY, "tpu-vm list": [[0, "READY"]]})
    result = cloud.run("tpu_vm", *TPU, "--", *TRAIN)
    assert result.returncode == 0
    assert cloud.verbs() == ["scp", "install", "run", "rsync"]
    assert "rev is kept, and costs" in result.stderr


def test_a_slice_in_another_state_is_refused(cloud):
    cloud.plan({**EMPTY, "tpu-vm list": [[0, "PREEMPTED"]]})
    result = cloud.run("tpu_vm", *TPU, "--", *TRAIN)
    assert "got the slice rev in state PREEMPTED, expected READY" in result.stderr
    assert cloud.verbs() == []


@pytest.mark.parametrize(("statuses", "status"), [([70], 70), ([75], 75), ([255, 71, 0], 0)])
def test_how_a_run_on_a_slice_ends(cloud, statuses, status):
    cloud.plan({**EMPTY, "tpu_worker.sh run": [[code, ""] for code in statuses]})
    result = cloud.run("tpu_vm", *LAUNCHERS["tpu_vm"], "--", *TRAIN)
    assert result.returncode == status
    ended = ["run"] * len(statuses)
    assert cloud.verbs() == ["create", "scp", "install", *ended, "rsync", "delete"]


def test_a_slice_that_cannot_be_reached_is_not_deleted(cloud):
    cloud.plan({**EMPTY, "tpu_worker.sh run": [[255, ""]]})
    result = cloud.run("tpu_vm", *LAUNCHERS["tpu_vm"], "--", *TRAIN)
    assert result.returncode == 1
    assert "the run goes on, and costs" in result.stderr
    assert cloud.verbs() == ["create", "scp", "install", *["run"] * 5]


def test_a_slice_that_cannot_be_made_ready_is_deleted_if_it_is_new(cloud):
    plan = {**EMPTY, "tpu_worker.sh install": [[1, ""]]}
    cloud.plan(plan)
    result = cloud.run("tpu_vm", *LAUNCHERS["tpu_vm"], "--", *TRAIN)
    assert "error: rev could not be made ready, see above\n" in result.stderr
    assert (result.returncode, cloud.verbs()[-1]) == (1, "delete")
    cloud.plan({**plan, "tpu-vm list": [[0, "READY"]]})
    result = cloud.run("tpu_vm", *LAUNCHERS["tpu_vm"], "--", *TRAIN)
    assert "it is kept, and costs" in result.stderr
    assert (result.returncode, cloud.verbs()[-1]) == (1, "install")


def test_a_stopped_run_goes_on_from_the_slice_that_holds_its_checkpoint(cloud):
    cloud.plan({**EMPTY, "tpu_worker.sh run": [[75, ""]]})
    args = ["--name=rev", "--zone=us-west4-a", "--type=v6e-8", "--delete", "--", *TRAIN]
    result = cloud.run("tpu_vm", *args)
    assert "rev is kept, and costs" in result.stderr
    assert "delete" not in cloud.verbs()


def test_results_that_are_on_the_slice_alone_keep_it(cloud):
    one = ["--name=rev", "--zone=us-west4-a", "--type=v6e-8", "--delete", "--", *TRAIN]
    assert cloud.run("tpu_vm", *one).returncode == 0
    assert cloud.verbs() == ["create", "scp", "install", "run", "scp", "delete"]
    fetch = next(call for call in cloud.calls() if "--recurse" in call)
    assert fetch[4:8] == ["scp", "--recurse", "rev:revnet_jax/runs/w", "runs"]
    cloud.plan({**EMPTY, "scp --recurse": [[1, ""]]})
    result = cloud.run("tpu_vm", *one)
    assert "rev is kept" in result.stderr
    assert cloud.verbs()[-1] == "scp"


@pytest.mark.parametrize("name", ["tpu_vm", "tpu_queued"])
def test_a_bucket_that_is_gone_keeps_no_slice(cloud, name):
    where = ["--name=rev", "--zone=us-west4-a", "--bucket=b-1"]
    cloud.plan({"storage buckets describe": [[1, ""]], **EMPTY})
    assert cloud.run(name, *where, "--delete").returncode == 0
    assert cloud.verbs() == ["delete"]
    result = cloud.run(name, *where, "--fetch=/w")
    assert "got --fetch=/w, expected a relative path" in result.stderr


@pytest.mark.parametrize("name", ["tpu_vm", "tpu_queued"])
def test_stop_fetch_and_delete_alone(cloud, name):
    where = ["--name=rev", "--zone=us-west4-a", "--bucket=b-1"]
    result = cloud.run(name, *where, "--delete", "--stop", "--fetch=runs/w")
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == ["stop", "rsync", "delete"]


def test_fetch_and_delete_of_a_workload(cloud):
    where = ["--name=rev", "--cluster=c", "--zone=us-west4-a", "--bucket=b-1"]
    result = cloud.run("gke_xpk", *where, "--delete", "--fetch=runs/w")
    assert result.returncode == 0, result.stderr
    assert cloud.calls()[-2][:3] == ["gcloud", "storage", "rsync"]
    assert cloud.calls()[-1][:4] == ["xpk", "workload", "delete", "--workload=rev"]


# -- A slice that is taken away -------------------------------------------------------------------

FIRST = ["create", "scp", "install", "run"]


def queue(requests: list[str], slices: list[str], runs: list[int], **more) -> dict:
    """A plan: the states that looks at the queue find, and how each run ends."""
    return {
        **EMPTY,
        "queued-resources list": [[0, state] for state in requests],
        "tpu-vm list": [[0, state] for state in slices],
        "tpu_worker.sh run": [[status, ""] for status in runs],
        **more,
    }


WAIT = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]  # requests, and their slices
BOOT = ["", "", "CREATING", "READY"]


def test_a_preempted_run_gets_another_slice_and_resumes(cloud):
    taken = (
        ["ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"],
        ["READY", "PREEMPTED", "", "", "READY"],
    )
    cloud.plan(queue([*WAIT, *taken[0]], [*BOOT, *taken[1]], [75, 75, 0]))
    result = cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    # Told to stop, it first looks whether the slice stays; on the first look it is still there.
    again = ["scp", "install", "run"]
    assert cloud.verbs() == [*FIRST, *again, "delete", *FIRST, "rsync", "delete"]


@pytest.mark.parametrize("ended", [255, 1])  # by ssh, by gcloud
def test_a_connection_that_ends_with_its_slice(cloud, ended):
    taken = ["ACTIVE", "", "ACTIVE"], ["PREEMPTED", "", "READY"]
    cloud.plan(queue([*WAIT, *taken[0]], [*BOOT, *taken[1]], [ended, 0]))
    result = cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == [*FIRST, "delete", *FIRST, "rsync", "delete"]


def test_a_run_told_to_stop_on_a_slice_that_stays_resumes_there(cloud):
    cloud.plan(queue(["", "ACTIVE"], ["", "READY"], [75, 75, 0]))
    assert cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN).returncode == 0
    assert cloud.verbs() == ["create", *["scp", "install", "run"] * 3, "rsync", "delete"]


def test_a_failure_of_train_is_not_retried(cloud):
    cloud.plan(queue(["", "ACTIVE"], ["", "READY"], [70]))
    result = cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN)
    assert result.returncode == 70
    assert "error: train.py failed" in result.stderr
    assert cloud.verbs() == [*FIRST, "rsync", "delete"]


def test_restarts_are_bounded(cloud):
    cloud.plan(queue(["", "ACTIVE"], ["", "READY"], [75]))
    args = [*LAUNCHERS["tpu_queued"], "--max_restarts=2", "--", *TRAIN]
    assert cloud.run("tpu_queued", *args).returncode == 75
    assert cloud.verbs().count("run") == 3


def test_failures_of_gcloud_are_bounded(cloud):
    cloud.plan(queue(["", "ACTIVE"], ["", "READY"], [255]))
    result = cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN)
    assert result.returncode == 1
    assert "gcloud failed 6 times in a row" in result.stderr
    assert cloud.verbs().count("run") == 6
    assert cloud.verbs()[-1] == "run"
    cloud.plan(queue([""], [""], [0], **{"queued-resources create": [[1, ""]]}))
    result = cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN)
    assert "gcloud failed 6 times in a row" in result.stderr
    assert cloud.verbs() == ["create"] * 6


def test_a_checkpoint_saved_between_failures_of_gcloud_is_progress(cloud):
    cloud.plan(queue(["", "ACTIVE"], ["", "READY"], [*[255] * 4, 75, *[255] * 4, 0]))
    assert cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN).returncode == 0


def test_a_look_at_the_queue_that_fails_is_no_news(cloud):
    plan = queue(["", "ACTIVE"], ["", "READY"], [0])
    plan["queued-resources list"] = [[0, ""], [1, ""], [1, ""], [0, "ACTIVE"]]
    cloud.plan(plan)
    assert cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN).returncode == 0
    assert cloud.verbs() == [*FIRST, "rsync", "delete"]


@pytest.mark.parametrize(
    ("request_state", "slice_state", "message"),
    [("FAILED", "", "the request failed"), ("", "READY", "got a slice rev without a request")],
)
def test_a_queue_that_cannot_give_a_slice(cloud, request_state, slice_state, message):
    cloud.plan(queue([request_state], [slice_state], [0]))
    result = cloud.run("tpu_queued", *LAUNCHERS["tpu_queued"], "--", *TRAIN)
    assert result.returncode == 1
    assert message in result.stderr
    assert cloud.verbs() == []


# -- On the machines ----------------------------------------------------------------------------


@pytest.fixture
def machine(place):
    """A worker: the clone in its home, a train.py that waits while ~/wait is there."""
    clone = place.home / "revnet_jax"
    shutil.copytree(place.clone, clone)
    train = """printf '%s\\0' "$@" >~/args; echo step 1; echo started >~/started
    while [ -e ~/orphan ]; do sleep 0.02; done &
    trap 'exit 75' TERM
    while [ -e ~/wait ]; do sleep 0.02; done
    exit $(cat ~/ends)"""
    write_script(clone / ".venv" / "bin" / "python", train)
    write_script(place.bin / "curl", 'echo "${WORKER:-1}"')
    place.clone = clone
    return place


def ask(machine, *args, **env):
    """Popen of tpu_worker.sh, in a session of its own, as ssh makes one."""
    return subprocess.Popen(
        [str(machine.clone / "scripts" / "launch" / "tpu_worker.sh"), *args],
        env=machine.env | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize(("ends", "status"), [(0, 0), (75, 75), (1, 70), (134, 71), (255, 70)])
def test_a_worker_tells_how_train_ended(machine, ends, status):
    (machine.home / "ends").write_text(str(ends))
    result = machine.run("tpu_worker", "run", *TRAIN)
    assert result.returncode == status
    assert ("step 1" in result.stderr) == (status in (70, 71))  # the log of a worker that failed
    args = (machine.home / "args").read_text().split("\0")[:-1]
    assert args == ["-u", "scripts/train.py", *TRAIN]


def test_a_run_ends_with_train_whatever_that_leaves_behind(machine):
    (machine.home / "ends").write_text("0")
    (machine.home / "orphan").touch()
    assert machine.run("tpu_worker", "run", *TRAIN).returncode == 0
    (machine.home / "orphan").unlink()


def test_the_first_worker_shows_its_log(machine):
    (machine.home / "ends").write_text("0")
    machine.env["WORKER"] = "0"
    assert machine.run("tpu_worker", "run", *TRAIN).stdout == "step 1\n"


def test_a_run_outlives_its_connection_and_is_found_again(machine):
    (machine.home / "ends").write_text("0")
    (machine.home / "wait").touch()
    lost = ask(machine, "run", *TRAIN)
    until(machine.home / "started")
    os.killpg(lost.pid, signal.SIGKILL)
    lost.communicate()
    (machine.home / "started").unlink()
    again = ask(machine, "run", *TRAIN)
    other = machine.run("tpu_worker", "run", "--config=other.py")
    assert other.returncode == 70
    assert "error: got --config=other.py , expected the live run's --config=" in other.stderr
    assert again.poll() is None
    (machine.home / "wait").unlink()
    again.communicate()
    assert again.returncode == 0
    assert not (machine.home / "started").exists()


def test_a_run_is_stopped(machine):
    (machine.home / "wait").touch()
    live = ask(machine, "run", *TRAIN)
    until(machine.home / "started")
    assert machine.run("tpu_worker", "stop").returncode == 0
    live.communicate()
    assert live.returncode == 75
    assert "no run is live" in machine.run("tpu_worker", "stop").stdout


def test_a_worker_installs_the_clone_and_mounts_the_bucket(machine):
    machine.fake("findmnt", "gcsfuse", "sudo")
    machine.plan({"findmnt": [[1, ""], [0, "b-1"]]})
    install = machine.run("tpu_worker", "install", "b-1")
    assert install.stdout.split() == ["setup", "tpu", ".venv/bin/python"]
    calls = machine.calls()
    assert [call[0] for call in calls] == ["findmnt", "sudo", "gcsfuse"]
    assert calls[-1][-2:] == ["b-1", "/mnt/bucket"]
    assert {"--implicit-dirs", "--metadata-cache-ttl-secs=0"} <= set(calls[-1])
    assert machine.run("tpu_worker", "install", "b-1").returncode == 0  # it is mounted by now
    assert [call[0] for call in machine.calls()] == ["findmnt"]
    other = machine.run("tpu_worker", "install", "b-2")
    assert other.returncode == 1
    assert "error: got the bucket b-1 at /mnt/bucket, expected b-2" in other.stderr
    machine.run("tpu_worker", "install")
    assert machine.calls() == []


def test_a_worker_without_a_recent_python_gets_one(machine):
    shutil.rmtree(machine.clone / ".venv")
    machine.fake("python3", "uv")
    machine.plan({"--user-base": [[0, str(machine.folder)]], "uv python find": [[0, "/py3.12"]]})
    assert "setup tpu /py3.12" in machine.run("tpu_worker", "install").stdout


# -- A Slurm job --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "requeued"),
    [(0, 0, 0, False), (75, 0, 0, True), (75, 3, 75, False), (1, 0, 1, False)],
)
def test_a_job_goes_back_into_the_queue_when_it_was_stopped(
    place, ends, restarts, status, requeued
):
    place.fake("srun", "scontrol")
    place.plan({"srun": [[ends, ""]]})
    place.env |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    if restarts:
        place.env["SLURM_RESTART_COUNT"] = str(restarts)
    result = place.run("slurm_job", "3", *TRAIN)
    assert result.returncode == status, result.stderr
    srun, *more = place.calls()
    assert srun[-len(TRAIN) :] == TRAIN
    assert "--cpus-per-task=8" in srun
    assert more == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_a_cancelled_job_stays_cancelled(place):
    place.fake("scontrol")
    write_script(place.bin / "srun", "kill -TERM $PPID; exit 75")
    place.env["SLURM_JOB_ID"] = "7"
    assert place.run("slurm_job", "3", *TRAIN).returncode == 75
    assert place.calls() == []


# -- All of them --------------------------------------------------------------------------------


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on PATH")
    scripts = sorted(str(path) for path in LAUNCH.glob("*.sh"))
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == ""
