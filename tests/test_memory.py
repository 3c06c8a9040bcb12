"""runtime/memory.py: the bytes that it counts, against those of real tensors."""

import json
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import runtime.memory as memory
from model import Config, Transformer
from runtime.configs import PUBLISHED, from_json, to_json
from runtime.flags import UserError
from runtime.memory import GB, Inputs, block_bytes, count, phases, plan, table
from runtime.optimizer import adamw

# Wide enough that what is counted by the head or by the token does not stand out.
GQA = from_json(
    dict(model_type="qwen2", vocab_size=64, hidden_size=64, intermediate_size=160,
         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_theta=100.0)
)  # fmt: skip
MLA_MOE = Config.preset(
    "toy", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=4, moe_intermediate_size=32,
)  # fmt: skip
QWEN3 = replace(GQA, model_type="qwen3", head_dim=32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODELS = pytest.mark.parametrize("config", [GQA, MLA_MOE, QWEN3], ids=["gqa", "mla+moe", "qwen3"])


# --- parameters


@pytest.mark.parametrize(("name", "billions"), [
    ("qwen2.5-1.5b", 1.54), ("qwen2.5-math-1.5b", 1.54), ("qwen2.5-3b", 3.09),
    ("qwen2.5-7b", 7.62), ("qwen2.5-math-7b", 7.62), ("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19),
    ("qwen2.5-14b", 14.77), ("moonlight-16b-a3b", 15.96), ("qwen2.5-32b", 32.76),
    ("llama-3.3-70b", 70.55), ("deepseek-v3", 671.03),
])  # fmt: skip
def test_published_models_have_their_published_sizes(name, billions):
    assert round(count(from_json(PUBLISHED[name])).parameters / 1e9, 2) == billions


def test_deepseek_v3_is_the_preset_and_has_a_prediction_layer_that_rl_does_not_train():
    config = from_json(PUBLISHED["deepseek-v3"])
    assert config == Config.preset("deepseek-v3")
    sizes = count(config)
    # The model card: 685B on the hub, of which 14B are the prediction module with its embedding
    # and head, copies of the main ones (1.85B), that are not made here.
    assert sizes.stored - sizes.trained == 58 * 256  # the routers' biases


# --- what is exact


def trained(config: Config, dtype: str, states: str) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model after a backward pass and a step."""
    torch.manual_seed(0)
    model = Transformer(config).to(DTYPES[dtype])
    optimizer = adamw(model.parameters(), 1e-3, states)
    tokens_BT = torch.randint(0, 64, (4, 64))
    forward(model, tokens_BT).sum().backward()
    optimizer.step()
    return model, optimizer


def forward(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    positions_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
    return model.logprobs(tokens_BT, positions_BT, positions_BT > 0)[0]


@pytest.mark.parametrize("config", [
    GQA, MLA_MOE, replace(GQA, tie_word_embeddings=True),
    replace(MLA_MOE, num_nextn_predict_layers=1),
], ids=["gqa", "mla+moe", "tied", "mtp"])  # fmt: skip
@pytest.mark.parametrize(("dtype", "states"), [
    ("float32", "master"), ("bfloat16", "master"), ("bfloat16", "rounding"),
])  # fmt: skip
def test_weights_gradients_states_and_cache_have_the_bytes_of_real_tensors(config, dtype, states):
    model, optimizer = trained(replace(config, num_nextn_predict_layers=0), dtype, states)
    inputs = Inputs(config, dtype, states, slots=3, longest=100)
    found = phases(inputs, count(config))
    kept = [*model.parameters(), *model.buffers()]
    assert found["step"]["weights"] == sum(x.nbytes for x in kept)
    assert found["reference"]["reference"] == found["step"]["weights"]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert found["step"]["gradients"] == sum(x.nbytes for x in gradients)
    of_states = [x for state in optimizer.state.values() for x in state.values()]
    of_states = [x for x in of_states if isinstance(x, torch.Tensor) and x.dim()]
    assert found["step"]["optimizer"] == sum(x.nbytes for x in of_states)
    assert found["rollout"]["cache"] == model.new_cache(6, 64).nbytes  # 3 rows of 2 pages
    few = replace(inputs, cache_tokens=300)
    assert phases(few, count(config))["rollout"]["cache"] == model.new_cache(4, 64).nbytes


# --- activations


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    """Triton's interpreter: autograd keeps what it keeps on a GPU. (The references keep more:
    norms their fp32 copies, attention its mask, the experts gate and up, SwiGLU silu(gate).)"""
    pytest.importorskip("triton")
    import kernels.backend

    monkeypatch.setattr(kernels.backend, "interpret", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def kept_bytes(model: torch.nn.Module, run) -> int:
    """What autograd keeps in memory while `run()` goes forward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("config", [GQA, MLA_MOE], ids=["gqa", "mla+moe"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(config, dtype, recompute, kernels_on_the_cpu):
    torch.manual_seed(0)
    model = Transformer(config).to(DTYPES[dtype])
    model.recompute = recompute
    tokens_BT = torch.randint(0, 64, (1, 16))
    measured = kept_bytes(model, lambda: forward(model, tokens_BT))
    inputs = Inputs(config, dtype, recompute=recompute, micro_tokens=16, longest=16)
    if recompute:  # the backward pass makes one block after the other again: the largest
        block, rows = model.model.layers[-1], model.rows(tokens_BT, None)
        x_BTD = torch.randn(1, 16, 64, dtype=DTYPES[dtype], requires_grad=True)
        again = kept_bytes(block, lambda: block(x_BTD, rows))
        shared = x_BTD.nbytes + rows.turn_BTr.nbytes  # counted with the rest
        measured += again - shared
    counted = memory.activation_bytes(inputs)
    assert counted == pytest.approx(measured, rel=0.08 if recompute else 0.01)


@MODELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_blocks_bytes_are_what_autograd_keeps_of_it(config, dtype, kernels_on_the_cpu):
    torch.manual_seed(0)
    model = Transformer(config).to(DTYPES[dtype])
    tokens_BT = torch.randint(0, 64, (1, 16))
    rows = model.rows(tokens_BT, torch.arange(16).expand(1, 16))
    for block in model.model.layers if config.is_moe else model.model.layers[:1]:
        x_BTD = torch.randn(1, 16, 64, dtype=DTYPES[dtype], requires_grad=True)
        shared = rows.turn_BTr.nbytes + rows.starts_BT.nbytes
        measured = kept_bytes(block, lambda: block(x_BTD, rows)) - shared
        token, once = block_bytes(config, block.is_moe, x_BTD.element_size())
        assert 16 * token + once == pytest.approx(measured, rel=0.004)


# --- phases and what fits


SEVEN = Inputs(from_json(PUBLISHED["qwen2.5-7b"]))


def test_what_is_away_is_on_the_cpu_and_comes_back_when_it_is_needed():
    there, away = plan(SEVEN), plan(replace(SEVEN, offload_optimizer=True, offload_reference=True))
    states, model = there.phases["step"]["optimizer"], there.phases["step"]["weights"]
    for name in ("rollout", "reference"):
        assert away.phases[name]["optimizer"] == 0
    for name in ("update", "step"):
        assert away.phases[name]["optimizer"] == states and away.phases[name]["reference"] == 0
    assert away.phases["rollout"]["reference"] == 0
    assert away.phases["reference"]["reference"] == model
    assert away.host == states + model and there.host == 0
    assert "reference" not in plan(replace(SEVEN, reference=False)).phases


def test_several_processes_add_up_copies_of_a_bucket_of_gradients_and_divide_nothing():
    one, eight = plan(SEVEN), plan(replace(SEVEN, gpus=8))
    largest = 152064 * 3584  # the embedding, which is more than a bucket
    assert eight.phases["step"]["working"] == 2 * 4 * largest < one.phases["step"]["gradients"]
    for name in ("rollout", "reference", "update"):
        assert one.phases[name] == eight.phases[name]


def test_the_peak_is_the_largest_phase_and_not_the_sum():
    found = plan(SEVEN)
    sums = {name: sum(kinds.values()) for name, kinds in found.phases.items()}
    assert found.peak == sums["update"] == max(sums.values()) < sum(sums.values())


@pytest.mark.parametrize("changes", [
    dict(states="rounding"), dict(states="rounding", recompute=True, gpu_memory=100.0),
    dict(dtype="float32", gpu_memory=400.0), dict(states="rounding", gpus=8, gpu_memory=141.0),
])  # fmt: skip
def test_the_most_that_fits_fits_and_one_more_does_not(changes):
    inputs = replace(SEVEN, offload_optimizer=True, offload_reference=True, **changes)
    found = plan(inputs)
    rows = found.micro_tokens // inputs.longest
    assert rows >= 1 and found.slots >= 1 and found.micro_tokens == rows * inputs.longest
    assert found.missing == 0 and found.advice == ()
    most = replace(inputs, micro_tokens=found.micro_tokens, slots=found.slots)
    assert plan(most).fits
    assert not plan(replace(most, micro_tokens=most.micro_tokens + inputs.longest)).fits
    assert not plan(replace(most, slots=most.slots + 1)).fits


def test_what_does_not_fit_is_told_with_what_would_help():
    found = plan(replace(SEVEN, dtype="float32"))
    assert not found.fits and found.micro_tokens == 0
    small = replace(SEVEN, dtype="float32", micro_tokens=SEVEN.longest, slots=1)
    assert found.missing == plan(small).peak - 80 * GB > 0
    names = [line.split(":")[0] for line in found.advice]
    # In fp32 the step needs more than the backward pass: recomputing would save nothing.
    rounding = "--dtype bfloat16 --optimizer rounding"
    assert names == ["--dtype bfloat16", rounding, "--offload", "all of them"]
    of_bf16 = [line.split(":")[0] for line in plan(SEVEN).advice]
    assert of_bf16 == ["--optimizer rounding", "--offload", "--recompute", "all of them"]
    assert found.advice[-1].endswith("fits")
    everything = dict(states="rounding", offload_optimizer=True, offload_reference=True)
    assert plan(replace(small, dtype="bfloat16", recompute=True, **everything)).missing == 0
    text = table(found)
    assert f"{found.missing / GB:.1f} GB are missing" in text and "--offload: " in text
    huge = plan(Inputs(from_json(PUBLISHED["llama-3.3-70b"]), states="rounding"))
    assert "sharding" in huge.advice[-1]


def test_only_what_is_too_much_is_blamed():
    inputs = replace(SEVEN, states="rounding", offload_optimizer=True, offload_reference=True)
    found = plan(replace(inputs, micro_tokens=10**6))
    assert not found.fits and found.missing == 0
    assert f"--micro-tokens up to {found.micro_tokens}" in table(found)
    assert plan(replace(inputs, micro_tokens=found.micro_tokens)).fits
    assert "It fits 80 GB" in table(plan(replace(inputs, micro_tokens=1536)))


def test_nothing_is_allocated(monkeypatch):
    real = torch.empty

    def meta_only(*shape, **options):
        made = real(*shape, **options)
        assert made.device.type == "meta"
        return made

    monkeypatch.setattr(torch, "empty", meta_only)
    plan(replace(SEVEN, model=from_json(PUBLISHED["deepseek-v3"])))


@pytest.mark.parametrize("change", [
    dict(dtype="float16"), dict(states="fp8"), dict(slots=-1), dict(gpus=0), dict(gpu_memory=-4.0),
    dict(micro_tokens=0), dict(longest=0),
])  # fmt: skip
def test_settings_that_do_not_exist_are_refused(change):
    [value] = change.values()
    with pytest.raises(UserError, match=str(value)):
        replace(SEVEN, **change)


# --- the command


def test_the_command_prints_a_table_of_all_published_models_or_a_plan_of_one(tmp_path, capsys):
    memory.main(memory.Config())
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in PUBLISHED) and "needs sharding" in text
    (tmp_path / "config.json").write_text(json.dumps(to_json(GQA)))
    memory.main(memory.Config(model=str(tmp_path), recompute=True))
    assert "It fits 80 GB" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean qwen2.5-7b"):
        memory.main(memory.Config(model="qwen2.5-7bb"))
