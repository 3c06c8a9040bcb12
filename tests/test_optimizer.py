"""runtime/optimizer.py: AdamW in bf16, and states that move."""

import copy
import math

import pytest
import torch
from torch import nn

import runtime.optimizer
from model import Config, Transformer
from runtime.checkpoint import load_state, save_state
from runtime.optimizer import AdamW, adamw, away, round_stochastically, visiting

SMALL = Config.preset(
    "toy", vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
    moe_intermediate_size=4, n_routed_experts=4, kv_lora_rank=6, v_head_dim=5,
)  # fmt: skip
BF16 = torch.bfloat16
MODES = pytest.mark.parametrize("states", ["master", "rounding"])


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (3, 5), (7,), (2, 3, 4)
    return [nn.Parameter(torch.randn(s, generator=generator).to(BF16)) for s in shapes]


def feed(optimizer: torch.optim.Optimizer, steps: int, first: int = 0, share: float = 1.0) -> None:
    """Some steps with gradients that depend on the step alone."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
            for p in group["params"]:
                grad = share * torch.randn(p.shape, generator=generator)
                p.grad = grad.to(p.grad_dtype or p.dtype)
        optimizer.step()


def tree(optimizer: AdamW) -> list[torch.Tensor]:
    """The weights and every tensor of the state."""
    found = list(optimizer.parameters())
    for p in optimizer.parameters():
        found += [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    return [x.detach().clone() for x in found]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(x.dtype == y.dtype and x.equal(y) for x, y in zip(a, b))


# --- master weights


@pytest.mark.parametrize("rest", [{}, dict(weight_decay=0.1, betas=(0.8, 0.99), eps=1e-3)])
def test_the_master_takes_the_steps_of_torchs_adamw_in_fp32(rest):
    ours = parameters()
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    optimizer, reference = AdamW(ours, 0.01, **rest), adamw(theirs, 0.01, **rest)
    assert type(reference) is torch.optim.AdamW
    feed(optimizer, 50)
    feed(reference, 50)
    for p, q in zip(ours, theirs):
        assert optimizer.state[p]["master"].equal(q.detach())
        assert p.dtype == BF16 and p.equal(q.detach().to(BF16))
        assert optimizer.state[p]["exp_avg_sq"].equal(reference.state[q]["exp_avg_sq"])


def test_gradients_of_micro_batches_are_summed_in_fp32():
    weight = nn.Parameter(torch.ones(2, dtype=BF16))
    optimizer = AdamW([weight], 0.01)
    for scale in [256.0] + [1.0] * 100:  # in bf16, 256 + 1 is 256
        (scale * weight).sum().backward()
    assert weight.grad.tolist() == [356.0, 356.0]
    norm = nn.utils.clip_grad_norm_([weight], 1.0)
    assert float(norm) == pytest.approx(356 * math.sqrt(2))
    assert weight.grad.dtype == torch.float32 and float(weight.grad.norm()) == pytest.approx(1.0)
    optimizer.zero_grad(set_to_none=True)
    (3 * weight).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.tolist() == [3.0, 3.0]


# --- stochastic rounding


def test_rounding_goes_to_a_neighbour_and_is_right_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator) * torch.logspace(-30, 30, 50)
    count = 20_000
    noise = torch.randint(0, 2**16, (count, 50), generator=generator)
    many = round_stochastically(x.expand(count, 50).contiguous(), noise).double()
    near = x.to(BF16)
    # The two numbers around x: by bits, one is x cut off, the other one step farther from 0.
    low = (x.view(torch.int32) & -(2**16)).view(torch.float32)
    high = ((x.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    assert ((many == low) | (many == high)).all() and ((near == low) | (near == high)).all()
    gap = (high - low).abs().double()
    assert ((many.mean(0) - x).abs() < 5 * gap / 2 / math.sqrt(count)).all()
    assert ((near.double() - x).abs() > 5 * gap / 2 / math.sqrt(count)).any()  # nearest is not


def test_what_bf16_can_hold_is_not_rounded_and_what_is_not_finite_stays():
    held = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, math.inf, -math.inf])
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for noise in (0, 1, 2**15, 2**16 - 1):
        rounded = round_stochastically(held, torch.full((7,), noise))
        assert rounded.float().equal(held)
        assert round_stochastically(nan, torch.full((3,), noise)).isnan().all()


def walk(states: str, seed: int, steps: int = 200, size: int = 20_000) -> torch.Tensor:
    """Weights of 1 after steps of 1e-6 each, downwards: a constant gradient, so m / sqrt(v) = 1."""
    weight = nn.Parameter(torch.ones(size, dtype=BF16))
    optimizer = adamw([weight], 1e-6, states, seed=seed)
    for _ in range(steps):
        weight.grad = torch.ones(size, dtype=weight.grad_dtype or BF16)
        optimizer.step()
    return weight.detach().double()


def test_steps_of_a_millionth_move_bf16_weights_in_the_mean():
    # Below 1, bf16 has steps of 2^-8: nearest rounding takes 1 - 1e-6 for 1, however often.
    assert (torch.ones(1, dtype=BF16) - 1e-6).item() == 1.0
    weights = walk("rounding", seed=0)
    # 200 steps, each a jump of 2^-8 with a chance of 1e-6 * 2^8.
    mean, jump = 200 * 1e-6, 2.0**-8
    error = math.sqrt(mean * jump / len(weights))
    assert abs((1 - weights).mean().item() - mean) < 4 * error < 0.4 * mean
    means = [(1 - walk("rounding", seed, size=2000)).mean().item() for seed in range(30)]
    spread = math.sqrt(mean * jump / 2000 / 30)
    assert abs(sum(means) / 30 - mean) < 4 * spread and len(set(means)) > 10


def test_a_walk_of_tiny_steps_stays_near_that_of_float64():
    generator = torch.Generator().manual_seed(3)
    size, steps, lr = 4000, 300, 1e-5
    weight = nn.Parameter(torch.ones(size, dtype=BF16))
    exact = nn.Parameter(torch.ones(size, dtype=torch.float64))
    ours, reference = adamw([weight], lr, "rounding"), adamw([exact], lr)
    for _ in range(steps):
        grad = (torch.randn(size, generator=generator) + 1).to(BF16)
        weight.grad, exact.grad = grad, grad.double()
        ours.step()
        reference.step()
    moved = (exact.detach() - 1).mean().item()
    assert moved < -1e-3
    error = (weight.detach().double() - exact.detach()).mean().item()
    # Each number's error is a sum of jumps of 2^-8 (or 2^-7), of variance |step| * 2^-7 at most.
    assert abs(error) < 5 * math.sqrt(2**-7 * 2 * abs(moved) / size) < 0.3 * abs(moved)


def test_moments_in_bf16_are_right_in_the_mean():
    size = 20_000
    weight, exact = (nn.Parameter(torch.zeros(size, dtype=t)) for t in (BF16, torch.float32))
    ours, reference = adamw([weight], 0.01, "rounding"), adamw([exact], 0.01)
    for step in range(20):
        grad = torch.full((size,), 0.1 * (step % 3) + 0.017).to(BF16)
        weight.grad, exact.grad = grad, grad.float()
        ours.step()
        reference.step()
    for name in ("exp_avg", "exp_avg_sq"):
        mean = reference.state[exact][name][0].item()
        got = ours.state[weight][name].double()
        # 20 roundings of at most half a percent each, which fade: 2 % a number, and independent.
        assert abs(got.mean().item() / mean - 1) < 5 * 0.02 / math.sqrt(size)


# --- both


@MODES
def test_the_same_seed_takes_the_same_steps_whatever_the_global_state(states):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))
        optimizer = AdamW(parameters(), 0.01, states=states, seed=seed)
        before = torch.get_rng_state()
        feed(optimizer, 5)
        assert before.equal(torch.get_rng_state())
        runs.append(tree(optimizer))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2]) == (states == "master")


def test_two_parameters_are_not_rounded_alike():
    alike = [nn.Parameter(torch.ones(1000, dtype=BF16)) for _ in range(2)]
    optimizer = AdamW(alike, 1e-3, states="rounding")
    for p in alike:
        p.grad = torch.ones(1000, dtype=BF16)
    optimizer.step()
    assert not alike[0].equal(alike[1])


@MODES
def test_slices_make_no_difference(states, monkeypatch):
    runs = []
    for size in (2**22, 4):
        monkeypatch.setattr(runtime.optimizer, "SLICE", size)
        optimizer = AdamW(parameters(), 0.01, states=states)
        feed(optimizer, 5)
        runs.append(tree(optimizer))
    assert all(torch.allclose(x.float(), y.float(), rtol=1e-6) for x, y in zip(*runs))


@MODES
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(states, tmp_path):
    straight = AdamW(parameters(), 0.01, states=states, seed=7)
    feed(straight, 6)
    first = AdamW(parameters(), 0.01, states=states, seed=7)
    feed(first, 3)
    weights = [p.detach() for p in first.parameters()]
    save_state(tmp_path, 3, dict(optimizer=first.state_dict(), weights=weights))
    again = AdamW(parameters(seed=1), 0.01, states=states, seed=7)
    now = dict(optimizer=again.state_dict(), weights=[p.detach() for p in again.parameters()])
    saved = load_state(tmp_path, 3, now)
    again.load_state_dict(saved["optimizer"])
    for p, weight in zip(again.parameters(), saved["weights"]):
        p.data.copy_(weight)
    assert same(tree(first), tree(again))
    assert all(again.state[p]["step"] == 3 for p in again.parameters())
    feed(again, 3, first=3)
    assert same(tree(straight), tree(again))


def test_states_of_the_other_kind_are_refused():
    master, rounding = (AdamW(parameters(), 0.01, states=s) for s in ("master", "rounding"))
    feed(master, 1)
    with pytest.raises(ValueError, match="states='rounding' needs exp_avg, exp_avg_sq, step"):
        rounding.load_state_dict(master.state_dict())


def test_what_cannot_be_trained_so_is_refused():
    with pytest.raises(ValueError, match="one of master, rounding"):
        AdamW(parameters(), 0.01, states="fp8")
    with pytest.raises(ValueError, match="float16.*contiguous bfloat16 only"):
        adamw([nn.Parameter(torch.ones(2, dtype=torch.float16))], 0.01)
    with pytest.raises(ValueError, match="float32.*contiguous bfloat16 only"):
        adamw([*parameters(), nn.Parameter(torch.ones(2))], 0.01)


@MODES
def test_a_parameter_without_a_gradient_stays(states):
    first, second, third = parameters()
    optimizer = AdamW([first, second, third], 0.01, states=states)
    kept = second.detach().clone()
    first.grad = torch.ones(first.shape, dtype=first.grad_dtype)
    optimizer.step()
    assert second.equal(kept) and list(optimizer.state) == [first]


@pytest.mark.parametrize(("states", "expected"), [("master", 18), ("rounding", 8)])
def test_bytes_of_a_parameter(states, expected):
    torch.manual_seed(0)
    model = Transformer(SMALL).to(BF16)
    optimizer = adamw(model.parameters(), 1e-3, states)
    logprobs_N, *_ = model.logprobs(
        torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]), torch.tensor([[False, True, True]])
    )
    logprobs_N.sum().backward()
    optimizer.step()
    count = 0
    total = 0
    for p in model.parameters():
        if p.grad is None:
            continue
        states_of_p = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
        count += p.numel()
        total += sum(x.nbytes for x in (p, p.grad, *states_of_p))
    assert total == expected * count and count > 1000


def test_a_model_in_bf16_learns_as_one_in_fp32_does():
    tokens_BT = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(0))
    positions_BT = torch.arange(8).expand(4, 8)
    ends = {}
    for name, dtype in (("fp32", torch.float32), ("master", BF16), ("rounding", BF16)):
        torch.manual_seed(0)
        model = Transformer(SMALL).to(dtype)
        optimizer = adamw(model.parameters(), 3e-3, "rounding" if name == "rounding" else "master")
        losses = []
        for _ in range(80):
            loss = -model.logprobs(tokens_BT, positions_BT, positions_BT > 0)[0].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        ends[name] = losses[-1]
    learned = losses[0] - ends["fp32"]
    assert learned > 1
    assert abs(ends["master"] - ends["fp32"]) < 0.1 * learned
    assert abs(ends["rounding"] - ends["fp32"]) < 0.1 * learned


# --- moving


@pytest.fixture
def fake(monkeypatch):
    """Transfers, noted: copies that stay on the CPU, since there is nowhere else to go."""
    log = []

    def transfer(tensor, device):
        log.append((str(device), tensor.nbytes))
        return tensor.clone()

    monkeypatch.setattr(runtime.optimizer, "transfer", transfer)
    return log


@pytest.mark.parametrize("fails", [False, True])
def test_states_go_away_and_come_back_whole_even_after_an_error(fake, fails):
    optimizer = AdamW(parameters(), 0.01)
    feed(optimizer, 2)
    before, size = tree(optimizer), sum(3 * 4 * p.numel() for p in optimizer.parameters())
    try:
        with away(optimizer, "meta"):
            assert [d for d, _ in fake] == ["meta"] * 9 and sum(n for _, n in fake) == size
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [d for d, _ in fake[9:]] == ["cpu"] * 9 and same(before, tree(optimizer))
    feed(optimizer, 1, first=2)


def test_an_error_on_the_way_brings_back_what_had_gone(fake, monkeypatch):
    optimizer = AdamW(parameters(), 0.01)
    feed(optimizer, 1)
    before, work = tree(optimizer), runtime.optimizer.transfer

    def breaks(tensor, device):
        if device == torch.device("meta") and len(fake) == 4:
            raise MemoryError
        return work(tensor, device)

    monkeypatch.setattr(runtime.optimizer, "transfer", breaks)
    with pytest.raises(MemoryError), away(optimizer, "meta"):
        pass
    assert len(fake) == 8 and same(before, tree(optimizer))


def test_nothing_moves_where_all_is_on_the_cpu(fake):
    optimizer, model = torch.optim.AdamW(parameters()), Transformer(SMALL)
    feed(optimizer, 1)
    with away(optimizer), visiting(model, "cpu"):
        assert fake == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_visitor_has_other_tensors_within_and_its_own_untouched_after(fake, fails):
    model = Transformer(SMALL)
    before = copy.deepcopy(model.state_dict())
    places = {name: x.data_ptr() for name, x in model.state_dict().items()}
    try:
        with visiting(model, "meta"):
            assert {device for device, _ in fake} == {"meta"} and len(fake) == len(places)
            inside = {name: x.data_ptr() for name, x in model.state_dict().items()}
            assert set(inside.values()).isdisjoint(places.values())
            model.lm_head.weight.data.zero_()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = model.state_dict()
    assert same(list(before.values()), list(after.values()))
    assert {name: x.data_ptr() for name, x in after.items()} == places


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("make", [
    lambda ps: AdamW(ps, 0.01), lambda ps: AdamW(ps, 0.01, states="rounding"),
    lambda ps: torch.optim.AdamW([nn.Parameter(p.detach().float()) for p in ps]),
])  # fmt: skip
def test_memory_of_the_gpu_falls_while_the_states_are_away(make):
    size = 2**20
    optimizer = make([nn.Parameter(torch.randn(size, device="cuda").to(BF16)) for _ in range(3)])
    feed_on_gpu(optimizer)
    states = [s for state in optimizer.state.values() for s in state.values()]
    states = [s for s in states if isinstance(s, torch.Tensor) and s.is_cuda]
    before, size = [s.cpu() for s in states], sum(s.nbytes for s in states)
    del states
    full = torch.cuda.memory_allocated()
    with away(optimizer):
        assert torch.cuda.memory_allocated() == full - size
        inside = [s for state in optimizer.state.values() for s in state.values()]
        inside = [s for s in inside if isinstance(s, torch.Tensor) and s.dim()]
        assert all(s.is_pinned() for s in inside) and same(before, inside)
    assert torch.cuda.memory_allocated() == full
    feed_on_gpu(optimizer)


def feed_on_gpu(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(p.shape, dtype=p.grad_dtype or p.dtype, device="cuda")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.gpu
def test_a_visitor_takes_memory_of_the_gpu_only_within():
    model = Transformer(SMALL)
    before, full = copy.deepcopy(model.state_dict()), torch.cuda.memory_allocated()
    for _ in range(2):  # the second time from pinned memory
        with visiting(model, "cuda"):
            assert torch.cuda.memory_allocated() > full
            assert model(torch.tensor([[1, 2]], device="cuda")).is_cuda
        model.frequency_r = None  # the angles, which the model keeps
        assert torch.cuda.memory_allocated() == full
    assert same(list(before.values()), list(model.state_dict().values()))


@pytest.mark.gpu
@MODES
def test_a_gpu_takes_the_steps_of_a_cpu(states):
    """But for the last bit in fp32: the same noise may round it to another step of bf16."""
    here, there = parameters(), [nn.Parameter(p.detach().cuda()) for p in parameters()]
    ours, theirs = AdamW(here, 0.01, states=states), AdamW(there, 0.01, states=states)
    for p, q in zip(here, there):
        p.grad = torch.ones(p.shape, dtype=p.grad_dtype)
        q.grad = p.grad.cuda()
    ours.step()
    theirs.step()
    for p, q in zip(here, there):
        assert torch.allclose(p.float(), q.cpu().float(), rtol=2**-7, atol=1e-6)
