"""The scripts for a borrowed GPU: gpu_all.py, its limits and reports; gpu_pack.py, its pieces."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
RESULT = {
    "matmul_precision": "float32",
    "images_per_second": 10.0,
    "seconds_per_step": {"median": 0.1},
    "seconds_per_epoch": 1.0,
}
RESULT |= {"mfu": None, "rivals": {"PyTorch eager": {"speedup": 1.25}}}
RESULT |= {"environment": {"devices": ["gpu"], "versions": {"jax": "0"}, "commit": None}}
RESULT["environment"]["date"] = "2026-11-24"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(programs, *flags, torch=bool) runs gpu_all with these programs as items.

    A program is Python source. Returns the arguments of the items that ran, and the exit.
    """

    def call(programs, *flags, torch=True):
        gpu_all, commands, popen = load("gpu_all"), [], subprocess.Popen

        def start(command, **options):
            name = pathlib.Path(options["stdout"].name).parent.name
            commands.append(command)
            return popen([sys.executable, "-c", programs[name]], **options)

        error = None if torch else "ModuleNotFoundError: No module named 'torch'"
        monkeypatch.setattr(gpu_all, "torch_problem", lambda rehearse: error)
        monkeypatch.setattr(gpu_all.subprocess, "Popen", start)
        flags = ["--out", str(tmp_path / "out"), "--steps", "1", "--only", *programs, *flags]
        monkeypatch.setattr(sys, "argv", ["gpu_all.py", *flags])
        try:
            gpu_all.main()
        except SystemExit as e:
            return commands, str(e)
        finally:
            monkeypatch.setattr(subprocess, "Popen", popen)
        return commands, None

    return call


MEASURES = {"bench_64": f"print({json.dumps(RESULT)!r})"}


def test_without_pytorch_vit_jax_is_measured_after_a_notice(script, capsys):
    (command,), _ = script(MEASURES, torch=False)
    printed = capsys.readouterr().out
    assert command[1:4] == ["-m", "vit_jax", "benchmark"] and "--against" not in command
    assert "No module named 'torch'" in printed.splitlines()[0]
    assert "| bench_64 | 10 |" in printed and "1.25 times as fast as PyTorch eager" in printed


def test_comparison_is_measured_once_pytorch_is_installed_and_then_kept(script):
    assert len(script(MEASURES, torch=False)[0]) == 1
    assert script(MEASURES, torch=False)[0] == []
    ((command,), _) = script(MEASURES, torch=True)
    assert "--against" in command
    assert script(MEASURES, torch=False)[0] == []  # the comparison includes vit_jax alone


def test_a_failed_item_does_not_end_the_others_and_is_rerun(script, tmp_path, capsys):
    commands, exit_text = script({"bench_512_bf16": "raise SystemExit('broken')"} | MEASURES)
    assert len(commands) == 2 and "not complete: bench_512_bf16" in exit_text
    assert "bench_512_bf16 ... exit code 1 after" in capsys.readouterr().out
    assert "| bench_64 | 10 |" in (tmp_path / "out" / "report.md").read_text()
    assert [c[3] for c in script(MEASURES | {"bench_512_bf16": MEASURES["bench_64"]})[0]] == [
        "benchmark"
    ]


def test_a_hung_item_is_stopped_and_its_time_is_bounded(tmp_path):
    gpu_all = load("gpu_all")
    source = "import signal, time; signal.signal(15, lambda *_: print('saving', flush=True)); "
    source += "print('up', flush=True); time.sleep(60); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert process.stdout.readline() == "up\n"
    assert gpu_all.wait(process, 0.2, grace=0.5)
    assert process.returncode == -9 and process.stdout.read() == "saving\n"
    done = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    assert not gpu_all.wait(done, 30) and done.returncode == 0


def test_no_item_starts_when_the_minutes_are_over(script, capsys):
    commands, exit_text = script(MEASURES, "--minutes", "0.3")
    assert commands == [] and "not complete: bench_64" in exit_text
    assert "no time is left for bench_64" in capsys.readouterr().out


def make_wheel(folder, name):
    """Writes a wheel with one module."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "answer = 42\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_pieces_are_joined_and_installed_without_network(tmp_path):
    gpu_pack = load("gpu_pack")
    data = tmp_path / "cifar10"
    data.mkdir()
    content = os.urandom(100_000)
    (data / "train.array_record").write_bytes(content)
    pieces, to = tmp_path / "pieces", tmp_path / "there"
    gpu_pack.pack(
        pieces, [], [data], size=30_000, make_wheels=lambda w, have: make_wheel(w, "carried")
    )
    sizes = [path.stat().st_size for path in sorted(pieces.glob("piece_*"))]
    assert len(sizes) >= 4 and max(sizes) <= 30_000
    join = [sys.executable, SCRIPTS / "gpu_pack.py", "join", "--to", to, pieces]
    done = subprocess.run(join, capture_output=True, text=True, check=True)
    assert (to / "tfds/cifar10/train.array_record").read_bytes() == content
    setting = done.stdout.strip().splitlines()[-1]
    shell = f"{setting}; {sys.executable} -c 'import carried; print(carried.answer)'"
    assert subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout == "42\n"
    damaged = sorted(pieces.glob("piece_*"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = subprocess.run(join, capture_output=True, text=True)
    assert done.returncode == 1 and f"{damaged} is missing or damaged" in done.stderr


def test_what_the_other_machine_has_is_not_carried(tmp_path, monkeypatch):
    gpu_pack = load("gpu_pack")

    def pip(command, check):
        assert "jax==0.11.2" in pathlib.Path(command[command.index("-c") + 1]).read_text()
        for name in ("jax", "ml_collections", "vit_jax"):
            make_wheel(tmp_path, name)

    monkeypatch.setattr(gpu_pack.subprocess, "run", pip)
    gpu_pack.make_wheels(tmp_path, ["jax==0.11.2", "pip @ file:///x"])
    assert [path.name for path in tmp_path.iterdir()] == ["ml_collections-1.0-py3-none-any.whl"]
