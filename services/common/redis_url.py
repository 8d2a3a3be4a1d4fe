"""The URL of the store. Owns: the forms that it may have, as settings and messages tell them."""

from __future__ import annotations

REDIS_URL_FORMS = (
    "redis://, rediss:// or unix:// URL; redis+sentinel://HOST:PORT,.../SERVICE finds the primary by its"
    " sentinels, redis+cluster://HOST:PORT,... a Cluster by any of its nodes; USER:PASSWORD@ before the hosts"
)
