"""The reception. Owns: what happens to a request of any API before it is dispatched.

Who is it, may they, does it make sense, does it fit: the same for gRPC and HTTP, whose translators stand
above. Must not know: either of them.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from services.common import ids, logs
from services.common.clock import Clock
from services.common.conversation import TokenIds
from services.common.errors import ArgumentInvalid, DeadlineExceeded, Draining, InterlockError, QueueFull
from services.common.tokens import TokenVerifier, bearer_token
from services.gateway.core import validation
from services.gateway.core.catalog import Catalog, CatalogEntry
from services.gateway.core.jobs import Outcome, Principal
from services.gateway.core.params import (
    GenerationJob,
    GenerationParams,
    GenerationRequest,
    Prompt,
    RawPrompt,
    SamplingParams,
    TokenPrompt,
    prompt_size,
)
from services.gateway.core.payload import digest_of
from services.gateway.core.ports import Meter, Tokenizer
from services.gateway.core.queue_errors import WorkersBarred
from services.gateway.core.refusals import Outline, Refusals
from services.gateway.core.tenancy import TenantBounds
from services.gateway.dispatcher.dispatch import Dispatcher
from services.gateway.dispatcher.farewell import RETRY_WHEN_DRAINING_S
from services.gateway.dispatcher.streams import AnswerStream
from services.gateway.dispatcher.tokenizing import Tokenizing, too_late

GENERATE_SCOPE = "generate"
MODELS_SCOPE = "models:read"
DEADLINE_KEY = "x-interlock-deadline"
# What a client or Envoy calls the call; logged, so that their lines and ours can be joined.
CALL_ID_KEY = "x-request-id"

# More events than any log has; the contract's type has 64 bits, of which the store would not read all.
_CURSOR_MAX = 2**31 - 1

_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class DeadlineLimits:
    """How long requests may take, in seconds: where nothing is said, and at most."""

    default_s: float = 240.0
    longest_s: float = 3_600.0


@dataclass(frozen=True, slots=True)
class Count:
    """The size of a prompt, and the model that it was counted for."""

    prompt_tokens: int
    entry: CatalogEntry


class Reception:
    """Receives requests.

    Args:
        verifier: Believes bearer tokens, or not.
        catalog: What serves.
        dispatcher: Where requests go.
        deadlines: Bounds of deadlines.
        clock: Measures.
        meter: Counts what is turned away here.
        tenants: Bounds of what tenants may use.
        draw_seed: Draws a seed for those who name none.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        catalog: Catalog,
        dispatcher: Dispatcher,
        deadlines: DeadlineLimits,
        clock: Clock,
        *,
        meter: Meter,
        tenants: TenantBounds = TenantBounds(),  # noqa: B008 - it is frozen
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self._verifier = verifier
        self._catalog = catalog
        self._dispatcher = dispatcher
        self._deadlines = deadlines
        self._clock = clock
        self._meter = meter
        self._tenants = tenants
        self._draw_seed = draw_seed
        self._refusals = Refusals()
        self._tokenizing = Tokenizing(dispatcher.room)
        self._draining = False

    @property
    def prompts_waiting(self) -> int:
        """Prompts that wait for their turn to be tokenized."""
        return self._tokenizing.waiting

    def drain(self) -> None:
        """Refuses every request from now on."""
        self._draining = True

    def authenticate(self, metadata: Metadata, *scopes: str) -> Principal:
        """Returns who calls, once they have at least one of `scopes`.

        Raises:
            Draining: The gateway shuts down; another one will take the call.
            TokenMissing, TokenInvalid, TokenExpired, TokenRevoked: It is not clear who calls.
            ScopeMissing: They may not.
        """
        call_id = next((value for key, value in metadata if key == CALL_ID_KEY), None)
        if isinstance(call_id, str) and ids.is_valid_id(call_id):
            logs.annotate(call_id=call_id)
        if self._draining:
            raise Draining.at_the_door(retry_after_s=RETRY_WHEN_DRAINING_S)
        claims = self._verifier.verify(bearer_token(metadata))
        claims.require(*scopes)
        asked = claims.limits
        limits = self._tenants.grant(
            tokens_per_minute=asked.tokens_per_minute, concurrency=asked.concurrency, weight=asked.weight
        )
        return Principal(claims.subject, claims.scopes, limits)

    def request_id(self, given: str | None) -> str:
        """Returns the caller's id for a request, once it is well-formed, or a new one."""
        if given is None:
            return ids.new_request_id()
        validation.check_request_id(given)
        return given

    def timeout_s(self, metadata: Metadata, call_timeout_s: float | None) -> float:
        """Returns how long a request may take: the nearer of the call's own deadline and the header's.

        Raises:
            ArgumentInvalid: The header is not a number of seconds within the bounds.
        """
        text = next((value for key, value in metadata if key == DEADLINE_KEY), None)
        asked_s = self._deadlines.default_s if text is None else self._read_deadline(text)
        if call_timeout_s is None:
            return asked_s
        # A client that waits for an hour gets an hour, unless its header says otherwise.
        bound_s = self._deadlines.longest_s if text is None else asked_s
        return max(min(call_timeout_s, bound_s), 0.001)

    def check_tokens(self, model: str | None, tokens: int) -> None:
        """Refuses a prompt of more tokens than its model takes, before anybody reads their ids.

        Raises:
            ContextExceeded: It leaves no room for an answer.
            ModelUnknown, NoWorker: The model is not served.
        """
        entry = self._catalog.find(model)
        logs.annotate(model=entry.model)
        validation.fit_max_tokens(None, tokens, entry.context_tokens)

    async def generate(
        self, principal: Principal, request_id: str, request: GenerationRequest, timeout_s: float
    ) -> AnswerStream:
        """Checks, tokenizes and submits a request; iterate over what is returned, and close it.

        Raises:
            InterlockError: One of the errors of the contract, before anything was generated.
        """
        prompt = validation.check_request(request)
        band = validation.band_of(request.priority, principal)
        entry = self._catalog.find(request.model)
        logs.annotate(model=entry.model)
        if isinstance(prompt, TokenPrompt):
            _fit(request, prompt.ids, entry)
        outline = Outline(
            model=entry.model,
            tenant=principal.subject,
            band=band,
            slots=request.n or 1,
            limits=principal.limits,
            timeout_s=timeout_s,
            deadline_s=self._clock.monotonic() + timeout_s,
            max_tokens=request.max_tokens or request.tokens_where_absent,
            prompt_size=prompt_size(prompt),
            in_tokens=isinstance(prompt, TokenPrompt),
        )
        if not request.named:
            self._turn_away(outline)
        try:
            job = await self._prepare(request_id, request, prompt, outline, entry)
        except DeadlineExceeded:
            self._meter.request_ended(outline.model, Outcome.EXPIRED, None)
            raise
        except QueueFull:
            # Its prompt could not even wait to be read.
            self._meter.request_ended(outline.model, Outcome.FAILED, None)
            raise
        try:
            return await self._dispatcher.submit(job)
        except QueueFull as error:
            if not request.named:
                self._refusals.note(outline, error, self._clock.monotonic())
            raise
        except WorkersBarred as error:
            return await self._fall_back(error, job, request, prompt, outline, entry)

    async def resume(self, principal: Principal, request_id: str, cursor: int) -> AnswerStream:
        """Goes on with a resumable request of the caller's own subject behind `cursor`.

        Raises:
            ArgumentInvalid: The id is not well-formed, or the cursor lies behind the log.
            RequestUnknown: The subject has no such request.
            QueueFull: As many clients follow here as may, of all subjects or of this one.
        """
        validation.check_request_id(request_id)
        if cursor > _CURSOR_MAX:
            raise ArgumentInvalid("cursor: no log has so many events; send the last one that was received.")
        subject = principal.subject
        return await self._dispatcher.resume(subject, job_id(subject, request_id), cursor)

    async def cancel(self, principal: Principal, request_id: str) -> bool:
        """Ends a request of the caller's own subject; returns False when it had ended before.

        Raises:
            ArgumentInvalid: The id is not well-formed.
            RequestUnknown: The subject has no such request.
        """
        validation.check_request_id(request_id)
        return await self._dispatcher.cancel(job_id(principal.subject, request_id))

    async def count(
        self, principal: Principal, model: str | None, prompt: Prompt | None, timeout_s: float
    ) -> Count:
        """Counts the tokens of a prompt after the chat template.

        Raises:
            InterlockError: One of the errors of the contract.
        """
        deadline_s = self._clock.monotonic() + timeout_s
        entry = self._catalog.find(model)
        asked = validation.check_prompt(prompt)
        size = prompt_size(asked)
        prompt_ids = await self._tokenize(entry, asked, size, principal.subject, deadline_s)
        return Count(len(prompt_ids), entry)

    def tokenizer(self, model: str) -> Tokenizer | None:
        """A model's tokenizer; None where it is not served any more."""
        return self._catalog.tokenizer(model)

    def model(self, name: str) -> CatalogEntry:
        """One model.

        Raises:
            ModelUnknown, NoWorker: It is not served.
        """
        return self._catalog.find(name)

    def models(self) -> tuple[CatalogEntry, ...]:
        """What serves, the default model first."""
        default = self._catalog.default
        return tuple(sorted(self._catalog.entries, key=lambda entry: (entry.model != default, entry.model)))

    async def _fall_back(
        self,
        refusal: WorkersBarred,
        job: GenerationJob,
        request: GenerationRequest,
        prompt: Prompt,
        outline: Outline,
        entry: CatalogEntry,
    ) -> AnswerStream:
        """Asks the model that stands in for one whose workers are all barred; none stands in for that one.

        Raises:
            WorkersBarred: None does, or it does not take the request either.
        """
        other = self._catalog.fallback_of(entry)
        # The ids of one vocabulary mean nothing in another.
        if other is None or isinstance(prompt, TokenPrompt) or request.sampling.logit_bias:
            raise refusal
        try:
            standing_in = await self._prepare(
                job.request_id, request, prompt, replace(outline, model=other.model), other
            )
            # The same request: whoever repeats it asks for the first model again, and joins it.
            stream = await self._dispatcher.submit(replace(standing_in, digest=job.digest))
        except InterlockError as error:
            raise refusal from error
        logs.annotate(model=other.model, asked_model=entry.model)
        return stream

    async def _prepare(
        self,
        request_id: str,
        request: GenerationRequest,
        prompt: Prompt,
        outline: Outline,
        entry: CatalogEntry,
    ) -> GenerationJob:
        """Tokenizes a request and checks what could not be checked before."""
        size, deadline_s = outline.prompt_size, outline.deadline_s
        prompt_ids = await self._tokenize(entry, prompt, size, outline.tenant, deadline_s)
        max_tokens = _fit(request, prompt_ids, entry)
        # Only what fits is looked at one by one.
        validation.check_token_ids(prompt_ids, entry.tokenizer.vocabulary)
        validation.check_biased_ids(request.sampling, entry.tokenizer.vocabulary)
        logs.annotate(prompt_tokens=len(prompt_ids), max_tokens=max_tokens)
        left_s = outline.deadline_s - self._clock.monotonic()
        if left_s <= 0:
            raise too_late()
        return GenerationJob(
            job_id=job_id(outline.tenant, request_id),
            request_id=request_id,
            tenant=outline.tenant,
            model=outline.model,
            prompt_ids=prompt_ids,
            params=GenerationParams(
                max_tokens,
                self._with_seed(request.sampling),
                request.stop,
                request.logprobs,
                request.form,
                outline.slots,
            ),
            band=outline.band,
            timeout_s=left_s,
            submission=secrets.token_hex(8),
            words=entry.tokenizer,
            limits=outline.limits,
            digest=digest_of(entry.model, request) if request.named else "",
            resumable=request.resumable,
        )

    def _turn_away(self, outline: Outline) -> None:
        """Refuses in a flood what the queue has just refused another one like it.

        Raises:
            QueueFull: As it was told the other one.
        """
        if (refusal := self._refusals.recall(outline, self._clock.monotonic())) is not None:
            self._meter.request_ended(outline.model, Outcome.FAILED, None)
            raise refusal

    async def _tokenize(
        self, entry: CatalogEntry, prompt: Prompt, size: int, tenant: str, deadline_s: float
    ) -> tuple[int, ...]:
        if isinstance(prompt, TokenPrompt):
            return prompt.ids

        def aside(work: Callable[[], TokenIds]) -> Awaitable[TokenIds]:
            left_s = deadline_s - self._clock.monotonic()
            return self._tokenizing.read(tenant, size, left_s, work)

        if isinstance(prompt, RawPrompt):
            return await entry.tokenizer.encode_raw(prompt.text, aside)
        return await entry.tokenizer.encode(validation.messages_of(prompt), aside)

    def _with_seed(self, sampling: SamplingParams) -> SamplingParams:
        # A failover goes on with the same noise, so the seed is fixed before the first worker sees it.
        return sampling if sampling.seed is not None else replace(sampling, seed=self._draw_seed())

    def _read_deadline(self, text: str | bytes) -> float:
        plain = text if isinstance(text, str) else text.decode("ascii", "replace")
        # `float` alone takes underscores, exponents and digits of other scripts.
        seconds = float(plain) if _DECIMAL.fullmatch(plain) else math.nan
        if not 0 < seconds <= self._deadlines.longest_s:
            raise ArgumentInvalid(
                f"{DEADLINE_KEY}: decimal seconds, over 0 and at most {self._deadlines.longest_s:g}."
            )
        return seconds


def _fit(request: GenerationRequest, prompt_ids: tuple[int, ...], entry: CatalogEntry) -> int:
    """How many tokens may be generated; raises ContextExceeded where the request does not fit."""
    return validation.fit_max_tokens(
        request.max_tokens, len(prompt_ids), entry.context_tokens, request.tokens_where_absent
    )


def job_id(subject: str, request_id: str) -> str:
    """The id of a request in the queue: nobody can name another subject's."""
    return hashlib.sha256(f"{subject}\0{request_id}".encode()).hexdigest()
