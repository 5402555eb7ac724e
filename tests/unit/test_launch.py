"""Every script in every world it can find itself in, told by fake programs on PATH; nothing is started."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import TrainingArguments

from llava_pdrop.config.schema import Config
from llava_pdrop.config.values import keys_of
from tests.messages import says

ROOT = Path(__file__).parents[2]
CONFIG = "configs/llava15_7b/finetune_pdrop.yaml"

SCRIPTS = {
    "finetune_pdrop.sh": ("compare", "configs/tiny/finetune_pdrop.yaml"),
    "finetune.sh": ("train", "configs/tiny/finetune_pdrop.yaml"),
    "finetune_lora.sh": ("train", "configs/tiny/finetune_lora_pdrop.yaml"),
    "pretrain.sh": ("train", "configs/tiny/pretrain.yaml"),
    "ablate.sh": ("ablate", "configs/ablations/tiny.yaml"),
    "eval.sh": ("eval", "checkpoints/tiny/finetune_pdrop/pyramid_drop"),
}
"""Script -> command of llava-pdrop and default config."""

WORLD = (
    "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE", "TORCHRUN_ARGS", "DRY_RUN",
    "CUDA_VISIBLE_DEVICES", "LLAVA_PDROP_VENV", "LLAVA_PDROP_PYTHON", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
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

    def run(self, script: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / script), *arguments]
        return subprocess.run(command, cwd=cwd, env={**self.env, **env}, capture_output=True, text=True, check=False)

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


@pytest.mark.parametrize(
    ("before", "after"), [(["--debug", "seed=1"], []), ([], ["seed=1", "--debug"]), (["seed=1"], [])]
)
def test_options_and_overrides_stand_before_or_behind_the_config(
    machine: Machine, before: list[str], after: list[str]
) -> None:
    words = machine.command("finetune.sh", *before, CONFIG, *after)
    assert words[3:] == ["train", CONFIG, *before, *after]


def test_a_config_whose_path_looks_like_an_override(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "lr=1e-4.yaml"
    file.touch()
    assert machine.command("finetune.sh", str(file), "seed=1")[3:] == ["train", str(file), "seed=1"]


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
    assert done.returncode == 2 and re.match(
        "error: " + says("NNODES=2", "NODE_RANK", "0 to 1", "MASTER_ADDR"), done.stderr
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_several_nodes_under_slurm(machine: Machine, script: str) -> None:
    machine.program("scontrol", "printf 'node7\\nnode8\\n'")
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "42"}
    words = machine.command(script, CONFIG, SLURM_GPUS_ON_NODE="8", MASTER_PORT="1234", **env)
    step = ["srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
    step += ["bash", "-c", 'trap "" USR1; exec "$@"', "torchrun"]
    launcher = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "8", "--nnodes", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:1234", "--rdzv-id", "42"]
    assert words == [*step, *launcher, "-m", "llava_pdrop", SCRIPTS[script][0], CONFIG]


@pytest.mark.parametrize("script", SCRIPTS)
def test_several_nodes_inside_a_slurm_step(machine: Machine, script: str) -> None:
    """``srun --ntasks-per-node 1 bash scripts/...``: every task is one node's torchrun, no step in a step."""
    machine.program("scontrol", '[[ "$*" == "show hostnames node[7-8]" ]] && printf \'node7\\nnode8\\n\'')
    env = {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node[5-8]", "SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0"}
    env |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_STEP_NUM_TASKS": "2"}
    words = machine.command(script, CONFIG, SLURM_GPUS_ON_NODE="8", **env)
    launcher = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "8", "--nnodes", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:29500", "--rdzv-id", "42"]
    assert words == [*launcher, "-m", "llava_pdrop", SCRIPTS[script][0], CONFIG]
    done = machine.run(script, CONFIG, **env | {"SLURM_STEP_NUM_TASKS": "16"})
    assert done.returncode == 2
    assert re.match("error: " + says("16 tasks", "2 nodes", "--ntasks-per-node 1"), done.stderr)
    assert done.stderr.count("\n") == 1


def test_usr1_does_not_end_the_torchrun_of_a_slurm_task(machine: Machine) -> None:
    """Slurm starts tasks with signals as they are by default, whatever the shell that called srun ignores."""
    machine.program("scontrol", "echo node7")
    machine.program("mypython", 'kill -USR1 $$; echo "alive: $2"')
    machine.program("srun", 'while [[ "$1" != bash ]]; do shift; done; exec env --default-signal=USR1 "$@"')
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x", "LLAVA_PDROP_PYTHON": "mypython", "DRY_RUN": ""}
    done = machine.run("finetune.sh", CONFIG, **env)
    assert done.stdout == "alive: torch.distributed.run\n" and done.returncode == 0


def test_one_node_of_a_slurm_job_of_several(machine: Machine) -> None:
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "1"}
    assert machine.command("finetune.sh", CONFIG, SLURM_GPUS_ON_NODE="1", **env)[0] == PYTHON
    machine.program("scontrol", "echo node7")
    for shell in ("4294967290", "4294967291"):  # of salloc, of sbatch
        assert machine.command("finetune.sh", CONFIG, **env | {"SLURM_STEP_ID": shell})[0] == "srun"


def test_a_slurm_step_gets_all_cores_of_the_job(machine: Machine) -> None:
    machine.program("scontrol", "echo node7")
    env = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x", "SLURM_CPUS_PER_TASK": "64"}
    words = machine.command("finetune.sh", CONFIG, **env)
    assert words[words.index("--cpus-per-task") + 1] == "64" and words.index("--cpus-per-task") < words.index(PYTHON)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_deepspeed_hostfile(machine: Machine, tmp_path: Path, script: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    launcher = ["-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), "--master_port", "29500"]
    launcher.append("--no_local_rank")  # it would come first among the words of llava-pdrop
    for name in (str(hosts), "hosts"):  # a path is meant from where the user stands
        done = machine.run(script, CONFIG, "seed=1", cwd=tmp_path, HOSTFILE=name)
        words = shlex.split(done.stdout.splitlines()[-1])
        assert words == [PYTHON, *launcher, "--module", "llava_pdrop", SCRIPTS[script][0], CONFIG, "seed=1"]
    done = machine.run(script, CONFIG, HOSTFILE="nowhere")
    assert done.returncode == 2 and re.search(says("HOSTFILE=nowhere"), done.stderr)


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"NNODES": "two"}, says("NNODES=two", "whole number", "1")),
        ({"NPROC_PER_NODE": "0"}, says("NPROC_PER_NODE=0", "whole number", "1")),
        ({"NPROC_PER_NODE": "gpu"}, says("NPROC_PER_NODE=gpu", "whole number", "1")),
        ({"MASTER_PORT": "a"}, says("MASTER_PORT=a", "whole number", "1")),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "x"},
            says("NODE_RANK=2", "NNODES=2", "0 to 1"),
        ),
    ],
)
def test_a_world_that_cannot_be_is_one_line(machine: Machine, env: dict[str, str], error: str) -> None:
    done = machine.run("finetune.sh", CONFIG, **env)
    assert done.returncode == 2 and re.match("error: " + error, done.stderr) and done.stderr.count("\n") == 1


def test_more_arguments_for_torchrun(machine: Machine) -> None:
    words = machine.command("finetune.sh", CONFIG, TORCHRUN_ARGS="--max-restarts 3", NPROC_PER_NODE="2")
    assert words[3:7] == ["--nproc-per-node", "2", "--max-restarts", "3"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_shows_the_environment(machine: Machine, script: str) -> None:
    env = {"NCCL_DEBUG": "INFO", "WANDB_MODE": "offline", "WANDB_API_KEY": "secret", "HF_TOKEN": "secret"}
    *lines, command = machine.run(script, CONFIG, **env).stdout.splitlines()
    assert {"NCCL_DEBUG=INFO", "WANDB_MODE=offline", "MALLOC_MMAP_THRESHOLD_=8589934592"} <= set(lines)
    assert "secret" not in "".join(lines) and shlex.split(command)[0] == PYTHON


@pytest.mark.parametrize("script", SCRIPTS)
def test_segments_of_gpu_memory_can_grow_unless_the_user_says_otherwise(machine: Machine, script: str) -> None:
    def said(**env: str) -> list[str]:
        return [line for line in machine.run(script, CONFIG, **env).stdout.splitlines() if "ALLOC_CONF" in line]

    assert said() == ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert said(**{name: "max_split_size_mb:64"}) == [f"{name}=max_split_size_mb:64"]
        assert said(**{name: ""}) == [f"{name}=''"]


def test_dry_run_0_is_none(machine: Machine) -> None:
    machine.program("mypython", 'echo "started $*"')
    done = machine.run("finetune.sh", CONFIG, DRY_RUN="0", LLAVA_PDROP_PYTHON="mypython")
    assert done.stdout == f"started -m llava_pdrop train {CONFIG}\n"


def test_torchrun_leaves_time_to_save(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between SIGTERM and SIGKILL: ten minutes, as the Slurm file has it, and not torchrun's 30 seconds."""
    lines = machine.run("finetune.sh", CONFIG, NPROC_PER_NODE="2").stdout.splitlines()
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in lines
    own = machine.run("finetune.sh", CONFIG, NPROC_PER_NODE="2", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60").stdout
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60" in own.splitlines()
    from torch.distributed.launcher.api import LaunchConfig

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    world = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if not hasattr(world, "shutdown_timeout"):
        pytest.skip("torch before 2.12 always leaves 30 seconds")
    assert world.shutdown_timeout == 600


def test_another_python(machine: Machine) -> None:
    machine.program("mypython", "exit 0")
    assert machine.command("finetune.sh", CONFIG, LLAVA_PDROP_PYTHON="mypython")[0] == str(machine.bin / "mypython")
    done = machine.run("finetune.sh", CONFIG, LLAVA_PDROP_PYTHON="no-such-python")
    assert done.returncode == 2 and re.match("error: " + says("LLAVA_PDROP_PYTHON=no-such-python"), done.stderr)
    assert done.stderr.count("\n") == 1


def slurm(
    machine: Machine, tmp_path: Path, training: str, name: str = "finetune.sh", *words: str
) -> subprocess.CompletedProcess[str]:
    """Runs the batch file with ``training`` in place of a script; what Slurm is asked for goes to stdout."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / name).write_text(training)
    for program in ("scancel", "scontrol"):
        machine.program(program, f'echo "{program} $*"')
    env = {**machine.env, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), *words, CONFIG]
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


def test_slurm_file_queues_a_run_again_that_slurm_itself_told_to_stop(machine: Machine, tmp_path: Path) -> None:
    """SIGTERM to the training processes, which save and end with 85; this shell has heard of nothing."""
    done = slurm(machine, tmp_path, "exit 85")
    assert done.returncode == 85 and done.stdout == "scontrol requeue 42\n"


def test_slurm_file_runs_the_script_that_is_named(machine: Machine, tmp_path: Path) -> None:
    done = slurm(machine, tmp_path, 'echo "$0 $*"', "ablate.sh", "scripts/ablate.sh")
    assert done.returncode == 0 and done.stdout == f"scripts/ablate.sh {CONFIG}\n"


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(PYTHON).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (it is part of the test extra)")
def test_shellcheck() -> None:
    files = [*(ROOT / "scripts").glob("*.sh"), ROOT / "scripts" / "slurm.sbatch", ROOT / ".ci" / "run"]
    subprocess.run([SHELLCHECK, "-x", "-P", "SCRIPTDIR", *map(str, files)], check=True)


OFFICIAL = """
deepspeed model_name_or_path version data_path image_folder vision_tower pretrain_mm_mlp_adapter mm_projector_type
mm_vision_select_layer mm_vision_select_feature mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type
image_aspect_ratio group_by_modality_length bf16 tf32 output_dir num_train_epochs per_device_train_batch_size
per_device_eval_batch_size gradient_accumulation_steps evaluation_strategy save_strategy save_steps save_total_limit
learning_rate weight_decay warmup_ratio lr_scheduler_type logging_steps model_max_length gradient_checkpointing
dataloader_num_workers lazy_preprocess report_to run_name tune_mm_mlp_adapter unfreeze_mm_vision_tower
mm_vision_tower_lr layer_list image_token_ratio_list lora_enable lora_r lora_alpha mm_projector_lr
"""
"""Arguments of finetune.sh, pretrain.sh and finetune_lora.sh in ``scripts/v1_5`` (LLaVA, PyramidDrop) and ``v1_6``."""

VARIABLES = ("GPUS_PER_NODE", "NNODES", "MASTER_PORT", "CPUS_PER_TASK", "SRUN_ARGS", "CUDA_DEVICE_MAX_CONNECTIONS")
"""What the same scripts export."""


def flag_table() -> list[tuple[str, str]]:
    """(official, here) of every row of the table in scripts/README.md."""
    text = (ROOT / "scripts" / "README.md").read_text()
    rows = [line.strip("|").split("|") for line in text.split("| official | here |")[1].splitlines() if "|" in line]
    return [(official, here) for official, here in rows[1:]]


def test_no_flag_of_the_official_scripts_is_lost() -> None:
    named = " ".join(official for official, _ in flag_table())
    assert [name for name in OFFICIAL.split() if not re.search(rf"--{name}\b", named)] == []
    assert [name for name in VARIABLES if f"`{name}" not in named] == []


def test_every_key_in_the_table_of_flags_is_one() -> None:
    keys = {*keys_of(Config), "train.engine", *(f"train.{name}" for name in TrainingArguments.__dataclass_fields__)}
    for official, here in flag_table():
        for key in re.findall(r"`((?:model|data|train|lora|eval|pyramid_drop)\.(?!sh`)[a-z_0-9]+)", here):
            assert key in keys, f"{official}: {key}"
        if "`train.` and the same name" in here:
            for name in re.findall(r"--([a-z_0-9]+)", official):
                assert f"train.{name}" in keys, f"train.{name}"
