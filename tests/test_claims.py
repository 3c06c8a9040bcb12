"""bench/claims: each claim's rule on made-up runs, the runner with stubs, the maths of PPO."""

import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo
from bench.claims import __main__ as command
from bench.claims import claim as claims
from bench.claims import hacking, jobs, kl_reward, ppo, sampling
from bench.claims.claim import Effect, Measured, decide
from bench.claims.credit import wrong_tokens
from bench.claims.growth import jumps
from bench.claims.jobs import Job, Lab
from bench.claims.stages import CONCERNS, STAGES
from data import chat
from data.problems import Problem
from model import Config, Transformer
from runtime.flags import UserError
from sample import Output

ROOT = Path(__file__).parent.parent
NAMES = {claim.name: claim for claim in command.CLAIMS}
DENSE = Config.preset(
    "toy", vocab_size=9, hidden_size=12, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6,
    n_routed_experts=None, max_position_embeddings=64,
)  # fmt: skip


# ---- the list ------------------------------------------------------------------------------


def test_the_list_of_claims_is_complete_and_within_the_budget():
    expected = (
        "accuracy length reflection difficulty voting test-time greedy cap reference clip kl ppo"
        " bias aggregation hacking language stages distillation size asynchronous"
    )
    assert sorted(NAMES) == sorted(expected.split()) and len(NAMES) == len(command.CLAIMS)
    lab = Lab()
    for claim in command.CLAIMS:
        assert claim.rule and claim.paper and claim.states
        took = jobs.minutes(command.own(command.jobs_of(claim, lab), lab), 2)
        assert took <= command.LONGEST, f"{claim.name}: {took:.0f} min"


def test_a_wrong_name_names_the_nearest_one():
    with pytest.raises(
        UserError, match="no claim 'lenght'; did you mean length.; expected accuracy"
    ):
        command.chosen(["lenght"])
    assert command.chosen(["ppo", "ppo", "kl"]) == [NAMES["ppo"], NAMES["kl"]]
    assert command.chosen(["all"]) == command.CLAIMS


def test_every_program_that_a_claim_starts_has_its_smoke_test_and_knows_its_flags():
    import train_zero
    from bench.claims import checkpoints, sizes
    from runtime.flags import parse

    programs = dict(ppo=ppo, kl_reward=kl_reward, hacking=hacking, sampling=sampling,
                    checkpoints=checkpoints, sizes=sizes)  # fmt: skip
    programs["train_zero.py"] = train_zero
    for lab in (Lab(seeds=(0,)), Lab(seeds=(0,), base=Path("base"))):
        for job in itertools.chain.from_iterable(
            command.jobs_of(claim, lab) for claim in command.CLAIMS
        ):
            if not job.command:
                continue
            given = list(job.command)
            if given[0] == "-m":
                name, given = given[1].rpartition(".")[2], given[2:]
            else:
                name, given = given[0], given[1:]
            config = parse(programs[name].Config, getattr(train_zero, "PRESETS"), given)
            assert Path(config.out) == job.out and config.threads == 1


# ---- the rule ------------------------------------------------------------------------------


def effects(*values, noise=0.1):
    return [[Effect("x", value, noise)] for value in values]


@pytest.mark.parametrize(
    "values, verdict",
    [
        ((0.2, 0.3, 0.11), "shown"),
        ((0.2, 0.3, 0.1), "not shown at this scale"),  # at the noise is not above it
        ((0.2, 0.3, -0.5), "not shown at this scale"),
        ((-0.2, -0.3, -0.11), "contradicted"),
        ((-0.2, -0.3, -0.05), "not shown at this scale"),
        ((math.nan, 0.3, 0.3), "not shown at this scale"),
    ],
)
def test_the_rule_asks_for_all_seeds_beyond_noise(values, verdict):
    assert decide(effects(*values))[0] == verdict


def test_one_part_against_the_paper_on_all_seeds_contradicts_the_others_do_not_save_it():
    parts = [[Effect("a", 1.0, 0.1), Effect("b", -1.0, 0.1)] for _ in range(3)]
    verdict, reason = decide(parts)
    assert verdict == "contradicted"
    assert reason.startswith("a: yes (+1 ± 0.1, ") and "b: the opposite (-1" in reason
    parts[1][1] = Effect("b", 0.0, 0.1)
    assert decide(parts)[0] == "not shown at this scale"


# ---- each claim on made-up runs: +1 as in the paper, -1 the opposite, 0 no difference ----------

LEVELS = [str(level) for level in range(2, 11)]


def evaluation(passed=0.5, **values):
    flat = {level: {"pass@1": passed, "tokens": 20.0} for level in LEVELS}
    found = {"pass@1": passed, "cons@16": passed, "tokens": 20.0, "reflection": 0.05,
             "language": 0.8, "instruction": 0.5, "helpful": 0.5, "safe": 0.5, "by_level": flat,
             "problems": 225, "samples": 16}  # fmt: skip
    found["interval"] = [passed - 0.01, passed + 0.01]
    return {**found, **values}


def made(out, base=None, zero=None, accuracy=0.5, tokens=20.0, easier=0.0, wrong=30, **more):
    """A run's directory. accuracy, tokens, easier: numbers, or functions of training's progress."""
    out.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(str(out)), []

    def value(of, progress):
        return (of(progress) if callable(of) else of) + rng.uniform(-0.01, 0.01)

    for i in range(80):
        ahead = value(easier, i / 79)
        by_level = {"2": 0.5 + ahead, "9": 0.5}
        row = dict(phase="rl", step=2 * i + 1, accuracy=value(accuracy, i / 79), kl=0.1,
                   tokens=value(tokens, i / 79), reward=value(more.get("reward", 1.0), i / 79),
                   reflection=0.05, clip_fraction=0.01, by_level=by_level)  # fmt: skip
        lines.append(json.dumps(row) + "\n")
    (out / "metrics.jsonl").write_text("".join(lines))
    outputs = [dict(reward=1.0, tokens=["x"] * (wrong + j)) for j in range(4)]
    outputs.append(dict(reward=2.0, tokens=["x"] * 500))
    group = dict(phase="rl", step=61, outputs=outputs)
    (out / "rollouts.jsonl").write_text((json.dumps(group) + "\n") * 5)
    result = dict(base=base or evaluation(), zero=zero or evaluation(), **more.get("result", {}))
    (out / "result.json").write_text(json.dumps(result))
    return out


def result_alone(out, result, **files):
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result))
    for name, value in files.items():
        (out / f"{name}.json").write_text(json.dumps(value))
    return out


def sloped(per_operation):
    levels = {level: {"pass@1": 0.5, "tokens": 20 + per_operation * int(level)} for level in LEVELS}
    return evaluation(by_level=levels)


def voted(s):
    both = {"pass@1": 0.5, "cons": [0.5, 0.5 + 0.2 * s], "pass": [0.5, 0.7]}
    return dict(k=[1, 64], base=both, trained=dict(both, gain=0.2 * s, noise=0.02))


def bumpy(s):
    greedy, sampled = 0.01 * 3.0**s, 0.01
    rows = [dict(step=i, greedy=0.5 + greedy * (-1) ** i, sampled=0.5 + sampled * (-1) ** i)
            for i in range(20)]  # fmt: skip
    return {"checkpoints": rows}


def staged(s):
    high = dict.fromkeys(STAGES, 0.5)
    rows = {stage: evaluation(0.5) for stage in high}
    rows["dev1"] = evaluation(0.5 - 0.2 * s, language=0.8 + 0.15 * s)
    rows["r1"] = evaluation(0.5 + 0.1 * s, instruction=0.5 + 0.45 * s, helpful=0.5 + 0.4 * s)
    rows["dev3"] = evaluation(0.5, instruction=0.5 + 0.2 * s, helpful=0.5 + 0.2 * s)
    return rows


def ramp(s, size=0.3):
    return lambda progress: 0.4 + s * size * progress


def found(name, at, s):
    """The directories of a claim's runs, of one seed."""
    up = evaluation(0.5 + 0.2 * s)
    if name == "accuracy":
        return {"zero": made(at, zero=up)}
    if name == "length":
        return {"zero": made(at, tokens=lambda progress: 20 + 10 * s * progress)}
    if name == "reflection":
        return {"zero": made(at, base=evaluation(reflection=0.2),
                             zero=evaluation(reflection=0.2 + 0.19 * s))}  # fmt: skip
    if name == "difficulty":
        return {"zero": made(at, easier=lambda progress: 0.3 * s * (progress < 0.6))}
    if name == "test-time":
        return {"zero": made(at, base=sloped(0.01), zero=sloped(3.0 * s))}
    if name == "voting":
        return {"voting": result_alone(at, voted(s))}
    if name == "greedy":
        return {"checkpoints": result_alone(at, bumpy(s))}
    if name == "stages":
        return {"r1": result_alone(at, staged(s))}
    if name == "language":
        on, off = (dict(staged(0), dev2=evaluation(language=0.7 + 0.25 * sign)) for sign in (s, 0))
        return {"r1": result_alone(at / "on", on), "mixed": result_alone(at / "off", off)}
    if name == "distillation":
        curves = dict(
            curves={key: [{"seconds": 1.0, "pass@1": 0.5}] for key in ("distilled", "rl")}
        )
        rows = dict(base=evaluation(), distilled=up, rl=evaluation())
        return {"distill": result_alone(at, rows, curves=curves)}
    if name == "hacking":
        fall = made(at / "a", reward=ramp(s), accuracy=lambda p: 0.5 + s * 0.3 * (p < 0.5))
        return {"careless half of the time": fall, "careful": made(at / "b")}
    # The rest compare a first arm, which the paper finds better, with others.
    better, worse = {
        "cap": ("raised to 112", ["kept at 40"]),
        "reference": ("refreshed", ["frozen"]),
        "clip": ("eps 10", ["eps 0.2", "no clip"]),
        "kl": ("in the loss", ["in the reward"]),
        "ppo": ("GRPO", ["PPO, lambda 0.95", "PPO, lambda 1"]),
        "bias": ("GRPO", ["no 1/|o|", "no std", "neither (Dr. GRPO)"]),
        "aggregation": ("token", ["output", "constant"]),
        "size": ("toy", ["tiny", "small"]),
        "asynchronous": ("async", ["sync"]),
    }[name]
    outs = {other: made(at / f"{i}") for i, other in enumerate(worse)}
    up = evaluation(0.5) if name == "bias" and s > 0 else up  # and no more accurate without
    up = dict(zero=up, accuracy=0.5 + 0.2 * s, tokens=20.0 + 5 * s, wrong=30 + 10 * s)
    outs[better] = made(at / "better", **up)
    if name == "ppo":
        outs["PPO, lambda 1"] = made(at / "one", **up)
    return outs


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_claim_is_shown_not_shown_or_contradicted_where_it_should(name, tmp_path):
    for signs, verdict in [((1, 1, 1), 0), ((1, 1, -1), 1), ((1, 1, 0), 1), ((-1, -1, -1), 2)]:
        if 0 in signs and name == "asynchronous":  # whose claim is that there is no difference
            verdict = 0
        seeds = [tmp_path / f"{i}{sign}" for i, sign in enumerate(signs)]
        measured = [NAMES[name].measure(found(name, at, sign)) for at, sign in zip(seeds, signs)]
        told, reason = decide([each.effects for each in measured])
        assert told == claims.VERDICTS[verdict], f"{signs}: {reason}"
        assert measured[0].figures and measured[0].curves


def test_wrong_outputs_are_those_that_did_not_earn_all(tmp_path):
    outs = found("bias", tmp_path, 1)
    assert NAMES["bias"].measure(outs).effects[0].value == 10  # 30 to 33 tokens, and 40 to 43
    assert wrong_tokens(outs["GRPO"]) == [40, 41, 42, 43] * 5
    assert wrong_tokens(outs["GRPO"], after=61) == []


def test_r1_within_3_points_of_zero_counts_the_evaluations_noise(tmp_path):
    """As its rule says: each beyond 95 % intervals."""
    measured = NAMES["stages"].measure(found("stages", tmp_path, 0))
    (near,) = (each for each in measured.effects if "within 3 points" in each.name)
    assert near == Effect(near.name, pytest.approx(0.03), pytest.approx(0.01 * 2**0.5))


def test_what_two_equal_runs_may_differ_by_is_noise():
    equal = claims.passes_more("x", evaluation(0.52), evaluation(0.5))
    assert equal.noise == claims.SAME_PASS and equal.value < equal.noise
    wide = evaluation(0.52, interval=[0.42, 0.62])
    assert claims.passes_more("x", wide, wide).noise == pytest.approx(0.1 * 2**0.5)


def test_general_requests_are_as_many_as_the_noise_of_their_measures_says():
    counts = dict.fromkeys(CONCERNS, 0)
    for request in chat.held_out(600):
        for key in chat.grade(request, "", ""):
            counts[key] += 1
    assert counts == CONCERNS


def test_jumps_of_a_straight_line_are_none_and_of_noise_its_spread():
    assert jumps([0.1 * i for i in range(20)]) == pytest.approx(0, abs=1e-12)
    rng = random.Random(0)
    assert jumps([rng.gauss(0, 0.3) for _ in range(5000)]) == pytest.approx(0.3, rel=0.05)


# ---- rows and tables -----------------------------------------------------------------------


def stub(returncode=0, words=""):
    """In place of starting a run: it ends at once, and leaves what a run leaves."""

    def start(job):
        job.out.parent.mkdir(parents=True, exist_ok=True)
        jobs.log_of(job).write_text(words)
        if returncode == 0:
            made(job.out, zero=evaluation(0.9))
        started.append(job.name)
        return SimpleNamespace(poll=lambda: returncode, returncode=returncode)

    started = start.started = []
    return start


def test_a_claim_leaves_a_row_its_metrics_and_a_figure_and_the_table_is_made_of_rows(
    tmp_path, capsys
):
    lab = Lab(tmp_path / "runs", tmp_path / "results")
    start = stub()
    assert command.reproduce([NAMES["accuracy"]], lab, 2, start) == []
    assert start.started == ["zero-0", "zero-1", "zero-2"]
    place = lab.results / "accuracy"
    row = json.loads((place / "row.json").read_text())
    assert list(row) == list(claims.ROW) and row["seeds"] == [0, 1, 2]
    assert row["verdict"] == "shown" and row["figures"]["after RL"] == [0.9] * 3
    assert row["command"] == "python -m bench.claims accuracy"
    made_by = row["runs"]["zero-1"]
    assert made_by["command"].startswith("python train_zero.py --seed 1 --threads 1 --out ")
    assert all(made_by[key] for key in ("commit", "machine", "versions", "date"))
    assert row["machine"] == made_by["machine"] and made_by["seconds"] == 0
    again = [
        Measured.read(each) for each in json.loads((place / "metrics.json").read_text()).values()
    ]
    assert decide([each.effects for each in again]) == (row["verdict"], row["reason"])
    assert "shown: gain in pass@1: yes (+0.4" in capsys.readouterr().out
    assert command.state(NAMES["accuracy"], lab) == "run"
    assert command.state(NAMES["ppo"], lab) == "partly"
    table = claims.table(command.CLAIMS, lab.results).splitlines()
    assert len(table) == 3
    assert table[2].startswith("| [Accuracy rises under RL alone](bench/results/claims/accuracy) |")
    assert "after RL 0.900;" in table[2] and table[2].endswith("| **shown** |")
    pytest.importorskip("matplotlib")
    assert (place / "figure.png").stat().st_size > 1000


def test_spread_is_the_mean_and_the_range():
    assert claims.spread([0.1, 0.2, 0.6]) == "0.300 (0.100 to 0.600)"
    assert claims.spread([36.04, 36.0, 36.02]) == "36.0"
    assert claims.spread([0.5, 0.5]) == "0.500"


def test_committed_rows_have_all_fields_and_the_verdict_that_their_metrics_give():
    for file in sorted((ROOT / "bench/results/claims").glob("*/row.json")):
        row = json.loads(file.read_text())
        assert list(row) == list(claims.ROW), file
        assert row["rule"] == NAMES[row["name"]].rule, f"{file}: the rule was changed after the run"
        assert row["seeds"] == [0, 1, 2] and row["verdict"] in claims.VERDICTS
        assert row["note"] == NAMES[row["name"]].note, f"{file}: measure it again"
        for run in row["runs"].values():
            assert "not recorded" not in (run["commit"], run["machine"], run["versions"]), file
        if row["verdict"] != claims.VERDICTS[0]:
            assert row["note"], f"{file}: {row['verdict']}, and why?"
        saved = json.loads((file.parent / "metrics.json").read_text())
        seeds = [Measured.read(saved[str(seed)]).effects for seed in row["seeds"]]
        assert decide(seeds) == (row["verdict"], row["reason"]), file
        assert (file.parent / "figure.png").exists()


def test_the_table_of_claims_in_readme_is_what_the_command_prints():
    table = claims.table(command.CLAIMS, ROOT / "bench/results/claims")
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- claims -->") == 2
    between = readme.split("<!-- claims -->")[1].strip()
    rows = len(table.splitlines()) > 2
    assert between == (table if rows else "")


# ---- running -------------------------------------------------------------------------------


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "draw", lambda *_: None)  # it takes a second
    lab = Lab(tmp_path / "runs", tmp_path / "results", (0,))
    made(lab.zero(0).out)
    start = stub()
    assert command.reproduce([NAMES["aggregation"], NAMES["bias"]], lab, 2, start) == []
    assert sorted(start.started) == [f"claims/{name}-0" for name in
                                     ("constant", "dr-grpo", "no-std", "token")]  # fmt: skip
    start.started.clear()
    command.reproduce([NAMES["aggregation"]], lab, 2, start)
    assert start.started == []


def test_a_run_that_fails_is_named_with_its_last_lines_and_what_needs_it_is_left_out(
    tmp_path, capsys
):
    lab = Lab(tmp_path / "runs", tmp_path / "results", (0,))
    start = stub(2, "line 1\nerror: the base is not competent\n")
    assert command.reproduce([NAMES["voting"]], lab, 2, start) == ["zero-0", "claims/voting-0"]
    out = capsys.readouterr().out
    assert "zero-0 FAILED with exit code 2" in out and "error: the base is not competent" in out
    assert start.started == ["zero-0"] and not lab.results.exists()


def test_a_bench_that_has_to_run_first_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing is committed
    lab = Lab(tmp_path / "runs", tmp_path / "results", (0,))
    assert command.reproduce([NAMES["stages"]], lab, 2, stub()) == ["stages"]
    assert (
        "no result of r1-0, which are another bench's: python -m bench.r1"
        in capsys.readouterr().out
    )


def test_another_benchs_run_is_taken_from_runs_before_the_committed_one(tmp_path):
    lab = Lab(tmp_path, tmp_path / "results", (0,))
    committed = lab.made("r1-0", "r1/r1-0", "python -m bench.r1")
    assert committed.out == Path("bench/results/r1/r1-0")
    assert committed.made_by() == "python -m bench.r1; read from bench/results/r1/r1-0"
    assert "EPYC" in committed.made_where()["machine"]
    result_alone(tmp_path / "r1-0", {})
    own = lab.made("r1-0", "r1/r1-0", "python -m bench.r1")
    assert own.out == tmp_path / "r1-0" and own.made_where()["machine"] == "not recorded"


def test_ctrl_c_tells_the_runs_to_save_and_end(tmp_path):
    """A real child that, as a run does, saves when it is asked to end."""
    saved = tmp_path / "saved"
    program = (
        "import pathlib, signal, sys, time\n"
        f"save = pathlib.Path({str(saved)!r}).touch\n"
        "signal.signal(signal.SIGTERM, lambda *_: (save(), sys.exit(143)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)\n"
    )
    job = Job("x", tmp_path / "x", ("-c", program), 1.0)

    def start(job):
        child = jobs.start(job)
        while "ready" not in jobs.log_of(job).read_text():
            assert child.poll() is None
        pressed.append(child)
        real = child.poll
        child.poll = lambda: real() if stopped else press()
        return child

    def press():
        stopped.append(True)
        raise KeyboardInterrupt

    pressed, stopped = [], []
    with pytest.raises(KeyboardInterrupt):
        jobs.run_all([job], 1, start, poll=0.01)
    assert saved.exists() and pressed[0].returncode == 143


def test_a_job_of_the_recipe_goes_on_by_the_same_command():
    lab = Lab()
    assert lab.zero(1).command[-1] == "--resume"
    assert "--resume" in lab.arm("x", 1, "--eps", "10").command
    assert "--resume" not in lab.zero(1).made_by()  # nobody has to give it


# ---- PPO and the KL in the reward ----------------------------------------------------------


def test_gae_eq_11_to_16_by_hand():
    rewards = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    values = torch.tensor([1.0, 0.5, 1.5], dtype=torch.float64)
    # delta = (0 + .5 - 1, 0 + 1.5 - .5, 2 - 1.5) = (-.5, 1, .5), lambda 1/2:
    # A = (-.5 + .5 (1 + .5 .5), 1 + .25, .5) = (.125, 1.25, .5)
    advantages, returns = ppo.gae(rewards, values, lam=0.5)
    assert advantages.tolist() == [0.125, 1.25, 0.5]
    assert returns.tolist() == [1.125, 1.75, 2.0]
    # lambda 0 is the one-step error; gamma counts what comes later less.
    assert ppo.gae(rewards, values, lam=0.0)[0].tolist() == [-0.5, 1.0, 0.5]
    assert ppo.gae(rewards, values, lam=1.0, gamma=0.5)[0].tolist() == [-0.5, 0.5, 0.5]


def test_with_lambda_1_and_no_expectation_an_advantage_is_reinforces_return():
    rewards = torch.tensor([0.3, -0.1, 0.0, 1.0], dtype=torch.float64)
    advantages, returns = ppo.gae(rewards, torch.zeros(4, dtype=torch.float64), lam=1.0)
    expected = [float(rewards[t:].sum()) for t in range(4)]
    assert advantages.tolist() == pytest.approx(expected) == returns.tolist()


def test_with_lambda_1_returns_do_not_depend_on_the_critic():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(2))
    _, returns = ppo.gae(rewards, values, lam=1.0)
    assert torch.allclose(returns, rewards.flip(0).cumsum(0).flip(0), atol=1e-12)


def test_instructgpt_eq_2_the_kl_in_the_reward_is_charged_token_by_token():
    """InstructGPT: r - beta log(pi / ref), the outcome at the last token."""
    logprobs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    assert ppo.token_rewards(2.0, logprobs, ref, 0.1).tolist() == pytest.approx([-0.05, 0.1, 2.0])
    assert ppo.token_rewards(2.0, logprobs, None, 0.1).tolist() == [0, 0, 2.0]


def batch_of(lengths, rewards, seed=0, group=2):
    """Outputs of made-up tokens, two to a question, each of whose tokens has log-prob -1."""
    rng = random.Random(seed)
    outputs = [
        Output([rng.randrange(1, 9) for _ in range(n - 1)] + [0], [-1.0] * n, "stop")
        for n in lengths
    ]
    questions = len(lengths) // group
    batch = grpo.Rollout(
        list(range(questions)), [Problem("q", "1")] * questions, [[1, 2]] * questions, outputs,
        [""] * len(outputs),
    )  # fmt: skip
    batch.rewards_PG = torch.tensor(rewards, dtype=torch.float64).view(questions, group)
    return batch


def test_of_two_right_outputs_the_longer_one_earns_less_with_the_kl_in_the_reward():
    batch = batch_of([3, 6], [2.0, 2.0])
    batch.ref_logprobs = [torch.full((n,), -1.5) for n in (3, 6)]
    kl_reward.charge(batch, beta=0.1)
    assert batch.rewards_PG.tolist()[0] == pytest.approx([2 - 0.15, 2 - 0.3])
    assert batch.advantages_PG.tolist()[0] == pytest.approx([1.0, -1.0])  # in the loss: both 0
    assert batch.metrics["charged"] == pytest.approx(0.225)
    assert batch.metrics["groups_without_signal"] == 0  # whose outcomes agree


def test_where_the_policy_is_the_reference_nothing_is_charged():
    batch = batch_of([3, 6], [2.0, 0.0])
    batch.ref_logprobs = [torch.full((n,), -1.0) for n in (3, 6)]
    kl_reward.charge(batch, beta=0.1)
    assert batch.rewards_PG.tolist() == [[2.0, 0.0]]


def models():
    torch.manual_seed(0)
    policy, trunk = (Transformer(DENSE).double() for _ in range(2))
    for p in [*policy.parameters(), *trunk.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    critic = ppo.Critic(trunk)
    torch.nn.init.normal_(critic.head.weight)
    return policy, critic


SETTINGS = grpo.Settings(
    group_size=2, max_new_tokens=8, row_tokens=16, micro_tokens=32, eps=0.2, beta=0.0,
    max_grad_norm=math.inf,
)  # fmt: skip


def test_a_value_is_what_the_critic_expects_before_the_token():
    policy, critic = models()
    batch = batch_of([3, 6, 4, 2], [2.0, 0.0, 1.0, 0.0])
    laid = grpo.lay_out(batch, range(4), SETTINGS, torch.device("cpu"))
    values_N = critic.values(laid).detach()
    for o, output in enumerate(batch.outputs):
        whole = torch.tensor([batch.prompts[0] + output.tokens])
        hidden = critic.trunk.hidden(whole)[0][0].detach()
        for i in range(len(output.tokens)):
            [place] = ((laid.output_N == o) & (laid.place_N == i)).nonzero()
            expected = critic.head(hidden[1 + i]).detach()  # the prompt has two tokens
            assert float(values_N[place]) == pytest.approx(float(expected), abs=1e-10)


def test_judged_advantages_are_gae_of_each_output_and_whitened():
    policy, critic = models()
    batch = batch_of([3, 6, 4, 2], [2.0, 0.0, 1.0, 0.0])
    judged = ppo.judge(critic, batch, SETTINGS, lam=0.9, beta=0.0)
    plain = []
    for outcome, output in zip(batch.rewards_PG.flatten().tolist(), batch.outputs):
        whole = torch.tensor([batch.prompts[0] + output.tokens])
        values = critic.head(critic.trunk.hidden(whole)[0][0, 1:-1])[:, 0].detach()
        rewards = torch.zeros(len(output.tokens), dtype=torch.float64)
        rewards[-1] = outcome
        plain.append(ppo.gae(rewards, values, 0.9))
    every = torch.cat([advantages for advantages, _ in plain])
    for (advantages, returns), mine, wanted in zip(plain, judged.advantages, judged.returns):
        white = (advantages - every.mean()) / every.std(correction=0)
        assert torch.allclose(mine, white, atol=1e-6) and torch.allclose(wanted, returns)
    assert float(torch.cat(judged.advantages).mean()) == pytest.approx(0, abs=1e-9)


def test_on_policy_a_step_of_ppo_is_reinforce_with_its_advantages_and_regression_of_the_returns():
    policy, critic = models()
    batch = batch_of([3, 6, 4, 2], [2.0, 0.0, 1.0, 0.0])
    documents = [torch.tensor([batch.prompts[0] + output.tokens]) for output in batch.outputs]

    def logprobs(o):
        predicted = policy(documents[o])[0, 1:-1].log_softmax(-1)
        return predicted.gather(1, documents[o][0, 2:, None])[:, 0]

    for o, output in enumerate(batch.outputs):
        output.logprobs[:] = logprobs(o).tolist()
    judged = ppo.judge(critic, batch, SETTINGS, lam=0.9, beta=0.0)
    total = sum(len(output.tokens) for output in batch.outputs)
    value = [critic.head(critic.trunk.hidden(d)[0][0, 1:-1])[:, 0] for d in documents]
    loss = -sum((logprobs(o) * judged.advantages[o]).sum() for o in range(4)) / total
    loss = loss + sum(((value[o] - judged.returns[o]) ** 2).sum() for o in range(4)) / 2 / total
    trained = [(policy, p) for p in policy.parameters()]
    trained += [(critic, p) for p in critic.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in trained])
    before = [p.detach().clone() for _, p in trained]
    optimizers = [
        torch.optim.SGD([p for model, p in trained if model is which], lr=1.0)
        for which in (policy, critic)
    ]
    stats = ppo.step(policy, critic, optimizers, batch, judged, SETTINGS, 0, 1)
    for (_, p), old, gradient in zip(trained, before, gradients, strict=True):
        assert torch.allclose(p, old - gradient, atol=1e-9)
    assert stats["clip_fraction"] == 0 and stats["tokens_trained"] == total


def test_the_clip_of_ppo_is_grpos():
    policy, critic = models()
    batch = batch_of([3, 6, 4, 2], [2.0, 0.0, 1.0, 0.0])
    for output in batch.outputs:
        output.logprobs[:] = [-50.0] * len(output.tokens)  # the policy has moved far away
    ones = [torch.ones(n) for n in (3, 6, 4, 2)]
    judged = ppo.Advantages(ones, ones)
    before = [p.detach().clone() for p in policy.parameters()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (policy, critic)]
    stats = ppo.step(policy, critic, optimizers, batch, judged, SETTINGS, 0, 1)
    assert stats["clip_fraction"] == pytest.approx(1)
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters(), before))


def test_wrong_settings_of_the_programs_are_refused():
    with pytest.raises(UserError, match="--lam 1.5: from 0 to 1"):
        ppo.Config(lam=1.5)
    for given in (dict(aggregation="token"), dict(mask_truncated=True), dict(async_rollouts=2)):
        name = next(iter(given)).replace("_", "-")
        with pytest.raises(UserError, match=f"--{name} does nothing here: leave it out"):
            ppo.Config(**given)
    assert kl_reward.Config(aggregation="token").aggregation == "token"
    for program in (ppo, kl_reward, hacking):
        for given in (dict(offload=True), dict(ahead=2), dict(dtype="bfloat16")):
            with pytest.raises(UserError, match=f"--{next(iter(given))} does nothing here"):
                program.Config(**given)
    with pytest.raises(UserError, match="--beta 0.0: more than 0"):
        kl_reward.Config(beta=0.0)
    with pytest.raises(UserError, match="--samples 12: a power of 2"):
        sampling.Config(samples=12)
    with pytest.raises(UserError, match="--careless 2.0: from 0 to 1"):
        hacking.Config(careless=2.0)


# ---- voting, annotators --------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    right = [True, False, False, True, False]
    subsets = list(itertools.combinations(right, 3))
    share = sum(any(subset) for subset in subsets) / len(subsets)
    assert sampling.pass_at(3, 2, 5) == pytest.approx(share)
    assert sampling.pass_at(1, 2, 5) == pytest.approx(0.4) and sampling.pass_at(5, 1, 5) == 1.0


def test_cons_at_k_votes_in_blocks():
    answers = ["1", "1", "2", "2", "2", "1", None, None]
    assert sampling.cons_at(8, answers, "1") == 1.0  # three each: the earliest
    assert sampling.cons_at(4, answers, "1") == 0.5  # 2 against 2: the earliest; then 2
    assert sampling.cons_at(1, answers, "1") == 3 / 8


def test_the_gain_of_voting_is_paired_over_problems():
    problems = [Problem("a", "1"), Problem("b", "2")]
    found = sampling.curves(problems, [["1", "1", "1", "3"], ["2", "2", "4", "5"]], [1, 2, 4])
    assert found["pass@1"] == 0.625 and found["cons"][0] == 0.625 and found["cons"][-1] == 1.0
    assert found["gain"] == pytest.approx(0.375)
    assert found["noise"] == pytest.approx(1.96 * 0.17677 / 2**0.5, rel=1e-3)


def test_annotators_prefer_the_right_answer_or_the_longer_one():
    problem = Problem("q", "4")
    right, long = "<answer> 4 </answer>", "<think> and so on and on </think> <answer> 5 </answer>"
    assert hacking.prefers_first([right, long], problem, careless=False) is True
    assert hacking.prefers_first([right, long], problem, careless=True) is False
    assert hacking.prefers_first([long, long], problem, careless=True) is None
    assert hacking.prefers_first([long, long], problem, careless=False) is None
