"""Every test starts from the same seed; op tests see NaN wherever memory is fresh."""

import random

import hypothesis
import numpy
import pytest
import torch

# The same examples in every run: a red test is red again on the next machine.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=50, database=None
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--without-extension",
        action="store_true",
        help="the package under test was installed without _C: fail if it is there",
    )
    parser.addoption(
        "--device", default="cpu", help="where models are while a stage runs: cuda, on a GPU"
    )


def pytest_configure(config):
    if (device := config.getoption("--device")) != "cpu":
        # Before any test imports the functions that it changes.
        import on_device

        on_device.send_to(device)


KERNELS = ("math", "ops", "triton", "package")


def pytest_collection_modifyitems(items):
    """Subsets by file: `pytest -m driver`."""
    for item in items:
        subject = item.path.stem.removeprefix("test_").partition("_")[0]
        kind = "kernels" if subject in KERNELS else subject
        item.add_marker(kind if kind in ("kernels", "kronfluence") else "driver")


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty and at::empty return NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
