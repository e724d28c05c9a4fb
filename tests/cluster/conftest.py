"""Every test of this folder runs on emulated nodes, and is skipped with one line where the machine cannot make them."""

from pathlib import Path

import pytest
from emulated import why_impossible


@pytest.fixture(scope="session", autouse=True)
def namespaces() -> None:
    if reason := why_impossible():
        pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
