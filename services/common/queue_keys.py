"""Redis keys. Owns: the name of every key, and the fields of those that two services share.

All keys of a model `M` bear the hash tag `{il:M}`, so that a script's keys lie in one Redis Cluster slot.

| key | type | holds | written by |
|---|---|---|---|
| `route` | hash | `epoch`, `fence`, `w:<revision>` -> weight | controller |
| `lead` | hash | `id incarnation fence end_ms`: the controller that leads | controller |
| `workers` | set | ids of the workers that have a record | controller |
| `worker:<w>` | hash | `address incarnation slots draining lease_end_ms r:<ready revision>` | controller |
| `holders:<revision>` | set | workers that are ready for it | controller |
| `expiry` | zset | workers by the end of their lease | controller |
| `fleet` | hash | `slots`: of all workers that are not draining | controller |
| `free:<revision>` | zset | workers with a free slot, by load | all |
| `takers` | zset | workers that take jobs, free or not, by the end of their lease | all |
| `held` | zset | suspects by the end of the suspicion | gateways; controller |
| `lapsed` | set | workers left out of `free`, as their lease had lapsed | all |
| `open:<w>` | hash | open breakers: gateway -> `<end> <sleep>` in ms, or `forced` | gateways; controller |
| `opened` | set | workers that have an `open:<w>` | gateways; controller |
| `job:<id>` | hash | the record of a job; once it has ended, its outcome for a while | gateways |
| `waiting:<band>:<tenant>` | zset | waiting jobs by arrival | gateways |
| `tenants:<band>` | zset | seats (`<arrival of the oldest job>:<tenant>`) by counter | gateways |
| `tenants:lifted` | zset | such seats of tenants with nothing in line in BATCH but a lifted job | gateways |
| `served:<band>` | zset | tenants by counter: tokens charged, divided by weight | gateways |
| `entered:<band>` | hash | tenant -> its entry, and what may be given back from before | gateways |
| `floors` | hash | band -> counter at which an idle tenant enters | gateways |
| `tenant:<t>` | hash | `waiting running cap seat:<band> lifted` (`<arrival>:<id>`) | gateways |
| `quota:<t>` | hash | `window used reserved`: tokens of the tenant's minute | gateways |
| `booked:<nonce>` | string | set while a booking of what was used without Redis is known again | gateways |
| `live`, `backlog` | hash | band -> jobs that have not ended; estimated tokens that wait | gateways |
| `aging:<band>` | zset | what gateways of an earlier version will lift; nothing is added now | gateways |
| `pinned:<revision>` | zset | jobs that must go on with that revision, by arrival | gateways |
| `pins` | set | revisions that jobs are pinned to | gateways |
| `pins_held` | zset | of them, those that a worker held lately, by when that was seen last | gateways |
| `due` | string | the job whose turn has come and that waits for several slots of one worker | gateways |
| `running:<w>` | hash | job, and `job#2` and so on for further slots -> nonce of the grant | gateways |
| `lease` | zset | live jobs by the end of their lease | gateways |
| `deadline:<band>` | zset | waiting jobs, pinned ones included, by deadline | gateways |
| `gateways` | zset | gateways by the time they were last seen | gateways |
| `owned:<gateway>` | hash | job -> nonce of the grant, or empty while it waits | gateways |
| `payload:<id>` | string | what a resumable job asks, so that another gateway can go on | gateways |
| `log:<id>` | list | the events of a resumable job, as JSON | gateways |
| `followers:<id>` | zset | gateways by the time they last read the log for a client | gateways |
| `leaving:<gateway>` | string | set while a gateway that shuts down may still count as seen | gateways |
| `stats` | hash | `service_ms service_tokens`: means of finished jobs | gateways |
| `clock` | hash | `real logical`: the clock of the scripts; `number grants`: counters | all |

Outside these slots, a key for each id that a caller named: `il:{<job>}:where` -> digest of the body, model.

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

    @property
    def gateways(self) -> str:
        """The gateways, by the time they were last seen."""
        return self.prefix + "gateways"

    @property
    def pins(self) -> str:
        """The revisions that waiting jobs must go on with."""
        return self.prefix + "pins"

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
    """The Pub/Sub channel on which a gateway hears of its grants and of its jobs."""
    return f"il:gateway:{gateway_id}"


def request_key(job_id: str) -> str:
    """The key that says what a request id stands for."""
    return f"il:{{{job_id}}}:where"


def model_of(prefix: str) -> str:
    """The model whose keys begin with `prefix`."""
    return prefix.removeprefix("{il:").removesuffix("}:")
