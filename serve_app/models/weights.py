"""Weights: a model's name -> a directory -> tensors by name. Strict: every tensor used once, every parameter set once.

Knows safetensors files, shards and the hub; knows no model: whoever builds one takes each tensor by its name and shape,
then calls finish(). `DummyWeights` has the same face and needs no files.

    offset 0        8           8+H
           [ H: u64 ][ header   ][ data of tensor, tensor, ...     ]    one .safetensors file
                       JSON: name -> dtype, shape, data_offsets from 8+H
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm  # type: ignore[import-untyped]

from serve_app.errors import WeightsError
from serve_app.logs import get_logger

logger = get_logger(__name__)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_BASE = "model."

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_HARMLESS_SUFFIX = "rotary_emb.inv_freq"  # old checkpoints store what follows from the config
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FINGERPRINT_SAMPLE = 256


class WeightSource(Protocol):
    """Where a model takes its parameters from."""

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The tensor, on the CPU, in exactly this shape.

        It may lie in the mapped file, whose pages are read when first touched; writing to it leaves the file alone.
        """

    def finish(self) -> None:
        """Call when every parameter is set. Raises WeightsError if something was left over."""


class WeightLoader:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names, memory-mapped.

    Raises WeightsError naming file and tensor: a file that is missing, truncated or corrupt, an index that disagrees
    with its shards, a tensor that is missing, has another shape, is not floating-point, is taken twice or never.

    Embedding models are often saved without what stands around the decoder: their names lack the "model." before them, and
    there is no lm_head.weight. Names are taken as if they had it, and the head is the embedding (a warning says so).
    """

    def __init__(
        self, directory: str | Path, *, tie_word_embeddings: bool = False, progress: bool | None = None
    ) -> None:
        """``progress``: show a bar over bytes on stderr; None: if stderr is a terminal.

        ``tie_word_embeddings``: lm_head.weight may be there and stay unused, if it equals the embedding.
        """
        self.directory = Path(directory)
        self._tie_word_embeddings = tie_word_embeddings
        self._files: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._taken: set[str] = set()
        for path, names in _checkpoint_files(self.directory).items():
            self._open(path, names)
        self._is_bare = EMBEDDING not in self._file_of and EMBEDDING.removeprefix(_BASE) in self._file_of
        if self._is_bare:
            self._file_of = {name if name == HEAD else _BASE + name: path for name, path in self._file_of.items()}
        num_bytes = sum(path.stat().st_size for path in self._files)
        self._bar = tqdm(
            total=num_bytes,
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not (sys.stderr.isatty() if progress is None else progress),
        )

    @property
    def num_tensors(self) -> int:
        return len(self._file_of)

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightSource.take`. Converts between floating-point types; nothing else is converted."""
        if name == HEAD and self._is_bare and name not in self._file_of:
            logger.warning(
                "%s has no %s: this model is for embeddings, and its answers are noise", self.directory, HEAD
            )
            return self._read(EMBEDDING).to(dtype)
        if name not in self._file_of:
            raise WeightsError(f"tensor {name!r} of shape {list(shape)} is missing in {self.directory}")
        path = self._file_of[name]
        if name in self._taken:
            raise WeightsError(f"tensor {name!r} of {path} is taken twice; it can set one parameter only")
        tensor = self._read(name)
        if tuple(tensor.shape) != tuple(shape):
            raise WeightsError(
                f"tensor {name!r} of {path} has shape {list(tensor.shape)}; the config asks for {list(shape)}"
            )
        if tensor.dtype not in _FLOAT_DTYPES:
            raise WeightsError(
                f"tensor {name!r} of {path} is {_short(tensor.dtype)}; "
                f"it must be one of {', '.join(_short(allowed) for allowed in _FLOAT_DTYPES)}"
            )
        self._taken.add(name)
        self._bar.update(tensor.nbytes)
        return tensor.to(dtype)

    def finish(self) -> None:
        """Close the files. Tensors already taken stay valid. Raises WeightsError if a tensor was never taken."""
        try:
            unused = sorted(name for name in self._file_of.keys() - self._taken if not self._is_harmless(name))
            if unused:
                shown = ", ".join(f"{name!r} ({self._file_of[name].name})" for name in unused[:4])
                more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
                raise WeightsError(f"{self.directory} has tensors that this architecture does not use: {shown}{more}")
        finally:
            self.close()

    def close(self) -> None:
        """Close the files without checking. A second call does nothing."""
        self._bar.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path, expected: frozenset[str] | None) -> None:
        """Open one file. ``expected``: the tensors that the index promises in it; None: whatever it has."""
        if not path.is_file():
            raise WeightsError(f"{path} is missing, but {_INDEX_FILE} names it")
        try:
            file = safe_open(path, framework="pt", device="cpu")
            names = frozenset(file.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is truncated or corrupt: {error}") from error
        if expected is not None and names != expected:
            for name in sorted(expected - names):
                raise WeightsError(f"tensor {name!r} is missing in {path}, where {_INDEX_FILE} says it is")
            for name in sorted(names - expected):
                raise WeightsError(f"tensor {name!r} of {path} is a duplicate, or unknown to {_INDEX_FILE}")
        self._files[path] = file
        self._file_of.update(dict.fromkeys(names, path))

    def _read(self, name: str) -> torch.Tensor:
        path = self._file_of[name]
        try:
            stored = name.removeprefix(_BASE) if self._is_bare else name
            tensor: torch.Tensor = self._files[path].get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"tensor {name!r} of {path} cannot be read: {error}") from error
        return tensor

    def _is_harmless(self, name: str) -> bool:
        if name == HEAD and self._tie_word_embeddings and EMBEDDING in self._file_of:
            if not torch.equal(self._read(HEAD), self._read(EMBEDDING)):
                raise WeightsError(
                    f"{HEAD!r} of {self._file_of[HEAD]} differs from {EMBEDDING!r}, but tie_word_embeddings is true; "
                    "set it to false in config.json"
                )
            return True
        return name.endswith(_HARMLESS_SUFFIX)


class DummyWeights:
    """Random weights from seed, name and shape alone, whatever the order of takes: ``load_format="dummy"``.

    Values are normal with mean 0 and deviation ``std``; weights of norms are 1 plus such a value.
    """

    def __init__(self, seed: int = 0, std: float = 0.02) -> None:
        self._seed = seed
        self._std = std
        self._taken: set[str] = set()

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `WeightSource.take`. Raises WeightsError if a name is taken twice."""
        if name in self._taken:
            raise WeightsError(f"tensor {name!r} is taken twice; it can set one parameter only")
        self._taken.add(name)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        tensor = torch.empty(tuple(shape), dtype=torch.float32).normal_(0.0, self._std, generator=generator)
        if name.endswith("norm.weight") or "layernorm" in name:
            tensor += 1.0
        return tensor.to(dtype)

    def finish(self) -> None:
        """There is nothing that could be left over."""


def weights_fingerprint(directory: str | Path) -> str:
    """A hex digest that two copies of a model share and two models do not, in milliseconds a file.

    Over config.json, names, sizes and headers of the weight files, and **a sample** of each tensor's bytes (its first
    and last 256): a change in the middle of a tensor alone goes unseen. Raises WeightsError as WeightLoader does.
    """
    directory = Path(directory)
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)

    config = directory / "config.json"
    add(config.read_bytes() if config.is_file() else b"")
    for path in sorted(_checkpoint_files(directory)):
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header_end = 8 + struct.unpack_from("<Q", data)[0]
                header = data[8:header_end]
                add(path.name.encode())
                add(struct.pack("<Q", len(data)))
                add(header)
                for name, entry in sorted(json.loads(header).items()):
                    if name != "__metadata__":
                        start, stop = (header_end + offset for offset in entry["data_offsets"])
                        add(data[start : min(start + _FINGERPRINT_SAMPLE, stop)])
                        add(data[max(stop - _FINGERPRINT_SAMPLE, start) : stop])
        except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path} is missing, truncated or corrupt: {error}") from error
    return digest.hexdigest()


def _checkpoint_files(directory: Path) -> dict[Path, frozenset[str] | None]:
    """The weight files of a directory and, where an index says so, the names of the tensors in each."""
    single = directory / _SINGLE_FILE
    if single.is_file():
        return {single: None}
    index = directory / _INDEX_FILE
    if not index.is_file():
        others = ", ".join(sorted(path.name for path in directory.glob("*.bin"))[:2])
        hint = f"; it has {others}, which must be converted to safetensors first" if others else ""
        raise WeightsError(f"{directory} has neither {_SINGLE_FILE} nor {_INDEX_FILE}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names_of: dict[str, set[str]] = {}
        for name, file_name in weight_map.items():
            names_of.setdefault(file_name, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is corrupt: {type(error).__name__}: {error}") from error
    for file_name in names_of:
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise WeightsError(f"{index} names file {file_name!r}; it must be a plain file name beside the index")
    return {directory / file_name: frozenset(names) for file_name, names in sorted(names_of.items())}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
