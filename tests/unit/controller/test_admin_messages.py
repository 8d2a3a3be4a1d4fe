"""What operators see of a model: its routed revision, with what is that revision's."""

from __future__ import annotations

from interlock.v1.model_pb2 import QUANTIZATION_INT8, QUANTIZATION_UNSPECIFIED

from services.controller.adapters.admin_messages import models_message
from services.controller.core.catalog import Catalog, Manifest, Revision
from services.controller.core.member import Kind, Member, Presence
from services.controller.core.residency import Phase, Resident
from services.controller.core.routing import Plan


def test_a_model_is_told_as_the_revision_that_serves() -> None:
    """Not as the one that the mesh was started with; that one is told until something is routed."""
    catalog = Catalog()
    for name, quantization, context_tokens in (("old", "auto", 64), ("new", "int8", 32)):
        manifest = Manifest("m", name, (), quantization, "auto", context_tokens, "")
        catalog.register(Revision(manifest, "/", 1.0))
    resident = Resident(Phase.ACTIVE)
    worker = Member(
        Kind.WORKER, "w", slots=4, presence=Presence.ATTACHED, residents={"old": resident, "new": resident}
    )

    def told(plan: Plan | None) -> tuple[str, int, int]:
        (model,) = models_message(catalog, [worker], plan).models
        return model.revision, model.quantization, model.context_tokens

    assert told(Plan("new", 2, {"new": 100})) == ("new", QUANTIZATION_INT8, 32)
    assert told(Plan("new", 1, {"old": 100})) == ("old", QUANTIZATION_UNSPECIFIED, 64)
    # An earlier controller routed it, and it is not known here any more.
    assert told(Plan("old", 1, {"gone": 100})) == ("", QUANTIZATION_UNSPECIFIED, 64)
    assert told(None) == ("", QUANTIZATION_UNSPECIFIED, 64)
