"""`scripts/slurm.sbatch` under a real Slurm: a controller and two nodes, all on this machine (``make test-slurm``).

Debian: ``apt-get install slurm-wlm munge``. The nodes' names have to be known to the resolver, so root is needed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_pdrop.train.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]
HOSTS = Path("/etc/hosts")
NODES = ("pdrop-a", "pdrop-b")
STEPS = 20
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.process,
    pytest.mark.trains,
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here: {', '.join(MISSING)} not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason=f"names of nodes are written into {HOSTS}, which root may do only"),
]

CONFIG = """\
ClusterName=pdrop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def until(what: str, done, seconds: float = 300) -> None:
    """Waits for ``done()``."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} seconds"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """A Slurm of two nodes; the directory of its files. ``SLURM_CONF`` leads the commands to it."""
    home = tmp_path_factory.mktemp("slurm")
    host, known = socket.gethostname().partition(".")[0], HOSTS.read_text()
    config = home / "slurm.conf"
    config.write_text(CONFIG.format(host=host, home=home, nodes=NODES, ports=free_ports(3)))
    (home / "state").mkdir()
    for node in NODES:
        (home / f"spool.{node}").mkdir()
    key = home / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    home.chmod(0o755)
    munge = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munged.pid", "log-file": "munged.log"}
    munge["seed-file"] = "munge.seed"
    daemons = []
    try:
        HOSTS.write_text(f"{known.rstrip()}\n127.0.0.1 {' '.join(NODES)}\n")
        words = [f"--{name}={home / file}" for name, file in munge.items()]
        daemons.append(subprocess.Popen(["munged", "--foreground", "--force", *words]))
        until("munged", (home / "munge.socket").exists, 30)
        environment = os.environ | {"SLURM_CONF": str(config)}
        daemons.append(subprocess.Popen(["slurmctld", "-D", "-f", config], env=environment))
        daemons += [subprocess.Popen(["slurmd", "-D", "-f", config, "-N", node], env=environment) for node in NODES]
        os.environ["SLURM_CONF"] = str(config)
        until("two idle nodes", lambda: slurm("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", 60)
        yield home
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        os.environ.pop("SLURM_CONF", None)
        HOSTS.write_text(known)


def slurm(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def submit(output: Path, directory: Path) -> str:
    """A job of stage 1 on both nodes; its number."""
    said = subprocess.run(
        [
            "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=20",
            f"--output={output}", "--export=ALL,NPROC_PER_NODE=1,OMP_NUM_THREADS=1",
            "scripts/slurm.sbatch", "scripts/pretrain.sh", "configs/tiny/pretrain.yaml", f"output_dir={directory}",
            f"train.max_steps={STEPS}", "train.logging_steps=1",
        ],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return said.stdout.strip()


def state(job: str) -> str:
    return slurm("squeue", "-h", "-j", job, "-t", "all", "-o", "%T").strip()


def steps(metrics: Path) -> list[dict]:
    return [row for row in read_metrics(metrics) if "loss" in row]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors")) + sorted(directory.glob("*.bin"))
    assert files, f"{directory} holds no weights: {sorted(path.name for path in directory.iterdir())}"
    read = [load_file(file) if file.suffix == ".safetensors" else torch.load(file) for file in files]
    return {name: tensor for part in read for name, tensor in part.items()}


def test_a_job_that_is_preempted_saves_requeues_itself_and_ends_like_one_that_was_not(cluster, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    job = submit(tmp_path / "whole.out", whole)
    until("the first job", lambda: state(job) in ("COMPLETED", "FAILED"))
    assert state(job) == "COMPLETED", (tmp_path / "whole.out").read_text()[-3000:]

    job, printed, metrics = submit(tmp_path / "stopped.out", stopped), tmp_path / "stopped.out", stopped / METRICS_FILE
    until("some steps", lambda: metrics.exists() and len(steps(metrics)) >= 3)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    until("the requeued job", lambda: state(job) == "PENDING")
    assert sorted(stopped.glob("checkpoint-*")), "the job was to save before it ended"
    before = steps(metrics)
    assert len(before) < STEPS, "the job was over before the signal"
    time.sleep(10)  # a node refuses a job that begins in the second in which it was taken away
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # not in two minutes
    until("the resumed job", lambda: state(job) in ("COMPLETED", "FAILED"))
    assert state(job) == "COMPLETED", printed.read_text()[-3000:]
    after = steps(metrics)
    assert after[: len(before)] == before, "the resumed job was to go on, not to start again"
    losses = [[row["loss"] for row in rows] for rows in (after, steps(whole / METRICS_FILE))]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    expected, got = weights(whole), weights(stopped)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
