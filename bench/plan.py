"""How long a run takes on how many GPUs, and what bounds it: RL at scale, from formulas alone.

    python -m bench.plan                                  R1-Zero's run: DeepSeek-V3 on 512 H800
    python -m bench.plan --model qwen2.5-7b --gpus 8 --gpu H100 --outputs 1024 --minibatches 4 \
        --mean-tokens 2000 --longest 8192

Nothing is measured or allocated. A synchronous round as DeepSeek-R1 has it: all GPUs write, then
ask the reference, then learn, and what a phase does not need waits on the CPU. Weights, gradients
and states are sharded over all GPUs (FSDP, ZeRO-3) and gathered for each micro-batch, experts
spread over `ep` GPUs, a long row over `cp`. While writing, each GPU has all but the experts.

DeepSeek trained with 16 pipeline stages, which are not here. Left out: rewards and tools, faults,
prediction modules, FP8 in the time of compute, uneven experts, the keys that the GPUs of a row
pass on. Read next: runtime/memory.py, the bytes of one GPU that holds the whole model.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from model import Config as ModelConfig
from model import Transformer
from runtime.flags import UserError, flag, parse
from runtime.launch import launch
from runtime.memory import GB, Inputs, activation_bytes, kinds_of_blocks, read_config

NODE = 8  # GPUs that NVLink joins
WEIGHT, GRADIENT, STATES = 2, 4, 12  # bytes of a parameter: bf16, fp32, AdamW with a master copy
DISPATCH, COMBINE = 1, 2  # bytes of a number on its way to an expert (FP8) and back (bf16)


@dataclass(frozen=True)
class Hardware:
    """A GPU, in operations, bytes, and bytes a second."""

    flops: float  # bf16, dense
    memory_rate: float
    memory: float
    nvlink: float  # each way
    ib: float  # each way, of a GPU's own card
    host: float  # PCIe


HARDWARE = {
    # Data sheets. Of 200 and 50 GB/s DeepSeek finds 160 (DeepEP) and 40 (2505.09343) usable.
    "H800": Hardware(989e12, 3.35e12, 80e9, 200e9, 50e9, 64e9),
    "H100": Hardware(989e12, 3.35e12, 80e9, 450e9, 50e9, 64e9),
    "A100": Hardware(312e12, 2.04e12, 80e9, 300e9, 25e9, 32e9),
}


@dataclass(frozen=True)
class Config:
    model: str = flag("deepseek-v3", "a published model's name or a directory")
    gpu: Literal["H800", "H100", "A100"] = flag("H800", "kind of GPU")
    gpus: int = flag(512, "GPUs, which all do each phase together")
    ep: int = flag(0, "GPUs that the experts are spread over; 0: as many as fit, up to 64")
    cp: int = flag(0, "GPUs that share a row while training; 0: those of a node")
    outputs: int = flag(8192, "outputs of a round")
    prompt_tokens: int = flag(512, "tokens of a question")
    mean_tokens: int = flag(10000, "tokens of an output, on average over the run")
    longest: int = flag(32768, "tokens of the longest output: the cap, which some output reaches")
    minibatches: int = flag(16, "optimizer steps in a round")
    rounds: int = flag(650, "rounds of the run")
    micro_rows: int = flag(1, "longest rows that a micro-batch has room for")
    reference: bool = flag(True, "ask a reference model")
    recompute: bool = flag(True, "keep only each block's input, for a third more compute")
    rollout_dtype: Literal["bfloat16", "float8"] = flag("bfloat16", "weights that write")
    accepted: float = flag(0.0, "share of drafted tokens accepted, one drafted a step; 0: no draft")
    speed: float = flag(0.0, "tokens/s that one output is written at; 0: by the formulas")
    mfu: float = flag(0.39, "share of the peak that matrices reach")
    memory_share: float = flag(0.8, "share of the memory's bandwidth that decoding reaches")
    network_share: float = flag(0.8, "share of NVLink's, InfiniBand's and PCIe's bandwidth")
    latency: float = flag(30.0, "microseconds of a dispatch or combine in decoding, besides bytes")
    tflops: float = flag(0.0, "TFLOP/s of a GPU in bf16; 0: by its kind, as the five below")
    memory_rate: float = flag(0.0, "TB/s of a GPU's memory")
    gpu_memory: float = flag(0.0, "GB of a GPU's memory")
    nvlink: float = flag(0.0, "GB/s of NVLink each way")
    ib: float = flag(0.0, "GB/s of a GPU's InfiniBand each way")
    host: float = flag(0.0, "GB/s to the CPU's memory")

    def __post_init__(self):
        limits = dict.fromkeys(("gpus", "outputs", "mean_tokens", "longest", "minibatches",
                                "micro_rows", "rounds"), (1, math.inf))  # fmt: skip
        limits |= dict(mfu=(0.01, 1), memory_share=(0.01, 1), network_share=(0.01, 1))
        limits |= dict(accepted=(0, 1), mean_tokens=(1, self.longest))
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = limits.get(field.name, (0, math.inf))
            if isinstance(value, (int, float)) and not low <= value <= high:
                most = "" if high == math.inf else f", at most {high}"
                raise UserError(f"--{field.name.replace('_', '-')} {value}: at least {low}{most}")
        if self.gpus % min(NODE, self.gpus):
            raise UserError(f"--gpus {self.gpus}: fewer than {NODE}, or whole nodes of {NODE}")
        if self.cp and self.gpus % self.cp:
            raise UserError(f"--cp {self.cp}: it must divide --gpus {self.gpus}")


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, without the prediction module, which RL does not train."""

    total: int
    experts: int  # of these, in routed experts
    active: int  # that a token uses, embedding and head among them, as DeepSeek counts
    multiplied: int  # the same without the embedding, which is looked up
    block: int  # of the largest block, without its routed experts

    @property
    def dense(self) -> int:
        return self.total - self.experts


@dataclass(frozen=True)
class Run:
    """What the flags ask for, with the model counted and what its GPUs reach of their peaks."""

    config: Config
    model: ModelConfig
    sizes: Sizes
    peak: Hardware
    usable: Hardware
    ep: int
    cp: int

    @property
    def row(self) -> int:
        """Tokens of the longest row: question and output."""
        return self.config.prompt_tokens + self.config.longest

    @property
    def context(self) -> float:
        """Tokens that a token sees, on average. Of outputs of length L that is E[L^2] / 2 E[L]: as
        if lengths fell off exponentially, but no more than a mix of none and all would give."""
        return self.config.prompt_tokens + min(self.config.mean_tokens, self.config.longest / 2)

    @property
    def rollout_bytes(self) -> int:
        """Of a weight."""
        return 1 if self.config.rollout_dtype == "float8" else 2


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    bound: str
    parts: dict[str, float]  # seconds that each part would take alone
    tokens: float  # of all GPUs
    moved: dict[str, float]  # bytes that come to each GPU


def count(config: ModelConfig) -> Sizes:
    with torch.device("meta"):
        model = Transformer(config)
    experts, dense = 0, []
    for layer in list(model.model.layers)[: config.num_hidden_layers]:
        numbers = {name: p.numel() for name, p in layer.named_parameters()}
        routed = sum(n for name, n in numbers.items() if name.startswith("mlp.experts."))
        experts, dense = experts + routed, [*dense, sum(numbers.values()) - routed]
    total, E = model.num_parameters(), config.n_routed_experts or 1
    active = total - experts * (E - config.num_experts_per_tok) // E
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return Sizes(total, experts, active, active - looked_up, max(dense))


def prepare(config: Config, sizes: Sizes | None = None) -> Run:
    """Counts the model, unless its sizes are given. Raises UserError for a parallelism that the
    model or the GPUs can't have."""
    c, model = config, read_config(config.model)
    given = Hardware(c.tflops * 1e12, c.memory_rate * 1e12, c.gpu_memory * GB, c.nvlink * GB,
                     c.ib * GB, c.host * GB)  # fmt: skip
    peak = replace(HARDWARE[c.gpu], **{k: v for k, v in vars(given).items() if v})
    network = {name: getattr(peak, name) * c.network_share for name in ("nvlink", "ib", "host")}
    usable = replace(peak, flops=peak.flops * c.mfu, memory_rate=peak.memory_rate * c.memory_share,
                     **network)  # fmt: skip
    E = model.n_routed_experts or 1
    allowed = [n for n in range(1, E + 1) if E % n == 0 and c.gpus % n == 0]
    ep = c.ep or max(n for n in allowed if n <= 64)
    if ep not in allowed:
        raise UserError(
            f"--ep {ep}: {E} experts and {c.gpus} GPUs allow {', '.join(map(str, allowed))}"
        )
    return Run(c, model, sizes or count(model), peak, usable, ep, c.cp or min(NODE, c.gpus))


# ---- operations and bytes ------------------------------------------------------------------------


def forward_flops(run: Run, context: float, decode: bool = False) -> float:
    """Of a token that sees `context` tokens: two for each weight, and for each number of a key and
    of a value that a head reads. A training step is three of these. In decoding MLA's heads read
    latents and rotated keys, not keys and values."""
    m = run.model
    if m.kv_lora_rank is None:
        numbers = 2 * m.gqa_head_dim
    elif decode:
        numbers = 2 * m.kv_lora_rank + m.qk_rope_head_dim
    else:
        numbers = m.qk_nope_head_dim + m.qk_rope_head_dim + m.v_head_dim
    attention = m.num_hidden_layers * m.num_attention_heads * numbers * context
    return 2 * (run.sizes.multiplied + attention)


def cache_bytes(model: ModelConfig) -> int:
    """Of a token, in bf16."""
    return model.num_hidden_layers * model.cache_width * 2


def exchange_bytes(run: Run, direct: bool = False) -> tuple[int, int]:
    """Of a token in one layer, to its experts and back: over InfiniBand, over NVLink. At most: as
    if no expert were at home. A node gets one copy and passes it on; a direct one goes per expert.
    """
    m, nodes = run.model, -(-run.ep // NODE)
    if run.ep == 1:
        return 0, 0
    copy, A = m.hidden_size * (DISPATCH + COMBINE), m.num_experts_per_tok
    reached = min(A, m.topk_group * max(1, nodes // m.n_group), nodes - 1)
    return copy * (A if direct and nodes > 1 else reached), copy * min(A, run.ep - 1)


def exchange(run: Run, tokens: float, direct: bool = False) -> tuple[float, float]:
    """Bytes (over InfiniBand, if any go there) and seconds for the experts of all layers, once:
    tokens of one GPU, all GPUs at the same time."""
    ib, nvlink = (n * tokens * run.model.num_moe_layers for n in exchange_bytes(run, direct))
    return ib or nvlink, max(ib / run.usable.ib, nvlink / run.usable.nvlink)


def gather(run: Run, b: int) -> tuple[float, float]:
    """Bytes and seconds until each GPU has seen all weights of b bytes that are not experts', and
    those of its experts. To reduce and scatter gradients is the same the other way."""
    gpus, near = run.config.gpus, min(NODE, run.config.gpus)
    dense = (run.sizes.dense, gpus, near)
    experts = (run.sizes.experts / run.ep, gpus // run.ep, max(1, near // run.ep))
    moved = seconds = 0.0
    for numbers, ranks, same in (dense, experts):
        # The GPUs of a node that want the same share their cards, and pass it on by NVLink.
        rate = run.usable.ib * same if ranks > same else run.usable.nvlink
        rate = min(rate, run.usable.nvlink) if same > 1 else rate
        moved += numbers * b * (1 - 1 / ranks)
        seconds += numbers * b * (1 - 1 / ranks) / rate
    return moved, seconds


# ---- memory --------------------------------------------------------------------------------------


def memory(run: Run) -> dict[str, dict[str, float]]:
    """Bytes on each GPU, by phase and kind."""
    c, s, m = run.config, run.sizes, run.model
    shard, tokens = s.total / c.gpus, -(-c.micro_rows * run.row // run.cp)
    inputs = Inputs(m, recompute=c.recompute, micro_tokens=1, longest=tokens)
    # A block and the one that is fetched ahead; embedding and head stay.
    ends = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
    block = s.block + s.experts / max(1, m.num_moe_layers) / run.ep
    gathered = WEIGHT * (ends + 2 * block)
    passing = max(token * tokens + once for token, once in kinds_of_blocks(m, 2))
    found = dict(
        rollout=dict(weights=rollout_weights(run), cache=slots(run) * row_cache(run)),
        reference=dict(weights=shard * WEIGHT, gathered=gathered, activations=passing),
        update=dict(weights=shard * WEIGHT, gradients=shard * GRADIENT, optimizer=shard * STATES,
                    gathered=gathered + GRADIENT * (ends + block),
                    activations=activation_bytes(inputs)),
    )  # fmt: skip
    if not c.reference:
        del found["reference"]
    return found


def rollout_weights(run: Run) -> float:
    """All but the experts is on each GPU."""
    return run.rollout_bytes * (run.sizes.dense + run.sizes.experts / run.ep)


def row_cache(run: Run) -> float:
    """Bytes of an output's cache: rows come and go, so of the average one."""
    return cache_bytes(run.model) * (run.config.prompt_tokens + run.config.mean_tokens)


def slots(run: Run) -> int:
    """Outputs that a GPU writes at the same time: all of its own, or as many as its memory holds
    (at least one, whether it fits or not)."""
    c = run.config
    room = (run.usable.memory - rollout_weights(run)) // row_cache(run)
    return max(1, min(-(-c.outputs // c.gpus), int(room)))


# ---- time ----------------------------------------------------------------------------------------


def decode_step(run: Run, rows: float, context: float) -> dict[str, float]:
    """Seconds that a GPU's next token of `rows` outputs takes, by what bounds them. Reading and
    computing overlap; the network waits for both."""
    c, m, s = run.config, run.model, run.sizes
    tokens = rows * (2 if c.accepted else 1)  # with the drafted one
    A, E = m.num_experts_per_tok, m.n_routed_experts or m.num_experts_per_tok
    touched = 1 - (1 - A / E) ** (tokens * run.ep)  # experts that some token has chosen
    weights = s.dense - (s.active - s.multiplied) + s.experts / run.ep * touched
    read = weights * run.rollout_bytes + rows * context * cache_bytes(m)
    network = exchange(run, tokens, direct=True)[1]
    network += 2 * m.num_moe_layers * c.latency * 1e-6 if run.ep > 1 else 0.0
    compute = tokens * forward_flops(run, context, decode=True) / run.usable.flops
    return {"compute": compute, "memory": read / run.usable.memory_rate, "network": network}


def together(step: dict[str, float]) -> float:
    return max(step["compute"], step["memory"]) + step["network"]


def rollout(run: Run) -> Phase:
    """As long as the work takes with all slots busy, and at least as long as the longest output
    takes: one token after the other, beside as many others as are still written on average. A
    given speed is both's."""
    c, n = run.config, slots(run)
    rows, each = -(-c.outputs // c.gpus), 1 + c.accepted
    tokens = rows * c.mean_tokens
    prefill = rows * c.prompt_tokens * forward_flops(run, c.prompt_tokens / 2) / run.usable.flops
    busy = {k: v * tokens / n / each for k, v in decode_step(run, n, run.context).items()}
    step = together(decode_step(run, min(n, tokens / c.longest), run.context))
    alone = c.longest * (1 / c.speed if c.speed else step / each)
    work = tokens / n / c.speed if c.speed else together(busy)
    parts = {**busy, "longest": alone}
    bound = "longest rollout" if alone >= work else max(busy, key=busy.get)
    moved = dict(tokens=exchange(run, tokens, direct=True)[0])
    written = c.outputs * c.mean_tokens
    return Phase("rollout", prefill + max(work, alone), bound, parts, written, moved)


def passes(run: Run, name: str, steps: int, backward: bool) -> Phase:
    """Over all tokens of a round, in so many steps. Network and compute overlap, and no step ends
    before the GPUs that share its longest row are ready."""
    c, again = run.config, int(run.config.recompute)
    tokens = c.outputs * (c.prompt_tokens + c.mean_tokens) / c.gpus / steps
    forwards, exchanges = (3 + again, 2 + again) if backward else (1, 1)
    room = c.micro_rows * run.row / run.cp
    rate, micro_batches = run.usable.flops / forwards, math.ceil(tokens / room)
    # Backward, weights are gathered once more, and gradients scattered.
    sent = {"weights": gather(run, WEIGHT), "gradients": gather(run, GRADIENT)}
    times = {"weights": micro_batches * (1 + backward), "gradients": micro_batches * backward}
    sent, times = sent | {"tokens": exchange(run, tokens)}, times | {"tokens": exchanges}
    moved = {kind: steps * times[kind] * each for kind, (each, _) in sent.items()}
    alone = {
        "compute": tokens * forward_flops(run, run.context) / rate,
        "network": sum(times[kind] * seconds for kind, (_, seconds) in sent.items()),
        "longest": run.row * forward_flops(run, run.row / 2) / rate / run.cp,
    }
    bound = max(alone, key=alone.get)
    alone = {part: steps * seconds for part, seconds in alone.items()}
    said = "longest row" if bound == "longest" else bound
    return Phase(name, alone[bound], said, alone, steps * tokens * c.gpus, moved)


def phases(run: Run) -> list[Phase]:
    """Of a round, one after the other."""
    c, found = run.config, [rollout(run)]
    if c.reference:
        found.append(passes(run, "reference", 1, backward=False))
    found.append(passes(run, "update", c.minibatches, backward=True))
    away = run.sizes.total / c.gpus * (WEIGHT + STATES + WEIGHT * c.reference)
    moved, seconds = gather(run, run.rollout_bytes)
    parts = {"network": seconds, "host": 2 * away / run.usable.host}  # there and back
    bound = max(parts, key=parts.get)
    return [*found, Phase("weights", sum(parts.values()), bound, parts, 0, dict(weights=moved))]


# ---- to read -------------------------------------------------------------------------------------


def head(run: Run) -> list[str]:
    c, s, p = run.config, run.sizes, run.peak
    flops = 3 * forward_flops(run, 2048)
    hours = 1e12 * flops / run.usable.flops / 3600
    return [
        f"{c.model}: {s.total / GB:.2f}B parameters, {s.active / GB:.2f}B active, embedding and"
        f" head among them; {cache_bytes(run.model):,} bytes of cache a token",
        f"Training at a context of 4,096: {flops / GB:.1f} GFLOP a token, {hours / 1000:.1f}K"
        " GPU-hours a trillion tokens",
        f"{c.gpus} x {c.gpu}: {p.flops / 1e12:g} TFLOP/s, {p.memory / GB:g} GB at"
        f" {p.memory_rate / 1e12:g} TB/s; NVLink {p.nvlink / GB:g}, InfiniBand {p.ib / GB:g} GB/s"
        " each way, nominal",
        f"States over {c.gpus} GPUs, {f'experts over {run.ep}, ' if run.model.is_moe else ''}a long"
        f" row over {run.cp}; a round of {c.outputs:,} outputs of {c.mean_tokens:,} tokens on"
        f" average, at most {c.longest:,}",
    ]


def memory_table(run: Run) -> list[str]:
    found = memory(run)
    kinds = list(dict.fromkeys(kind for phase in found.values() for kind in phase))
    lines = ["GB on each GPU" + "".join(f"{name:>12}" for name in found)]
    for kind in kinds:
        values = [phase.get(kind, 0.0) / GB for phase in found.values()]
        if any(values):
            lines.append(f"  {kind:<12}" + "".join(f"{value:12.2f}" for value in values))
    sums = {name: sum(phase.values()) for name, phase in found.items()}
    lines.append(f"  {'together':<12}" + "".join(f"{each / GB:12.2f}" for each in sums.values()))
    worst, room = max(sums, key=sums.get), run.peak.memory
    if sums[worst] <= room:
        return [*lines, f"It fits {room / GB:g} GB, with {slots(run)} outputs at a time on a GPU."]
    short = (sums[worst] - room) / GB
    return [*lines, f"It does NOT fit {room / GB:g} GB: {worst} is {short:.1f} GB short (more"
            " --gpus, --ep or --cp, --rollout-dtype float8, a shorter --longest)."]  # fmt: skip


def time_table(run: Run) -> list[str]:
    found, kinds, c = phases(run), ("compute", "memory", "network", "longest", "host"), run.config
    total = sum(phase.seconds for phase in found)
    title = "".join(f"{kind:>9}" for kind in kinds)
    lines = [f"{'phase':<10}{'seconds':>9}  {'bound by':<16}{'tokens/s':>10} | alone:{title}"]
    for p in found:
        rate = f"{p.tokens / p.seconds:,.0f}" if p.tokens else ""
        parts = "".join(f"{p.parts[k]:9.1f}" if k in p.parts else " " * 9 for k in kinds)
        lines.append(f"{p.name:<10}{p.seconds:9.1f}  {p.bound:<16}{rate:>10} |       {parts}")
    hours = c.rounds * total / 3600
    lines.append(f"{'a round':<10}{total:9.1f}")
    alone = found[0].parts
    work = max(alone["compute"], alone["memory"]) + alone["network"]
    lines.append(
        f"The longest output is written at {c.longest / alone['longest']:.1f} tokens/s; all of"
        f" them, in full batches, would take {work:.0f} s."
    )
    lines.append(f"{c.rounds} rounds: {hours:,.0f} hours, {hours * c.gpus:,.0f} GPU-hours")
    return lines


def moved_table(run: Run) -> list[str]:
    kinds = ("weights", "gradients", "tokens")
    lines = ["GB to each GPU, a round" + "".join(f"{kind:>11}" for kind in kinds)]
    for p in phases(run):
        lines.append(f"{p.name:<23}" + "".join(f"{p.moved.get(k, 0) / GB:11.0f}" for k in kinds))
    return [*lines, "Tokens: to experts in FP8 and back in bf16, the same again for gradients."]


def decode_table(run: Run) -> list[str]:
    lines = [f"Decoding at {run.context:,.0f} tokens of context: outputs a GPU, tokens/s of one, of"
             " a GPU, bound by"]  # fmt: skip
    for rows in (1, 4, 16, 64, 256):
        step = decode_step(run, rows, run.context)
        speed = (1 + run.config.accepted) / together(step)
        fits = rollout_weights(run) + rows * row_cache(run) <= run.peak.memory
        bound = max(step, key=step.get) + ("" if fits else ", beyond the GPU's memory")
        lines.append(f"{rows:6}{speed:10.1f}{rows * speed:10.0f}  {bound}")
    return lines


def what_if(run: Run) -> list[str]:
    """A round's seconds where one thing is otherwise."""
    c, lines = run.config, ["A round's seconds with"]
    for text, change in {
        "--rollout-dtype float8": dict(rollout_dtype="float8"),
        "--accepted 0.85": dict(accepted=0.85),
        "--memory-share 0.6": dict(memory_share=0.6),
        "--mfu 0.25": dict(mfu=0.25),
        "--cp 1": dict(cp=1),
        f"--mean-tokens {c.mean_tokens // 2}": dict(mean_tokens=max(1, c.mean_tokens // 2)),
        f"--longest {2 * c.longest}": dict(longest=2 * c.longest),
        f"--gpus {2 * c.gpus}": dict(gpus=2 * c.gpus),
    }.items():
        try:
            other = prepare(replace(c, **change), run.sizes)
        except UserError:  # not whole nodes, say
            continue
        lines.append(f"  {text:<25}{sum(phase.seconds for phase in phases(other)):8.0f}")
    return lines


def report(run: Run) -> str:
    c = run.config
    guesses = [
        f"Guesses: {c.mfu:.0%} of the peak (V3's pre-training; a round may reach less),"
        f" {c.memory_share:.0%} of the memory's and {c.network_share:.0%} of the network's"
        f" bandwidth, {c.latency:g} us",
        "a dispatch, how lengths spread, rows of the longest kind in each step, and that network"
        " and compute overlap",
        "in training, not in decoding. --speed takes a measured one.",
    ]
    tables = (head, memory_table, time_table, moved_table, decode_table, what_if)
    parts = [*(table(run) for table in tables), guesses]
    return "\n\n".join("\n".join(part) for part in parts)


def main(config: Config) -> None:
    print(report(prepare(config)))


if __name__ == "__main__":
    launch(main, parse(Config, {}))
