from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import mixed, pictured, shards, written


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with none, one and several pictures a sample, and samples from which nothing is learned."""
    return shards(tmp_path_factory.mktemp("data") / "mixed", mixed(23))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("data") / "pictured", [pictured(number) for number in range(12)])


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("data") / "written", [written(number) for number in range(12)])
