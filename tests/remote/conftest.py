"""Fake servers, and a memory of its own for every test."""

import pytest
from fake_server import Fake

from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy
from stepcredit.samplers.remote import pool, weights


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("embedded", "cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory):
    """Short pauses, and a memory of its own."""
    monkeypatch.setattr(weights, "MEMORY", tmp_path_factory.mktemp("memory"))
    monkeypatch.setattr(pool, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(pool, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def fakes(policy):
    """Servers, made when they are asked for."""
    made: list[Fake] = []

    def make(**options) -> Fake:
        made.append(Fake(policy, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def fake(fakes) -> Fake:
    return fakes()
