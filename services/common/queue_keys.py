"""Redis keys. Owns: the name of every key, and the fields of those that two services share.

All keys of a model `M` bear the hash tag `{il:M}`, so that a script's keys lie in one Redis Cluster slot.

| key | type | holds | written by |
|---|---|---|---|
| `route` | hash | `epoch`, `fence`, `w:<revision>` -> weight | controller |
| `workers` | set | ids of the workers that have a record | controller |
| `worker:<w>` | hash | `address incarnation slots draining lease_end_ms r:<ready revision>` | controller |
| `job:<id>` | hash | the record of a job; once it has ended, its outcome for a while | gateways |
| `waiting:<band>:<tenant>` | zset | waiting jobs by arrival | gateways |
| `tenants:<band>` | zset | tenants with a waiting job, by the arrival of their oldest | gateways |
| `pinned:<revision>` | zset | jobs that must go on with that revision, by arrival | gateways |
| `pins` | set | revisions that jobs are pinned to | gateways |
| `running:<w>` | hash | job -> nonce of the grant | gateways |
| `lease` | zset | live jobs by the end of their lease | gateways |
| `deadline:<band>` | zset | waiting jobs, pinned ones included, by deadline | gateways |
| `gateways` | zset | gateways by the time they were last seen | gateways |
| `owned:<gateway>` | hash | job -> nonce of the grant, or empty while it waits | gateways |
| `suspect` | hash | worker -> until when it gets no new job | gateways; controller, where a worker returns |
| `stats` | hash | `service_ms`: mean time from grant to end | gateways |
| `clock` | hash | `real logical`: the clock of the scripts; `number grants`: counters | all |

Two keys belong to no model and share the slot of the tag `{il}`: `holds` (hash: target -> the state that an
operator holds its breakers in; written by the controller) and `breakers:<gateway>` (hash: target -> JSON;
written by the gateway each second, and gone when it is).

Times in Redis are milliseconds of that clock; `fence` and `epoch` only grow.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUTE_EPOCH = "epoch"
ROUTE_FENCE = "fence"
ROUTE_WEIGHT_PREFIX = "w:"

WORKER_ADDRESS = "address"
WORKER_INCARNATION = "incarnation"
WORKER_SLOTS = "slots"
WORKER_DRAINING = "draining"
WORKER_LEASE_END_MS = "lease_end_ms"
WORKER_READY_PREFIX = "r:"


@dataclass(frozen=True, slots=True)
class ModelKeys:
    """The keys of one model."""

    model: str

    @property
    def prefix(self) -> str:
        """What every key of the model begins with, the hash tag included."""
        return f"{{il:{self.model}}}:"

    @property
    def route(self) -> str:
        """Which revisions serve, and with which weight."""
        return self.prefix + "route"

    @property
    def workers(self) -> str:
        """The ids of the workers."""
        return self.prefix + "workers"

    def worker(self, worker_id: str) -> str:
        """One worker's record."""
        return f"{self.prefix}worker:{worker_id}"

    def running(self, worker_id: str) -> str:
        """The jobs that hold a slot of one worker."""
        return f"{self.prefix}running:{worker_id}"

    def job(self, job_id: str) -> str:
        """One job's record."""
        return f"{self.prefix}job:{job_id}"

    @property
    def clock(self) -> str:
        """The logical clock."""
        return self.prefix + "clock"


# What operators hold: target -> state. No key of a model: a target may be the store.
BREAKER_HOLDS = "{il}:holds"


def breakers_of(gateway_id: str) -> str:
    """The breakers of one gateway: target -> JSON with `state calls failures changed_ms`."""
    return f"{{il}}:breakers:{gateway_id}"


def gateway_channel(gateway_id: str) -> str:
    """The Pub/Sub channel on which a gateway hears of its grants."""
    return f"il:gateway:{gateway_id}"
