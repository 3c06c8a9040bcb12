"""Which model on which hardware: the memory of GRPO on a GPU, before anything is allocated.

    python -m runtime.memory                               all published models, as a table
    python -m runtime.memory --model qwen2.5-7b --recompute --offload
    python -m runtime.memory --model DIR --gpu-memory 24

A round has four phases, and what one needs the next may not: the rollout has a cache, the
reference's pass a second model, the backward pass gradients and activations, the step of the
optimizer its temporaries. The peak is the largest phase. With data parallel each GPU holds the
whole model: more GPUs make a round faster, not smaller.

Weights, gradients, states and cache are exact. Activations are what autograd keeps of each block
with the Triton kernels, counted by hand below and compared with a measurement in the tests; what
is short-lived ("working") is an estimate. What --ep spreads (sharding.py) is counted as whole. A GB
is 10^9 bytes, and a GPU of "80 GB" has 80 GiB: the 7 % between are left to CUDA, cuBLAS and
fragments.

It is no part of the method. Read next: optimizer.py.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from kernels.logprob import BUFFER
from model import Config as ModelConfig
from model import Transformer
from runtime import configs
from runtime.configs import PUBLISHED, from_json
from runtime.flags import UserError, flag, nearest, parse
from runtime.launch import launch
from runtime.optimizer import SLICE
from runtime.parallel import BUCKET

GB = 10**9
PAGE = 64  # tokens of a page of the sampler's cache, on a GPU


@dataclass(frozen=True)
class Inputs:
    """A run, as far as its memory goes."""

    model: ModelConfig
    dtype: str = "bfloat16"  # of the weights: bfloat16 or float32
    states: str = "master"  # of the optimizer, for bfloat16: master or rounding
    reference: bool = True
    offload_reference: bool = False  # on the CPU, but while it is asked
    offload_optimizer: bool = False  # states on the CPU, but during updates
    recompute: bool = False
    micro_tokens: int = 4096
    longest: int = 1536  # tokens of the longest row: prompt and output
    slots: int = 64
    cache_tokens: int = 0  # 0: room for every slot to write its longest output
    gpus: int = 1
    gpu_memory: float = 80.0  # GB

    def __post_init__(self):
        for name in ("micro_tokens", "longest", "slots", "gpus", "gpu_memory"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: more than 0")
        if self.dtype not in ("float32", "bfloat16") or self.states not in ("master", "rounding"):
            raise UserError(
                f"dtype {self.dtype}, states {self.states}: the planner knows float32 and bfloat16,"
                " master and rounding"
            )

    @property
    def bytes(self) -> int:
        """Of a weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def gradient_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" and self.states == "rounding" else 4

    @property
    def state_bytes(self) -> int:
        """Of the optimizer, a parameter."""
        return 8 if self.dtype == "float32" else {"master": 12, "rounding": 4}[self.states]

    @property
    def bytes_each(self) -> int:
        """Of a parameter that is trained, with its gradient and states."""
        return self.bytes + self.gradient_bytes + self.state_bytes

    @property
    def rows_tokens(self) -> int:
        """Tokens of a micro-batch: whole rows, at least one."""
        return max(1, self.micro_tokens // self.longest) * self.longest


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model, counted without allocating it."""

    parameters: int  # without multi-token prediction, as models are named
    trained: int  # the same: RL gives that layer no gradient
    stored: int  # with the routers' biases
    matrix: int  # the largest of a block


@dataclass(frozen=True)
class Plan:
    inputs: Inputs
    sizes: Sizes
    phases: dict[str, dict[str, int]]  # phase -> kind -> bytes on each GPU
    micro_tokens: int  # the largest that fits, in whole rows; 0: none
    slots: int  # the most that fit, each with room for its longest output; 0: none
    missing: int  # bytes, with one row at a time and one slot; 0: it fits
    advice: tuple[str, ...]

    @property
    def peak(self) -> int:
        return max(sum(kinds.values()) for kinds in self.phases.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.inputs.gpu_memory * GB

    @property
    def host(self) -> int:
        """Bytes of the CPU's memory, for each GPU, that hold what is away from it."""
        i, sizes = self.inputs, self.sizes
        reference = sizes.stored * i.bytes if i.reference and i.offload_reference else 0
        return reference + (sizes.trained * i.state_bytes if i.offload_optimizer else 0)


def count(config: ModelConfig) -> Sizes:
    with torch.device("meta"):
        model = Transformer(replace(config, num_nextn_predict_layers=0))  # as the recipes load it
    buffers = sum(buffer.numel() for buffer in model.buffers())
    matrix = max(p.numel() for p in model.model.layers.parameters())
    parameters = model.num_parameters()
    return Sizes(parameters, parameters, parameters + buffers, matrix)


# ---- bytes ---------------------------------------------------------------------------------------


def block_bytes(config: ModelConfig, moe: bool, b: int) -> tuple[int, int]:
    """What autograd keeps of one block for the backward pass, for numbers of b bytes: for each
    token, and once. Each tensor is counted where it is first kept."""
    D = config.hidden_size
    # Norms: x and, in fp32, 1 / rms. Projections: their input, the normed x.
    token = 2 * (2 * D * b + 4) + attention_bytes(config, b)
    if not moe:
        return token + 3 * config.intermediate_size * b, 0  # gate, up, hidden
    E, A, F = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    # The router, in fp32: x and its weights (copies of bf16's), scores, the chosen ones' (their
    # numbers, weights before and after the sum to 1).
    copied = 0 if b == 4 else 4 * D
    token += copied + 4 * E + A * (8 + 4 + b) + 4
    # Of each of the A copies: hidden, output, and where it comes from and goes to. The kernel makes
    # gate and up again.
    token += A * (F * b + D * b + 8 + 8)
    token += 3 * F * config.n_shared_experts * b
    return token, E * copied


def attention_bytes(config: ModelConfig, b: int) -> int:
    """Queries, keys, values and outputs, and for each head the log of its sum, in fp32."""
    H = config.num_attention_heads
    if config.kv_lora_rank is None:
        J, K = config.num_key_value_heads or H, config.gqa_head_dim
        normed = (H + J) * (K * b + 4) if config.model_type == "qwen3" else 0
        return 2 * (H + J) * K * b + 4 * H + normed
    K, R, U, C = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
                  config.kv_lora_rank)  # fmt: skip
    latents = (2 * C + R) * b + 4  # before the norm, with the rotated key; after it
    if config.q_lora_rank is not None:
        latents += 2 * config.q_lora_rank * b + 4
    keys = 2 * H * (K + R) * b  # and queries, put together
    return latents + keys + H * (K + U) * b + H * U * b + 4 * H  # values are a part of kv_b's


def activation_bytes(inputs: Inputs) -> int:
    """What autograd keeps of a micro-batch."""
    config, b, N = inputs.model, inputs.bytes, inputs.rows_tokens
    layers, D = config.num_hidden_layers, config.hidden_size
    moe = config.num_moe_layers
    sizes = [token * N + once for token, once in kinds_of_blocks(config, b)]
    if inputs.recompute:  # each block's input, and one block in full
        blocks = (layers - 1) * D * b * N + max(sizes)
    else:
        blocks = sizes[0] * (layers - moe) + sizes[-1] * moe
    dim = config.gqa_head_dim if config.kv_lora_rank is None else config.qk_rope_head_dim
    # The last norm, what linear_logprob is given, the turns of the rotary positions, indices.
    return blocks + N * (2 * D * b + 4 * dim + 40)


def kinds_of_blocks(config: ModelConfig, b: int) -> list[tuple[int, int]]:
    """`block_bytes` of a dense block and of one with experts, where there are such."""
    kinds = [False] * (config.num_moe_layers < config.num_hidden_layers)
    kinds += [True] * (config.num_moe_layers > 0)
    return [block_bytes(config, moe, b) for moe in kinds]


def cache_tokens(inputs: Inputs) -> int:
    """Tokens of the sampler's cache, in whole pages."""
    page = min(inputs.longest, PAGE)
    most = inputs.slots * -(-inputs.longest // page)
    return page * (min(most, inputs.cache_tokens // page) if inputs.cache_tokens else most)


def phases(inputs: Inputs, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Bytes on each GPU, by phase and kind."""
    config, b, g = inputs.model, inputs.bytes, inputs.gradient_bytes
    V, D, N = config.vocab_size, config.hidden_size, inputs.rows_tokens
    weights, gradients = sizes.stored * b, sizes.trained * g
    optimizer = sizes.trained * inputs.state_bytes
    reference = weights if inputs.reference else 0
    present = dict(
        weights=weights,
        optimizer=0 if inputs.offload_optimizer else optimizer,
        reference=0 if inputs.offload_reference else reference,
    )
    training = dict(present, gradients=gradients, optimizer=optimizer)
    block = max(token * N + once for token, once in kinds_of_blocks(config, b))
    # Sampling: a row of logits in the model's dtype and, to draw from, in fp32 and float64.
    drawing = inputs.slots * V * (2 * b + 20)
    cache = config.num_hidden_layers * cache_tokens(inputs) * config.cache_width * b
    # A pass without gradients: a block, and three fp32 numbers a row and tile of words, merged.
    asking = block + N * D * b + 20 * N * V // 256
    # linear_logprob's backward pass: a slice of logits, dx, dW and, where gradients are summed in
    # fp32, dW in fp32. Where head and embedding are one matrix, dW waits for the embedding's.
    head = V * D * b + (V * D * g if g != b or config.tie_word_embeddings else 0)
    scoring = min(BUFFER, N * V) * b + N * D * (4 + 2 * b) + head
    # A block's: gradients of at most what it keeps, and of two matrices, one of them summed.
    waiting = V * D * g if config.tie_word_embeddings else 0
    learning = block + sizes.matrix * (2 * b + g) + waiting
    # torch's AdamW makes fp32 temporaries of all parameters, ours of a slice. Several processes
    # add up their gradients in copies of a bucket.
    stepping = 4 * sizes.trained if inputs.dtype == "float32" else 56 * min(SLICE, sizes.trained)
    if inputs.gpus > 1:
        stepping = max(stepping, min(gradients, 2 * g * max(BUCKET, V * D, sizes.matrix)))
    found = dict(
        rollout=dict(present, cache=cache, working=drawing),
        reference=dict(present, reference=reference, working=asking),
        update=dict(training, activations=activation_bytes(inputs),
                    working=max(scoring, learning)),
        step=dict(training, working=stepping),
    )  # fmt: skip
    if not inputs.reference:
        del found["reference"]
    return found


# ---- what fits -----------------------------------------------------------------------------------


def plan(inputs: Inputs) -> Plan:
    """The memory of a run, the most that fits, and what would help where not even the least does.
    Nothing is allocated."""
    sizes, room = count(inputs.model), inputs.gpu_memory * GB

    def fit(names: tuple[str, ...], **changes: int) -> bool:
        found = phases(replace(inputs, **changes), sizes)
        return all(sum(found[name].values()) <= room for name in names if name in found)

    training = ("reference", "update", "step")
    rows = largest(lambda n: fit(training, micro_tokens=n * inputs.longest))
    slots = largest(lambda n: fit(("rollout",), slots=n, cache_tokens=0))
    missing = max(0, least(inputs, sizes) - int(room))
    advice = improvements(inputs, sizes) if missing else ()
    found = phases(inputs, sizes)
    return Plan(inputs, sizes, found, rows * inputs.longest, slots, missing, advice)


def largest(fits: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest number up to the limit that fits; all below it do. 0: none."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def least(inputs: Inputs, sizes: Sizes) -> int:
    """The peak with one row at a time and one slot."""
    small = replace(inputs, micro_tokens=inputs.longest, slots=1, cache_tokens=0)
    return max(sum(kinds.values()) for kinds in phases(small, sizes).values())


def improvements(inputs: Inputs, sizes: Sizes) -> tuple[str, ...]:
    """What each setting that is not used would save, and all of them."""
    rounding = "--dtype bfloat16 " * (inputs.dtype == "float32") + "--optimizer rounding"
    changes = {
        "--dtype bfloat16": dict(dtype="bfloat16", states="master"),
        rounding: dict(dtype="bfloat16", states="rounding"),
        "--offload": dict(offload_reference=True, offload_optimizer=True),
        "--recompute": dict(recompute=True),
    }
    before, room, lines = least(inputs, sizes), int(inputs.gpu_memory * GB), []
    everything = {key: value for change in changes.values() for key, value in change.items()}
    for name, change in {**changes, "all of them": everything}.items():
        after = least(replace(inputs, **change), sizes)
        if after < before and (name in changes or len(lines) > 1):
            rest = f"still {(after - room) / GB:.1f} GB short" if after > room else "fits"
            lines.append(f"{name}: {(before - after) / GB:.1f} GB less, {rest}")
    if least(replace(inputs, **everything), sizes) > room:
        lines.append(
            "a smaller model, or a larger GPU: here each GPU holds the whole model; --ep (sharding)"
            " spreads it over several, which this plan does not count"
        )
    return tuple(lines)


# ---- to read -------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan as text: GB by phase and kind, then what fits."""
    i, names = plan.inputs, list(plan.phases)
    unit, told, letter = (GB, "GB", "B") if plan.peak > GB / 2 else (GB / 1000, "MB", "M")
    states = "AdamW" if i.dtype == "float32" else f"states: {i.states}"
    lines = [
        f"{plan.sizes.parameters / unit:.2f}{letter} parameters, {i.dtype}, {states};"
        f" {told} on each GPU:",
        " " * 12 + "".join(f"{name:>11}" for name in names),
    ]
    kinds = ("weights", "reference", "gradients", "optimizer", "activations", "cache", "working")
    for kind in kinds:
        values = [plan.phases[name].get(kind, 0) / unit for name in names]
        if any(values):
            lines.append(f"{kind:<12}" + "".join(f"{value:11.2f}" for value in values))
    sums = [sum(plan.phases[name].values()) / unit for name in names]
    lines.append(f"{'together':<12}" + "".join(f"{value:11.2f}" for value in sums))
    if plan.host:
        lines.append(f"on the CPU, for each GPU: {plan.host / GB:.1f} GB")
    lines += verdict(plan)
    if i.gpus > 1:
        lines.append("Counted with a whole model on each GPU; --ep spreads it: less on each.")
    return "\n".join(lines)


def verdict(plan: Plan) -> list[str]:
    i = plan.inputs
    if plan.missing:
        head = (
            f"It does not fit {i.gpu_memory:g} GB: {plan.missing / GB:.1f} GB are missing, even"
            f" with one row of {i.longest} tokens at a time and one slot. What would help:"
        )
        return [head, *(f"  {line}" for line in plan.advice)]
    most = f"--micro-tokens up to {plan.micro_tokens}, --slots up to {plan.slots}"
    if plan.fits:
        return [f"It fits {i.gpu_memory:g} GB, and there is room for {most}."]
    return [
        f"It does not fit {i.gpu_memory:g} GB with --micro-tokens {i.micro_tokens} and --slots"
        f" {i.slots}; it does with {most}."
    ]


def device_memory() -> float:
    """GB of the GPU at hand, without what is left to CUDA; 80 where there is none."""
    if not torch.cuda.is_available():
        return 80.0
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def process_memory(device: torch.device | str) -> float:
    """Bytes that this process has to itself: its GPU's, or its share of the machine's."""
    if torch.device(device).type == "cuda":
        return device_memory() * GB
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (given := limit.read_text().strip()).isdigit():
        room = min(room, int(given))
    return room / local_processes()


def local_processes() -> int:
    """Processes of this run on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def bytes_each(dtype: torch.dtype, states: str | None) -> int:
    """Bytes of a parameter: its weight and, unless states is None, gradient and optimizer states,
    which `states` is for in bf16."""
    if states is None:
        return dtype.itemsize
    if dtype == torch.bfloat16:
        return Inputs(ModelConfig(), states=states).bytes_each
    return 4 * dtype.itemsize


@dataclass(frozen=True)
class Config:
    model: str | None = flag(None, "a published model's name or a directory (default: a table)")
    gpu_memory: float = flag(80.0, "GB of a GPU; 0: that of the GPU at hand")
    gpus: int = flag(1, "GPUs, each with the whole model")
    dtype: Literal["bfloat16", "float32"] = flag("bfloat16", "of the weights")
    optimizer: Literal["master", "rounding"] = flag("master", "states, for weights in bfloat16")
    reference: bool = flag(True, "hold a reference model")
    recompute: bool = flag(False, "keep only each block's input for the backward pass")
    offload: bool = flag(False, "reference and optimizer on the CPU while they are not needed")
    slots: int = flag(64, "outputs written at the same time")
    micro_tokens: int = flag(4096, "tokens of a micro-batch")
    max_prompt_tokens: int = flag(512, "longest question")
    max_new_tokens: int = flag(1024, "longest output")

    def inputs(self, model: ModelConfig) -> Inputs:
        return Inputs(
            model, self.dtype, self.optimizer, self.reference, self.offload, self.offload,
            self.recompute, self.micro_tokens, self.max_prompt_tokens + self.max_new_tokens,
            self.slots, gpus=self.gpus, gpu_memory=self.gpu_memory or device_memory(),
        )  # fmt: skip


def read_config(name: str) -> ModelConfig:
    """Of a published model, by name, or of a directory. Raises UserError where it is neither."""
    if name in PUBLISHED:
        return from_json(PUBLISHED[name])
    if not Path(name).is_dir():
        raise UserError(
            f"--model {name}: no such directory, and not one of {', '.join(PUBLISHED)}"
            + nearest(name, list(PUBLISHED))
        )
    return configs.read_config(Path(name))


COLUMNS = {
    "fp32": dict(dtype="float32"),
    "bf16 + master": dict(dtype="bfloat16", states="master"),
    "bf16 + rounding": dict(dtype="bfloat16", states="rounding"),
}


def overview(config: Config) -> str:
    """All published models, as a markdown table: GB at the peak; offloaded behind the stroke."""
    memory = config.gpu_memory or device_memory()
    heads = ["model", "parameters", "weights in bf16", *COLUMNS, f"1 x {memory:g} GB",
             f"8 x {memory:g} GB"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in PUBLISHED:
        given = config.inputs(read_config(name))
        sizes = count(given.model)
        cells = [name, f"{sizes.parameters / GB:.2f}B", f"{2 * sizes.stored / GB:.1f}"]
        peaks: dict[int, dict[str, float]] = {1: {}, 8: {}}
        for title, change in COLUMNS.items():
            for gpus in peaks:
                for off in (False, True):
                    moved = dict(offload_reference=off, offload_optimizer=off, gpus=gpus)
                    found = phases(replace(given, **change, **moved), sizes).values()
                    peak = max(sum(kinds.values()) for kinds in found) / GB
                    peaks[gpus][title + ", offload" * off] = peak
            both = peaks[1][title], peaks[1][f"{title}, offload"]
            cells.append(" / ".join(f"{value:.0f}" for value in both))
        for gpus, found in peaks.items():
            cells.append(next((k for k, v in found.items() if v <= memory), "needs sharding"))
        lines.append(f"| {' | '.join(cells)} |")
    kept = "one block at a time" if config.recompute else "all blocks"
    lines += [
        "",
        "GB on a GPU at the peak of GRPO; behind the stroke with --offload. 8 GPUs, data parallel:"
        " each holds the whole model.",
        f"{config.micro_tokens} tokens of a micro-batch, {config.slots} slots, rows of"
        f" {given.longest} tokens, activations of {kept}.",
    ]
    return "\n".join(lines)


def main(config: Config) -> None:
    if config.model is None:
        return print(overview(config))
    print(table(plan(config.inputs(read_config(config.model)))))


if __name__ == "__main__":
    launch(main, parse(Config, {}))
