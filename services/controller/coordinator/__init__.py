"""The controller at work: the members, the route, and the rollouts that change it."""

from services.controller.coordinator.conductor import Conductor
from services.controller.coordinator.coordinator import TICK_S, Coordinator
from services.controller.coordinator.roster import LOST_KEPT_S, SLEPT_S
from services.controller.coordinator.worker_records import RECORD_TTL_S, MemberKey

__all__ = ["LOST_KEPT_S", "RECORD_TTL_S", "SLEPT_S", "TICK_S", "Conductor", "Coordinator", "MemberKey"]
