"""What every test file shares."""

import signal
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors on a busy machine are fastest, and repeatable, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def forgotten_compilations():
    """Compiled code counts against one limit a process: let no test meet what another one compiled."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and torch._dynamo.utils.counters["frames"]:
        dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.fixture
def ctrl_c_raises():
    """Let SIGINT raise KeyboardInterrupt, as in a terminal; parallel test workers ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
