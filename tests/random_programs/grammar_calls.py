"""What a forward does without a layer: lines that read and write `x`, with the lines that make their parameters.

A `NAME` in them becomes a name that is new. `SAVED` is a variable that holds an earlier `x`.
"""

from __future__ import annotations

from random import Random

from torch import Tensor

from .grammar_layers import WIDTHS

Lines = tuple[str, str]  # of the forward; of the constructor


def _parameter(name: str, *shape: int) -> str:
    return f"self.{name} = nn.Parameter(torch.randn({', '.join(map(str, shape))}) * 0.4)"


def functional(rng: Random, x: Tensor) -> Lines | None:
    """A function of torch that razor may have an operator for."""
    width, channels, spatial = x.shape[-1], x.shape[min(1, x.dim() - 1)], x.dim() - 2
    out = rng.choice(WIDTHS)
    inplace = rng.choice(("", "", ", inplace=True"))
    choices = [
        (f"x = F.relu(x{inplace})", ""),
        ("x = torch.relu(x)", ""),
        ("x = x.relu()", ""),
        (f"x = F.relu6(x{inplace})", ""),
        ("x = F.gelu(x)", ""),
        ('x = F.gelu(x, approximate="tanh")', ""),
        (f"x = F.silu(x{inplace})", ""),
        (f"x = F.mish(x{inplace})", ""),
        (f"x = F.hardswish(x{inplace})", ""),
        (f"x = F.hardsigmoid(x{inplace})", ""),
        (f"x = F.leaky_relu(x, {rng.choice((0.1, 1.5, -0.3))}{inplace})", ""),
        (f"x = F.elu(x{inplace})", ""),
        ("x = torch.tanh(x)", ""),
        ("x = torch.sigmoid(x)", ""),
        ("x = F.softplus(x)", ""),
        ("x = F.softmax(x, -1)", ""),
        ("x = F.normalize(x, dim=-1)", ""),
        ("x = x * torch.sigmoid(x)", ""),
        ("x = F.silu(x) * x", ""),
        ("x = F.gelu(x) * (x + 1)", ""),
        (f"x = F.dropout(x, {rng.choice((0.1, 0.5, 0.8))}, self.training{inplace})", ""),
        ("x = F.dropout(x)", ""),
        ("x = F.linear(x, self.NAME)", _parameter("NAME", out, width)),
        ("x = F.linear(x, self.NAME, self.NAMEb)", f"{_parameter('NAME', out, width)}\n{_parameter('NAMEb', out)}"),
        ("x = F.linear(x, self.NAME.tanh())", _parameter("NAME", out, width)),
        ("x = x @ self.NAME", _parameter("NAME", width, out)),
        ("x = F.layer_norm(x, x.shape[-1:])", ""),
        (
            "x = F.layer_norm(x, x.shape[-1:], self.NAME, self.NAMEb)",
            f"{_parameter('NAME', width)}\n{_parameter('NAMEb', width)}",
        ),
        ("x = F.layer_norm(x, x.shape[-1:], weight=self.NAME)", _parameter("NAME", width)),
        ("x = F.rms_norm(x, x.shape[-1:], self.NAME)", _parameter("NAME", width)),
        ("x = x * self.NAME", _parameter("NAME", width)),
        ("x = torch.mul(self.NAME, x)", _parameter("NAME", width)),
        ("x = x * self.NAME", _parameter("NAME", 1)),
        ("x = x + self.NAME * F.gelu(x)", _parameter("NAME", width)),
        ("x = x.mul(self.NAME.sigmoid())", _parameter("NAME", width)),
        ("x = x / (self.NAME.abs() + 1)", _parameter("NAME", width)),
    ]
    if x.dim() >= 3:
        choices += [
            ("x = F.scaled_dot_product_attention(x, x, x)", ""),
            ("x = x * self.NAME[:, None]", _parameter("NAME", x.shape[-2])),
            (
                "x = F.group_norm(x, 1, self.NAME, self.NAMEb)",
                f"{_parameter('NAME', channels)}\n{_parameter('NAMEb', channels)}",
            ),
            ("x = F.group_norm(x, 1)", ""),
            ("x = F.instance_norm(x)", ""),
            ("x = F.batch_norm(x, None, None, training=True)", ""),
            ("x = F.pad(x, (1, 2))", ""),
            ("x = F.pad(x, (1, -1))", ""),
            ("x = F.pad(x, (1, 1), value=0.5)", ""),
            ('x = F.pad(x, (1, 1), mode="replicate")', ""),
            ("x = F.pad(x, (0, 0, 1, 0))", ""),
        ]
    if spatial in (1, 2, 3):
        kernel = rng.choice((1, 2, 3))
        kernels = [kernel] * spatial
        padding = rng.choice(("", ", padding=1", ', padding="same"', ", stride=2", ", padding=2, dilation=2"))
        choices += 3 * [
            (f"x = F.conv{spatial}d(x, self.NAME{padding})", _parameter("NAME", 3, channels, *kernels)),
            (
                f"x = F.conv{spatial}d(x, self.NAME, self.NAMEb{padding})",
                f"{_parameter('NAME', 3, channels, *kernels)}\n{_parameter('NAMEb', 3)}",
            ),
            (f"x = F.conv{spatial}d(x, self.NAME, groups={channels})", _parameter("NAME", channels, 1, *kernels)),
            (f"x = F.conv_transpose{spatial}d(x, self.NAME)", _parameter("NAME", channels, 2, *kernels)),
            (
                f"x = F.max_pool{spatial}d(x, 2{rng.choice(('', ', 1', ', stride=1, padding=1', ', ceil_mode=True'))})",
                "",
            ),
            (
                f"x = F.avg_pool{spatial}d(x, 2{rng.choice(('', ', 1', ', stride=1, padding=1', ', ceil_mode=True'))})",
                "",
            ),
            (f"x = F.adaptive_avg_pool{spatial}d(x, {rng.choice((1, 2, 3))})", ""),
        ]
    if spatial == 2:
        choices += [
            ("x = F.interpolate(x, size=(7, 6), mode='bilinear')", ""),
            ("x = F.interpolate(x, scale_factor=2)", ""),
            ("x = x * x.mean((2, 3), keepdim=True).sigmoid()", ""),
            ("x = F.pad(x, (1, 0, 2, 1))", ""),
            ("x = x * self.NAME.view(1, -1, 1, 1)", _parameter("NAME", channels)),
            ("x = x * self.NAME", _parameter("NAME", 1, channels, 1, 1)),
        ]
    return rng.choice(choices)


def view(rng: Random, x: Tensor) -> Lines | None:
    """Another view or arrangement of `x`."""
    choices = ["x.contiguous()", "x.clone()", "x[..., ::2]", "x.flatten(1)", "x[:, 1:]", "x.unsqueeze(1)", "x[..., :3]"]
    choices += ["x.view(-1, x.shape[-1])", "x.reshape(-1, x.shape[-1])", "x.view_as(x)", "x.flip(-1)", "x[:]", "x.mT"]
    choices += ["torch.cat([x, 2 * x], -1)", "x.chunk(2, -1)[0]", "x.roll(1, -1)", "x.expand(2, *x.shape)[0]"]
    choices += [
        "x.unsqueeze(-2).expand(*x.shape[:-1], 2, x.shape[-1])",
        "x.repeat_interleave(2, 0)",
        "torch.stack([x, x])",
    ]
    if x.dim() >= 2:
        choices += [
            "x.transpose(0, 1)",
            "x.transpose(-1, -2).contiguous().transpose(-1, -2)",
            "x.mean(-1, keepdim=True)",
        ]
    if x.dim() >= 3:
        order = list(range(1, x.dim()))
        rng.shuffle(order)
        choices += 2 * [
            "x[:, 0]",
            "x.transpose(1, 2)",
            "x.unbind(1)[0]",
            "x.mean(1)",
            "x.flatten(1, 2)",
            "x.flatten(2)",
        ]
        choices += 2 * [
            "x.split(2, 1)[0]",
            f"x.permute(0, {', '.join(map(str, order))})",
            "x.amax(1)",
            "x.flatten()[None]",
        ]
    if x.dim() == 4:
        choices += 3 * ["x.to(memory_format=torch.channels_last)", "x.flatten(2).transpose(1, 2)", "x.mean((2, 3))"]
    for dim in range(1, x.dim()):
        for part in (2, 3):
            if x.shape[dim] % part == 0 and x.shape[dim]:
                choices.append(f"x.unflatten({dim}, ({x.shape[dim] // part}, {part}))")
    return f"x = {rng.choice(choices)}", ""


def gate(rng: Random, x: Tensor) -> Lines | None:
    """A gated product: of two layers, or of two halves."""
    width, out = x.shape[-1], rng.choice(WIDTHS)
    layers = f"self.NAME = nn.Linear({width}, {out})\nself.NAMEu = nn.Linear({width}, {out})"
    act = rng.choice(("nn.SiLU()", "nn.GELU()", "nn.ReLU()", "nn.Sigmoid()", 'ACT2FN["gelu_new"]', "nn.Tanh()"))
    return rng.choice(
        (
            ("x = self.NAMEa(self.NAME(x)) * self.NAMEu(x)", f"{layers}\nself.NAMEa = {act}"),
            ("x = self.NAMEu(x) * self.NAMEa(self.NAME(x))", f"{layers}\nself.NAMEa = {act}"),
            ("x = F.silu(self.NAME(x)) * self.NAMEu(x)", layers),
            ("x = torch.sigmoid(self.NAME(x)) * self.NAMEu(x)", layers),
            ("a, b = x.chunk(2, -1)\nx = F.gelu(a) * b", ""),
            ("a, b = x.chunk(2, -1)\nx = self.NAMEa(a) * b", f"self.NAMEa = {act}"),
            ("x = self.NAMEa(self.NAME(x)).mul_(self.NAMEu(x))", f"{layers}\nself.NAMEa = {act}"),
        )
    )


def in_place(rng: Random, x: Tensor) -> Lines | None:
    """A change of `x` where it lies."""
    choices = [
        "x.add_(0.1)",
        "x.mul_(0.5)",
        "x.relu_()",
        "x.clamp_(min=-0.1)",
        "x.masked_fill_(x < 0, 0.0)",
        "x.neg_()",
    ]
    choices += ["x[:, 0] = 0", "x[..., 0] += 1", "x.sigmoid_()", "x.tanh_()", "x += 1", "x *= 2", "x[..., -1].mul_(3)"]
    choices += ["x.view(-1)[0] = 0", "F.relu_(x)", "x.copy_(x.detach() * 2)", "x.zero_()", "x /= 2", "x.sub_(x.mean())"]
    choices += ["with torch.no_grad():\n    x.mul_(0.5)", "x.squeeze_()", "x.unsqueeze_(1)", "x.exp_()"]
    return rng.choice(choices), ""


def with_saved(rng: Random, x: Tensor) -> Lines | None:
    """`x` together with what it was before."""
    choices = ["x = x + SAVED", "x = x + SAVED", "x += SAVED", "x = x * SAVED", "x = torch.cat([x, SAVED], -1)"]
    choices += [
        "x = SAVED - x",
        "SAVED += x\nx = SAVED",
        "x = torch.sigmoid(x) * SAVED",
        "x = SAVED + 0",
        "SAVED.add_(1)",
    ]
    choices += ["x = F.gelu(SAVED) * x", "x = x @ SAVED.transpose(-1, -2)", "x = torch.addcmul(x, SAVED, SAVED)"]
    choices += ["SAVED.mul_(0.5)", "x = torch.where(SAVED > 0, x, SAVED)"]
    return rng.choice(choices), ""


def observer(rng: Random, x: Tensor) -> Lines | None:
    """Something that looks at the graph."""
    return rng.choice(
        (
            ("x = x.detach()", ""),
            ("if x.requires_grad:\n    x.register_hook(lambda grad: grad * 0.5)", ""),
            ("if x.requires_grad:\n    x.retain_grad()\nself.kept = [x]", "self.kept = []"),
            ("self.kept = [x]", "self.kept = []"),
            ("if x.requires_grad:\n    x.register_hook(lambda grad: grad.clamp(-1, 1))", ""),
            ("x = x + x.detach()", ""),
        )
    )
