"""The benchmark itself: its statistics, floors and files, and that it reports what is slow or wrong."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from ssdcore import kernels
from ssdperf import (
    benchmark,
    charts,
    comparison,
    counting,
    eager,
    environment,
    inputs,
    measurement,
    readme,
    results,
    scaling,
    spread,
    tables,
    text,
    timing,
)
from ssdperf.busy import one_core_busy
from ssdperf.cases import detector, drop_in
from ssdperf.differences import same_detections, same_kept, same_matches, within
from ssdperf.progress import FAILED, PASSED, Progress
from ssdperf.registry import REGISTRY, Case, Workload, grid, on_cpu, star
from ssdperf.results import Results, Row

ROOT = Path(__file__).parents[1]
FACTS = {"device": "a machine", "kind": "cpu", "commit": "0123456789abcdef", "date": "2026-01-02T03:04:05+00:00"}
BANDWIDTH = 4.3e12  # bytes a second


def timed(provider: str = "ssdcore", median: float = 1.0, **values: Any) -> Row:
    shape = {"B": 2, "A": 10}
    numbers = {"p10": 0.9 * median, "p90": 1.1 * median, "runs": 9} | values
    return Row("nms", shape, "float32", provider, "timed", median=median, **numbers)


def rows_of(workload: Workload) -> dict[str, Row]:
    case = Case("made up", lambda device, dtype: workload, [], [])
    rows = measurement.rows_of(case, {"dtype": "float32"}, "cpu", BANDWIDTH, compiled=False)
    return {row.provider: row for row in rows}


# --- statistics -------------------------------------------------------------------------------------------


def test_a_summary_has_the_median_and_the_deciles() -> None:
    assert timing.summarise([float(x) for x in range(11)][::-1]) == timing.Times(5.0, 1.0, 9.0, 11)
    assert timing.summarise([7.0]) == timing.Times(7.0, 7.0, 7.0, 1)


def test_quick_calls_are_timed_often_and_slow_calls_rarely() -> None:
    assert timing.runs_for(1e-6) == timing.MAX_RUNS
    assert timing.runs_for(timing.MEASURE_S / 50) == 50
    assert timing.runs_for(timing.MEASURE_S) == timing.MIN_RUNS
    assert timing.runs_for(timing.PATIENCE_S / 3) == 3
    assert timing.runs_for(2 * timing.PATIENCE_S) == 1


def test_turns_of_each_call_are_spread_evenly() -> None:
    turns = list(timing.in_turn({"quick": 100, "slow": 4}))
    assert turns.count("quick") == 100 and turns.count("slow") == 4
    positions = [position for position, name in enumerate(turns) if name == "slow"]
    assert [after - before for before, after in pairwise(positions)] == [26, 26, 26]


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_exponent_of_a_power_is_found(power: int) -> None:
    sizes = [1.0, 10, 100, 1000, 10_000]
    times = [0.01 + 0.001 * size**power for size in sizes]  # launching hides the growth of the first
    assert scaling.exponent(sizes, times) == pytest.approx(power, abs=0.15)


def test_two_points_have_no_exponent() -> None:
    assert scaling.exponent([1, 2], [1, 2]) is None
    assert scaling.exponent([], []) is None


# --- times and memory -------------------------------------------------------------------------------------


@pytest.mark.timing
def test_a_call_that_sleeps_three_times_as_long_takes_three_times_as_long() -> None:
    times = timing.measure({"once": lambda: time.sleep(0.004), "thrice": lambda: time.sleep(0.012)}, "cpu")
    assert times["thrice"].median / times["once"].median == pytest.approx(3, rel=0.1)
    assert times["once"].p10 <= times["once"].median <= times["once"].p90


@pytest.fixture
def process_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time with the process's own CPU clock, which other processes on this machine do not disturb."""
    monkeypatch.setattr(timing.time, "perf_counter", time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.timing
def test_a_kernel_that_runs_three_times_takes_three_times_as_long(process_clock: None) -> None:
    boxes, scores = inputs.nms_boxes("clustered", 2000, "cpu")

    def slowed() -> torch.Tensor:
        for _ in range(3):
            kept = kernels.nms(boxes, scores, 0.5)
        return kept

    rows = rows_of(
        Workload(
            {
                "ssdcore": slowed,
                "twin": lambda: kernels.nms(boxes, scores, 0.5),
                "eager": lambda: eager.nms(boxes, scores, None, 0.5),
            },
            reads=(boxes, scores),
        )
    )
    assert rows["ssdcore"].median / rows["twin"].median == pytest.approx(3, rel=0.2)
    assert rows["ssdcore"].share / rows["twin"].share == pytest.approx(1 / 3, rel=0.2)


@pytest.mark.timing
def test_each_phase_has_its_share_of_the_time() -> None:
    def step() -> Generator[str, None, int]:
        yield "forward"
        time.sleep(0.015)
        yield "backward"
        time.sleep(0.005)
        return 7

    times, whole, shares = timing.measure_phases(step, "cpu")
    assert list(shares) == ["forward", "backward"]
    assert shares["forward"] == pytest.approx(0.75, abs=0.05)
    assert times.median == pytest.approx(20, rel=0.2) and whole == pytest.approx(20, rel=0.2)
    assert timing.finish(step()) == 7


@pytest.mark.timing
def test_waits_for_data_count_in_the_whole_time() -> None:
    # Two batches of three are there at once, the third takes 30 ms. The median step takes 2 ms, the mean 2 + 30 / 3.
    number = 0

    def step() -> Generator[str, None, None]:
        nonlocal number
        yield "data"
        number += 1
        if number % 3 == 0:
            time.sleep(0.030)
        yield "forward"
        time.sleep(0.002)

    times, whole, shares = timing.measure_phases(step, "cpu", ahead=9)
    assert times.median < 5 and times.runs >= 18
    assert whole == pytest.approx(12, rel=0.25)
    assert shares["data"] == pytest.approx(10 / 12, abs=0.1)


def test_memory_is_the_peak_and_not_the_sum() -> None:
    def call() -> torch.Tensor:
        for _ in range(3):
            scratch = torch.empty(2**20)
            del scratch
        kept, more = torch.empty(2**20), torch.empty(2**19)
        del more
        return kept

    assert counting.count(call, "cpu") == counting.Counts(4 * 2**20 + 4 * 2**19, None, None)


# --- wrong results and failures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "note"),
    [
        (lambda kept: kept[:-1], "shape"),
        (lambda kept: kept.flip(0), "integers"),
        (lambda kept: kept.index_fill(0, torch.tensor([3]), 9999), "1 of"),
    ],
    ids=["one box missing", "another order", "one other box"],
)
def test_a_wrong_result_is_not_timed(wrong: Callable[[torch.Tensor], torch.Tensor], note: str) -> None:
    boxes, scores = inputs.nms_boxes("clustered", 500, "cpu")
    rows = rows_of(
        Workload(
            {
                "ssdcore": lambda: wrong(kernels.nms(boxes, scores, 0.5)),
                "eager": lambda: eager.nms(boxes, scores, None, 0.5),
            },
            reads=(boxes, scores),
        )
    )
    assert rows["ssdcore"].status == "wrong" and note in rows["ssdcore"].note
    assert rows["ssdcore"].median is None and rows["ssdcore"].runs is None
    assert rows["eager"].status == "timed"
    table = tables.table(Results(FACTS, list(rows.values())))
    assert "wrong" in table.splitlines()[1]


@pytest.mark.parametrize("ratio", [2.0, 3.5])
def test_a_loss_with_another_mining_ratio_is_wrong(ratio: float) -> None:
    case = REGISTRY["multibox_loss"]
    torch.manual_seed(0)
    workload = case.build("cpu", torch.float32, B=1, A=8732, C=21, G=7, head="packed")
    right = workload.providers["ssdcore"]
    assert list(measurement.checked(workload)[0]) == ["ssdcore", "torchvision", "eager"]

    def mining() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            original = kernels.multibox_loss
            patch.setattr(kernels, "multibox_loss", lambda *args: original(*args, neg_pos_ratio=ratio))
            return right()

    broken = replace(workload, providers={**workload.providers, "ssdcore": mining})
    assert measurement.checked(broken)[1]["ssdcore"][0] == "wrong"


def test_a_nan_is_wrong_and_a_last_bit_is_not() -> None:
    right = torch.tensor([1.0, 2.0])
    difference = within(1e-5)
    assert difference(right * (1 + 1e-6), right) == ""
    assert "norm" in difference(right * (1 + 1e-4), right)
    assert "norm" in difference(torch.tensor([1.0, float("nan")]), right)


def test_a_few_matches_may_differ() -> None:
    right = torch.arange(200).view(1, 200) - 100  # half of the anchors are matched
    other = right.clone()
    other[0, 150] = 7
    assert same_matches(other, right) == ""
    assert "50 anchors differ, of 100 matched" in same_matches(right.clamp(max=49), right)


def detections(boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    count = len(boxes)
    return {"boxes": boxes, "scores": 1 - torch.arange(count) / 100, "labels": torch.ones(count, dtype=torch.int64)}


def test_a_few_detections_may_differ() -> None:
    boxes = inputs.random_boxes(50)
    right = [detections(boxes)]
    shifted = [detections(torch.cat((boxes[:10], boxes[11:], boxes[:1])))]  # without box 10, the rest moves up
    assert same_detections(shifted, right) == ""
    assert "only" in same_detections([detections(boxes + 1.0)], right)
    other_labels = [right[0] | {"labels": right[0]["labels"] + 1}]
    assert "only 0%" in same_detections(other_labels, right)
    other_scores = [right[0] | {"scores": right[0]["scores"] * 0.9}]
    assert "scores" in same_detections(other_scores, right)


def test_padded_results_are_compared_with_lists() -> None:
    padded = torch.tensor([[3, 1, -1], [0, 1, 2]]), torch.tensor([2, 3], dtype=torch.int32)
    assert same_kept([torch.tensor([3, 1]), torch.tensor([0, 1, 2, 5])], padded) == ""
    assert "integers" in same_kept([torch.tensor([3, 2]), torch.tensor([0, 1, 2, 5])], padded)
    assert "integers" in same_kept([torch.tensor([3]), torch.tensor([0, 1, 2, 5])], padded)


def test_no_iou_is_within_a_rounding_error_of_the_threshold() -> None:
    for layout in inputs.LAYOUTS:
        boxes, _ = inputs.nms_boxes(layout, 2000, "cpu")
        assert ((kernels.box_iou(boxes, boxes) - 0.5).abs() > 2e-6).all()


def test_a_provider_that_fails_does_not_stop_the_others() -> None:
    def fails() -> None:
        raise RuntimeError("out of\nluck")

    rows = rows_of(Workload({"ssdcore": fails, "eager": lambda: torch.ones(3)}))
    assert (rows["ssdcore"].status, rows["ssdcore"].note) == ("failed", "RuntimeError: out of luck")
    assert rows["eager"].status == "timed"
    without_reference = rows_of(Workload({"ssdcore": lambda: torch.ones(3), "eager": fails}))
    assert without_reference["ssdcore"].status == "timed" and without_reference["eager"].status == "failed"


def test_a_provider_that_fails_while_it_is_timed_does_not_stop_the_others() -> None:
    calls = 0

    def fails_later() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("later")
        return torch.ones(3)

    rows = rows_of(Workload({"ssdcore": fails_later, "eager": lambda: torch.ones(3)}))
    assert (rows["ssdcore"].status, rows["ssdcore"].note) == ("failed", "RuntimeError: later")
    assert rows["eager"].status == "timed" and rows["eager"].median is not None


@pytest.mark.parametrize(("syncs", "replayed"), [(None, True), (0, True), (2, False)])
def test_a_call_is_replayed_unless_it_is_known_to_wait(
    monkeypatch: pytest.MonkeyPatch, syncs: int | None, replayed: bool
) -> None:
    def measure(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, timing.Times]:
        for call in calls.values():
            call()
        return dict.fromkeys(calls, timing.Times(2.0, 2.0, 2.0, 9))

    def fails() -> None:
        raise RuntimeError("later")

    monkeypatch.setattr(counting, "count", lambda *_: counting.Counts(1, None, syncs))
    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "measure_replay", lambda _: timing.Times(1.0, 1.0, 1.0, 9))
    found = measurement.measured({"ssdcore": lambda: None, "conch": fails}, "cuda")
    assert found["ssdcore"].get("replay") == (1.0 if replayed else None)
    assert found["conch"]["status"] == "failed" and "replay" not in found["conch"]


def test_a_call_that_cannot_be_captured_keeps_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_capture(_: Callable[[], Any]) -> None:
        raise RuntimeError("not permitted")

    monkeypatch.setattr(counting, "count", lambda *_: counting.Counts(1, None, None))
    monkeypatch.setattr(timing, "measure", lambda calls, _: dict.fromkeys(calls, timing.Times(2.0, 2.0, 2.0, 9)))
    monkeypatch.setattr(timing, "measure_replay", cannot_capture)
    found = measurement.measured({"ssdcore": lambda: None}, "cuda")["ssdcore"]
    assert found["median"] == 2.0 and found["note"] == "no replay: RuntimeError: not permitted"


def test_inputs_that_cannot_be_built_are_reported() -> None:
    def build(device: str, dtype: torch.dtype) -> Workload:
        raise MemoryError("too large")

    row = measurement.rows_of(Case("made up", build, [], []), {"dtype": "float32"}, "cpu", BANDWIDTH, compiled=False)[0]
    assert (row.status, row.note) == ("failed", "its inputs: MemoryError: too large")


# --- the cases --------------------------------------------------------------------------------------------

SMALL = {"B": 2, "A": 500, "N": 300, "M": 400, "C": 6, "K": 5}


WHOLE_MODELS = ("training step", "inference", "drop-in training", "drop-in inference")


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in WHOLE_MODELS])
def test_all_providers_of_a_case_agree(name: str) -> None:
    shapes = REGISTRY[name].quick
    for shape in shapes:
        torch.manual_seed(0)
        small = {key: SMALL.get(key, value) for key, value in shape.items() if key != "dtype"}
        right, excluded, _ = measurement.checked(REGISTRY[name].build("cpu", torch.float32, **small))
        assert excluded == {}
        assert {"ssdcore", "torchvision", "eager"} <= set(right)


@pytest.mark.parametrize("head", ["channels_last", "planes"])
@pytest.mark.parametrize("name", ["criterion", "postprocess"])
def test_all_providers_agree_on_maps(name: str, head: str) -> None:
    torch.manual_seed(0)
    shape = {key: SMALL.get(key, value) for key, value in REGISTRY[name].quick[0].items() if key != "dtype"}
    workload = REGISTRY[name].build("cpu", torch.float32, **shape | {"A": 8732, "head": head})
    right, excluded, _ = measurement.checked(workload)
    assert excluded == {}
    assert {"ssdcore", "torchvision", "eager"} <= set(right)


@pytest.mark.parametrize("name", ["training step", "inference"])
def test_both_detectors_give_the_same_results(name: str) -> None:
    torch.manual_seed(0)
    workload = REGISTRY[name].build("cpu", torch.float32, model="ssd300_vgg16", B=1, layout="NCHW")
    right, excluded, _ = measurement.checked(workload)
    assert excluded == {} and list(right) == ["ssdcore", "torchvision"]


@pytest.mark.parametrize(
    ("name", "model"),
    [("drop-in training", "ssdlite320"), *(("drop-in inference", model) for model in drop_in.DETECTORS)],
)
def test_torchvision_models_give_the_same_results_with_our_ops(name: str, model: str) -> None:
    torch.manual_seed(0)
    right, excluded, result = measurement.checked(REGISTRY[name].build("cpu", torch.float32, model=model, B=2))
    assert excluded == {} and list(right) == ["ssdcore", "torchvision"]
    assert name == "drop-in training" or len(result[0]["scores"]) >= 100  # as many as the model returns


def test_batches_are_the_same_each_time_they_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "usable_cores", lambda: 4)
    batches = detector._Batches(2, "cpu")
    assert batches.ahead == 4  # two workers, two batches each
    first, second = next(batches)[0], next(batches)[0]
    assert not torch.equal(first, second)
    batches.close()
    assert torch.equal(next(batches)[0], first)
    batches.close()


@pytest.mark.parametrize("name", REGISTRY)
def test_the_shapes_of_a_case_have_the_same_sizes(name: str) -> None:
    case = REGISTRY[name]
    for shape in [*case.shapes, *case.quick]:
        assert set(shape) == set(case.shapes[0])
    assert set(case.sweep) <= set(case.shapes[0])
    assert len({str(shape) for shape in case.shapes}) == len(case.shapes)
    assert all(shape["dtype"] == "float32" for shape in case.shapes_for("cpu", quick=False))


def test_grids_and_stars_list_shapes() -> None:
    assert grid(N=[1, 2], K=["a"]) == [{"N": 1, "K": "a"}, {"N": 2, "K": "a"}]
    assert star({"B": 1, "A": 5}, B=[1, 2], A=[6]) == [{"B": 1, "A": 5}, {"B": 2, "A": 5}, {"B": 1, "A": 6}]
    assert on_cpu({"B": 128, "C": 81, "dtype": "bfloat16"}) == {"B": 8, "C": 81, "dtype": "float32"}


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_boxes_lie_on_whole_pixels_and_scores_are_distinct(layout: str) -> None:
    boxes, scores = inputs.nms_boxes(layout, 1001, "cpu")
    assert torch.equal(boxes, boxes.round()) and (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(scores.unique()) == 1001
    kept = len(kernels.nms(boxes, scores, 0.5))
    if layout == "chain":  # every other box
        assert kept == 501
    if layout == "clustered":
        assert kept < 200


def test_inputs_resemble_those_of_a_detector() -> None:
    truth = inputs.truth(128, 81, 7, "cpu")
    assert sum(truth.counts) / 128 == pytest.approx(7, rel=0.02)
    assert min(truth.counts) == 0 and 30 < max(truth.counts) <= 100
    trained, _ = inputs.head_outputs(1, 8732, 81, "trained", torch.float32, "cpu")
    random, _ = inputs.head_outputs(1, 8732, 81, "random", torch.float32, "cpu")
    passing = [(x.softmax(-1)[..., 1:] > 0.01).sum(dim=1).float().mean().item() for x in (trained, random)]
    assert 40 < passing[0] < 80 and passing[1] > 8700


# --- floors -----------------------------------------------------------------------------------------------


def moved_by(workload: Workload) -> int:
    return measurement.size_of([*workload.reads, workload.providers["eager"]()])


def test_the_bytes_of_box_iou() -> None:
    assert (
        moved_by(REGISTRY["box_iou"].build("cpu", torch.float32, N=100, M=8732)) == 16 * (100 + 8732) + 4 * 100 * 8732
    )


def test_the_bytes_of_the_criterion() -> None:
    # The logits are read; the gradients of logits and deltas and two losses are written: 86 µs for 128 images, H200.
    workload = REGISTRY["criterion"].build("cpu", torch.bfloat16, B=1, A=8732, C=81, G=7, head="packed")
    moved = moved_by(workload)
    assert moved == 2 * 8732 * (2 * 81 + 4) + 2 * 4
    assert 128 * moved / BANDWIDTH == pytest.approx(86.3e-6, rel=0.005)


def test_the_share_of_the_floor_refers_to_the_replay() -> None:
    assert timed(median=4.0, floor=1.0).share == 0.25
    assert timed(median=4.0, floor=1.0, replay=2.0).share == 0.5
    assert timed(median=4.0).share is None
    assert timed(median=4.0, whole=5.0, stages={"all": 1.0}).images_per_second == 400


# --- the file ---------------------------------------------------------------------------------------------


def test_saved_results_can_be_loaded(tmp_path: Path) -> None:
    rows = [timed(floor=0.5, bytes=12, stages={"a": 1.0}), Row("nms", {"N": 3}, "float32", "conch", "wrong", "1 of 3")]
    Results(FACTS, rows).save(tmp_path / "new" / "x.json")
    assert results.load(tmp_path / "new" / "x.json") == Results(FACTS, rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", "no results of schema"),
        (json.dumps({"schema": 99, "rows": []}), "no results of schema"),
        (json.dumps({"schema": results.SCHEMA, "rows": [{"case": "nms"}]}), "row 0"),
        (
            json.dumps(
                {
                    "schema": results.SCHEMA,
                    "rows": [{"case": "", "shape": {}, "dtype": "", "provider": "", "status": "guessed"}],
                }
            ),
            "row 0",
        ),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"x.json.*{message}"):
        results.load(file)


def test_a_folder_is_not_a_file_of_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        results.load(tmp_path)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.time_text(0.01234), "12.3 µs"),
        (text.time_text(1.5), "1.50 ms"),
        (text.time_text(99.96), "100 ms"),
        (text.time_text(9.999), "10.0 ms"),
        (text.time_text(0.9996), "1.00 ms"),
        (text.time_text(999.6), "1.00 s"),
        (text.time_text(12_345), "12.3 s"),
        (text.bytes_text(999), "999 B"),
        (text.bytes_text(999_600), "1.00 MB"),
        (text.ratio_text(9.999), "10.0x"),
        (text.bytes_text(1_234_000_000), "1.23 GB"),
        (text.share_text(0.854), "85%"),
        (text.share_text(0.0123), "1.2%"),
        (text.share_text(1e-5), "< 0.1%"),
        (tables.peer_text(timed("eager", 3.0), timed(median=2.0)), "1.50x"),
        (tables.peer_text(timed("eager", 3.0), None), "3.00 ms"),
        (tables.peer_text(None, timed()), ""),
    ],
)
def test_figures_as_text(shown: str, expected: str) -> None:
    assert shown == expected


# --- runs that continue -----------------------------------------------------------------------------------


def made_up_problems(built: list[str]) -> list[benchmark.Problem]:
    """Return the problems of two made-up cases with two shapes each; `built` receives each problem that is measured."""

    def case(name: str) -> Case:
        def build(device: str, dtype: torch.dtype, N: int) -> Workload:
            built.append(f"{name} {N}")
            return Workload({"ssdcore": lambda: torch.ones(N), "eager": lambda: torch.ones(N)})

        return Case(name, build, [], [])

    shapes = [{"N": N, "dtype": "float32"} for N in (1, 2)]
    return [benchmark.Problem(case(name), shape, shape["N"] == 1) for name in "ab" for shape in shapes]


CPU_FACTS = {**FACTS, "bandwidth": 1e9}


def test_a_busy_core_is_busy_and_the_result_says_so() -> None:
    before = os.times().children_user  # of ended children
    with one_core_busy():
        time.sleep(0.5)
    assert os.times().children_user - before > 0.1  # less than 0.5, because it starts, and other processes run too
    assert "another process keeps a core busy" in tables.machine_text({**FACTS, "busy": True})
    assert "busy" not in tables.machine_text(FACTS)


def test_headlines_are_measured_first_and_rows_keep_the_order_of_the_cases(tmp_path: Path) -> None:
    built: list[str] = []
    file = tmp_path / "x.json"
    found, left = benchmark.run(made_up_problems(built), Results(CPU_FACTS, []), minutes=math.inf, output=file)
    assert built == ["a 1", "b 1", "a 2", "b 2"] and left == 0
    assert [(row.case, row.shape["N"]) for row in found.rows[::2]] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert results.load(file).by_key().keys() == found.by_key().keys()


def test_a_run_that_continues_measures_only_what_is_missing() -> None:
    built: list[str] = []
    work = made_up_problems(built)
    found, left = benchmark.run(work, Results(CPU_FACTS, []), minutes=0, output=None)
    assert (found.rows, left, built) == ([], 4, [])
    first, left = benchmark.run(work[1:3], found, minutes=math.inf, output=None)
    assert built == ["b 1", "a 2"] and left == 0
    whole, left = benchmark.run(work, first, minutes=math.inf, output=None)
    assert built == ["b 1", "a 2", "a 1", "b 2"] and left == 0
    assert [(row.case, row.shape["N"]) for row in whole.rows[::2]] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert all(row in whole.rows for row in first.rows)


def test_an_interrupted_run_keeps_what_it_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    work = made_up_problems([])
    rows = {"a": [replace(timed(), case="a", shape={"N": 1})]}

    def interrupted(case: Case, *_: Any, **__: Any) -> list[Row]:
        if case.name == "b":
            raise KeyboardInterrupt
        return rows[case.name]

    monkeypatch.setattr(benchmark, "rows_of", interrupted)
    found, left = benchmark.run(work, Results(CPU_FACTS, []), minutes=math.inf, output=None)
    assert found.rows == rows["a"] and left == 3


@pytest.mark.parametrize("fact", ["commit", "code", "device", "torch", "quick"])
def test_a_run_continues_only_results_of_the_same_code_and_machine(tmp_path: Path, fact: str) -> None:
    facts = dict.fromkeys(benchmark.SHARED_FACTS, "same") | {"bandwidth": 1e9}
    Results(facts, []).save(tmp_path / "x.json")
    assert benchmark.resumed(tmp_path / "x.json", facts) == Results(facts, [])
    with pytest.raises(ValueError, match=rf"x.json holds results of {fact} same \(now other\): remove the file"):
        benchmark.resumed(tmp_path / "x.json", facts | {fact: "other"})


def test_progress_is_kept_between_calls(tmp_path: Path) -> None:
    first = Progress(tmp_path / "new" / "x.jsonl", {"code": "a"})
    first.record("one", PASSED)
    first.record("two", FAILED, "why")
    second = Progress(first.path, {"code": "a"})
    assert second.names(PASSED) == ["one"] and second.names(FAILED) == ["two"] and not second.restarted
    second.record("two", PASSED)
    assert Progress(first.path, {"code": "a"}).names(PASSED) == ["one", "two"]


def test_progress_begins_anew_for_other_code(tmp_path: Path) -> None:
    Progress(tmp_path / "x.jsonl", {"code": "a"}).record("one", PASSED)
    other = Progress(tmp_path / "x.jsonl", {"code": "b"})
    assert other.names(PASSED) == [] and other.restarted
    assert Progress(tmp_path / "x.jsonl", {"code": "b"}).names(PASSED) == []


def test_a_line_that_was_cut_off_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    Progress(file, {"code": "a"}).record("one", PASSED)
    with file.open("a") as whole:
        whole.write('{"name": "two", "sta')
    again = Progress(file, {"code": "a"})
    assert again.names(PASSED) == ["one"] and not again.restarted
    again.record("three", PASSED)
    assert again.names(PASSED) == ["one", "three"]


@pytest.mark.parametrize(("content", "restarted"), [("", False), ('{"code": "a', True)])
def test_progress_without_an_identity_begins_anew(tmp_path: Path, content: str, restarted: bool) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    progress = Progress(tmp_path / "x.jsonl", {"code": "a"})
    assert progress.names(PASSED) == [] and progress.restarted == restarted
    assert not Progress(tmp_path / "x.jsonl", {"code": "a"}).restarted


def test_an_identity_is_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Progress(tmp_path / "x.jsonl", {"code": "a"}).record("one", PASSED)
    before = (tmp_path / "x.jsonl").read_text()

    def full_disk(self: Path, content: str) -> None:
        self.open("w").write(content[:3])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space"):
            Progress(tmp_path / "x.jsonl", {"code": "b"})
    assert (tmp_path / "x.jsonl").read_text() == before


def test_the_code_digest_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    digests = []
    for content in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "kernels" / "x.py").write_text(content)
        digests.append(environment.code_digest("kernels"))
    assert digests[0] == digests[2] != digests[1]


# --- comparing and showing --------------------------------------------------------------------------------


def test_a_change_is_more_than_noise() -> None:
    assert comparison.differs(timed(median=1.0), timed(median=2.0))
    assert comparison.differs(timed(median=2.0), timed(median=1.0))
    assert not comparison.differs(timed(median=1.0), timed(median=1.04, p10=1.03, p90=1.05))
    assert not comparison.differs(timed(median=1.0, p90=3.0), timed(median=2.0, p10=0.5))
    once = {"p10": 1.0, "p90": 1.0, "runs": 1}
    assert not comparison.differs(timed(median=1.0, **once), timed(median=1.1, p10=1.1, p90=1.1, runs=1))


def test_a_change_that_launching_hides_shows_in_the_replay() -> None:
    before = timed(median=1.0, replay=0.1, replay_p10=0.09, replay_p90=0.11)
    after = timed(median=1.0, replay=0.2, replay_p10=0.19, replay_p90=0.21)
    assert comparison.differs(before, after) and not comparison.differs(before, timed(median=1.0))
    assert comparison.side_by_side({"a": Results(FACTS, [before]), "b": Results(FACTS, [after])})[0][1] == [0.1, 0.2]
    assert comparison.side_by_side({"a": Results(FACTS, [before]), "b": Results(FACTS, [timed()])})[0][1] == [1.0, 1.0]


def test_changes_list_what_became_slower_and_what_broke() -> None:
    old = Results(FACTS, [timed(median=1.0)])
    assert "0 changed" in comparison.changes(old, Results(FACTS, [timed(median=1.01)]))
    slower = comparison.changes(old, Results(FACTS, [timed(median=2.0)]))
    assert "1 changed" in slower and "2.00x" in slower
    broken = comparison.changes(old, Results(FACTS, [replace(timed(), status="wrong")]))
    assert "wrong" in broken
    elsewhere = comparison.changes(old, Results({**FACTS, "device": "another"}, [timed()]))
    assert "not the same device" in elsewhere


def test_compared_files_have_different_names() -> None:
    assert comparison.names([Path("a/x.json"), Path("a/y.json")]) == ["x", "y"]
    assert comparison.names([Path("a/x.json"), Path("b/x.json")]) == ["a/x", "b/x"]


def test_charts_carry_a_digest_of_what_they_show() -> None:
    run = Results(FACTS, [timed(floor=0.1), timed("torchvision", 3.0), Row("nms", {"N": 3}, "float32", "x", "failed")])
    keys = list(run.by_key())
    for svg in charts.charts(run, keys).values():
        assert charts.digest_in(svg.decode()) == charts.digest(run, keys)
    slower = Results(FACTS, [timed(floor=0.1), timed("torchvision", 3.1)])
    assert charts.digest(slower, list(slower.by_key())) != charts.digest(run, keys)


def test_eager_is_a_peer_on_a_gpu_only() -> None:
    rows = [timed(provider, replay=0.5) for provider in ("ssdcore", "torchvision", "eager", "torch.compile")]
    on_cpu, on_gpu = Results(FACTS, rows), Results({**FACTS, "kind": "cuda"}, rows)
    assert on_cpu.peers == ["torchvision"]
    assert on_gpu.peers == ["torchvision", "eager", "torch.compile"]
    keys = list(on_cpu.by_key())
    for shown in (tables.table, lambda run: readme.section({"x": run}), lambda run: str(charts.charts(run, keys))):
        assert "eager" not in shown(on_cpu) and "torch.compile" not in shown(on_cpu)
        assert "eager" in shown(on_gpu) and "torch.compile" in shown(on_gpu)
    assert list(scaling.curves(on_cpu, "B")) == ["ssdcore", "ssdcore (graph)", "torchvision"]


def test_a_comparison_is_drawn(tmp_path: Path) -> None:
    runs = {"one": Results(FACTS, [timed()]), "two": Results(FACTS, [timed(median=2.0)])}
    assert "2.00 ms (2.00x)" in comparison.table(runs)
    charts.draw_comparison(runs, tmp_path / "c.svg")
    assert "two" in (tmp_path / "c.svg").read_text()


def committed() -> dict[str, Results]:
    return {file.stem: results.load(file) for file in sorted((ROOT / "perf/results").glob("*.json"))}


def test_the_readme_shows_the_committed_results() -> None:
    content = (ROOT / "README.md").read_text()
    assert readme.with_section(content, readme.section(committed())) == content, "run python perf/report.py"


def test_the_benchmarks_readme_shows_the_committed_detectors() -> None:
    content = (ROOT / "perf/README.md").read_text()
    assert readme.with_section(content, readme.details(committed())) == content, "run python perf/report.py"
    assert "training step" in content


def test_the_charts_show_the_committed_results() -> None:
    runs = spread.first_runs(committed())
    assert runs
    for stem, run in runs.items():
        keys = readme.headline(run)
        for name in charts.CHARTS:
            svg = (ROOT / f"perf/results/{stem}-{name}.svg").read_text()
            assert charts.digest_in(svg) == charts.digest(run, keys), "run python perf/report.py"


def test_committed_results_name_their_commit() -> None:
    for run in committed().values():
        # None is allowed: it means that a copy without git's history was measured.
        assert not run.facts["modified"], "measure a commit, not a working tree"
        assert len(run.facts["commit"]) == 40
        assert not run.facts["quick"]
        assert any(row.status == "timed" for row in run.rows)


def test_the_readme_says_whether_a_gpu_was_measured() -> None:
    assert readme.NO_GPU in readme.section({"x": Results(FACTS, [timed()])})
    on_gpu = Results({**FACTS, "kind": "cuda"}, [timed(replay=0.5)])
    section = readme.section({"a": Results(FACTS, [timed()]), "b": on_gpu})
    assert readme.NO_GPU not in section
    assert section.index("b-speedup.svg") < section.index("a-speedup.svg")  # GPUs first


def test_repetitions_show_their_spread_alone_and_with_a_busy_core() -> None:
    quiet = [Results(FACTS, [timed(median=ours), timed("torchvision", 3.0)]) for ours in (1.0, 2.0, 1.5)]
    busy = Results({**FACTS, "busy": True}, [timed(median=6.0), timed("torchvision", 3.0)])
    runs = {"a": quiet[0], "a-2": quiet[1], "a-3": quiet[2], "a-busy": busy}
    assert spread.first_runs(runs) == {"a": quiet[0]}
    _, _, line = spread.spread(runs, quiet[0]).splitlines()
    figures = [entry.strip() for entry in line.strip("|").split("|")][2:]
    assert figures == ["3", "1.00 ms to 2.00 ms", "1.50x to 3.00x", "1", "6.00 ms", "0.500x", "4.00x"]
    assert readme.details(runs).count(line) == 1 and line not in readme.section(runs)


def test_runs_of_another_commit_are_no_repetitions() -> None:
    before, after = Results(FACTS, [timed()]), Results({**FACTS, "commit": "f" * 40, "busy": True}, [timed()])
    assert len(spread.first_runs({"a": before, "b": after})) == 2
    assert spread.spread({"a": before, "b": after}, before) == ""


# --- the commands -----------------------------------------------------------------------------------------


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script, *rest = arguments
    return subprocess.run(
        [sys.executable, str(ROOT / "perf" / script), *rest],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=inherited | environment,
    )


def test_a_run_is_saved_drawn_and_compared(tmp_path: Path) -> None:
    first = command("run.py", "--device", "cpu", "--quick", "--case", "box_iou", "--output", "a.json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "box_iou" in first.stdout and "wrote a.json" in first.stdout
    rows = results.load(tmp_path / "a.json").rows
    assert {row.provider for row in rows} == {"ssdcore", "torchvision", "eager", "torch.compile"}
    assert all(row.status == "timed" for row in rows)

    (tmp_path / "b.json").write_bytes((tmp_path / "a.json").read_bytes())
    assert "a-floor.svg" in command("plot.py", "a.json", cwd=tmp_path).stdout
    side_by_side = command("compare.py", "a.json", "b.json", cwd=tmp_path)
    assert "(1.00x)" in side_by_side.stdout and (tmp_path / "comparison.svg").exists()


def test_shapes_that_were_not_begun_in_time_are_counted(tmp_path: Path) -> None:
    done = command("run.py", "--device", "cpu", "--case", "box_iou", "--minutes", "0", cwd=tmp_path)
    assert "2 of 2 shapes were not begun within 0 minutes" in done.stdout


def test_list_prints_cases_and_shapes(tmp_path: Path) -> None:
    listed = command("run.py", "--list", "--device", "cpu", "--case", "nms", cwd=tmp_path).stdout
    assert listed.splitlines()[0].split() == ["nms", "N=8732", "boxes=uniform", "dtype=float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.py", "--case", "nsm"], "no case matches nsm; there are: box_iou"),
        (["run.py", "--baseline", "missing.json"], "missing.json does not exist"),
        (["run.py", "--minutes", "0"], "--minutes needs --output or --resume"),
        (["run.py", "--resume", "--quick"], "--resume needs --output with --case or --quick"),
        (["compare.py", "a.json"], "two files or more"),
        (["plot.py", "missing.json"], "missing.json does not exist"),
        (["sweep.py", "--case", "nms", "--axis", "B"], "no such case has such a size"),
        (["compile_report.py", "--arch", "h200"], "such as sm_90"),
    ],
)
def test_a_wrong_argument_is_explained(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr


def without_packages(packages: list[str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of perf/ as on a machine where `packages` are not installed."""
    script = str(ROOT / "perf" / arguments[0])
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({packages}))
sys.path.insert(0, {str(ROOT / "perf")!r})
sys.argv = {list(arguments)}
runpy.run_path({script!r}, run_name="__main__")
"""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=inherited)


COMMAND_LINE_PACKAGES = ["typer", "pycocotools", "safetensors", "tensorboard"]


def test_the_machine_code_report_needs_no_torchvision_and_no_matplotlib(tmp_path: Path) -> None:
    arguments = ["compile_report.py", "--arch", "h200"]  # refused once everything has been imported
    result = without_packages(["torchvision", "matplotlib", "PIL"], *arguments, cwd=tmp_path)
    assert "such as sm_90" in result.stderr and "Traceback" not in result.stderr


def test_cases_that_miss_a_package_are_left_out_and_named(tmp_path: Path) -> None:
    # As on a machine without a package that only the detector needs.
    listed = without_packages(["ssdcore.data"], "run.py", "--list", "--device", "cpu", cwd=tmp_path).stdout
    assert listed.startswith("box_iou")
    assert "left out: training step, inference (import of ssdcore.data halted" in listed
    refused = without_packages(["ssdcore.data"], "run.py", "--case", "inference", "--device", "cpu", cwd=tmp_path)
    assert refused.returncode != 0 and "left out: training step, inference" in refused.stderr


def test_the_ops_are_timed_without_the_packages_of_the_command_line(tmp_path: Path) -> None:
    arguments = ["run.py", "--device", "cpu", "--quick", "--case", "encode_boxes"]
    result = without_packages(COMMAND_LINE_PACKAGES, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1].startswith("encode_boxes")


def test_the_detector_is_timed_without_the_packages_of_the_command_line(tmp_path: Path) -> None:
    listed = without_packages(COMMAND_LINE_PACKAGES, "run.py", "--list", "--device", "cpu", cwd=tmp_path)
    assert {"training step", "inference"} <= {line[:20].strip() for line in listed.stdout.splitlines()}


def test_interpreted_kernels_are_not_timed(tmp_path: Path) -> None:
    result = command("run.py", "--case", "nms", cwd=tmp_path, TRITON_INTERPRET="1")
    assert result.returncode != 0 and "unset TRITON_INTERPRET" in result.stderr


# --- on a GPU ---------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
def test_launches_waits_and_memory_on_a_gpu() -> None:
    x = torch.ones(2**20, device="cuda")

    def call() -> float:
        y = x + 1
        return float((y * 2).sum())

    call()
    counts = counting.count(call, "cuda")
    assert counts.syncs == 1
    assert counts.launches is not None and 3 <= counts.launches <= 5  # add, multiply, sum, copy to the host
    assert counts.peak_bytes is not None and 2 * 2**22 <= counts.peak_bytes <= 2 * 2**22 + 2**21


@on_gpu
@pytest.mark.timing
def test_a_gpu_call_that_sleeps_three_times_as_long_takes_three_times_as_long() -> None:
    cycles = 2_000_000  # about a millisecond
    calls = {"once": lambda: torch.cuda._sleep(cycles), "thrice": lambda: torch.cuda._sleep(3 * cycles)}
    times = timing.measure(calls, "cuda")
    assert times["thrice"].median / times["once"].median == pytest.approx(3, rel=0.1)


@on_gpu
def test_a_wait_inside_an_op_is_counted() -> None:
    boxes, scores = inputs.nms_boxes("uniform", 1000, "cuda")
    torchvision.ops.nms(boxes, scores, 0.5)
    counts = counting.count(lambda: torchvision.ops.nms(boxes, scores, 0.5), "cuda")
    assert counts.syncs is not None and counts.syncs >= 1


@on_gpu
@pytest.mark.timing
def test_a_replay_does_not_include_launching() -> None:
    x = torch.ones(100, device="cuda")

    def call() -> None:
        for _ in range(100):
            x.add_(1)

    replay, launched = timing.measure_replay(call), timing.measure({"call": call}, "cuda")["call"]
    assert replay is not None and replay.median < launched.median
    assert timing.measure_replay(lambda: x.sum().item()) is None
    assert torch.rand(2, device="cuda").isfinite().all()  # not captured rather than aborted: the generator still works


@on_gpu
@pytest.mark.timing
def test_each_phase_on_a_gpu_has_its_share_of_the_time() -> None:
    def step() -> Generator[str, None, None]:
        yield "long"
        torch.cuda._sleep(3_000_000)
        yield "short"
        torch.cuda._sleep(1_000_000)

    *_, shares = timing.measure_phases(step, "cuda")
    assert shares["long"] == pytest.approx(0.75, abs=0.05)
