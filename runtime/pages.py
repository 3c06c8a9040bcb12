"""The sampler's cache in pages: an output takes a page when it grows into it, and gives its pages
back when it ends, so that memory holds what has been written and not what may be (as in vLLM,
2309.06180).

It is no part of the method. Read next: record.py.
"""

import torch
from torch import Tensor

from model import Transformer
from runtime.tensor_parallel import least


class Pages:
    """The cache, and which of its pages each slot has. A slot's first page is its own for good; the
    others come from a common pool. Where one page is room enough for a row, there is no table, and
    the rows are read in place."""

    def __init__(self, model: Transformer, slots: int, width: int, page: int, tokens: int):
        device = model.lm_head.weight.device
        self.model, self.on_gpu = model, device.type == "cuda"
        self.Y = min(width, page or (64 if self.on_gpu else 256))
        self.P = -(-width // self.Y)  # pages of the longest row
        most = tokens // self.Y if tokens else self.fitting() if self.on_gpu else slots * self.P
        self.most = min(most, slots * self.P)
        self.slots = min(slots, self.most - self.P + 1)
        if self.slots < 1:
            raise ValueError(
                f"a cache of {most * self.Y} tokens has no room for an output of {width} tokens:"
                " a smaller max_new_tokens, or a larger cache_tokens"
            )
        # A GPU's pages stay where they are, for the CUDA graphs. Elsewhere they grow on demand.
        self.cache_MZYX = model.new_cache(self.most if self.on_gpu else self.slots, self.Y)
        self.free = list(range(self.slots, self.cache_MZYX.shape[1]))
        self.owned = [[slot] for slot in range(self.slots)]
        self.table_BP = None
        if self.P > 1:
            self.table_BP = torch.zeros(self.slots, self.P, dtype=torch.int32, device=device)
            self.table_BP[:, 0] = torch.arange(self.slots)

    def fitting(self) -> int:
        """As many pages as fill four fifths of the GPU's free memory."""
        one = self.model.new_cache(1, self.Y)
        free = torch.cuda.mem_get_info(one.device)[0] * 4 // 5
        return least(self.model, free // (one.numel() * one.element_size()))

    def reserve(self, slot: int, length: int) -> bool:
        """Make room for so many tokens in the slot; False where no page is left."""
        owned = self.owned[slot]
        while len(owned) * self.Y < length:
            if not self.free and not self.grow():
                return False
            owned.append(self.free.pop())
            self.table_BP[slot, len(owned) - 1] = owned[-1]
        return True

    def grow(self) -> bool:
        old_MZYX, Z = self.cache_MZYX, self.cache_MZYX.shape[1]
        if Z == self.most:
            return False
        self.cache_MZYX = self.model.new_cache(min(2 * Z, self.most), self.Y)
        self.cache_MZYX[:, :Z] = old_MZYX
        self.free += range(Z, self.cache_MZYX.shape[1])
        return True

    def release(self, slot: int) -> None:
        self.free += self.owned[slot][1:]
        del self.owned[slot][1:]

    def write(self, slots: list[int], cache_MSX: Tensor) -> None:
        """Put the same entries at the start of each slot, where room has been made for them."""
        if self.table_BP is None:
            for slot in slots:
                self.cache_MZYX[:, slot, : cache_MSX.shape[1]] = cache_MSX
            return
        place_S = torch.arange(cache_MSX.shape[1], device=cache_MSX.device)
        page_GS = torch.tensor([self.owned[slot] for slot in slots])[:, place_S.cpu() // self.Y]
        pages_GS = page_GS.to(place_S.device)
        self.cache_MZYX[:, pages_GS, place_S % self.Y] = cache_MSX.unsqueeze(1)

    def keep(self, slots: list[int]) -> None:
        """Drop all other slots."""
        if self.table_BP is None:  # the rows must stay in order
            self.cache_MZYX = self.cache_MZYX[:, slots]
            self.owned = [[slot] for slot in range(len(slots))]
        else:
            for slot in set(range(len(self.owned))) - set(slots):
                self.free += self.owned[slot]
            self.table_BP = self.table_BP[slots]
            self.owned = [self.owned[slot] for slot in slots]

    def filled(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The cache, or as much of it as rows of up to `length` tokens fill, and the table. A CUDA
        graph reads the same tensors each time: on a GPU it is the whole."""
        if self.on_gpu:
            return self.cache_MZYX, self.table_BP
        if self.table_BP is None:  # in steps of 32 so that shapes repeat
            return self.cache_MZYX[:, :, : -(-length // 32) * 32], None
        return self.cache_MZYX, self.table_BP[:, : -(-length // self.Y)]
