"""What serves, and what may serve beside it."""

from __future__ import annotations

import pytest

from services.common.errors import ModelUnknown, NoWorker
from services.gateway.core.catalog import ALIAS_CHARS_MAX, PREPARED_MAX, Catalog, CatalogEntry
from tests.fakes.gateway_ports import FakeTokenizer


def entry(
    revision: str,
    context_tokens: int = 4_096,
    *,
    model: str = "m",
    epoch: int = 0,
    fallback: str = "",
    secondary: bool = False,
) -> CatalogEntry:
    """An entry with plain values."""
    return CatalogEntry(model, revision, epoch, context_tokens, 1, FakeTokenizer(), fallback, secondary)


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
    """Also where the way back is what drops it."""
    catalog = Catalog()
    serve(catalog, entry("r1", 2_048, epoch=1))
    serve(catalog, entry("r2", epoch=2))
    assert catalog.find("m").context_tokens == 2_048
    catalog.drop("r1", "m")
    assert (catalog.find("m").revision, catalog.find("m").context_tokens) == ("r2", 4_096)


def test_a_name_that_no_vendor_has_is_compared_with_no_pattern() -> None:
    """That takes a second for a name of a message's length, which nobody else could be answered in."""
    catalog = Catalog((("*a*", "m"),))
    serve(catalog, entry("r1"))
    assert catalog.find("a" * ALIAS_CHARS_MAX).model == "m"
    with pytest.raises(ModelUnknown) as refused:
        catalog.find("a" * (ALIAS_CHARS_MAX + 1))
    assert len(refused.value.message) < 200


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


def test_another_mesh_s_model_is_never_the_default() -> None:
    """Though it is there first; until the own one is there nothing can be asked, by no name."""
    catalog = Catalog()
    serve(catalog, entry("r1", model="other", epoch=9, secondary=True))
    assert catalog.default == ""
    for name in (None, "other"):
        with pytest.raises(NoWorker):
            catalog.find(name)
    serve(catalog, entry("r1", epoch=1))
    assert catalog.default == "m"
    assert [catalog.find(name).model for name in (None, "m", "other")] == ["m", "m", "other"]


def test_a_model_of_the_own_mesh_is_not_replaced_by_one_of_its_name() -> None:
    """Whatever its epoch; and takes the place of one that came before."""
    catalog = Catalog()
    serve(catalog, entry("theirs", epoch=9, secondary=True))
    serve(catalog, entry("ours", epoch=1))
    assert catalog.find("m").revision == "ours"
    catalog.activate(entry("theirs", epoch=10, secondary=True))
    assert catalog.find("m").revision == "ours"


def test_what_stands_in_for_a_model_must_be_served_and_another_one() -> None:
    """Its latest revision says which it is."""
    catalog = Catalog()
    serve(catalog, entry("r1", epoch=1, fallback="other"))
    assert catalog.fallback_of(catalog.find("m")) is None
    serve(catalog, entry("r1", model="other", epoch=1, secondary=True))
    found = catalog.fallback_of(catalog.find("m"))
    assert found is not None
    assert found.model == "other"
    for epoch, name in enumerate(("", "m", "third"), start=2):
        serve(catalog, entry(f"r{epoch}", epoch=epoch, fallback=name))
        assert catalog.fallback_of(catalog.find("m")) is None


def test_each_model_keeps_as_many_prepared_revisions() -> None:
    """Those of one do not push out another's."""
    catalog = Catalog()
    serve(catalog, entry("r1", epoch=1))
    for number in range(PREPARED_MAX + 1):
        catalog.prepare(entry(f"r{number}", model="other", secondary=True))
    assert catalog.find_prepared("m", "r1") is not None
    assert catalog.find_prepared("other", "r0") is None
