from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Tiny models gain nothing from a second thread, and tests that run side by side lose by it. So do the processes that
# they start: three tests of a small BERT's step, each in its own, took 89 seconds with two threads, and 74 with one.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
