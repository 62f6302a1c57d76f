"""Several processes train as one does, and none is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import IO

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("typer")

from processes import EQUAL, KILLED, SCORED, model_without_chance
from toy import plain_environment, toy_data, toy_run

from ssdcore.train.stream import Shares
from ssdcore.weights import load_model

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
END_WITHIN_S = 60.0  # that is how soon a run must end when a process is killed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("data") / "shapes", train=20, val=5)


def start(log: IO[str], *arguments: object) -> subprocess.Popen[str]:
    """Start two processes of `processes.py`."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *command, str(Path(__file__).with_name("processes.py")), *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=plain_environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def ended(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """The folder of the runs of two processes, what they printed, and the seconds that passed after one was killed."""
    output = tmp_path_factory.mktemp("runs")
    with (output / "log").open("w+") as log:
        torchrun = start(log, data, output)
        try:
            state = output / "killed" / "last-1.pt"
            deadline = time.monotonic() + 300
            while not state.exists() and torchrun.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert state.exists(), (output / "log").read_text()
            os.kill(int((output / "pid-1").read_text()), signal.SIGKILL)
            killed = time.monotonic()
            code = torchrun.wait(timeout=END_WITHIN_S)
        finally:
            torchrun.kill()
    assert code != 0
    return output, (output / "log").read_text(), time.monotonic() - killed


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("normalizer", ["batch", "image"])
def test_two_processes_give_the_losses_gradients_and_scores_of_one(
    ended: tuple[Path, str, float], data: Path, tmp_path: Path, normalizer: str, accumulate: int
) -> None:
    one = toy_run(data, tmp_path, EQUAL, model=model_without_chance(), validate=True, normalizer=normalizer)
    folder = ended[0] / f"{normalizer}-{accumulate}"
    two = json.loads((folder / "metrics.json").read_text())
    for expected, got in zip(one["epochs"], two["epochs"], strict=True):
        for name in ("classification", "bbox_regression", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-4)  # sums in another order
        # Scores change when a detection's rounding changes their order.
        assert got["val"]["AP50"] == pytest.approx(expected["val"]["AP50"], abs=0.02)
    states = [torch.load(path / "last.pt", weights_only=True) for path in (tmp_path, folder)]
    for name in ("model", "optimizer", "average"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-3, atol=1e-5)


def test_all_processes_score_the_statistics_that_are_saved(ended: tuple[Path, str, float]) -> None:
    states = [torch.load(ended[0] / f"free-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]["backbone.first.2.running_mean"].abs().sum() > 0
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_one_message(ended: tuple[Path, str, float]) -> None:
    messages = {(ended[0] / f"nan-{rank}").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    names = r"\d+\.jpg(, \d+\.jpg){7}"  # of both processes
    assert re.search(rf"step 1\), with images {names}; .* is the output of backbone\.second\.1;", messages.pop())


def test_sigterm_to_one_process_during_scoring_loses_no_step(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (tmp_path / "log").open("w+") as log:
        torchrun = start(log, data, run, "score")
        try:
            code = torchrun.wait(timeout=300)
        finally:
            torchrun.kill()
    assert code != 0
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 4 and len(state["history"]) == 1, (tmp_path / "log").read_text()
    record = toy_run(data, run, SCORED, model=model_without_chance(), validate=True, resume=True)
    assert ["val" in epoch for epoch in record["epochs"]] == [True, True, True]


def test_every_image_is_scored_once(ended: tuple[Path, str, float]) -> None:
    shares = [json.loads((ended[0] / f"read-{rank}.json").read_text()) for rank in (0, 1)]
    # What process 0 reads afterwards are the annotations, for the score.
    assert shares[1] == [1, 3] and shares[0][:3] == [0, 2, 4]


def test_the_command_joins_the_processes(ended: tuple[Path, str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    output, printed, _ = ended
    assert printed.count("training ssd300_tiny on cpu with 4 images of train") == 1  # process 0 alone prints
    assert printed.count("wrote ") == 1
    assert load_model(output / "command" / "model.safetensors")[0].name == "ssd300_tiny"
    assert "sync-bn must be off on a CPU" in printed


def test_a_killed_process_ends_the_run_within_a_minute(ended: tuple[Path, str, float]) -> None:
    _, printed, seconds = ended
    assert seconds < END_WITHIN_S
    assert "-9" in printed  # torchrun names the process and its signal


def test_a_run_is_resumed_with_another_number_of_processes(
    ended: tuple[Path, str, float], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ended[0] / "killed"
    step = torch.load(folder / "last.pt", weights_only=True)["step"]
    record = toy_run(data, folder, KILLED, model=model_without_chance(), resume=True, keep=1)
    assert 0 < step < record["settings"]["steps"] == 80
    uninterrupted = toy_run(data, tmp_path, KILLED, model=model_without_chance(), checkpoint_seconds=60.0)
    for expected, got in zip(uninterrupted["epochs"], record["epochs"], strict=True):
        # Sums in another order, whose differences grow over 80 steps. Without the states of SGD and of the data, losses
        # differ by tenths.
        assert got["classification"] == pytest.approx(expected["classification"], rel=1e-3)


def test_the_shares_of_the_processes_are_the_batch_of_one() -> None:
    steps = range(3, 9)
    whole = list(Shares(20, 8, steps))
    for processes in (2, 4):
        shares = [list(Shares(20, 8, steps, rank, processes)) for rank in range(processes)]
        assert [[*chain(*parts)] for parts in zip(*shares, strict=True)] == whole
    assert whole[0][0] == 20 + 8 and len(whole) == len(steps)  # the second batch of the second epoch of 20 images
