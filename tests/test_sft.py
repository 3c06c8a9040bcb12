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
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import sft
from data.corpus import BILINGUAL, Corpus, Mix
from data.packing import Packed, pack
from data.problems import Problem
from data.tokenizer import Tokenizer
from model import Config, Transformer
from runtime import launch as launching
from runtime import parallel
from runtime.checkpoint import load_state, save_state
from runtime.run import Diverged, Run, UserError
from sample import Output
from sft import (
    Muon, Objective, Readable, Report, Tuning, check_competence, collect, cosine, count_verdicts,
    documents, ending_logprobs, example, expert_load, finetune, initialize_small, judge_answers,
    learn_answers, learn_rows, orthogonalize, read_rows, set_rates, sft_step, small_optimizers,
    solutions, update, verdict, warm_constant_decay, write_rows,
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
def test_v3_eq_23_to_25_mtp_loss_is_of_the_token_two_ahead_in_the_same_document(masked):
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


def test_v3_eq_17_the_balance_loss_by_hand():
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


# --- fine-tuning (R1 2.3.1, 2.3.3)

WORDS = Tokenizer.toy(bilingual=True)
DENSE = Config.preset(
    "toy-student", vocab_size=WORDS.vocab_size, hidden_size=16, intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
)  # fmt: skip


def talker(seed: int = 0) -> Transformer:
    """A model that has the toy's words."""
    return make_model(seed, DENSE)


@pytest.fixture
def run(tmp_path, signals_as_they_were) -> Run:
    yield Run(tmp_path / "run", Objective())
    launching.stop.signal = 0


def logged(run: Run, phase: str) -> list[dict]:
    found = [json.loads(row) for row in run.metrics.read_text().splitlines()]
    return [line for line in found if line["phase"] == phase]


class Learner:
    """For `finetune`: remembers each batch and its learning rate, and makes an update."""

    def __init__(self, model: nn.Module, fails_at: int = 0):
        self.model, self.fails_at, self.batches, self.rates = model, fails_at, [], []

    def __call__(self, optimizers, batch) -> Report:
        self.batches.append(list(batch))
        self.rates.append(optimizers[0].param_groups[0]["lr"])
        if len(self.batches) == self.fails_at:
            raise KeyboardInterrupt  # what is not in a checkpoint is lost
        loss = sum((self.model.weight - example).square().sum() for example in batch)
        loss.backward()
        return Report(float(loss.detach()), len(batch), update(self.model, optimizers, 1.0))


def line_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False).double()


TUNING = Tuning(epochs=3, batch=4, lr=0.1, final_lr=0.01, save_every=2)


def test_each_epoch_sees_every_example_once_in_an_order_of_its_own(run):
    learner = Learner(line_model())
    assert finetune(learner.model, range(10), learner, TUNING, run, "dev1", seed=0)
    assert [len(batch) for batch in learner.batches] == [4, 4, 2] * 3
    epochs = [sum(learner.batches[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3 and list(range(10)) not in epochs
    others = []
    for phase, seed in (("dev1 ", 0), ("dev3", 0), ("dev3", 1)):
        other = Learner(line_model())
        assert finetune(other.model, range(10), other, TUNING, run, phase, seed=seed)
        others.append(other.batches)
    assert len(set(map(str, [learner.batches, *others]))) == 4


def test_the_learning_rate_follows_a_cosine_over_all_epochs(run):
    learner = Learner(line_model())
    assert finetune(learner.model, range(10), learner, TUNING, run, "dev1", seed=0)
    wanted = [0.01 + 0.09 * (1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    assert learner.rates == pytest.approx(wanted, rel=1e-9)
    warm = Learner(line_model())
    tuning = replace(TUNING, warmup=3)
    assert finetune(warm.model, range(10), warm, tuning, run, "warm", seed=0)
    rest = [0.01 + 0.09 * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert warm.rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, *rest], rel=1e-9)


@pytest.mark.parametrize("fails_at, saved", [(2, 1), (5, 4), (6, 5), (9, 8)])
def test_a_fine_tuning_that_was_killed_goes_on_to_the_same_weights(tmp_path, run, fails_at, saved):
    whole = Learner(line_model())
    assert finetune(whole.model, range(10), whole, TUNING, run, "dev1", seed=0)
    again = Run(tmp_path / "again", Objective())
    killed = Learner(line_model(), fails_at)
    with pytest.raises(KeyboardInterrupt):
        finetune(killed.model, range(10), killed, TUNING, again, "dev1", seed=0)
    rest = Learner(nn.Linear(3, 1, bias=False).double())  # whose weights are read
    with torch.no_grad():
        rest.model.weight.copy_(line_model().weight)
    assert finetune(rest.model, range(10), rest, TUNING, again, "dev1", seed=0)
    assert rest.batches == whole.batches[saved:]
    assert torch.equal(rest.model.weight, whole.model.weight)
    assert [line["loss"] for line in logged(again, "dev1")] == [
        line["loss"] for line in logged(run, "dev1")
    ]


def test_ctrl_c_saves_the_update_and_the_next_call_goes_on_in_the_epoch(tmp_path, run):
    whole = Learner(line_model())
    assert finetune(whole.model, range(10), whole, TUNING, run, "dev1", seed=0)
    again = Run(tmp_path / "again", Objective())
    stopped = Learner(line_model())

    def learn(*args) -> Report:
        launching.stop.signal = signal.SIGINT if len(stopped.batches) == 4 else 0
        return stopped(*args)

    assert not finetune(stopped.model, range(10), learn, TUNING, again, "dev1", seed=0)
    launching.stop.signal = 0
    rest = Learner(line_model())
    assert finetune(rest.model, range(10), rest, TUNING, again, "dev1", seed=0)
    assert stopped.batches + rest.batches == whole.batches and len(stopped.batches) == 5
    assert torch.equal(rest.model.weight, whole.model.weight)


def test_a_fine_tuning_in_parts_is_the_whole_one(tmp_path, run):
    whole = Learner(line_model())
    assert finetune(whole.model, range(10), whole, TUNING, run, "dev1", seed=0)
    again, batches, rates = Run(tmp_path / "again", Objective()), [], []
    for until in (3, 4, 4, 9):
        part = Learner(line_model())
        assert finetune(part.model, range(10), part, TUNING, again, "dev1", seed=0, until=until)
        batches, rates = batches + part.batches, rates + part.rates
        assert len(batches) == until
    assert batches == whole.batches and rates == pytest.approx(whole.rates, rel=1e-12)
    assert torch.equal(part.model.weight, whole.model.weight)


def test_a_loss_that_is_no_number_ends_the_fine_tuning(run):
    model = line_model()

    def learn(optimizers, batch) -> Report:
        return Report(math.nan, 1, 1.0)

    with pytest.raises(Diverged, match="step 1"):
        finetune(model, range(10), learn, TUNING, run, "dev1", seed=0)


PAIRS = [("compute 7 a +5 ?", "<think> first 7 a +5 = 2 . </think> <answer> 2 </answer>"),
         ("hello !", "hello ! how can i help ?"), ("你 是 谁 ？", " 我 是 nano 。 ")]  # fmt: skip


def in_template(template: str) -> Tokenizer:
    tokenizer = copy.copy(WORDS)
    tokenizer.template = template
    return tokenizer


def test_an_example_is_the_prompt_of_the_template_and_the_answer_with_its_stop():
    for template, prompt in (
        ("toy", "User: hello ! Assistant:"),
        ("r1-zero", "User: hello !. Assistant:"),
    ):
        made = example(in_template(template), "hello !", "  hi \n")
        assert WORDS.decode(made.prompt).endswith(prompt)
        assert WORDS.decode(made.answer) == " hi<|end_of_text|>"
        assert made.answer[-1] == WORDS.eos_token_id


@pytest.mark.parametrize("row_tokens, micro_tokens", [(16, 1), (64, 64), (64, 10_000), (1024, 1)])
def test_only_the_answers_are_learned_each_of_their_tokens_alike(row_tokens, micro_tokens):
    """The loss and its gradient, from the logits of each example alone."""
    model = talker()
    batch = [example(WORDS, *pair) for pair in PAIRS]
    total, count = 0.0, 0
    for prompt, answer in batch:
        logits_TV = model(torch.tensor([prompt + answer]))[0]
        for i, token in enumerate(answer):  # the stop token is one of them
            total = total - F.log_softmax(logits_TV[len(prompt) + i - 1], -1)[token]
            count += 1
    wanted = autograd(total / count, model)
    moved = copy.deepcopy(model)
    tuning = Tuning(row_tokens=row_tokens)
    learn = learn_answers(moved, tuning, micro_tokens)
    report = learn([torch.optim.SGD(moved.parameters(), lr=1.0)], batch)
    assert report.loss == pytest.approx(float(total.detach()) / count, abs=1e-12)
    assert report.tokens == count == sum(len(answer) for _, answer in batch)
    assert report.grad_norm == pytest.approx(wanted.norm().item(), rel=1e-9)
    scale = min(1.0, 1 / wanted.norm().item())  # clipped at norm 1
    assert_same(flat(model) - flat(moved), scale * wanted, atol=1e-6)


def test_the_prompt_is_read_though_it_is_not_learned():
    model, losses = talker(), []
    for prompt in ("hello !", "你 好 ！"):
        learn = learn_answers(model, Tuning(row_tokens=64), 64)
        losses.append(learn([], [example(WORDS, prompt, "hi")]).loss)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 100])
def test_rows_make_the_same_update_however_many_pass_at_once(at_once):
    model, rows = line_model(), [torch.randn(3).double() for _ in range(5)]
    wanted = (
        torch.stack([row @ model.weight[0].detach() * row for row in rows]).mean(0) * 2
    )  # of the mean square
    calls = []

    def losses(chosen) -> Tensor:
        calls.append(len(chosen))
        return (torch.stack(list(chosen)) @ moved.weight[0]).square()

    moved = copy.deepcopy(model)
    report = learn_rows(moved, losses, at_once)([torch.optim.SGD(moved.parameters(), lr=1.0)], rows)
    assert sum(calls) == 5 and max(calls) == min(at_once, 5)
    mean = sum(float(row @ model.weight[0].detach()) ** 2 for row in rows) / 5
    assert report.loss == pytest.approx(mean, abs=1e-12)
    assert report.grad_norm == pytest.approx(wanted.norm().item(), rel=1e-9)
    scale = min(1.0, 1 / wanted.norm().item())
    assert_same(model.weight[0] - moved.weight[0], scale * wanted, atol=1e-6)


# --- rejection sampling: what is kept

RIGHT = "<think> first 7 a +5 = 2 . so 2 . </think> <answer> 2 </answer>"
RIGHT_ZH = "<think> 首先 7 a +5 = 2 。 所以 2 。 </think> <answer> 2 </answer>"
EN, ZH = Problem("compute 7 a +5 ?", "2"), Problem("计算 7 a +5 ?", "2", language="zh")
LIMITS = Readable(least_consistency=0.9, longest_paragraph=40, most_repeats=3)


def thought(words: str) -> str:
    return f"<think> {words} </think> <answer> 2 </answer>"


# Ten words, or ten Chinese characters, in a row.
TEN, TEN_ZH = "one two three four five six seven eight nine ten", "一二三四五六七八九十"
VERDICT_CASES = [
    ("kept", EN, RIGHT),
    ("kept", ZH, RIGHT_ZH),
    ("wrong", EN, RIGHT.replace("> 2 <", "> 3 <")),
    ("wrong", EN, "<think> so 2 . </think> 2"),
    ("wrong", EN, "<think> so 2 . </think> \\boxed{2}"),  # right, and not in the format
    ("wrong", EN, RIGHT + " anything else ?"),
    ("wrong", EN, ""),
    ("mixed", EN, RIGHT_ZH),
    ("mixed", ZH, RIGHT),
    ("mixed", EN, thought("so so so so 猜 so so so")),  # seven of eight
    ("kept", EN, thought("so so so so so 猜 so so so so")),  # nine of ten
    ("mixed", ZH, thought("所以 所以 所以 guess 猜")),  # seven of eight characters
    ("kept", ZH, thought("所以 所以 所以 所以 guess 猜")),  # nine of ten
    ("code", EN, thought("so\n```\nx = 2\n```\n")),
    ("code", ZH, thought("所以 ``` 2")),
    ("kept", EN, thought("so ` x ` , `` y ``")),
    ("repeated", EN, thought("\n".join([TEN] * 4))),
    ("kept", EN, thought("\n".join([TEN] * 3))),
    ("repeated", ZH, thought("\n".join([TEN_ZH] * 4))),
    ("kept", ZH, thought("\n".join([TEN_ZH] * 3))),
    ("kept", EN, thought("so so so so so so so so so so so so")),  # the same ten, three times
    ("repeated", EN, thought("so so so so so so so so so so so so so")),
    ("kept", EN, thought("so 2 . " * 3)),
    ("too long", EN, thought(" ".join(f"x{'yz'[i % 2]} {i}" for i in range(20)))),
    ("kept", EN, thought("\n".join(f"xy {i}" for i in range(60)))),  # many short ones
    ("too long", ZH, thought("".join(chr(0x4E00 + i) for i in range(41)))),
    ("kept", ZH, thought("".join(chr(0x4E00 + i) for i in range(34)))),
]  # fmt: skip


@pytest.mark.parametrize("wanted, problem, text", VERDICT_CASES)
def test_what_is_kept_and_why_not(wanted, problem, text):
    assert verdict(problem, text, True, None, LIMITS) == wanted
    assert verdict(problem, text, False, None, LIMITS) == "cut off"  # before all else


def test_r1_2_3_3_filter_counts_the_first_reason_in_the_papers_order():
    """Right, then in one language, then without code, repetition and long paragraphs."""
    faults = {
        "wrong": ("> 2 <", "> 3 <"), "mixed": ("so", "猜猜猜猜"), "code": ("so", "so ```"),
        "repeated": ("so", "so" + " so" * 30),
        "too long": ("so", "so " + " ".join(map(str, range(60)))),
    }  # fmt: skip
    text = thought("so")
    names = list(faults)
    for name in reversed(names):  # ever more faults; the earliest is told
        text = text.replace(*faults[name], 1)
        assert verdict(EN, text, True, None, LIMITS) == name
    assert verdict(EN, text, False, None, LIMITS) == "cut off"


def test_a_judge_decides_in_place_of_the_rule_and_of_nothing_else():
    judged = Problem("compute 7 a +5 ?", "two", "judge")
    assert verdict(judged, RIGHT, True, True, LIMITS) == "kept"
    assert verdict(judged, RIGHT, True, False, LIMITS) == "wrong"
    assert verdict(EN, RIGHT, True, False, LIMITS) == "wrong"  # though the rule says right
    assert verdict(EN, RIGHT.replace("> 2 <", "> 3 <"), True, True, LIMITS) == "kept"
    assert verdict(judged, "2", True, True, LIMITS) == "wrong"  # the format stays
    assert verdict(judged, RIGHT_ZH, True, True, LIMITS) == "mixed"
    assert verdict(judged, RIGHT, False, True, LIMITS) == "cut off"


# --- rejection sampling: the file


class Listing:
    """A source of problems that counts; the k-th is asked again as the (k + 1)-th, if told so."""

    def __init__(self, twice: tuple[int, ...] = (), long: tuple[int, ...] = ()):
        self.twice, self.long = twice, long

    def batch(self, count: int, *, seed: int, step: int) -> list[Problem]:
        numbers = [n - (n in self.twice) for n in range(step * count, (step + 1) * count)]
        return [
            Problem("z " * 300 if n in self.long else f"compute {n} a +{seed % 10} ?", str(n))
            for n in numbers
        ]


def say(prompt: str, row: int) -> tuple[str, str]:
    """What stands in for a model: it tells the prompt's number, now and then not to the end."""
    number = prompt.split()[2]
    return f"{number} {'one' if row % 2 else 'two'}", ("length" if row % 7 == 3 else "stop")


def pretend(monkeypatch, speak=say, calls=None) -> None:
    def generate(model, prompts, *, rows, stop, max_new_tokens, seed, **sampling):
        assert stop == (WORDS.eos_token_id,) and seed == 5
        if calls is not None:
            calls.append(list(rows))
        outputs = []
        for prompt, number in zip(prompts, rows, strict=True):
            text, finish = speak(WORDS.decode(prompt), number)
            tokens = WORDS.encode(text) + [WORDS.eos_token_id] * (finish == "stop")
            outputs.append(Output(tokens, [], finish))
        return outputs

    monkeypatch.setattr(sft, "generate", generate)


def every_third(problems, texts, finished) -> list[str]:
    found = zip(problems, texts, finished)
    return [
        "cut off" if not end else "wrong" if int(problem.answer) % 3 == 0 else "kept"
        for problem, _, end in found
    ]


def gather(run: Run, file, source=None, judge=every_third, questions=10, **changes):
    options = dict(questions=questions, samples=2, judge=judge, temperature=1.0, top_p=1.0,
                   max_new_tokens=8, seed=5, slots=4, chunk=4)  # fmt: skip
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=200))
    source = source or Listing()
    return collect(model, WORDS, source, file, run, **{**options, **changes})


def test_samples_come_in_the_order_of_the_questions_each_with_its_verdict(
    run, tmp_path, monkeypatch
):
    calls: list = []
    pretend(monkeypatch, calls=calls)
    rows = gather(run, tmp_path / "samples.jsonl")
    assert calls == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
    assert len(rows) == 20
    for i, row in enumerate(rows):
        text, finish = say(f"User: compute {i // 2} a", i)
        cut = finish == "length"
        why = "cut off" if cut else "wrong" if (i // 2) % 3 == 0 else "kept"
        assert row == dict(
            question=f"compute {i // 2} a +5 ?", answer=str(i // 2), language="en",
            checker="math", response=text.strip(), verdict=why,
            tokens=len(WORDS.encode(text)) + (not cut),
        )  # fmt: skip
    written = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == rows
    assert logged(run, "sample samples")[0]["step"] == 10


def test_chinese_can_be_read_in_the_file(run, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda prompt, row: (" 所以", "stop"))
    gather(run, tmp_path / "samples.jsonl", questions=1)
    assert "所以" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("kept_bytes", [0.0, 0.2, 0.41, 0.7, 0.9, 0.999, 1.0])
def test_a_half_written_chunk_is_cut_off_and_sampled_again(run, tmp_path, monkeypatch, kept_bytes):
    pretend(monkeypatch)
    wanted = gather(run, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    left = whole[: round(len(whole) * kept_bytes)]
    (tmp_path / "again.jsonl").write_bytes(left)
    calls: list = []
    pretend(monkeypatch, calls=calls)
    assert gather(run, tmp_path / "again.jsonl") == wanted
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    chunks = left.count(b"\n") // 8 if kept_bytes < 1 else 3
    assert calls == [list(range(8)), list(range(8, 16)), list(range(16, 20))][chunks:]


def test_ctrl_c_ends_the_sampling_after_the_chunk(run, tmp_path, monkeypatch):
    def speak(prompt, row):
        launching.stop.signal = signal.SIGINT
        return say(prompt, row)

    pretend(monkeypatch, speak)
    assert gather(run, tmp_path / "samples.jsonl") is None
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 8
    launching.stop.signal = 0
    pretend(monkeypatch)
    assert gather(run, tmp_path / "samples.jsonl") == gather(run, tmp_path / "whole.jsonl")


def test_the_same_answer_to_the_same_question_is_kept_once(run, tmp_path, monkeypatch):
    """Question 3 is question 2 again; every second sample says the same."""
    pretend(monkeypatch, lambda prompt, row: (f"{row % 2}" if row < 8 else f"{row}", "stop"))
    rows = gather(run, tmp_path / "samples.jsonl", Listing(twice=(3,)), questions=5)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == ["wrong", "wrong", "kept", "kept", "kept", "kept", "twice", "twice", "kept",
                        "kept"]  # fmt: skip


def test_the_same_answer_twice_in_a_group_is_kept_once(run, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda prompt, row: ("so 1 ", "stop"))
    rows = gather(run, tmp_path / "samples.jsonl", questions=3, samples=3)
    assert [row["verdict"] for row in rows] == ["wrong"] * 3 + ["kept", "twice", "twice"] * 2


def test_an_answer_that_only_an_unfinished_one_has_said_before_is_kept(run, tmp_path, monkeypatch):
    """They differ in the stop token: the first was cut off in front of it."""
    pretend(monkeypatch, lambda prompt, row: ("so 1", "stop" if row % 2 else "length"))
    rows = gather(run, tmp_path / "samples.jsonl", questions=2)
    assert [row["verdict"] for row in rows[2:]] == ["cut off", "kept"]


def test_the_same_answer_in_another_chunk_is_kept_once_too(run, tmp_path, monkeypatch):
    """A file of questions is walked more than once."""
    pretend(monkeypatch, lambda prompt, row: (f"{row % 2}", "stop"))
    rows = gather(run, tmp_path / "samples.jsonl", Listing(twice=(8,)), questions=9)
    assert [row["question"] for row in rows[14:]] == ["compute 7 a +5 ?"] * 4
    assert [row["verdict"] for row in rows[14:]] == ["kept", "kept", "twice", "twice"]


def test_a_question_that_does_not_fit_is_told_and_not_asked(run, tmp_path, monkeypatch):
    calls: list = []
    pretend(monkeypatch, calls=calls)
    rows = gather(run, tmp_path / "samples.jsonl", Listing(long=(1, 6)))
    assert [i for i, row in enumerate(rows) if row["verdict"] == "no room"] == [2, 3, 12, 13]
    assert all(
        row["response"] == "" and row["tokens"] == 0 for row in rows if row["verdict"] == "no room"
    )
    plain = gather(run, tmp_path / "plain.jsonl")
    for row, other in zip(rows, plain):  # nothing else changes
        assert row == other or row["verdict"] == "no room"
    assert calls[0] == [0, 1, 4, 5, 6, 7]


def test_a_chunk_of_which_nothing_fits_is_told_and_the_next_one_is_asked(
    run, tmp_path, monkeypatch
):
    pretend(monkeypatch)
    rows = gather(run, tmp_path / "samples.jsonl", Listing(long=(4, 5, 6, 7)))
    assert [row["verdict"] == "no room" for row in rows] == [False] * 8 + [True] * 8 + [False] * 4


def test_verdicts_are_counted_once_logged_and_printed(run, capsys):
    rows = [dict(verdict=name, n=n) for n, name in enumerate(
        ["kept", "wrong", "mixed", "kept", "wrong", "wrong", "twice"])]  # fmt: skip
    for _ in range(2):  # a run that goes on counts again
        kept = count_verdicts(rows, "dev1_samples", run)
        assert [row["n"] for row in kept] == [0, 3]
        assert capsys.readouterr().out == (
            "dev1_samples: of 7 outputs kept 2, wrong 3, mixed 1, twice 1\n"
        )
    [line] = logged(run, "filter dev1_samples")
    assert (line["outputs"], line["kept"], line["wrong"]) == (7, 2, 3)
    assert count_verdicts([dict(verdict="wrong")], "none", run) == []
    assert "of 1 outputs kept 0, wrong 1" in capsys.readouterr().out


def test_rows_are_written_whole_or_not_at_all_and_read_back(tmp_path, monkeypatch):
    file, rows = tmp_path / "rows.jsonl", [dict(a=1, b="猫\n"), dict(a=2, b="")]
    write_rows(file, rows)
    assert read_rows(file) == read_rows(file, dict(a=int, b=str)) == rows
    assert "猫" in file.read_text(encoding="utf-8") and file.read_text().count("\n") == 2

    def broken():
        yield dict(a=3)
        raise OSError

    with pytest.raises(OSError):
        write_rows(file, broken())
    assert read_rows(file) == rows
    write_rows(file, [])
    assert read_rows(file) == []
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none.jsonl")


# --- a model as judge (R1 2.3.3)


def chance(model: Transformer, text: str, said: str) -> float:
    """The log-probability of `said` after `text`, token by token, each text alone."""
    tokens, total = WORDS.encode(text), 0.0
    for token in WORDS.encode(said):
        total += F.log_softmax(model(torch.tensor([tokens]))[0, -1], -1)[token].item()
        tokens = [*tokens, token]
    return total


JUDGED = [("2", "two"), ("3", "two"), ("two", "two"), (None, "two"), ("7", "seven"), ("", "one"),
          ("so it is \\boxed{ 4 }", "four"), ("四", "四")]  # fmt: skip


@pytest.mark.parametrize("template", ["toy", "r1-zero"])
def test_r1_2_3_3_judge_says_right_where_yes_is_likelier_than_no(template):
    answers, golds = zip(*JUDGED)
    problems = [Problem(f"compute {i} ?", gold, "judge") for i, gold in enumerate(golds)]
    asked = {
        "toy": "Reference: {1} Answer: {2} Same?",
        "r1-zero": "Question: {0}\nReference answer: {1}\nAnswer to be judged: {2}\nIs the answer"
        " to be judged the same as the reference answer, yes or no?\nIt is:",
    }[template]
    said = set()
    with torch.no_grad():
        for seed in range(4):
            model = make_model(seed, replace(DENSE, max_position_embeddings=512))
            wanted = []
            for problem, answer in zip(problems, answers):
                text = asked.format(problem.question, problem.answer, answer)
                wanted.append(
                    bool(answer) and chance(model, text, " yes") > chance(model, text, " no")
                )
            for at_once in (1, 3, 64):
                found = judge_answers(model, in_template(template), problems, answers, at_once)
                assert found == wanted, (seed, at_once)
            said |= set(wanted[:3])
    assert said == {True, False}
    assert judge_answers(model, WORDS, problems[:2], [None, ""]) == [False, False]
    assert judge_answers(model, WORDS, [], []) == []


def test_the_log_probability_of_an_ending_is_the_sum_over_its_tokens():
    model = talker()
    texts = ["Reference: two Answer: 2 Same? yes", "hello ! no", "one two three four"]
    tokens = [WORDS.encode(text) for text in texts]
    for last in (1, 2):
        with torch.no_grad():
            found = ending_logprobs(model, tokens, last)
        for each, logprob in zip(tokens, found, strict=True):
            with torch.no_grad():
                logprobs_TV = model(torch.tensor([each]))[0].log_softmax(-1)
            wanted = sum(
                logprobs_TV[len(each) - 1 - i, each[len(each) - i]].item()
                for i in range(1, last + 1)
            )
            assert logprob == pytest.approx(wanted, abs=1e-12)


# --- fine-tuning and sampling on several processes


def tune_and_collect(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        run = Run(f"{folder}/run", Objective())
        pretend(patch)
        gather(run, run.out / "samples.jsonl", Listing(long=(2,)))
        pretend(patch, lambda prompt, row: ("so 1", "stop"))  # on question 3, which is 2 again
        gather(run, run.out / "twice.jsonl", Listing(twice=(3,)), questions=5)
        model = talker()
        batch = [example(WORDS, *pair) for pair in PAIRS]
        learn = learn_answers(model, Tuning(row_tokens=64), 64)
        reports = [learn([torch.optim.SGD(model.parameters(), lr=1.0)], part)
                   for part in (batch, batch[:1])]  # fmt: skip
        line, rows = line_model(), torch.arange(15.0).double().view(5, 3)
        learn = learn_rows(
            line, lambda part: (torch.stack(list(part)) @ line.weight[0]).square(), 2
        )
        reports += [learn([torch.optim.SGD(line.parameters(), lr=0.01)], part)
                    for part in (rows, rows[:1])]  # fmt: skip
        weights = torch.cat([flat(model), line.weight[0].detach()])
        told = [(report.loss, report.tokens, report.grad_norm) for report in reports]
        torch.save((weights, told), f"{folder}/{parallel.rank()}.pt")


def tune_and_collect_on(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    tune_and_collect(folder)
    dist.destroy_process_group()


@pytest.mark.usefixtures("signals_as_they_were")
def test_two_processes_make_the_files_and_the_updates_of_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    tune_and_collect(str(tmp_path / "one"))
    torch.multiprocessing.spawn(tune_and_collect_on, (str(tmp_path / "two"),), nprocs=2)
    wanted, told = torch.load(tmp_path / "one" / "0.pt")
    for rank in range(2):
        weights, reports = torch.load(tmp_path / "two" / f"{rank}.pt")
        assert_same(weights, wanted)
        for found, report in zip(reports, told, strict=True):
            assert found == pytest.approx(report, abs=1e-9)
    for name in ("samples", "twice"):
        files = [tmp_path / number / "run" / f"{name}.jsonl" for number in ("one", "two")]
        assert files[0].read_text() == files[1].read_text(), name
