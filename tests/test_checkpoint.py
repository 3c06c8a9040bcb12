"""runtime/pretrained.py and checkpoint.py: model directories and the training state."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import threading
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from model import Config, Transformer
from runtime.configs import from_json
from runtime import pretrained
from runtime.checkpoint import (
    finish_saving,
    latest,
    load_pretrained,
    load_state,
    save_pretrained,
    save_state,
    saving,
    step_path,
)  # fmt: skip
from runtime.flags import UserError

SMALL = Config.preset(
    "toy", vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
    moe_intermediate_size=4, n_routed_experts=4, kv_lora_rank=6, v_head_dim=5,
)  # fmt: skip
QWEN = from_json(
    dict(model_type="qwen2", vocab_size=11, hidden_size=8, intermediate_size=12,
         num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)
)  # fmt: skip


def small_model(config: Config = SMALL, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn_like(tensor))
    return model


def equal(a, b) -> bool:
    """The same tree, bit for bit, with keys and values of the same types."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def header(file: Path) -> dict:
    """What the format says a safetensors file begins with, read by hand."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


# --- models


@pytest.mark.parametrize("config", [SMALL, QWEN, Config.preset("toy", num_nextn_predict_layers=1)])
def test_a_model_is_read_as_it_was_written(tmp_path, config):
    model = small_model(config)
    save_pretrained(model, tmp_path / "m")
    again = load_pretrained(tmp_path / "m")
    assert again.config == config and equal(dict(model.state_dict()), dict(again.state_dict()))
    assert [n for n, p in again.named_parameters()] == [n for n, p in model.named_parameters()]
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    tokens_BT = torch.randint(0, 11, (2, 5))
    assert torch.equal(model(tokens_BT), again(tokens_BT))


def test_the_experts_are_stored_under_their_official_names(tmp_path):
    model = small_model()
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    experts = model.model.layers[1].mlp.experts
    for e in range(4):
        for kind, shape in (("gate", (4, 8)), ("up", (4, 8)), ("down", (8, 4))):
            tensor = stored.pop(f"model.layers.1.mlp.experts.{e}.{kind}_proj.weight")
            assert tensor.shape == shape
            assert torch.equal(tensor, getattr(experts, f"{kind}_proj")[e])
    assert not [name for name in stored if ".experts." in name]
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in stored
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in stored


def test_the_file_says_that_it_is_of_torch_which_transformers_asks_for(tmp_path):
    save_pretrained(small_model(), tmp_path)
    assert header(tmp_path / "model.safetensors")["__metadata__"] == {"format": "pt"}
    assert from_json(json.loads((tmp_path / "config.json").read_text())) == SMALL


def test_a_tied_head_is_not_stored_and_is_tied_again(tmp_path):
    model = small_model(QWEN)
    save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in header(tmp_path / "model.safetensors")
    again = load_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    stored = load_file(tmp_path / "model.safetensors")  # some files have it all the same
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    assert equal(dict(load_pretrained(tmp_path).state_dict()), dict(model.state_dict()))


def test_a_large_model_is_cut_into_shards_that_the_index_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 5000)
    model = small_model()
    save_pretrained(model, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    where, size = {}, 0
    for file in files:
        tensors = load_file(file)
        size += sum(t.nbytes for t in tensors.values())
        assert sum(t.nbytes for t in tensors.values()) <= 5000
        where |= dict.fromkeys(tensors, file.name)
    assert index == {"metadata": {"total_size": size}, "weight_map": where}
    assert size == sum(t.nbytes for t in model.state_dict().values())
    assert equal(dict(load_pretrained(tmp_path).state_dict()), dict(model.state_dict()))
    files[1].unlink()
    with pytest.raises(UserError, match=f"no {files[1].name}"):
        load_pretrained(tmp_path)


def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tmp_path):
    model = small_model().to(torch.bfloat16)
    model.model.layers[1].mlp.gate.e_score_correction_bias = torch.full((4,), 0.1001)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert equal(dict(again.state_dict()), dict(model.state_dict()))
    wide = load_pretrained(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.double())
    narrow = load_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in narrow.parameters()} == {torch.float16}


def test_the_routing_bias_is_never_narrower_than_float32(tmp_path):
    model = small_model()
    save_pretrained(model, tmp_path)
    narrow = load_pretrained(tmp_path, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(narrow.state_dict()[name], model.state_dict()[name])


def test_a_loaded_model_does_not_change_with_its_file(tmp_path):
    model = small_model()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as raw:  # in place
        raw.write(b"\0" * file.stat().st_size)
    assert equal(dict(again.state_dict()), dict(model.state_dict()))


def test_the_tokenizer_files_are_written_beside_the_model(tmp_path):
    save_pretrained(small_model(), tmp_path, tokenizer_files={"a.tiktoken": b"\xff\x00"})
    assert (tmp_path / "a.tiktoken").read_bytes() == b"\xff\x00"


def test_what_is_no_model_is_refused_with_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no model at .*none"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match="no config.json"):
        load_pretrained(tmp_path)
    save_pretrained(small_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        load_pretrained(tmp_path)
    for text in ("{", '{"model_type": "gpt2"}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json: not a config"):
            load_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, size):
    save_pretrained(small_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="model.safetensors: truncated.*download it again"):
        load_pretrained(tmp_path)


def test_tensors_that_are_not_the_configs_are_listed(tmp_path):
    save_pretrained(small_model(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.experts.3.up_proj.weight"]
    stored["model.extra"] = torch.zeros(2)
    stored["model.norm.weight"] = torch.zeros(9)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path)
    message = str(error.value)
    assert "1 missing (model.layers.1.mlp.experts.3.up_proj.weight)" in message
    assert "1 unexpected (model.extra)" in message
    assert "1 misshapen (model.norm.weight (9,) for (8,))" in message


def test_a_long_list_of_wrong_tensors_is_cut(tmp_path):
    save_pretrained(small_model(), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 4'))
    with pytest.raises(UserError, match=r"missing \(.*, \.\.\.\)") as error:
        load_pretrained(tmp_path)
    assert len(str(error.value)) < 500


def test_the_copies_in_an_mtp_layer_are_written_and_not_read(tmp_path):
    model = small_model(Config.preset("toy", num_nextn_predict_layers=1))
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    copies = [f"model.layers.3.{name}.weight" for name in ("embed_tokens", "shared_head.head")]
    head = model.lm_head.weight
    assert torch.equal(stored[copies[1]], head)
    for name in copies:
        stored[name] = torch.zeros_like(head)
    save_file(stored, tmp_path / "model.safetensors")
    assert equal(dict(load_pretrained(tmp_path).state_dict()), dict(model.state_dict()))


def test_a_model_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    save_pretrained(small_model(), tmp_path / "m", tokenizer_files={"old.txt": b""})
    new = small_model(seed=1)
    save_pretrained(new, tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    files = sorted(file.name for file in (tmp_path / "m").iterdir())
    assert files == ["config.json", "model.safetensors"]
    assert equal(dict(load_pretrained(tmp_path / "m").state_dict()), dict(new.state_dict()))


def test_a_directory_that_is_no_model_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="give another path"):
        save_pretrained(small_model(), tmp_path)
    with pytest.raises(UserError, match="give another path"):
        save_pretrained(small_model(), tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_model_save_that_fails_leaves_the_former_model_and_no_rest(tmp_path, monkeypatch):
    model = small_model()
    save_pretrained(model, tmp_path / "m")

    def full(tensors, file, metadata):
        file.write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(small_model(seed=1), tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert equal(dict(load_pretrained(tmp_path / "m").state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("at", ["old aside", "new in place"])
def test_a_model_save_killed_at_a_rename_leaves_a_whole_model(tmp_path, monkeypatch, at):
    old, new = small_model(), small_model(seed=1)
    save_pretrained(old, tmp_path / "m")
    renames = []
    rename = Path.rename

    class Killed(BaseException):
        pass

    def killed(path, target):
        renames.append(path)
        if len(renames) == (2 if at == "old aside" else 3):
            raise Killed
        result = rename(path, target)
        if at == "new in place" and len(renames) == 2:
            raise Killed
        return result

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        save_pretrained(new, tmp_path / "m")
    monkeypatch.undo()
    expected = old if at == "old aside" else new
    assert equal(dict(load_pretrained(tmp_path / "m").state_dict()), dict(expected.state_dict()))
    save_pretrained(new, tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert equal(dict(load_pretrained(tmp_path / "m").state_dict()), dict(new.state_dict()))


# --- the training state


class Momentum(torch.optim.Optimizer):
    """A stand-in for Muon: its state appears at the first step, and has no `step`."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.01))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(0.9).add_(p.grad)
                    p.sub_(momentum, alpha=group["lr"])


def training() -> dict:
    model = small_model()
    blocks = [p for name, p in model.named_parameters() if "layers" in name]
    others = [p for name, p in model.named_parameters() if "layers" not in name]
    return dict(model=model, adam=torch.optim.AdamW(others, lr=0.01), momentum=Momentum(blocks))


def steps(parts: dict, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tokens_BT = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(step))
        logits_BTV = parts["model"](tokens_BT)
        nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten()).backward()
        parts["model"].model.layers[1].mlp.gate.e_score_correction_bias += 0.001 * step
        for name in ("adam", "momentum"):
            parts[name].param_groups[0]["lr"] = 0.01 / step
            parts[name].step()
        parts["model"].zero_grad(set_to_none=True)


def states(parts: dict) -> dict:
    return {name: part.state_dict() for name, part in parts.items()}


def test_resumed_training_equals_uninterrupted_training_bit_for_bit(tmp_path):
    whole, cut, fresh = training(), training(), training()
    steps(whole, 1, 6)
    steps(cut, 1, 3)
    save_state(tmp_path, 3, states(cut))
    saved = load_state(tmp_path, 3, states(fresh))  # its optimizers have not stepped yet
    for name, part in fresh.items():
        part.load_state_dict(saved[name])
    steps(fresh, 4, 6)
    assert equal(states(fresh), states(whole))
    assert not equal(states(fresh), states(cut))


def test_a_state_keeps_its_tree_its_keys_and_its_types(tmp_path):
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 10: {}}, "groups": [{"p": [0, 1]}]},
        "empty": {}, "nothing": None, "pair": (0.9, 0.95), "text": "zh", "flag": True, "list": [],
        "numbers": {"step": 7, "loss": 1 / 3}, "half": torch.randn(3).bfloat16(),
        "long": torch.arange(4), "none": torch.zeros(0, 3), "view": torch.arange(12).view(3, 4).T,
    }  # fmt: skip
    save_state(tmp_path, 1, state)
    assert equal(load_state(tmp_path, 1, {}), state)
    assert equal(load_state(tmp_path, 1, state), state)


def test_loading_does_not_write_into_the_tensors_it_is_shown(tmp_path):
    save_state(tmp_path, 1, {"policy": torch.ones(3), "reference": torch.zeros(3)})
    same = torch.full((3,), 7.0)  # at the start the reference is the policy
    state = load_state(tmp_path, 1, {"policy": same, "reference": same})
    assert same.tolist() == [7, 7, 7]
    assert state["policy"].tolist() == [1, 1, 1] and state["reference"].tolist() == [0, 0, 0]


def test_saving_and_loading_say_nothing(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2, 2):
            save_state(tmp_path, step, {"a": torch.ones(3)})
        load_state(tmp_path, 2, {"a": torch.zeros(3)})
    assert capfd.readouterr() == ("", "")


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (10, 20, 30):
        save_state(tmp_path, step, {"a": torch.full((2,), step)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000020", "step_000030"]
    assert latest(tmp_path) == 30
    save_state(tmp_path, 30, {"a": torch.full((2,), 31)}, keep=1)  # again, as Ctrl-C may
    assert [p.name for p in tmp_path.iterdir()] == ["step_000030"]
    assert load_state(tmp_path, 30, {})["a"].tolist() == [31, 31]


def test_a_checkpoint_without_its_metadata_does_not_count(tmp_path):
    assert latest(tmp_path / "none") is None
    for step in (1, 2):
        save_state(tmp_path, step, {"a": torch.full((2,), step)})
    (step_path(tmp_path, 2) / ".metadata").unlink()
    (step_path(tmp_path, 2) / "__7_0.distcp").write_text("of a rank that is no more")
    assert latest(tmp_path) == 1
    with pytest.raises(UserError, match=r"no checkpoint at .*step_000002; there are steps \[1\]"):
        load_state(tmp_path, 2, {})
    save_state(tmp_path, 2, {"a": torch.zeros(2)})
    assert latest(tmp_path) == 2 and not (step_path(tmp_path, 2) / "__7_0.distcp").exists()


@pytest.mark.parametrize(
    "file, damage",
    [(".metadata", "empty"), (".metadata", "half"),
     ("__0_0.distcp", "empty"), ("__0_0.distcp", "half"), ("__0_0.distcp", "gone")],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_with_the_one_to_go_on_from(tmp_path, caplog, file, damage):
    for step in (1, 2):
        save_state(tmp_path, step, {"a": torch.full((1000,), step)})
    damaged = step_path(tmp_path, 2) / file
    data = damaged.read_bytes()
    damaged.unlink()
    if damage != "gone":
        damaged.write_bytes(data[: len(data) // 2 if damage == "half" else 0])
    with pytest.raises(UserError) as error:
        load_state(tmp_path, latest(tmp_path), {"a": torch.zeros(1000)})
    message = str(error.value)
    assert "\n" not in message and "step_000002 can't be read" in message
    assert message.endswith("delete it, and --resume goes on from " + str(step_path(tmp_path, 1)))
    # Python would print what is logged to a logger without a handler.
    assert not [record for record in caplog.records if "NullHandler" not in record.name]
    shutil.rmtree(step_path(tmp_path, 2))
    assert load_state(tmp_path, latest(tmp_path), {})["a"][0] == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_state(tmp_path, 1, {"model": {"a": torch.ones(3), "b": torch.ones(2)}})
    with pytest.raises(UserError, match=r"another model: 2 tensors .*\(/model/a, /model/c\)"):
        now = {"a": torch.ones(4), "b": torch.ones(2), "c": torch.ones(1)}
        load_state(tmp_path, 1, {"model": now})


def test_a_state_save_that_fails_leaves_the_former_checkpoint_and_no_rest(tmp_path, monkeypatch):
    save_state(tmp_path, 1, {"a": torch.ones(3)})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, 2, {"a": torch.ones(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert load_state(tmp_path, 1, {})["a"].tolist() == [1, 1, 1]


@pytest.fixture
def slow_disk(monkeypatch):
    """Nothing is written before this event."""
    event, real = threading.Event(), dcp.save

    def slow(*args, **options):
        event.wait()
        return real(*args, **options)

    monkeypatch.setattr(dcp, "save", slow)
    yield event
    event.set()
    finish_saving()


def test_what_is_saved_while_training_goes_on_is_the_state_at_the_call(tmp_path, slow_disk):
    parts, expected = training(), training()
    steps(parts, 1, 2)
    steps(expected, 1, 2)
    save_state(tmp_path, 2, states(parts), wait=False)
    steps(parts, 3, 4)
    for tensor in parts["model"].state_dict().values():
        tensor.fill_(7)
    assert saving() and latest(tmp_path) is None
    slow_disk.set()
    finish_saving()
    assert not saving() and latest(tmp_path) == 2
    assert equal(load_state(tmp_path, 2, states(training())), states(expected))


def test_one_save_waits_for_the_one_before_which_is_kept_until_the_next_is_complete(
    tmp_path, slow_disk
):
    save_state(tmp_path, 1, {"a": torch.ones(3)}, keep=1, wait=False)
    threading.Timer(0.3, slow_disk.set).start()
    save_state(tmp_path, 2, {"a": torch.ones(3)}, keep=1, wait=False)
    assert slow_disk.is_set() and latest(tmp_path) in (1, 2)
    finish_saving()
    slow_disk.clear()
    save_state(tmp_path, 3, {"a": torch.ones(3)}, keep=1, wait=False)
    assert latest(tmp_path) == 2
    slow_disk.set()
    finish_saving()
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


def test_what_a_save_in_the_background_fails_of_is_raised_once_and_later(tmp_path, monkeypatch):
    save_state(tmp_path, 1, {"a": torch.ones(3)})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        save_state(tmp_path, 2, {"a": torch.ones(3)}, wait=False)
        with pytest.raises(OSError, match="No space left"):
            finish_saving()
    finish_saving()
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where this machine lets us make one."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True
        ).returncode == 0  # fmt: skip
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system takes root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_on_a_really_full_disk_the_former_checkpoint_and_model_stay_whole(small_disk):
    state = {"a": torch.ones(350_000)}  # 1.4 MB
    for step in (1, 2):
        save_state(small_disk / "c", step, state)
    with pytest.raises(OSError) as error:
        save_state(small_disk / "c", 3, state)
    assert error.value.errno == errno.ENOSPC and "step_000003" in error.value.filename
    assert sorted(p.name for p in (small_disk / "c").iterdir()) == ["step_000001", "step_000002"]
    assert equal(load_state(small_disk / "c", 2, {}), state)
    model = small_model()
    save_pretrained(model, small_disk / "m")
    with pytest.raises(Exception, match="No space left on device"):
        save_pretrained(model, small_disk / "m", tokenizer_files={"t": b"\0" * 3_000_000})
    assert sorted(p.name for p in small_disk.iterdir()) == ["c", "m"]
    assert equal(dict(load_pretrained(small_disk / "m").state_dict()), dict(model.state_dict()))


def save_without_pause(directory: Path, first: int, report: Connection) -> None:
    torch.set_num_threads(1)
    for step in range(first, 10**6):
        save_state(directory, step, {"a": torch.full((50_000,), step), "step": step})
        report.send(step)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no forkserver")
def test_a_kill_at_any_moment_loses_at_most_one_interval(tmp_path):
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["runtime.checkpoint"])
    done, halves = 0, 0
    for trial in range(12):
        reports, end = context.Pipe(duplex=False)
        process = context.Process(target=save_without_pause, args=(tmp_path, done + 1, end))
        process.start()
        end.close()
        reports.recv()
        start = time.monotonic()
        done = reports.recv()
        time.sleep((time.monotonic() - start) * trial / 12)  # the next save has come so far
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                done = reports.recv()
        assert latest(tmp_path) in (done, done + 1)
        halves += any(not (path / ".metadata").exists() for path in tmp_path.iterdir())
        done = latest(tmp_path)
        state = load_state(tmp_path, done, {"a": torch.zeros(50_000)})
        assert state["step"] == done and bool((state["a"] == done).all())
    assert halves > 2  # else the kills came between the saves, and show nothing
