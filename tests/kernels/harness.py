"""What the kernels' tests share: guarded memory, the grid walked backwards, float64 comparison."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 512  # numbers before and after every buffer
EMPTY = ("aten::empty.memory_format", "aten::empty_strided", "aten::new_empty",
         "aten::empty_like", "aten::zeros", "aten::new_zeros", "aten::zeros_like")  # fmt: skip


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with NaN (or a huge number) before and after: a read past its end shows in the
    result."""
    return _inside(x, x.contiguous())[1]


def _inside(like: torch.Tensor, values: torch.Tensor | None):
    poison = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max // 2
    room = torch.full((like.numel() + 2 * GUARD,), poison, dtype=like.dtype, device=like.device)
    if values is not None:
        room[GUARD : GUARD + like.numel()] = values.flatten()
    contiguous = torch.empty(like.shape, device="meta").stride()
    strides = like.stride() if values is None else contiguous
    return room, room.as_strided(like.shape, strides, GUARD)


class Canaries(TorchDispatchMode):
    """Within it every new buffer lies between canaries and, if it was asked for empty, is full of
    NaN. On leaving, dead canaries fail: something was written past a buffer's end."""

    def __init__(self):
        super().__init__()
        self.rooms = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.name() in EMPTY and out.numel() and out.device.type != "meta":
            room, inside = _inside(out, None)
            if "zeros" in function.name():
                inside.zero_()
            self.rooms.append((room, room.clone(), out.numel()))
            return inside
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0] is None:
            assert self.rooms, "no buffer was made: the canaries guarded nothing"
            for room, before, n in self.rooms:
                for edge in (slice(None, GUARD), slice(GUARD + n, None)):
                    same = torch.equal(room[edge].nan_to_num(), before[edge].nan_to_num())
                    assert same, "something was written outside a buffer"


@contextmanager
def backwards():
    """The interpreter walks the grid from its last program to its first: where programs race, or
    one reads what another wrote, the result changes."""
    from triton.runtime.interpreter import InterpreterBuilder

    forwards = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, x, y, z):
        nx, ny, nz = self.grid_dim
        forwards(self, nx - 1 - x, ny - 1 - y, nz - 1 - z)

    InterpreterBuilder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        InterpreterBuilder.set_grid_idx = forwards


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, in units of the largest number that is right; NaN where a NaN is."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    assert found.shape == right.shape, f"{found.shape=} {right.shape=}"
    if not right.numel():
        return 0.0
    return float((found - right).abs().max() / right.abs().max().clamp(min=1e-30))


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
