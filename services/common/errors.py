"""The one error tree. Owns: which gRPC code and machine-readable reason each failure has.

Pure: cores raise these, and `services.common.status` translates them at the edge of a process.
A message is for the caller: it says what is wrong and what to do, and holds no secret, prompt, path or
address.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from services.common.allowance import Allowance


class Code(StrEnum):
    """The gRPC status codes that Interlock ends calls with, by their canonical names."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    UNAUTHENTICATED = "UNAUTHENTICATED"


class InterlockError(Exception):
    """A failure with a code, a reason from `ErrorReason`, and whether trying again can help.

    Attributes:
        code: The gRPC status code that the call ends with.
        reason: The name of the `interlock.v1.ErrorReason` value, without its prefix.
        retryable: Whether the same call may succeed later.
        retry_after_s: Seconds to wait before trying again; None where no estimate exists.
        allowance: What was left to the tenant, where a queue refused a request; None: nobody looked.
        unstarted: Whether surely nothing was done, so that a proxy may give the call to another process.
    """

    code: Code = Code.INTERNAL
    reason: str = "INTERNAL"
    retryable: bool = False
    allowance: Allowance | None = None
    unstarted: bool = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InternalError(InterlockError):
    """A defect of ours; the caller learns the request id and nothing else."""


class TokenMissing(InterlockError):
    """The call carries no bearer token."""

    code = Code.UNAUTHENTICATED
    reason = "TOKEN_MISSING"


class TokenInvalid(InterlockError):
    """The token breaks a rule."""

    code = Code.UNAUTHENTICATED
    reason = "TOKEN_INVALID"


class TokenExpired(InterlockError):
    """The token was valid once."""

    code = Code.UNAUTHENTICATED
    reason = "TOKEN_EXPIRED"


class TokenRevoked(InterlockError):
    """The token was taken back before its end."""

    code = Code.UNAUTHENTICATED
    reason = "TOKEN_REVOKED"


class ScopeMissing(InterlockError):
    """The token does not allow the call."""

    code = Code.PERMISSION_DENIED
    reason = "SCOPE_MISSING"


class MeshCredentialInvalid(InterlockError):
    """A call between services lacks the mesh credential."""

    code = Code.UNAUTHENTICATED
    reason = "MESH_CREDENTIAL_INVALID"


class ArgumentInvalid(InterlockError):
    """A field is missing, malformed or out of bounds."""

    code = Code.INVALID_ARGUMENT
    reason = "ARGUMENT_INVALID"


class ContextExceeded(InterlockError):
    """Prompt and output do not fit the model's context.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        max_tokens: How many the answer was to have at most; None: it has no room for one.
        context_tokens: Tokens that the context holds; 0: whoever found out did not say.
    """

    code = Code.INVALID_ARGUMENT
    reason = "CONTEXT_EXCEEDED"
    prompt_tokens: int = 0
    max_tokens: int | None = None
    context_tokens: int = 0

    @classmethod
    def by(cls, message: str, prompt_tokens: int, max_tokens: int | None, context_tokens: int) -> Self:
        """The error with its numbers."""
        error = cls(message)
        error.prompt_tokens = prompt_tokens
        error.max_tokens = max_tokens
        error.context_tokens = context_tokens
        return error


class ModelUnknown(InterlockError):
    """No such model is served."""

    code = Code.NOT_FOUND
    reason = "MODEL_UNKNOWN"


class RequestUnknown(InterlockError):
    """The subject has no such request."""

    code = Code.NOT_FOUND
    reason = "REQUEST_UNKNOWN"


class RequestExists(InterlockError):
    """The subject uses the id already."""

    code = Code.ALREADY_EXISTS
    reason = "REQUEST_EXISTS"


class FeatureUnsupported(InterlockError):
    """Part of the contract, not served by this version."""

    code = Code.UNIMPLEMENTED
    reason = "FEATURE_UNSUPPORTED"


class MessageTooLarge(InterlockError):
    """More bytes than the server reads."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"


class QueueFull(InterlockError):
    """The queue is at its bound.

    Attributes:
        lasting: Whether the next request like it is refused as well, as far as can be said.
    """

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    retryable = True
    lasting: bool = True


class QuotaExceeded(InterlockError):
    """The tenant's limit is used up for now."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "QUOTA_EXCEEDED"
    retryable = True


class DeadlineExceeded(InterlockError):
    """The request's deadline passed, or cannot be met."""

    code = Code.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class NoWorker(InterlockError):
    """Nobody can take the request now."""

    code = Code.UNAVAILABLE
    reason = "NO_WORKER"
    retryable = True


class WorkerLost(InterlockError):
    """The worker went away while it answered."""

    code = Code.UNAVAILABLE
    reason = "WORKER_LOST"
    retryable = True


class Draining(InterlockError):
    """The server is shutting down."""

    code = Code.UNAVAILABLE
    reason = "DRAINING"
    retryable = True

    @classmethod
    def at_the_door(cls, *, retry_after_s: float) -> Draining:
        """The refusal of a call before anything was done for it."""
        error = cls("The gateway is shutting down.", retry_after_s=retry_after_s)
        error.unstarted = True
        return error


class StoreUnavailable(InterlockError):
    """The queue's store cannot be reached."""

    code = Code.UNAVAILABLE
    reason = "STORE_UNAVAILABLE"
    retryable = True


class RequestCancelled(InterlockError):
    """The caller ended the request."""

    code = Code.CANCELLED
    reason = "CANCELLED"


class ClientStalled(InterlockError):
    """The client stopped reading."""

    code = Code.ABORTED
    reason = "CLIENT_STALLED"


class RevisionUnknown(InterlockError):
    """No such revision is registered."""

    code = Code.NOT_FOUND
    reason = "REVISION_UNKNOWN"


class ArtifactInvalid(InterlockError):
    """A model file breaks a rule."""

    code = Code.INVALID_ARGUMENT
    reason = "ARTIFACT_INVALID"


class RevisionInUse(InterlockError):
    """The revision serves, or is in a rollout."""

    code = Code.FAILED_PRECONDITION
    reason = "REVISION_IN_USE"


class RolloutConflict(InterlockError):
    """Another rollout of the model is under way, or its start revision is still loading."""

    code = Code.ABORTED
    reason = "ROLLOUT_CONFLICT"


class RolloutRefused(InterlockError):
    """The rollout cannot do that where it is."""

    code = Code.FAILED_PRECONDITION
    reason = "ROLLOUT_REFUSED"


class RolloutUnknown(InterlockError):
    """No rollout has this id."""

    code = Code.NOT_FOUND
    reason = "ROLLOUT_UNKNOWN"


class UploadConflict(InterlockError):
    """Another upload is under way."""

    code = Code.ABORTED
    reason = "UPLOAD_CONFLICT"


class NotLeader(InterlockError):
    """Another controller leads, or none does yet."""

    code = Code.UNAVAILABLE
    reason = "NOT_LEADER"
    retryable = True

    @classmethod
    def at_the_door(cls, message: str, *, retry_after_s: float) -> NotLeader:
        """The refusal of a call before anything was done for it."""
        error = cls(message, retry_after_s=retry_after_s)
        error.unstarted = True
        return error


class WorkerUnknown(InterlockError):
    """No such worker is attached."""

    code = Code.NOT_FOUND
    reason = "WORKER_UNKNOWN"


class ForeignError(InterlockError):
    """An error of another system (a proxy, a lost connection), known by its gRPC code alone."""

    reason = "UNSPECIFIED"

    def __init__(self, code: Code, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code
        self.retryable = code is Code.UNAVAILABLE


def every_error() -> list[type[InterlockError]]:
    """All classes of the tree that stand here, the root included: what a reason from the wire may mean."""
    found: list[type[InterlockError]] = [InterlockError]
    for error in found:
        found.extend(kind for kind in error.__subclasses__() if kind.__module__ == __name__)
    return found
