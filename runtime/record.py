"""A step of the sampler without Python: recorded once, then played back.

Hundreds of small operations make one token. On a GPU it takes longer to start each from Python than
to run it; on a CPU, for a small model, half of the time is Python's. On a GPU a CUDA graph starts
them all at once; on the CPU they are called from C++.

It is no part of the method. Read next: ../sample.py.
"""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import Transformer, chosen_experts


class Captured:
    """A function of tensors that stay in place: on a GPU recorded as a CUDA graph and replayed, in
    one launch, from its second call on. The first call compiles and warms up what is recorded."""

    def __init__(self, function: Callable[[], None], on_gpu: bool):
        self.function, self.on_gpu, self.warm, self.graph = function, on_gpu, False, None

    def __call__(self) -> None:
        if not (self.on_gpu and self.warm):
            self.warm = True
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function()
        self.graph.replay()


class Step(nn.Module):
    """One token in, the logits of the next one out, and the experts it went to if they are wanted:
    BV, BMA."""

    def __init__(self, model: Transformer, routes: bool):
        super().__init__()
        self.model, self.routes = model, routes

    def forward(self, tokens_B: Tensor, position_B: Tensor, cache: Tensor, table=None):
        hidden_B1D, routings = self.model.hidden(
            tokens_B[:, None], position_B[:, None], cache_MZYX=cache, table_BP=table
        )
        logits_BV = self.model.lm_head(hidden_B1D[:, 0])
        return (logits_BV, chosen_experts(routings)[:, 0]) if self.routes else (logits_BV,)


class Recorded:
    """A Step on the CPU, where half of a small model's time is Python: recorded (torch.jit.trace)
    once a shape has come often, and played back from then on. The weights are the model's own, by
    reference. torch.compile would fuse more, and takes a minute (LOG.md)."""

    OFTEN = 64  # calls: recording takes as long as it saves in about so many
    last: "Recorded | None" = None

    def __init__(self, step: Step):
        self.step, self.tensors = step, tensors_of(step)
        self.calls: Counter = Counter()
        self.recordings: dict[tuple, Callable] = {}

    @classmethod
    def of(cls, model: Transformer, routes: bool) -> "Recorded":
        """The recordings of the last call of `generate`, if it had the same model."""
        step = Step(model, routes)
        last = cls.last and (cls.last.step.model, cls.last.step.routes, cls.last.tensors)
        if last != (model, routes, tensors_of(step)):
            cls.last = cls(step)
        return cls.last

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype) for x in inputs)
        self.calls[key] += 1
        if self.calls[key] <= self.OFTEN:
            return self.step(*inputs)
        if self.calls[key] == self.OFTEN + 1:
            self.recordings[key] = record(self.step, inputs)
        elif self.calls[key] == self.OFTEN + 2:
            # A recording has only what happened: it must be right for other data too.
            right, played = self.step(*inputs), self.recordings[key](*inputs)
            if not all(map(torch.equal, right, played)):
                self.recordings[key] = self.step
            return right
        return self.recordings[key](*inputs)


def tensors_of(step: Step) -> list[int]:
    """A recording has these tensors: it is right as long as the model does."""
    return [id(tensor) for tensor in (*step.parameters(), *step.buffers())]


def record(step: Step, inputs: tuple[Tensor, ...]) -> Callable:
    """The recording, or the step itself where it can't be recorded."""
    with warnings.catch_warnings(), torch.jit.optimized_execution(False):
        warnings.simplefilter("ignore")  # that it is deprecated; each shape that it fixes
        try:
            return torch.jit.trace(step, inputs, check_trace=False)
        except RuntimeError:
            return step
