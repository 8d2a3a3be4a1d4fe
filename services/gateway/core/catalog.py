"""The models that can be asked. Owns: which revision and tokenizer a name means at this moment.

And which revisions may serve beside or after it: a rollout prepares the next one at the gateways, and lets go
of one of the two at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from services.common.errors import ModelUnknown, NoWorker
from services.gateway.core.ports import Tokenizer

# A mesh that has just started learns its models within seconds.
RETRY_UNTIL_ATTACHED_S = 2.0
# A model's name has at most 63 characters; a caller's mistake is repeated up to that length.
NAME_CHARS_SHOWN = 65
# Names of other vendors' models are shorter than this; patterns are not tried on more, for it takes long.
ALIAS_CHARS_MAX = 256
# Revisions of a model that are kept beside the active one: rollouts prepare one, a rollback needs the last.
PREPARED_MAX = 8


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model as it serves now.

    Attributes:
        model: Its name.
        revision: The revision that new requests get.
        epoch: The route's epoch that made it so.
        context_tokens: Most tokens of prompt and output together; in the catalog, for whichever of the
            model's prepared revisions a request may meet.
        quantization: How its weights are held: the number of `interlock.v1.Quantization`.
        tokenizer: Text to ids and back, with the chat template.
        fallback: The model that answers when no worker of this one can; empty: none.
        secondary: Whether it is another mesh's, which this gateway falls back to: never the default model.
    """

    model: str
    revision: str
    epoch: int
    context_tokens: int
    quantization: int
    tokenizer: Tokenizer
    fallback: str = ""
    secondary: bool = False


@dataclass(slots=True)
class Catalog:
    """What serves. One assignment replaces the whole table, so that no reader sees half a change.

    Attributes:
        aliases: Patterns of other names, with the model that each means; empty: the default one.
    """

    aliases: tuple[tuple[str, str], ...] = ()
    _entries: Mapping[str, CatalogEntry] = field(default_factory=lambda: MappingProxyType({}))
    # As they were activated: what the entries above are made of.
    _active: dict[str, CatalogEntry] = field(default_factory=dict)
    _prepared: dict[tuple[str, str], CatalogEntry] = field(default_factory=dict)

    def prepare(self, entry: CatalogEntry) -> None:
        """Notes a revision that may serve; the oldest of its model goes beyond the bound."""
        self._prepared[entry.model, entry.revision] = entry
        for key in [key for key in self._prepared if key[0] == entry.model][:-PREPARED_MAX]:
            del self._prepared[key]
        self._publish()

    def find_prepared(self, model: str, revision: str) -> CatalogEntry | None:
        """A revision that may serve; None: it is not prepared."""
        return self._prepared.get((model, revision))

    @property
    def prepared(self) -> tuple[CatalogEntry, ...]:
        """The revisions that may serve, in the order in which they came."""
        return tuple(self._prepared.values())

    def drop(self, revision: str, model: str) -> None:
        """Forgets a prepared revision. What is active goes on serving."""
        self._prepared.pop((model, revision), None)
        self._publish()

    def is_own(self, model: str) -> bool:
        """Whether a model is one of this gateway's own mesh."""
        known = (*self._active.values(), *self._prepared.values())
        return any(entry.model == model and not entry.secondary for entry in known)

    def is_replaced(self, model: str) -> bool:
        """Whether a rollout is under way: another revision than one is prepared."""
        return sum(name == model for name, _ in self._prepared) > 1

    def activate(self, entry: CatalogEntry) -> None:
        """Lets new requests use `entry`, unless a later epoch is known, or it is ours already."""
        known = self._active.get(entry.model)
        if known is not None and (known.secondary, -known.epoch) < (entry.secondary, -entry.epoch):
            return
        self._active[entry.model] = entry
        self._publish()

    def _publish(self) -> None:
        """Makes the table anew. While two revisions share the requests, each of these must fit both.

        From the preparation on, so that what waits at the switch fits as well.
        """
        bounds: dict[str, int] = {}
        for entry in (*self._active.values(), *self._prepared.values()):
            bounds[entry.model] = min(bounds.get(entry.model, entry.context_tokens), entry.context_tokens)
        self._entries = MappingProxyType(
            {model: replace(entry, context_tokens=bounds[model]) for model, entry in self._active.items()}
        )

    def find(self, name: str | None) -> CatalogEntry:
        """Returns the entry of a model; None names the default.

        Raises:
            NoWorker: Nothing is served yet.
            ModelUnknown: No model has that name.
        """
        if not self.default:
            raise NoWorker("No model is ready yet; try again shortly.", retry_after_s=RETRY_UNTIL_ATTACHED_S)
        named = self.default if name is None else name
        entry = self._entries.get(self._meant(named))
        if entry is None:
            shown, served = ascii(named[:NAME_CHARS_SHOWN])[:NAME_CHARS_SHOWN], ", ".join(self.models)
            raise ModelUnknown(f"model: {shown} is not served; {served} can be asked.")
        return entry

    def fallback_of(self, entry: CatalogEntry) -> CatalogEntry | None:
        """What serves in the place of a model that no worker can answer for; None: nothing does."""
        found = self._entries.get(entry.fallback)
        return None if found is None or found.model == entry.model else found

    def _meant(self, name: str) -> str:
        """The model that a name means: its own, or what the first alias that fits says."""
        if name in self._entries or len(name) > ALIAS_CHARS_MAX:
            return name
        fitting = (model or self.default for pattern, model in self.aliases if fnmatchcase(name, pattern))
        return next(fitting, name)

    def tokenizer(self, model: str) -> Tokenizer | None:
        """A model's tokenizer; None where it is not served."""
        entry = self._entries.get(model)
        return None if entry is None else entry.tokenizer

    def activated(self, model: str) -> tuple[str, int] | None:
        """The revision that a model serves with, and the route's epoch that made it so; None: none."""
        entry = self._entries.get(model)
        return None if entry is None else (entry.revision, entry.epoch)

    @property
    def models(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self._entries))

    @property
    def default(self) -> str:
        """The model of this gateway's own mesh that was served first; empty: none is."""
        return next((model for model, entry in self._entries.items() if not entry.secondary), "")

    @property
    def entries(self) -> tuple[CatalogEntry, ...]:
        """The entries, by name."""
        return tuple(self._entries[name] for name in self.models)
