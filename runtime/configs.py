"""config.json: how a released model's is read, how ours is written, and those of some models.

The fields are model.Config's, which has the official names. What is not computed here is refused by
its key, lest a model be read that then answers something else.

It is no part of the method. Read next: pretrained.py.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

from model import PRESETS, Config
from runtime.flags import UserError

OF_DEEPSEEK = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    "num_nextn_predict_layers",
)  # fmt: skip
DENSE = dict(kv_lora_rank=None, q_lora_rank=None, n_routed_experts=None, first_k_dense_replace=0,
             num_nextn_predict_layers=0)  # fmt: skip
# What a family's config.json leaves out, and what its model is called.
FAMILIES = dict(deepseek_v3=dict(num_nextn_predict_layers=0), qwen2=DENSE, qwen3=DENSE, llama=DENSE)
ARCHITECTURES = dict(deepseek_v3="DeepseekV3ForCausalLM", qwen2="Qwen2ForCausalLM",
                     qwen3="Qwen3ForCausalLM", llama="LlamaForCausalLM")  # fmt: skip
# What a config.json may say, but only so: there is no other way here.
ONLY = dict(hidden_act="silu", scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1,
            mlp_bias=False, use_sliding_window=False, rope_interleave=True)  # fmt: skip
FP8 = dict(quant_method="fp8", weight_block_size=[128, 128])
# The keys that each kind of rope_scaling needs, and those that it may have.
ROPE_SCALING = {
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    ),
    "llama3": (
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
        set(),
    ),
}


def read_config(directory: Path) -> Config:
    """The config.json of a model directory. Raises UserError where it can't be used."""
    file = directory / "config.json"
    if not file.exists():
        raise UserError(f"no config.json in {directory}: give a model directory")
    try:
        return from_json(json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: not a config that can be used: {error}") from error


def from_json(settings: dict) -> Config:
    """What a config.json says. Raises ValueError for what would be computed otherwise than here."""
    settings = {**settings}
    family = settings.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    for name, only in ONLY.items():
        if settings.get(name) not in (None, only):
            raise ValueError(f"{name} {settings[name]!r}: only {only!r} is implemented")
    if set(settings.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("layer_types: only full_attention is implemented")
    stored = settings.pop("quantization_config", None) or FP8
    if any(stored.get(name) != value for name, value in FP8.items()):
        raise ValueError(f"quantization_config {stored}: only {FP8} is read")
    if rope := settings.pop("rope_parameters", None):  # as transformers 5 writes them
        settings |= {"rope_scaling": rope, "rope_theta": rope.get("rope_theta", 10000.0)}
    settings["rope_scaling"] = rope_scaling(settings.get("rope_scaling"))
    if family == "deepseek_v3":
        settings.pop("num_key_value_heads", None)  # MLA has as many as heads
    known = {each.name for each in fields(Config)} - {"extra"}
    ours = {key: value for key, value in settings.items() if key in known}
    written = {*known, *ONLY, "architectures", "dtype", "torch_dtype"}  # anew
    written |= {"auto_map"}  # names code that stays behind
    extra = {key: value for key, value in settings.items() if key not in written}
    return Config(**{**FAMILIES[family], **ours}, extra=extra)


def rope_scaling(given: dict | None) -> dict | None:
    """With its kind under one name, "rope_type"; None for none. ValueError for an unknown one."""
    if not given:
        return None
    if not isinstance(given, dict):
        raise ValueError(f"rope_scaling {given!r}: not an object")
    kind = given.get("rope_type", given.get("type"))
    rest = {
        key: value
        for key, value in given.items()
        if key not in ("rope_type", "type", "rope_theta") and value is not None
    }
    if kind == "default" and not rest:
        return None
    if kind not in ROPE_SCALING:
        raise ValueError(f"rope_scaling {given}: only {' and '.join(ROPE_SCALING)} are implemented")
    needed, optional = ROPE_SCALING[kind]
    together = ("mscale" in rest) == ("mscale_all_dim" in rest)  # readers differ where one is alone
    if not (needed <= rest.keys() <= needed | optional and together):
        raise ValueError(
            f"rope_scaling {given}: {kind} needs {', '.join(sorted(needed))} and knows"
            f" {', '.join(sorted(optional)) or 'no more'}"
        )
    return dict(rope_type=kind, **rest)


def to_json(config: Config) -> dict:
    """What config.json holds."""
    settings = asdict(config)
    extra = settings.pop("extra")
    if config.head_dim is None:  # which transformers would take for a value
        del settings["head_dim"]
    if config.rope_scaling is not None:  # older readers know the one name, newer the other
        settings["rope_scaling"]["type"] = config.rope_type
    if config.model_type == "deepseek_v3":
        settings |= {key: ONLY[key] for key in ("scoring_func", "topk_method", "moe_layer_freq")}
        settings["num_key_value_heads"] = config.num_attention_heads
    else:
        settings = {key: value for key, value in settings.items() if key not in OF_DEEPSEEK}
    about = dict(architectures=[ARCHITECTURES[config.model_type]], hidden_act=ONLY["hidden_act"])
    return {**extra, **about, **settings}


# ---- released models -----------------------------------------------------------------------------

QWEN = dict(model_type="qwen2", vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6,
            max_position_embeddings=131072)  # fmt: skip
LLAMA = dict(
    model_type="llama", vocab_size=128256, rope_theta=5e5, rms_norm_eps=1e-5,
    num_key_value_heads=8, max_position_embeddings=131072,
    rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192),
)  # fmt: skip
QWEN_1_5B = dict(
    QWEN, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
QWEN_7B = dict(
    QWEN, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4,
)  # fmt: skip
# The config.json of released models.
PUBLISHED = {
    "qwen2.5-1.5b": QWEN_1_5B,
    "qwen2.5-math-1.5b": dict(QWEN_1_5B, rope_theta=1e4, max_position_embeddings=4096),
    "qwen2.5-3b": dict(
        QWEN, vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=32768,
    ),
    "qwen2.5-7b": QWEN_7B,
    "qwen2.5-math-7b": dict(QWEN_7B, rope_theta=1e4, max_position_embeddings=4096),
    "llama-3.1-8b": dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=40960,
    ),
    "qwen2.5-14b": dict(
        QWEN, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, rms_norm_eps=1e-5,
        num_attention_heads=40, num_key_value_heads=8,
    ),
    "moonlight-16b-a3b": dict(
        model_type="deepseek_v3", vocab_size=163840, hidden_size=2048, intermediate_size=11264,
        num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
        first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=2.446,
        rope_theta=5e4, rms_norm_eps=1e-5, max_position_embeddings=8192,
        num_nextn_predict_layers=0,
    ),
    "qwen2.5-32b": dict(
        QWEN, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, rms_norm_eps=1e-5,
        num_attention_heads=40, num_key_value_heads=8,
    ),
    "llama-3.3-70b": dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                          num_attention_heads=64),
    "deepseek-v3": dict(model_type="deepseek_v3", num_nextn_predict_layers=1,
                        **PRESETS["deepseek-v3"]),
}  # fmt: skip
