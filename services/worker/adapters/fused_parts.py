"""The fused parts. Owns: what happens to a token between the integer products of a layer.

Every item of a sweep is one token, or one token and one head of keys: what is computed for it depends on
nothing else, and is done in the same order in any batch, chunk and count of threads. So a token has the same
bits alone and beside any others, whether it came in a prompt or was decoded. There are no masks and no
buckets: a token attends to as many positions as its row has before it, and itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from services.worker.adapters import fused_int8
from services.worker.adapters.fused_attention import BLOCK_POSITIONS, Attention, halved
from services.worker.adapters.vector_code import F16, F32, I64, Array, Lane, Value, Variable
from services.worker.adapters.vector_math import exponential
from services.worker.adapters.vector_program import Compiled, Program, Sweep

FIELDS = (
    # Of a step, one for each token.
    "states",  # float [tokens, width]
    "rows",  # int64 [tokens]: of the cache
    "positions",  # int64 [tokens]
    "bytes",  # uint8 [tokens, inputs of the next product]: signed bytes, with ZERO_POINT added
    "steps",  # float [tokens]: what an integer of the row is worth
    "counts",  # int32 [tokens]: outliers of the row
    "columns",  # int32 [tokens, widest]: where they are
    "outliers",  # float [tokens, widest]
    # Of the weight whose product comes in.
    "inputs",  # its inputs
    "weight",  # int8, as `packed_product.packed` makes it
    "scales",  # float [outputs]
    "bias",  # float [outputs]; 0: none
    "slots",  # int32 [inputs]: where a column is kept; negative: nowhere
    "kept",  # int8 [KEPT_COLUMNS, outputs]
    "owners",  # int32 [KEPT_COLUMNS]: which column is there; negative: none
    "uses",  # int64 [KEPT_COLUMNS]: by which call it was used last
    "clock",  # int64 [2]: the last place that was given, and the number of calls
    # Of a layer.
    "norm",  # float [width]: before the next product
    "head_norm",  # float [heads that turn, head_dim]; 0: none
    "keys",  # half [rows, shared, blocks, head_dim, BLOCK_POSITIONS]
    "values",  # half [rows, shared, blocks * BLOCK_POSITIONS, head_dim]
    "blocks",  # blocks of a row
    "turns",  # float [positions, head_dim / 2, 2]: cosine and sine of each pair
)

NUMBERS = (
    "tokens",
    "threads",
    "attention_threads",
    "product",  # the address of the product, int32 [tokens, outputs]; it becomes float where it lies
)


@dataclass(frozen=True, slots=True)
class FusedShape:
    """What the functions are compiled for.

    Attributes:
        width: Of a state.
        inner: Inputs of the last product of a layer.
        vocabulary: Outputs of the last product.
        queries: Query heads.
        shared: Heads of keys and values.
        head_dim: Width of a head.
        scale: Factor of the scores.
        eps: Of the normalizations.
    """

    width: int
    inner: int
    vocabulary: int
    queries: int
    shared: int
    head_dim: int
    scale: float
    eps: float

    @property
    def attended(self) -> int:
        """Outputs of attention."""
        return self.queries * self.head_dim

    @property
    def projected(self) -> int:
        """Outputs of the product that makes queries, keys and values."""
        return (self.queries + 2 * self.shared) * self.head_dim

    @property
    def widest(self) -> int:
        """The largest number of inputs that a product has."""
        return max(self.width, self.inner, self.attended)


@functools.lru_cache(maxsize=8)
def compiled(shape: FusedShape) -> Compiled:
    """The functions for a shape: `enter`, `attend`, `join`, `gate` and `leave`.

    `enter` normalizes states for the first product of a pass. `attend` takes queries, keys and values to what
    attention makes of them; `gate` takes the two halves of a layer's inner state to their product; `join`
    adds a product to the states, and normalizes these. Each leaves the bytes of the next product's rows, and
    what cannot be said in bytes. `leave` makes the last product whole, where it lies.
    """
    parts = _Parts(shape)
    program = Program(FIELDS, NUMBERS)
    for name in ("enter", "attend", "join", "gate", "leave"):
        program.function(name, getattr(parts, name))
    return program.compile()


class _Parts:
    def __init__(self, shape: FusedShape) -> None:
        self._shape = shape

    def enter(self, code: Sweep) -> None:
        code.sweep(code.argument("tokens"), code.argument("threads"), self._normalize)

    def attend(self, code: Sweep) -> None:
        shape = self._shape
        tokens, threads = code.argument("tokens"), code.argument("threads")
        fused_int8.keep(code, shape.widest, shape.projected)
        code.sweep(tokens, threads, self._turn)
        code.sweep(tokens * shape.shared, code.argument("attention_threads"), self._attend_one)

        def quantize(inside: Sweep, token: Value) -> None:
            row = fused_int8.product(inside).at(token * shape.projected)
            fused_int8.quantize(inside, shape.widest, token, shape.attended, lambda lane: lane.load(row, F32))

        code.sweep(tokens, threads, quantize)

    def join(self, code: Sweep) -> None:
        shape = self._shape
        fused_int8.keep(code, shape.widest, shape.width)

        def add(inside: Sweep, token: Value) -> None:
            row = fused_int8.finish(inside, shape.widest, token, shape.width)
            states = inside.array("states", F32).at(token * shape.width)
            inside.each(
                shape.width, lambda lane: lane.store(states, lane.load(states, F32) + lane.load(row, F32))
            )
            self._normalize(inside, token)

        code.sweep(code.argument("tokens"), code.argument("threads"), add)

    def gate(self, code: Sweep) -> None:
        shape = self._shape
        fused_int8.keep(code, shape.widest, 2 * shape.inner)

        def multiply(inside: Sweep, token: Value) -> None:
            row = fused_int8.finish(inside, shape.widest, token, 2 * shape.inner)
            up = row.at(shape.inner)

            def write(lane: Lane) -> None:
                gate = lane.load(row, F32)
                opened = gate / (exponential(inside, gate * -1.0) + 1.0)
                lane.store(row, opened * lane.load(up, F32))

            inside.each(shape.inner, write)
            fused_int8.quantize(inside, shape.widest, token, shape.inner, lambda lane: lane.load(row, F32))

        code.sweep(code.argument("tokens"), code.argument("threads"), multiply)

    def leave(self, code: Sweep) -> None:
        shape = self._shape
        fused_int8.keep(code, shape.widest, shape.vocabulary)

        def finish(inside: Sweep, token: Value) -> None:
            fused_int8.finish(inside, shape.widest, token, shape.vocabulary)

        code.sweep(code.argument("tokens"), code.argument("threads"), finish)

    def _normalize(self, code: Sweep, token: Value) -> None:
        width = self._shape.width
        states = code.array("states", F32).at(token * width)
        weight = code.array("norm", F32)
        factor = _norm_factor(code, states, width, self._shape.eps)

        def read(lane: Lane) -> Value:
            # Behind the end there is zero times the factor, which may be no number.
            return lane.inside(lane.load(states, F32) * factor * lane.load(weight, F32))

        fused_int8.quantize(code, self._shape.widest, token, width, read)

    def _turn(self, code: Sweep, token: Value) -> None:
        """Queries, keys and values of a token; keys and values go to the cache."""
        shape, dim = self._shape, self._shape.head_dim
        row = fused_int8.finish(code, shape.widest, token, shape.projected)
        turning = (shape.queries + shape.shared) * dim
        weights = code.field("head_norm")
        with code.when(weights.differs(0)), code.loop(0, turning, dim) as first:
            self._normalize_head(code, row.at(first), code.pointed(weights, F32).at(first))
        position = code.array("positions", I64).get(token)
        turns = code.array("turns", F32).at(position * dim)
        with code.loop(0, turning, dim) as first, code.loop(0, dim, 2) as pair:
            head, turn = row.at(first + pair), turns.at(pair)
            real, imaginary, cosine, sine = head.get(0), head.get(1), turn.get(0), turn.get(1)
            head.put(0, real * cosine - imaginary * sine)
            head.put(1, real * sine + imaginary * cosine)
        self._remember(code, row, token, position)

    def _normalize_head(self, code: Sweep, head: Array, weight: Array) -> None:
        factor = _norm_factor(code, head, self._shape.head_dim, self._shape.eps)

        def write(lane: Lane) -> None:
            lane.store(head, lane.load(head, F32) * factor * lane.load(weight, F32))

        code.each(self._shape.head_dim, write)

    def _remember(self, code: Sweep, row: Array, token: Value, position: Value) -> None:
        shape, dim = self._shape, self._shape.head_dim
        place = position % BLOCK_POSITIONS
        block = position // BLOCK_POSITIONS
        with code.loop(0, shape.shared) as head:
            area = self._area(code, token, head)
            keys = code.array("keys", F16).at(area + block * (dim * BLOCK_POSITIONS) + place)
            key = row.at(head * dim + shape.attended)
            with code.loop(0, dim) as index:
                keys.put(index * BLOCK_POSITIONS, halved(code, key.get(index)))
            values = code.array("values", F16).at(area + position * dim)
            value = row.at(head * dim + (shape.queries + shape.shared) * dim)
            code.each(dim, functools.partial(_lay_value, code, value, values))

    def _area(self, code: Sweep, token: Value, head: Value) -> Value:
        """Where keys and values of a head of the token's row begin."""
        row = code.array("rows", I64).get(token)
        size = code.field("blocks") * (BLOCK_POSITIONS * self._shape.head_dim)
        return (row * self._shape.shared + head) * size

    def _attend_one(self, code: Sweep, item: Value) -> None:
        """All query heads of one token that share one head of keys and values."""
        shape, dim = self._shape, self._shape.head_dim
        group = shape.queries // shape.shared
        token, head = item // shape.shared, item % shape.shared
        queries = fused_int8.product(code).at(token * shape.projected + head * (group * dim))
        length = code.array("positions", I64).get(token) + 1
        area = self._area(code, token, head)
        keys, values = code.array("keys", F16).at(area), code.array("values", F16).at(area)
        Attention(code, queries, group, dim, shape.scale).run(keys, values, length)


def _norm_factor(code: Sweep, states: Array, width: int, eps: float) -> Value:
    """What a row is multiplied by: one over its root mean square."""
    squares = Variable(code, code.filled(0.0))

    def add(lane: Lane) -> None:
        numbers = lane.load(states, F32)
        squares.set(code.fused(numbers, numbers, squares.get()))

    code.each(width, add)
    mean = code.total(squares.get()) * (1.0 / width)
    return code.number(1.0) / code.root(mean + eps)


def _lay_value(code: Sweep, source: Array, target: Array, lane: Lane) -> None:
    lane.store(target, halved(code, lane.load(source, F32)))
