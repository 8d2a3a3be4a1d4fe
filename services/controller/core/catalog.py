"""What can be served. Owns: models, their revisions, and how a revision gets its name.

A revision's name is a digest of its manifest, so equal manifests are the same revision everywhere and a
restart registers nothing new.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from services.common.errors import ModelUnknown, RevisionUnknown

# 48 bits: two of a million revisions share a name with a probability of 1 in 500; a name also fits a line.
NAME_DIGITS = 12


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a revision: its name, its length, and the digest of its content in hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """A prompt, a string that its greedy answer must contain, and the most tokens of the answer."""

    text: str
    expected: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that makes one revision of a model.

    Attributes:
        model: The name that requests give.
        revision: The revision's name; empty until `named`.
        files: Its files, sorted by path.
        quantization: `auto`, `none`, `int8`, `nf4` or `fp4`.
        compute_dtype: `auto`, `fp32` or `bf16`.
        context_tokens: Most tokens that prompt and output may have together.
        tokenizer_sha256: Digest of tokenizer and chat template.
        golden_prompts: What it must answer before it may serve.
        fallback_model: The model, of another mesh, that is asked when no worker of this one can; empty: none.
    """

    model: str
    revision: str
    files: tuple[ModelFile, ...]
    quantization: str
    compute_dtype: str
    context_tokens: int
    tokenizer_sha256: str
    golden_prompts: tuple[GoldenPrompt, ...] = ()
    fallback_model: str = ""

    @property
    def weights_bytes(self) -> int:
        """Size of the weights as they are stored."""
        return sum(file.size_bytes for file in self.files if file.path.endswith(".safetensors"))

    def named(self) -> Manifest:
        """The same manifest under the name that its content gives it."""
        fields = asdict(replace(self, revision=""))
        # Names that were given before there were any of these stay what they are.
        for name in ("golden_prompts", "fallback_model"):
            if not fields[name]:
                del fields[name]
        content = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(content.encode()).hexdigest()
        return replace(self, revision=digest[:NAME_DIGITS])


@dataclass(frozen=True, slots=True)
class Revision:
    """A registered manifest.

    Attributes:
        manifest: What it is.
        local_path: A directory of this machine that holds its files.
        create_time_s: When it was registered, in seconds since the epoch; of what the mesh was started with,
            when the newest of its files was written: the same at every start.
    """

    manifest: Manifest
    local_path: str
    create_time_s: float


class Catalog:
    """The registered revisions of all models.

    Attributes:
        is_partial: Whether there may be more, where nobody could look yet.
    """

    def __init__(self) -> None:
        self.is_partial = False
        self._revisions: dict[str, dict[str, Revision]] = {}

    def register(self, revision: Revision) -> None:
        """Adds a revision; the first one of a model is the one that shall serve until a rollout."""
        manifest = revision.manifest
        self._revisions.setdefault(manifest.model, {})[manifest.revision] = revision

    def models(self) -> tuple[str, ...]:
        """The names of all models, sorted; requests without a model mean the first that was registered."""
        return tuple(sorted(self._revisions))

    def default_model(self) -> str:
        """The model that requests without one mean.

        Raises:
            ModelUnknown: None is registered.
        """
        for model in self._revisions:
            return model
        raise ModelUnknown("No model is registered.")

    def revisions(self, model: str) -> tuple[Revision, ...]:
        """The revisions of `model`, newest first.

        Raises:
            ModelUnknown: No such model is registered.
        """
        try:
            found = reversed(self._revisions[model].values())
        except KeyError:
            raise ModelUnknown(f"No model {model!a} is registered.") from None
        # Of equal times that which was registered last is the newest.
        return tuple(sorted(found, key=lambda one: -one.create_time_s))

    def revision(self, model: str, name: str) -> Revision:
        """One revision.

        Raises:
            ModelUnknown: No such model is registered.
            RevisionUnknown: The model has no such revision.
        """
        for revision in self.revisions(model):
            if revision.manifest.revision == name:
                return revision
        raise RevisionUnknown(f"The model {model!a} has no revision {name!a}.")

    def knows(self, model: str, name: str) -> bool:
        """Whether `model` has such a revision."""
        return name in self._revisions.get(model, {})

    def wanted(self, model: str) -> str:
        """The revision of `model` that shall serve.

        Raises:
            ModelUnknown: No such model is registered.
        """
        try:
            return next(iter(self._revisions[model]))
        except KeyError:
            raise ModelUnknown(f"No model {model!a} is registered.") from None

    def forget(self, model: str, name: str) -> int:
        """Removes a revision; returns its place, for `put_back`.

        Raises:
            ModelUnknown: No such model is registered.
            RevisionUnknown: The model has no such revision.
        """
        self.revision(model, name)
        place = list(self._revisions[model]).index(name)
        del self._revisions[model][name]
        return place

    def put_back(self, revision: Revision, place: int) -> None:
        """Adds a revision again where it was."""
        found = list(self._revisions[revision.manifest.model].values())
        found.insert(place, revision)
        self._revisions[revision.manifest.model] = {one.manifest.revision: one for one in found}
