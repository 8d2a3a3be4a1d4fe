"""Programs of vector functions. Owns: how they are compiled, called, and spread over threads.

A function takes one frame, an array of addresses that is filled once, and a few numbers that differ from
call to call. It works in sweeps: each is a loop over items that do not know of each other, so that threads
may share it. The threads are those of torch, which wait for work between its own products: more of them would
fight over the cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir

from services.worker.adapters.vector_code import I8, I32, I64, VOID, Array, Code, Value

# Work is cut into so many parts a thread: one that was held up leaves the rest to the others.
PARTS_A_THREAD = 4

OPTIMIZATION = 3

_POINTER = I8.as_pointer()


class Sweep(Code):
    """A function under construction that has a frame and numbers.

    Args:
        function: What is filled.
        program: What it belongs to.
        shared: Where frame and numbers lie, `[1 + numbers]`.
    """

    def __init__(self, function: Any, program: Program, shared: Any) -> None:
        super().__init__(function)
        self._program = program
        self.shared = shared

    def argument(self, name: str) -> Value:
        """A number of the call."""
        return Value(self, self._word(1 + self._program.numbers.index(name)))

    def field(self, name: str) -> Value:
        """A number of the frame."""
        place = self.builder.inttoptr(self._word(0), I64.as_pointer())
        index = ir.Constant(I64, self._program.fields.index(name))
        return Value(self, self.builder.load(self.builder.gep(place, [index])))

    def array(self, name: str, element: Any) -> Array:
        """What an address in the frame leads to."""
        return self.pointed(self.field(name), element)

    def pointed(self, address: Value, element: Any) -> Array:
        """What an address leads to."""
        return Array(self, self.builder.inttoptr(address.raw, element.as_pointer()), element)

    def sweep(self, count: Value, threads: Value, body: Callable[[Sweep, Value], None]) -> None:
        """Does something for each item from 0 to below `count`; threads share it.

        Args:
            count: How many items there are.
            threads: How many threads may take part.
            body: Writes what is done for one item. It must use nothing that was written outside of it.
        """
        self._program.sweep(self, count, threads, body)

    def _word(self, index: int) -> Any:
        place = self.builder.gep(self.shared, [ir.Constant(I64, index)])
        return self.builder.load(place)


class Program:
    """Functions that are compiled together.

    Args:
        fields: The names of what a frame holds, one word each.
        numbers: The names of what a call passes, one word each.
    """

    def __init__(self, fields: Sequence[str], numbers: Sequence[str]) -> None:
        self.fields = tuple(fields)
        self.numbers = tuple(numbers)
        self._module = ir.Module()
        self._module.triple = binding.get_default_triple()
        self._names: list[str] = []
        self._words = 1 + len(self.numbers)

    def function(self, name: str, body: Callable[[Sweep], None]) -> None:
        """Adds a function; `body` writes it."""
        kind = ir.FunctionType(VOID, [I64] * self._words)
        function = ir.Function(self._module, kind, name)
        code = Sweep(function, self, None)
        # Three words more, of a sweep: the next part, how many parts there are, and how many items.
        code.shared = code.builder.alloca(I64, size=self._words + 3)
        for index, argument in enumerate(function.args):
            code.builder.store(argument, code.builder.gep(code.shared, [ir.Constant(I64, index)]))
        body(code)
        code.builder.ret_void()
        self._names.append(name)

    def sweep(self, code: Sweep, count: Value, threads: Value, body: Callable[[Sweep, Value], None]) -> None:
        """See `Sweep.sweep`."""
        builder = code.builder
        wanted = code.select(threads > 1, threads * PARTS_A_THREAD, code.number(1, I64))
        parts = code.select(wanted > count, count, wanted)
        for place, word in zip(self._places(code), (code.number(0, I64), parts, count), strict=True):
            builder.store(word.raw, place)
        worker = self._worker(body)
        shared = builder.bitcast(code.shared, _POINTER)
        team = _team_address()
        if not team:
            builder.call(worker, [shared])
            return
        kind = ir.FunctionType(VOID, [worker.type, _POINTER, I32, I32])
        start = builder.inttoptr(ir.Constant(I64, team), kind.as_pointer())
        size = builder.trunc(threads.raw, I32)
        code.either(
            threads > 1,
            lambda: builder.call(start, [worker, shared, size, ir.Constant(I32, 0)]),
            lambda: builder.call(worker, [shared]),
        )

    def compile(self) -> Compiled:
        """The functions, ready to be called."""
        return Compiled(str(self._module), self._names, self._words)

    def _worker(self, body: Callable[[Sweep, Value], None]) -> Any:
        """The function that each thread calls: it takes parts until none is left."""
        worker = ir.Function(
            self._module, ir.FunctionType(VOID, [_POINTER]), f"sweep_{len(self._module.functions)}"
        )
        worker.linkage = "internal"
        code = Sweep(worker, self, None)
        builder = code.builder
        code.shared = builder.bitcast(worker.args[0], I64.as_pointer())
        following, *sizes = self._places(code)
        parts, items = (Value(code, builder.load(place)) for place in sizes)
        head, work, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        part = Value(code, builder.atomic_rmw("add", following, ir.Constant(I64, 1), "monotonic"))
        builder.cbranch((part < parts).raw, work, after)
        builder.position_at_end(work)
        with code.loop(part * items // parts, (part + 1) * items // parts) as item:
            body(code, item)
        builder.branch(head)
        builder.position_at_end(after)
        builder.ret_void()
        return worker

    def _places(self, code: Sweep) -> list[Any]:
        """The words that a sweep's threads share: the next part, the count of parts, and of items."""
        return [code.builder.gep(code.shared, [ir.Constant(I64, self._words + index)]) for index in range(3)]


class Compiled:
    """Functions for this processor; they live as long as this does.

    Args:
        text: The module.
        names: Its functions.
        words: How many numbers each takes.
    """

    def __init__(self, text: str, names: Sequence[str], words: int) -> None:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(),
            features=binding.get_host_cpu_features().flatten(),
            opt=OPTIMIZATION,
            jit=True,
        )
        module = binding.parse_assembly(text)
        module.verify()
        tuning = binding.create_pipeline_tuning_options(speed_level=OPTIMIZATION)
        builder = binding.create_pass_builder(machine, tuning)
        builder.getModulePassManager().run(module, builder)
        self._engine = binding.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        places = {name: self._engine.get_function_address(name) for name in names}
        kinds = [ctypes.c_int64] * words
        self._brief = {name: ctypes.PYFUNCTYPE(None, *kinds)(place) for name, place in places.items()}
        self._long = {name: ctypes.CFUNCTYPE(None, *kinds)(place) for name, place in places.items()}

    def brief(self, name: str) -> Callable[..., None]:
        """A function that keeps the interpreter's lock: for calls of microseconds.

        It takes the frame's address, then its numbers.
        """
        return self._brief[name]

    def long(self, name: str) -> Callable[..., None]:
        """The same function, which lets other threads of the interpreter run meanwhile."""
        return self._long[name]


def _team_address() -> int:
    """Where the function lies that gives torch's own threads work; 0 where they are of another kind."""
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0
