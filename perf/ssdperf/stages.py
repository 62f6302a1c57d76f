"""The stages of perf/gpu.sh. Each fits into a short lease of a machine with a GPU, and continues when called again.

This file imports nothing but the standard library and files of this package that do the same, so that a stage can say
within a second which packages it misses.
"""

import json
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ssdperf import environment, results
from ssdperf.environment import ROOT
from ssdperf.packages import missing, needed_by
from ssdperf.processes import Ending, run_limited
from ssdperf.progress import FAILED, PASSED, UNFINISHED, Progress

KERNELS = ("torch", "triton", "numpy")
COMMAND_LINE = ("torchvision", "PIL", "matplotlib", "pycocotools", "safetensors", "tensorboard", "tqdm", "typer")
NEEDED = {  # the modules without which a stage cannot run at all
    "check": (*KERNELS, "torchvision"),
    "bench": (*KERNELS, "torchvision", "tqdm"),
    "test": (*KERNELS, "pytest", "hypothesis"),
    "train": (*KERNELS, *COMMAND_LINE),
}
FOLLOWING = {
    "check": "next: perf/gpu.sh bench",
    "bench": "next: perf/gpu.sh test",
    "test": "next: perf/gpu.sh train DATA",
    "train": "this was the last stage",
}
STOP_S = 30.0  # for a command to save its work and end
CHECK_END_S = 10.0  # for check.py to start, and to kill its last process and print its table
# Eight test processes leave each 10 GB of an H100's 80 GB for its CUDA context and its tensors. Each also needs a core,
# because its tests compile kernels.
MAX_TEST_WORKERS = 8
STUCK_TEST_S = 120  # pytest prints the stack of a test that takes longer, which names a test that hangs
# What the stages do with --device cpu, which only shows that they work.
CPU_CASE = "match_anchors"
CPU_TESTS = ("test_anchors.py", "test_draw.py")
CPU_EPOCHS = 2
CPU_IMAGES = {"train": 8, "val": 2}


class Report(NamedTuple):
    status: int  # exit status: 0, 1 if something failed, or UNFINISHED
    text: str  # what was made, and where


@dataclass(frozen=True)
class Job:
    """One call of a stage."""

    device: str  # "cuda" or "cpu"
    output: Path  # folder
    started: float  # by time.monotonic
    limit: float  # seconds from then
    checkout: Path  # where Python finds this checkout's ssdcore

    @property
    def grace(self) -> float:
        """How long before the limit a command is asked to end; it is killed at the limit."""
        return min(STOP_S, self.limit / 4)

    @property
    def seconds_left(self) -> float:
        """How long a command may run before it is asked to end."""
        return max(0.0, self.started + self.limit - self.grace - time.monotonic())

    def run(self, log: str, arguments: Sequence[str]) -> Ending:
        """Run Python with arguments until the job's time is up."""
        return run_limited(
            [sys.executable, "-P", *arguments],  # -P, because the folder kernels/ must not be imported as `kernels`
            seconds=self.seconds_left,
            grace=self.grace,
            log=self.output / log,
            folder=ROOT,
            # TQDM_MININTERVAL in seconds: a log needs no more of a progress bar.
            environment={"PYTHONPATH": f"{ROOT / 'perf'}:{self.checkout}", "TQDM_MININTERVAL": "10"},
        )


# --- before a stage ---------------------------------------------------------------------------------------


def require_packages(stage: str) -> None:
    """Exit if a package is missing without which the stage cannot run."""
    if absent := missing(NEEDED[stage]):
        raise SystemExit(
            f"perf/gpu.sh {stage} needs {', '.join(absent)}, which {sys.executable} does not have: "
            f"pip install {' '.join(absent)}, or set WHEELS to a folder that holds the wheels"
        )


@contextmanager
def importable_checkout() -> Iterator[Path]:
    """Yield a folder from which Python imports this checkout as if it were installed.

    Installing it would need setuptools, and would replace another ssdcore that is installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory(prefix="ssdcore-") as name:
        package, metadata = Path(name) / "ssdcore", Path(name) / f"ssdcore-{project['version']}.dist-info"
        package.mkdir()
        for file in (ROOT / "ssdcore").iterdir():
            (package / file.name).symlink_to(file)
        (package / "kernels").symlink_to(ROOT / "kernels")  # its name once it is installed is ssdcore.kernels
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ssdcore\nVersion: {project['version']}\n")
        yield Path(name)


def require_device(device: str) -> None:
    """Exit if the device is a GPU and there is none."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(
                "perf/gpu.sh needs a GPU: torch.cuda.is_available() is False. "
                "--device cpu runs every stage on small problems, to show that it works"
            )


# --- the stages -------------------------------------------------------------------------------------------


def check(job: Job) -> Report:
    file = job.output / "check.jsonl"
    limit = f"{max(0.0, job.seconds_left - CHECK_END_S) / 60:.3f}"
    command = [str(ROOT / "perf/check.py"), "--device", job.device, "--output", str(file), "--minutes", limit]
    ending = job.run("check.log", command)
    progress = Progress(file, environment.identity(job.device, "kernels", "ssdcore", "perf"))
    passed, failed = len(progress.names(PASSED)), len(progress.names(FAILED))
    status = 1 if failed else _status(ending)
    return Report(status, f"{passed} problems passed and {failed} failed, listed in {file}")


def bench(job: Job) -> Report:
    file = job.output / f"{environment.file_stem(environment.device_name(job.device))}.json"
    # A shape may take a minute, because torch.compile does: begin none in the last one.
    limit = f"{max(0.0, job.seconds_left / 60 - 1):.3f}"
    command = [str(ROOT / "perf/run.py"), "--device", job.device, "--output", str(file), "--resume", "--minutes", limit]
    if job.device == "cpu":
        command += ["--quick", "--case", CPU_CASE]
    ending = job.run("bench.log", command)
    if _status(ending) == 1:
        saved = f"; {file} holds what was measured before" if file.exists() else ""
        return Report(1, f"perf/run.py failed, {job.output / 'bench.log'} says why{saved}")
    if not file.exists():
        return Report(_status(ending), "no problem has been measured yet")
    measured = len(results.load(file).by_key())
    text = f"{file} holds {measured} measured problems; for the README, copy it to perf/results/"
    return Report(_status(ending), text)


def test(job: Job) -> Report:
    files = [ROOT / "tests" / name for name in CPU_TESTS] if job.device == "cpu" else _test_files()
    absent = {file: missing(sorted(needed_by(file))) for file in files}
    for file, packages in absent.items():
        if packages:
            print(f"left out: {file.name}, which needs {', '.join(packages)}", flush=True)
    names = [str(file.relative_to(ROOT)) for file, packages in absent.items() if not packages]
    progress = Progress(
        job.output / "test.jsonl", environment.identity(job.device, "kernels", "ssdcore", "perf", "tests")
    )
    if progress.restarted:
        print(f"{progress.path} was of other code or another device: beginning anew", flush=True)
    if workers := _workers(job.device):
        # A file stays with one worker, because its fixtures compile and compute what all of its tests use. Tests that
        # measure time run alone afterwards, because other processes would disturb them.
        endings = [_pytest(job, progress, names, "-m", "not timing", "-n", str(workers), "--dist", "loadfile")]
        if not endings[0].out_of_time:
            endings.append(_pytest(job, progress, names, "-m", "timing"))
    else:
        endings = [_pytest(job, progress, names)]
    passed, failed = len(progress.names(PASSED)), len(progress.names(FAILED))
    status = 1 if failed else max((_status(ending, also_right=5) for ending in endings), key=(0, UNFINISHED, 1).index)
    return Report(status, f"{passed} tests passed and {failed} failed, listed in {progress.path}")


def train(job: Job, data: Path | None, split: str) -> Report:
    """Train on `data` and score the result on `split`; without `data`, on a small set that is drawn for the purpose."""
    if data is None:
        from ssdcore.synthetic import make_synthetic

        with tempfile.TemporaryDirectory() as folder:
            data = make_synthetic(Path(folder) / "shapes", **CPU_IMAGES, progress=False)
            return train(job, data, "val")
    model = ["ssd300_tiny", "--epochs", str(CPU_EPOCHS)] if job.device == "cpu" else ["ssd300_vgg16"]
    resume = ["--resume"] if (job.output / "last.pt").exists() else []
    shared = ["--data", str(data), "--device", job.device]
    ending = job.run(
        "train.log", ["-m", "ssdcore", "train", *shared, "--model", *model, "--output", str(job.output), *resume]
    )
    metrics = job.output / "metrics.json"
    if ending.code != 0:
        if not metrics.exists():
            return Report(_status(ending), "no epoch has been trained and saved yet")
        record = json.loads(metrics.read_text())
        epochs = f"{len(record['epochs'])} of {record['settings']['epochs']} epochs"
        return Report(_status(ending), f"{epochs} are trained and saved in {job.output}")
    weights = job.output / "model.safetensors"
    with tempfile.TemporaryDirectory() as folder:  # both commands call their file metrics.json
        arguments = ["--weights", str(weights), *shared, "--split", split, "--output", folder]
        ending = job.run("evaluate.log", ["-m", "ssdcore", "evaluate", *arguments])
        if ending.code != 0:
            return Report(_status(ending), f"the model is trained, {weights}, but not yet scored on {split}")
        scores = job.output / "evaluation.json"
        shutil.copy(Path(folder) / "metrics.json", scores)
    return Report(0, f"the model is {weights}, its scores on {split} are in {scores}")


def _status(ending: Ending, also_right: int = 0) -> int:
    if ending.out_of_time:
        return UNFINISHED
    return ending.code if ending.code in (0, UNFINISHED) else 0 if ending.code == also_right else 1


def _test_files() -> list[Path]:
    return sorted((ROOT / "tests").glob("test_*.py"))


def _workers(device: str) -> int:
    """Return the number of test processes besides pytest's own."""
    from ssdcore.cores import usable_cores

    if device == "cpu":  # its few tests take less time than the start of a worker
        return 0
    if find_spec("xdist") is None:
        print("pytest-xdist is not installed: the tests run in one process", flush=True)
        return 0
    return min(MAX_TEST_WORKERS, usable_cores())


def _pytest(job: Job, progress: Progress, files: Sequence[str], *options: str) -> Ending:
    """Run the tests that have not passed yet."""
    # A copy, because every worker must leave out the same tests, and the tests that pass are recorded meanwhile.
    passed = job.output / "test-passed.txt"
    passed.write_text("".join(f"{name}\n" for name in progress.names(PASSED)))
    command = ["-m", "pytest", "-q", "-o", f"faulthandler_timeout={STUCK_TEST_S}"]
    command += ["-p", "ssdperf.pytest_resume", "--passed", str(passed), "--progress", str(progress.path)]
    return job.run("test.log", [*command, *options, *files])
