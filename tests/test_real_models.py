"""The programs on directories as people download them: tiny models of transformers with a
tokenizer.json, from the first command to a model that transformers reads again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import sample
import sft
import train_r1
import train_zero
from data.problems import Problem
from data.tokenizer import Tokenizer
from runtime.pretrained import load_pretrained
from runtime.run import launch, parse

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# The control tokens of each family; the one that ends an answer comes first.
CONTROLS = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    "deepseek_v3": [
        "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    ],
}  # fmt: skip
TEMPLATES = {"qwen2": "r1-zero", "llama": "llama3", "deepseek_v3": "deepseek-r1"}
BIAS = torch.tensor([6.001, 6.012, 6.0203, 6.031])
R1_CHAT = "{{bos_token}}... {{'<｜Assistant｜><think>\\n'}}"


def downloaded(family: str, directory: Path) -> Path:
    """A tiny model in bf16 with a tokenizer of its own, as transformers saves them."""
    end, *others = CONTROLS[family]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["what is the answer to this question ?"] * 9, trainer)
    bpe.add_special_tokens([end, *others])
    bpe.add_tokens(["<think>", "</think>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end)
    if family == "deepseek_v3":
        tokenizer.chat_template = R1_CHAT
    tokenizer.save_pretrained(directory)
    common = dict(
        vocab_size=len(bpe.get_vocab()) + 7,  # more rows than tokens, as Qwen has
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, dtype=torch.bfloat16,
        eos_token_id=bpe.token_to_id(end), bos_token_id=None,
    )  # fmt: skip
    if family == "deepseek_v3":
        common |= dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
                       v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                       topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1)  # fmt: skip
    name = {"qwen2": "Qwen2", "llama": "Llama", "deepseek_v3": "DeepseekV3"}[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**common)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    if family == "deepseek_v3":  # released routing biases are in fp32, and need it
        stored = load_file(directory / "model.safetensors")
        stored |= {name: BIAS.clone() for name in stored if name.endswith("correction_bias")}
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((directory / "config.json").read_text())
        settings["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
        (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {name: downloaded(name, tmp_path_factory.mktemp(name)) for name in CONTROLS}


@pytest.fixture
def questions(tmp_path) -> Path:
    rows = [{"question": f"what is {i} + 1 ?", "answer": f"#### {i + 1}"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "train.jsonl"


@pytest.fixture
def coin(monkeypatch) -> None:
    """A model of random weights is never right: the verdict is by the text's length."""

    def verdict(problem: Problem, text: str, *rest) -> str:
        return ("kept", "wrong")[len(text) % 2]

    monkeypatch.setattr(sft, "verdict", verdict)


def start(module, *flags) -> None:
    presets = getattr(module, "PRESETS", {})
    config = parse(module.Config, presets, [*map(str, flags), "--device", "cpu", "--threads", "1"])
    launch(module.main, config, user_errors=(ValueError,))


SMALL = ["--questions", 2, "--group-size", 2, "--minibatches", 1, "--max-new-tokens", 8,
         "--eval-problems", 3, "--eval-samples", 2]  # fmt: skip
LEAN = ["--dtype", "bfloat16", "--optimizer", "rounding", "--recompute", "--offload"]


def is_read_by_transformers(directory: Path) -> None:
    """The weights, with equal logits, and the tokenizer, with equal tokens."""
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = load_pretrained(directory, dtype=torch.float32)(tokens)
    assert float((found - expected).abs().max() / expected.std()) < 1e-4
    assert "auto_map" not in (directory / "config.json").read_text()
    ends = theirs.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert Tokenizer.load(directory).end_id in ends
    for name, bias in load_file(directory / "model.safetensors").items():
        assert not name.endswith("correction_bias") or torch.equal(bias, BIAS)
    text = "what is 3 + 4 ? <think> seven 七 </think>"
    spoken = transformers.AutoTokenizer.from_pretrained(directory)
    assert spoken.encode(text, add_special_tokens=False) == Tokenizer.load(directory).encode(text)


@pytest.mark.parametrize(
    "family, flags",
    [
        ("qwen2", []),
        ("qwen2", ["--dtype", "bfloat16", "--recompute"]),
        ("llama", LEAN),
        ("deepseek_v3", LEAN),
    ],
)
def test_zero_trains_a_downloaded_model_and_saves_one(models, questions, tmp_path, family, flags):
    out = tmp_path / "run"
    source = ["--preset", "gsm8k", "--model", models[family], "--data", questions, "--out", out,
              "--test-data", questions]  # fmt: skip
    # Longer outputs earn more here: a random model is never right, and RL needs a difference.
    rewarded = ["--reward", "random", "--steps", 3, "--lr", 1e-2]
    start(train_zero, *source, *SMALL, *rewarded, *flags)
    is_read_by_transformers(out / "model")
    saved = json.loads((out / "model" / "config.json").read_text())
    before = json.loads((models[family] / "config.json").read_text())
    assert saved["eos_token_id"] == before["eos_token_id"]
    assert saved["torch_dtype"] == ("bfloat16" if "bfloat16" in flags else "float32")
    new, old = load_pretrained(out / "model"), load_pretrained(models[family])
    moved = [
        name
        for name, tensor in old.state_dict().items()
        if not torch.equal(tensor.float(), new.state_dict()[name].float())
    ]
    assert len(moved) > 10
    assert Tokenizer.load(out / "model").template == TEMPLATES[family]


def refused(capsys, module, *flags) -> str:
    """The one line that a command ends with, and its exit code 2."""
    with pytest.raises(SystemExit) as ended:
        start(module, *flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and len(error.splitlines()) == 1, error
    return error


def test_what_cannot_work_leaves_no_run_behind(models, questions, tmp_path, capsys):
    out = tmp_path / "run"
    source = ["--preset", "gsm8k", "--data", questions, "--test-data", questions, "--out", out]
    zero = [*source, "--model", models["qwen2"]]
    cases = [
        (zero, ["--template", "llama3"], "needs <|begin_of_text|>"),
        (zero, ["--template", "lama3"], "nearest: 'llama3'"),
        (zero, ["--optimizer", "rounding"], "--optimizer rounding is for --dtype bfloat16"),
        (zero, ["--max-new-tokens", 1020], "a context of 1024"),
        (source, ["--model", "Qwen/Qwen2.5-1.5B"], "hf download Qwen/Qwen2.5-1.5B"),
        (
            zero,
            ["--dry-run", "--dtype", "float64", "--max-new-tokens", 64],
            "knows float32 and bfloat16",
        ),
    ]
    cases += [
        (zero, ["--ep", 2], "number of processes, 1"),
        (["--out", out], ["--ep", 2], "--ep 2"),
    ]
    for flags, wrong, told in cases:
        assert told in refused(capsys, train_zero, *flags, *wrong)
        assert not out.exists()
    teach = ["--preset", "qwen-1.5b", "--teacher", models["deepseek_v3"], "--data", questions]
    teach += ["--student", models["qwen2"], "--test-data", questions, "--out", out]
    assert "needs <|begin_of_text|>" in refused(capsys, distill, *teach, "--template", "llama3")
    assert not out.exists()
    told = refused(capsys, sample, "--model", models["qwen2"], "--template", "moonlight")
    assert "which the tokenizer lacks" in told


def test_pytorchs_own_files_are_not_read_and_that_is_said(models, tmp_path, capsys):
    shutil.copytree(models["qwen2"], tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").rename(tmp_path / "old" / "pytorch_model.bin")
    assert "*.bin is not read" in refused(capsys, sample, "--model", tmp_path / "old")


@pytest.mark.parametrize(
    "change", [{"num_attention_heads": 0}, {"hidden_size": -5}, {"model_type": None},
               {"rope_scaling": "x"}],
)  # fmt: skip
def test_a_config_that_makes_no_model_is_named(models, tmp_path, capsys, change):
    shutil.copytree(models["qwen2"], tmp_path / "odd")
    settings = json.loads((models["qwen2"] / "config.json").read_text())
    settings.pop("rope_parameters")
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**settings, **change}))
    assert "config.json" in refused(capsys, sample, "--model", tmp_path / "odd")


def test_all_stages_run_on_a_downloaded_model(models, questions, tmp_path, coin):
    base = models["qwen2"]
    source = ["--preset", "gsm8k", "--model", base, "--data", questions, "--test-data", questions]
    start(train_zero, *source, *SMALL, "--steps", 1, "--out", tmp_path / "zero")
    rows = {
        "general": [
            dict(prompt=f"say {i} !", response=f"<think> b </think> {i}") for i in range(12)
        ],
        "preferences": [
            dict(prompt=f"say {i} ?", chosen="yes .", rejected="no") for i in range(12)
        ],
        "safety": [dict(prompt=f"do {i} ?", response="no .", safe=i % 2 == 0) for i in range(12)],
    }
    files = []
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
        files += [f"--{name}", tmp_path / f"{name}.jsonl"]
    start(
        train_r1, "--preset", "paper", "--model", base, "--zero", tmp_path / "zero", "--data",
        questions, "--test-data", questions, *files,
        *SMALL, *LEAN, "--out", tmp_path / "r1", "--cold-questions", 4,
        "--questions-sft", 4, "--samples", 2, "--steps", 1, "--final-steps", 2, "--row-tokens", 512,
        "--eval-requests", 2, "--template", "qwen",
    )  # fmt: skip
    for name in train_r1.STAGES:
        is_read_by_transformers(tmp_path / "r1" / name)
    assert Tokenizer.load(tmp_path / "r1" / "r1").template == "qwen"
    learned = sft.read_rows(tmp_path / "r1" / "dev1_sft.jsonl")
    assert learned and all("<answer>" not in row["response"] for row in learned)


def test_r1_teaches_a_student_of_another_family(models, questions, tmp_path, coin, monkeypatch):
    learned: list[tuple[str, str]] = []
    step = sft.sft_step

    def sft_step(model, optimizers, packed, mask_BT, objective):
        for row in range(int(packed.documents_BT.max()) + 1):
            of = packed.documents_BT == row
            tokens, answer = packed.tokens_BT[of], mask_BT[of] & (packed.positions_BT[of] > 0)
            learned.append(
                tuple(speaks.decode(t.tolist()) for t in (tokens[~answer], tokens[answer]))
            )
        return step(model, optimizers, packed, mask_BT, objective)

    speaks = Tokenizer.load(models["llama"])
    monkeypatch.setattr(sft, "sft_step", sft_step)
    start(
        distill, "--preset", "llama-8b", "--teacher", models["deepseek_v3"], "--student",
        models["llama"], "--data", questions, "--test-data", questions,
        "--out", tmp_path / "run", *SMALL, "--samples", 16,
        "--per-question", 2, "--context", 256, "--epochs", 1, "--curve-problems", 2,
        "--curve-samples", 1, *LEAN, "--compare-rl", "--rollouts", 1, "--rl-cost", 0.01,
    )  # fmt: skip
    for name in ("distilled", "rl"):
        is_read_by_transformers(tmp_path / "run" / name)
    kept = [row for row in sft.read_rows(tmp_path / "run" / "dataset.jsonl")
            if row["verdict"] == "kept"]  # fmt: skip
    assert kept and all(row["response"].startswith("<think>") for row in kept)
    head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    opening = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    assert sorted(learned) == sorted(
        (f"{head}{row['question']}{opening}", f"{row['response']}<|eot_id|>") for row in kept
    )


@pytest.mark.parametrize("family", CONTROLS)
def test_a_downloaded_model_is_asked_and_evaluated(models, questions, capsys, family):
    start(sample, "--model", models[family], "--data", questions, "--limit", 2, "--samples", 2,
          "--max-new-tokens", 8)  # fmt: skip
    assert "2 problems x 2 samples" in capsys.readouterr().out
    start(sample, "--model", models[family], "--prompt", "what is 1 + 1 ?", "--max-new-tokens", 8)
    said = capsys.readouterr().out
    assert said.startswith("<think>\n") == (family == "deepseek_v3") and len(said) > 2


def test_a_conversation_is_remembered_in_a_chat_only(models, monkeypatch, capsys):
    asked = []
    generate = sample.generate

    def recorded(model, prompts, **settings):
        asked.append(Tokenizer.load(models[family]).decode(prompts[0]))
        return generate(model, prompts, **settings)

    monkeypatch.setattr(sample, "generate", recorded)
    for family in ("llama", "qwen2"):
        lines = iter(["first ?", "second ?", ""])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        asked.clear()
        start(sample, "--model", models[family], "--max-new-tokens", 4)
        assert f"Template {TEMPLATES[family]}." in capsys.readouterr().out
        assert "first ?" in asked[0] and "second ?" in asked[1]
        assert ("first ?" in asked[1]) == (family == "llama")


def test_a_tokenizer_of_another_model_is_refused(models, tmp_path, capsys):
    shutil.copytree(models["qwen2"], tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    model = load_pretrained(models["qwen2"])
    shutil.copy(models["qwen2"] / "tokenizer.json", tmp_path / "kept.json")
    spoken = json.loads((tmp_path / "kept.json").read_text())
    last = max(token["id"] for token in spoken["added_tokens"])
    spoken["added_tokens"][-1]["id"] = last + config["vocab_size"]
    (tmp_path / "mixed" / "tokenizer.json").write_text(json.dumps(spoken))
    with pytest.raises(SystemExit) as ended:
        start(sample, "--model", tmp_path / "mixed", "--prompt", "x")
    assert ended.value.code == 2 and f"the model only {model.config.vocab_size}" in (
        capsys.readouterr().err
    )


def test_a_dry_run_reads_the_config_alone_and_leaves_nothing(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    config = (models["qwen2"] / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    start(train_zero, "--preset", "gsm8k", "--model", tmp_path / "model", "--dry-run",
          "--max-new-tokens", 64)  # fmt: skip
    said = capsys.readouterr().out
    assert "It fits 80 GB" in said and "optimizer" in said
    start(train_zero, "--model", "qwen2.5-7b", "--preset", "gsm8k", "--dry-run", "--gpu-memory", 24)
    said = capsys.readouterr().out
    assert "does not fit 24 GB" in said and "--dtype bfloat16 --optimizer rounding" in said
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
