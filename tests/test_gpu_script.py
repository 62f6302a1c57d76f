"""perf/gpu.sh: every stage as far as a CPU goes, stages that continue, time limits, and messages."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssdperf import packages, processes, stages
from ssdperf.processes import Ending
from ssdperf.progress import FAILED, UNFINISHED, Progress
from ssdperf.results import Results

ROOT = Path(__file__).parents[1]


def gpu_script(*arguments: str | Path, python: Path | str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "WHEELS"} | {"PYTHON": str(python)}
    command = [str(ROOT / "perf/gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def on_cpu(stage: str, output: Path) -> list[str]:
    """Run a stage on the CPU to its end and return the lines of its output."""
    result = gpu_script(stage, "--device", "cpu", "--output", output)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


# --- every stage on a CPU ---------------------------------------------------------------------------------


def test_check_solves_every_problem_once(tmp_path: Path) -> None:
    first = on_cpu("check", tmp_path)
    solved = [line for line in first if line.startswith("passed")]
    assert {line.split()[3] for line in solved} >= {"nms", "postprocess", "multibox_loss", "box_iou"}
    assert first[-1].startswith(f"check: {len(solved)} problems passed and 0 failed, listed in {tmp_path}/check.jsonl")
    assert first[-1].endswith("next: perf/gpu.sh bench")
    second = on_cpu("check", tmp_path)
    assert f"0 passed, 0 failed, 0 were not solved, {len(solved)} had passed before" in second


def test_bench_continues_its_file(tmp_path: Path) -> None:
    first = on_cpu("bench", tmp_path)
    assert first[-1].startswith("bench: ") and first[-1].endswith("next: perf/gpu.sh test")
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert {row["status"] for row in content["rows"]} == {"timed"}
    on_cpu("bench", tmp_path)
    assert json.loads(file.read_text()) == content
    file.write_text(json.dumps(content | {"commit": "another"}))
    refused = gpu_script("bench", "--device", "cpu", "--output", tmp_path)
    assert refused.returncode == 1 and "holds results of commit another" in refused.stdout


def test_test_runs_only_what_has_not_passed(tmp_path: Path) -> None:
    first = on_cpu("test", tmp_path)
    assert first[-1].endswith("next: perf/gpu.sh train DATA")
    count = int(first[-1].split()[1])
    assert count > 20 and f"test: {count} tests passed and 0 failed" in first[-1]
    second = on_cpu("test", tmp_path)
    assert second[-1] == first[-1] and not any(line.endswith("[100%]") for line in second)


def test_train_trains_and_evaluates(tmp_path: Path) -> None:
    lines = on_cpu("train", tmp_path)
    assert lines[-1].startswith(f"train: the model is {tmp_path}/model.safetensors")
    made = {file.name for file in tmp_path.iterdir()}
    assert {"model.safetensors", "last.pt", "metrics.json", "evaluation.json", "loss.png", "train.log"} <= made
    assert all(file.is_file() for file in tmp_path.iterdir())  # so that the folder is simple to copy
    assert len(json.loads((tmp_path / "metrics.json").read_text())["epochs"]) == stages.CPU_EPOCHS


# --- time limits ------------------------------------------------------------------------------------------


def limited(code: str, tmp_path: Path, seconds: float, grace: float) -> tuple[Ending, str]:
    """Run Python code under a time limit; return how it ended and what it printed."""
    log = tmp_path / "new" / "x.log"
    command = [sys.executable, "-c", f"import os, signal, subprocess, sys, time\n{code}"]
    return processes.run_limited(command, seconds=seconds, grace=grace, log=log), log.read_text()


def test_the_output_of_a_command_is_shown_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ending, log = limited("print('out'); print('err', file=sys.stderr); sys.exit(7)", tmp_path, 30, 30)
    assert ending == Ending(7, out_of_time=False)
    assert sorted(log.splitlines()) == ["err", "out"]
    assert capsys.readouterr().out == log


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in a shell's background"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """What this process, and every process that it starts, does with SIGINT."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_command_is_asked_to_end_and_can_save_its_work(tmp_path: Path) -> None:
    code = "try: time.sleep(60)\nexcept KeyboardInterrupt: print('saved'); sys.exit(130)"
    started = time.monotonic()
    ending, log = limited(code, tmp_path, 1, 30)
    assert (ending, log) == (Ending(130, out_of_time=True), "saved\n")
    assert time.monotonic() - started < 15


def test_a_command_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    ending, log = limited(code, tmp_path, 2, 1)
    assert ending == Ending(-9, out_of_time=True)
    stat = Path(f"/proc/{int(log)}/stat")
    for _ in range(50):  # init has to take note of its death
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is still there")


@pytest.mark.parametrize("minutes", [0.5, 2, 9])
def test_a_job_leaves_its_command_time_to_end(tmp_path: Path, minutes: float) -> None:
    job = stages.Job("cpu", tmp_path, time.monotonic(), 60 * minutes, tmp_path)
    assert job.grace == min(30, 15 * minutes)
    assert job.seconds_left == pytest.approx(60 * minutes - job.grace, abs=1)
    late = stages.Job("cpu", tmp_path, time.monotonic() - 3600, 60 * minutes, tmp_path)
    assert late.seconds_left == 0


class FakeJob(stages.Job):
    """A job whose commands are recorded and end as they are told."""

    def run(self, log: str, arguments: list[str]) -> Ending:
        COMMANDS.append(arguments)
        return ENDINGS.pop(0)


COMMANDS: list[list[str]] = []
ENDINGS: list[Ending] = []


@pytest.fixture
def job(tmp_path: Path) -> FakeJob:
    COMMANDS.clear()
    ENDINGS.clear()
    return FakeJob("cuda", tmp_path, time.monotonic(), 540, tmp_path)


def test_an_interrupted_training_continues(job: FakeJob) -> None:
    ENDINGS.append(Ending(130, out_of_time=True))
    first = stages.train(job, Path("data"), "test")
    assert first.status == UNFINISHED and "--resume" not in COMMANDS[0]
    assert COMMANDS[0][COMMANDS[0].index("--model") + 1] == "ssd300_vgg16"
    (job.output / "last.pt").touch()
    metrics = {"epochs": [{}] * 3, "settings": {"epochs": 120}}
    (job.output / "metrics.json").write_text(json.dumps(metrics))
    ENDINGS.append(Ending(130, out_of_time=True))
    second = stages.train(job, Path("data"), "test")
    assert "--resume" in COMMANDS[1] and "3 of 120 epochs" in second.text


def test_a_training_that_fails_is_not_unfinished(job: FakeJob) -> None:
    ENDINGS.append(Ending(1, out_of_time=False))
    assert stages.train(job, Path("data"), "test").status == 1
    assert len(COMMANDS) == 1


@pytest.mark.parametrize(
    ("ending", "saved", "status", "text"),
    [
        (Ending(1, False), True, 1, "perf/run.py failed, {0}/bench.log says why; {0}/gpu.json holds what was measured"),
        (Ending(1, False), False, 1, "perf/run.py failed, {0}/bench.log says why"),
        (Ending(0, False), True, 0, "{0}/gpu.json holds 0 measured problems"),
        (Ending(UNFINISHED, False), False, UNFINISHED, "no problem has been measured yet"),
    ],
    ids=["failed later", "failed at once", "finished", "no time"],
)
def test_the_report_of_the_benchmark(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch, ending: Ending, saved: bool, status: int, text: str
) -> None:
    monkeypatch.setattr(stages.environment, "device_name", lambda _: "GPU")
    if saved:
        Results({}, []).save(job.output / "gpu.json")
    ENDINGS.append(ending)
    report = stages.bench(job)
    assert report.status == status and report.text.startswith(text.format(job.output))
    assert ("holds" in report.text) == saved


@pytest.mark.parametrize(
    ("endings", "status"),
    [
        ([Ending(0, False), Ending(5, False)], 0),  # 5: pytest found no tests that are left
        ([Ending(1, False), Ending(0, False)], 1),
        ([Ending(0, False), Ending(1, False)], 1),
        ([Ending(2, False), Ending(0, False)], 1),  # 2 without an interruption: an error while collecting
        ([Ending(2, True)], UNFINISHED),
        ([Ending(1, False), Ending(2, True)], 1),
    ],
)
def test_the_status_of_the_tests(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch, endings: list[Ending], status: int
) -> None:
    monkeypatch.setattr(stages.environment, "identity", lambda *_: {})
    monkeypatch.setattr(stages, "_workers", lambda _: 2)
    ENDINGS.extend(endings)
    assert stages.test(job).status == status
    assert ENDINGS == []


def test_tests_that_measure_time_run_alone_after_the_others(job: FakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.environment, "identity", lambda *_: {})
    monkeypatch.setattr(stages, "_workers", lambda _: 2)
    ENDINGS.extend([Ending(0, False)] * 2)
    stages.test(job)
    parallel, alone = COMMANDS
    assert parallel[parallel.index("-n") + 1] == "2" and "not timing" in parallel
    assert "-n" not in alone and "timing" in alone


def test_without_xdist_all_tests_run_in_one_process(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages.environment, "identity", lambda *_: {})
    monkeypatch.setattr(stages, "find_spec", lambda _: None)
    ENDINGS.append(Ending(0, False))
    stages.test(job)
    assert len(COMMANDS) == 1 and not {"-n", "timing", "not timing"} & set(COMMANDS[0])
    assert "pytest-xdist is not installed" in capsys.readouterr().out


def test_tests_that_failed_count_though_time_is_up(job: FakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.environment, "identity", lambda *_: {})
    Progress(job.output / "test.jsonl", {}).record("tests/test_a.py::test_b", FAILED)
    ENDINGS.append(Ending(2, True))
    report = stages.test(job)
    assert report.status == 1 and "0 tests passed and 1 failed" in report.text


# --- tests that continue ----------------------------------------------------------------------------------


TESTS = """
import os, pytest

@pytest.mark.parametrize("x", range(3))
def test_right(x): pass

def test_wrong(): assert "MENDED" in os.environ

@pytest.fixture
def broken():
    yield
    assert "MENDED" in os.environ

def test_wrong_at_the_end(broken): pass

@pytest.mark.skip
def test_skipped(): pass
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_tests_that_passed_are_left_out(tmp_path: Path, workers: int) -> None:
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_a.py").write_text(TESTS)
    progress, passed = Progress(tmp_path / "x.jsonl", {}), tmp_path / "passed.txt"
    command = [sys.executable, "-P", "-m", "pytest", "-q", *(["-n", str(workers)] if workers else [])]
    command += ["-p", "ssdperf.pytest_resume", "--passed", str(passed), "--progress", str(progress.path), "test_a.py"]

    def run(**variables: str) -> str:
        passed.write_text("\n".join(progress.names("passed")))
        environment = os.environ | {"PYTHONPATH": str(ROOT / "perf")} | variables
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    assert "1 failed, 4 passed, 1 skipped, 1 error" in run()
    assert len(progress.path.read_text().splitlines()) == 1 + 5  # each test once, whoever reports it
    assert sorted(progress.names("failed")) == ["test_a.py::test_wrong", "test_a.py::test_wrong_at_the_end"]
    assert "2 passed, 1 skipped" in run(MENDED="1")
    assert len(progress.names("passed")) == 5 and progress.names("failed") == []


# --- what is missing --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("stage", ["check", "bench", "test", "train"])
def test_a_missing_package_is_named_within_a_second(bare_python: Path, stage: str) -> None:
    arguments = [stage, "DATA"] if stage == "train" else [stage]
    started = time.monotonic()
    result = gpu_script(*arguments, python=bare_python)
    assert time.monotonic() - started < 1
    assert result.returncode == 1
    assert f"perf/gpu.sh {stage} needs torch, triton, numpy, " in result.stderr
    assert "Traceback" not in result.stderr


def test_packages_are_named_as_pip_knows_them() -> None:
    assert packages.missing(["torch", "PIL", "no_such_package"]) == ["no_such_package"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        assert packages.missing(["PIL"]) == ["Pillow"]


def test_tests_whose_packages_are_missing_are_left_out_by_name(
    job: FakeJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "missing", lambda names: [name for name in names if name == "pycocotools"])
    monkeypatch.setattr(stages.environment, "identity", lambda *_: {})
    ENDINGS.extend([Ending(0, False)] * 2)
    stages.test(job)
    printed = capsys.readouterr().out
    for name in ("test_evaluate.py", "test_train.py", "test_cli.py"):
        assert f"left out: {name}, which needs pycocotools\n" in printed
        assert f"tests/{name}" not in COMMANDS[0]
    assert {"tests/test_nms.py", "tests/test_postprocess.py", "tests/test_perf.py"} <= set(COMMANDS[0])


def test_packages_are_found_through_other_files_of_the_repository() -> None:
    assert "pycocotools" in packages.needed_by(ROOT / "tests/test_train.py")  # ssdcore.train imports ssdcore.evaluate
    assert "tensorboard" in packages.needed_by(ROOT / "ssdcore/train/record.py")
    assert packages.needed_by(ROOT / "kernels/__init__.py") <= {"torch", "numpy", "triton"}


def test_the_tests_that_run_on_a_cpu_exist() -> None:
    assert all((ROOT / "tests" / name).exists() for name in stages.CPU_TESTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named() -> None:
    result = gpu_script("check")
    assert result.returncode == 1
    assert "perf/gpu.sh needs a GPU" in result.stderr and "--device cpu" in result.stderr


def test_the_checkout_is_imported_whatever_is_installed(tmp_path: Path) -> None:
    code = "import ssdcore.kernels; print(ssdcore.__file__, ssdcore.kernels.__file__, ssdcore.__version__)"
    with stages.importable_checkout() as folder:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-P", "-c", code]
        printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
        package, kernels, version = printed.split()
        assert Path(package).parent == folder / "ssdcore" and Path(package).resolve() == ROOT / "ssdcore/__init__.py"
        assert Path(kernels).resolve() == ROOT / "kernels/__init__.py"
        assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert not folder.exists()


def test_without_arguments_the_script_prints_its_usage() -> None:
    result = gpu_script()
    assert result.returncode == 2
    assert result.stdout.startswith("usage: perf/gpu.sh")
    assert all(stage in result.stdout for stage in ("check", "bench", "test", "train"))


def test_training_on_a_gpu_needs_data() -> None:
    result = gpu_script("train")
    assert result.returncode == 2 and "train needs DATA" in result.stderr
