"""What a load consists of. Owns: tenants, prompts and limits as they are asked for on the command line."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

PRIORITIES = ("batch", "interactive", "system")
# Plain words in every vocabulary in use, far from special tokens.
TOKEN_FIRST, TOKEN_SPAN = 100, 4_000


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks.

    Attributes:
        name: Its `sub`.
        weight: Its share of a busy mesh.
        priority: One of `PRIORITIES`.
        clients: Its share of the clients, relative to the others'.
    """

    name: str
    weight: int = 1
    priority: str = "interactive"
    clients: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every step has in common.

    Attributes:
        tenants: Who asks.
        prompt_tokens: Length of each prompt.
        answer_tokens: Most tokens of an answer; with `mixed` in the mean.
        mixed: Whether answers are of half to three halves of that: equal ones that begin together end
            together, and how many prompts fall into a step then depends on where it lies.
        deadline_s: How long an answer may take; None: as long as the mesh allows.
        duration_s: How long a step is measured.
        warmup_s: How long it runs before.
    """

    tenants: tuple[Tenant, ...] = (Tenant("load"),)
    prompt_tokens: int = 32
    answer_tokens: int = 64
    mixed: bool = False
    deadline_s: float | None = None
    duration_s: float = 15.0
    warmup_s: float = 3.0

    @property
    def weights(self) -> dict[str, float]:
        """The tenants' weights by name."""
        return {tenant.name: tenant.weight for tenant in self.tenants}

    def crowd(self, clients: int) -> list[Tenant]:
        """The tenant of each client, in proportion to what the tenants have of them, well mixed."""
        total = sum(tenant.clients for tenant in self.tenants)
        found: list[Tenant] = []
        counts = dict.fromkeys(self.tenants, 0)
        for number in range(1, clients + 1):
            behind = max(self.tenants, key=lambda one: one.clients * number / total - counts[one])
            counts[behind] += 1
            found.append(behind)
        return found


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        tenant: Who asks.
        prompt_ids: The prompt.
        answer_tokens: Most tokens of the answer.
        deadline_s: How long it may take; None: as long as the mesh allows.
    """

    tenant: Tenant
    prompt_ids: tuple[int, ...]
    answer_tokens: int
    deadline_s: float | None


def ask_of(load: Load, tenant: Tenant, chance: random.Random) -> Ask:
    """A request with a prompt of its own, so that no prefix cache shortens the work."""
    ids = tuple(TOKEN_FIRST + chance.randrange(TOKEN_SPAN) for _ in range(load.prompt_tokens))
    tokens = load.answer_tokens
    if load.mixed:
        tokens = chance.randint((tokens + 1) // 2, tokens + tokens // 2)
    return Ask(tenant, ids, tokens, load.deadline_s)


def tenant(text: str) -> Tenant:
    """Reads `NAME[:WEIGHT[:PRIORITY[:CLIENTS]]]`.

    Raises:
        argparse.ArgumentTypeError: It is not of this form.
    """
    name, weight, priority, clients, *more = [*text.split(":"), "", "", ""][: max(4, text.count(":") + 1)]
    numbers = [weight or "1", clients or "1"]
    priority = priority or "interactive"
    fine = name and not more and all(one.isdecimal() and 1 <= int(one) <= 100 for one in numbers)
    if not fine or priority not in PRIORITIES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME[:WEIGHT[:PRIORITY[:CLIENTS]]], with numbers from 1 to 100 "
            f"and a priority of {', '.join(PRIORITIES)}"
        )
    return Tenant(name, int(numbers[0]), priority, int(numbers[1]))
