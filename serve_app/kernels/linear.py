"""Linear: y = x W^T + b on a CPU, with oneDNN's prepacked weights. Knows how to run rows; knows not why.

`torch.ops.mkldnn._reorder_linear_weight` and `_linear_pointwise` are what torch's own inductor emits. They are not
public API: this file and few_rows.py alone name such functions. Where they are missing or refuse, it is `F.linear`.

The bits of a row may depend on how many rows are computed with it, since the library picks another kernel. The field
``row_tiles`` says which numbers of rows may be used, so that numerics.py can restrict a layer to counts it has proved
equal:

    row_tiles = ()            any number of rows as they come (fast mode)
    row_tiles = (2, ANY)      any number from 2 up; a single row runs as two
    row_tiles = (16, 64)      only 16 or 64 rows; 150 rows run as 64 + 64 + 16 + 16, the last one padded

Up to `few_rows.MAX_ROWS` rows go to our own product, which reads the library's weights where they lie: at any setting of
``chain_depth`` but 0, and where the layout was recognised.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from serve_app.kernels import few_rows

ANY = 1 << 30
_PACKING_HINT = 64


class Linear:
    """One layer. ``weight``: [out, in]; ``bias``: [out] or None. Called with [N, in], returns fresh [N, out]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, packed: bool = True) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.bias = bias
        self.row_tiles: tuple[int, ...] = ()
        self.num_padded_rows = 0
        """Rows computed and thrown away since the start."""
        self.is_packed = False
        self.panels: few_rows.Panels | None = None
        self.chain_depth = few_rows.DEPTHS[0]
        """How our own product sums (see `few_rows.product`); 0: it is not used."""
        self._weight = weight
        if packed and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            try:
                self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKING_HINT)
                self.is_packed = True
                self.panels = few_rows.Panels.of(self._weight, weight)
            except (RuntimeError, AttributeError):  # an element type or a build that oneDNN does not serve
                self._weight = weight

    @property
    def shape_key(self) -> tuple[int, int, bool, torch.dtype]:
        """What decides which kernel the library picks, beside the number of rows."""
        return (self.out_features, self.in_features, self.bias is not None, self.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.panels is not None and self.chain_depth and 1 <= x.shape[0] <= few_rows.MAX_ROWS:
            return self.run_few(x, self.chain_depth)
        tiles = self.row_tiles
        if not tiles or (tiles[-1] == ANY and x.shape[0] >= tiles[0]):
            return self.run(x)
        return self._run_in_tiles(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The rows as they are, in one product."""
        if self.is_packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self.bias)

    def run_few(self, x: torch.Tensor, chain_depth: int) -> torch.Tensor:
        """A few rows in our own product. Only where `panels` is not None."""
        assert self.panels is not None
        return few_rows.product(x, self.panels, self.bias, chain_depth)

    def probe(self, num_rows: int) -> tuple[Linear, torch.Tensor]:
        """A layer of this shape and rows [num_rows, in] for it, made so that a different order of summation shows.

        The exact value of every output is 0 or a tiny bias: the second half of the columns, in random places, takes
        back what the first half gives. What is left is rounding alone, where a plain random product would round most
        differences in float32 sums away (a bfloat16 result keeps 8 bits of 24).
        """
        generator = torch.Generator().manual_seed(0)
        half = self.in_features // 2
        order = torch.randperm(self.in_features, generator=generator)
        weight = torch.zeros(min(self.out_features, 256), self.in_features)
        x = torch.zeros(num_rows, self.in_features)
        for tensor, sign in ((weight, -1.0), (x, 1.0)):
            tensor[:, order[:half]] = torch.randn(len(tensor), half, generator=generator)
            tensor[:, order[half : 2 * half]] = sign * tensor[:, order[:half]]
        repeats = -(-self.out_features // len(weight))
        weight = weight.to(self.dtype).repeat(repeats, 1)[: self.out_features]
        bias = None if self.bias is None else torch.full((self.out_features,), 1e-7, dtype=self.dtype)
        return Linear(weight, bias, packed=self.is_packed), x.to(self.dtype)

    def _run_in_tiles(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        if num_rows <= self.row_tiles[0]:
            return self._run_padded(x, self.row_tiles[0])
        y = x.new_empty(num_rows, self.out_features)
        start = 0
        for tile in split_rows(num_rows, self.row_tiles):
            rows = x[start : start + tile]
            y[start : start + tile] = self.run(rows) if rows.shape[0] == tile else self._run_padded(rows, tile)
            start += tile
        return y

    def _run_padded(self, x: torch.Tensor, tile: int) -> torch.Tensor:
        num_rows = x.shape[0]
        if num_rows == tile:
            return self.run(x)
        self.num_padded_rows += tile - num_rows
        padded = x.new_zeros(tile, self.in_features)
        padded[:num_rows] = x
        return self.run(padded)[:num_rows]


def split_rows(num_rows: int, tiles: tuple[int, ...]) -> Iterator[int]:
    """Tiles that cover ``num_rows``, largest first; only the last may stick out.

    >>> list(split_rows(150, (16, 64)))
    [64, 64, 16, 16]
    """
    while num_rows > 0:
        tile = next((t for t in reversed(tiles) if t <= num_rows), tiles[0])
        yield tile
        num_rows -= tile
