"""Model directories as others write and read them: transformers' own models of each family, tiny
and random, beside ours; FP8; the published shapes; what loading costs in memory."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.fp8 import LARGEST, SIDE
from model import Config, Transformer
from runtime.configs import PUBLISHED, from_json, to_json
from runtime.flags import UserError
from runtime.pretrained import Stored, load_pretrained, save_pretrained, stored_tensors
from sample import generate

ROOT = Path(__file__).parent.parent
transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    initializer_range=0.2, eos_token_id=None, bos_token_id=None, pad_token_id=None,
)  # fmt: skip
EXPERTS = dict(
    num_key_value_heads=4, num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=16,
    num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=12, kv_lora_rank=12,
    qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7, n_group=4, topk_group=2,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=6.0, beta_fast=4, beta_slow=1,
            original_max_position_embeddings=16)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip
PLAIN = dict(rope_type="default", rope_theta=1000.0)
MODELS = {
    "deepseek-v3": ("DeepseekV3", dict(EXPERTS, q_lora_rank=14, rope_parameters=dict(
        YARN, mscale=1.0, mscale_all_dim=0.8))),
    "moonlight": ("DeepseekV3", dict(EXPERTS, q_lora_rank=None, n_group=1, topk_group=1,
                                     rope_parameters=PLAIN, routed_scaling_factor=2.446)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=PLAIN)),
    "qwen2-yarn": ("Qwen2", dict(tie_word_embeddings=False, rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=12, rope_parameters=PLAIN)),
    "llama": ("Llama", dict(rope_parameters=PLAIN, attention_bias=True)),
    "llama-3.1": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
}  # fmt: skip
LENGTH = 61  # beyond the original context of 16


@pytest.fixture(scope="module", params=MODELS)
def theirs(request, tmp_path_factory):
    """A model of transformers, random, with a routing bias that decides; and its directory."""
    family, settings = MODELS[request.param]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(8)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 - 0.5)
        elif tensor.dim() == 1:  # norms and biases, which begin as ones and zeros
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def tokens(rows: int = 3, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(SMALL["vocab_size"], (rows, length), generator=generator)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of their standard deviation."""
    return float((ours - theirs).abs().max() / theirs.std())


def test_logits_are_those_of_transformers(theirs):
    model, directory = theirs
    with torch.no_grad():
        assert error(load_pretrained(directory)(tokens()), model(tokens()).logits) < 1e-4


def test_greedy_continuations_with_the_cache_are_those_of_transformers(theirs):
    model, directory = theirs
    prompts = tokens(4, 13)
    expected = model.generate(prompts, max_new_tokens=40, do_sample=False)[:, 13:]
    outputs = generate(
        load_pretrained(directory), prompts.tolist(), max_new_tokens=40, temperature=0
    )
    assert [output.tokens for output in outputs] == expected.tolist()


def test_gradients_are_those_of_transformers(theirs):
    model, directory = theirs
    ours = load_pretrained(directory)
    for each in (ours, model):
        each.zero_grad()
    batch = tokens(2)
    loss(ours(batch), batch).backward()
    loss(model(batch).logits, batch).backward()
    expected = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):  # they stack the two
            for part, grad in zip(("gate_proj", "up_proj"), parameter.grad.chunk(2, 1)):
                expected[name.replace("gate_up_proj", part)] = grad
        else:
            expected[name] = parameter.grad
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert error(grad, expected[name]) < 1e-3, name


def loss(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def test_what_we_save_is_read_by_transformers_with_equal_logits(theirs, tmp_path):
    model, directory = theirs
    save_pretrained(load_pretrained(directory), tmp_path / "again")
    again, report = type(model).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert again.dtype == torch.float32 and type(again) is type(model)
    for file in (directory, tmp_path / "again"):
        assert (
            load_file(file / "model.safetensors").keys()
            == load_file(directory / "model.safetensors").keys()
        )


def test_old_and_new_names_of_the_rope_settings_mean_the_same(theirs, tmp_path):
    """rope_parameters (transformers 5) and rope_theta with rope_scaling, "type" or "rope_type"."""
    _, directory = theirs
    settings = json.loads((directory / "config.json").read_text())
    new = from_json(settings)
    rope = settings.pop("rope_parameters")
    kind = rope.pop("rope_type")
    settings["rope_theta"] = rope.pop("rope_theta")
    for name in ("type", "rope_type"):
        settings["rope_scaling"] = None if kind == "default" else {name: kind, **rope}
        assert from_json(settings) == new
    assert from_json(to_json(new)) == new


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"}, {"model_type": "gpt2"}, {"scoring_func": "softmax"},
        {"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},  # of which length?
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_scaling": {**YARN, "attention_factor": 2.0}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
    ],
)  # fmt: skip
def test_a_config_that_would_be_computed_otherwise_is_refused_by_its_key(change):
    [(key, value)] = change.items()
    key = "rope_scaling" if key == "rope_parameters" else key
    with pytest.raises(ValueError, match=key):
        from_json({"model_type": "qwen2", **change})


def test_what_a_config_says_besides_is_carried_along(tmp_path):
    about = dict(bos_token_id=3, eos_token_id=[4, 5], transformers_version="4.40.0")
    config = from_json({**TINY_QWEN, **about})
    save_pretrained(Transformer(config), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {**written, **about} == written and written["torch_dtype"] == "float32"
    assert not {"kv_lora_rank", "n_routed_experts", "extra"} & written.keys()


TINY_QWEN = dict(model_type="qwen2", vocab_size=31, hidden_size=16, intermediate_size=24,
                 num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 tie_word_embeddings=False)  # fmt: skip
TINY_V3 = Config.preset(
    "toy", vocab_size=140, hidden_size=200, intermediate_size=136, num_hidden_layers=2,
    q_lora_rank=130, kv_lora_rank=24, moe_intermediate_size=129, n_routed_experts=4,
    num_nextn_predict_layers=1,
)  # fmt: skip


# ---- FP8 -----------------------------------------------------------------------------------


def in_fp8(directory: Path) -> dict[str, torch.Tensor]:
    """Quantise a model directory as the release does; what its weights then are."""
    file = directory / "model.safetensors"
    stored, twin = {}, {}
    for name, weight in load_file(file).items():
        plain = not re.search(r"layers.*_proj|kv_a_proj_with_mqa|q_[ab]_proj", name)
        if plain or weight.dim() < 2:
            stored[name] = twin[name] = weight
            continue
        rows, columns = (math.ceil(size / SIDE) for size in weight.shape)
        scales, whole = torch.zeros(rows, columns), torch.zeros_like(weight)
        codes = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                block = slice(i * SIDE, (i + 1) * SIDE), slice(j * SIDE, (j + 1) * SIDE)
                scales[i, j] = weight[block].abs().max() / LARGEST
                codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
                whole[block] = codes[block].float() * scales[i, j]
        stored |= {name: codes, name + "_scale_inv": scales}
        twin[name] = whole
    save_file(stored, file)
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[SIDE, SIDE]
    )
    (directory / "config.json").write_text(json.dumps(settings))
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_an_fp8_checkpoint_is_its_dequantised_twin(tmp_path, dtype):
    torch.manual_seed(1)
    save_pretrained(Transformer(TINY_V3), tmp_path)
    twin = in_fp8(tmp_path)
    model = load_pretrained(tmp_path, dtype=dtype)
    found = stored_tensors(model)
    assert found.keys() == twin.keys() and sum(n.endswith("_proj.weight") for n in found) > 20
    quantised = 0
    for name, weight in twin.items():
        if name + "_scale_inv" in load_file(tmp_path / "model.safetensors"):
            quantised += 1
            assert torch.equal(found[name], weight.to(dtype or torch.bfloat16)), name
        else:
            assert torch.equal(found[name], weight), name
    assert quantised > 20
    save_pretrained(model, tmp_path / "again")  # in bf16, and it says so
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


def test_an_fp8_weight_without_its_scale_is_refused(tmp_path):
    save_pretrained(Transformer(TINY_V3), tmp_path)
    in_fp8(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing .*up_proj.weight_scale_inv"):
        load_pretrained(tmp_path)


# ---- multi-token prediction ------------------------------------------------------------------


def test_the_mtp_layer_is_loaded_or_left_out_as_asked_and_as_there(tmp_path):
    save_pretrained(Transformer(TINY_V3), tmp_path)
    assert load_pretrained(tmp_path).config == TINY_V3
    without = load_pretrained(tmp_path, mtp=False)
    assert without.config == replace(TINY_V3, num_nextn_predict_layers=0)
    assert len(without.model.layers) == TINY_V3.num_hidden_layers
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if ".layers.2." not in name}
    assert len(kept) < len(stored)
    save_file(kept, tmp_path / "model.safetensors")  # as transformers saves it
    assert load_pretrained(tmp_path).config.num_nextn_predict_layers == 0


def test_half_of_an_mtp_layer_is_refused(tmp_path):
    save_pretrained(Transformer(TINY_V3), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.2.eh_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing .*eh_proj"):
        load_pretrained(tmp_path)


# ---- sharding ----------------------------------------------------------------------------------

SHARDED = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from runtime import parallel
from runtime.pretrained import Stored, load_pretrained

class Counted(Stored):
    read_bytes = 0
    def _part(self, name, region):
        part = super()._part(name, region)
        Counted.read_bytes += part.nbytes
        return part

def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        if block.is_moe:  # each rank has half of the experts
            for name, p in block.mlp.experts.named_parameters():
                spread = distribute_tensor(p, mesh, [Shard(0)])
                block.mlp.experts.register_parameter(name, torch.nn.Parameter(spread))
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    fully_shard(model, mesh=mesh, ignored_params=set(experts))

import runtime.pretrained
runtime.pretrained.Stored = Counted
parallel.init()
model = load_pretrained(sys.argv[1], dtype=torch.float32, shard=shard)
whole = Counted.read_bytes
alone = load_pretrained(sys.argv[1], dtype=torch.float32)
assert 0.45 < whole / (Counted.read_bytes - whole) < 0.75, (whole, Counted.read_bytes)
expected, spread = alone.state_dict(), 0
for name, tensor in model.state_dict().items():
    spread += isinstance(tensor, DTensor)
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    assert torch.equal(tensor, expected[name]), name
assert spread > 20
model.unshard()  # the parameters that were read are those that FSDP gathers
assert torch.equal(model.lm_head.weight, alone.lm_head.weight)
sys.stdout.write(f"equal {parallel.rank()}\\n")
parallel.shutdown()
"""


def test_of_a_sharded_model_each_process_reads_its_part_only(tmp_path):
    save_pretrained(Transformer(TINY_V3), tmp_path / "model")
    in_fp8(tmp_path / "model")  # whose blocks the sharding cuts
    (tmp_path / "worker.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path / "model")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0", "1", "equal", "equal"]


# ---- memory ------------------------------------------------------------------------------------

PEAK = """
import sys
import torch
from pathlib import Path
from runtime import pretrained
pretrained.Stored.REMAP = int(sys.argv[2])

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

torch.ones(10).sum()
before = kilobytes("VmRSS")
model = pretrained.load_pretrained(sys.argv[1])
print((kilobytes("VmHWM") - before) * 1024 / sum(p.nbytes for p in model.parameters()))
"""


def peak(directory: Path, remap: int) -> float:
    """What loading takes at most, as a multiple of the model's size."""
    command = [sys.executable, "-c", PEAK, str(directory), str(remap)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_loading_does_not_hold_the_files_beside_the_model(tmp_path):
    config = from_json({**TINY_QWEN, "hidden_size": 1024, "intermediate_size": 8192,
                               "num_hidden_layers": 2})  # fmt: skip
    save_pretrained(Transformer(config), tmp_path)  # 0.2 GB
    assert peak(tmp_path, 2**22) < 1.25
    assert peak(tmp_path, 2**60) > 1.6  # so the remapping is what does it


@linux
@pytest.mark.slow
def test_loading_1_5_billion_parameters_peaks_at_no_more_than_1_15_times_their_size(tmp_path):
    with torch.device("meta"):
        model = Transformer(from_json(PUBLISHED["qwen2.5-1.5b"]))
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(15000, 16000)
    model.lm_head.weight = model.model.embed_tokens.weight
    save_pretrained(model, tmp_path)
    del model
    found = peak(tmp_path, Stored.REMAP)
    print(f"peak: {found:.3f} times the model's size")
    assert found <= 1.15


# ---- published shapes --------------------------------------------------------------------------


def published(c: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published index, spelt out from its config.json."""
    D, V, found = c["hidden_size"], c["vocab_size"], {}
    found |= {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not c.get("tie_word_embeddings"):
        found["lm_head.weight"] = (V, D)
    for i in range(c["num_hidden_layers"] + c.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{i}."
        moe = "n_routed_experts" in c and i >= c["first_k_dense_replace"]
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        layer |= mla(c) if "kv_lora_rank" in c else gqa(c)
        layer |= experts(c) if moe else mlp("mlp.", D, c["intermediate_size"])
        if i == c["num_hidden_layers"]:
            layer |= {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D),
                      "embed_tokens.weight": (V, D), "shared_head.norm.weight": (D,),
                      "shared_head.head.weight": (V, D)}  # fmt: skip
        found |= {at + name: shape for name, shape in layer.items()}
    return found


def gqa(c: dict) -> dict:
    D, H, J = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    K = c.get("head_dim") or D // H
    found = {}
    for name, out in (("q", H), ("k", J), ("v", J)):
        found[f"self_attn.{name}_proj.weight"] = (out * K, D)
        if c["model_type"] == "qwen2":
            found[f"self_attn.{name}_proj.bias"] = (out * K,)
    if c["model_type"] == "qwen3":
        found |= {"self_attn.q_norm.weight": (K,), "self_attn.k_norm.weight": (K,)}
    return found | {"self_attn.o_proj.weight": (D, H * K)}


def mla(c: dict) -> dict:
    D, H, L, C = (
        c[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    K, R, U = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    q = {"q_proj.weight": (H * (K + R), D)}
    if L is not None:
        q = {"q_a_proj.weight": (L, D), "q_a_layernorm.weight": (L,),
             "q_b_proj.weight": (H * (K + R), L)}  # fmt: skip
    kv = {"kv_a_proj_with_mqa.weight": (C + R, D), "kv_a_layernorm.weight": (C,),
          "kv_b_proj.weight": (H * (K + U), C), "o_proj.weight": (D, H * U)}  # fmt: skip
    return {f"self_attn.{name}": shape for name, shape in (q | kv).items()}


def mlp(at: str, D: int, F: int) -> dict:
    return {f"{at}gate_proj.weight": (F, D), f"{at}up_proj.weight": (F, D),
            f"{at}down_proj.weight": (D, F)}  # fmt: skip


def experts(c: dict) -> dict:
    D, E, F = c["hidden_size"], c["n_routed_experts"], c["moe_intermediate_size"]
    found = {"mlp.gate.weight": (E, D), "mlp.gate.e_score_correction_bias": (E,)}
    for e in range(E):
        found |= mlp(f"mlp.experts.{e}.", D, F)
    return found | mlp("mlp.shared_experts.", D, F * c["n_shared_experts"])


# Of the released config.json, which says what is a default here.
V3 = dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
    num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, n_shared_experts=1,
    moe_intermediate_size=2048, first_k_dense_replace=3, num_nextn_predict_layers=1,
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_index_has_its_place(name):
    settings = {**(V3 if name == "deepseek-v3" else {}), **PUBLISHED[name]}
    with torch.device("meta"):
        model = Transformer(from_json(settings))
    found = {stored: tuple(t.shape) for stored, t in stored_tensors(model).items()}
    assert found == published(settings)
