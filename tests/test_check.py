"""perf/check.py: its problems and comparisons, and that a problem which hangs or dies is reported and does no harm."""

import inspect
import multiprocessing
import time
from collections.abc import Sequence

import pytest
import torch

from ssdcore import kernels
from ssdperf import checks, isolation
from ssdperf.differences import within
from ssdperf.isolation import LEFT, Group, Outcome
from ssdperf.progress import FAILED, PASSED
from ssdperf.registry import REGISTRY

DEVICES = ("cpu", "cuda")


# --- the problems -----------------------------------------------------------------------------------------


def test_problems_have_different_names() -> None:
    for device in DEVICES:
        names = [problem.name for subject in checks.SUBJECTS for problem in subject.problems(device)]
        assert len(set(names)) == len(names)


def test_every_problem_has_the_sizes_that_its_builder_takes() -> None:
    for problem in (
        problem for subject in checks.SUBJECTS for device in DEVICES for problem in subject.problems(device)
    ):
        build = checks.BUILDERS.get(problem.case) or REGISTRY[problem.case].build
        sizes = {name: size for name, size in problem.shape.items() if name != "dtype"}
        inspect.signature(build).bind("cuda", getattr(torch, problem.shape["dtype"]), **sizes)


def test_kernels_whose_programs_wait_for_one_another_come_first() -> None:
    assert [subject.name for subject in checks.SUBJECTS[:4]] == [
        "nms",
        "batched_nms",
        "batched_nms_padded",
        "postprocess",
    ]
    for subject in checks.SUBJECTS[:3]:
        assert {problem.shape["boxes"] for problem in subject.full} == {"uniform", "clustered", "chain"}


def test_all_subjects_together_fit_into_a_command_of_nine_minutes() -> None:
    assert sum(subject.limit_s for subject in checks.SUBJECTS) <= 8.5 * 60


@pytest.mark.parametrize("subject", checks.SUBJECTS, ids=lambda subject: subject.name)
def test_small_problems_pass_with_eager(subject: checks.Subject) -> None:
    for problem in subject.small:  # without the interpreter, ssdcore runs eager on a CPU
        assert checks.solve(problem.name, "cpu") == ""


def test_a_wrong_decision_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.nms
    monkeypatch.setattr(kernels, "nms", lambda *args: right(*args).flip(0))
    assert "integers" in checks.solve(checks.NMS.small[0].name, "cpu")


def test_one_wrong_match_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.match_anchors

    def with_one_match_less(*args: torch.Tensor) -> torch.Tensor:
        matched = right(*args)
        matched.view(-1)[matched.argmax()] = -1
        return matched

    monkeypatch.setattr(kernels, "match_anchors", with_one_match_less)
    assert "1 of" in checks.solve(checks.LOSS.small[0].name, "cpu")


def test_a_loss_that_is_off_by_a_thousandth_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.multibox_loss

    def off(*args: torch.Tensor) -> kernels.MultiBoxLosses:
        losses = right(*args)
        return losses._replace(classification=losses.classification * 1.001)

    monkeypatch.setattr(kernels, "multibox_loss", off)
    assert "result 0 is off" in checks.solve(checks.LOSS.small[1].name, "cpu")


def test_a_result_that_changes_from_run_to_run_is_reported() -> None:
    right = torch.ones(3)
    noise = iter((1.0, 1.0 + 1e-6))
    providers = {"eager": lambda: right, "ssdcore": lambda: right * next(noise)}
    assert "second run" in checks.compare(providers, within(1e-5), twice=True)


# --- processes --------------------------------------------------------------------------------------------

# `eval` solves problems whose names are Python expressions; unlike a function of this file it starts without torch.
RIGHT, WRONG, RAISES = "''", "'off by one'", "1 / 0"
HANGS = "__import__('signal').signal(15, 1) and '' or __import__('time').sleep(60)"  # and ignores SIGTERM
DIES = "__import__('os')._exit(3)"


def solved(groups: Sequence[Group], method: str = "fork", seconds: float = 60) -> list[Outcome]:
    return list(isolation.solve_groups(eval, groups, multiprocessing.get_context(method), seconds))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_problem_that_hangs_is_killed_and_the_next_group_goes_on(method: str) -> None:
    started = time.monotonic()
    outcomes = solved([Group([RIGHT, HANGS, WRONG], 3), Group([WRONG], 30)], method)
    assert time.monotonic() - started < 20
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        (RIGHT, PASSED),
        (HANGS, FAILED),
        (WRONG, LEFT),
        (WRONG, FAILED),
    ]
    assert outcomes[1].note == "hung or too slow: killed 3 s after its group began"
    assert outcomes[3].note == "off by one"


def test_a_process_that_dies_fails_the_problem_that_it_was_solving() -> None:
    outcomes = solved([Group([DIES, RIGHT], 30), Group([RIGHT], 30)])
    assert [outcome.status for outcome in outcomes] == [FAILED, LEFT, PASSED]
    assert outcomes[0].note == "its process died with exit code 3"


def test_a_problem_that_raises_fails_and_the_next_problem_goes_on() -> None:
    outcomes = solved([Group([RAISES, RIGHT], 60)])
    assert [outcome.status for outcome in outcomes] == [FAILED, PASSED]
    assert outcomes[0].note == "ZeroDivisionError: division by zero"


def test_a_group_does_not_begin_without_enough_time() -> None:
    assert [outcome.status for outcome in solved([Group([RIGHT], 100)], seconds=isolation.MIN_S / 2)] == [LEFT]


def test_no_process_is_left_behind() -> None:
    solved([Group([HANGS], 1), Group([DIES], 30), Group([RIGHT], 30)])
    assert multiprocessing.active_children() == []
