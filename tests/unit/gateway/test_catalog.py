"""What serves, and what may serve beside it."""

from __future__ import annotations

import pytest

from services.common.errors import NoWorker
from services.gateway.core.catalog import PREPARED_MAX, Catalog, CatalogEntry
from tests.fakes.gateway_ports import FakeTokenizer


def entry(revision: str, context_tokens: int = 4_096, *, model: str = "m", epoch: int = 0) -> CatalogEntry:
    """An entry with plain values."""
    return CatalogEntry(model, revision, epoch, context_tokens, 1, FakeTokenizer())


def serve(catalog: Catalog, made: CatalogEntry) -> None:
    """Prepares and activates, as the controller does."""
    catalog.prepare(made)
    catalog.activate(made)


def test_while_two_revisions_share_the_requests_each_must_fit_both() -> None:
    """From the preparation to the end of the rollout, whichever of them new requests are counted for."""
    catalog = Catalog()
    serve(catalog, entry("r1", epoch=1))
    assert catalog.find("m").context_tokens == 4_096
    catalog.prepare(entry("r2", 2_048))
    assert (catalog.find("m").revision, catalog.find("m").context_tokens) == ("r1", 2_048)
    catalog.activate(entry("r2", 2_048, epoch=2))
    catalog.activate(entry("r1", epoch=3))
    assert catalog.find("m").context_tokens == 2_048
    catalog.drop("r2", "m")
    assert catalog.find("m").context_tokens == 4_096


def test_a_larger_context_is_there_when_the_old_revision_is_gone() -> None:
    """Also where the way back is what drops it, and nobody says which model it was of."""
    catalog = Catalog()
    serve(catalog, entry("r1", 2_048, epoch=1))
    serve(catalog, entry("r2", epoch=2))
    assert catalog.find("m").context_tokens == 2_048
    catalog.drop("r1")
    assert (catalog.find("m").revision, catalog.find("m").context_tokens) == ("r2", 4_096)


def test_another_model_s_revisions_bind_nobody() -> None:
    """Neither its lengths nor its rollouts."""
    catalog = Catalog()
    serve(catalog, entry("r1", epoch=1))
    for revision in ("r1", "r2"):
        catalog.prepare(entry(revision, 64, model="other"))
    assert catalog.find("m").context_tokens == 4_096
    assert catalog.models == ("m",)
    assert (catalog.is_replaced("m"), catalog.is_replaced("other")) == (False, True)


def test_a_model_is_replaced_while_two_of_its_revisions_are_prepared() -> None:
    """The rollout prepares the second one, and lets go of one at its end; preparing twice is one."""
    catalog = Catalog()
    serve(catalog, entry("r1", epoch=1))
    catalog.prepare(entry("r1"))
    assert not catalog.is_replaced("m")
    catalog.prepare(entry("r2"))
    assert catalog.is_replaced("m")
    catalog.drop("r1", "m")
    assert not catalog.is_replaced("m")


def test_what_is_prepared_is_bounded_and_nothing_serves_unasked() -> None:
    """The oldest go; an activation that came too late changes nothing."""
    catalog = Catalog()
    for number in range(PREPARED_MAX + 2):
        catalog.prepare(entry(f"r{number}"))
    assert [one.revision for one in catalog.prepared][0::7] == ["r2", "r9"]
    assert catalog.find_prepared("m", "r1") is None
    with pytest.raises(NoWorker):
        catalog.find("m")
    catalog.activate(entry("r9", epoch=5))
    catalog.activate(entry("r8", epoch=4))
    assert catalog.activated("m") == ("r9", 5)
