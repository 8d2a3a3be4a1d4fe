"""What a tenant gets of what its token asks for."""

from __future__ import annotations

import pytest

from services.gateway.core.tenancy import LIMIT_MAX, TenantBounds, TenantLimits

BOUNDED = TenantBounds(most=TenantLimits(1_000, 8, 10), default=TenantLimits(100, 2, 3))


@pytest.mark.parametrize(
    ("bounds", "asked", "granted"),
    [
        (TenantBounds(), (None, None, None), TenantLimits(None, None, 1)),
        (TenantBounds(), (5, 6, 7), TenantLimits(5, 6, 7)),
        (BOUNDED, (None, None, None), TenantLimits(100, 2, 3)),
        (BOUNDED, (500, 4, 5), TenantLimits(500, 4, 5)),
        (BOUNDED, (5_000, 40, 50), TenantLimits(1_000, 8, 10)),
        (TenantBounds(most=TenantLimits(1_000, 8, 1)), (None, None, None), TenantLimits(1_000, 8, 1)),
        (TenantBounds(), (10**30, 9_999_999_999, 5), TenantLimits(LIMIT_MAX, LIMIT_MAX, 5)),
        (
            TenantBounds(TenantLimits(1_000, 8, 10), TenantLimits(9_000, 9, 90)),
            (None, None, None),
            TenantLimits(1_000, 8, 10),
        ),
    ],
)
def test_a_tenant_gets_what_it_asks_for_within_the_bounds(
    bounds: TenantBounds, asked: tuple[int | None, int | None, int | None], granted: TenantLimits
) -> None:
    """A bound holds for those who ask for more, and for those who do not ask."""
    rate, concurrency, weight = asked
    assert bounds.grant(tokens_per_minute=rate, concurrency=concurrency, weight=weight) == granted
