"""Triton exists on Linux only; without it everything runs on the torch references."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CODE = """
import sys
sys.modules["triton"] = None  # import triton now raises ModuleNotFoundError
import torch, train_zero, sample, grpo, sft
from model import Config, Transformer
model = Transformer(Config.preset("toy"))
logits = model(torch.arange(12).view(2, 6))
logits.sum().backward()
outputs = sample.generate(model, [[1, 2, 3]], max_new_tokens=4)
assert len(outputs[0].tokens) == 4
"""


def test_without_triton_everything_runs():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
