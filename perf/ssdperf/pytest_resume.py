"""A pytest plugin that leaves out the tests which passed before and records which other tests pass and fail.

`pytest -p ssdperf.pytest_resume --passed FILE --progress FILE`. The file of passed tests must not change while pytest
runs: the workers of pytest-xdist read it one after the other, and all must collect the same tests.
"""

from pathlib import Path

import pytest

from ssdperf.progress import FAILED, PASSED, append


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, required=True, help="names of tests to leave out, one per line")
    parser.addoption("--progress", type=Path, required=True, help="file of a Progress, to which results are added")


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist report to the controller, which alone records.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config.getoption("--progress")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = set(config.getoption("--passed").read_text().splitlines())
    left_out = [item for item in items if item.nodeid in passed]
    items[:] = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=left_out)


class _Recorder:
    def __init__(self, progress: Path) -> None:
        self.progress = progress
        self.failed: set[str] = set()
        self.skipped: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test may fail in its set-up, in its call or in its tear-down, which comes last.
        if report.failed and report.nodeid not in self.failed:
            self.failed.add(report.nodeid)
            append(self.progress, report.nodeid, FAILED)
        elif report.skipped:
            self.skipped.add(report.nodeid)
        elif report.when == "teardown" and report.nodeid not in self.failed | self.skipped:
            append(self.progress, report.nodeid, PASSED)
