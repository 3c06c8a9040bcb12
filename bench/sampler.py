"""Tokens per second of `sample.generate` beside transformers' `generate`, with the same weights.

    python -m bench.sampler                   a tiny Qwen2 and the toy DeepSeek-V3, fp32
    python -m bench.sampler --device cuda     a Qwen2.5-1.5B and a small DeepSeek-V3, in bf16

Every prompt is different, every output as long as allowed, sampled at T = 1 from the whole
vocabulary. The two take turns in one process, after some runs of each to warm up; a figure is the
median over the repeats, the ratio that of neighbouring runs. transformers keeps its default cache,
attends with sdpa, and for a mixture of experts uses the fastest of its implementations.
"""

import argparse
import gc
import statistics
from collections.abc import Callable

import torch

import sample
from bench import peers
from model import Transformer

MODELS = {"cpu": ("qwen2-tiny", "toy"), "cuda": ("qwen2.5-1.5b", "deepseek-v3-small")}
PROMPT = 24  # tokens
NEW = {"cpu": 64, "cuda": 256}
WARM = 4  # runs of each that don't count: ours records a step once its shape has come often
EXPERTS = ("grouped_mm", "batched_mm", "eager")


def ours(model: Transformer, prompts: list[list[int]], new: int) -> Callable[[int], int]:
    """A run: seed -> how many tokens were written."""

    def run(seed: int) -> int:
        outputs = sample.generate(model, prompts, max_new_tokens=new, seed=seed)
        return sum(len(output.tokens) for output in outputs)

    return run


def theirs(peer, prompts: list[list[int]], new: int) -> Callable[[int], int]:
    tokens_BT = torch.tensor(prompts, device=peer.device)

    @torch.inference_mode()
    def run(seed: int) -> int:
        torch.manual_seed(seed)
        written_BT = peer.generate(
            tokens_BT, attention_mask=torch.ones_like(tokens_BT), max_new_tokens=new,
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
        )  # fmt: skip
        return written_BT[:, tokens_BT.shape[1] :].numel()

    return run


def speed(run: Callable[[int], int], seed: int, device: str) -> float:
    start = peers.clock(device)
    tokens = run(seed)
    return tokens / (peers.clock(device) - start)


def choose_experts(peer, run: Callable[[int], int], device: str) -> str:
    """Leave the peer with its fastest implementation of the experts, and name it."""
    if not hasattr(peer.config, "n_routed_experts") or peer.config.n_routed_experts is None:
        return ""
    speeds = {}
    for name in EXPERTS:
        try:
            peer.set_experts_implementation(name)
            run(0)
            speeds[name] = max(speed(run, seed, device) for seed in (1, 2))
        except (AttributeError, ValueError, ImportError, RuntimeError) as error:
            print(f"  experts {name}: {type(error).__name__}: {str(error)[:200]}")
    print("  experts: " + ", ".join(f"{k} {v:,.0f}" for k, v in speeds.items()) + " tokens/s")
    best = max(speeds, key=speeds.get)
    peer.set_experts_implementation(best)
    return best


def compare(name: str, model: Transformer, peer, batch: int, given) -> tuple[dict, dict]:
    """A row of the table, and the single speeds."""
    device, new = given.device, NEW[given.device]
    prompts = peers.random_tokens(model.config.vocab_size, batch, PROMPT, seed=2).tolist()
    run, peer_run = ours(model, prompts, new), theirs(peer, prompts, new)
    experts = choose_experts(peer, peer_run, device)
    wanted = batch * new
    for each in (run, peer_run):
        for seed in range(-WARM, 0):
            written = each(-seed)
            if written != wanted:
                raise SystemExit(f"{name}: {written} tokens written, not {wanted}")
    mine, other = [], []
    for repeat in range(1, given.repeats + 1):
        mine.append(speed(run, repeat, device))
        other.append(speed(peer_run, repeat, device))
    row = {
        "model": name,
        "batch": batch,
        "nanoR1, tokens/s": f"{statistics.median(mine):,.0f}",
        "transformers, tokens/s": f"{statistics.median(other):,.0f}",
        "ratio": f"{peers.paired(other, mine):.2f}",
        "its experts": experts,
    }
    print("  " + ", ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)
    return row, dict(model=name, batch=batch, nanor1=mine, transformers=other)


def main() -> None:
    parser = argparse.ArgumentParser(description="our sampler beside transformers' generate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="prompts (default: 1 16 128; on cuda 1 16 128 256)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    peers.add_clock_flags(parser)
    parser.add_argument("--models", nargs="+", help="some of the device's models (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    given = parser.parse_args()
    peers.require_device(given.device)
    peers.require("transformers")
    peers.set_clock(given)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    rows, runs, differences = [], [], {}
    for name in given.models or MODELS[given.device]:
        model = peers.random_model(peers.config_of(name), given.device, dtype)
        with peers.scratch() as directory:
            peer = peers.peer_of(model, f"{directory}/model")
        differences[name] = peers.check_same(name, model, peer)
        for batch in given.batch or ((1, 16, 128) if given.device == "cpu" else (1, 16, 128, 256)):
            row, run = compare(name, model, peer, batch, given)
            rows.append(row)
            runs.append(run)
        del model, peer
        gc.collect()
    about = peers.machine(given.device, ("transformers",))
    details = dict(prompt=PROMPT, new=NEW[given.device], dtype=str(dtype), logits=differences)
    peers.report(rows, about, given.json, dict(**details, runs=runs))


if __name__ == "__main__":
    main()
