"""Offline, one thread, and a tiny random model."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import nn

from tiny import tiny_llama


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def llama() -> nn.Module:
    return tiny_llama()
