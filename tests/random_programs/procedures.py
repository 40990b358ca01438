"""How a random program is trained. Each procedure is `(model, x, compute, record)`.

`compute(model, x, record)` runs a forward pass and returns the loss. `record(name, tensor)` notes a tensor for the
comparison. The gradients of parameters and of `x` are recorded afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Record = Callable[[str, Any], None]
Compute = Callable[[nn.Module, Tensor, Record], Tensor]


def plain(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    compute(model, x, record).backward()


def accumulated(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    compute(model, x, record).backward()
    compute(model, x, record).backward()


def two_forwards_one_backward(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    (compute(model, x, record) + 2 * compute(model, x, record)).backward()


def two_forwards_backwards_in_order(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    first = compute(model, x, record)
    second = compute(model, x, record)
    first.backward()
    (3 * second).backward()


def backward_twice(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    loss = compute(model, x, record)
    loss.backward(retain_graph=True)
    (2 * loss).backward()


def backward_twice_without_retaining(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    loss = compute(model, x, record)
    loss.backward()
    loss.backward()


def some_gradients(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    loss = compute(model, x, record)
    wanted = [p for p in model.parameters() if p.requires_grad][::2] + ([x] if x.requires_grad else [])
    for i, grad in enumerate(torch.autograd.grad(loss, wanted, allow_unused=True)):
        record(f"gradient {i}", grad)


def gradient_of_hidden(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    loss = compute(model, x, record)
    kept = [t for m in model.modules() for t in getattr(m, "kept", ()) if t.requires_grad]
    for i, grad in enumerate(torch.autograd.grad(loss, kept, retain_graph=True, allow_unused=True) if kept else ()):
        record(f"hidden gradient {i}", grad)
    loss.backward()


def two_steps(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    compute(model, x, record).backward()
    optimizer.step()
    optimizer.zero_grad()
    # What follows depends on gradients.
    compute(model, x, lambda name, value: record(f"gradient stepped: {name}", value)).backward()
    optimizer.step()


def evaluated_between(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    loss = compute(model, x, record)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        record("evaluated", compute(model, x.detach().clone(), record))
    for module, training in modes.items():
        module.training = training
    loss.backward()


def gradients_in_eval_mode(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    model.eval()
    compute(model, x, record).backward()


def copied(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    other = copy.deepcopy(model)
    compute(other, x, record).backward()
    for name, parameter in other.named_parameters():
        record(f"copy's gradient of {name}", parameter.grad)


def input_penalty(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    x = x if x.requires_grad else x.detach().requires_grad_()
    loss = compute(model, x, record)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + grad.square().sum()).backward()


def parameter_penalty(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    loss = compute(model, x, record)
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    (loss + sum(g.square().sum() for g in grads if g is not None)).backward()


def hessian_vector(model: nn.Module, x: Tensor, compute: Compute, record: Record) -> None:
    loss = compute(model, x, record)
    wanted = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    product = sum((g * torch.cos(p.detach())).sum() for g, p in zip(grads, wanted, strict=True) if g is not None)
    for i, grad in enumerate(torch.autograd.grad(product, wanted, allow_unused=True)):
        record(f"product {i}", grad)


FIRST_ORDER = {
    plain: 30,
    accumulated: 4,
    two_forwards_one_backward: 5,
    two_forwards_backwards_in_order: 4,
    backward_twice: 5,
    backward_twice_without_retaining: 1,
    some_gradients: 5,
    gradient_of_hidden: 3,
    two_steps: 4,
    evaluated_between: 2,
    gradients_in_eval_mode: 2,
    copied: 2,
}
SECOND_ORDER = {input_penalty: 2, parameter_penalty: 2, hessian_vector: 2}
PROCEDURES = {procedure.__name__: procedure for procedure in (*FIRST_ORDER, *SECOND_ORDER)}
