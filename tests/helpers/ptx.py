"""As much of PTX as runs the arithmetic of a warp without a GPU: each register is 32 numbers, one a lane."""

import re
import struct
from collections.abc import Callable

import torch
from torch import Tensor

LANES = 32
lane = torch.arange(LANES)


def _select(a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    return torch.where(p.bool(), a, b)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.u32": lambda a: a,
    "mov.b32": lambda a: a,
    "add.u32": lambda a, b: a + b,
    "add.f32": lambda a, b: a + b,
    "sub.f32": lambda a, b: a - b,
    "neg.f32": lambda a: -a,
    "abs.f32": torch.abs,
    "max.f32": torch.fmax,
    # the sign of a
    "copysign.f32": lambda a, b: torch.copysign(b, a),
    "ex2.approx.ftz.f32": torch.exp2,
    "and.b32": lambda a, b: a.long() & b.long(),
    "shl.b32": lambda a, b: a.long() << b.long(),
    "shr.u32": lambda a, b: a.long() >> b.long(),
    "setp.eq.f32": lambda a, b: a == b,
    "setp.gt.f32": lambda a, b: a > b,
    "setp.ne.u32": lambda a, b: a != b,
    "setp.lt.u32": lambda a, b: a < b,
    "setp.le.u32": lambda a, b: a <= b,
    "and.pred": lambda a, b: a & b,
    "xor.pred": lambda a, b: a ^ b,
    "not.pred": lambda a: ~a,
    "selp.b32": _select,
    "selp.f32": _select,
    # as the hardware: lanes modulo 32
    "shfl.sync.idx.b32": lambda a, source, *_: a[source.long() % LANES],
    "shfl.sync.bfly.b32": lambda a, other, *_: a[lane ^ other.long()],
}


def run(asm: str, n_outputs: int, inputs: list[Tensor], in_place: bool = False) -> list[Tensor]:
    """The outputs of assembly for a warp: `$0` to `$n-1`, of `inputs` from `$n` on, or `in_place`; each `[32]`."""
    first = 0 if in_place else n_outputs
    registers: dict[str, Tensor] = {f"${first + i}": x for i, x in enumerate(inputs)} | {"%laneid": lane}

    def value(operand: str) -> Tensor:
        if operand.startswith("0f"):
            return torch.full((LANES,), struct.unpack("!f", bytes.fromhex(operand[2:]))[0])
        if re.fullmatch(r"-?\d+|0x[0-9a-f]+", operand):
            return torch.full((LANES,), int(operand, 0))
        return registers[operand]

    body = re.sub(r"\.reg [^;]*;", "", asm.strip("{} \n"))
    for statement in filter(None, map(str.strip, body.split(";"))):
        operation, operands = statement.split(maxsplit=1)
        target, *sources = re.split(r",\s*", operands)
        registers[target] = OPERATIONS[operation](*map(value, sources))
    return [registers[f"${i}"] for i in range(n_outputs)]
