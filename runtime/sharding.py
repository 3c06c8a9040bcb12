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
from runtime import parallel
from runtime.flags import UserError

NOTHING, PASS, GRADIENTS = range(3)  # what a rank does with the model


@dataclass
class Spread:
    """What `shard` leaves on a model."""

    device: str
    world: DeviceMesh
    grid: DeviceMesh  # dp, ep
    together: dist.ProcessGroup | None = None  # who runs the model in step now

    @property
    def ep(self) -> int:
        return self.grid["ep"].size()

    def tell(self, doing: int) -> int:
        """The most that a rank does: nothing any more, a pass without gradients, one with them."""
        most = torch.tensor(doing)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.together)
        return int(most)


@cache
def meshes(device: str, ep: int) -> tuple[DeviceMesh, DeviceMesh]:
    world = parallel.world_size()
    grid = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("dp", "ep"))
    return init_device_mesh(device, (world,)), grid


def shard(model: Transformer, ep: int = 1, device: torch.device | str = "cpu") -> Transformer:
    """Spread a model, whose weights may still be on the meta device, in the dtype that they will
    have; on one process it stays as it is. Optimizers are made afterwards.

    ep: how many ranks share the experts out; 0: nothing is spread. Raises UserError where ranks,
    experts and ep don't fit.
    """
    check_grid(model.config, ep)
    if parallel.world_size() == 1 or ep == 0:
        return model
    spread = Spread(torch.device(device).type, *meshes(torch.device(device).type, ep))
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


def check_grid(config: Config, ep: int) -> None:
    """Raises UserError where the model can't be spread so over these processes."""
    world, experts = parallel.world_size(), config.n_routed_experts
    if ep < 0 or ep > 0 and world % ep:
        raise UserError(f"--ep {ep}: must divide the number of processes, {world}")
    if ep > 1 and (experts is None or experts % ep):
        has = "is dense" if experts is None else f"has {experts} experts"
        raise UserError(f"--ep {ep}: must divide the number of experts, and the model {has}")
    sizes = config.moe_intermediate_size, config.hidden_size
    if ep > 1 and any(size % (world // ep) for size in sizes):
        raise UserError(
            f"--ep {ep} leaves {world // ep} processes to cut each expert, whose sizes"
            f" {sizes[0]} and {sizes[1]} can't be divided by that; give another --ep"
        )


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
def in_step(model: Transformer, mtp: bool = False) -> Iterator[None]:
    """Within, each rank runs the model as often as it likes, each time forward and, where gradients
    are on, backward. A rank that has finished runs it on nothing until all have.

    mtp: each time with the multi-token prediction.
    """
    spread = getattr(model, "spread", None)
    if spread is None:
        yield
        return
    with together(model, spread.world.get_group(), mtp):
        yield
    for piece in pieces(model):
        piece.reshard()


@contextmanager
def gathered(model: Transformer) -> Iterator[None]:
    """Within, each rank holds all weights but those of other ranks' experts, and runs the model
    without gradients as often as it likes: for sampling. Without expert parallelism no rank waits
    for another."""
    spread = getattr(model, "spread", None)
    if spread is None:
        yield
        return
    root, *inner = pieces(model)
    for piece in (root, *inner):
        piece.unshard()
        piece.set_reshard_after_forward(False, recurse=False)
    try:
        group = spread.grid["ep"].get_group() if spread.ep > 1 else None
        with together(model, group):
            yield
    finally:
        for piece in inner:
            piece.set_reshard_after_forward(True, recurse=False)
        for piece in (root, *inner):
            piece.reshard()


def repeatable(model: nn.Module) -> bool:
    """Whether a step of the sampler does the same each time and may be recorded: not where tokens
    travel, for their number changes."""
    spread = getattr(model, "spread", None)
    return spread is None or spread.ep == 1


@contextmanager
def together(
    model: Transformer, group: dist.ProcessGroup | None, mtp: bool = False
) -> Iterator[None]:
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
                run_on_nothing(model, mtp)
            spread.together = group
    finally:
        spread.together = None


def run_on_nothing(model: Transformer, mtp: bool) -> None:
    """Forward and backward over a token whose loss counts 0."""
    tokens_BT = torch.zeros(1, 3, dtype=torch.long, device=model.spread.device)
    positions_BT = torch.arange(3, device=tokens_BT.device)[None]
    if not torch.is_grad_enabled():
        model.hidden(tokens_BT[:, :1], positions_BT[:, :1])
        return
    logprobs_N, _, hidden_BTD, _ = model.logprobs(tokens_BT, positions_BT, positions_BT == 1)
    loss = 0 * logprobs_N.sum()
    if mtp:
        loss = loss + 0 * model.predict_second_next(hidden_BTD, tokens_BT, positions_BT)[0].sum()
    loss.backward()


# ---- training and state --------------------------------------------------------------------------


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[Tensor], limit: float) -> float:
    """nn.utils.clip_grad_norm_, for parameters that are spread in different ways too; the norm
    before clipping. Each rank adds the squares of its parts."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    assert all(isinstance(grad, DTensor) for grad in grads), "some gradients are spread, some not"
    grads = [grad.to_local() for grad in grads]
    squares = sum(torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2 for grad in grads)
    norm = parallel.all_sum(float(squares)) ** 0.5
    if not norm < limit:  # NaN too, as torch does
        for grad in grads:
            grad.mul_(limit / (norm + 1e-6))
    return norm


def twin(model: Transformer) -> Transformer:
    """A copy of a model, spread in the same way."""
    spread = getattr(model, "spread", None)
    if spread is None:
        return copy.deepcopy(model)
    with torch.device("meta"):
        other = Transformer(model.config).to(model.lm_head.weight.dtype)
    shard(other, spread.ep, spread.device)
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
