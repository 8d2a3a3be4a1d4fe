"""Functions of numbers. Owns: those that no processor has an instruction for."""

from __future__ import annotations

from services.worker.adapters.vector_code import F32, I32, Code, Value

# Beyond these the power of e is no finite single, or none that has all its bits.
EXP_MIN = -87.0
EXP_MAX = 88.0
LOG2_E = 1.4426950408889634
# The logarithm of 2 in two parts: whole multiples of the first are exact.
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440054690583e-4
# 1/7!, 1/6! and so on to 1/0!: the rest is below a unit in the last place up to half the logarithm of 2.
EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)

FLOAT_BIAS = 127
FLOAT_FRACTION_BITS = 23


def exponential(code: Code, value: Value) -> Value:
    """e to the power of floats, to a few units in the last place; what is no number stays so."""
    low = code.select(value < EXP_MIN, EXP_MIN, value)
    bound = code.select(low > EXP_MAX, EXP_MAX, low)
    power = code.rounded(bound * LOG2_E)
    rest = code.fused(LN2_HIGH, power * -1.0, bound)
    rest = code.fused(LN2_LOW, power * -1.0, rest)
    terms = Value(code, code.coerced(EXP_TERMS[0], value.raw.type))
    for term in EXP_TERMS[1:]:
        terms = code.fused(rest, terms, Value(code, code.coerced(term, value.raw.type)))
    exponent = (code.converted(power, I32) + FLOAT_BIAS) << FLOAT_FRACTION_BITS
    return code.select(value.differs(value), value, terms * code.reread(exponent, F32))
