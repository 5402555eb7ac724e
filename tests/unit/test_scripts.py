"""The scripts setup.sh, finetune_pdrop.sh and bench.sh, with a Python that only writes down how it is called.

The one thing it passes on to the real Python is the lock between two setups.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.messages import says

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """\
#!/usr/bin/env bash
printf '%s|%s|%s\\n' "$(basename "$0")" "$PWD" "$*" >>"$CALLS"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *"-m pip install"*torch) [[ -z "${BROKEN_PIP:-}" ]] || { echo "no such package" >&2; exit 1; } ;;
    "-m llava_pdrop"*)
        printf '%s ' "$MALLOC_MMAP_THRESHOLD_" "$MALLOC_TRIM_THRESHOLD_" >>"$CALLS"
        printf '%s\\n' "${PYTORCH_CUDA_ALLOC_CONF:-none}" >>"$CALLS" ;;
    *fcntl*) exec "$REAL_PYTHON" "$@" ;;
    *version_info*) exit "${TOO_OLD:-0}" ;;
    "-V") echo "Python 3.99" ;;
esac
"""

MEMORY = "8589934592 17179869184 expandable_segments:True"
"""What it writes down of the memory settings it was started with."""


class Checkout:
    """A copy of the scripts with a fake interpreter beside it."""

    def __init__(self, directory: Path) -> None:
        self.root, self.calls = directory / "check out", directory / "calls"
        (self.root / "scripts").mkdir(parents=True)
        for file in (ROOT / "setup.py", *(ROOT / "scripts").glob("*.*")):
            shutil.copy(file, self.root / file.relative_to(ROOT))
        self.python = directory / "fake_python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.env = {**os.environ, "PYTHON": str(self.python), "CALLS": str(self.calls), "NPROC_PER_NODE": "1"}
        self.env["REAL_PYTHON"] = sys.executable
        for name in (
            "LLAVA_PDROP_VENV",
            "MALLOC_MMAP_THRESHOLD_",
            "MALLOC_TRIM_THRESHOLD_",
            "TORCHRUN_ARGS",
            "LLAVA_PDROP_PYTHON",
            "PYTORCH_ALLOC_CONF",
            "PYTORCH_CUDA_ALLOC_CONF",
            "LLAVA_PDROP_IMAGE",
            "CONSTRAINTS",
        ):
            self.env.pop(name, None)

    def run(
        self, script: str, *arguments: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.root / "scripts" / script), *arguments]
        return subprocess.run(
            command, cwd=cwd or self.root, env={**self.env, **env}, capture_output=True, text=True, check=False
        )

    def called(self) -> list[str]:
        """The lines written since the last call."""
        lines = self.calls.read_text().splitlines() if self.calls.is_file() else []
        self.calls.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_setup_installs_torch_first_then_the_project_and_only_once(checkout: Checkout) -> None:
    done = checkout.run("setup.sh")
    assert done.returncode == 0, done.stderr
    installs = [line for line in checkout.called() if "pip install" in line]
    assert [line.split()[-1] for line in installs] == ["torch", ".[data,test]"]
    assert all("-c " in line and "constraints.txt" in line and "--user" not in line for line in installs)
    assert len(done.stderr.splitlines()) == 4 and not done.stdout  # a line per step, and where it is
    assert (checkout.root / ".venv" / "bin" / "python").is_file()
    assert checkout.run("setup.sh").returncode == 0
    assert checkout.called() == []


def test_setup_again_when_the_pins_change(checkout: Checkout) -> None:
    checkout.run("setup.sh")
    checkout.called()
    with (checkout.root / "scripts" / "constraints.txt").open("a") as pins:
        pins.write("rich==15.0.0\n")
    checkout.run("setup.sh")
    lines = checkout.called()
    assert sum("pip install" in line for line in lines) == 2 and not any("-m venv" in line for line in lines)


def test_setup_in_another_place(checkout: Checkout, tmp_path: Path) -> None:
    assert checkout.run("setup.sh", cwd=tmp_path, LLAVA_PDROP_VENV="elsewhere").returncode == 0
    assert (tmp_path / "elsewhere" / "bin" / "python").is_file() and not (checkout.root / ".venv").exists()


def test_setup_with_other_constraints_keeps_to_them(checkout: Checkout, tmp_path: Path) -> None:
    """The other scripts call setup.sh without a word about the file: that must not bring the CPU's torch back."""
    pins = "scripts/constraints-cuda.txt"
    assert checkout.run("setup.sh", cwd=tmp_path, CONSTRAINTS=pins).returncode == 0  # seen from the checkout
    installs = [line for line in checkout.called() if "pip install" in line]
    assert len(installs) == 2 and all(f"-c {checkout.root}/{pins} " in line for line in installs)
    for again in ({}, {"CONSTRAINTS": pins}, {"CONSTRAINTS": str(checkout.root / pins)}):
        assert checkout.run("setup.sh", **again).returncode == 0
        assert checkout.called() == []
    with (checkout.root / pins).open("a") as file:
        file.write("rich==15.0.0\n")
    assert checkout.run("setup.sh").returncode == 0
    installs = [line for line in checkout.called() if "pip install" in line]
    assert len(installs) == 2 and all(f"-c {checkout.root}/{pins} " in line for line in installs)
    assert checkout.run("setup.sh", CONSTRAINTS="scripts/constraints.txt").returncode == 0
    installs = [line for line in checkout.called() if "pip install" in line]
    assert len(installs) == 2 and all(f"-c {checkout.root}/scripts/constraints.txt " in line for line in installs)


def test_constraints_from_where_the_user_stands(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("torch==2.11.0\n")
    assert checkout.run("setup.sh", cwd=tmp_path, CONSTRAINTS="mine.txt").returncode == 0
    assert f"-c {tmp_path}/mine.txt torch" in "".join(checkout.called())
    assert checkout.run("setup.sh").returncode == 0 and checkout.called() == []  # from anywhere else, too
    (tmp_path / "mine.txt").unlink()
    done = checkout.run("setup.sh")
    assert done.returncode == 2 and re.match("error: " + says(f"{tmp_path}/mine.txt"), done.stderr)
    done = checkout.run("setup.sh", CONSTRAINTS="scripts/constraints-gpu.txt")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.match("error: " + says(f"{checkout.root}/scripts/constraints-gpu.txt"), done.stderr)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"TOO_OLD": "1"}, says("3.11")),
        ({"PYTHON": "no-such-python"}, says("PYTHON=no-such-python")),
    ],
)
def test_a_bad_interpreter_is_one_line(checkout: Checkout, env: dict[str, str], expected: str) -> None:
    for script in ("setup.sh", "finetune_pdrop.sh"):
        done = checkout.run(script, **env)
        assert done.returncode == 2
        assert re.match("error: " + expected, done.stderr) and done.stderr.count("\n") == 1
        assert not (checkout.root / ".venv").exists()


def test_a_failed_step_shows_its_output_and_is_tried_again(checkout: Checkout) -> None:
    done = checkout.run("setup.sh", BROKEN_PIP="1")
    assert done.returncode == 2 and "no such package" in done.stderr and "PyTorch" in done.stderr.splitlines()[-1]
    assert checkout.run("setup.sh").returncode == 0


def test_two_setups_at_once_install_once(checkout: Checkout) -> None:
    command = ["bash", str(checkout.root / "scripts" / "setup.sh")]
    both = [subprocess.Popen(command, env=checkout.env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    installs = [line for line in checkout.called() if "pip install" in line or "-m venv" in line]
    assert len(installs) == 3, installs  # the environment, PyTorch, the project: by one of the two
    assert sorted(bool(error) for error in errors) == [False, True]  # the other has nothing to say


def test_finetune_passes_config_and_overrides(checkout: Checkout) -> None:
    done = checkout.run("finetune_pdrop.sh", "configs/x.yaml", "seed=1", "pyramid_drop.layers=[1, 2]")
    assert done.returncode == 0, done.stderr
    call, memory = checkout.called()[-2:]
    assert call == f"python|{checkout.root}|-m llava_pdrop compare configs/x.yaml seed=1 pyramid_drop.layers=[1, 2]"
    assert memory == MEMORY


def test_finetune_has_a_default_config(checkout: Checkout) -> None:
    for arguments in ((), ("seed=1",)):
        checkout.run("finetune_pdrop.sh", *arguments)
        expected = " ".join(["-m llava_pdrop compare configs/tiny/finetune_pdrop.yaml", *arguments])
        assert checkout.called()[-2].endswith(f"|{expected}")


def test_finetune_from_another_directory(checkout: Checkout, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.touch()
    checkout.run("finetune_pdrop.sh", "mine.yaml", cwd=tmp_path)
    assert checkout.called()[-2] == f"python|{checkout.root}|-m llava_pdrop compare {mine}"
    checkout.run("finetune_pdrop.sh", "configs/tiny/finetune_pdrop.yaml", cwd=tmp_path)
    assert checkout.called()[-2].endswith("compare configs/tiny/finetune_pdrop.yaml")


def test_finetune_on_several_gpus_starts_one_process_each(checkout: Checkout) -> None:
    checkout.run("finetune_pdrop.sh", "c.yaml", "seed=1", NPROC_PER_NODE="8")
    assert checkout.called()[-1].endswith(
        "-m torch.distributed.run --nproc-per-node 8 --standalone -m llava_pdrop compare c.yaml seed=1"
    )


def test_tiny_configs_run_as_one_process_on_many_gpus(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    lister = tmp_path / "bin" / "nvidia-smi"
    lister.write_text("#!/usr/bin/env bash\nprintf 'GPU 0: a\\nGPU 1: b\\n'\n")
    lister.chmod(0o755)
    del checkout.env["NPROC_PER_NODE"]
    path = {"PATH": f"{lister.parent}:{os.environ['PATH']}"}
    checkout.run("finetune_pdrop.sh", "configs/tiny/x.yaml", **path)
    assert checkout.called()[-2].endswith("|-m llava_pdrop compare configs/tiny/x.yaml")
    checkout.run("finetune_pdrop.sh", "configs/llava15_7b/x.yaml", **path)
    assert "--nproc-per-node 2 " in checkout.called()[-1]
    checkout.run("finetune_pdrop.sh", "configs/tiny/x.yaml", NPROC_PER_NODE="3", **path)
    assert "--nproc-per-node 3 " in checkout.called()[-1]


def test_the_exit_status_of_the_program_is_the_scripts(checkout: Checkout) -> None:
    checkout.python.write_text(
        FAKE_PYTHON.replace('"${PYTORCH_CUDA_ALLOC_CONF:-none}" >>"$CALLS" ;;', '"" ; exit 3 ;;')
    )
    assert checkout.run("finetune_pdrop.sh").returncode == 3


def benches(lines: list[str]) -> list[str]:
    """Arguments of every ``bench``, in order."""
    return [line.split("-m llava_pdrop bench ")[1] for line in lines if "-m llava_pdrop bench " in line]


def test_bench_gpu_is_a_word_for_the_gpu_check(checkout: Checkout) -> None:
    python = str(checkout.python)
    done = checkout.run("bench.sh", "gpu", "--stages", "env", cwd=checkout.root.parent, LLAVA_PDROP_PYTHON=python)
    assert done.returncode == 0, done.stderr
    name, directory, words = checkout.called()[-2].split("|")
    assert (name, directory) == ("fake_python", str(checkout.root))
    assert words == "-m llava_pdrop.bench.gpu --stages env"


def test_the_gpu_check_makes_no_environment(checkout: Checkout) -> None:
    """It takes the first Python that has what it needs, and its results go where the user stands."""
    without_cuda = checkout.root.parent / "no_cuda"
    without_cuda.write_text('#!/usr/bin/env bash\n[[ "$*" != *cuda* ]]\n')
    without_cuda.chmod(0o755)
    done = checkout.run("gpu_check.sh", LLAVA_PDROP_PYTHON=str(without_cuda))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    expected = says(str(without_cuda), "LLAVA_PDROP_PYTHON", "scripts/constraints-cuda.txt", "--device cpu")
    assert re.match("error: " + expected, done.stderr)
    assert checkout.run("gpu_check.sh", "--device", "cpu", LLAVA_PDROP_PYTHON=str(without_cuda)).returncode == 0
    venv = checkout.root / ".venv" / "bin"
    venv.mkdir(parents=True)
    shutil.copy(checkout.python, venv / "python")
    done = checkout.run("gpu_check.sh", "--out", "mine", "--seconds=9", cwd=checkout.root.parent)
    assert done.returncode == 0, done.stderr
    lines = checkout.called()
    assert lines[-2].endswith(f"|-m llava_pdrop.bench.gpu --seconds=9 --out {checkout.root.parent}/mine")
    assert not any("-m venv" in line or "pip" in line for line in lines)


def test_bench_is_tiny_by_default_and_sets_up_first(checkout: Checkout) -> None:
    assert checkout.run("bench.sh").returncode == 0
    lines = checkout.called()
    assert any("-m venv" in line for line in lines)
    assert [line.split(" --out ")[0] for line in benches(lines)] == [
        "train --shape tiny --device cpu",
        "prefill --shape tiny --device cpu",
    ]
    assert lines[-1] == MEMORY  # the settings of training
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert checkout.run("bench.sh", **{name: "max_split_size_mb:64"}).returncode == 0
        own = "max_split_size_mb:64" if "CUDA" in name else "none"  # the one would hide the other from PyTorch
        assert checkout.called()[-1] == MEMORY.replace("expandable_segments:True", own)
    assert checkout.run("bench.sh", "cpu").returncode == 0
    lines = checkout.called()
    (line,) = benches(lines)
    assert line == "train --shape small-cpu --device cpu --out playground/benchmarks/cpu-train"
    assert not any("-m venv" in line for line in lines)


def test_bench_with_a_python_that_is_there_already(checkout: Checkout) -> None:
    checkout.env["PYTHON"] = "no-such-python"
    done = checkout.run("bench.sh", "cpu", LLAVA_PDROP_PYTHON=str(checkout.python))
    assert done.returncode == 0 and len(benches(checkout.called())) == 1
    assert not (checkout.root / ".venv").exists()
    done = checkout.run("bench.sh", "cpu", LLAVA_PDROP_PYTHON="no-such-python")
    assert done.returncode == 2 and re.match("error: " + says("LLAVA_PDROP_PYTHON=no-such-python"), done.stderr)
    assert done.stderr.count("\n") == 1


def test_a_bench_that_fails_or_hangs_does_not_stop_the_others(checkout: Checkout) -> None:
    for broken, expected in (
        ("exit 3", says("tiny-train", "3")),
        ("exec sleep 60", says("tiny-train", "1 seconds")),
    ):
        checkout.python.write_text(FAKE_PYTHON.replace('case "$*" in', f'case "$*" in *"bench train "*) {broken} ;;'))
        done = checkout.run("bench.sh", "tiny", LLAVA_PDROP_PYTHON=str(checkout.python), BENCH_LIMIT="1")
        assert done.returncode == 1 and len(benches(checkout.called())) == 2
        assert re.search(expected, done.stderr) and done.stderr.count("\n") == 1


def test_an_interrupted_bench_is_the_last_one(checkout: Checkout) -> None:
    checkout.python.write_text(FAKE_PYTHON.replace('case "$*" in', 'case "$*" in *"bench train"*) exit 130 ;;'))
    done = checkout.run("bench.sh", "tiny", LLAVA_PDROP_PYTHON=str(checkout.python))
    assert done.returncode == 130 and len(benches(checkout.called())) == 1


def test_benches_that_no_time_is_left_for_are_listed(checkout: Checkout) -> None:
    done = checkout.run("bench.sh", "tiny", LLAVA_PDROP_PYTHON=str(checkout.python), BENCH_SECONDS="0")
    assert done.returncode == 1 and benches(checkout.called()) == []
    assert len(re.findall(r"not started.*\b0 seconds", done.stderr)) == 2


def test_a_dry_run_shows_every_bench_and_measures_none(checkout: Checkout) -> None:
    done = checkout.run("bench.sh", "tiny", LLAVA_PDROP_PYTHON=str(checkout.python), DRY_RUN="1")
    shown = benches(done.stdout.splitlines())
    assert done.returncode == 0
    assert checkout.run("bench.sh", "tiny", LLAVA_PDROP_PYTHON=str(checkout.python)).returncode == 0
    assert [line.strip() for line in shown] == benches(checkout.called()) and len(shown) == 2


def test_an_unknown_bench_is_one_line(checkout: Checkout) -> None:
    for words in (["laptop"], ["configs/no.yaml", "seed=1"], ["seed=1"], ["--steps", "3"]):
        done = checkout.run("bench.sh", *words)

        expected = says(words[0], "tiny", "cpu", "gpu", "YAML")
        assert done.returncode == 2 and re.match("error: " + expected, done.stderr) and done.stderr.count("\n") == 1
    assert checkout.called() == []


def test_bench_of_a_config_measures_training_and_prefill(checkout: Checkout) -> None:
    config = checkout.root / "configs" / "mine" / "a run.yaml"
    config.parent.mkdir(parents=True)
    config.touch()
    given, out = "configs/mine/a run.yaml seed=1 pyramid_drop.layers=[1, 2]", "--out playground/benchmarks/mine-a-run"
    words = ("seed=1", "pyramid_drop.layers=[1, 2]", "--steps", "3")
    for place, name in (
        (checkout.root, "configs/mine/a run.yaml"),
        (config.parent, "a run.yaml"),  # from where the user stands
        (checkout.root.parent, "configs/mine/a run.yaml"),  # from the checkout
        (checkout.root.parent, str(config)),
    ):
        done = checkout.run("bench.sh", name, *words, cwd=place)
        assert done.returncode == 0, done.stderr
        lines = checkout.called()
        assert benches(lines) == [f"train {given} --steps 3 {out}", f"prefill {given} {out}"]
        assert f"|{checkout.root}|-m llava_pdrop bench train" in "".join(lines)
    assert checkout.run("bench.sh", str(config), "--steps", "3", *words[:2]).returncode == 0
    assert benches(checkout.called())[1] == f"prefill {given} {out}"  # both of the same run


def test_bench_of_a_config_is_one_process_in_every_world(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    worlds: tuple[dict[str, str], ...] = (
        {},
        {"NPROC_PER_NODE": "8"},
        {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"},
        {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node[0-3]"},
        {"HOSTFILE": "hosts"},
    )
    for world in worlds:
        done = checkout.run("bench.sh", "mine.yaml", cwd=tmp_path, DRY_RUN="1", **world)
        words = f"{tmp_path}/mine.yaml --out playground/benchmarks/{tmp_path.name}-mine"
        assert [line.strip() for line in benches(done.stdout.splitlines())] == [f"train {words}", f"prefill {words}"]
        assert "torch.distributed" not in done.stdout and "srun" not in done.stdout
    assert checkout.called() == []


def test_a_config_that_cannot_be_trained_on_still_has_its_prefill_measured(checkout: Checkout) -> None:
    (checkout.root / "mine.yaml").touch()
    checkout.python.write_text(FAKE_PYTHON.replace('case "$*" in', 'case "$*" in *"bench train"*) exit 2 ;;'))
    done = checkout.run("bench.sh", "mine.yaml", LLAVA_PDROP_PYTHON=str(checkout.python))
    assert done.returncode == 1 and len(benches(checkout.called())) == 2
    assert (
        re.search(says(f"{checkout.root.name.replace(' ', '-')}-mine/train", "2"), done.stderr)
        and done.stderr.count("\n") == 1
    )


def test_scripts_and_ci_are_strict_and_executable() -> None:
    sourced = {"environment.sh", "launch.sh"}
    scripts = [file for file in (ROOT / "scripts").glob("*.sh") if file.name not in sourced]
    scripts.append(ROOT / ".ci" / "run")
    for script in scripts:
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines, script
        assert os.access(script, os.X_OK), f"{script} is not executable"
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def requirements(name: str) -> dict[str, Requirement]:
    """Package -> its line in a file of versions."""
    lines = (ROOT / "scripts" / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({entry.name for entry in found}) == len(found)
    return {entry.name: entry for entry in found}


def test_the_constraints_for_gpus_are_the_tested_ones_with_another_torch() -> None:
    tested, cuda = requirements("constraints.txt"), requirements("constraints-cuda.txt")
    for name, entry in tested.items():
        if name != "torch":
            assert cuda[name].specifier == entry.specifier, name
    assert set(cuda) - set(tested) == {"bitsandbytes", "triton"}
    for name in set(cuda) - set(tested):
        assert [clause.operator for clause in cuda[name].specifier] == ["=="], name
    (pin,) = tested["torch"].specifier
    torch = cuda["torch"].specifier
    assert pin.version in torch and f"{pin.version}+cu130" in torch and f"{pin.version}+cpu" not in torch


def sections(file: Path) -> dict[str, str]:
    """Section of an Apptainer definition -> its lines; "" is what stands before the first one."""
    parts = re.split(r"^%(\w+)\n", file.read_text(), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def test_the_container_names_files_that_exist_and_says_what_was_not_tried() -> None:
    parts = sections(ROOT / "scripts" / "container.def")
    assert {"files", "post", "environment", "test", "runscript"} <= set(parts)
    assert "NOT BUILT AND NOT RUN" in parts[""] and "Bootstrap: docker\nFrom: nvidia/cuda:" in parts[""]
    copied = dict(line.split() for line in parts["files"].splitlines() if line.strip())
    assert {"setup.py", "README.md", "llava_pdrop", "scripts"} == set(copied)  # what setup.sh and setup.py read
    for source, target in copied.items():
        assert (ROOT / source).exists() and target == f"/opt/llava_pdrop/{source}"
    named = re.findall(r"/opt/llava_pdrop/([\w./-]+)", "".join(parts[name] for name in ("post", "test", "runscript")))
    assert named and all((ROOT / name).is_file() for name in named)
    for name in ("post", "environment", "test", "runscript"):
        subprocess.run(["sh", "-n"], input=parts[name], text=True, check=True)
    assert parts["environment"].count("LLAVA_PDROP_PYTHON=/opt/venv/bin/python") == 1
    assert "LLAVA_PDROP_VENV=/opt/venv " in parts["post"]


def test_the_python_of_the_container(checkout: Checkout, tmp_path: Path) -> None:
    """Launchers outside, Python inside, in the directory that the script went to."""
    (tmp_path / "bin").mkdir()
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.write_text('#!/usr/bin/env bash\nprintf "%s|" "$PWD" "$@" >>"$CALLS"\n')
    apptainer.chmod(0o755)
    inside = {"LLAVA_PDROP_PYTHON": "scripts/container_python.sh", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = checkout.run("finetune_pdrop.sh", "c.yaml", "pyramid_drop.layers=[1, 2]", **inside)
    assert done.returncode == 2 and re.match("error: " + says("LLAVA_PDROP_IMAGE"), done.stderr)
    inside["LLAVA_PDROP_IMAGE"] = str(tmp_path / "image.sif")
    done = checkout.run("finetune_pdrop.sh", "c.yaml", **inside)
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and re.match("error: " + says("image.sif"), done.stderr)
    )
    (tmp_path / "image.sif").touch()
    assert checkout.run("finetune_pdrop.sh", "c.yaml", "pyramid_drop.layers=[1, 2]", **inside).returncode == 0
    here = str(checkout.root)
    assert checkout.called() == [
        f"{here}|exec|--nv|--bind|{here}|--pwd|{here}|{tmp_path}/image.sif|/opt/venv/bin/python|"
        "-m|llava_pdrop|compare|c.yaml|pyramid_drop.layers=[1, 2]|"
    ]
    assert not (checkout.root / ".venv").exists()
    if shutil.which("apptainer") is None:
        done = checkout.run("finetune_pdrop.sh", **{**inside, "PATH": os.environ["PATH"]})
        assert done.returncode == 2 and re.match("error: " + says("apptainer", "installed"), done.stderr)
