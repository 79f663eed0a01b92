"""Reads the text of a compiled program (`compiled.as_text()`): its kernels and what they do.

A kernel is an instruction of the scheduled program that runs by itself: a fusion, a copy, a library
call, a collective. Occupancy and caches, which a program does not record, are not modeled.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")
# Instructions that name memory or order others, and run no kernel.
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("opt-barrier", "add-dependency", "partition-id", "replica-id"),
}
COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
}
_DTYPE_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program."""

    name: str
    shape: str  # such as 'f32[16,64]{1,0}' or '(f32[], pred[2])'
    opcode: str
    operands: tuple[str, ...]  # names; for a parameter, its index
    attributes: str

    def attribute(self, name: str) -> str:
        """Returns the value of name=value, without braces; '' if it is absent."""
        found = re.search(rf"[ ,]{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1].strip("{}") if found else ""

    @property
    def op_name(self) -> str:
        """The path of the operation in the traced function, such as 'jit(f)/dot_general'."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Computation:
    """A named list of instructions."""

    def __init__(self) -> None:
        self.instructions: dict[str, Instruction] = {}
        self.users: dict[str, list[tuple[Instruction, int]]] = collections.defaultdict(list)
        self.parameters: dict[int, str] = {}
        self.root = ""

    def add(self, instruction: Instruction, is_root: bool) -> None:
        self.instructions[instruction.name] = instruction
        if instruction.opcode == "parameter":
            self.parameters[int(instruction.operands[0])] = instruction.name
        for i, name in enumerate(instruction.operands):
            self.users[name].append((instruction, i))
        if is_root:
            self.root = instruction.name


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel, and what one execution does."""

    instruction: Instruction
    kind: str  # the opcode; of an asynchronous operation, without -start or -done
    times: int  # executions per call of the program
    num_bytes: float  # read and written
    result_shape: str
    flops: dict[str, float]  # of products and convolutions, by precision: bf16, tf32, f32, f64
    op_name: str
    source: str  # file:line


class Program:
    """A compiled program.

    Attributes:
      computations: {name: Computation}.
      entry: the name of the computation that a call executes.
      num_donated: number of results that reuse the memory of an argument.
    """

    def __init__(self, text: str) -> None:
        self.text, self.computations, self.entry = text, {}, ""
        self.num_donated = len(re.findall("(?:may|must)-alias", text.partition("\n")[0]))
        self._tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
        computation, table = None, ""
        for line in text.splitlines():
            if computation is not None and (found := _INSTRUCTION.match(line)):
                root, name, shape, opcode, rest = found.groups()
                operands, attributes = _split_operands(rest)
                names = re.findall(r"%([\w.\-]+)", operands)
                names = [operands] if opcode == "parameter" else names
                instruction = Instruction(name, shape, opcode, tuple(names), attributes)
                computation.add(instruction, bool(root))
            elif found := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                computation = self.computations.setdefault(found[2], Computation())
                self.entry = found[2] if found[1] else self.entry
            elif line.startswith("}"):
                computation = None
            elif computation is None and re.match(r"^[A-Z]\w+$", line):
                table = line  # FileNames, FileLocations, StackFrames, ...
            elif computation is None and table and (found := re.match(r"^(\d+) (.*)$", line)):
                self._tables[table][int(found[1])] = found[2]

    def instructions(self) -> Iterator[Instruction]:
        """Yields every instruction, also those inside fusions."""
        for computation in self.computations.values():
            yield from computation.instructions.values()

    def loops(self) -> Iterator[int | None]:
        """Yields the number of iterations of each loop, None if it is unknown."""
        for instruction in self.instructions():
            if instruction.opcode == "while":
                yield _trip_count(instruction)

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """The kernels of one call. A loop of unknown length counts as one iteration in `times`."""
        return list(self._kernels(self.entry, 1))

    def transfers(self) -> dict[str, tuple[int, int, list[str]]]:
        """Returns {kind: (messages, bytes, dtypes)} of the collectives per device and call.

        A collective counts with the bytes of its result: an all-gather with the complete array, a
        reduce-scatter with its part.
        """
        result: dict[str, tuple[int, int, list[str]]] = {}
        for k in self.kernels:
            if k.kind in COLLECTIVES:
                messages, total, dtypes = result.get(k.kind, (0, 0, []))
                found = {dtype for dtype, _, _ in _ARRAY.findall(k.result_shape)}
                total += int(k.times * _num_bytes(k.result_shape))
                result[k.kind] = (messages + k.times, total, sorted({*dtypes, *found}))
        return result

    def _kernels(self, name, times):
        """Yields the kernels of a computation that is executed `times` times."""
        computation = self.computations.get(name, Computation())
        for op in computation.instructions.values():
            if op.opcode in _NO_KERNEL or op.opcode.endswith("-update"):
                continue
            if op.opcode == "while":
                for part in ("condition", "body"):
                    yield from self._kernels(
                        _name(op.attribute(part)), times * (_trip_count(op) or 1)
                    )
            elif op.opcode == "conditional":
                parts = ("true_computation", "false_computation", "branch_computations")
                for branch in ",".join(op.attribute(p) for p in parts).split(","):
                    yield from self._kernels(_name(branch), times)
            elif op.opcode == "call" or (op.opcode.endswith("-start") and op.attribute("calls")):
                called = op.attribute("calls") or op.attribute("to_apply")
                yield from self._kernels(_name(called), times)
            elif op.opcode.endswith("-done"):
                start = op
                while start.operands and not start.opcode.endswith("-start"):
                    start = computation.instructions.get(
                        start.operands[0], Instruction("", "", "-start", (), "")
                    )
                if not start.attribute("calls"):
                    yield self._kernel(computation, start, op, times)
            elif not op.opcode.endswith("-start"):
                yield self._kernel(computation, op, op, times)

    def _kernel(self, computation, op, result, times):
        """Returns a Kernel with the operands of `op` and the results of `result`.

        `result` is `op` itself or, for an asynchronous operation, its -done instruction.
        """
        read = sum(self._read(computation, op, i) for i in range(len(op.operands)))
        written = self._written(computation, result)
        return Kernel(
            instruction=op,
            kind=result.opcode.removesuffix("-done"),
            times=times,
            num_bytes=read + written,
            result_shape=result.shape,
            flops=self._flops(computation, op),
            op_name=op.op_name or result.op_name or self._common_name(op),
            source=self._source(op),
        )

    def _read(self, computation, op, i):
        """Returns the bytes that an instruction reads from its operand i."""
        operand = computation.instructions.get(op.operands[i])
        full = _num_bytes(operand.shape) if operand else 0
        if op.opcode in ("slice", "dynamic-slice", "gather") and i == 0:
            return min(full, _num_bytes(op.shape))
        if op.opcode in ("dynamic-update-slice", "scatter") and i == 0:
            return 0  # updated in place
        if op.opcode == "fusion":
            called = self.computations[_name(op.attribute("calls"))]
            return min(full, self._read_value(called, called.parameters.get(i)))
        return full

    def _read_value(self, computation, name):
        """Returns the bytes that a fused computation reads from one of its values."""
        total = 0
        for user, i in computation.users[name]:
            if user.opcode in ("bitcast", "get-tuple-element", "tuple"):
                total += self._read_value(computation, user.name)
            else:
                total += self._read(computation, user, i)
        return total

    def _written(self, computation, op):
        """Returns the bytes that an instruction writes; in-place updates write only the update."""
        instructions = computation.instructions
        if op.opcode == "bitcast" and op.operands[0] in instructions:
            return self._written(computation, instructions[op.operands[0]])
        if op.opcode in ("dynamic-update-slice", "scatter"):
            update = op.operands[1 if op.opcode == "dynamic-update-slice" else 2]
            return _num_bytes(instructions[update].shape)
        if op.opcode == "tuple":
            return sum(self._written(computation, instructions[name]) for name in op.operands)
        if op.opcode == "fusion":
            called = self.computations[_name(op.attribute("calls"))]
            return self._written(called, called.instructions[called.root])
        if op.opcode == "custom-call":  # not its workspace, a last result of bytes
            return _num_bytes(re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", op.shape))
        return _num_bytes(op.shape)

    def _flops(self, computation, op):
        """Returns {precision: FLOP} of the products in an instruction."""
        if op.opcode == "fusion":
            called = self.computations[_name(op.attribute("calls"))]
            inside = (self._flops(called, other) for other in called.instructions.values())
            return dict(sum(map(collections.Counter, inside), collections.Counter()))
        shapes = [
            computation.instructions[n].shape
            for n in op.operands[:2]
            if n in computation.instructions
        ]
        target = op.attribute("custom_call_target").strip('"')
        if op.opcode == "dot" or target.startswith("__cublas"):
            pattern = r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d,"]*)'
            axes = re.search(pattern, op.attributes)[1].replace('"', "")
            lhs = _sizes(shapes[0])
            work = math.prod(_sizes(op.shape)) * math.prod(
                lhs[int(a)] for a in axes.split(",") if a
            )
        elif target.startswith("__cudnn$fmha"):  # of queries and keys, both [B, N, h, K]
            products = 5 if "Backward" in target else 2
            work = products * math.prod(_sizes(shapes[0])) * _sizes(shapes[1])[1]
        elif op.opcode == "convolution" or target.startswith("__cudnn$conv"):
            work = _convolution_work(op, target, shapes)
        else:
            return {}
        return {_precision(op, shapes[0]): 2.0 * work}

    def _common_name(self, op):
        """Returns the most common op_name inside a fusion that has none itself."""
        called = self.computations.get(_name(op.attribute("calls")), Computation())
        names = collections.Counter(o.op_name for o in called.instructions.values() if o.op_name)
        return names.most_common(1)[0][0] if names else ""

    def _source(self, op):
        """Returns the file:line of the call that an instruction comes from."""

        def number(name, text):
            found = re.search(rf"{name}=(\d+)", text)
            return int(found[1]) if found else 0

        frame = self._tables["StackFrames"].get(number("stack_frame_id", op.attributes), "")
        place = self._tables["FileLocations"].get(number("file_location_id", frame), "")
        file = self._tables["FileNames"].get(number("file_name_id", place), "").strip('"')
        return f"{file.rpartition('/')[2]}:{number('line', place)}" if file else ""


def _split_operands(rest):
    """Splits what follows an instruction's opening parenthesis into (operands, attributes)."""
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:i], rest[i + 1 :]
    return rest, ""


def _name(reference):
    return reference.strip().lstrip("%")


def _trip_count(loop):
    found = re.search(r'known_trip_count.{1,8}"n":"(\d+)"', loop.attributes)
    return int(found[1]) if found else None


def _sizes(shape):
    return [int(n) for n in _ARRAY.search(shape)[3].split(",") if n]


def _num_bytes(shape):
    """Returns the bytes of a shape or of a tuple of shapes."""
    total = 0.0
    for dtype, bits, sizes in _ARRAY.findall(shape):
        bits = _DTYPE_BITS.get(dtype, int(bits or 8))
        total += math.prod(int(n) for n in sizes.split(",") if n) * bits / 8
    return total


def _precision(op, operand):
    """Returns the unit that a product runs on, from its operands' dtype: bf16, tf32, f32, f64."""
    dtype = _ARRAY.search(operand)[1]
    if dtype == "f32" and "dot_bf16_bf16_f32" in op.attributes:
        return "bf16"
    if dtype == "f32":
        exact = re.search("highest|dot_f32_f32_f32", op.attributes)
        return "f32" if exact else "tf32"
    return "bf16" if dtype == "f16" else dtype


def _convolution_work(op, target, shapes):
    """Returns the multiply-adds of a convolution: outputs x kernel / output features."""
    kernel_labels = re.search(r"_(\w+)->", op.attribute("dim_labels"))[1]
    result = _sizes(op.shape)
    if "BackwardFilter" in target:  # (inputs, gradients of the outputs) -> gradient of the kernel
        outputs, kernel = _sizes(shapes[1]), result
    elif "BackwardInput" in target:  # (gradients of the outputs, kernel) -> gradient of the inputs
        outputs, kernel = _sizes(shapes[0]), _sizes(shapes[1])
    else:
        outputs, kernel = result, _sizes(shapes[1])
    return math.prod(outputs) * math.prod(kernel) / kernel[kernel_labels.index("o")]
