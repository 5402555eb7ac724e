"""Every script in every world it can find itself in, told by fake programs on PATH; nothing is started."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "configs/llava15_7b/finetune_pdrop.yaml"

SCRIPTS = {
    "finetune_pdrop.sh": ("compare", "configs/tiny/finetune_pdrop.yaml"),
    "finetune.sh": ("train", "configs/tiny/finetune_pdrop.yaml"),
    "finetune_lora.sh": ("train", "configs/tiny/finetune_lora_pdrop.yaml"),
    "pretrain.sh": ("train", "configs/tiny/pretrain.yaml"),
}
"""Script -> command of llava-pdrop and default config. eval.sh is always one process."""

WORLD = (
    "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE", "TORCHRUN_ARGS", "DRY_RUN",
    "CUDA_VISIBLE_DEVICES", "LLAVA_PDROP_VENV", "LLAVA_PDROP_PYTHON",
)  # fmt: skip


class Machine:
    """A directory of fake programs, first on PATH."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        kept = {k: v for k, v in os.environ.items() if k not in WORLD and not k.startswith("SLURM_")}
        self.env = {**kept, "PATH": f"{self.bin}:{os.environ['PATH']}", "DRY_RUN": "1"}
        self.program("nvidia-smi", "exit 9")

    def program(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)

    def gpus(self, count: int) -> None:
        self.program("nvidia-smi", "\n".join(f"echo 'GPU {i}: fake'" for i in range(count)))

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / script), *arguments]
        return subprocess.run(command, cwd=ROOT, env={**self.env, **env}, capture_output=True, text=True, check=False)

    def command(self, script: str, *arguments: str, **env: str) -> list[str]:
        """Words of the command that would be started."""
        done = self.run(script, *arguments, **env)
        assert done.returncode == 0, done.stderr
        return shlex.split(done.stdout.splitlines()[-1])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


PYTHON = str(ROOT / ".venv" / "bin" / "python")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_one_machine(machine: Machine, script: str, gpus: int) -> None:
    machine.gpus(gpus)
    work = ["-m", "llava_pdrop", SCRIPTS[script][0], CONFIG, "seed=1"]
    words = machine.command(script, CONFIG, "seed=1")
    if gpus < 2:
        assert words == [PYTHON, *work]
    else:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--standalone"]
        assert words == [PYTHON, *launcher, *work]


@pytest.mark.parametrize("script", SCRIPTS)
def test_default_config_takes_one_process(machine: Machine, script: str) -> None:
    machine.gpus(8)
    assert machine.command(script, "seed=1") == [PYTHON, "-m", "llava_pdrop", *SCRIPTS[script], "seed=1"]


@pytest.mark.parametrize(
    ("env", "processes"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,3,5"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"NPROC_PER_NODE": "2"}, "2"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NUM_NODES": "1"}, "4"),
    ],
)
def test_only_gpus_this_job_may_use(machine: Machine, env: dict[str, str], processes: str | None) -> None:
    machine.gpus(8)
    words = machine.command("finetune.sh", CONFIG, **env)
    assert (words[words.index("--nproc-per-node") + 1] if "--nproc-per-node" in words else None) == processes


@pytest.mark.parametrize("script", SCRIPTS)
def test_several_nodes_by_hand(machine: Machine, script: str) -> None:
    machine.gpus(8)
    words = machine.command(script, CONFIG, NNODES="4", NODE_RANK="2", MASTER_ADDR="node0")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "8", "--nnodes", "4", "--node-rank", "2"]
    launcher += ["--master-addr", "node0", "--master-port", "29500"]
    assert words == [PYTHON, *launcher, "-m", "llava_pdrop", SCRIPTS[script][0], CONFIG]


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_several_nodes_need_rank_and_address(machine: Machine, missing: str) -> None:
    env = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"}
    del env[missing]
    done = machine.run("finetune.sh", CONFIG, **env)
    assert done.returncode == 2 and done.stderr.startswith("error: NNODES=2 also needs NODE_RANK (0 to 1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_several_nodes_under_slurm(machine: Machine, script: str) -> None:
    machine.program("scontrol", "printf 'node7\\nnode8\\n'")
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "42"}
    words = machine.command(script, CONFIG, SLURM_GPUS_ON_NODE="8", MASTER_PORT="1234", **env)
    step = ["srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
    launcher = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "8", "--nnodes", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:1234", "--rdzv-id", "42"]
    assert words == [*step, *launcher, "-m", "llava_pdrop", SCRIPTS[script][0], CONFIG]


def test_a_deepspeed_hostfile(machine: Machine, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    words = machine.command("finetune.sh", CONFIG, HOSTFILE=str(hosts))
    launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--master_port", "29500"]
    assert words == [PYTHON, *launcher, "--module", "llava_pdrop", "train", CONFIG]
    done = machine.run("finetune.sh", CONFIG, HOSTFILE="nowhere")
    assert done.returncode == 2 and "HOSTFILE=nowhere does not exist" in done.stderr


def test_more_arguments_for_torchrun(machine: Machine) -> None:
    words = machine.command("finetune.sh", CONFIG, TORCHRUN_ARGS="--max-restarts 3", NPROC_PER_NODE="2")
    assert words[3:7] == ["--nproc-per-node", "2", "--max-restarts", "3"]


@pytest.mark.parametrize(
    "env", [{}, {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x"}, {"NNODES": "2"}, {"HOSTFILE": "x"}]
)
def test_evaluation_is_one_process(machine: Machine, env: dict[str, str]) -> None:
    machine.gpus(8)
    words = machine.command("eval.sh", "checkpoints/x", "eval.limit=3", **env)
    assert words == [PYTHON, "-m", "llava_pdrop", "eval", "checkpoints/x", "eval.limit=3"]


def test_dry_run_shows_the_environment(machine: Machine) -> None:
    lines = machine.run("finetune.sh", CONFIG, NCCL_DEBUG="INFO").stdout.splitlines()
    assert "NCCL_DEBUG=INFO" in lines and "MALLOC_MMAP_THRESHOLD_=8589934592" in lines


def test_another_python(machine: Machine) -> None:
    machine.program("mypython", "exit 0")
    assert machine.command("finetune.sh", CONFIG, LLAVA_PDROP_PYTHON="mypython")[0] == str(machine.bin / "mypython")
    done = machine.run("finetune.sh", CONFIG, LLAVA_PDROP_PYTHON="no-such-python")
    assert done.returncode == 2 and done.stderr == "error: LLAVA_PDROP_PYTHON=no-such-python is not a program\n"


def slurm(machine: Machine, tmp_path: Path, training: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch file with ``training`` in place of finetune.sh; what Slurm is asked for goes to stdout."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "finetune.sh").write_text(training)
    for name in ("scancel", "scontrol"):
        machine.program(name, f'echo "{name} $*"; [[ {name} == scontrol ]] || pkill -USR1 -f "sleep 987"; exit 0')
    env = {**machine.env, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), CONFIG]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_slurm_file_passes_the_status_on(machine: Machine, tmp_path: Path) -> None:
    assert slurm(machine, tmp_path, "exit 0").returncode == 0


def test_slurm_file_does_not_queue_a_broken_run_again(machine: Machine, tmp_path: Path) -> None:
    done = slurm(machine, tmp_path, "exit 3")
    assert done.returncode == 3 and "requeue" not in done.stdout


def test_slurm_file_queues_a_run_again_that_was_told_to_stop(machine: Machine, tmp_path: Path) -> None:
    saves = "trap 'echo saved; exit 85' USR1; kill -USR1 $PPID; sleep 0.5; kill -USR1 $$; sleep 5; exit 0"
    done = slurm(machine, tmp_path, saves)
    assert done.returncode == 85
    assert done.stdout.split("\n")[:3] == ["scancel --full --signal=USR1 42", "saved", "scontrol requeue 42"]


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(PYTHON).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (it is part of the test extra)")
def test_shellcheck() -> None:
    files = [*(ROOT / "scripts").glob("*.sh"), ROOT / "scripts" / "slurm.sbatch", ROOT / ".ci" / "run"]
    subprocess.run([SHELLCHECK, "-x", "-P", "SCRIPTDIR", *map(str, files)], check=True)
