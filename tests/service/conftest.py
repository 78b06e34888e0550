"""One Ray for each way to start the server, shared by the tests of that way. They run after all others: a Ray at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.service.live import MODES, Service
from tests.tiny_models import make_tiny_model

HERE = Path(__file__).parent
WITH_THEIR_OWN_RAY = ("test_drill.py", "test_nodes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These last: other tests start a Ray of their own, and a session's fixture ends with the session. So do some of these,
    which go before the rest."""
    items.sort(key=lambda item: (HERE in item.path.parents) * (1 + (item.path.name not in WITH_THEIR_OWN_RAY)))
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", params=MODES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that is ready. One parameter after the other: pytest ends a service before it starts the next."""
    directory = tmp_path_factory.mktemp("service")
    model = make_tiny_model(directory / "model", vocab_size=300, eos=())
    made = Service(request.param, model, directory)
    try:
        yield made.start()
    finally:
        left = made.stop()
    assert left == [], f"the server left {left}"


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.client() as made:
        yield made


@pytest.fixture(autouse=True)
def _whole_and_at_rest(service: Service) -> Iterator[None]:
    """Each test begins with a whole service, and leaves nothing running."""
    service.check_whole()
    yield
    service.check_rest()
