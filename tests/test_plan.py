"""bench/plan.py: its formulas, against what DeepSeek published and what a page of paper gives.

The figures of DeepSeek's training step (2505.09343, the table that compares two networks) hold
4,096-token rows, 15,360 to a step, on 2,048 GPUs, at 38.94 % of the peak: from the one the others
follow, so they check what is counted here, not how fast a GPU is. Nothing in plan.py was fitted.
"""

from functools import cache

import pytest

from bench.plan import (
    Config, Run, Sizes, cache_bytes, count, decode_step, exchange, exchange_bytes, forward_flops,
    gather, main, memory, phases, prepare, report, slots, together,
)  # fmt: skip
from runtime.configs import PUBLISHED, from_json
from runtime.flags import UserError, parse
from runtime.memory import read_config

TOKENS = 4096 * 15360 / 2048  # of a training step of DeepSeek-V3, on each GPU
QWEN_7B = dict(model="qwen2.5-7b", gpus=8, outputs=1024, minibatches=4, mean_tokens=2000,
               longest=8192)  # fmt: skip


@cache
def sizes(model: str) -> Sizes:
    return count(read_config(model))


def planned(**changes) -> Run:
    config = Config(**changes)
    return prepare(config, sizes(config.model))


def seconds(run: Run) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in phases(run)}


def bounds(run: Run) -> dict[str, str]:
    return {phase.name: phase.bound for phase in phases(run)}


# --- what is counted


def test_deepseek_v3_has_671b_parameters_of_which_a_token_uses_37b():
    # V3's report: 671B and 37B. Embedding and head are among the 37.55B, though the embedding is
    # looked up: 248 of 256 experts in 58 layers, 633.48B, are what a token leaves alone.
    found = sizes("deepseek-v3")
    assert round(found.total / 1e9, 2) == 671.03
    assert round(found.active / 1e9, 2) == 37.55
    assert found.total - found.active == 58 * 248 * 3 * 7168 * 2048
    assert found.active - found.multiplied == 129280 * 7168


def test_moonlight_uses_2_24b_besides_embedding_and_head():
    # Its report (2502.16982): 2.24B activated and 15.29B in all, "excluding the embedding".
    found, ends = sizes("moonlight-16b-a3b"), 2 * 163840 * 2048
    assert round((found.active - ends) / 1e9, 2) == 2.24
    assert round((found.total - ends) / 1e9, 2) == 15.29


def test_a_dense_model_uses_all_it_has():
    found = sizes("qwen2.5-7b")
    assert found.active == found.total == found.dense
    assert found.multiplied == found.total - 152064 * 3584
    tied = sizes("qwen2.5-1.5b")  # the head is the embedding, and multiplies
    assert tied.multiplied == tied.total


def test_a_training_token_of_deepseek_v3_is_250_gflop():
    # 2505.09343, the table of computational costs: 250 at a length of 4,096. Causal: half of it.
    flops = 3 * forward_flops(planned(), 4096 / 2)
    assert round(flops / 1e9, 1) == 250.5
    attention = 3 * 2 * 61 * 128 * (128 + 64 + 128) * 2048
    assert flops == 6 * (37_552_282_624 - 129280 * 7168) + attention


def test_in_decoding_a_head_reads_a_latent_twice_and_a_rotated_key():
    run = planned()
    added = forward_flops(run, 1000, decode=True) - forward_flops(run, 0, decode=True)
    assert added == 2 * 61 * 128 * (512 + 64 + 512) * 1000


def test_tokens_of_outputs_of_one_length_see_half_of_it():
    assert planned(mean_tokens=4000, longest=4000, prompt_tokens=100).context == 100 + 2000
    assert planned(mean_tokens=4000, longest=40000, prompt_tokens=100).context == 100 + 4000


def test_caches_have_their_published_bytes_a_token():
    # 2505.09343, the table of cache sizes: 70.272, 327.680 and 516.096 KB.
    dense = PUBLISHED["llama-3.3-70b"]
    qwen_72b = from_json(dict(dense, num_hidden_layers=80))
    llama_405b = from_json(dict(dense, num_hidden_layers=126, hidden_size=16384,
                                num_attention_heads=128))  # fmt: skip
    assert cache_bytes(read_config("deepseek-v3")) == 70_272
    assert (cache_bytes(qwen_72b), cache_bytes(llama_405b)) == (327_680, 516_096)


def test_a_trillion_tokens_cost_180k_gpu_hours():
    # V3's report: 180K H800-hours. At 39 % of 989 TFLOP/s.
    run = planned(mfu=0.39)
    hours = 1e12 * 3 * forward_flops(run, 2048) / run.usable.flops / 3600
    assert hours == pytest.approx(180_400, rel=3e-4)


# --- bytes


def test_experts_tokens_of_a_training_step_are_307_gb_and_take_7_7_of_its_19_95_seconds():
    # V3's report: experts over 64 GPUs, 8 nodes; a token goes to at most 4 nodes, in FP8, and comes
    # back in bf16; its gradient likewise. The step is published (19.946 s), the 307 GB are not:
    # they hold if none of the 4 is the token's own node (3.5 on average, were nodes alike).
    run = planned(gpus=2048, ep=64, mfu=0.39)
    assert exchange_bytes(run)[0] == 4 * 7168 * (1 + 2)
    moved, alone = exchange(run, TOKENS)
    assert 2 * moved / 1e9 == pytest.approx(307, abs=0.6)  # 306.5
    assert 2 * alone == pytest.approx(7.7, abs=0.05)  # at 40 GB/s
    step = TOKENS * 3 * forward_flops(run, 2048) / run.usable.flops
    assert step == pytest.approx(19.946, abs=0.01)


def test_tokens_use_the_network_only_between_nodes():
    copy = 7168 * 3
    assert exchange_bytes(planned(ep=1)) == (0, 0)
    assert exchange_bytes(planned(ep=8)) == (0, 7 * copy)
    assert exchange_bytes(planned(ep=16)) == (copy, 8 * copy)  # there is one other node
    assert exchange_bytes(planned(ep=256))[0] == 8 * copy  # a group is on 4 nodes: one each
    assert exchange_bytes(planned(ep=64), direct=True)[0] == 8 * copy


def test_gathering_is_bound_by_nvlink_within_a_node_and_by_its_cards_between_nodes():
    near = planned(**QWEN_7B)
    moved, alone = gather(near, 2)
    assert moved == 2 * sizes("qwen2.5-7b").total * 7 / 8
    assert alone == pytest.approx(moved / 160e9)
    # 8 cards of 40 GB/s bring a node more than NVLink can pass on, 2 of them less.
    far = planned(**{**QWEN_7B, "gpus": 16})
    assert gather(far, 2)[1] == pytest.approx(2 * sizes("qwen2.5-7b").total * 15 / 16 / 160e9)
    slow = planned(**{**QWEN_7B, "gpus": 16}, ib=12.5)
    assert gather(slow, 2)[1] == pytest.approx(2 * sizes("qwen2.5-7b").total * 15 / 16 / 80e9)


def test_experts_are_gathered_from_the_gpus_that_have_the_same_ones():
    found, run = sizes("deepseek-v3"), planned()
    moved, alone = gather(run, 2)
    dense, experts = 2 * found.dense * 511 / 512, 2 * found.experts / 64 * 7 / 8
    assert moved == pytest.approx(dense + experts)
    assert alone == pytest.approx(dense / 160e9 + experts / 40e9)  # one of a kind in a node


# --- memory


def test_weights_gradients_and_states_are_18_bytes_a_parameter_over_all_gpus():
    for gpus in (256, 512):
        update = memory(planned(gpus=gpus))["update"]
        kept = update["weights"] + update["gradients"] + update["optimizer"]
        assert kept == pytest.approx(18 * sizes("deepseek-v3").total / gpus)


def test_a_gpu_that_writes_has_all_but_the_experts():
    found = sizes("deepseek-v3")
    assert found.dense == pytest.approx(17.12e9, rel=1e-3)
    rollout = memory(planned())["rollout"]
    assert rollout["weights"] == 2 * (found.dense + found.experts / 64)
    assert rollout["cache"] == 16 * 70_272 * 10_512
    halved = memory(planned(rollout_dtype="float8"))["rollout"]
    assert halved["weights"] == rollout["weights"] / 2


def test_what_does_not_fit_is_said():
    assert "It fits 80 GB, with 16 outputs at a time" in report(planned())
    assert "It does NOT fit 80 GB: update is" in report(planned(gpus=64))
    assert slots(planned(ep=32)) < 16  # the rest of the outputs waits


def test_activations_shrink_with_the_gpus_that_share_a_row_and_grow_with_rows():
    one, eight, two = (memory(planned(**c))["update"]["activations"]
                       for c in (dict(cp=1), dict(cp=8), dict(cp=8, micro_rows=2)))  # fmt: skip
    assert one == pytest.approx(8 * eight, rel=0.02) and two == pytest.approx(2 * eight, rel=0.02)


# --- time


def test_a_dense_model_writes_one_output_as_fast_as_its_weights_are_read():
    step = decode_step(planned(**QWEN_7B), 1, 1000)
    read = 2 * (7_615_616_512 - 152064 * 3584) + 1000 * 57_344
    assert step["memory"] == pytest.approx(read / (0.8 * 3.35e12))
    assert together(step) == step["memory"] and step["network"] == 0


def test_decoding_is_bound_by_memory_for_few_outputs_and_by_compute_for_many():
    run = planned(gpus=64, latency=0, ib=1000)
    few, many = (decode_step(run, rows, 100) for rows in (1, 512))
    assert max(few, key=few.get) == "memory" and max(many, key=many.get) == "compute"


def test_few_tokens_read_few_experts():
    run = planned(gpus=8, ep=1, latency=0)
    found = sizes("deepseek-v3")
    one = decode_step(run, 1, 0)["memory"] * run.usable.memory_rate
    assert one == pytest.approx(2 * found.multiplied)  # the 8 it chose
    many = decode_step(run, 4096, 0)["memory"] * run.usable.memory_rate
    assert many == pytest.approx(2 * (found.total - 129280 * 7168))


def test_deepseeks_service_writes_as_fast_as_it_says_within_a_third():
    # DeepSeek, "Inference System Overview" (2025): 14.8K tokens/s of decoding a node of 8 H800 and
    # 20-22 of one user, so 88 outputs a GPU; caches of 4,989 tokens; experts over 144 GPUs, some
    # twice, here 128. It overlaps network and compute and multiplies in FP8, so ours is slower.
    run = planned(gpus=128, ep=128, rollout_dtype="float8")
    speed = 1 / together(decode_step(run, 88, 4989))
    assert 2 / 3 * 20 < speed < 22
    assert 2 / 3 * 14_800 < 8 * 88 * speed < 14_800


def test_a_round_of_r1_zero_takes_about_as_long_as_published():
    # R1's supplement: ~198 hours on 512 H800; 10,400 steps, 16 to a rollout of 8,192 outputs: 650
    # rounds of 1,097 s. Defaults as first guessed, and 8,000 or 14,000 tokens an output.
    assert 198 * 3600 / (10_400 / 16) == pytest.approx(1097, abs=1)
    found = {mean: sum(seconds(planned(mean_tokens=mean)).values())
             for mean in (8000, 10000, 14000)}  # fmt: skip
    assert found == pytest.approx({8000: 1042, 10000: 1121, 14000: 1343}, abs=2)
    assert found[8000] < 1097 < found[14000]
    # It might have been otherwise: FP8 and drafts make it half as long, one GPU a row half as long
    # again. What is not reported decides.
    fast = planned(rollout_dtype="float8", accepted=0.85)
    assert sum(seconds(fast).values()) == pytest.approx(580, abs=2)
    assert sum(seconds(planned(cp=1)).values()) == pytest.approx(1765, abs=2)


def test_a_synchronous_round_is_bound_by_its_longest_rollout():
    run = planned()
    (rollout, *_) = phases(run)
    assert rollout.bound == "longest rollout"
    busy = max(rollout.parts["compute"], rollout.parts["memory"]) + rollout.parts["network"]
    assert rollout.parts["longest"] > 2 * busy
    # So twice the GPUs hardly help, nor do half the tokens, but half the cap does.
    took = rollout.seconds
    assert seconds(planned(gpus=1024))["rollout"] > 0.9 * took
    assert seconds(planned(mean_tokens=5000))["rollout"] > 0.9 * took
    assert seconds(planned(longest=16384))["rollout"] < 0.6 * took


def test_a_given_speed_sets_how_long_the_longest_takes():
    rollout = seconds(planned(speed=32.0))["rollout"]
    assert rollout == pytest.approx(32768 / 32, rel=3e-3)  # and questions are read


def test_with_one_length_and_few_slots_throughput_binds():
    run = planned(model="qwen2.5-7b", gpus=8, outputs=8192, mean_tokens=4096, longest=4096)
    assert bounds(run)["rollout"] == "memory"
    assert slots(run) < 1024


def test_a_step_waits_for_the_gpus_of_its_longest_row():
    alone, shared = planned(cp=1), planned(cp=8)
    assert bounds(alone)["update"] == "longest row" and bounds(shared)["update"] == "compute"
    row, context = 512 + 32768, (512 + 32768) / 2
    flops = 16 * row * 4 * forward_flops(alone, context)  # 4: recomputed
    assert seconds(alone)["update"] == pytest.approx(flops / (0.39 * 989e12))


def test_an_update_moves_weights_twice_and_gradients_once_for_each_micro_batch():
    run = planned(mean_tokens=8000)
    update = next(phase for phase in phases(run) if phase.name == "update")
    micro_batches = 16 * 3  # 8,512 tokens a GPU and step, 4,160 to a micro-batch
    assert update.moved["weights"] == pytest.approx(micro_batches * 2 * gather(run, 2)[0])
    assert update.moved["gradients"] == pytest.approx(micro_batches * gather(run, 4)[0])
    assert update.bound == "network"
    roomy = next(p for p in phases(planned(mean_tokens=8000, micro_rows=3)) if p.name == "update")
    assert roomy.moved["weights"] == pytest.approx(update.moved["weights"] / 3)
    assert roomy.bound == "compute"


def test_without_a_reference_there_is_no_pass_and_no_memory_for_it():
    run = planned(reference=False)
    assert "reference" not in seconds(run) and "reference" not in memory(run)


def test_weights_and_states_go_to_the_cpu_and_back_once_a_round():
    weights = phases(planned(**QWEN_7B))[-1]  # 12 bytes of states, 4 of two models, by PCIe
    away = 16 * sizes("qwen2.5-7b").total / 8
    assert weights.parts["host"] == pytest.approx(2 * away / (0.8 * 64e9))
    assert weights.moved["weights"] == 2 * sizes("qwen2.5-7b").total * 7 / 8
    assert weights.bound == "host"


# --- to read


@pytest.mark.parametrize("model", ["qwen2.5-7b", "moonlight-16b-a3b"])
def test_small_models_fit_eight_gpus(model, capsys):
    main(parse(Config, {}, [f"--model={model}", "--gpus=8", "--outputs=1024", "--longest=8192",
                            "--mean-tokens=2000", "--minibatches=4"]))  # fmt: skip
    text = capsys.readouterr().out
    assert "It fits 80 GB" in text and "longest rollout" in text and "GPU-hours" in text
    assert ("experts over 8" in text) == (model == "moonlight-16b-a3b")


def test_flags_change_the_hardware():
    run = planned(gpu="A100", tflops=500, nvlink=100, network_share=0.5, mfu=0.4)
    assert run.usable.flops == 0.4 * 500e12 and run.usable.nvlink == 50e9
    assert run.usable.ib == 12.5e9 and run.peak.memory_rate == 2.04e12


@pytest.mark.parametrize(("wrong", "said"), [
    ("--gpu=H20", "one of H800, H100, A100"),
    ("--mfu=3", "--mfu 3.0: at least 0.01, at most 1"),
    ("--gpus=12", "--gpus 12: fewer than 8, or whole nodes of 8"),
    ("--cp=3", "--cp 3: it must divide --gpus 512"),
    ("--mean-tokens=40000", "--mean-tokens 40000: at least 1, at most 32768"),
    ("--latency=-1", "--latency -1.0: at least 0"),
    ("--gpuz=8", "did you mean --gpu?"),
])  # fmt: skip
def test_a_wrong_flag_gets_one_line_with_what_is_allowed(wrong, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Config, {}, [wrong])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_a_wrong_model_or_split_of_experts_is_refused_with_what_is_allowed():
    with pytest.raises(UserError, match="--model deepseek: .*did you mean deepseek-v3"):
        prepare(Config(model="deepseek"))
    with pytest.raises(UserError, match="--ep 7: 256 experts and 512 GPUs allow 1, 2, 4, .*256$"):
        planned(ep=7)
    with pytest.raises(UserError, match="--ep 8: 1 experts and 8 GPUs allow 1$"):
        planned(**QWEN_7B, ep=8)
