"""Seconds for one whole step of GRPO, ours beside TRL's GRPOTrainer, with the same weights.

    python -m bench.grpo_step                   a tiny Qwen2, fp32
    python -m bench.grpo_step --device cuda     the shape of Qwen2.5-1.5B, bf16

A step is a rollout, the reference's log-probs and one update: 16 questions of 24 tokens, 8 outputs
of 64 tokens each, beta 0.04, AdamW. The two take turns: ours runs whenever TRL's trainer, which
owns the loop, has ended a step. Each has all of its 128 outputs sampled at once, and trains in
micro-batches; the figure is the median over the steps after the first, the ratio that of
neighbouring steps. TRL generates with transformers (no vLLM) and does not recompute activations.
"""

import argparse
import copy
import statistics
import warnings
from collections import defaultdict

import torch

import grpo
from bench import peers
from data.problems import Problem
from model import Transformer

MODELS = {"cpu": "qwen2-tiny", "cuda": "qwen2.5-1.5b"}
QUESTIONS, GROUP, PROMPT, NEW = 16, 8, 24, 64
BETA, EPS, LR = 0.04, 0.2, 1e-6
ADAM = dict(betas=(0.9, 0.95), weight_decay=0.0)
WARM = 1  # steps that don't count


def even_share(text: str) -> float:
    """The reward of both: the share of even tokens."""
    tokens = [int(word) for word in text.split()]
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


class Words:
    """What `grpo.rollout` asks of a tokenizer, where token 7 is the word "7". Its end-of-text is a
    token beyond the vocabulary, which the model can't draw: every output is as long as allowed."""

    def __init__(self, vocabulary: int):
        self.eos_token_id = vocabulary
        self.stop_ids, self.template, self.tags = (vocabulary,), "toy", True

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def trl_tokenizer(vocabulary: int):
    """The same for TRL, of the same words; end-of-text and padding are beyond the vocabulary here
    too, and neither comes up where prompts and outputs are equally long."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(token): token for token in range(vocabulary)} | {"<end>": vocabulary}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", padding_side="left"
    )


class Ours:
    """Our step, with the optimizer that TRL takes by default, and its seconds by phase."""

    def __init__(self, model: Transformer, prompts: list[list[int]], micro: int, device: str):
        self.model, self.reference, self.device = model.train(), copy.deepcopy(model), device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True, **ADAM)
        self.tokenizer = Words(model.config.vocab_size)
        problems = [Problem("?", "1") for _ in range(QUESTIONS)]
        self.questions = [
            grpo.Questions(list(range(QUESTIONS)), problems, prompts[start : start + QUESTIONS])
            for start in range(0, len(prompts), QUESTIONS)
        ]
        # A row of one document: it needs no mask of segments, nor has TRL one.
        self.settings = grpo.Settings(
            group_size=GROUP, max_new_tokens=NEW, eps=EPS, beta=BETA, row_tokens=PROMPT + NEW,
            micro_tokens=micro * (PROMPT + NEW),
        )  # fmt: skip
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def step(self, number: int) -> None:
        asked = self.questions[number % len(self.questions)]
        times = [peers.clock(self.device)]
        batch = grpo.rollout(
            self.model, self.tokenizer, asked, lambda _, text, __: even_share(text), self.settings,
            seed=0, step=number,
        )  # fmt: skip
        times.append(peers.clock(self.device))
        batch.ref_logprobs = grpo.reference_logprobs(self.reference, batch, self.settings)
        times.append(peers.clock(self.device))
        trained = grpo.step(self.model, self.optimizer, batch, self.settings)
        times.append(peers.clock(self.device))
        check_length(trained["tokens_trained"])
        for name, start, end in zip(("rollout", "reference", "update"), times, times[1:]):
            self.seconds[name].append(end - start)
        self.seconds["step"].append(times[-1] - times[0])


def check_length(tokens: int) -> None:
    """Equally long outputs or no comparison."""
    if tokens != QUESTIONS * GROUP * NEW:
        raise SystemExit(f"{tokens} tokens trained, not {QUESTIONS * GROUP * NEW}")


def trl_arguments(directory: str, steps: int, micro: int, device: str):
    """TRL's own defaults but for what makes the work the same, and for what it need not do: save,
    report, recompute activations."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=directory, max_steps=steps, use_cpu=device == "cpu", seed=0,
        per_device_train_batch_size=micro, gradient_accumulation_steps=QUESTIONS * GROUP // micro,
        num_generations=GROUP, max_completion_length=NEW, temperature=1.0, top_p=1.0, top_k=0,
        beta=BETA, epsilon=EPS, loss_type="grpo", scale_rewards="group",
        learning_rate=LR, lr_scheduler_type="constant", optim="adamw_torch_fused",
        adam_beta1=ADAM["betas"][0], adam_beta2=ADAM["betas"][1], weight_decay=0.0,
        max_grad_norm=1.0, bf16=False, gradient_checkpointing=False,
        report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def trl_trainer(directory: str, peer, prompts: list[list[int]], arguments, ours: Ours):
    """The trainer, and the list that its seconds per step go to."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    seconds: list[float] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_) -> list[float]:
        check_length(sum(map(len, completion_ids)))
        return [even_share(text) for text in completions]

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):  # before the rollout
            self.start = peers.clock(ours.device)

        def on_step_end(self, *_, **__):  # after the optimizer
            seconds.append(peers.clock(ours.device) - self.start)
            ours.step(len(seconds))

    words = ours.tokenizer
    trainer = GRPOTrainer(
        model=peer, args=arguments, reward_funcs=reward, callbacks=[TakeTurns()],
        train_dataset=Dataset.from_list([{"prompt": words.decode(prompt)} for prompt in prompts]),
        processing_class=trl_tokenizer(words.eos_token_id),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, seconds


def measure(given) -> tuple[list[float], dict[str, list[float]], float]:
    """TRL's seconds per step, ours by phase, and how far the models were apart at the start."""
    name, device = MODELS[given.device], given.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = peers.random_model(peers.config_of(name), device, dtype)
    steps = WARM + given.steps
    prompts = peers.random_tokens(model.config.vocab_size, steps * QUESTIONS, PROMPT, 2).tolist()
    ours = Ours(model, prompts, given.micro, device)
    warnings.simplefilter("ignore", FutureWarning)  # of names that newer versions spell otherwise
    with peers.scratch() as directory:  # TRL reads its reference model from there
        peer = peers.peer_of(model, f"{directory}/model")
        worst = peers.check_same(name, model, peer)
        arguments = trl_arguments(f"{directory}/out", steps, given.peer_micro, device)
        trainer, seconds = trl_trainer(directory, peer, prompts, arguments, ours)
        trainer.train()
    return seconds[WARM:], {key: times[WARM:] for key, times in ours.seconds.items()}, worst


def main() -> None:
    parser = argparse.ArgumentParser(description="a GRPO step of ours beside one of TRL's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each (default: 6)")
    parser.add_argument("--micro", type=int, default=32, help="outputs in our micro-batch")
    parser.add_argument("--peer-micro", type=int, default=32, help="outputs in TRL's micro-batch")
    peers.add_clock_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="write the results here too")
    given = parser.parse_args()
    peers.require_device(given.device)
    peers.require("transformers", "trl", "datasets", "accelerate")
    peers.set_clock(given)
    theirs, ours, worst = measure(given)
    medians = {phase: statistics.median(times) for phase, times in ours.items()}
    row = {
        "model": MODELS[given.device],
        "nanoR1, s/step": f"{medians['step']:.2f}",
        "TRL, s/step": f"{statistics.median(theirs):.2f}",
        "TRL / nanoR1": f"{peers.paired(ours['step'], theirs):.2f}",
        "ours: rollout + reference + update, s": " + ".join(
            f"{medians[phase]:.2f}" for phase in ("rollout", "reference", "update")
        ),
    }
    about = peers.machine(given.device, ("transformers", "trl", "accelerate", "datasets"))
    shape = dict(questions=QUESTIONS, group=GROUP, prompt=PROMPT, new=NEW, micro=given.micro,
                 peer_micro=given.peer_micro, logits=worst)  # fmt: skip
    peers.report([row], about, given.json, dict(**shape, nanor1=ours, trl=theirs))


if __name__ == "__main__":
    main()
