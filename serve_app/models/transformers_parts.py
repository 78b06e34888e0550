"""The parts of a transformers model that we put ours in place of. Knows modules by what they do; knows no architecture.

    nn.Linear, GPT-2's Conv1D     RowLinear        our product, whose rows the start-up proof covers
    experts                       _run_experts     the same, one product for each expert that has rows
    a router's own weight         RowWeight        the same, where its module calls functional.linear
    RMS norms                     RowNorm          our kernel, where it gives what the module gives
    rotary embeddings             RotaryTable      cos and sin of every position, made once
    activations (on a CPU)        RowActivation    the module's own, over pieces of one size

Why the last two: torch computes the elements that are left over at the end of a piece of work with another function than
its vectors, so exp, tanh or gelu of a number can differ by where it stands in the batch.

Shape suffixes: N rows, E hidden, P positions, D rotary dims, X experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from serve_app.kernels.ops import LinearLayer, Ops

EXPERTS = "ragged_serve"
"""Our function in transformers' table of ways to run experts."""

PIECE = 1 << 14
"""Elements of one call of an activation. torch splits no work so small between threads, and vectors divide it."""

VECTOR = 64
"""A multiple of the elements that torch's vectorised loops take at once, for every element type and instruction set."""

LANES = 16
"""The width of a norm must be a multiple of it, for the kernels of kernels/cpu.py."""


class RowLinear(nn.Module):
    """A layer of the ops behind nn.Linear's face: any leading dimensions."""

    def __init__(self, linear: LinearLayer) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x.reshape(-1, self.in_features).contiguous())
        return y.view(*x.shape[:-1], self.out_features)


class RowWeight(nn.Parameter):
    """A weight [out, in] of which functional.linear takes our product; to everything else it is a parameter.

    For modules that keep a bare weight and call functional.linear themselves, as the routers of mixtures of experts.
    """

    linear: LinearLayer

    @classmethod
    def of(cls, weight: torch.Tensor, ops: Ops) -> RowWeight:
        made = cls(weight, requires_grad=False)
        made.linear = ops.linear(weight)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and len(args) == 2 and isinstance(args[1], cls):
            x, weight = args
            y = weight.linear(x.reshape(-1, weight.shape[1]).contiguous())
            return y.view(*x.shape[:-1], weight.shape[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class RowNorm(nn.Module):
    """Our RMS norm over the last dimension."""

    def __init__(self, weight: torch.Tensor, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps
        self.ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self.ops.rms_norm(rows, self.weight, self.eps).view(x.shape)

    @classmethod
    def like(cls, module: nn.Module, ops: Ops) -> RowNorm | None:
        """One that gives what ``module`` gives, or None: seen on a few rows, large and small ones.

        Gemma's norms multiply by 1 + weight. In 16 bits that sum may have no exact value; then theirs stays.
        """
        parameters = dict(module.named_parameters())
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = parameters.get("weight")
        if len(parameters) != 1 or weight is None or weight.ndim != 1 or not isinstance(eps, float):
            return None
        width = weight.shape[0]
        if width % LANES:
            return None
        generator = torch.Generator().manual_seed(0)
        scales = torch.tensor([1.0, 1e-3, 30.0])[:, None]
        x = (torch.randn(3, width, generator=generator) * scales).to(weight)
        theirs = module(x)
        if theirs.shape != x.shape:
            return None
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        for shift in (0.0, 1.0):
            wide = weight.detach().float() + shift
            shifted = wide.to(weight.dtype)
            if not torch.equal(shifted.float(), wide):
                continue
            ours = cls(shifted, eps, ops)
            if torch.allclose(ours(x).float(), theirs.float(), rtol=tolerance, atol=tolerance):
                return ours
        return None


class RowActivation(nn.Module):
    """An activation of a CPU model, element by element, such that each element's bits depend on its value alone."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        missing = -x.numel() % VECTOR
        flat = functional.pad(x.reshape(-1), (0, missing)) if missing else x.reshape(-1).contiguous()
        pieces = [self.function(piece) for piece in flat.split(PIECE)]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole[: x.numel()].view(x.shape)


class RotaryTable(nn.Module):
    """What a rotary embedding gives for every position up to ``max_len``, computed at once, then looked up.

    Frequencies that depend on the length of a sequence (longrope) so follow from ``max_len``: a token's key must not
    change when its sequence grows.
    """

    def __init__(self, module: nn.Module, max_len: int) -> None:
        super().__init__()
        self.module = module
        self.max_len = max_len
        self._tables: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = {}

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """position_ids [1, N] -> what the module gives, [1, N, D] each. ``rest``, as the type of layer: another table."""
        key = (x.dtype, x.device, *rest, *sorted(named.items()))
        tables = self._tables.get(key)
        if tables is None:
            every = torch.arange(self.max_len, device=position_ids.device)[None]
            made = self.module(x[:, :1], every, *rest, **named)
            tables = tuple(table_1PD[0] for table_1PD in (made if isinstance(made, tuple) else (made,)))
            assert all(table_PD.shape[0] == self.max_len for table_PD in tables), "no row for each position"
            self._tables[key] = tables
        found = tuple(table_PD[position_ids] for table_PD in tables)
        return found if len(found) > 1 else found[0]


class Experts:
    """The packed weights of one layer's experts as products of ours."""

    def __init__(self, module: Any, ops: Ops, device: torch.device) -> None:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        self.up = _expert_linears(module, first, ops, device)
        self.down = _expert_linears(module, "down_proj", ops, device)

    @property
    def linears(self) -> list[LinearLayer]:
        return [*self.up, *self.down]


def _expert_linears(module: Any, name: str, ops: Ops, device: torch.device) -> list[LinearLayer]:
    """One for each expert; the stacked weight [X, out, in] (or [X, in, out]) of the module is given up."""
    stacked = getattr(module, name).detach()
    biases = getattr(module, f"{name}_bias", None)
    linears = []
    for i in range(stacked.shape[0]):
        weight = stacked[i].T if module.is_transposed else stacked[i]
        bias = None if biases is None else biases[i].detach().to(device, copy=True)
        linears.append(ops.linear(weight.to(device, copy=True).contiguous(), bias))
    delattr(module, name)
    if biases is not None:
        delattr(module, f"{name}_bias")
    return linears


def run_experts(
    module: Any, x_NE: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Our entry in transformers' table of ways to run experts: top_k_index, top_k_weights [N, k] -> [N, E].

    A token's outputs are added in the order in which its router chose the experts, whoever else chose them.
    """
    if x_NE.is_meta:
        return torch.empty_like(x_NE)
    experts: Experts = module.ragged_experts
    num_chosen = top_k_index.shape[1]
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=len(experts.up)).tolist()
    rows = x_NE[order // num_chosen]
    outputs = []
    start = 0
    for up, down, count in zip(experts.up, experts.down, counts, strict=True):
        if count:
            hidden = up(rows[start : start + count])
            hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
            outputs.append(down(hidden.contiguous()))
            start += count
    sorted_outputs = torch.cat(outputs)
    if getattr(module, "has_post_expert_norm", False):
        sorted_outputs = module.post_expert_norm(sorted_outputs)
    by_token = torch.empty_like(sorted_outputs)
    by_token[order] = sorted_outputs
    weighted = by_token.view(-1, num_chosen, by_token.shape[1]) * top_k_weights[..., None]
    total = weighted[:, 0]
    for i in range(1, num_chosen):
        total = total + weighted[:, i]
    return total.to(x_NE.dtype)


def register_experts() -> None:
    """Puts `run_experts` into transformers' table."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, run_experts)


def put_in(model: nn.Module, ops: Ops, device: torch.device, max_len: int) -> list[LinearLayer]:
    """Replaces what the table above names, module by module, so that no weight is there twice for long.

    ``model`` has its weights on the CPU; ours are put on ``device``. Returns every product, in the order of the modules.
    """
    linears: list[LinearLayer] = []
    for path, module in list(model.named_modules()):
        if _is_linear(module):
            linear = ops.linear(*_weight_of(module, device))
            linears.append(linear)
            model.set_submodule(path, RowLinear(linear))
            module.weight = module.bias = None
        elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            module.ragged_experts = Experts(module, ops, device)  # type: ignore[assignment]
            linears += module.ragged_experts.linears
    model.to(device)
    for path, module in list(model.named_modules()):
        if is_rotary(module):
            model.set_submodule(path, RotaryTable(module, max_len))
        elif _is_activation(module) and device.type == "cpu":
            model.set_submodule(path, RowActivation(module))
        elif "Norm" in type(module).__name__ and (norm := RowNorm.like(module, ops)) is not None:
            model.set_submodule(path, norm)
        elif not isinstance(module, nn.Embedding):
            linears += _bare_weights(module, ops)
    return linears


def is_rotary(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith("RotaryEmbedding") and "position_ids" in inspect.signature(module.forward).parameters


def fill_buffers(model: Any, module: nn.Module) -> None:
    """Puts a module's buffers on the CPU, with what follows from the config; they may be on the meta device.

    Where its parameters are is left alone: on the meta device they have nothing to set.
    """
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if buffers:
        module._buffers.update({name: torch.zeros_like(buffer, device="cpu") for name, buffer in buffers.items()})
        model._init_weights(module)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)


def _weight_of(module: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = module.weight.detach()
    weight = weight if isinstance(module, nn.Linear) else weight.T.contiguous()
    bias = module.bias
    return weight.to(device), None if bias is None else bias.detach().to(device)


def _is_activation(module: nn.Module) -> bool:
    where = type(module).__module__
    known = where in ("transformers.activations", "torch.nn.modules.activation")
    return known and not list(module.parameters()) and not list(module.children())


def _bare_weights(module: nn.Module, ops: Ops) -> Iterator[LinearLayer]:
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2:
        ours = RowWeight.of(weight.detach(), ops)
        module._parameters["weight"] = ours
        yield ours.linear
