"""The controller at work: the members, the route, and the rollouts that change it."""

from services.controller.coordinator.conductor import Conductor
from services.controller.coordinator.coordinator import TICK_S, Coordinator
from services.controller.coordinator.leadership import Leadership
from services.controller.coordinator.roster import LOST_KEPT_S, SLEPT_S
from services.controller.coordinator.tenure import STEP_DOWN_S, Tenure
from services.controller.coordinator.worker_records import RECORD_TTL_S, MemberKey

__all__ = [
    "LOST_KEPT_S",
    "RECORD_TTL_S",
    "SLEPT_S",
    "STEP_DOWN_S",
    "TICK_S",
    "Conductor",
    "Coordinator",
    "Leadership",
    "MemberKey",
    "Tenure",
]
