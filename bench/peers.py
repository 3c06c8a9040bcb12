"""What the comparisons with other libraries share: one model in two libraries, clock and table.

The models have random weights: what is compared is speed, and speed does not ask what they say.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from model import Config, Transformer
from runtime.pretrained import save_pretrained

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

QWEN2 = dict(model_type="qwen2", kv_lora_rank=None, q_lora_rank=None, n_routed_experts=None,
             first_k_dense_replace=0, num_nextn_predict_layers=0, tie_word_embeddings=True,
             rope_theta=1e6, max_position_embeddings=4096)  # fmt: skip
# A model that a laptop runs, and one that a GPU is needed for.
SHAPES = {
    "qwen2-tiny": dict(QWEN2, vocab_size=1024, hidden_size=256, intermediate_size=512,
                       num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2),
    "qwen2.5-1.5b": dict(QWEN2, vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                         num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
    "deepseek-v3-small": dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=12,
        num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096, n_routed_experts=64,
        num_experts_per_tok=6, moe_intermediate_size=1408, n_shared_experts=2,
        first_k_dense_replace=1, n_group=1, topk_group=1, num_nextn_predict_layers=0,
    ),
}  # fmt: skip


def config_of(name: str) -> Config:
    """A shape from above, or a preset of model.py. The weights are wide enough for logits whose
    disagreement would show."""
    if name in SHAPES:
        return Config(**SHAPES[name], initializer_range=0.04)
    return Config.preset(name, initializer_range=0.1)


def require(*packages: str) -> None:
    """End the program with one line and 2 unless all are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f'{", ".join(missing)} not installed: pip install -e ".[bench]"', file=sys.stderr)
        raise SystemExit(2)


def require_device(device: str) -> None:
    """A GPU that isn't there is no mistake: say so, and end well."""
    if device == "cuda" and not torch.cuda.is_available():
        print("not measured: no CUDA GPU")
        raise SystemExit(0)


@torch.no_grad()
def random_model(config: Config, device: str, dtype: torch.dtype) -> Transformer:
    """Random in every parameter: biases of zero would hide that one library left them out."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config).to(dtype).eval()
        for name, value in model.state_dict().items():
            if name.endswith("bias"):
                value.normal_(std=0.02)
    return model


def peer_of(model: Transformer, directory: str):
    """The same weights as a model of transformers, by way of the directory, which must remain for
    as long as the peer is copied."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    save_pretrained(model, directory)
    weight = model.lm_head.weight
    peer = AutoModelForCausalLM.from_pretrained(
        directory, dtype=weight.dtype, attn_implementation="sdpa"
    )
    # No token ends an output: all are equally long.
    peer.generation_config.eos_token_id = peer.config.eos_token_id = None
    peer.generation_config.bos_token_id = None
    peer.generation_config.pad_token_id = 0
    return peer.to(weight.device).eval()


@torch.no_grad()
def disagreement(model: Transformer, peer, tokens_BT: Tensor) -> tuple[float, float]:
    """The largest difference of the logits, and their standard deviation."""
    ours_BTV, theirs_BTV = model(tokens_BT).float(), peer(tokens_BT).logits.float()
    return float((ours_BTV - theirs_BTV).abs().max()), float(theirs_BTV.std())


def check_same(name: str, model: Transformer, peer) -> float:
    """Print how far the logits are apart, and refuse to time two different models. In bf16 there is
    no bound: a token that rounding sends to another expert is far off in the same model."""
    tokens_BT = random_tokens(model.config.vocab_size, 4, 24, 1).to(model.lm_head.weight.device)
    worst, spread = disagreement(model, peer, tokens_BT)
    print(f"{name}: logits differ by at most {worst:.1e}, their std is {spread:.2f}", flush=True)
    if model.lm_head.weight.dtype == torch.float32 and worst > 1e-3:
        raise SystemExit(f"{name}: not the same model, the logits differ by {worst:.1e}")
    return worst


def random_tokens(vocabulary: int, rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.manual_seed(seed))


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()  # else the time ends before the kernels do
    return timer()


timer = time.perf_counter


def add_clock_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="one thread, and its CPU time in place of the clock: for a machine that is busy",
    )  # fmt: skip


def set_clock(given: argparse.Namespace) -> None:
    global timer
    if given.cpu_time and given.device == "cpu":
        given.threads, timer = 1, time.process_time
    if given.threads:
        torch.set_num_threads(given.threads)


def paired(first: list[float], second: list[float]) -> float:
    """The median of second/first, run by run: neighbouring runs meet the same load of the machine,
    so that this is steadier than the ratio of the medians."""
    return statistics.median(b / a for a, b in zip(first, second))


def markdown(rows: list[dict]) -> str:
    """A table with the keys as its head."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device: str, packages: tuple[str, ...]) -> dict:
    """What the figures depend on."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else platform.processor()
        seconds = "CPU time, " if timer is time.process_time else ""
        hardware = f"{seconds}{torch.get_num_threads()} threads of {os.cpu_count()} x {cpu}"
    versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    return dict(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"), hardware=hardware,
        python=platform.python_version(), **versions,
    )  # fmt: skip


def report(rows: list[dict], about: dict, path: str | None, details: dict) -> None:
    """Print the table and its machine; with a path, write them and the single times as JSON."""
    print("\n" + markdown(rows) + "\n\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = dict(machine=about, table=rows, **details)
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="nanor1-bench-")
