"""Data parallel under torchrun: each helper is the identity on one process.

Every rank holds the whole model and works on its share of the batch (sharding.py spreads the model
as well). The recipes call these helpers without asking how many processes there are; only files in
runtime/ know torch.distributed. It is no part of the method.

Read next: sharding.py.

    torchrun --nproc_per_node=2 train_zero.py
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from threading import Event, Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

T = TypeVar("T")

# A rank that fails says so in the job's store, and the others then end within GRACE, wherever they
# are. The timeout is for what nobody says: a rank that is alive and never comes.
TIMEOUT = 1800.0  # seconds
GRACE = 10.0  # seconds
FAILED = "failed"  # the key in the store
BUCKET = 2**26  # numbers whose sum over ranks is taken at once: gradients are copied for it

seconds = 0.0  # that this process has spent on communication: see `communicating`
_wait = timedelta(seconds=TIMEOUT)
_ending = Event()


def init(device: torch.device | str = "cpu", timeout: float = TIMEOUT) -> None:
    """Join the process group when torchrun started this process; otherwise do nothing."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    global _wait
    device, _wait = torch.device(device), timedelta(seconds=timeout)
    store, number, world = next(dist.rendezvous("env://", timeout=_wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # nodes
        # torchrun may have kept the store from before a restart, with the addresses of dead ranks.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # gloo as well: counts, flags and Python objects are summed and gathered on the CPU.
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=_wait)
    Thread(target=_watch, args=(_store(),), daemon=True, name="watch").start()


def shutdown() -> None:
    _ending.set()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


# ---- ranks that fail ----------------------------------------------------------------------------


def first_to_fail() -> bool:
    """Say that this rank fails, and that it ends by itself; whether it is the first, as far as it
    can know."""
    if world_size() == 1:
        return True
    _ending.set()
    counts: list[int] = []

    def tell() -> None:
        with suppress(RuntimeError):  # torchrun, or rank 0, which holds the store, is gone
            counts.append(_store().add(FAILED, 1))

    teller = Thread(target=tell, daemon=True)
    teller.start()
    teller.join(2.0)  # a store on a host that is cut off or without power never answers
    return counts in ([], [1])


def is_gone(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has ended."""
    signs = "gloo.*(closed|reset|Broken pipe|refused)|remote process exited"
    return isinstance(error, RuntimeError) and bool(re.search(signs, str(error)))


def is_stuck(error: BaseException) -> bool:
    """Whether an error says no more than that another rank did not come in time."""
    return isinstance(error, RuntimeError) and bool(re.search("gloo.*imed? ?out", str(error)))


def _watch(store: dist.Store) -> None:
    """In a thread: end this process where another has failed. torchrun's SIGTERM is no more than a
    wish to save and stop, which a rank that waits for a dead one can't fulfil."""
    try:
        while not store.check([FAILED]):
            if _ending.wait(1.0):
                return
    except RuntimeError:
        return
    if not _ending.wait(GRACE):
        os.write(2, f"[rank {rank()}] ended, for another process has failed\n".encode())
        os._exit(1)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


# ---- collectives --------------------------------------------------------------------------------


@contextmanager
def communicating(device: torch.device | str = "cpu") -> Iterator[None]:
    """Count the time within as communication, with what it waits for slower ranks. Where it is of
    tensors on a GPU, kernels that run already are waited for first.

    FSDP's collectives (sharding.py) and those of DCP are not counted: they overlap with computing.
    """
    global seconds
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    try:
        yield
    finally:
        if on_gpu:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start


@cache
def group_for_saving() -> dist.ProcessGroup | None:
    """A group of its own for checkpoints, which are written while the others train. All ranks call
    it together the first time."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=_wait)


def barrier() -> None:
    all_sum(0)  # and not dist.barrier(), which would take a GPU of its own choice


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's share: item i goes to rank i mod the number of ranks.

    The j-th of the share is item `rank() + j * world_size()`, or `shard(range(len(items)))[j]`.
    """
    return items[rank() :: world_size()]


def gather_list(items: Sequence[T]) -> list[T]:
    """The items of all ranks in their global order, on every rank: the inverse of `shard`."""
    if world_size() == 1:
        return list(items)
    shares: list[list[T]] = [[] for _ in range(world_size())]
    with communicating():
        dist.all_gather_object(shares, list(items))
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def from_main(item: T) -> T:
    """What rank 0 has, on every rank."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items)
    return items[0]


def gather_numbered(items: dict[int, T]) -> dict[int, T]:
    """The items of all ranks by their number, in order, on every rank."""
    everywhere = [items]
    if world_size() > 1:
        everywhere = [{} for _ in range(world_size())]
        with communicating():
            dist.all_gather_object(everywhere, items)
    return dict(sorted(item for share in everywhere for item in share.items()))


def local_region(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of a tensor this rank holds: all of it, unless it is a DTensor."""
    shape, start = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        place = compute_local_shape_and_global_offset
        shape, start = place(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + size) for first, size in zip(start, shape))


def like(local: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part as what `tensor` is: itself, or a DTensor laid out as that one."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape,
        stride=tensor.stride(),
    )  # fmt: skip


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank holds a part; all ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_sum(value: T) -> T:
    """The sum over ranks of a number, or of a tensor (the given one is left as it is)."""
    if world_size() == 1:
        return value
    if isinstance(value, Tensor):
        total = value.detach().clone()
        with communicating(total.device):
            dist.all_reduce(total)
        return total
    total = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    with communicating():
        dist.all_reduce(total)
    return total.item()


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Replace each gradient by its sum over ranks; a rank without one counts as zeros.

    A sum and not a mean: each rank's loss is weighted by counts over the whole batch, so its
    gradient is a share of the batch's, and the shares add up to the same update on any number of
    ranks. And not DistributedDataParallel: to call a method of the model past that wrapper skips
    the reduction without a word. The gradients of a model that is spread (sharding.py) are summed
    already.
    """
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    # A parameter that no rank used keeps no gradient, as on one process: a zero one would make
    # the optimizer decay it.
    used = all_sum(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32))
    alike: dict[tuple, list[nn.Parameter]] = {}
    for p, ranks in zip(parameters, used.tolist()):
        if ranks:
            alike.setdefault((p.grad_dtype or p.dtype, p.device), []).append(p)
    for (dtype, _), group in alike.items():
        for bucket in _buckets(group):  # one all_reduce, not one for each parameter
            grads = [
                p.grad if p.grad is not None else torch.zeros_like(p, dtype=dtype) for p in bucket
            ]
            flat = torch.cat([grad.flatten() for grad in grads])
            with communicating(flat.device):
                dist.all_reduce(flat)
            for p, summed in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = summed.view_as(p)
            del grads, flat


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, as many at a time as BUCKET numbers hold, at least one."""
    bucket, size = [], 0
    for p in parameters:
        if bucket and size + p.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket
