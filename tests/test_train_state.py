"""A run that is interrupted, killed or left without disk space continues to the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from toy import CONFIG, plain_environment, toy_data, toy_model, toy_run

from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.train import Terminated
from ssdcore.train.state import read_state, state_files, write_state
from ssdcore.weights import files

TIMES = {"seconds", "images_per_s", "data_wait"}  # what differs between two runs


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as `plain_environment` gives to other processes, because sums depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interrupting(DetectionDataset):
    """Does `event` when `images_left` images have been read."""

    images_left = 13  # ends in the second epoch of eight images

    def event(self) -> None:
        raise KeyboardInterrupt

    def __getitem__(self, index: int) -> Any:
        self.images_left -= 1
        if self.images_left < 0:
            self.event()
        return super().__getitem__(index)


class Terminating(Interrupting):
    def event(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def dataset(data: Path, kind: type[DetectionDataset], split: str = "train") -> DetectionDataset:
    opened = open_dataset(data, split)
    opened.__class__ = kind
    return opened


def without_times(record: Any) -> Any:
    if isinstance(record, dict):
        return {name: without_times(value) for name, value in record.items() if name not in TIMES}
    return [without_times(value) for value in record] if isinstance(record, list) else record


def assert_same_end(run: Path, expected: Path) -> None:
    """The weights, the state and the records of two runs are equal to the last bit, except for times."""
    assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (run, expected)]
    for name in ("model", "optimizer", "average", "scaler"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)
    records = [without_times(json.loads((folder / "metrics.json").read_text())) for folder in (run, expected)]
    assert records[0] == records[1]
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, expected)]
    assert without_times(lines[0]) == without_times(lines[1])


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "ema": 0.9, "freeze": "1"},
        {"optimizer": "adamw", "accumulate": 2},
        {"optimizer": "lars"},
        {"optimizer": "lamb"},
        {"precision": "fp16", "clip_norm": 0.0},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_a_resumed_run_ends_bit_identical_to_an_uninterrupted_run(
    shapes: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {**options, "checkpoint_seconds": 0, "log_steps": 3}
    if options.get("optimizer") in ("lars", "lamb"):
        pytest.importorskip("timm")
    toy_run(shapes, tmp_path / "expected", validate=True, **options)
    with pytest.raises(KeyboardInterrupt):
        toy_run(shapes, tmp_path / "run", train_set=dataset(shapes, Interrupting), validate=True, **options)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] == 3 and len(state["history"]) == 1  # in the middle of the second epoch
    assert "postprocess" not in state["settings"]  # a run that began when files had none can be resumed
    # Another seed, because the initial weights of a resumed model must not matter.
    toy_run(shapes, tmp_path / "run", model=toy_model(seed=1), validate=True, resume=True, **options)
    assert_same_end(tmp_path / "run", tmp_path / "expected")


def test_lines_that_will_be_written_again_are_removed(shapes: Path, tmp_path: Path) -> None:
    """The last state is that of the second step, while lines have been written for three."""
    toy_run(shapes, tmp_path / "expected", validate=True, log_steps=1)
    with pytest.raises(KeyboardInterrupt):
        toy_run(shapes, tmp_path / "run", train_set=dataset(shapes, Interrupting), validate=True, log_steps=1)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 2
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # a line that was cut off
    toy_run(shapes, tmp_path / "run", validate=True, log_steps=1, resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "expected")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from toy import CONFIG, toy_run

data, run = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
config = CONFIG.changed(epochs=12, checkpoint_seconds=0, ema=0.9, keep=3, log_steps=5, validate_every=3)
random.seed(0)
kills = 0
while True:
    child = os.fork()
    if not child:
        toy_run(data, run, config, validate=True, resume=(run / "last.pt").exists())
        os._exit(0)
    # From the first moments of a run, when nothing is written yet, to some steps.
    end = time.monotonic() + (random.uniform(0.1, 1.0) if kills < 8 else 60)
    pid = status = 0
    while not pid and time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not pid:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    elif status == 0:
        break
    else:
        sys.exit(f"a run failed: {status}")
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_killed_at_any_moment_ends_bit_identical(shapes: Path, tmp_path: Path) -> None:
    config = CONFIG.changed(epochs=12, checkpoint_seconds=0, ema=0.9, keep=3, log_steps=5, validate_every=3)
    toy_run(shapes, tmp_path / "expected", config, validate=True)
    # A process of its own forks the runs, because it has no threads and PyTorch is imported once.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(shapes), str(tmp_path / "run")],
        cwd=Path(__file__).parent,
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    assert_same_end(tmp_path / "run", tmp_path / "expected")


def test_sigterm_writes_the_state_after_the_step_and_exits_with_143(shapes: Path, tmp_path: Path) -> None:
    toy_run(shapes, tmp_path / "expected")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="143") as stopped:
        toy_run(shapes, tmp_path / "run", train_set=dataset(shapes, Terminating))
    assert stopped.value.code == 143 and "stopped by SIGTERM after step 4 of 4" in stopped.value.message
    assert signal.getsignal(signal.SIGTERM) == handler
    toy_run(shapes, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "expected")


def test_sigterm_ends_scoring_at_once_and_it_is_repeated(shapes: Path, tmp_path: Path) -> None:
    toy_run(shapes, tmp_path / "expected", validate=True)
    val_set = dataset(shapes, Terminating, "val")
    val_set.images_left = 10  # in the second epoch: four are scored in each, and drawn
    with pytest.raises(Terminated):
        toy_run(shapes, tmp_path / "run", val_set=val_set)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["step"] == 4 and len(state["history"]) == 1
    toy_run(shapes, tmp_path / "run", validate=True, resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "expected")


@pytest.mark.skipif(not hasattr(os, "setpgrp"), reason="needs process groups")
def test_sigterm_to_the_process_group_of_a_run_with_workers_writes_the_state(shapes: Path, tmp_path: Path) -> None:
    """torchrun and `timeout` send the signal to the whole group, in which the workers would be."""
    script = (
        "import sys, time; from pathlib import Path; from toy import toy_model, toy_run; model = toy_model(); "
        "model.backbone.register_forward_hook(lambda *_: time.sleep(0.3)); "  # so that the signal comes during a step
        "toy_run(Path(sys.argv[1]), Path(sys.argv[2]), model=model, epochs=2000, workers=1, checkpoint_seconds=1e9)"
    )
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(shapes), str(run)],
        cwd=Path(__file__).parent, env=plain_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(state_files(run)) < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # some steps
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert torch.load(run / "last.pt", weights_only=True)["step"] > 1


def test_a_state_is_written_with_the_weights_of_a_best_epoch(shapes: Path, tmp_path: Path) -> None:
    """A run that is resumed from before that epoch might score it differently, and not write its weights again."""
    train_set = dataset(shapes, Interrupting)
    with pytest.raises(KeyboardInterrupt):
        toy_run(shapes, tmp_path, train_set=train_set, validate=True, checkpoint_seconds=1e9)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["step"] == 2 and len(state["history"]) == 1
    assert (tmp_path / "model.safetensors").exists()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped bit":
        with zipfile.ZipFile(path) as archive:
            tensor = max((archive.read(name) for name in archive.namelist() if "/data/" in name), key=len)
        place = content.index(tensor) + len(tensor) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "foreign":
        torch.save({"state_dict": {}, "epoch": 3}, path)
    else:
        torch.save(Path("an object that is no tensor"), path)


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped bit", "foreign", "pickle"])
def test_a_damaged_state_is_refused_in_a_line_and_the_one_before_it_is_used(
    shapes: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    toy_run(shapes, run, checkpoint_seconds=0)
    weights = (run / "model.safetensors").read_bytes()
    damage(run / "last.pt", how)
    toy_run(shapes, run, checkpoint_seconds=0, resume=True)
    printed = capsys.readouterr().out
    assert f"{run / 'last.pt'} is not the state of a run" in printed and printed.count("\n") == 1
    assert "; resuming from last-1.pt instead" in printed
    assert (run / "model.safetensors").read_bytes() == weights
    assert [path.name for path in run.glob("*.damaged")] == ["last.damaged"]

    for path in state_files(run):
        damage(path, how)
    with pytest.raises(ValueError, match=r"last-1\.pt is not the state of a run") as raised:
        toy_run(shapes, run, resume=True)
    assert "\n" not in str(raised.value)


def test_a_state_of_an_older_version_is_named_as_such(shapes: Path, tmp_path: Path) -> None:
    torch.save({"model": {}, "optimizer": {}, "trained": [], "settings": {}, "history": []}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is not the state of a run of this version of ssdcore"):
        toy_run(shapes, tmp_path, resume=True)


@pytest.mark.parametrize(("keep", "names"), [(1, ["last"]), (3, ["last", "last-1", "last-2"])])
def test_the_last_states_are_kept(tmp_path: Path, keep: int, names: list[str]) -> None:
    state = dict.fromkeys(("model", "optimizer", "average", "scaler", "trained", "part", "logged"))
    for step in range(5):
        write_state(tmp_path, {**state, "settings": {}, "history": [], "step": step}, keep)
    assert [path.stem for path in state_files(tmp_path)] == names
    steps = [torch.load(path, weights_only=True)["step"] for path in state_files(tmp_path)]
    assert steps == [4, 3, 2][:keep]
    assert read_state(tmp_path, {})["step"] == 4
    write_state(tmp_path, {**state, "settings": {}, "history": [], "step": 5}, 1)  # a smaller number removes files
    assert [path.stem for path in state_files(tmp_path)] == ["last"]


def test_a_full_disk_is_a_clear_error_and_leaves_earlier_states(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    toy_run(shapes, tmp_path / "expected")
    written = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal written
        if str(target).endswith("last.new"):
            written += 1
            if written == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Path(source).rename(target)

    monkeypatch.setattr(files.os, "replace", replace)
    message = r"cannot write the state of the run, [\d,]+ bytes: .*No space left on device.*last\.pt remains"
    with pytest.raises(OSError, match=message):
        toy_run(shapes, run, checkpoint_seconds=0)
    assert [torch.load(path, weights_only=True)["step"] for path in state_files(run)] == [2, 1]
    assert not list(run.glob("*.tmp")) and not list(run.glob("*.new"))
    monkeypatch.undo()
    toy_run(shapes, run, resume=True)
    assert_same_end(run, tmp_path / "expected")
