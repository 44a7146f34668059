"""What every test shares: one thread, no network, the same numbers each time."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

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
