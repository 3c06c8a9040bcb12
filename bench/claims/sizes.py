"""R1-Zero on bases of other sizes: pretraining and RL as in the default run, but for the model.

python -m bench.claims.sizes --size small
"""

from dataclasses import dataclass
from typing import Literal

import model
import sft
import train_zero
from data.tokenizer import Tokenizer
from runtime.run import Run, flag, launch, parse, pick_device

# Each of the toy's shape, with all that is made wider by its width; the toy itself is 96 wide.
SIZES = {
    "tiny": dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=12, kv_lora_rank=16,
                 qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    "small": dict(hidden_size=64, intermediate_size=128, moe_intermediate_size=24, kv_lora_rank=32,
                  v_head_dim=16),
}  # fmt: skip


@dataclass(frozen=True)
class Config(train_zero.Config):
    out: str = flag("runs/size", "directory of the run")
    size: Literal["tiny", "small"] = flag("small", "of the model")


def main(config: Config) -> None:
    model.PRESETS[config.size] = {**model.PRESETS["toy"], **SIZES[config.size]}
    source, held_out = train_zero.questions(config)
    run = Run(config.out, config, resume=None)
    tokenizer = Tokenizer.toy(bilingual=False)
    # A base that is not competent is what this is about.
    policy = sft.pretrain_toy(
        tokenizer, run, seed=config.seed, steps=config.pretrain_steps, force=True,
        device=pick_device(config.device), preset=config.size,
    )  # fmt: skip
    if policy is None:
        return
    base = train_zero.assess(policy, tokenizer, held_out, config, run, "base")
    if not train_zero.reinforce(policy, tokenizer, source, config, run):
        return
    zero = train_zero.assess(policy, tokenizer, held_out, config, run, "zero", step=config.steps)
    size = policy.num_parameters()
    run.save_json("result.json", {"base": base, "zero": zero, "parameters": size})


if __name__ == "__main__":
    launch(main, parse(Config, train_zero.PRESETS), user_errors=(ValueError,))
