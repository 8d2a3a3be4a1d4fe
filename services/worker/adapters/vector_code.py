"""Functions of vector instructions. Owns: a small assembler over LLVM, and how what it makes is called.

torch computes one operation after another, each over all rows, and a step of decoding is some thousands of
them. A function that is put together here takes a row through many operations while it lies in registers,
for the very processor that runs it. Nothing is reordered: each number comes from the same operations in the
same order, whatever the count of rows. Must not know: what is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import binding, ir

# Numbers that one instruction takes, of 32 bits; a processor with narrower ones gets several instructions.
LANES = 16

VOID = ir.VoidType()
I8 = ir.IntType(8)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F16 = ir.HalfType()
F32 = ir.FloatType()

BYTES = {I8: 1, I32: 4, I64: 8, F16: 2, F32: 4}

_ARM = binding.get_default_triple().startswith(("aarch64", "arm64"))
_FEATURES = binding.get_host_cpu_features()

# Whether the processor rounds a product and a sum once.
FUSES = _ARM or bool(_FEATURES.get("fma"))

# Whether it multiplies four bytes with four others, and adds, in one instruction.
DOTS = bool(_FEATURES.get("avx512vnni"))

_HALF_WORDS = ir.VectorType(ir.IntType(16), 2 * LANES)

_FLOATS = (F16, F32)


class Value:
    """A number, or LANES of them, of the function under construction; arithmetic writes instructions."""

    def __init__(self, code: Code, raw: Any) -> None:
        self.code = code
        self.raw = raw

    def __add__(self, other: Operand) -> Value:
        return self.code.operate("add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.code.operate("sub", self, other)

    def __mul__(self, other: Operand) -> Value:
        return self.code.operate("mul", self, other)

    def __truediv__(self, other: Operand) -> Value:
        return self.code.operate("div", self, other)

    def __floordiv__(self, other: Operand) -> Value:
        return self.code.operate("udiv", self, other)

    def __mod__(self, other: Operand) -> Value:
        return self.code.operate("urem", self, other)

    def __and__(self, other: Operand) -> Value:
        return self.code.operate("and_", self, other)

    def __xor__(self, other: Operand) -> Value:
        return self.code.operate("xor", self, other)

    def __lshift__(self, other: Operand) -> Value:
        return self.code.operate("shl", self, other)

    def __gt__(self, other: Operand) -> Value:
        return self.code.compare(">", self, other)

    def __ge__(self, other: Operand) -> Value:
        return self.code.compare(">=", self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.code.compare("<", self, other)

    def differs(self, other: Operand) -> Value:
        """Whether they are not equal."""
        return self.code.compare("!=", self, other)

    @property
    def element(self) -> Any:
        """The type of the number, or of each."""
        return self.raw.type.element if isinstance(self.raw.type, ir.VectorType) else self.raw.type

    @property
    def wide(self) -> bool:
        """Whether it is LANES numbers."""
        return isinstance(self.raw.type, ir.VectorType)


Operand = Value | int | float


class Variable:
    """A place for a value that changes in a loop; it becomes a register."""

    def __init__(self, code: Code, value: Value) -> None:
        self._code = code
        with code.builder.goto_entry_block():
            self._place = code.builder.alloca(value.raw.type)
        self.set(value)

    def get(self) -> Value:
        """What it holds now."""
        return Value(self._code, self._code.builder.load(self._place))

    def set(self, value: Value) -> None:
        """Puts another value there."""
        self._code.builder.store(value.raw, self._place)


class Array:
    """Numbers of one type, one behind the other in memory."""

    def __init__(self, code: Code, raw: Any, element: Any) -> None:
        self._code = code
        self._raw = raw
        self._element = element

    def at(self, offset: Operand) -> Array:
        """The array from there on."""
        return Array(self._code, self._address(offset, self._element), self._element)

    def get(self, index: Operand) -> Value:
        """One number."""
        return Value(self._code, self._code.builder.load(self._address(index, self._element)))

    def put(self, index: Operand, value: Value) -> None:
        """Writes one number."""
        self._code.builder.store(value.raw, self._address(index, self._element))

    def gather(self, index: Operand) -> Value:
        """LANES numbers from an index on."""
        loaded = self._code.builder.load(self._address(index, ir.VectorType(self._element, LANES)))
        loaded.align = BYTES[self._element]
        return Value(self._code, loaded)

    def word(self, index: Operand) -> Value:
        """One word of four bytes from an index on, of an array of bytes."""
        loaded = self._code.builder.load(self._address(index, I32))
        loaded.align = 1
        return Value(self._code, loaded)

    def words(self, index: Operand) -> Value:
        """LANES words of four bytes from an index on, of an array of bytes."""
        loaded = self._code.builder.load(self._address(index, ir.VectorType(I32, LANES)))
        loaded.align = 1
        return Value(self._code, loaded)

    def spill(self, index: Operand, value: Value) -> None:
        """Writes LANES numbers from an index on."""
        store = self._code.builder.store(value.raw, self._address(index, value.raw.type))
        store.align = BYTES[self._element]

    def _address(self, index: Operand, kind: Any) -> Any:
        builder = self._code.builder
        place = builder.gep(self._raw, [self._code.coerced(index, I64)])
        return builder.bitcast(place, kind.as_pointer())


class Lane:
    """LANES places of a row, or the fewer that are left at its end: there the others read as zero."""

    def __init__(self, code: Code, first: Value, count: Value | None) -> None:
        self._code = code
        self.first = first
        self._count = count

    def load(self, array: Array, element: Any) -> Value:
        """The numbers of an array at these places."""
        if self._count is None:
            return array.gather(self.first)
        spare = self._code.zeros(element)
        with self._code.loop(0, self._count) as index:
            spare.put(index, array.get(self.first + index))
        return spare.gather(0)

    def inside(self, value: Value) -> Value:
        """Zero at the places behind the row's end, whatever was computed there."""
        if self._count is None:
            return value
        return self._code.select(self._code.ramp() >= self._count, 0, value)

    def store(self, array: Array, value: Value) -> None:
        """Writes them to an array at these places."""
        if self._count is None:
            array.spill(self.first, value)
            return
        spare = self._code.zeros(value.element)
        spare.spill(0, value)
        with self._code.loop(0, self._count) as index:
            array.put(self.first + index, spare.get(index))


class Code:
    """The function under construction.

    Args:
        function: What is filled.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.builder: Any = ir.IRBuilder(function.append_basic_block())

    def coerced(self, value: Operand, kind: Any) -> Any:
        """A value as an operand of a type; a single number becomes LANES alike where that is asked for."""
        if isinstance(value, Value):
            wide = isinstance(kind, ir.VectorType) and not value.wide
            return self.spread(value).raw if wide else value.raw
        if isinstance(kind, ir.VectorType):
            return ir.Constant(kind, [value] * LANES)
        return ir.Constant(kind, value)

    def operate(self, name: str, left: Value, right: Operand) -> Value:
        """An operation of two values; floats have their own."""
        first, second = self._both(left, right)
        floats = left.element in _FLOATS
        verb = getattr(self.builder, f"f{name}" if floats else name)
        return Value(self, verb(first, second))

    def compare(self, sign: str, left: Value, right: Operand) -> Value:
        """A comparison: false where a number is none, but for `!=`, which is true there."""
        first, second = self._both(left, right)
        if left.element not in _FLOATS:
            return Value(self, self.builder.icmp_signed(sign, first, second))
        verb = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        return Value(self, verb(sign, first, second))

    def select(self, condition: Value, yes: Operand, no: Value) -> Value:
        """One of two values, place by place."""
        return Value(self, self.builder.select(condition.raw, self.coerced(yes, no.raw.type), no.raw))

    def largest(self, left: Value, right: Operand) -> Value:
        """The larger one; `right` where either is no number."""
        other = Value(self, self.coerced(right, left.raw.type))
        return self.select(left > other, left, other)

    def number(self, value: float, kind: Any = F32) -> Value:
        """A constant."""
        return Value(self, ir.Constant(kind, value))

    def filled(self, value: float, kind: Any = F32) -> Value:
        """LANES times a constant."""
        return Value(self, ir.Constant(ir.VectorType(kind, LANES), [value] * LANES))

    def ramp(self) -> Value:
        """0, 1, 2 and so on."""
        return Value(self, ir.Constant(ir.VectorType(I64, LANES), list(range(LANES))))

    def spread(self, value: Value) -> Value:
        """LANES times a number."""
        kind = ir.VectorType(value.raw.type, LANES)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, value.raw, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
        return Value(self, self.builder.shuffle_vector(first, nothing, zeros))

    def fused(self, left: Operand, right: Value, added: Value) -> Value:
        """`left * right + added`, rounded once where the processor can, else twice; always in one way."""
        return self._intrinsic("fma" if FUSES else "fmuladd", left, right, added)

    def dot(self, added: Value, unsigned: Value, signed: Value) -> Value:
        """Adds to each word the products of its four unsigned bytes with four signed ones."""
        if DOTS:
            operands = [added.raw, unsigned.raw, signed.raw]
            return self._call("llvm.x86.avx512.vpdpbusd.512", added.raw.type, operands)
        halves = [self.builder.bitcast(value.raw, _HALF_WORDS) for value in (unsigned, signed)]
        eight = ir.Constant(_HALF_WORDS, [8] * 2 * LANES)
        low = self.builder.and_(halves[0], ir.Constant(_HALF_WORDS, [0xFF] * 2 * LANES))
        high = self.builder.lshr(halves[0], eight)
        signed_low = self.builder.ashr(self.builder.shl(halves[1], eight), eight)
        signed_high = self.builder.ashr(halves[1], eight)
        return added + self._pairs(low, signed_low) + self._pairs(high, signed_high)

    def _pairs(self, left: Any, right: Any) -> Value:
        """The sums of the products of neighbouring half words: there are instructions for it everywhere."""
        wide = ir.VectorType(I32, 2 * LANES)
        products = self.builder.mul(self.builder.sext(left, wide), self.builder.sext(right, wide))
        even, odd = (
            self.builder.shuffle_vector(
                products,
                products,
                ir.Constant(ir.VectorType(I32, LANES), list(range(first, 2 * LANES, 2))),
            )
            for first in (0, 1)
        )
        return Value(self, self.builder.add(even, odd))

    def root(self, value: Value) -> Value:
        """The square root."""
        return self._intrinsic("sqrt", value)

    def rounded(self, value: Value) -> Value:
        """The nearest whole number, the even one of two."""
        return self._intrinsic("rint", value)

    def converted(self, value: Value, kind: Any) -> Value:
        """The same number in another type."""
        source, target = value.element, kind
        wanted = ir.VectorType(kind, LANES) if value.wide else kind
        verbs = {(True, True): "fp", (True, False): "fptosi", (False, True): "sitofp", (False, False): "int"}
        verb = verbs[source in _FLOATS, target in _FLOATS]
        if verb == "fp":
            verb = "fpext" if BYTES[target] > BYTES[source] else "fptrunc"
        elif verb == "int":
            verb = "sext" if BYTES[target] > BYTES.get(source, 0) else "trunc"
        return Value(self, getattr(self.builder, verb)(value.raw, wanted))

    def reread(self, value: Value, kind: Any) -> Value:
        """The same bits as another type."""
        wanted = ir.VectorType(kind, LANES) if value.wide else kind
        return Value(self, self.builder.bitcast(value.raw, wanted))

    def total(self, value: Value) -> Value:
        """The sum of LANES numbers: halves are added to halves."""
        width = LANES
        while width > 1:
            width //= 2
            order = ir.Constant(ir.VectorType(I32, LANES), [(lane + width) % LANES for lane in range(LANES)])
            value += Value(self, self.builder.shuffle_vector(value.raw, value.raw, order))
        return Value(self, self.builder.extract_element(value.raw, ir.Constant(I32, 0)))

    def peak(self, value: Value) -> Value:
        """The largest of LANES numbers."""
        width = LANES
        while width > 1:
            width //= 2
            order = ir.Constant(ir.VectorType(I32, LANES), [(lane + width) % LANES for lane in range(LANES)])
            value = self.largest(value, Value(self, self.builder.shuffle_vector(value.raw, value.raw, order)))
        return Value(self, self.builder.extract_element(value.raw, ir.Constant(I32, 0)))

    def room(self, count: int, element: Any) -> Array:
        """Memory of the function's own, with whatever is there."""
        with self.builder.goto_entry_block():
            return Array(self, self.builder.alloca(element, size=count), element)

    def zeros(self, element: Any) -> Array:
        """LANES places of the function's own."""
        found = self.room(LANES, element)
        found.spill(0, Value(self, ir.Constant(ir.VectorType(element, LANES), [0] * LANES)))
        return found

    @contextlib.contextmanager
    def loop(self, first: Operand, last: Operand, step: int = 1) -> Iterator[Value]:
        """Repeats what is written inside, with an index from `first` to below `last`."""
        builder = self.builder
        head, body, after = (builder.append_basic_block() for _ in range(3))
        begin, before = self.coerced(first, I64), builder.block
        end = self.coerced(last, I64)
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(begin, before)
        builder.cbranch(builder.icmp_signed("<", index, end), body, after)
        builder.position_at_end(body)
        yield Value(self, index)
        following = builder.add(index, ir.Constant(I64, step))
        index.add_incoming(following, builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """What is written inside happens if the condition holds."""
        with self.builder.if_then(condition.raw):
            yield

    def either(self, condition: Value, yes: Callable[[], None], no: Callable[[], None]) -> None:
        """One of two."""
        with self.builder.if_else(condition.raw) as (then, otherwise):
            with then:
                yes()
            with otherwise:
                no()

    def each(self, count: int, body: Callable[[Lane], None]) -> None:
        """Takes a row of a known length, LANES places at a time."""
        whole = count - count % LANES
        with self.loop(0, whole, LANES) as first:
            body(Lane(self, first, None))
        if count > whole:
            body(self.lane(whole, count))

    def lane(self, first: int, count: int) -> Lane:
        """The places from `first` on, of a row of a known length."""
        rest = count - first
        return Lane(self, self.number(first, I64), None if rest >= LANES else self.number(rest, I64))

    def _both(self, left: Value, right: Operand) -> tuple[Any, Any]:
        if isinstance(right, Value) and right.wide and not left.wide:
            return self.spread(left).raw, right.raw
        return left.raw, self.coerced(right, left.raw.type)

    def _intrinsic(self, name: str, *operands: Operand) -> Value:
        values = [one for one in operands if isinstance(one, Value)]
        kind = next((one.raw.type for one in values if one.wide), values[0].raw.type)
        suffix = f"v{LANES}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self._call(f"llvm.{name}.{suffix}", kind, [self.coerced(one, kind) for one in operands])

    def _call(self, name: str, kind: Any, operands: list[Any]) -> Value:
        """An instruction that has a name alone, of operands like its result."""
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(kind, [kind] * len(operands)), name
        )
        return Value(self, self.builder.call(function, operands))


def able() -> bool:
    """Whether this processor has what this is worth it for: others make a call for each half precision."""
    return _ARM or bool(_FEATURES.get("f16c"))
