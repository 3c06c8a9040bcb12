"""sft.py: the supervised loss against per-document loops, the schedules, Muon, the small start.

Everything that is compared is in float64; a document alone in its row is what packing is held to.
"""

import copy
import hashlib
import json
import math
import re
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.corpus import BILINGUAL, Corpus, Mix
from data.packing import Packed, pack
from data.tokenizer import Tokenizer
from model import Config, Transformer
from runtime import parallel
from runtime.checkpoint import load_state, save_state
from runtime.run import Run, UserError
from sft import (
    Muon, Objective, check_competence, cosine, documents, expert_load, initialize_small,
    orthogonalize, set_rates, sft_step, small_optimizers, solutions, update,
    warm_constant_decay,
)  # fmt: skip

SMALL = Config.preset(
    "toy", vocab_size=11, hidden_size=12, intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, max_position_embeddings=64,
    num_nextn_predict_layers=1,
)  # fmt: skip
# No clipping of the norm, which would hide a wrong scale.
PLAIN = Objective(max_grad_norm=math.inf)
ALL = replace(PLAIN, mtp_weight=0.3, balance_alpha=0.2, bias_step=0.01)
# One of one token (nothing to learn), of two (no second next), and longer ones.
DOCUMENTS = [[5, 3, 8, 1, 0], [2], [7, 7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 0, 4], [6, 10, 6, 10]]


def make_model(seed: int = 0, config: Config = SMALL) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
    return model


def flat(model: Transformer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def biases(model: Transformer) -> list[Tensor]:
    return [block.mlp.gate.e_score_correction_bias for block in model.model.layers[1:3]]


def gradient(model: Transformer, batch: Packed, mask_BT=None, objective=PLAIN) -> Tensor:
    """What `sft_step` descends along: the parameters' change under SGD with lr 1."""
    moved = copy.deepcopy(model)
    sft_step(moved, [torch.optim.SGD(moved.parameters(), lr=1.0)], batch, mask_BT, objective)
    return flat(model) - flat(moved)


def autograd(loss: Tensor, model: Transformer) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).flatten()
        for g, p in zip(found, model.parameters())
    ])  # fmt: skip


def padded(documents: list[list[int]], width: int = 12) -> Packed:
    """One document a row, written without `pack`."""
    parts = torch.full((3, len(documents), width), -1)
    parts[0] = 0
    for i, document in enumerate(documents):
        parts[0, i, : len(document)] = torch.tensor(document)
        parts[1, i, : len(document)] = torch.arange(len(document))
        parts[2, i, : len(document)] = i
    return Packed(*parts)


def learned(batch: Packed, keep: list[list[bool]]) -> Tensor:
    """A mask over the batch from a list of booleans for each document."""
    mask_BT = torch.zeros_like(batch.tokens_BT, dtype=torch.bool)
    for b, t in (batch.documents_BT >= 0).nonzero().tolist():
        mask_BT[b, t] = keep[batch.documents_BT[b, t]][batch.positions_BT[b, t]]
    return mask_BT


def next_token_loss(model: Transformer, documents=DOCUMENTS, keep=None) -> Tensor:
    """cross_entropy of each document alone, over the number of learned tokens."""
    total, count = 0.0, 0
    for i, document in enumerate(documents):
        logits_TV = model(torch.tensor([document]))[0]
        for t in range(1, len(document)):
            if keep is None or keep[i][t]:
                total = total + F.cross_entropy(logits_TV[t - 1], torch.tensor(document[t]))
                count += 1
    return total / count


def assert_same(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- the loss


def test_the_loss_is_cross_entropy_over_the_learned_tokens():
    model = make_model()
    wanted = next_token_loss(model)
    report = sft_step(model, [], pack(DOCUMENTS, 12), objective=PLAIN)
    assert report.loss == pytest.approx(wanted.item(), abs=1e-12)
    assert report.tokens == sum(len(document) - 1 for document in DOCUMENTS)


def test_the_gradient_is_that_of_cross_entropy_and_its_norm_is_reported():
    model = make_model()
    wanted = autograd(next_token_loss(model), model)
    assert_same(gradient(model, pack(DOCUMENTS, 12)), wanted)
    report = sft_step(model, [], pack(DOCUMENTS, 12), objective=PLAIN)
    assert report.grad_norm == pytest.approx(wanted.norm().item(), rel=1e-9)


@pytest.mark.parametrize("objective", [PLAIN, ALL], ids=["next token", "with MTP and balance"])
def test_packed_documents_make_the_update_of_one_document_a_row(objective):
    model = make_model()
    alone = gradient(model, padded(DOCUMENTS), objective=objective)
    for capacity in (8, 12, 23):
        batch = pack(DOCUMENTS, capacity)
        assert len(batch.tokens_BT) < len(DOCUMENTS)
        assert_same(gradient(model, batch, objective=objective), alone)


@pytest.mark.parametrize("objective", [PLAIN, ALL], ids=["next token", "with MTP and balance"])
def test_micro_batches_make_the_update_of_one_batch(objective):
    batch = pack(DOCUMENTS, 8)
    mask_BT = learned(batch, [[t % 3 != 1 for t in range(8)]] * len(DOCUMENTS))
    results = []
    for rows in (100, 1, 2, 3):
        model = make_model()
        optimizers = [torch.optim.SGD(model.parameters(), lr=1.0)]
        report = sft_step(model, optimizers, batch, mask_BT, replace(objective, rows=rows))
        results.append((flat(model), torch.stack(biases(model)), report))
    for weights, bias, report in results[1:]:
        assert_same(weights, results[0][0])
        assert torch.equal(bias, results[0][1])
        assert report.loss == pytest.approx(results[0][2].loss, abs=1e-12)
        assert report.tokens == results[0][2].tokens
        for load_E, whole_E in zip(report.loads, results[0][2].loads, strict=True):
            assert torch.equal(load_E, whole_E)


def test_only_masked_tokens_are_learned():
    model, batch = make_model(), pack(DOCUMENTS, 12)
    keep = [[t % 2 == 1 for t in range(len(document))] for document in DOCUMENTS]
    wanted = next_token_loss(model, keep=keep)
    found = gradient(model, batch, learned(batch, keep))
    assert_same(found, autograd(wanted, model))
    assert (found - gradient(model, batch)).abs().max() > 1e-3


def test_neither_padding_nor_the_first_of_a_document_is_learned_whatever_the_mask():
    model, batch = make_model(), pack(DOCUMENTS, 12)
    assert (batch.documents_BT < 0).any()
    everything = torch.ones_like(batch.tokens_BT, dtype=torch.bool)
    assert_same(gradient(model, batch, everything), autograd(next_token_loss(model), model))


def test_a_batch_with_nothing_to_learn_changes_nothing():
    model, batch = make_model(), pack(DOCUMENTS, 12)
    nothing = torch.zeros_like(batch.tokens_BT, dtype=torch.bool)
    report = sft_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], batch, nothing, PLAIN)
    assert (report.loss, report.tokens, report.grad_norm) == (0, 0, 0)
    assert torch.equal(flat(model), flat(make_model()))


# --- multi-token prediction (V3 2.2)


def second_token_loss(model: Transformer, documents, keep=None) -> Tensor:
    """Of each document alone: from position t, through the module, the token at t + 2."""
    total, count = torch.zeros(()).double(), 0
    for i, document in enumerate(documents):
        tokens = torch.tensor([document])
        for t in range(1, len(document)):
            count += keep is None or keep[i][t]
        if len(document) < 3:
            continue
        second_1TD, _ = model.predict_second_next(model.hidden(tokens)[0], tokens)
        logits_TV = model.lm_head(second_1TD)[0]
        for t in range(len(document) - 2):
            if keep is None or keep[i][t + 2]:
                total = total + F.cross_entropy(logits_TV[t], tokens[0, t + 2])
    return total / count


@pytest.mark.parametrize("masked", [False, True])
def test_the_mtp_loss_is_that_of_the_token_two_ahead_in_the_same_document(masked):
    model, batch = make_model(), pack(DOCUMENTS, 12)
    keep = [[not masked or t % 2 == 0 for t in range(8)]] * len(DOCUMENTS)
    mask_BT = learned(batch, keep)
    wanted = next_token_loss(model, keep=keep) + 0.3 * second_token_loss(model, DOCUMENTS, keep)
    objective = replace(PLAIN, mtp_weight=0.3)
    assert_same(gradient(model, batch, mask_BT, objective), autograd(wanted, model))
    report = sft_step(model, [], batch, mask_BT, objective)
    assert report.loss == pytest.approx(wanted.item(), abs=1e-12)


def test_documents_of_two_tokens_have_no_second_next_token():
    model, batch = make_model(), pack([[1, 2], [3, 4], [5, 6]], 6)
    assert len(batch.tokens_BT) == 1  # in one row, where the next document's would be at hand
    heavy = replace(PLAIN, mtp_weight=9.0)
    assert_same(gradient(model, batch, None, heavy), gradient(model, batch))


# --- the balance of experts (V3 2.1.2)


def routing_of(model: Transformer, document: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(scores TE, experts TA) of each MoE layer, the document alone."""
    _, routings = model.hidden(torch.tensor([document]))
    return [(routing.scores_BTE[0], routing.experts_BTA[0]) for routing in routings]


def test_eq_17_the_balance_loss_by_hand():
    """alpha sum_i f_i P_i, the mean over documents, added up over layers."""
    model, (E, A) = make_model(), (4, 2)
    total = 0.0
    for document in DOCUMENTS:
        T = len(document)
        for scores_TE, experts_TA in routing_of(model, document):
            for e in range(E):
                f = E / (A * T) * sum(e in experts for experts in experts_TA.tolist())
                P = sum(scores_E[e] / scores_E.sum() for scores_E in scores_TE) / T
                total = total + f * P
    wanted = next_token_loss(model) + 0.2 * total / len(DOCUMENTS)
    objective = replace(PLAIN, balance_alpha=0.2)
    assert_same(gradient(model, pack(DOCUMENTS, 12), None, objective), autograd(wanted, model))
    report = sft_step(model, [], pack(DOCUMENTS, 12), None, objective)
    assert report.loss == pytest.approx(wanted.item(), abs=1e-12)


@pytest.mark.parametrize(
    "batch", [padded(DOCUMENTS, 40), pack(DOCUMENTS, 8)], ids=["padded", "packed"]
)
def test_each_bias_moves_one_step_against_the_load_of_the_real_tokens(batch):
    model = make_model()
    loads = torch.zeros(2, 4)
    for document in DOCUMENTS:
        for layer, (_, experts_TA) in enumerate(routing_of(model, document)):
            for e in experts_TA.flatten().tolist():
                loads[layer, e] += 1
    assert loads[0].min() < loads[0].max()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0)]
    report = sft_step(model, optimizers, batch, objective=replace(PLAIN, bias_step=0.01))
    mean = sum(map(len, DOCUMENTS)) * 2 / 4
    for found_E, load_E, bias_E in zip(report.loads, loads, biases(model), strict=True):
        assert found_E.tolist() == load_E.tolist()
        wanted = [0.01 * ((load < mean) - (load > mean)) for load in load_E.tolist()]
        assert bias_E.tolist() == pytest.approx(wanted, abs=1e-15)


def test_the_bias_rests_where_its_step_is_zero():
    model = make_model()
    sft_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], pack(DOCUMENTS, 12))
    assert all((bias_E == 0).all() for bias_E in biases(model))


def test_the_load_leaves_padding_out():
    model, batch = make_model(), padded(DOCUMENTS, 40)
    _, routings = model.hidden(batch.tokens_BT, batch.positions_BT)
    for routing in routings:
        assert expert_load(routing, batch.positions_BT).sum() == 2 * sum(map(len, DOCUMENTS))


# --- one update


def test_a_gradient_that_is_no_number_leaves_the_weights_and_the_optimizer():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for bad in (math.nan, math.inf):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.lm_head.weight.grad[0, 0] = bad
        before = flat(model).clone()
        assert not math.isfinite(update(model, [optimizer], 1.0))
        assert torch.equal(flat(model), before)
        assert not optimizer.state
        assert all(p.grad is None for p in model.parameters())  # nor does it stay for the next


def test_a_loss_that_is_no_number_leaves_the_routers_biases_too():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    report = sft_step(model, [], pack(DOCUMENTS, 12), objective=replace(PLAIN, bias_step=0.01))
    assert math.isnan(report.loss)
    assert all((bias_E == 0).all() for bias_E in biases(model))


def test_the_norm_is_clipped_over_all_parameters_and_reported_as_it_was():
    model = nn.ModuleDict(dict(a=nn.Linear(1, 1, bias=False), b=nn.Linear(1, 1, bias=False)))
    for limit, scale in ((1.0, 0.2), (10.0, 1.0)):  # clipped, and not
        start = [p.detach().clone() for p in model.parameters()]
        for p, g in zip(model.parameters(), (3.0, 4.0)):
            p.grad = torch.full_like(p, g)
        optimizers = [torch.optim.SGD([p], lr=1.0) for p in model.parameters()]
        assert update(model, optimizers, limit) == pytest.approx(5.0)
        moved = [(s - p).item() for s, p in zip(start, model.parameters())]
        assert moved == pytest.approx([3 * scale, 4 * scale], rel=1e-5)


# --- schedules


def test_the_cosine_at_known_points():
    rates = [cosine(step, 110, 5e-5, 5e-6, warmup=10) for step in range(112)]
    assert rates[0] == pytest.approx(5e-6)  # the first update of ten learns a tenth
    assert rates[9] == rates[10] == pytest.approx(5e-5)
    assert rates[60] == pytest.approx((5e-5 + 5e-6) / 2)  # half way along the cosine
    assert rates[35] == pytest.approx(5e-6 + 4.5e-5 * (1 + math.sqrt(0.5)) / 2)  # a quarter
    assert rates[110] == rates[111] == pytest.approx(5e-6)
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111]))
    assert cosine(0, 100, 1.0, 0.1) == 1.0  # without warm-up it starts at the peak


def test_warm_constant_decay_at_known_points():
    shares = [warm_constant_decay(step, 100, warmup=20, decay=0.4) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 20)
    assert shares[9] == pytest.approx(1 / 2)
    assert shares[19:61] == [1.0] * 42
    assert shares[80] == pytest.approx(1 / 2)
    assert shares[99] == pytest.approx(1 / 40)  # the last update still learns
    assert shares[100] == 0


def two_optimizers() -> list[torch.optim.Optimizer]:
    a, b, c = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    groups = [{"params": [b], "lr": 0.5}, {"params": [c]}]
    return [Muon([a], lr=0.02), torch.optim.AdamW(groups, lr=0.1)]


def rates(optimizers: list[torch.optim.Optimizer]) -> list[float]:
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def test_set_rates_takes_a_share_of_each_groups_peak_however_often():
    optimizers = two_optimizers()
    for share in (0.5, 0.5, 0.1, 1.0, 0.5):
        set_rates(optimizers, share)
        assert rates(optimizers) == pytest.approx([0.02 * share, 0.5 * share, 0.1 * share])


@pytest.mark.parametrize("through_a_file", [False, True])
def test_the_peak_survives_a_resume_in_the_middle_of_the_warm_up(tmp_path, through_a_file):
    optimizers = two_optimizers()
    set_rates(optimizers, 0.25)
    saved = dict(enumerate(copy.deepcopy([each.state_dict() for each in optimizers])))
    resumed = two_optimizers()
    if through_a_file:
        save_state(tmp_path, 1, saved)
        saved = load_state(tmp_path, 1, dict(enumerate(each.state_dict() for each in resumed)))
    for i, optimizer in enumerate(resumed):
        optimizer.load_state_dict(saved[i])
    assert rates(resumed) == rates(optimizers)
    set_rates(resumed, 1.0)
    assert rates(resumed) == pytest.approx([0.02, 0.5, 0.1])


# --- Muon


def matrices(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 9), (3, 5, 12)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalized_singular_values_are_near_one_in_the_same_directions(shape, scale):
    u, s, vt = torch.linalg.svd(matrices(*shape), full_matrices=False)
    s = torch.linspace(0.1, 1.0, s.shape[-1]).double().expand(s.shape)  # the smallest is a tenth
    found = orthogonalize(scale * (u * s.unsqueeze(-2)) @ vt)
    values = torch.linalg.svdvals(found)
    # The quintic's fixed band: these coefficients trade exactness for speed (Jordan et al.).
    assert 0.67 < values.min() and values.max() < 1.21
    diagonal = u.mT @ found @ vt.mT
    off = diagonal - torch.diag_embed(torch.diagonal(diagonal, dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3  # 1e-7 in the norm's denominator, at most


def test_a_tall_matrix_is_treated_as_the_transpose_of_a_wide_one():
    wide = matrices(4, 9)
    assert_same(orthogonalize(wide.T), orthogonalize(wide).T)


def test_a_zero_gradient_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def muon_by_loops(p: Tensor, grads: list[Tensor], lr: float, momentum: float) -> Tensor:
    """One matrix: Nesterov momentum, five Newton-Schulz iterations, a scale by its shape."""
    p, m = p.clone(), torch.zeros_like(p)
    for grad in grads:
        m = momentum * m + (1 - momentum) * grad
        look = momentum * m + (1 - momentum) * grad
        x = look / look.pow(2).sum().sqrt()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        p = p - lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * x
    return p


def run_muon(parameters: list[nn.Parameter], grads: list[list[Tensor]], **options) -> Muon:
    optimizer = Muon(parameters, **options)
    for step_grads in grads:
        for p, g in zip(parameters, step_grads):
            p.grad = g
        optimizer.step()
    return optimizer


def test_muon_matches_a_loop_for_one_matrix_at_a_time():
    """Among them two of one shape, which are treated in one product, a tall one, and a stack of
    experts, of which each is a matrix of its own."""
    shapes = [(4, 6), (4, 6), (9, 5), (3, 4, 6), (2, 9, 5)]
    starts = [matrices(*shape, seed=i) for i, shape in enumerate(shapes)]
    parameters = [nn.Parameter(start.clone()) for start in starts]
    grads = [
        [10.0 ** (i - 2) * matrices(*shape, seed=100 * t + i) for i, shape in enumerate(shapes)]
        for t in range(4)
    ]
    run_muon(parameters, grads, lr=0.1, momentum=0.8)
    for i, (p, start) in enumerate(zip(parameters, starts)):
        rows, columns = start.shape[-2:]
        for e, matrix in enumerate(start.view(-1, rows, columns)):
            of_it = [grad[i].view(-1, rows, columns)[e] for grad in grads]
            wanted = muon_by_loops(matrix, of_it, 0.1, 0.8)
            assert_same(p.detach().view(-1, rows, columns)[e], wanted, atol=1e-5)


def test_the_experts_of_a_stack_do_not_see_each_other():
    grads = [matrices(3, 4, 6, seed=t) for t in range(3)]
    loud = [grad.clone() for grad in grads]
    for grad in loud:
        grad[0] *= 1e6
    stacks = []
    for each in (grads, loud):
        stack = nn.Parameter(matrices(3, 4, 6, seed=9))
        run_muon([stack], [[grad] for grad in each])
        stacks.append(stack.detach())
    assert_same(stacks[0][1:], stacks[1][1:])


def test_muon_resumes_bit_for_bit():
    grads = [[matrices(4, 6, seed=t), matrices(2, 9, 5, seed=50 + t)] for t in range(6)]

    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(matrices(4, 6)), nn.Parameter(matrices(2, 9, 5))]

    through = fresh()
    run_muon(through, grads)
    first = fresh()
    saved = copy.deepcopy(run_muon(first, grads[:3]).state_dict())
    second = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = Muon(second)
    optimizer.load_state_dict(saved)
    for step_grads in grads[3:]:
        for p, g in zip(second, step_grads):
            p.grad = g
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(through, second))


def test_muon_leaves_a_parameter_without_gradient_alone():
    used, unused = nn.Parameter(matrices(3, 3)), nn.Parameter(matrices(3, 3))
    used.grad = matrices(3, 3, seed=1)
    Muon([used, unused]).step()
    assert torch.equal(unused, matrices(3, 3)) and not torch.equal(used, matrices(3, 3))


def test_each_parameter_has_one_optimizer_and_muon_gets_only_the_blocks_matrices():
    model = make_model()
    muon, adam = small_optimizers(model, muon_lr=0.02, adam_lr=0.01)
    assert (muon.param_groups[0]["lr"], adam.param_groups[0]["lr"]) == (0.02, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon, by_adam = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (muon, adam))
    assert by_muon | by_adam == set(names.values()) and not by_muon & by_adam
    assert "model.layers.1.mlp.experts.down_proj" in by_muon
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight",
            "model.norm.weight"} <= by_adam  # fmt: skip
    assert all(p.dim() > 1 for p in muon.param_groups[0]["params"])


# --- the small start


def test_each_block_begins_as_the_identity_and_every_token_as_likely():
    model = Transformer(SMALL)
    initialize_small(model, seed=3)
    tokens = torch.tensor([[1, 5, 2, 9]])
    hidden_BTD, _ = model.hidden(tokens)
    assert torch.equal(hidden_BTD, model.model.norm(model.model.embed_tokens(tokens)))
    assert torch.equal(model(tokens), torch.zeros(1, 4, 11))


def test_the_start_depends_on_the_seed_and_on_nothing_else():
    weights = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(noise)
        model = Transformer(SMALL)
        initialize_small(model, seed)
        weights.append(flat(model))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_from_the_small_start_a_pattern_is_learned():
    model = Transformer(SMALL)
    initialize_small(model, seed=0)
    optimizers = small_optimizers(model, muon_lr=0.02, adam_lr=0.02)
    batch = pack([[(start + i) % 11 for i in range(9)] for start in range(11)], 18)
    losses = [sft_step(model, optimizers, batch).loss for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(11), abs=1e-5)
    assert losses[-1] < 0.3


# --- the toy's base: its documents, and is it competent?


def test_a_step_takes_the_documents_that_fit_its_tokens():
    tokenizer, corpus = Tokenizer.toy(), Corpus(seed=0, steps=10)
    for step in (0, 5, 9):
        taken = documents(corpus, tokenizer, step, 500)
        stream = corpus.documents(step)
        for document in taken:
            assert tokenizer.decode(document) == next(stream) + "<|end_of_text|>"
        left = 500 - sum(map(len, taken))
        assert 0 <= left < len(tokenizer.encode(next(stream))) + 1
    assert documents(corpus, tokenizer, 0, 500) != documents(corpus, tokenizer, 1, 500)


EXAM = re.compile(
    r"User: (compute|计算) (\d(?: [a-j] [+*-]\d)+) \? Assistant: <think> (first|首先) (\d) (.+)"
)


@pytest.mark.parametrize("mix", [Mix(), BILINGUAL], ids=["English", "bilingual"])
def test_a_base_is_examined_on_right_solutions_of_held_out_problems_in_its_languages(mix):
    words = {"compute": ("first", "then"), "计算": ("首先", "再")}
    texts, asked, lengths = solutions(0, mix), Counter(), set()
    for text in texts:
        question, listing, first, value, work = EXAM.fullmatch(text).groups()
        assert hashlib.sha256(listing.encode()).digest()[0] < 26
        start, *rest = listing.split()
        assert first == words[question][0] and value == start
        between = f" {words[question][1]} " if mix.prose else r"(?<== \d) "
        steps = re.split(between, work)
        assert len(steps) == len(rest) // 2
        for step, label, operation in zip(steps, rest[::2], rest[1::2]):
            value = str(eval(f"({value} {operation}) % 10"))
            assert step == f"{label} {operation} = {value}"
        asked[question] += 1
        lengths.add(len(steps))
    assert 150 < len(texts) < 250  # one in ten of 2,000
    assert lengths == set(range(2, mix.longest + 1))
    assert asked["计算"] / len(texts) == pytest.approx(mix.chinese, abs=0.1)


class Parrot(nn.Module):
    """In place of a base: for each token of the text that it is shown it predicts the next one, or
    what `spoil(this token, the next one)` says instead."""

    def __init__(self, tokenizer: Tokenizer, spoil):
        super().__init__()
        self.lm_head, self.tokenizer, self.spoil = nn.Linear(1, 1), tokenizer, spoil

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, self.tokenizer.vocab_size)
        decode, encode = self.tokenizer.decode, self.tokenizer.encode
        for b, row in enumerate(tokens_BT.tolist()):
            for t, pair in enumerate(zip(row, row[1:])):
                wrong = self.spoil(*(decode([token]) for token in pair))
                logits_BTV[b, t, encode(wrong)[0] if wrong else pair[1]] = 1.0
        return logits_BTV


SPOILS = {
    "nothing": lambda here, after: None,
    "the labels": lambda here, after: " x" if re.fullmatch(r" [a-t]", after) else None,
    "the values": lambda here, after: " x" if here == " =" else None,
    "the operations": lambda here, after: " x" if re.fullmatch(r" [+*-]\d", after) else None,
    "the additions": lambda here, after: " x" if re.fullmatch(r" [+]\d", after) else None,
}


@pytest.fixture
def signals_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_as_they_were")
@pytest.mark.parametrize("mix", [Mix(), BILINGUAL], ids=["English", "bilingual"])
@pytest.mark.parametrize("spoilt, share", [
    ("nothing", 1.0), ("the labels", 1.0), ("the values", 0.0), ("the operations", 0.0),
    ("the additions", 0.75),
])  # fmt: skip
def test_a_base_is_competent_if_it_gets_both_the_operation_and_the_value(
    tmp_path, mix, spoilt, share
):
    run = Run(tmp_path / "run", Objective())
    tokenizer = Tokenizer.toy(bilingual=mix is BILINGUAL)
    model = Parrot(tokenizer, SPOILS[spoilt])
    if share == 1.0:
        check_competence(model, tokenizer, run, seed=0, force=False, mix=mix)
    else:
        with pytest.raises(UserError, match="--force"):
            check_competence(model, tokenizer, run, seed=0, force=False, mix=mix)
        check_competence(model, tokenizer, run, seed=0, force=True, mix=mix)
    [line] = [json.loads(row) for row in run.metrics.read_text().splitlines()]
    assert line["steps_right"] == pytest.approx(share, abs=0.05)


# --- several processes


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    for capacity in (8, 100):  # several rows, of unlike lengths; one row: rank 1 has none
        weights, report = on_this_rank(capacity)
        torch.save((weights, report.loss, report.tokens), f"{folder}/{capacity} {rank}.pt")
    dist.destroy_process_group()


def on_this_rank(capacity: int):
    model = make_model()
    batch = parallel.shard(pack(DOCUMENTS, capacity))
    report = sft_step(model, [torch.optim.SGD(model.parameters(), lr=1.0)], batch, objective=ALL)
    return torch.cat([flat(model), *biases(model)]), report


def test_two_processes_make_the_update_of_one(tmp_path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    for capacity in (8, 100):
        weights, report = on_this_rank(capacity)
        for rank in range(2):
            found_weights, loss, tokens = torch.load(tmp_path / f"{capacity} {rank}.pt")
            assert_same(found_weights, weights)
            assert (loss, tokens) == (pytest.approx(report.loss, abs=1e-12), report.tokens)
