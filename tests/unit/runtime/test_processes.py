"""Processes by number and start, and the end of those whose launcher is gone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llava_pdrop.config.load import load_config
from llava_pdrop.runtime import processes
from llava_pdrop.runtime.lock import LOCK_FILE
from llava_pdrop.runtime.processes import started
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from tests.messages import says

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

needs_torchrun = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def test_a_process_has_a_start_until_it_ends():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        first = started(process.pid)
        assert first is not None and first >= started(os.getpid()) and started(process.pid) == first
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert started(process.pid) is None  # though its number is not free yet
    assert started(process.pid) is None


def test_where_processes_cannot_be_seen_nothing_is_concluded(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    with pytest.raises(FileNotFoundError):
        started(os.getpid())
    assert processes.machine().endswith(os.readlink("/proc/self/ns/pid"))


def test_who_was_launched_by_nobody_outlives_his_parent(tmp_path):
    """``nohup llava-pdrop train ... &`` and the shell is left: no launcher, no end."""
    child = "import time; from llava_pdrop.runtime.processes import *; end_with_launcher(); time.sleep(600)"
    variables = {name: value for name, value in ENVIRONMENT.items() if name not in processes.STARTED_BY}
    shell = ["bash", "-c", f'"{sys.executable}" -c "{child}" >/dev/null 2>&1 & echo $!']
    number = int(subprocess.run(shell, env=variables, stdout=subprocess.PIPE, timeout=60, check=True).stdout)
    process = psutil.Process(number)
    time.sleep(4 * processes.SECONDS_BETWEEN_LOOKS)
    assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    process.kill()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@needs_torchrun
@pytest.mark.parametrize("script", [False, True])
def test_ranks_end_when_torchrun_is_killed_and_the_same_command_goes_on(tiny_config, tmp_path, script):
    """SIGKILL of the launcher alone: its ranks must not go on into the run that is started next."""
    train = {"max_steps": 100_000, "save_strategy": "steps", "save_steps": 20, "use_cpu": True, "disable_tqdm": True}
    train |= {"save_total_limit": 2}
    config = tiny_config(train=train)
    output = Path(load_config(config).output_dir)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    work = ["-m", "llava_pdrop", "train", str(config)]
    if script:  # what wraps every rank of a machine (numactl, a container) stands between it and its launcher
        wrapper = tmp_path / "wrap.sh"
        wrapper.write_text(f'#!/bin/bash\n"{sys.executable}" "$@"\nexit $?\n')
        wrapper.chmod(0o755)
        command += ["--no-python", str(wrapper)]
    log = (tmp_path / "log.txt").open("w+")
    with subprocess.Popen([*command, *work], env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=log) as launcher:
        deadline = time.monotonic() + 300
        while not list(output.glob("checkpoint-*")):
            assert launcher.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.1)
        ranks = [one for one in psutil.Process(launcher.pid).children(recursive=True) if "train" in one.cmdline()]
        owner = json.loads((output / LOCK_FILE).read_text())["process"]
        assert owner in [rank.pid for rank in ranks]
        launcher.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not [rank for rank in alive if lives(rank)]
    assert re.search(says("launcher", str(launcher.pid), "without saving"), Path(log.name).read_text())
    step = read_metrics(output / METRICS_FILE)[-1]["step"]
    again = [*command, *work, f"train.max_steps={step + 5}"]
    done = subprocess.run(again, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout and not (output / LOCK_FILE).exists()


def test_the_same_command_twice(tiny_config):
    """The second is refused and changes nothing; killed, the first leaves nothing that blocks a third."""
    train = {"max_steps": 100_000, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    config = tiny_config(train=train)
    output = Path(load_config(config).output_dir)
    command = [sys.executable, "-m", "llava_pdrop", "train", str(config)]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        while first.poll() is None and not (output / METRICS_FILE).is_file():
            time.sleep(0.1)
        second = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and len(second.stderr.splitlines()) == 1, second.stderr
        assert re.search(says(str(config), "output_dir", str(output), "in use", f"process {first.pid}"), second.stderr)
        steps = len(read_metrics(output / METRICS_FILE))
        first.kill()
    assert len(read_metrics(output / METRICS_FILE)) >= steps
    done = subprocess.run([*command, "train.max_steps=2"], env=ENVIRONMENT, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0 and not (output / LOCK_FILE).exists()
    shutil.rmtree(output)
