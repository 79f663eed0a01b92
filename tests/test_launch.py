"""launch.sh, with a fake Python that installs nothing and a fake nvidia-smi."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from vit_jax import main
from vit_jax.config import defaults

ROOT = pathlib.Path(__file__).parents[1]
# Creates an environment with this script as Python. Installing logs a line and exits with $FAIL;
# looking for a GPU exits with $NO_GPU.
PYTHON = f"""#!/bin/bash
case "$*" in
"-m venv --clear "*)
    target=${{@: -1}}
    rm -rf "$target" && mkdir -p "$target/bin" && cp "$0" "$target/bin/python" ;;
"-m pip "*)
    echo "$0 ${{@: -1}}" >>"$LOG"
    sleep ${{INSTALL_SECONDS:-0}}
    exit ${{FAIL:-0}} ;;
*"jax.devices("*) exit ${{NO_GPU:-0}} ;;
*) exec {sys.executable} "$@" ;;
esac
"""
NVIDIA_SMI = """#!/bin/bash
case "$*" in
"--query-gpu=driver_version --format=csv,noheader") echo {driver} ;;
"--query-gpu=driver_version,compute_cap --format=csv,noheader") {both} ;;
*) exit 2 ;;
esac
"""
UNKNOWN_FIELD = """echo 'Field "compute_cap" is not a valid field to query.' && exit 2"""


class Checkout:
    """A copy of launch.sh with its requirements, and fake programs first on PATH."""

    def __init__(self, folder):
        self.root, self.programs, self.log = folder / "checkout", folder / "bin", folder / "log"
        self.root.mkdir()
        self.programs.mkdir()
        for name in ("launch.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.program("python3", PYTHON)
        self.program("nvidia-smi", "#!/bin/bash\nexit 9")

    def program(self, name, text):
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def gpus(self, driver, *capabilities):
        """Makes nvidia-smi report GPUs; without capabilities it does not know that field."""
        rows = " ".join(f"'{driver}, {capability}'" for capability in capabilities)
        both = f"printf '%s\\n' {rows}" if rows else UNKNOWN_FIELD
        self.program("nvidia-smi", NVIDIA_SMI.format(driver=driver, both=both))

    def start(self, *command, **env):
        env = {"PATH": f"{self.programs}:/usr/bin:/bin", "LOG": str(self.log), **env}
        return subprocess.Popen(
            [self.root / "launch.sh", *command],
            env=env,
            cwd=self.programs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *command, **env):
        """(exit code, stdout, stderr) of a command run by launch.sh."""
        process = self.start(*command, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.strip(), err

    def environment(self, **env):
        """The environment that a command runs in."""
        code, out, err = self.launch("bash", "-c", "echo $VIRTUAL_ENV; command -v python", **env)
        assert code == 0, err
        environment, python = out.split()
        assert python == f"{environment}/bin/python"
        return pathlib.Path(environment)

    def installed(self):
        """Number of installations so far."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_environment_is_created_once_and_runs_the_command(checkout):
    assert checkout.environment() == checkout.environment()
    assert checkout.installed() == 1 and checkout.log.read_text().endswith("[dev,prepare]\n")
    assert checkout.launch("bash", "-c", "exit 7")[0] == 7


def test_each_kind_of_machine_has_its_own_environment(checkout):
    cpu = checkout.environment()
    (cpu / "of_a_running_job").touch()
    checkout.gpus("535.104.05", "8.0")
    cuda = checkout.environment()
    assert (cpu.name.split("-")[0], cuda.name.split("-")[0]) == ("cpu", "cuda12")
    assert checkout.log.read_text().splitlines()[1].endswith("[dev,prepare,cuda12]")
    assert (cpu / "of_a_running_job").exists()


@pytest.mark.parametrize(
    "kind, gpus",
    [
        ("cuda12", ["525.60.13", "8.0"]),
        ("cuda12", ["570.211.01", "12.0"]),
        ("cuda13", ["580.65.06", "7.5"]),
        ("cuda13", ["610.43", "10.0", "9.0"]),
        ("cuda12", ["580.65.06", "7.0"]),  # CUDA 13 has no code for Volta
        ("cuda12", ["580.65.06", "9.0", "6.1"]),
        ("cuda13", ["1000.1", *["9.0"] * 20_000]),  # more than a pipe buffers
    ],
)
def test_driver_and_oldest_gpu_determine_the_cuda_version(checkout, kind, gpus):
    checkout.gpus(*gpus)
    assert checkout.environment().name.startswith(f"{kind}-")
    assert checkout.log.read_text().endswith(f"[dev,prepare,{kind}]\n")


@pytest.mark.parametrize("gpus", [["470.82.01"], ["515.105.01", "8.6"]], ids=str)
def test_driver_too_old_for_jax_is_reported_in_one_line(checkout, gpus):
    checkout.gpus(*gpus)
    code, _, err = checkout.launch("true")
    assert (code, err.count("\n"), checkout.installed()) == (2, 1, 0)
    assert err.startswith(f"error: the NVIDIA driver {gpus[0]} is too old for JAX: install 525")
    assert checkout.environment(CUDA="none").name.startswith("cpu-")


def test_cuda_variable_overrides_nvidia_smi(checkout):
    assert checkout.environment(CUDA="13").name.startswith("cuda13-")  # no GPU on a login node
    checkout.gpus("580.65.06", "9.0")
    assert checkout.environment(CUDA="12").name.startswith("cuda12-")
    _, out, _ = checkout.launch("bash", "-c", "echo $JAX_PLATFORMS $VIRTUAL_ENV", CUDA="none")
    assert out.startswith(f"cpu {checkout.root}/.venvs/cpu-")
    code, _, err = checkout.launch("true", CUDA="11")
    assert (code, err) == (2, "error: CUDA must be 12, 13, or none (CPU wheels); got 11\n")


def test_nvidia_smi_without_a_gpu_means_the_cpu(checkout):
    for answer in ("echo 'No devices were found'; exit 6", "exit 127"):  # 127: not installed
        checkout.program("nvidia-smi", f"#!/bin/bash\n{answer}")
        assert checkout.environment().name.startswith("cpu-")
    assert checkout.installed() == 1


def test_new_environment_in_which_jax_sees_no_gpu_is_reported_once(checkout):
    checkout.gpus("580.65.06", "9.0")
    code, _, err = checkout.launch("true", NO_GPU="1")
    assert code == 0 and "WARNING: JAX sees no GPU with its CUDA 13 wheels" in err
    assert checkout.launch("true", NO_GPU="1") == (0, "", "")
    assert "WARNING" not in checkout.launch("true", CUDA="12")[2]
    assert "WARNING" not in checkout.launch("true", CUDA="none", NO_GPU="1")[2]


def test_other_extras_have_their_own_environment(checkout):
    usual, other = checkout.environment(), checkout.environment(EXTRAS="dev,site")
    assert usual != other and checkout.log.read_text().endswith("[dev,site]\n")
    checkout.environment(EXTRAS="dev,site", CUDA="12")
    assert checkout.log.read_text().endswith("[dev,site,cuda12]\n")


def test_changed_requirements_create_a_new_environment_and_keep_the_old_one(checkout):
    old = checkout.environment()
    (old / "of_a_running_job").touch()
    path = checkout.root / "pyproject.toml"
    text = path.read_text()
    path.write_text(text + "\n[tool.other]\nline-length = 1\n")
    assert checkout.environment() == old  # no requirement changed
    path.write_text(text.replace('"tqdm>=4.66"', '"tqdm>=4.67"'))
    new = checkout.environment()
    assert new != old and (old / "of_a_running_job").exists() and checkout.installed() == 2
    path.write_text(text)
    assert checkout.environment() == old and checkout.installed() == 2


def test_moved_checkout_gets_its_own_environment(checkout):
    checkout.environment()
    moved = checkout.root.with_name("moved")
    checkout.root = checkout.root.rename(moved)
    environment = checkout.environment()
    assert environment.is_relative_to(moved) and checkout.installed() == 2
    assert f"{moved}[dev,prepare]" in checkout.log.read_text()


def test_interrupted_installation_is_repeated(checkout):
    code, _, _ = checkout.launch("true", FAIL="3")
    assert code == 3
    checkout.environment()
    assert checkout.installed() == 2


def test_one_of_several_processes_installs(checkout):
    first = checkout.start("true", INSTALL_SECONDS="1")
    deadline = time.monotonic() + 30
    while not checkout.installed() and time.monotonic() < deadline:
        time.sleep(0.02)
    code, _, err = checkout.launch("true")
    first.communicate()
    assert (first.returncode, code, checkout.installed()) == (0, 0, 1)
    assert "Waiting for the process that makes" in err


def test_venv_variable_sets_the_folder(checkout, tmp_path):
    chosen = tmp_path / "chosen"
    chosen.mkdir()  # as mktemp -d does
    assert checkout.environment(VENV=str(chosen)) == chosen
    assert checkout.environment(VENV=f"{chosen}/") == chosen and checkout.installed() == 1


def test_venv_made_for_something_else_is_not_overwritten(checkout, tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "bin").mkdir(parents=True)
    ours = checkout.environment(VENV=str(tmp_path / "ours"))
    checkout.gpus("535.104.05", "8.0")  # `ours` was created without a GPU
    for folder in (theirs, ours):
        code, _, err = checkout.launch("true", VENV=str(folder))
        assert code == 2 and err.count("\n") == 1
        assert err.startswith(f"error: {folder} was not made for")
        assert (folder / "bin").is_dir() and checkout.installed() == 1


def test_missing_python_is_reported_in_one_line(checkout):
    code, _, err = checkout.launch("true", PYTHON="no python")
    assert code == 2 and err.startswith("error: Python 3.11 or newer is needed (tried: no python)")


def test_python_may_be_in_a_folder_with_a_space(checkout, tmp_path):
    python = tmp_path / "a folder" / "python"
    python.parent.mkdir()
    shutil.copy(checkout.programs / "python3", python)
    checkout.environment(PYTHON=str(python))


def test_printed_commands_run_as_printed(checkout, tiny_run, tmp_path, monkeypatch):
    workdir = tmp_path / "a run's workdir"
    shutil.copytree(tiny_run, workdir)
    config = defaults()
    monkeypatch.delenv("VIT_JAX_LAUNCHER", raising=False)
    printed = main.next_commands(config, "cifar10_vit", workdir)
    assert [shlex.split(command)[0] for command in printed.values()] == [sys.executable] * 2
    _, launcher, _ = checkout.launch("bash", "-c", "echo $VIT_JAX_LAUNCHER")
    monkeypatch.setenv("VIT_JAX_LAUNCHER", launcher)
    monkeypatch.setenv("LOG", str(checkout.log))
    monkeypatch.setenv("PATH", f"{checkout.programs}:{os.environ['PATH']}")
    printed = main.next_commands(config, "cifar10_vit", workdir)
    assert printed["evaluate"].startswith(f"{launcher} python -m vit_jax evaluate ")
    output = subprocess.check_output(printed["evaluate"], shell=True, cwd=tmp_path, text=True)
    assert "accuracy" in output and "30 images" in output
    config.num_seeds, config.seed, config.data.name = 2, 5, "shapes10"
    printed = main.next_commands(config, "shapes10_vit", pathlib.Path("w"))
    assert printed["evaluate"].endswith(" evaluate --workdir w/seed_5")
    assert printed["report"].endswith(" report --workdir w")
    assert printed["CIFAR-10"].endswith(" -m vit_jax.main --config cifar10_vit")
