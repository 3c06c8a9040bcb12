"""Sampling: the rollouts of RL, the evaluation of the paper (section 3), and a command to ask.

`generate` is the engine. Each of its slots writes one output; a prompt is prefilled once for all
its outputs; as soon as an output ends, its slot goes to the next request (continuous batching). The
random numbers of a row depend on (seed, row) alone, so its tokens don't depend on its neighbours,
the number of slots or of processes (but for rounding, where two tokens are equally likely).

Two things make it fast and are no part of the method: the cache in pages (runtime/pages.py), and
steps that are recorded and played back (runtime/record.py; a CUDA graph on a GPU).

    python sample.py --model runs/zero/model                       one question a line
    python sample.py --model runs/zero/model --prompt "compute 7 a +5 b *3 ?"
    python sample.py --model runs/zero/model --data FILE.jsonl --samples 16     pass@1, cons@16

Read next: rewards.py, then grpo.py.
"""

import codecs
import json
import math
import operator
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import rewards
from data.problems import Problem, load
from data.prompts import CHATS, encode_prompt, opened
from data.tokenizer import Tokenizer
from kernels import full
from model import Transformer, chosen_experts
from runtime import parallel
from runtime.pages import Pages
from runtime.pretrained import find_model, load_pretrained
from runtime.record import Captured, Recorded, Step
from runtime.report import write_report
from runtime.run import Run, UserError, flag, launch, parse, pick_device, progress, usable_dtype
from runtime.sharding import gathered, repeatable, shard
from runtime.tensor_parallel import agreed, asked_together


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
        # Nucleus sampling (1904.09751): the fewest tokens that reach top_p, renormalised:
        #   token i, in order of falling probability, is kept while p_1 + .. + p_(i-1) < top_p
        ordered_BV, order_BV = logprobs_BV.sort(-1, descending=True)
        before_BV = ordered_BV.exp().cumsum(-1) - ordered_BV.exp()
        dropped_BV = torch.empty_like(before_BV, dtype=torch.bool).scatter_(
            -1, order_BV, before_BV >= top_p
        )
        logprobs_BV = F.log_softmax(logprobs_BV.masked_fill(dropped_BV, -math.inf), -1)
    # Inversion: token = the first v with P_1 + .. + P_v > uniform
    cumulative_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    tokens_B = tokens_B.clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def random_stream(seed: int, row: int, length: int) -> np.ndarray:
    """The uniform numbers in [0, 1) that one row consumes, one for each token."""
    return np.random.Generator(np.random.Philox(key=[seed, row])).random(length)


class Slots:
    """The outputs being written: the logits to draw from next, what each has so far."""

    def __init__(
        self, model: Transformer, pages: Pages, width: int, max_new_tokens: int, *,
        temperature: float, top_p: float, stop: Sequence[int], routes: bool,
    ):  # fmt: skip
        config, device, count = model.config, model.lm_head.weight.device, pages.slots
        routes = routes and config.is_moe
        self.model, self.pages, self.count = model, pages, count
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens
        self.request = [-1] * count  # which request a slot works on; -1: free
        self.length = [0] * count  # its tokens in the cache

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(count, *shape, dtype=dtype, device=device)

        self.logits_BV = zeros(config.vocab_size, dtype=model.lm_head.weight.dtype)
        self.active_B = zeros()
        self.position_B = zeros()  # of the next token
        self.written_B = zeros()
        self.last_B = zeros()  # the token drawn last
        self.status_B = zeros()  # 0: goes on, 1: has stopped, 2: has reached the longest allowed
        self.tokens_BT = zeros(max_new_tokens)
        self.logprobs_BT = zeros(max_new_tokens, dtype=torch.float64)
        self.uniform_BT = zeros(max_new_tokens, dtype=torch.float64)
        self.routes_BSMA = None
        if routes:
            shape = (width, config.num_moe_layers, config.num_experts_per_tok)
            self.routes_BSMA = zeros(*shape, dtype=torch.int16).fill_(-1)
        self.stop_s = torch.tensor(list(stop), dtype=torch.long, device=device)
        fixed = repeatable(model)
        self.record = pages.on_gpu and fixed
        on_cpu = fixed and not pages.on_gpu
        self.step = Recorded.of(model, routes) if on_cpu else Step(model, routes)
        self.capture()

    def capture(self) -> None:
        self.draw, self.feed = (Captured(f, self.record) for f in (self._draw, self._feed))

    def places(self) -> list[int]:
        return [slot for slot, request in enumerate(self.request) if request < 0]

    def active(self) -> list[int]:
        return [slot for slot, request in enumerate(self.request) if request >= 0]

    def assign(self, started: "list[tuple[int, int, Prefix]]", streams_BT: np.ndarray) -> None:
        """Give slots, which have room for it, to requests: (slot, request, what it starts from)."""
        slots, requests, prefixes = zip(*started)
        members: dict[int, list[int]] = {}  # the slots that start from the same prefix
        for slot, request, prefix in started:
            self.request[slot], self.length[slot] = request, prefix.length
            members.setdefault(id(prefix), []).append(slot)
        index = torch.tensor(slots, device=self.position_B.device)
        self.logits_BV[index] = torch.stack([prefix.logits_V for prefix in prefixes])
        self.active_B[index] = 1
        self.position_B[index] = index.new_tensor([prefix.length for prefix in prefixes])
        self.written_B[index] = 0
        self.uniform_BT[index] = torch.from_numpy(streams_BT).to(index.device)
        for prefix in {id(prefix): prefix for prefix in prefixes}.values():
            same = members[id(prefix)]
            self.pages.write(same, prefix.cache_MSX)
            if self.routes_BSMA is not None:
                self.routes_BSMA[same, : prefix.length] = prefix.routes_SMA

    def _draw(self) -> None:
        """One more token in every slot."""
        at_B1 = self.written_B[:, None]
        uniform_B = self.uniform_BT.gather(1, at_B1)[:, 0]
        drawn = choose(self.logits_BV, uniform_B, self.temperature, self.top_p)
        tokens_B, logprobs_B = agreed(self.model, *drawn)
        self.last_B.copy_(tokens_B)
        self.tokens_BT.scatter_(1, at_B1, tokens_B[:, None])
        self.logprobs_BT.scatter_(1, at_B1, logprobs_B.double()[:, None])
        stopped_B = (tokens_B[:, None] == self.stop_s).any(-1)
        full_B = self.written_B + 1 >= self.max_new_tokens
        self.status_B.copy_(torch.where(stopped_B, 1, 2 * full_B))
        self.written_B += self.active_B

    def _feed(self) -> None:
        """Feed the drawn tokens; what the model says next goes to `logits_BV`."""
        filled = (part for part in self.pages.filled(max(self.length) + 1) if part is not None)
        logits_BV, *routes = self.step(self.last_B, self.position_B, *filled)
        self.logits_BV.copy_(logits_BV)
        if self.routes_BSMA is not None:
            rows_B = torch.arange(self.count, device=self.last_B.device)
            self.routes_BSMA[rows_B, self.position_B] = routes[0]
        self.position_B += self.active_B

    def advance(self) -> list[int]:
        """Feed, after making room for a token in every active slot. Where the cache is full, the
        slots with the least to lose give up theirs: the requests that must start again."""
        evicted = []
        for slot in self.active():
            while not self.pages.reserve(slot, self.length[slot] + 1):
                victim = min(self.active(), key=lambda other: self.length[other])
                evicted.append(self.request[victim])
                self.clear(victim)
                if victim == slot:
                    break
        if self.active():
            self.feed()
        for slot in self.active():
            self.length[slot] += 1
        return evicted

    def clear(self, slot: int) -> None:
        self.request[slot], self.length[slot] = -1, 0
        self.active_B[slot] = self.position_B[slot] = self.written_B[slot] = 0
        self.pages.release(slot)

    def take(self, slot: int, finish: str) -> Output:
        """The finished output of a slot, which becomes free."""
        n, end = int(self.written_B[slot]), self.length[slot]
        routes = None if self.routes_BSMA is None else self.routes_BSMA[slot, :end].cpu().clone()
        tokens, logprobs = self.tokens_BT[slot, :n].tolist(), self.logprobs_BT[slot, :n].tolist()
        self.clear(slot)
        return Output(tokens, logprobs, finish, routes)

    def shrink(self) -> None:
        """Drop half of the slots, which are free: nothing waits for them, and they cost time."""
        keep = sorted((self.active() + self.places())[: self.count // 2])
        self.request = [self.request[slot] for slot in keep]
        self.length = [self.length[slot] for slot in keep]
        self.count = len(keep)
        self.pages.keep(keep)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "stop_s":
                setattr(self, name, value[keep])
        self.capture()


@dataclass
class Prefix:
    """A prompt that has been read: what every output of it starts from."""

    cache_MSX: Tensor
    logits_V: Tensor
    routes_SMA: Tensor | None

    @property
    def length(self) -> int:
        return self.cache_MSX.shape[1]


def prefill(model: Transformer, prompts: Sequence[tuple[int, ...]]) -> list[Prefix]:
    """Read prompts of any lengths together. They are padded at the end, where nothing that comes
    before can see the padding."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens_BT = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.tensor(prompt)
    cache_MBSX = model.new_cache(*tokens_BT.shape)  # a page a row
    positions_BT = torch.arange(tokens_BT.shape[1], device=device).expand(tokens_BT.shape)
    hidden_BTD, routings = model.hidden(tokens_BT.to(device), positions_BT, cache_MZYX=cache_MBSX)
    last_BD = hidden_BTD[torch.arange(len(prompts)), lengths - 1]
    logits_BV = model.lm_head(last_BD)
    routes = chosen_experts(routings) if routings else [None] * len(prompts)
    return [
        Prefix(
            cache_MBSX[:, b, :n].clone(), logits_BV[b], None if routes[b] is None else routes[b][:n]
        )
        for b, n in enumerate(lengths.tolist())
    ]


@torch.no_grad()
def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    temperature: float = 1.0, top_p: float = 1.0, stop: Sequence[int] = (), seed: int = 0,
    rows: Sequence[int] | None = None, slots: int = 256, routes: bool = False,
    cache_tokens: int = 0, page: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    on_finish: Callable[[int, Output], None] | None = None,
) -> list[Output]:  # fmt: skip
    """One Output for each prompt, in order; write a prompt G times for a group of G.

    rows: the number of each prompt's random stream (its index by default).
    routes: record which experts each token went to, for the trainer to replay.
    cache_tokens: room of the cache, over all slots, in pages of `page` tokens (0: what the slots
    can need or, on a GPU, what fits). Where it is full, outputs start again later.
    on_token(index, token), on_finish(index, output): called as the outputs are written.
    Raises ValueError for an empty prompt, one too long for the model, or settings out of range.
    """
    check_request(model, prompts, max_new_tokens, temperature, top_p, slots)
    rows = range(len(prompts)) if rows is None else rows
    with gathered(model) as writer:  # on a rank without prompts too
        # Where ranks write together, the prompts are those of all, and `own` are this one's.
        settings = max_new_tokens, temperature, top_p, tuple(stop), seed, slots, cache_tokens, page
        prompts, rows, own = asked_together(writer, prompts, rows, settings)
        if not prompts:
            return []
        outputs: list[Output | None] = [None] * len(prompts)
        queue = Queue(writer, prompts, rows, seed)
        width = max(map(len, prompts)) + max_new_tokens
        pages = Pages(writer, min(slots, len(prompts)), width, page, cache_tokens)
        state = Slots(
            writer, pages, width, max_new_tokens, temperature=temperature, top_p=top_p, stop=stop,
            routes=routes,
        )  # fmt: skip
        while True:
            queue.fill(state)
            if not queue.waiting and not state.active():
                return outputs[own.start : own.stop]
            while not queue.waiting and len(state.active()) <= state.count // 2:
                state.shrink()
            state.draw()
            status = state.status_B.tolist()
            for slot in state.active():
                request = state.request[slot]
                if on_token is not None and request in own:
                    on_token(request - own.start, int(state.last_B[slot]))
                if status[slot]:
                    outputs[request] = state.take(slot, "stop" if status[slot] == 1 else "length")
                    if on_finish is not None and request in own:
                        on_finish(request - own.start, outputs[request])
            queue.put_back(state.advance())


class Queue:
    """The requests that wait for a slot. Prompts are prefilled some ahead of their turn, many at a
    time, and forgotten after their last use."""

    def __init__(self, model: Transformer, prompts: Sequence, rows: Sequence[int], seed: int):
        self.model, self.rows, self.seed = model, rows, seed
        self.keys = [tuple(prompt) for prompt in prompts]
        self.uses = Counter(self.keys)  # requests that are still to start from a prompt
        self.waiting = deque(range(len(prompts)))
        self.prefixes: dict[tuple[int, ...], Prefix] = {}

    def put_back(self, requests: list[int]) -> None:
        for request in requests:
            self.waiting.appendleft(request)
            self.uses[self.keys[request]] += 1

    def fill(self, state: Slots) -> None:
        """Put waiting requests into the free slots, as far as the cache has room."""
        taken: list[tuple[int, int]] = []
        for slot in state.places() if self.waiting else ():
            if not self.waiting:
                break
            if not state.pages.reserve(slot, len(self.keys[self.waiting[0]]) + 1):
                state.pages.release(slot)
                break
            taken.append((slot, self.waiting.popleft()))
        if not taken:
            return
        keys = [self.keys[request] for _, request in taken]
        self.prefill([key for key in dict.fromkeys(keys) if key not in self.prefixes])
        rows = [self.rows[request] for _, request in taken]
        streams = [random_stream(self.seed, row, state.max_new_tokens) for row in rows]
        started = [(*pair, self.prefixes[key]) for pair, key in zip(taken, keys)]
        state.assign(started, np.stack(streams))
        for key, count in Counter(keys).items():
            self.uses[key] -= count
            if self.uses[key] == 0:
                del self.prefixes[key]

    def prefill(self, missing: list[tuple[int, ...]], lookahead: int = 32) -> None:
        if not missing:
            return
        ahead = dict.fromkeys(self.keys[request] for request in islice(self.waiting, 512))
        coming = [key for key in ahead if key not in self.prefixes and key not in missing]
        missing = missing + coming[: max(0, lookahead - len(missing))]
        for start in range(0, len(missing), lookahead):
            batch = missing[start : start + lookahead]
            self.prefixes.update(zip(batch, prefill(self.model, batch)))


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
    if room < 1:
        raise ValueError(
            f"{max_new_tokens=} leaves no room for a prompt in the model's context of"
            f" {model.config.max_position_embeddings}: fewer new tokens"
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
    slots: int = 256, title: str = "evaluate",
) -> dict:  # fmt: skip
    """The paper's measures over `samples` outputs for each problem (R1 3 and Appendix): pass@1 is
    the mean correctness of all outputs, cons@k the correctness of the majority, pass@k whether any
    is correct. With them what explains them; `interval` is the 95 % one of pass@1, over problems.

    Problems whose prompt does not fit the context are skipped and counted.
    """
    if not problems or samples < 1:
        raise UserError(f"{len(problems)} problems x {samples=}: --limit and --samples start at 1")
    prompts, fitting = fitting_prompts(model, tokenizer, problems, max_new_tokens)
    mine = parallel.shard(fitting)
    with progress(len(mine) * samples, title) as bar:
        outputs = generate(
            model, [prompts[i] for i in mine for _ in range(samples)],
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            stop=tokenizer.stop_ids, seed=seed,
            rows=[i * samples + k for i in mine for k in range(samples)], slots=slots,
            on_finish=lambda index, output: bar.update(1),
        )  # fmt: skip
    groups = []
    for j, i in enumerate(mine):
        group = outputs[j * samples : (j + 1) * samples]
        texts = [spell(tokenizer, output) for output in group]
        groups.append(judge_group(problems[i], texts, group, tokenizer.tags))
    return summarize(parallel.gather_list(groups), samples, skipped=len(problems) - len(fitting))


def measure(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], run: Run, name: str, *,
    samples: int, seed: int, step: int = 0, **settings,
) -> dict:  # fmt: skip
    """For a recipe: evaluate a model as RL samples it (T = 1, top-p 1), and greedy, into run's
    evaluation_NAME.json; on resuming, read back what was found after the same step."""
    file = run.out / f"evaluation_{name}.json"
    saved = parallel.from_main(json.loads(file.read_text()) if file.exists() else None)
    if saved is not None and saved["step"] == step:
        return saved["result"]
    run.rewind(f"evaluate {name}", -1)
    with run.phase("evaluate") as timer:
        result = evaluate(
            model, tokenizer, problems, samples=samples, temperature=1.0, top_p=1.0, seed=seed,
            title=f"evaluate {name}", **settings,
        )  # fmt: skip
        greedy = evaluate(
            model, tokenizer, problems, samples=1, temperature=0.0, seed=seed, title="greedy",
            **settings,
        )  # fmt: skip
        timer.tokens += round(result["tokens"] * result["problems"] * result["samples"])
    # Departs from R1 3, sampling: T = 1 and top-p 1, what RL changes, for 0.6 and 0.95; and greedy
    # beside it, which the paper gave up for its variance.
    result["greedy"] = greedy["pass@1"]
    run.log(phase=f"evaluate {name}", step=step, **result, **run.timing())
    run.save_json(file.name, dict(step=step, result=result))
    solved = result[f"pass@{samples}"]
    if solved < 0.05 and parallel.is_main():
        print(
            f"{name}: {solved:.1%} of the questions are ever solved in {samples}"
            f" outputs ({result['unparsed']:.0%} of these had no answer that could be read,"
            f" {result['truncated']:.0%} were cut off). Where all outputs of a question are equally"
            " wrong, accuracy gives RL nothing to reinforce: it needs a base that solves some of"
            " the questions sometimes."
        )
    return result


def open_model(
    directory: str | Path, device: str, dtype: torch.dtype | None, template: str | None = None,
    ep: int | None = 0, states: str | None = "master", tp: int = 0,
) -> tuple[Transformer, Tokenizer]:  # fmt: skip
    """A model directory: in the dtype given (None: as stored), wherever it can be used, and with
    another prompt template than its own, where one is given. Without the multi-token prediction
    layer, which neither the sampler nor RL uses: what is saved after training has none. ep, states,
    tp: how it is spread over the processes (runtime/sharding.py)."""
    place, directory = pick_device(device), find_model(directory)
    try:
        tokenizer = Tokenizer.load(directory, template)
        spread = partial(shard, ep=ep, device=place, states=states, tp=tp)
        model = load_pretrained(directory, dtype=dtype, device=place, mtp=False, shard=spread)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only"
                f" {model.config.vocab_size}: they do not belong together"
            )
        stored = model.lm_head.weight.dtype
        usable = usable_dtype(stored, place)
        if dtype is not None and usable != dtype:
            raise UserError(f"--dtype bfloat16: {place} has none; give --dtype float32")
        if usable != stored:
            for parameter in model.parameters():  # not .to(): routing biases stay in fp32
                parameter.data = parameter.data.to(usable)
        return model, tokenizer
    except ValueError as error:
        raise UserError(str(error)) from error


def fitting_prompts(
    model: Transformer, tokenizer: Tokenizer, problems: Sequence[Problem], max_new_tokens: int,
    or_none: bool = False,
) -> tuple[list[list[int]], list[int]]:  # fmt: skip
    """Every problem's prompt, and the indices of those that leave room for an output. Raises
    UserError where none does, unless that may be."""
    prompts = [encode_prompt(tokenizer, problem.question) for problem in problems]
    room = model.config.max_position_embeddings - max_new_tokens
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if not fitting and not or_none:
        raise UserError(
            f"none of {len(problems)} problems fits: the shortest prompt has"
            f" {min(map(len, prompts))} tokens, and {room} fit beside --max-new-tokens"
            f" {max_new_tokens} in a context of {model.config.max_position_embeddings}"
        )
    return prompts, fitting


def spell(tokenizer: Tokenizer, output: Output) -> str:
    """The text that is judged: without the stop token, and with what the prompt had written of it
    already."""
    written = output.tokens[:-1] if output.finish == "stop" else output.tokens
    return opened(tokenizer.template) + tokenizer.decode(written)


def judge(
    problem: Problem, text: str, output: Output, tags: bool = True
) -> dict[str, float | None]:
    """What one output is worth. One that was cut off has not answered: it earns nothing, whatever
    its text looks like so far. None where no rule can tell: the accuracy, the language."""
    finished = output.finish == "stop"
    check, known = rewards.CHECKERS[problem.checker], problem.language in rewards.LANGUAGES
    answer = rewards.offered(text, check) if finished else None
    return dict(
        accuracy=None if check is None else float(check(answer, problem.answer)),
        format=rewards.format_reward(text, tags) if finished else 0.0,
        language=rewards.language_reward(text, problem.language) if known else None,
        tokens=float(len(output.tokens)),
        reflection=float(rewards.reflections(text) > 0),
        truncated=float(not finished),
        unparsed=float(answer is None),
    )


def average(values: Iterable[float | None]) -> float | None:
    """The mean of what is known."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def judge_group(
    problem: Problem, texts: list[str], outputs: list[Output], tags: bool = True
) -> dict:
    """What one problem's outputs are worth together."""
    rows = [judge(problem, text, output, tags) for text, output in zip(texts, outputs)]
    check = rewards.CHECKERS[problem.checker]
    answers = [rewards.offered(t, check) for t, o in zip(texts, outputs) if o.finish == "stop"]
    # Before the vote no expression and no program is known to be right: they vote by their text.
    vote = rewards.majority(answers, check if problem.checker == "math" else operator.eq)
    means = {key: average(row[key] for row in rows) for key in rows[0]}
    # R1 3, mean: pass@1 = 1/k sum_i p_i
    return {
        "level": problem.level,
        "pass@1": means.pop("accuracy"),
        "cons": float(check(vote, problem.answer)),
        "pass": max(row["accuracy"] for row in rows),
        **means,
    }


def write_page(out: Path) -> Path | None:
    """The run in `out` as a page, report.html; what the run has not judged, today's rules do."""
    return write_report(out, rewards.is_right, rewards.REFLECTIVE, rewards.REFLECTIVE_ZH)


def summarize(groups: list[dict], samples: int, skipped: int = 0) -> dict:
    names = {"cons": f"cons@{samples}", "pass": f"pass@{samples}"}
    keys = [key for key in groups[0] if key != "level"]
    result = {names.get(key, key): average(group[key] for group in groups) for key in keys}
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
        None, "evaluate on these problems: a JSONL file, calc-chain, countdown or a puzzle's name"
    )
    samples: int = flag(16, "outputs for each problem (k)")
    limit: int = flag(500, "problems to evaluate on, at most")
    temperature: float = flag(0.6, "sampling temperature; 0 takes the best token")
    top_p: float = flag(0.95, "nucleus: the fewest tokens that together are as probable as this")
    max_new_tokens: int = flag(256, "longest answer, in tokens")
    template: str | None = flag(
        None, "prompt template: r1-zero, toy or a chat's (default: the model's own)"
    )
    slots: int = flag(256, "rows that are written at the same time")
    seed: int = flag(0, "random seed")
    device: str = flag("auto", "cpu, cuda or auto")
    dtype: Literal["float32", "bfloat16", "float16"] | None = flag(
        None, "of the weights; none: as stored"
    )
    threads: int = flag(0, "CPU threads; 0 leaves the choice to torch")
    ep: int | None = flag(
        None, "spread the weights over the processes, the experts over so many; 0: all on each;"
        " none: spread what would fill more than half of the memory",
    )  # fmt: skip
    timeout: float = flag(
        1800.0, "seconds that a process waits for the others, and they for your next question"
    )
    tp: int = flag(
        0, "cut a dense model over so many processes, which write together; 0 or 1: it is whole"
    )

    def __post_init__(self):
        if self.tp > 1 and self.ep:
            raise UserError(
                f"--tp {self.tp} and --ep {self.ep}: give one of them; --tp cuts it all"
            )


def main(config: Config) -> None:
    dtype = config.dtype and getattr(torch, config.dtype)
    how = dict(template=config.template, ep=0 if config.tp > 1 else config.ep, tp=config.tp)
    how["states"] = None  # it won't be trained
    model, tokenizer = open_model(config.model, config.device, dtype, **how)
    if config.data is not None:
        problems = load(config.data, all_held_out=True).held_out(config.limit)
        rewards.need_rules(problems)
        result = evaluate(
            model, tokenizer, problems, samples=config.samples,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            top_p=config.top_p, seed=config.seed, slots=config.slots,
        )  # fmt: skip
        if parallel.is_main():
            print(table({"model": result}))
    elif config.prompt is not None:
        answer(model, tokenizer, config.prompt, config)
    else:
        converse(model, tokenizer, config)


def converse(model: Transformer, tokenizer: Tokenizer, config: Config) -> None:
    """A question a line. With a chat template the model sees what was said before, but for its own
    reasoning; with a plain one, each question stands alone."""
    say = print if parallel.is_main() else lambda text: None
    say(f"Template {tokenizer.template}. One question a line; an empty line ends.")
    history: list[tuple[str, str]] = []
    while question := read_line():
        try:
            said = answer(model, tokenizer, question, config, history)
        except ValueError as error:  # too long
            say(f"{error}; what was said before is forgotten: ask again" if history else error)
            history = []
            continue
        if tokenizer.template in CHATS:
            history.append((question, said))


def read_line() -> str:
    """What is asked of the first process, on all."""
    line = ""
    if parallel.is_main():
        try:
            line = input("\n> ").strip()
        except EOFError:  # Ctrl-D
            pass
    return parallel.from_main(line)


def answer(
    model: Transformer, tokenizer: Tokenizer, question: str, config: Config,
    history: Sequence[tuple[str, str]] = (),
) -> str:  # fmt: skip
    """Stream one answer, its reasoning dimmed; its text."""
    prompt = encode_prompt(tokenizer, question, history=history)
    screen = Screen(tokenizer)
    [output] = generate(
        model, [prompt], max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        top_p=config.top_p, stop=tokenizer.stop_ids, seed=config.seed,
        on_token=lambda _, token: screen.show(token),
    )  # fmt: skip
    screen.close()
    return spell(tokenizer, output)


class Screen:
    """Prints tokens as they come. A character's bytes may be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        self.write(opened(tokenizer.template))

    def show(self, token: int) -> None:
        if token not in self.tokenizer.stop_ids:
            self.write(self.decoder.decode(self.tokenizer.token_bytes(token)))

    def write(self, text: str) -> None:
        if parallel.is_main():  # all processes write the same
            text = text.replace("<think>", f"{self.dim}<think>")
            print(text.replace("</think>", f"</think>{self.plain}"), end="", flush=True)

    def close(self) -> None:
        self.write(self.decoder.decode(b"", final=True) + self.plain + "\n")


if __name__ == "__main__":
    launch(main, parse(Config, {}), user_errors=(ValueError,))
