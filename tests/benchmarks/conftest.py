"""What benchmarks measure in processes of their own costs less to test than to start."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from benchmarks import ranks
from tests.ranks import forkserver


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Ranks are forked from the server of `tests.ranks`, where benchmarks load torch anew for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "multiprocessing", SimpleNamespace(get_context=lambda _: forkserver))
        yield
