"""What the tests over real connections share: one microscopic base and one resident merge engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.running import one_model_at_a_time
from tests.tiny import TEXT, write_tiny_base

from weft.server.engine_process import Jobs


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def jobs() -> Jobs:
    """The merge process's jobs: they keep the base loaded between tests."""
    return Jobs()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True, scope="session")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing here touches the home of who runs the tests, or the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        one_model_at_a_time(patch)
        patch.setenv("WEFT_HOME", str(tmp_path_factory.mktemp("nobody") / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
