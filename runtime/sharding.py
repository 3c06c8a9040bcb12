"""A model spread over processes, from outside: model.py knows nothing of it.

Each rank works on its share of the batch, as in parallel.py, but does not hold the whole model.
The ranks stand in a grid of dp rows and ep columns:

    FSDP (ZeRO-3)       every weight is cut into as many parts as there are ranks. A block's are
                        gathered when it is about to run, and dropped afterwards
    expert parallelism  the ranks of a row share the experts out, each has E / ep. A token travels
                        to its experts' ranks, and what they make of it travels back

Every reduction is a sum: each rank's loss is its share of the batch's loss, so that the update is
the same on any number of ranks. Ranks gather and exchange together, and so have to run the model
equally often: `in_step` sees to that. With `gathered` they don't, but for the experts.

It is no part of the method. Read next: checkpoint.py.

    model = load_pretrained(path, shard=partial(shard, ep=2))     each rank reads its part only
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import kernels
from model import Config, Experts, Transformer
from runtime import memory, parallel
from runtime.flags import UserError
from runtime.tensor_parallel import check_tp, cut_across, part_of

NOTHING, PASS, GRADIENTS = range(3)  # what a rank does with the model


@dataclass
class Spread:
    """What `shard` leaves on a model."""

    device: str
    world: DeviceMesh
    grid: DeviceMesh  # dp, ep
    tp: int = 0  # how many ranks sample together, each with a part of every matrix
    together: dist.ProcessGroup | None = None  # who runs the model in step now

    @property
    def ep(self) -> int:
        return self.grid["ep"].size()

    def tell(self, doing: int) -> int:
        """The most that a rank does: nothing any more, a pass without gradients, one with them."""
        most = torch.tensor(doing)
        with parallel.communicating():
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.together)
        return int(most)


@cache
def meshes(device: str, ep: int) -> tuple[DeviceMesh, DeviceMesh]:
    world = parallel.world_size()
    grid = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("dp", "ep"))
    return init_device_mesh(device, (world,)), grid


def shard(
    model: Transformer, ep: int | None = 1, device: torch.device | str = "cpu",
    states: str | None = "master", tp: int = 0,
) -> Transformer:  # fmt: skip
    """Spread a model, whose weights may still be on the meta device, in the dtype that they will
    have; on one process it stays as it is. Optimizers are made afterwards.

    ep: how many ranks share the experts out; 0: nothing is spread; None: as its size asks for
    (`default_ep`). states: of the optimizer of a model in bf16; None: it won't be trained. tp: how
    many ranks sample together (tensor_parallel.py); with ep=0 the model is for sampling alone.
    Raises UserError where ranks, experts and ep, or heads and tp, don't fit.
    """
    check_grid(model.config, ep, tp)
    if tp > 1 and ep == 0:
        cut_across(model, tp, torch.device(device).type)
        return model
    if ep is None:
        ep = 1 if tp > 1 else choose_ep(model, device, states)
    if parallel.world_size() == 1 or ep == 0:
        return model
    spread = Spread(torch.device(device).type, *meshes(torch.device(device).type, ep), tp)
    summed_in = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
    policy = MixedPrecisionPolicy(reduce_dtype=summed_in, cast_forward_inputs=False)
    cut = partial(fully_shard, mp_policy=policy)
    layers = model.model.layers
    for block in layers:
        if block.is_moe:
            shard_experts(block.mlp.experts, spread, cut)
    # Of the multi-token prediction layer some parts are used past its forward: it stays with
    # embedding and head, which remain gathered from `hidden` to the end of the backward pass.
    for block in layers[: model.config.num_hidden_layers]:
        cut(block, mesh=spread.world)
    cut(model, mesh=spread.world, reshard_after_forward=False)
    for module in pieces(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    # All that the model can be asked goes through `hidden` first.
    register_fsdp_forward_method(model, "hidden")
    model.spread, model.hidden = spread, partial(hidden_in_step, spread, model.hidden)
    return model


def check_grid(config: Config, ep: int | None, tp: int = 0) -> None:
    """Raises UserError where the model can't be spread so over these processes."""
    check_tp(config, tp)
    if reason := misfit(config, ep or 0):
        raise UserError(reason)


def misfit(config: Config, ep: int) -> str:
    """Why the model can't be spread so; empty where it can."""
    world, experts = parallel.world_size(), config.n_routed_experts
    if ep < 0 or ep > 0 and world % ep:
        return f"--ep {ep}: must divide the number of processes, {world}"
    if ep > 1 and (experts is None or experts % ep):
        has = "is dense" if experts is None else f"has {experts} experts"
        return f"--ep {ep}: must divide the number of experts, and the model {has}"
    sizes = config.moe_intermediate_size, config.hidden_size
    if ep > 1 and any(size % (world // ep) for size in sizes):
        return (
            f"--ep {ep} leaves {world // ep} processes to cut each expert, whose sizes"
            f" {sizes[0]} and {sizes[1]} can't be divided by that; give another --ep"
        )
    return ""


def default_ep(config: Config, size: int, room: float, local: int) -> int:
    """0, the whole model on each of several processes, where its `size` is at most half of the
    `room` that a process has, both in bytes: caches and activations need the rest. Otherwise it is
    spread, the experts over as many of a node's `local` processes as divide both."""
    if parallel.world_size() == 1 or 2 * size <= room:
        return 0
    return next(n for n in range(local, 0, -1) if local % n == 0 and not misfit(config, n))


def choose_ep(model: Transformer, device: torch.device | str, states: str | None) -> int:
    """`default_ep` of a model on these processes, the same on all; a line says so where it is
    spread."""
    each = memory.bytes_each(model.lm_head.weight.dtype, states)
    size = each * model.num_parameters(mtp=True)
    found = parallel.gather_list([(memory.process_memory(device), memory.local_processes())])
    room, local = min(room for room, _ in found), math.gcd(*(local for _, local in found))
    ep = default_ep(model.config, size, room, local)
    if ep and parallel.is_main():
        kinds = "weights" if states is None else "weights, gradients and optimizer states"
        say(
            f"{size / 1e9:.1f} GB of {kinds}, more than half of the {room / 1e9:.1f} GB that a"
            f" process has: spread over {parallel.world_size()} processes, --ep {ep}"
        )
    return ep


@cache
def say(line: str) -> None:
    """Print it once, of however many models."""
    print(line)


def pieces(model: nn.Module) -> list[FSDPModule]:
    """What is gathered and dropped as one; the model itself, with what is left, comes first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# ---- expert parallelism --------------------------------------------------------------------------


def shard_experts(experts: Experts, spread: Spread, cut: Callable) -> None:
    """Experts over the columns of the grid, and each expert's matrices over the rows."""
    if spread.ep == 1:
        cut(experts, mesh=spread.world)
        return
    ep = spread.grid["ep"]
    for name, p in list(experts.named_parameters()):
        part = distribute_tensor(p.detach(), ep, [Shard(0)])
        experts.register_parameter(name, nn.Parameter(part, p.requires_grad))
    cut(experts, mesh=spread.grid["dp"], shard_placement_fn=lambda p: Shard(1))
    experts.forward = partial(exchange, experts, ep.get_group())


class AllToAll(torch.autograd.Function):
    """Rows to ranks, sent[i] of them to the i-th; the gradients go back the same way."""

    @staticmethod
    def forward(
        ctx, x_WD: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = received, sent, group
        out = x_WD.new_empty(sum(received), *x_WD.shape[1:])
        dist.all_to_all_single(out, x_WD.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad_WD: Tensor):
        return AllToAll.apply(grad_WD, *ctx.way), None, None, None


def exchange(
    experts: Experts, group: dist.ProcessGroup, x_ND: Tensor, weights_NA: Tensor, experts_NA: Tensor
) -> Tensor:
    """In place of Experts.forward: each copy of a token goes to the rank that has its expert. There
    the copies (w of them) are sorted once more, by expert, for they come rank by rank."""
    matrices = (experts.gate_proj, experts.up_proj, experts.down_proj)
    gate, up, down = (matrix.to_local() for matrix in matrices)
    ranks, (N, A) = dist.get_world_size(group), experts_NA.shape
    flat_W = experts_NA.flatten()
    order_W = flat_W.argsort(stable=True)
    sent_E = flat_W.bincount(minlength=ranks * len(gate))
    received_E = torch.empty_like(sent_E)  # from each rank for each expert of this one
    dist.all_to_all_single(received_E, sent_E, group=group)
    way = [count_E.view(ranks, -1).sum(1).tolist() for count_E in (sent_E, received_E)]
    x_wD = AllToAll.apply(x_ND[order_W // A], *way, group)
    own_E = torch.arange(len(gate), device=flat_W.device).repeat(ranks)
    order_w = own_E.repeat_interleave(received_E).argsort(stable=True)
    ends_E = received_E.view(ranks, -1).sum(0).cumsum(0)
    hidden_wF = kernels.grouped_swiglu(x_wD, gate, up, ends_E, order_w)
    out_wD = kernels.grouped_linear(hidden_wF, down, ends_E).index_select(0, order_w.argsort())
    out_WD = AllToAll.apply(out_wD, *reversed(way), group)
    out_NAD = out_WD.index_select(0, order_W.argsort()).unflatten(0, (N, A))
    return (out_NAD * weights_NA.unsqueeze(-1)).sum(1)


# ---- in step -------------------------------------------------------------------------------------


def hidden_in_step(spread: Spread, hidden: Callable, *args, **kwargs):
    """Transformer.hidden, told to the ranks that are idle."""
    if spread.together is not None:
        spread.tell(GRADIENTS if torch.is_grad_enabled() else PASS)
    return hidden(*args, **kwargs)


@contextmanager
def in_step(model: nn.Module, nothing: Callable[[], Tensor] | None = None) -> Iterator[None]:
    """Within, each rank runs the model as often as it likes, each time forward and, where gradients
    are on, backward. A rank that has finished runs it on nothing until all have.

    nothing: a loss, which will count 0, over the same parameters as the ranks' own: all have to sum
    the same gradients. None: a token's log-probability.
    """
    spread = getattr(model, "spread", None)
    if spread is None:
        yield
        return
    with together(model, spread.world.get_group(), nothing):
        yield
    for piece in pieces(model):
        piece.reshard()


@contextmanager
def gathered(model: Transformer) -> Iterator[Transformer]:
    """Within, the model that is given back is run without gradients: for sampling. Each rank holds
    all weights but those of other ranks' experts, and runs it as often as it likes; without expert
    parallelism no rank waits for another. With tensor parallelism it is this rank's part of the
    model, and a group's ranks run it together."""
    spread = getattr(model, "spread", None)
    if spread is None:
        yield model
        return
    if spread.tp > 1:
        yield part_of(model, spread.tp, spread.device)
        return
    root, *inner = pieces(model)
    for piece in (root, *inner):
        piece.unshard()
        piece.set_reshard_after_forward(False, recurse=False)
    try:
        group = spread.grid["ep"].get_group() if spread.ep > 1 else None
        with together(model, group):
            yield model
    finally:
        for piece in inner:
            piece.set_reshard_after_forward(True, recurse=False)
        for piece in (root, *inner):
            piece.reshard()


def repeatable(model: nn.Module) -> bool:
    """Whether a step of the sampler does the same each time and may be recorded: not where tokens
    travel, for their number changes, and not where ranks sum, which no recording on a CPU can (on
    GPUs a CUDA graph might; it was not tried)."""
    spread = getattr(model, "spread", None)
    return (spread is None or spread.ep == 1) and not hasattr(model, "group")


@contextmanager
def together(
    model: nn.Module, group: dist.ProcessGroup | None,
    nothing: Callable[[], Tensor] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Within, the ranks of a group run the model equally often. Where one fails it doesn't wait for
    the others: torchrun ends them."""
    spread = model.spread
    assert spread.together is None, "a model is in step already"
    spread.together = group
    try:
        yield
        while group is not None and (doing := spread.tell(NOTHING)):
            spread.together = None
            with torch.set_grad_enabled(doing == GRADIENTS):
                run_on_nothing(model, nothing)
            spread.together = group
    finally:
        spread.together = None


def run_on_nothing(model: nn.Module, nothing: Callable[[], Tensor] | None) -> None:
    """Forward and, where gradients are on, backward, with a loss that counts 0."""
    if nothing is not None:
        loss = nothing()
        if torch.is_grad_enabled():
            (0 * loss.sum()).backward()
        return
    tokens_BT = torch.zeros(1, 3, dtype=torch.long, device=model.spread.device)
    positions_BT = torch.arange(3, device=tokens_BT.device)[None]
    if not torch.is_grad_enabled():
        model.hidden(tokens_BT[:, :1], positions_BT[:, :1])
        return
    logprobs_N, *_ = model.logprobs(tokens_BT, positions_BT, positions_BT == 1)
    (0 * logprobs_N.sum()).backward()


# ---- training and state --------------------------------------------------------------------------


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[Tensor], limit: float) -> float:
    """nn.utils.clip_grad_norm_, for parameters that are spread in different ways too; the norm
    before clipping. Each rank adds the squares of its parts; of what all have whole, the same on
    each, the first does."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    own = [g for g in grads if isinstance(g, DTensor) or parallel.is_main()]
    norms = [torch.linalg.vector_norm(parallel.local(g), dtype=torch.float64) for g in own]
    norm = parallel.all_sum(float(sum(norm**2 for norm in norms))) ** 0.5
    if not norm < limit:  # NaN too, as torch does
        for grad in grads:
            parallel.local(grad).mul_(limit / (norm + 1e-6))
    return norm


def twin(model: Transformer) -> Transformer:
    """A copy of a model, spread in the same way."""
    spread = getattr(model, "spread", None)
    if spread is None:
        return copy.deepcopy(model)
    with torch.device("meta"):
        other = Transformer(model.config).to(model.lm_head.weight.dtype)
    shard(other, spread.ep, spread.device, tp=spread.tp)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, p in model.named_parameters():
        state[name] = nn.Parameter(state[name], p.requires_grad)
    if model.config.tie_word_embeddings:  # the same Parameter under both names
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    other.load_state_dict(state, assign=True)
    other.recompute = model.recompute
    return other


@torch.no_grad()
def begin(optimizer: torch.optim.Optimizer) -> None:
    """Give a new optimizer of a spread model its states, which it otherwise has after its first
    step: a checkpoint is read into them, each rank its part."""
    spread = [p for group in optimizer.param_groups for p in group["params"]]
    spread = [p for p in spread if isinstance(p, DTensor) and p not in optimizer.state]
    if not spread:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in spread:
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype or torch.float32)
    optimizer.step()
    optimizer.zero_grad()
    for p in spread:
        optimizer.state[p]["step"] *= 0
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
