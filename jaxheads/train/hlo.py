"""What a compiled program does, read off its text: matrix products and collectives.

XLA's own count of floating-point operations takes the body of a loop once, and it does not count
collectives at all. Here every operation counts as often as it runs: the layers of a scan are a
loop whose number of turns the text gives.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLED_LIST = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Operation:
    """One line of the text.

    Attributes:
      name: of its value.
      kind: e.g. "dot".
      shape: of its value, as text; a tuple has several arrays.
      operands: names of the values it reads; of a constant, its value.
      rest: its attributes, as text.
    """

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: of the whole array on one device: what is gathered, reduced or sent.
      group: devices that take part together; 0 where the text does not say.
      times: how often it runs in one call of the program.
    """

    kind: str
    bytes: int
    group: int
    times: int


@dataclass(frozen=True)
class Program:
    """A compiled program of one device.

    Attributes:
      computations: name -> its operations; a computation comes after those it calls.
      times: name -> how often it runs in one call. All branches of a conditional count.
      endless: loops whose number of turns is not known; their bodies count once.
      devices: partitions of the program.
    """

    computations: dict[str, list[Operation]]
    times: dict[str, int]
    endless: int
    devices: int

    def flops(self) -> int:
        """Floating-point operations of all matrix products on one device: 2 for each term."""
        total = 0
        for name, operations in self.computations.items():
            if self.times[name]:
                shapes = {op.name: op.shape for op in operations}
                total += self.times[name] * sum(_flops(op, shapes) for op in operations)
        return total

    def collectives(self) -> list[Collective]:
        """All exchanges that run."""
        found: dict[tuple[str, ...], Collective] = {}
        for name, operations in self.computations.items():
            if not self.times[name]:
                continue
            shapes = {op.name: op.shape for op in operations}
            for op in operations:
                kind = op.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                if name.startswith("all-reduce-scatter"):  # so the TPU compiler fuses it
                    kind = "reduce-scatter"
                # The TPU compiler spreads one exchange over several fusions: same channel.
                channel = re.search(r"channel_id=(\d+)", op.rest)
                key = (kind, channel[1]) if channel else (kind, name, op.name)
                known = found.get(key)
                if known is None or known.times < self.times[name]:
                    found[key] = Collective(
                        kind, _payload(op, shapes), _group(op, self.devices), self.times[name]
                    )
        return list(found.values())


def read_program(text: str) -> Program:
    """Reads the text of a compiled program, `compiled.as_text()`.

    Raises:
      ValueError: it is not the text of an HLO module.
    """
    computations: dict[str, list[Operation]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            entry = current if header[1] else entry
            computations[current] = []
        elif current and (matched := _OPERATION.match(line)):
            computations[current].append(_operation(matched[1], matched[2]))
    if not entry:
        raise ValueError("this is not the text of a compiled HLO module: it has no ENTRY")
    times: dict[str, int] = defaultdict(int, {entry: 1})
    endless = 0
    for name in reversed(computations):
        for op in computations[name]:
            turns = 1
            if op.kind == "while" and times[name]:
                known = _turns(op, computations)
                turns = known or 1
                endless += known is None
            for callee in _callees(op.rest):
                times[callee] += times[name] * turns
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, times, endless, int(partitions[1]) if partitions else 1)


def _turns(loop: Operation, computations: dict[str, list[Operation]]) -> int | None:
    """Turns of a loop, where the text or a condition of the form i < n tells."""
    if known := _TURNS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    operations = computations[condition[1]] if condition else []
    limits = [op for op in operations if op.kind == "constant" and op.shape.startswith("s32[]")]
    below = any(op.kind == "compare" and "direction=LT" in op.rest for op in operations)
    return int(limits[0].operands[0]) if below and len(limits) == 1 else None


def _operation(name: str, text: str) -> Operation:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    kind, _, _ = text.partition("(")
    end = _closing(text, len(kind))
    inside = text[len(kind) : end]
    operands = [inside[1:-1]] if kind == "constant" else re.findall(r"%([\w.\-]+)", inside)
    return Operation(name, kind, shape, tuple(operands), text[end:])


def _closing(text: str, start: int = 0) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return len(text)


def _callees(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _CALLED_LIST.findall(rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _arrays(shape: str) -> list[tuple[int, tuple[int, ...]]]:
    """(bits of an element, sizes) of each array of a shape."""
    found = []
    for dtype, sizes in _ARRAY.findall(shape):
        width = re.match(r"[a-z]+(\d+)", dtype)
        bits = _BITS.get(dtype, int(width[1]) if width else 0)
        found.append((bits, tuple(int(n) for n in sizes.split(",") if n)))
    return found


def _bytes(shape: str) -> int:
    return sum(bits * math.prod(sizes) for bits, sizes in _arrays(shape)) // 8


def _payload(op: Operation, shapes: dict[str, str]) -> int:
    if op.kind.removesuffix("-start") != "all-gather":
        return sum(_bytes(shapes.get(name, "")) for name in op.operands)
    arrays = _arrays(op.shape)
    if op.kind.endswith("-start"):  # its value holds the operands, then the results
        arrays = arrays[len(op.operands) :]
    return sum(bits * math.prod(sizes) for bits, sizes in arrays) // 8


def _group(op: Operation, devices: int) -> int:
    """How many devices exchange with one another: three ways of writing it."""
    if matched := re.search(r"replica_groups=\[\d+,(\d+)\]", op.rest):
        return int(matched[1])
    if matched := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", op.rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", matched[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", matched[2]))
    if matched := re.search(r"replica_groups=\{(?:\{([\d,]*)\})?", op.rest):
        return len(matched[1].split(",")) if matched[1] else devices
    return 0


def _flops(op: Operation, shapes: dict[str, str]) -> int:
    if op.kind == "convolution":
        return _convolution(op, shapes)
    if op.kind == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    elif op.kind == "custom-call" and re.search(r'target="[^"]*(gemm|matmul)', op.rest):
        dims = re.search(r'lhs_contracting_dimensions":\[([\d",]*)\]', op.rest)
    else:
        return 0
    contracted = [int(n) for n in dims[1].replace('"', "").split(",") if n] if dims else []
    left = _sizes(shapes[op.operands[0]])
    return 2 * math.prod(_sizes(op.shape)) * math.prod(left[n] for n in contracted)


def _convolution(op: Operation, shapes: dict[str, str]) -> int:
    """The TPU compiler writes matrix products so, batch axes as axes of the window.

    Only pairs of a window's element and an element of the input count, not those that meet
    padding or the holes of a dilation.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if labels is None:
        return 0
    left, right = (_sizes(shapes[name]) for name in op.operands[:2])
    out = _sizes(op.shape)
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[3] if label.isdigit())

    def field(name: str, axis: int, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    pairs = 1
    for axis, label in enumerate(spatial):
        pairs *= _pairs(
            left[labels[1].index(label)],
            right[labels[2].index(label)],
            out[labels[3].index(label)],
            stride=int(field("stride", axis, "1")),
            pad=int(field("pad", axis, "0_0").split("_")[0]),
            left_dilation=int(field("lhs_dilate", axis, "1")),
            right_dilation=int(field("rhs_dilate", axis, "1")),
        )
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", op.rest)
    terms = batch * features * right[labels[2].index("i")] * pairs
    return 2 * terms // (int(groups[1]) if groups else 1)


def _pairs(
    size: int,
    window: int,
    out: int,
    *,
    stride: int,
    pad: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of output and window positions that meet an element of the input."""
    count = 0
    for o in range(out):
        for w in range(window):
            place = o * stride + w * right_dilation - pad
            count += place % left_dilation == 0 and 0 <= place < size * left_dilation
    return count


def _sizes(shape: str) -> tuple[int, ...]:
    return _arrays(shape)[0][1]
