"""Several documents in a row: little padding, and no token sees another document.

Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (2404.10830): the longest
document first, into the row where it leaves the least room. No document is ever cut.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Rows of documents. At padding, positions and documents are -1."""

    tokens_BT: Tensor
    positions_BT: Tensor  # 0 at the start of each document: this is what separates them
    documents_BT: Tensor  # the document's number, as given

    def __getitem__(self, rows: slice | Tensor) -> "Packed":
        return Packed(*(part[rows] for part in tuple(self)))


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows of document numbers, each row's lengths adding up to at most the capacity."""
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        place = bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(number)
        insort(room, (left - length, row))
    return rows


def pack(documents: list[list[int]], capacity: int, device: str | torch.device = "cpu") -> Packed:
    """Rows as long as the fullest one, at most `capacity` tokens.

    Raises ValueError for a document longer than that.
    """
    lengths = [len(document) for document in documents]
    rows = best_fit(lengths, capacity)
    width = max((sum(lengths[i] for i in row) for row in rows), default=0)
    parts = torch.full((3, len(rows), width), -1, dtype=torch.long)
    parts[0] = 0
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + lengths[i]
            parts[0, b, start:end] = torch.tensor(documents[i])
            parts[1, b, start:end] = torch.arange(lengths[i])
            parts[2, b, start:end] = i
            start = end
    return Packed(*parts.to(device))
