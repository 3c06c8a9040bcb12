"""Sampling: the rollouts of RL, the evaluation of the paper (section 3), and a command to ask.

`generate` is the engine. Each of its `slots` is a row of a static cache; a prompt is prefilled once
for all its outputs; as soon as a row finishes, its slot goes to the next request. The random
numbers of a row depend on (seed, row) alone, so its tokens don't depend on its neighbours, the
number of slots or of processes (but for rounding, where two tokens are equally likely).

    python sample.py --model runs/zero/model                       one question a line
    python sample.py --model runs/zero/model --prompt "compute 7 a +5 b *3 ?"
    python sample.py --model runs/zero/model --data FILE.jsonl --samples 16     pass@1, cons@16

Read next: rewards.py, then grpo.py.
"""

import codecs
import math
import operator
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean as mean
from statistics import stdev
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import rewards
from data.problems import Problem, load
from data.prompts import build_prompt
from data.tokenizer import Tokenizer
from kernels import full
from model import Transformer
from runtime import parallel
from runtime.pretrained import load_pretrained
from runtime.run import UserError, flag, launch, parse, pick_device, progress


@dataclass
class Output:
    """What the model wrote after a prompt. A stop token, if one came, is its last token: it was
    chosen like any other, and RL has to reward or punish that choice."""

    tokens: list[int]
    logprobs: list[float]  # of the distribution each token was drawn from
    finish: str  # "stop" or "length"
    routes: Tensor | None = None  # (prompt + output - 1, M, A): the experts each token went to


def choose(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Tokens drawn by inversion: the first whose cumulative probability exceeds the uniform number;
    and their log-probabilities under what was drawn from. Temperature 0 takes the best token, with
    probability one."""
    logits_BV = full(logits_BV)
    if temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, torch.zeros_like(tokens_B, dtype=logits_BV.dtype)
    logprobs_BV = F.log_softmax(logits_BV / temperature, -1)
    if top_p < 1:
        # The fewest tokens that together reach top_p, renormalised.
        ordered_BV, order_BV = logprobs_BV.sort(-1, descending=True)
        before_BV = ordered_BV.exp().cumsum(-1) - ordered_BV.exp()
        dropped_BV = torch.empty_like(before_BV, dtype=torch.bool).scatter_(
            -1, order_BV, before_BV >= top_p
        )
        logprobs_BV = F.log_softmax(logprobs_BV.masked_fill(dropped_BV, -math.inf), -1)
    cumulative_BV = logprobs_BV.exp().double().cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    tokens_B = tokens_B.clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def random_stream(seed: int, row: int, length: int) -> np.ndarray:
    """The uniform numbers in [0, 1) that one row consumes, one for each token."""
    return np.random.Generator(np.random.Philox(key=[seed, row])).random(length)


class Slots:
    """The rows being written: their cache, the logits to draw from next, what they have so far."""

    def __init__(
        self, model: Transformer, count: int, width: int, max_new_tokens: int, routes: bool
    ):
        config, device = model.config, model.lm_head.weight.device
        self.model, self.count, self.width = model, count, width
        self.request = [-1] * count  # which request a slot works on; -1: free
        self.cache_MBSX = model.new_cache(count, min(width, 256))  # grows when it has to
        self.logits_BV = torch.zeros(
            count, config.vocab_size, device=device, dtype=self.cache_MBSX.dtype
        )
        self.position_B = torch.zeros(count, dtype=torch.long, device=device)  # of the next token
        self.written_B = torch.zeros(count, dtype=torch.long, device=device)
        self.tokens_BT = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros(count, max_new_tokens, dtype=torch.float64, device=device)
        self.uniform_BT = torch.zeros(count, max_new_tokens, dtype=torch.float64, device=device)
        self.routes_BSMA = None
        if routes and config.num_moe_layers:
            shape = (count, width, config.num_moe_layers, config.num_experts_per_tok)
            self.routes_BSMA = torch.full(shape, -1, dtype=torch.int16, device=device)

    def free(self) -> list[int]:
        return [slot for slot, request in enumerate(self.request) if request < 0]

    def assign(
        self, slots: list[int], requests: list[int], prefix: "Prefix", streams: np.ndarray
    ) -> None:
        """Give the slots to requests that share one prompt."""
        for slot, request in zip(slots, requests):
            self.request[slot] = request
        length = prefix.cache_MSX.shape[1]
        self.reserve(length)
        self.cache_MBSX[:, slots, :length] = prefix.cache_MSX.unsqueeze(1)
        self.logits_BV[slots] = prefix.logits_V
        self.position_B[slots] = length
        self.written_B[slots] = 0
        self.uniform_BT[slots] = torch.from_numpy(streams).to(self.uniform_BT.device)
        if self.routes_BSMA is not None:
            self.routes_BSMA[slots, :length] = prefix.routes_SMA

    def reserve(self, length: int) -> None:
        """Make room for so many tokens in each slot. Few outputs come near the longest allowed, so
        the cache doubles on demand."""
        old_MBSX = self.cache_MBSX
        if length > old_MBSX.shape[2]:
            room = min(self.width, max(length, 2 * old_MBSX.shape[2]))
            self.cache_MBSX = self.model.new_cache(self.count, room)
            self.cache_MBSX[:, :, : old_MBSX.shape[2]] = old_MBSX

    def draw(self, temperature: float, top_p: float) -> Tensor:
        """One more token in every slot, B."""
        at_B1 = self.written_B[:, None]
        uniform_B = self.uniform_BT.gather(1, at_B1)[:, 0]
        tokens_B, logprobs_B = choose(self.logits_BV, uniform_B, temperature, top_p)
        self.tokens_BT.scatter_(1, at_B1, tokens_B[:, None])
        self.logprobs_BT.scatter_(1, at_B1, logprobs_B.double()[:, None])
        self.written_B += 1
        return tokens_B

    def advance(self, tokens_B: Tensor) -> None:
        """Feed the drawn tokens; what the model says next goes to `logits_BV`."""
        # Only the filled part of the cache is read, in steps of 16 so that shapes repeat.
        filled = min(self.width, -(-(int(self.position_B.max()) + 1) // 16) * 16)
        self.reserve(filled)
        hidden_B1D, routings = self.model.hidden(
            tokens_B[:, None], self.position_B[:, None], cache_MBSX=self.cache_MBSX[:, :, :filled]
        )
        self.logits_BV = self.model.lm_head(hidden_B1D[:, 0])
        if self.routes_BSMA is not None:
            rows_B = torch.arange(self.count, device=tokens_B.device)
            self.routes_BSMA[rows_B, self.position_B] = chosen_experts(routings)[:, 0]
        self.position_B += 1

    def take(self, slot: int, finish: str) -> Output:
        """The finished output of a slot, which becomes free."""
        n, end = int(self.written_B[slot]), int(self.position_B[slot])
        self.request[slot] = -1
        self.position_B[slot] = self.written_B[slot] = 0
        routes = None if self.routes_BSMA is None else self.routes_BSMA[slot, :end].cpu().clone()
        return Output(
            self.tokens_BT[slot, :n].tolist(), self.logprobs_BT[slot, :n].tolist(), finish, routes
        )

    def shrink(self, keep: list[int]) -> None:
        """Drop all other slots: nothing waits for them, and they cost time."""
        self.request = [self.request[slot] for slot in keep]
        self.count = len(keep)
        self.cache_MBSX = self.cache_MBSX[:, keep]
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "cache_MBSX":
                setattr(self, name, value[keep])


@dataclass
class Prefix:
    """A prompt that has been read: what every output of it starts from."""

    cache_MSX: Tensor
    logits_V: Tensor
    routes_SMA: Tensor | None


def prefill(model: Transformer, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
    """Read prompts of any lengths together. They are padded at the end, where nothing that comes
    before can see the padding."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens_BT = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    cache_MBSX = model.new_cache(*tokens_BT.shape)
    positions_BT = torch.arange(tokens_BT.shape[1], device=device).expand(tokens_BT.shape)
    hidden_BTD, routings = model.hidden(tokens_BT.to(device), positions_BT, cache_MBSX=cache_MBSX)
    last_BD = hidden_BTD[torch.arange(len(prompts)), lengths - 1]
    logits_BV = model.lm_head(last_BD)
    routes = chosen_experts(routings) if routings else [None] * len(prompts)
    return [
        Prefix(
            cache_MBSX[:, b, :n].clone(), logits_BV[b], None if routes[b] is None else routes[b][:n]
        )
        for b, n in enumerate(lengths.tolist())
    ]


def chosen_experts(routings: list) -> Tensor:
    """BTMA, the experts of all MoE layers."""
    return torch.stack([routing.experts_BTA for routing in routings], 2).to(torch.int16)


@torch.no_grad()
def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    temperature: float = 1.0, top_p: float = 1.0, stop: Sequence[int] = (), seed: int = 0,
    rows: Sequence[int] | None = None, slots: int = 256, routes: bool = False,
    on_token: Callable[[int, int], None] | None = None,
    on_finish: Callable[[int, Output], None] | None = None,
) -> list[Output]:  # fmt: skip
    """One Output for each prompt, in order; write a prompt G times for a group of G.

    rows: the number of each prompt's random stream (its index by default).
    routes: record which experts each token went to, for the trainer to replay.
    on_token(index, token), on_finish(index, output): called as the outputs are written.
    Raises ValueError for an empty prompt, one too long for the model, or settings out of range.
    """
    check_request(model, prompts, max_new_tokens, temperature, top_p, slots)
    keys = [tuple(prompt) for prompt in prompts]
    rows = range(len(prompts)) if rows is None else rows
    outputs: list[Output | None] = [None] * len(prompts)
    uses = Counter(keys)
    prefixes: dict[tuple[int, ...], Prefix] = {}
    queue = deque(range(len(prompts)))
    width = max((len(key) for key in uses), default=0) + max_new_tokens
    state = Slots(model, min(slots, len(prompts)), width, max_new_tokens, routes)
    stop_tokens = torch.tensor(list(stop), dtype=torch.long, device=state.position_B.device)
    while True:
        if queue:
            fill(state, queue, keys, uses, prefixes, rows, seed, max_new_tokens)
        active = [slot for slot, request in enumerate(state.request) if request >= 0]
        if not active:
            break
        if not queue and len(active) <= state.count // 2:
            state.shrink(active)
            active = list(range(state.count))
        tokens_B = state.draw(temperature, top_p)
        stopped_B = torch.isin(tokens_B, stop_tokens)
        ended = (stopped_B | (state.written_B >= max_new_tokens)).tolist()
        if on_token is not None:
            for slot in active:
                on_token(state.request[slot], int(tokens_B[slot]))
        for slot in active:
            if ended[slot]:
                request = state.request[slot]
                outputs[request] = state.take(slot, "stop" if bool(stopped_B[slot]) else "length")
                if on_finish is not None:
                    on_finish(request, outputs[request])
        if queue or any(request >= 0 for request in state.request):
            state.advance(tokens_B)
    return outputs


def fill(
    state: Slots, queue: deque, keys: list, uses: Counter, prefixes: dict, rows: Sequence[int],
    seed: int, length: int, lookahead: int = 32,
) -> None:  # fmt: skip
    """Put waiting requests into the free slots. Prompts are prefilled some ahead of their turn,
    many at a time, and forgotten after their last use."""
    free = state.free()
    taken: dict[tuple[int, ...], list[int]] = {}
    for request in [queue.popleft() for _ in range(min(len(free), len(queue)))]:
        taken.setdefault(keys[request], []).append(request)
    missing = [key for key in taken if key not in prefixes]
    if missing:
        ahead = dict.fromkeys(keys[request] for request in islice(queue, 16 * lookahead))
        coming = [key for key in ahead if key not in prefixes and key not in taken]
        missing += coming[: max(0, lookahead - len(missing))]
        for start in range(0, len(missing), lookahead):
            batch = missing[start : start + lookahead]
            prefixes.update(zip(batch, prefill(state.model, batch)))
    for key, requests in taken.items():
        places, free = free[: len(requests)], free[len(requests) :]
        streams = np.stack([random_stream(seed, rows[request], length) for request in requests])
        state.assign(places, requests, prefixes[key], streams)
        uses[key] -= len(requests)
        if uses[key] == 0:
            del prefixes[key]


def check_request(
    model: Transformer, prompts: Sequence, max_new_tokens: int, temperature: float, top_p: float,
    slots: int,
) -> None:  # fmt: skip
    room = model.config.max_position_embeddings - max_new_tokens
    if max_new_tokens < 1 or slots < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"{max_new_tokens=}, {slots=}, {temperature=}, {top_p=}: need at least 1 new token,"
            " at least 1 slot, temperature >= 0 and 0 < top_p <= 1"
        )
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= room:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; between 1 and {room} fit beside"
                f" max_new_tokens={max_new_tokens} in the model's context of"
                f" {model.config.max_position_embeddings}"
            )


def evaluate(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], *, samples: int,
    max_new_tokens: int, temperature: float = 0.6, top_p: float = 0.95, seed: int = 0,
    template: str | None = None, slots: int = 256, title: str = "evaluate",
) -> dict:  # fmt: skip
    """The paper's measures over `samples` outputs for each problem (R1 3 and Appendix): pass@1 is
    the mean correctness of all outputs, cons@k the correctness of the majority, pass@k whether any
    is correct. With them what explains them; `interval` is the 95 % one of pass@1, over problems.

    Problems whose prompt does not fit the context are skipped and counted.
    """
    if not problems or samples < 1:
        raise UserError(f"{len(problems)} problems x {samples=}: --limit and --samples start at 1")
    prompts, fitting = fitting_prompts(model, tokenizer, problems, template, max_new_tokens)
    mine = parallel.shard(fitting)
    with progress(len(mine) * samples, title) as bar:
        outputs = generate(
            model, [prompts[i] for i in mine for _ in range(samples)],
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            stop=(tokenizer.eos_token_id,), seed=seed,
            rows=[i * samples + k for i in mine for k in range(samples)], slots=slots,
            on_finish=lambda index, output: bar.update(1),
        )  # fmt: skip
    groups = []
    for j, i in enumerate(mine):
        group = outputs[j * samples : (j + 1) * samples]
        groups.append(judge_group(problems[i], [spell(tokenizer, o) for o in group], group))
    return summarize(parallel.gather_list(groups), samples, skipped=len(problems) - len(fitting))


def fitting_prompts(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], template: str | None,
    max_new_tokens: int,
) -> tuple[list[list[int]], list[int]]:  # fmt: skip
    """Every problem's prompt, and the indices of those that leave room for an output. Raises
    UserError where none does."""
    template = template or tokenizer.template
    prompts = [tokenizer.encode(build_prompt(problem.question, template)) for problem in problems]
    room = model.config.max_position_embeddings - max_new_tokens
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if not fitting:
        raise UserError(
            f"none of {len(problems)} problems fits: the shortest prompt has"
            f" {min(map(len, prompts))} tokens, and {room} fit beside --max-new-tokens"
            f" {max_new_tokens} in a context of {model.config.max_position_embeddings}"
        )
    return prompts, fitting


def spell(tokenizer: Tokenizer, output: Output) -> str:
    """The text that is judged: without the stop token."""
    return tokenizer.decode(output.tokens[:-1] if output.finish == "stop" else output.tokens)


def judge(problem: Problem, text: str, output: Output) -> dict[str, float]:
    """What one output is worth. One that was cut off has not answered: it earns nothing, whatever
    its text looks like so far."""
    finished = output.finish == "stop"
    answer = rewards.extract_answer(text) if finished else None
    return dict(
        accuracy=float(rewards.CHECKERS[problem.checker](answer, problem.answer)),
        format=rewards.format_reward(text) if finished else 0.0,
        tokens=float(len(output.tokens)),
        reflection=float(rewards.reflections(text) > 0),
        truncated=float(not finished),
        unparsed=float(answer is None),
    )


def judge_group(problem: Problem, texts: list[str], outputs: list[Output]) -> dict:
    """What one problem's outputs are worth together."""
    rows = [judge(problem, text, output) for text, output in zip(texts, outputs)]
    answers = [rewards.extract_answer(t) for t, o in zip(texts, outputs) if o.finish == "stop"]
    check = rewards.CHECKERS[problem.checker]
    # Before the vote no Countdown expression is known to be right, so they vote by their text.
    vote = rewards.majority(answers, check if problem.checker == "math" else operator.eq)
    means = {key: mean(row[key] for row in rows) for key in rows[0]}
    return {
        "level": problem.level,
        "pass@1": means.pop("accuracy"),
        "cons": float(check(vote, problem.answer)),
        "pass": max(row["accuracy"] for row in rows),
        **means,
    }


def summarize(groups: list[dict], samples: int, skipped: int = 0) -> dict:
    names = {"cons": f"cons@{samples}", "pass": f"pass@{samples}"}
    keys = [key for key in groups[0] if key != "level"]
    result = {names.get(key, key): mean(group[key] for group in groups) for key in keys}
    spread = stdev(group["pass@1"] for group in groups) if len(groups) > 1 else 0.0
    half = 1.96 * spread / math.sqrt(len(groups))
    by_level = {}
    for level in sorted({group["level"] for group in groups}):
        same = [group for group in groups if group["level"] == level]
        by_level[str(level)] = {key: mean(g[key] for g in same) for key in ("pass@1", "tokens")}
    interval = [max(0.0, result["pass@1"] - half), min(1.0, result["pass@1"] + half)]
    return {**result, "interval": interval, "by_level": by_level, "problems": len(groups),
            "samples": samples, "skipped": skipped}  # fmt: skip


def table(results: dict[str, dict]) -> str:
    """Evaluations beside each other, as text: name -> result of `evaluate`."""
    first = next(iter(results.values()))
    lines = [f"{first['problems']} problems x {first['samples']} samples"]
    if first["skipped"]:
        lines[0] += f" ({first['skipped']} skipped: the prompt is too long)"
    lines.append(" " * 22 + "".join(f"{name:>10}" for name in results))

    def row(title: str, values: list[float]) -> str:
        return f"{title:<22}" + "".join(f"{value:10.3f}" for value in values)

    for key in [key for key, value in first.items() if isinstance(value, float)]:
        lines.append(row(key, [result[key] for result in results.values()]))
        if key == "pass@1":
            for end, name in enumerate(("  95 % interval, from", "  to")):
                lines.append(row(name, [result["interval"][end] for result in results.values()]))
    for level in first["by_level"]:
        levels = [result["by_level"][level] for result in results.values()]
        lines.append(row(f"level {level:<4} pass@1", [each["pass@1"] for each in levels]))
        lines.append(row("           tokens", [each["tokens"] for each in levels]))
    return "\n".join(lines)


@dataclass(frozen=True)
class Config:
    model: str = flag("runs/zero/model", "model directory")
    prompt: str | None = flag(None, "a question (without it and --data: one question a line)")
    data: str | None = flag(
        None, "evaluate on these problems: a JSONL file, calc-chain or countdown"
    )
    samples: int = flag(16, "outputs for each problem (k)")
    limit: int = flag(500, "problems to evaluate on, at most")
    temperature: float = flag(0.6, "sampling temperature; 0 takes the best token")
    top_p: float = flag(0.95, "nucleus: the fewest tokens that together are as probable as this")
    max_new_tokens: int = flag(256, "longest answer, in tokens")
    template: str | None = flag(None, "prompt template: toy or r1-zero (default: the model's own)")
    slots: int = flag(256, "rows that are written at the same time")
    seed: int = flag(0, "random seed")
    device: str = flag("auto", "cpu, cuda or auto")
    dtype: Literal["float32", "bfloat16"] | None = flag(None, "of the weights; none: as stored")
    threads: int = flag(0, "CPU threads; 0 leaves the choice to torch")


def main(config: Config) -> None:
    device = pick_device(config.device)
    model = load_pretrained(
        config.model, dtype=config.dtype and getattr(torch, config.dtype), device=device
    )
    tokenizer = Tokenizer.load(config.model)
    if config.data is not None:
        problems = load(config.data, all_held_out=True).held_out(config.limit)
        result = evaluate(
            model, tokenizer, problems, samples=config.samples,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            top_p=config.top_p, seed=config.seed,
            template=config.template, slots=config.slots,
        )  # fmt: skip
        if parallel.is_main():
            print(table({"model": result}))
    elif config.prompt is not None:
        answer(model, tokenizer, config.prompt, config)
    else:
        print("One question a line; an empty line ends.")
        while question := read_line():
            answer(model, tokenizer, question, config)


def read_line() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:  # Ctrl-D
        return ""


def answer(model: Transformer, tokenizer: Tokenizer, question: str, config: Config) -> None:
    """Stream one answer, its reasoning dimmed."""
    prompt = tokenizer.encode(build_prompt(question, config.template or tokenizer.template))
    screen = Screen(tokenizer)
    generate(
        model, [prompt], max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_p=config.top_p, stop=(tokenizer.eos_token_id,), seed=config.seed,
        on_token=lambda _, token: screen.show(token),
    )  # fmt: skip
    screen.close()


class Screen:
    """Prints tokens as they come. A character's bytes may be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")

    def show(self, token: int) -> None:
        if token == self.tokenizer.eos_token_id:
            return
        text = self.decoder.decode(self.tokenizer.encoding.decode_single_token_bytes(token))
        text = text.replace("<think>", f"{self.dim}<think>")
        print(text.replace("</think>", f"</think>{self.plain}"), end="", flush=True)

    def close(self) -> None:
        print(self.decoder.decode(b"", final=True) + self.plain)


if __name__ == "__main__":
    launch(main, parse(Config, {}), user_errors=(ValueError,))
