"""What the exercises' tests compare with. Every failure says what was claimed, what came and what
was wanted; a value that only pretends to be equal (its own __eq__, a subclass) is not."""

import torch
from torch import Tensor


def short(value: object) -> str:
    if isinstance(value, Tensor):
        value = [round(number, 4) for number in value.detach().flatten().tolist()]
        value = value[0] if len(value) == 1 else value
    text = str(value) if isinstance(value, (list, float)) else repr(value)
    return text if len(text) <= 70 else text[:67] + "..."


def close(actual: Tensor, wanted, claim: str, tolerance: float = 1e-6) -> None:
    """`wanted`: a tensor, or numbers in lists. NaN is close to nothing."""
    assert type(actual) is Tensor, f"{claim}: got {short(actual)}, which is no tensor"
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert actual.shape == wanted.shape, (
        f"{claim}: got the shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    )
    got, wanted = actual.detach().double(), wanted.detach()
    good = ((got - wanted).abs() <= tolerance * (1 + wanted.abs())) | (got == wanted)
    if got.numel() <= 8:
        assert bool(good.all()), f"{claim}: got {short(got)}, wanted {short(wanted)}"
        return
    wrong = (~good).nonzero()
    first = tuple(wrong[0].tolist()) if len(wrong) else ()
    assert not len(wrong), (
        f"{claim}: {len(wrong)} of {got.numel()} numbers are wrong; {list(first)} is"
        f" {short(got[first])}, wanted {short(wanted[first])}"
    )


def same(actual: object, wanted: object, claim: str) -> None:
    equal = type(actual) is type(wanted) and wanted == actual
    assert equal, f"{claim}: got {short(actual)}, wanted {short(wanted)}"


def refused(call, claim: str) -> None:
    """It raises ValueError."""
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{claim}: no ValueError came")
