"""Tests that share a fixture of their module run on one worker, which builds it once for each of its parameters."""

import os

import pytest


@pytest.fixture(scope="module")
def shared() -> None:
    """Anything that takes long to build."""


def test_tests_with_a_shared_fixture_are_a_group(shared, request):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("not on a worker of pytest-xdist")
    assert request.node.nodeid.endswith("@test_workers")


@pytest.fixture(scope="module", params=range(2))
def one_of_two(request: pytest.FixtureRequest) -> int:
    """Two fixtures, which two workers may build at a time."""
    return request.param


def test_each_parameter_is_a_group(one_of_two, request):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("not on a worker of pytest-xdist")
    assert request.node.nodeid.endswith(f"@test_workers-{one_of_two}")


def test_others_are_not(request):
    assert "@" not in request.node.nodeid
