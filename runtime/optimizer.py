"""AdamW for weights in bf16, and what frees a GPU of what a phase does not need.

A step at a learning rate of 1e-6 changes a weight by about a millionth of it. bf16 has 8 bits of
fraction: between a number and the next there are 0.4 to 0.8 %, and such a step rounds to nothing.
Two ways out:

    states="master"     the weights once more in fp32; those that the model computes with are these,
                        rounded. Gradients and moments in fp32: 18 bytes a parameter
    states="rounding"   all in bf16, rounded up or down at random, with the odds that make the mean
                        right (stochastic rounding): 8 bytes a parameter, and noise in each step

`away` moves an optimizer's states to the CPU while the model samples; `visiting` brings a model
that lives on the CPU, such as the reference, to the GPU while it is asked.

It is no part of the method. Read next: memory.py, which counts the bytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from runtime import parallel

SLICE = 2**22  # numbers of a parameter that are updated at a time: no fp32 copy of all exists
STATES = {"master": ("master", "exp_avg", "exp_avg_sq"), "rounding": ("exp_avg", "exp_avg_sq")}


def adamw(
    parameters: Iterable[Tensor], lr: float, states: str = "master", seed: int = 0, **rest
) -> torch.optim.Optimizer:
    """torch's AdamW for parameters in fp32 or float64, ours for bf16; betas (0.9, 0.95) and no
    weight decay, unless `rest` says otherwise. ValueError for other dtypes or several."""
    parameters = list(parameters)
    rest = {"betas": (0.9, 0.95), "weight_decay": 0.0, **rest}
    dtypes = {p.dtype for p in parameters}
    if dtypes in ({torch.float32}, {torch.float64}):
        return torch.optim.AdamW(parameters, lr=lr, **rest)
    return AdamW(parameters, lr, states=states, seed=seed, **rest)


class AdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) for parameters in bf16. With states="master" their gradients are summed
    in fp32 too: each parameter's grad_dtype is set here, and a deepcopy of a parameter loses it."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8, weight_decay: float = 0.0, states: str = "master", seed: int = 0,
    ):  # fmt: skip
        if states not in STATES:
            raise ValueError(f"states={states!r}: one of {', '.join(STATES)}")
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.states, self.seed = states, seed
        for p in self.parameters():
            if p.dtype != torch.bfloat16 or not p.is_contiguous():
                raise ValueError(
                    f"a parameter is {p.dtype} with strides {p.stride()}: this AdamW takes"
                    " contiguous bfloat16 only; torch.optim.AdamW is for float32"
                )
            if states == "master" and isinstance(p, DTensor):
                # FSDP hands over a gradient in bf16, and adds the next one to what is there.
                p.grad_dtype = None
                p.register_post_accumulate_grad_hook(_to_float32)
            elif states == "master":
                p.grad_dtype = torch.float32

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """One update. A parameter without a gradient stays as it is, and so does its step count."""
        number = {p: i for i, p in enumerate(self.parameters())}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._begin(p, state)
                state["step"] += 1
                key = self._key(state["step"], number[p])
                whole = dict(weight=p, grad=p.grad.contiguous())
                whole |= {name: state[name] for name in STATES[self.states]}
                whole = {k: parallel.local(x).view(-1) for k, x in whole.items()}
                for first in range(0, len(whole["weight"]), SLICE):
                    part = {k: x[first : first + SLICE] for k, x in whole.items()}
                    part |= dict(step=state["step"], group=group)
                    if self.states == "master":
                        update_master(**part)
                    else:
                        update_rounding(**part, noise=random_bits(key, places(p, first)))

    def _begin(self, p: Tensor, state: dict) -> None:
        state["step"] = 0
        for name in STATES[self.states]:
            dtype = torch.float32 if self.states == "master" else torch.bfloat16
            state[name] = torch.zeros_like(p, dtype=dtype)
        if self.states == "master":
            state["master"].copy_(p)

    def _key(self, step: int, number: int) -> int:
        """Of the noise: a function of (seed, step, number of the parameter), as every random number
        here, so that a resumed run rounds as an uninterrupted one, and all ranks alike."""
        digest = hashlib.blake2b(f"{self.seed} {step} {number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bit for bit: torch's own would cast fp32 states to the dtype of the weights, bf16."""
        parameters, wanted = self.parameters(), {"step", *STATES[self.states]}
        for saved in state_dict["state"].values():
            if set(saved) != wanted:
                raise ValueError(
                    f"the saved optimizer has {', '.join(saved)} for each parameter; states="
                    f"{self.states!r} needs {', '.join(sorted(wanted))}"
                )
        super().load_state_dict({**state_dict, "state": {}})
        for number, saved in state_dict["state"].items():
            p = parameters[number]
            self.state[p] = {
                key: value.to(p.device) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }


def _to_float32(p: Tensor) -> None:
    if p.grad.dtype != torch.float32:
        p.grad = p.grad.float()


def adam(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict
) -> None:
    """Adam's update of fp32 numbers, in place, in the order of torch.optim.AdamW's operations."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    # m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = (1 - lr wd) w - lr m' / (sqrt(v') + e)
    # with m' = m / (1 - b1^t) and v' = v / (1 - b2^t)
    weight.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))


def update_master(
    weight: Tensor, grad: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    step: int, group: dict,
) -> None:  # fmt: skip
    adam(master, grad, exp_avg, exp_avg_sq, step, group)
    weight.copy_(master)


def update_rounding(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    step: int, group: dict, noise: Tensor,
) -> None:  # fmt: skip
    """noise: random bits, as many numbers as there are weights."""
    stored = weight, exp_avg, exp_avg_sq
    w, m, v = (x.float() for x in stored)
    adam(w, grad.float(), m, v, step, group)
    for i, (into, x) in enumerate(zip(stored, (w, m, v))):  # 16 bits for each of the three
        into.copy_(round_stochastically(x, (noise >> 16 * i).bitwise_and_(0xFFFF)))


def places(p: Tensor, first: int) -> Tensor:
    """Where in the whole parameter the numbers from the first on, at most SLICE of them, stand
    that this rank holds."""
    last = min(first + SLICE, parallel.local(p).numel())
    place = torch.arange(first, last, device=p.device)
    if not isinstance(p, DTensor):
        return place
    index, stride = torch.zeros_like(place), 1
    for part, size in zip(reversed(parallel.local_region(p)), reversed(p.shape)):
        length = part.stop - part.start
        index += (place % length + part.start) * stride
        place, stride = place // length, stride * size
    return index


def random_bits(key: int, place: Tensor) -> Tensor:
    """64 bits for each place, a function of both alone (splitmix64: Steele et al. 2014): the noise
    is the same on any device and however a parameter is spread. Overwrites `place`."""
    x = place.mul_(-0x61C8864680B583EB).add_(key)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x ^= (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # >> of int64 keeps the sign
        x *= factor
    return x ^ (x >> 31).bitwise_and_(2**33 - 1)


def round_stochastically(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 in bf16, up or down so that the mean is x. noise: whole numbers, uniform in [0, 2^16).

    bf16 is the upper half of fp32's bits. The lower half, as a share of 2^16, is how far x has come
    to the next number: that is the chance that adding the noise carries into the upper half.
    """
    bits = x.view(torch.int32) + noise.to(torch.int32)
    rounded = (bits & -(2**16)).view(torch.float32)  # exact in bf16
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


# ---- what a phase does not need ------------------------------------------------------------------


def transfer(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device. One on the CPU is in pinned memory, where there is a GPU to read it."""
    if torch.device(device).type == "cpu" and tensor.is_cuda:
        home = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return home.copy_(tensor)
    return tensor.to(device, non_blocking=True)


@contextmanager
def away(optimizer: torch.optim.Optimizer, place: torch.device | str = "cpu") -> Iterator[None]:
    """Within, the optimizer's states (and masters) are at `place`; then back where they were,
    whatever happens. One tensor at a time. Nothing to do for states that are there already."""
    place = torch.device(place)
    moved: list[tuple[dict, str, torch.device]] = []
    try:
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.device.type != place.type:
                    state[key] = transfer(value, place)
                    moved.append((state, key, value.device))
                    del value  # else the last one is held while the next is copied
        if moved and torch.cuda.is_available():
            torch.cuda.empty_cache()  # the sampler asks the driver how much is free
        yield
    finally:
        for state, key, device in moved:
            state[key] = transfer(state[key], device)


@contextmanager
def visiting(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Within, a module that lives on the CPU is on the device; then its tensors on the CPU are its
    own again, as they were: what is changed within is lost. For a frozen model."""
    place = torch.device(device)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.device.type != place.type]
    if place.type == "cuda":  # once: they stay in pinned memory
        for tensor in tensors:
            tensor.data = tensor.data if tensor.is_pinned() else tensor.data.pin_memory()
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor, home in zip(tensors, homes):
            tensor.data = transfer(home, place)
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home
