"""Per-patient gradients at little more than the cost of ordinary ones.

    each patient gets parameters of its own, all in one memory → vmap of the loss → one backward pass of the sum

``vmap`` hands the loss one patient at a time, so a loss cannot mix patients. A parameter [*shape] enters as [B, *shape]
with stride 0 along B; the gradient of the summed losses with respect to it is each patient's own.

``vmap`` alone would multiply every patient by a matrix of its own. The rules below see from the stride that all are
one, compute outputs and input gradients as one ordinary batch, and keep apart only the gradients of the weights: a
convolution's as those of B groups of channels, a linear layer's as B products. What has no rule, or not the form that
its rule knows, goes through vmap's own: slower, and as right (ADR 0008).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# PatientLoss(parameters by name, *one patient's draws [K, …]) → one loss per draw, [K].
PatientLoss = Callable[..., Tensor]


def per_patient_gradients(
    loss: PatientLoss, parameters: Mapping[str, Tensor], draws: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Gradient of each patient's mean loss over the patient's own draws, and of nothing else.

    Args:
        loss: called as ``loss(parameters, *draws_of_one_patient)`` with tensors [K, …]; returns [K]. It must not
            draw random numbers: noise and timesteps are draws. Whatever else it uses is a constant.
        parameters: by name; those that are trained. Others cost no time here.
        draws: tensors [B, K, …].

    Returns:
        Tensors [B, *parameter shape] by name.
    """

    def patient_loss(parameters: Mapping[str, Tensor], *draws_of_patient: Tensor) -> Tensor:
        with _Rules():
            return loss(parameters, *draws_of_patient).mean()

    # Draws before patients in memory: [K, B, C, …] is a batch of K images with B·C channels without a copy.
    draws = [draw.transpose(0, 1).contiguous() for draw in draws]
    patients = draws[0].shape[1]
    own = {name: p.detach().expand(patients, *p.shape).requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad():
        losses: Tensor = torch.func.vmap(patient_loss, in_dims=(0, *(1,) * len(draws)))(own, *draws)
    gradients = torch.autograd.grad(losses.sum(), list(own.values()), materialize_grads=True)
    return dict(zip(own, gradients, strict=True))


class _Convolution(torch.autograd.Function):
    """x [K, B, C, *spatial], weight [B, O, C/groups, *kernel], bias [B, O] or None → [K, B, O, *spatial]."""

    @staticmethod
    def forward(ctx: Any, operation: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        x = x.contiguous()
        y: Tensor = operation(x.flatten(0, 1), weight[0], None if bias is None else bias[0], *options)
        ctx.save_for_backward(x.to(y.dtype), weight[0].to(y.dtype))  # under autocast they differ
        ctx.options = options
        return y.view(*x.shape[:2], *y.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        patients, dims = x.shape[1], weight.ndim - 2
        *options, groups = ctx.options
        stride, padding, dilation = ([o] * dims if isinstance(o, int) else list(o) for o in options)

        def backward(gradient: Tensor, x: Tensor, weight: Tensor, groups: int, *wanted: bool) -> Any:
            of_layer = stride, padding, dilation, False, [0] * dims, groups
            return torch.ops.aten.convolution_backward(gradient, x, weight, None, *of_layer, [*wanted, False])

        gradient = gradient.contiguous()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_x, *_ = backward(gradient.flatten(0, 1), x.flatten(0, 1), weight, groups, True, False)
            of_x = of_x.view(x.shape)
        if ctx.needs_input_grad[2]:
            if (*weight.shape[2:], *stride, groups, *padding) == (*[1] * (2 * dims + 1), *[0] * dims):
                of_weight = _products(gradient.flatten(3), x.flatten(3).mT)  # 1 × 1: a linear layer
            elif len(weight) < 8 * groups:  # as groups of so few channels it would be slower than patient by patient
                each = zip(gradient.unbind(1), x.unbind(1), strict=True)
                of_weight = torch.stack([backward(*of_one, weight, groups, False, True)[1] for of_one in each])
            else:
                shape_only = weight.new_empty(patients * len(weight), *weight.shape[1:])
                folded = gradient.flatten(1, 2), x.flatten(1, 2), shape_only
                _, of_weight, _ = backward(*folded, patients * groups, False, True)
            of_weight = of_weight.view(patients, *weight.shape)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(3).sum((0, 3))
        return None, of_x, of_weight, of_bias, *[None] * 4


class _Linear(torch.autograd.Function):
    """x [K, B, …, I], weight [B, O, I], bias [B, O] or None → [K, B, …, O]."""

    @staticmethod
    def forward(ctx: Any, operation: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = operation(x, weight[0], None if bias is None else bias[0])
        ctx.save_for_backward(x.to(y.dtype), weight[0].to(y.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, x_rows = (t.reshape(*t.shape[:2], -1, t.shape[-1]) for t in (gradient, x))
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_x = gradient @ weight
        if ctx.needs_input_grad[2]:
            of_weight = _products(rows.mT, x_rows)
        if ctx.needs_input_grad[3]:
            of_bias = rows.sum((0, 2))
        return None, of_x, of_weight, of_bias


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over the draws of [K, B, O, N] @ [K, B, N, I] → [B, O, I], without K such products in memory."""
    total = torch.bmm(left[0], right[0])
    for of_draw in zip(left[1:], right[1:], strict=True):
        total.baddbmm_(*of_draw)
    return total


# What a rule gets for each argument: for tensors as vmap holds them, with the place of the patients; for anything
# else, and for what is the same for all patients, with None. It returns [K, B, …], or None where it does not fit.
_Placed = tuple[Any, int | None]


def _draws_first(placed: _Placed) -> Tensor:
    """[K, B, …]; the patients have a place."""
    tensor, place = placed
    return tensor.movedim(place, 1)  # type: ignore[no-any-return]


def _one_for_all(placed: _Placed) -> bool:
    """Whether it is None, or every patient's is the same memory."""
    tensor, place = placed
    return tensor is None or (place == 0 and (tensor.stride(0) == 0 or len(tensor) == 1))


def _layer(kept_apart: Any, operation: Any, x: _Placed, weight: _Placed, bias: _Placed, *options: Any) -> Any:
    if x[1] is None:
        return None
    if weight[1] is None and bias[1] is None:  # not trained
        return _each_image(operation, x, weight, bias, *((option, None) for option in options))
    if _one_for_all(weight) and _one_for_all(bias):
        return kept_apart.apply(operation, _draws_first(x), weight[0], bias[0], *options)
    return None


def _convolution(
    operation: Any,
    input: _Placed,
    weight: _Placed,
    bias: _Placed = (None, None),
    stride: _Placed = (1, None),
    padding: _Placed = (0, None),
    dilation: _Placed = (1, None),
    groups: _Placed = (1, None),
) -> Any:
    has_draws = input[0].ndim - (input[1] is not None) == weight[0].ndim - (weight[1] is not None)
    if isinstance(padding[0], str) or not has_draws:
        return None
    options = (option for option, _ in (stride, padding, dilation, groups))
    return _layer(_Convolution, operation, input, weight, bias, *options)


def _linear(operation: Any, input: _Placed, weight: _Placed, bias: _Placed = (None, None)) -> Any:
    if input[0].ndim < 3:
        return None
    return _layer(_Linear, operation, input, weight, bias)


def _group_norm(
    operation: Any,
    input: _Placed,
    num_groups: _Placed,
    weight: _Placed = (None, None),
    bias: _Placed = (None, None),
    eps: _Placed = (1e-5, None),
) -> Any:
    """All images as the channels of one: then each has weights of its own, and their gradients are kept apart."""
    if input[1] is None or any(place not in (None, 0) for _, place in (weight, bias)):
        return None
    x = _draws_first(input)
    images, channels = x.shape[:2], x.shape[2]
    affine = [None if t is None else t.expand(*images, channels).flatten() for t, _ in (weight, bias)]
    return operation(x.flatten(0, 2)[None], images.numel() * num_groups[0], *affine, eps[0]).view(x.shape)


def _attention(
    operation: Any,
    query: _Placed,
    key: _Placed,
    value: _Placed,
    attn_mask: _Placed = (None, None),
    dropout_p: _Placed = (0.0, None),
    is_causal: _Placed = (False, None),
    **options: _Placed,
) -> Any:
    """PyTorch's fused attention, for which vmap has no rule, over all images at once."""
    if attn_mask[0] is not None or dropout_p[0] > 0 or any(t.ndim != 5 or p is None for t, p in (query, key, value)):
        return None
    q, k, v = (_draws_first(placed) for placed in (query, key, value))
    others = {name: option for name, (option, _) in options.items()}
    y = operation(*(t.flatten(0, 1) for t in (q, k, v)), is_causal=is_causal[0], **others)
    return y.view(*q.shape[:2], *y.shape[1:])


def _each_image(operation: Any, input: _Placed, *arguments: _Placed, **options: _Placed) -> Any:
    """An operation on a batch of images that never mixes them, with nothing trained in it."""
    if input[1] is None or any(place is not None for _, place in (*arguments, *options.values())):
        return None
    x = _draws_first(input)
    others = {name: option for name, (option, _) in options.items()}
    y = operation(x.flatten(0, 1), *(argument for argument, _ in arguments), **others)
    return y.view(*x.shape[:2], *y.shape[1:])


def _constant(argument: Any) -> Any:
    """A Parameter is none of the trained ones, for which vmap has others: nothing is to be derived by it."""
    return argument.detach() if type(argument) is nn.Parameter else argument


def _concatenation(operation: Any, tensors: _Placed, dim: _Placed = (0, None)) -> Any:
    """Along a dimension other than the draws'."""
    if any(place is None for _, place in tensors[0]):
        return None
    along = dim[0] % (tensors[0][0][0].ndim - 1)
    return operation([_draws_first(placed) for placed in tensors[0]], along + 1) if along > 0 else None


class _Rules(TorchFunctionMode):
    """Inside it and the current ``vmap``, the operations that have a rule take it."""

    _RULES: Mapping[Any, Callable[..., Any]] = {
        torch.conv1d: _convolution,
        torch.conv2d: _convolution,
        torch.conv3d: _convolution,
        F.linear: _linear,
        F.group_norm: _group_norm,
        F.scaled_dot_product_attention: _attention,
        F.interpolate: _each_image,
        torch.cat: _concatenation,
    }

    def __init__(self) -> None:
        super().__init__()
        self._level = functorch.maybe_current_level() or 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [_constant(arg) for arg in args]
        kwargs = {name: _constant(arg) for name, arg in (kwargs or {}).items()}
        rule = self._RULES.get(func)
        if rule is None:
            return func(*args, **kwargs)
        if functorch.maybe_current_level() == self._level:  # not inside another transform of the loss's own
            with retrieve_current_functorch_interpreter().lower():
                y = rule(func, *map(self._placed, args), **{name: self._placed(arg) for name, arg in kwargs.items()})
            if y is not None:
                return functorch._add_batch_dim(y, 1, self._level)
        with sdpa_kernel(SDPBackend.MATH):  # vmap would take the fused attention patient by patient
            return func(*args, **kwargs)

    def _placed(self, argument: Any) -> _Placed:
        if not isinstance(argument, Tensor):
            if isinstance(argument, list | tuple) and all(isinstance(item, Tensor) for item in argument):
                argument = [self._placed(item) for item in argument]
            return argument, None
        placed: _Placed = functorch._unwrap_batched(argument, self._level)
        return placed
