"""What all tests share: the slow and gpu markers, one thread a process, and a process group of one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton: its kernels are then tested on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def process_group():
    """megatron-core's groups over one gloo process, for all tests of the session that build its models.

    The environment is put back: tests start processes of their own, which must not meet this group's.
    """
    from dmc.training.config import load
    from dmc.training.setup import init_distributed

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
            ("LOCAL_WORLD_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "0"),
        ):
            patch.setenv(name, value)
        init_distributed(load(overrides=["run.threads=1"]))
    torch.set_flush_denormal(False)  # what a run sets for itself; other tests of this process compare tiny numbers
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def rank_server():
    """Starts ranks of train.py as processes that tests may kill (`tests.training.ranks`)."""
    from tests.training.ranks import Server

    server = Server()
    yield server
    server.close()
