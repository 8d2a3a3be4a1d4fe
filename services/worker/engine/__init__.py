"""The engine: the step thread, the sessions on the event loop, and the mailboxes between them."""

from services.worker.engine.engine import Engine, EngineOverloaded, EngineSettings
from services.worker.engine.preparation import Preparation
from services.worker.engine.session import EngineSession

__all__ = ["Engine", "EngineOverloaded", "EngineSession", "EngineSettings", "Preparation"]
