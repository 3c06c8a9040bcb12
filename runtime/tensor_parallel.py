"""A dense model cut across its width, for sampling: a rank has some of the heads and some of the
MLP's numbers in every layer, and the ranks of a group write the same tokens in step (1909.08053).

    columns   q, k, v, gate, up, head    a rank has some of the rows of W, and makes some numbers
    rows      o, down, embedding         it has the columns for these numbers: its output is a part
                                         of a sum over the ranks, which all of them get

A token costs two sums over ranks in each layer, one in the embedding, and the logits gathered once;
no weight travels. Of 70B parameters, 140 GB in bf16, each of eight ranks has 18 GB, and its cache
is that of its heads.

A weight is a DTensor, which says what part of it a rank reads from a file or takes from a model
that is spread for training (sharding.py); the products are of the parts themselves. To leave all to
parallelize_module is shorter, with ColwiseParallel and RowwiseParallel for the same weights. But
there each product is an operator on DTensors, and to start those a layer takes 5.8 ms of a CPU
core, against 1.3 ms here and 1.1 ms on one process.

It is no part of the method. Read next: checkpoint.py.

    torchrun --nproc_per_node=8 sample.py --model Llama-3.3-70B-Instruct --tp 8
"""

import math
from collections.abc import Sequence
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from model import Config, Transformer
from runtime import parallel
from runtime.flags import UserError


@cache
def mesh_of(device: str, tp: int) -> DeviceMesh:
    """The group that this rank is in; its ranks follow each other, as the GPUs of a node do."""
    shape = (parallel.world_size() // tp, tp)
    return init_device_mesh(device, shape, mesh_dim_names=("groups", "tp"))["tp"]


def check_tp(config: Config, tp: int) -> None:
    """Raises UserError where the model can't be cut so over these processes."""
    if tp in (0, 1):
        return
    if config.is_moe or config.kv_lora_rank is not None:
        raise UserError(
            f"--tp {tp}: cuts dense models (Qwen, Llama), and this is a {config.model_type}, whose"
            " experts --ep shares out; leave --tp at 0"
        )
    heads = config.num_attention_heads
    sizes = {
        "number of processes": parallel.world_size(),
        "number of heads": heads,
        "number of key-value heads": config.num_key_value_heads or heads,
        "intermediate size": config.intermediate_size,
    }
    common = math.gcd(*sizes.values())
    for name, size in sizes.items():
        if tp < 0 or size % tp:
            fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise UserError(f"--tp {tp}: must divide the {name}, {size}; here it can be {fit}")


def cut_across(model: Transformer, tp: int, device: str) -> None:
    """Leave each rank its part of a dense model, whose weights may still be on the meta device."""
    mesh = mesh_of(device, tp)
    group, inner, head = mesh.get_group(), model.model, model.lm_head
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj,
                       mlp.up_proj):  # fmt: skip
            cut_weights(linear, mesh, Shard(0))
            linear.forward = partial(columns, linear)
        for linear in (attention.o_proj, mlp.down_proj):
            cut_weights(linear, mesh, Shard(1))
            linear.forward = partial(rows, linear, group)
    cut_weights(inner.embed_tokens, mesh, Shard(0))
    if model.config.tie_word_embeddings:
        head.weight = inner.embed_tokens.weight
    else:
        cut_weights(head, mesh, Shard(0))
    inner.embed_tokens.forward = partial(look_up, inner.embed_tokens, group)
    head.forward = partial(gathered_columns, head, group)
    model.cache_width //= tp
    model.group = group


def cut_weights(module: nn.Module, mesh: DeviceMesh, way: Shard) -> None:
    """A bias goes with the columns; that of rows is added once, to the sum."""
    for name, p in list(module.named_parameters()):
        if p.dim() > way.dim:
            part = distribute_tensor(p.detach(), mesh, [way])
            module.register_parameter(name, nn.Parameter(part, p.requires_grad))


# ---- the products --------------------------------------------------------------------------------


def columns(linear: nn.Linear, x: Tensor) -> Tensor:
    bias = linear.bias if linear.bias is None else parallel.local(linear.bias)
    return F.linear(x, parallel.local(linear.weight), bias)


def rows(linear: nn.Linear, group: dist.ProcessGroup, x: Tensor) -> Tensor:
    out = F.linear(x, parallel.local(linear.weight))
    dist.all_reduce(out, group=group)
    return out if linear.bias is None else out + linear.bias


def look_up(embedding: nn.Embedding, group: dist.ProcessGroup, tokens_BT: Tensor) -> Tensor:
    weight_vD, ranks = parallel.local(embedding.weight), dist.get_world_size(group)
    own_BT = tokens_BT - dist.get_rank(group) * -(-embedding.num_embeddings // ranks)
    elsewhere_BT = (own_BT < 0) | (own_BT >= len(weight_vD))
    x_BTD = F.embedding(own_BT.masked_fill(elsewhere_BT, 0), weight_vD)
    x_BTD.masked_fill_(elsewhere_BT.unsqueeze(-1), 0)
    dist.all_reduce(x_BTD, group=group)
    return x_BTD


def gathered_columns(head: nn.Linear, group: dist.ProcessGroup, x_BD: Tensor) -> Tensor:
    """The last ranks may have fewer words than the others."""
    ranks, V = dist.get_world_size(group), head.out_features
    part = F.linear(x_BD, parallel.local(head.weight))
    part = F.pad(part, (0, -(-V // ranks) - part.shape[-1]))
    parts = [torch.empty_like(part) for _ in range(ranks)]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, -1)[..., :V]


# ---- writing in step -----------------------------------------------------------------------------


@torch.no_grad()
def part_of(model: Transformer, tp: int, device: str) -> Transformer:
    """This rank's part of a model that is spread in another way: a second model, made of one whole
    tensor after the other."""
    with torch.device("meta"):
        part = Transformer(model.config).to(model.lm_head.weight.dtype)
    cut_across(part, tp, device)
    part.to_empty(device=device).requires_grad_(False)
    if model.config.tie_word_embeddings:
        part.lm_head.weight = part.model.embed_tokens.weight
    spread = model.state_dict()
    for name, p in part.named_parameters():
        parallel.local(p).copy_(parallel.whole(spread[name])[parallel.local_region(p)])
    return part


def asked_together(
    model: Transformer, prompts: Sequence[Sequence[int]], numbers: Sequence[int], settings: tuple
) -> tuple[list[Sequence[int]], list[int], range]:
    """The prompts and numbers of all ranks that write together, and which of them are this one's.
    The settings have to be the same."""
    group = getattr(model, "group", None)
    if group is None:
        return list(prompts), list(numbers), range(len(prompts))
    shares: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(shares, (list(prompts), list(numbers), settings), group=group)
    asked = [share[2] for share in shares]
    assert all(theirs == settings for theirs in asked), f"{asked=}"
    rank = dist.get_rank(group)
    first = sum(len(share[0]) for share in shares[:rank])
    everything = ([each for share in shares for each in share[i]] for i in (0, 1))
    return *everything, range(first, first + len(prompts))


def agreed(model: Transformer, *drawn_B: Tensor) -> tuple[Tensor, ...]:
    """Tokens and log-probs as the first of the ranks that write together has drawn them. Each would
    draw the same, but for a rounding on which no run of a billion tokens should hang."""
    group = getattr(model, "group", None)
    if group is None:
        return drawn_B
    told = torch.stack([each_B.double() for each_B in drawn_B])  # exact for tokens too
    dist.broadcast(told, group=group, group_src=0)
    return tuple(told_B.to(each_B.dtype) for told_B, each_B in zip(told, drawn_B))


def least(model: Transformer, number: int) -> int:
    """The smallest of the numbers of the ranks that write together."""
    group = getattr(model, "group", None)
    if group is None:
        return number
    smallest = torch.tensor(number)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return int(smallest)
