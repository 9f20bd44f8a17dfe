"""The pod launchers: their syntax, and the command lines that they make."""

import os
import shlex
import shutil
import string
import subprocess
import sys

import pytest
import yaml

from tests.common import ROOT, environment

LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_vm.sh", "slurm.sbatch")
FLAGS = ["--config=experiments/digits.py", "--config.trajectory.steps=(2,)"]


@pytest.fixture
def tools(tmp_path):
    """(a folder for PATH, a function that writes a program there)."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name: str, body: str):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)

    return folder, write


PRINT_ARGUMENTS = "printf '%s\\n' \"$@\""  # the body of a program


def launch(command, folder, check=True, cwd=ROOT, **variables):
    """Runs a launcher with the programs of `folder` first on its PATH."""
    variables = environment(PATH=f"{folder}:{os.environ['PATH']}") | variables
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    printed = f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not check or done.returncode == 0, printed
    return done


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_no_fault(name):
    beside = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    program = shutil.which("shellcheck") or (beside if os.path.exists(beside) else None)
    command = [program] if program else ["bash", "-n"]
    done = subprocess.run([*command, LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_jobsets_command_gives_train_its_flags_on_every_host_of_a_slice(tools):
    flags = [*FLAGS, "--workdir=a run"]
    template = string.Template((LAUNCH / "gke_jobset.yaml").read_text())
    jobset = yaml.safe_load(template.substitute(  # as envsubst does
        NAME="run", IMAGE="registry/ntm_jax:1", HOSTS=16, CHIPS=4, ACCELERATOR="tpu-v5p-slice",
        TOPOLOGY="4x4x4", FLAGS=shlex.join(flags)))["spec"]
    (replicated,) = jobset["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (rule,), (mistake,) = jobset["failurePolicy"]["rules"], spec["podFailurePolicy"]["rules"]
    assert mistake["action"] == "FailJob"
    assert mistake["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [2]}
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert spec["parallelism"] == spec["completions"] == 16
    assert spec["backoffLimit"] == 0, "one host's end must restart all"
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    folder, write = tools
    write("python", PRINT_ARGUMENTS)
    done = launch(container["command"], folder)
    assert done.stdout.splitlines() == ["-m", "launch.train", "--stop_status=75", *flags]


def test_slurm_gives_train_its_flags_in_every_task(tmp_path, tools):
    folder, write = tools
    write("python", f'{PRINT_ARGUMENTS} > "$OUT/$SLURM_PROCID"')
    write("scontrol", '[[ $* == "show hostnames here,there" ]] && '
          'printf "localhost\\nthere\\n" || echo "$*" >> "$REQUEUED"')
    write("srun", 'echo "$SRUN_CPUS_PER_TASK" > "$OUT/cpus"\n'
          'while [[ $1 == -* ]]; do shift; done\n'
          'for i in 0 1; do SLURM_PROCID=$i "$@" & tasks[i]=$!; done\n'
          'wait "${tasks[0]}" && wait "${tasks[1]}"')
    flags = [*FLAGS, "--workdir=a run"]
    launch(["bash", LAUNCH / "slurm.sbatch", *flags], folder, SLURM_JOB_ID="12345",
           SLURM_JOB_NODELIST="here,there", SLURM_NTASKS="2", OUT=str(tmp_path),
           REQUEUED=str(tmp_path / "requeued"), SLURM_CPUS_PER_TASK="32")
    assert (tmp_path / "cpus").read_text() == "32\n"
    for task in "01":
        assert (tmp_path / task).read_text().splitlines() == [
            "-m", "launch.train", *flags, "--stop_status=75",
            "--coordinator_address=localhost:22345", "--num_processes=2", f"--process_id={task}"]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("statuses", "status", "requeued"), [
    ((0, 0), 0, False), ((75, 75), 75, True), ((134, 75), 134, True), ((1, 1), 1, False),
    ((2, 143), 2, False), ((75, 143), 143, True)])
def test_slurm_requeues_after_a_stop_or_a_fault_and_never_after_a_mistake(
        tmp_path, tools, statuses, status, requeued):
    """Two tasks with these statuses; that of srun is their highest."""
    folder, write = tools
    write("scontrol", '[[ $1 == show ]] && echo localhost || echo "$*" >> "$REQUEUED"')
    write("python", f"statuses=({statuses[0]} {statuses[1]}); exit ${{statuses[SLURM_PROCID]}}")
    write("srun", 'shift; most=0\nfor i in 0 1; do SLURM_PROCID=$i "$@" || '
                  '{ status=$?; ((status < most)) || most=$status; }; done\nexit $most')
    command = ["bash", LAUNCH / "slurm.sbatch", "--config=x.py", "--workdir=y"]
    done = launch(command, folder, check=False, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="localhost",
                  SLURM_NTASKS="1", REQUEUED=str(tmp_path / "requeued"))
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


GCLOUD = """
printf '%s\\n' "$*" >> "$CALLS"
[[ $1 == compute && $2 == tpus ]] || exit 1
cd "$WORKER"
if [[ $4 == scp ]]; then cp "$5" .; fi
for argument in "$@"; do
  if [[ $argument == --command=* ]]; then bash -c "${argument#--command=}"; fi
done
"""


def test_tpu_vm_sends_a_revision_and_gives_train_its_flags(tmp_path, tools):
    checkout = tmp_path / "checkout"  # a repository of its own
    shutil.copytree(LAUNCH, checkout / "launch")
    shutil.copy(ROOT / "setup.py", checkout)
    author = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
    for command in (["init"], ["add", "--all"], [*author, "commit", "--message=all"]):
        subprocess.run(["git", *command], cwd=checkout, check=True, capture_output=True)
    folder, write = tools
    write("gcloud", GCLOUD)
    write("python", PRINT_ARGUMENTS)
    write("python3", 'mkdir -p "$3/bin" && touch "$3/bin/activate"')  # python3 -m venv
    write("pip", 'echo "pip $*" >> "$CALLS"')
    worker = tmp_path / "worker"
    worker.mkdir()
    (checkout / "setup.py").write_text("uncommitted")
    flags = [*FLAGS, "--workdir=a run"]  # a space, which must survive two shells
    command = [checkout / "launch" / "tpu_vm.sh", "queued-resources", "slice", "us-east5-a", *flags]
    done = launch(command, folder, cwd=tmp_path, CALLS=str(tmp_path / "calls"), WORKER=str(worker),
                  PYTHONPATH="", PROJECT="mine")
    assert done.stdout.splitlines()[-len(flags):] == flags
    assert "launch.train" in done.stdout
    assert "without the uncommitted changes" in done.stderr
    revision = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=checkout,
                              capture_output=True, text=True).stdout.strip()
    sent = worker / f"ntm_jax-{revision}" / "setup.py"
    assert sent.read_text() == (ROOT / "setup.py").read_text()
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--zone=us-east5-a --worker=all --node=all --project=mine") == 2
    assert "pip install --quiet -c constraints.txt -e .[tpu]" in calls


def test_a_mistake_with_tpu_vm_ends_it_before_anything_is_sent(tools):
    folder, write = tools
    write("gcloud", "echo called")
    done = launch([LAUNCH / "tpu_vm.sh", "tpu-vm", "slice", "us-east5-a", "--config=x"], folder,
                  check=False)
    assert done.returncode == 2
    assert "--workdir=FOLDER are needed" in done.stderr
    assert not done.stdout
