"""What every test shares: one thread, no network, the same numbers each time."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from .docs.compatibility_page import Row, page

torch.set_num_threads(1)

settings.register_profile(
    "adalora",
    max_examples=20,
    deadline=None,  # the first call of an operation is slow
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("adalora")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


# ------------------------------------------------------------------------------- docs/compatibility.md, from outcomes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, help="write the compatibility table that these tests saw")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--compatibility") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(CompatibilityTable(config.getoption("--compatibility")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("compatibility"):
            area, what = mark.args
            # user_properties travel from the workers of pytest-xdist with the report
            item.user_properties.append(("compatibility", (area, what, mark.kwargs.get("refused", False))))


class CompatibilityTable:
    """Collects one outcome a row, over all tests that speak for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        for key, value in report.user_properties:
            if key == "compatibility":
                area, what, refused = value
                reason = str(report.longrepr[2]).removeprefix("Skipped: ") if report.skipped else ""
                outcome = "refused" if refused and report.passed else "works" if report.passed else report.outcome
                self.rows.append(Row(area, what, outcome, reason, report.nodeid.split("[")[0]))

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(page(self.rows), encoding="utf-8")
