"""Tests that share a fixture of their module run on one worker, which builds it once."""

import os

import pytest


@pytest.fixture(scope="module")
def shared() -> None:
    """Anything that takes long to build."""


def test_tests_with_a_shared_fixture_are_a_group(shared, request):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("not on a worker of pytest-xdist")
    assert request.node.nodeid.endswith("@test_workers")


def test_others_are_not(request):
    assert "@" not in request.node.nodeid
