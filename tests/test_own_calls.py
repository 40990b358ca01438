"""Functions that model code calls by itself (`modules/inline.py`, `modules/own_calls.py`): seen when they run."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hf_backrazor import RazorConfig, get_razor_model
from hf_backrazor.estimate import estimate_saved_bytes
from hf_backrazor.modules import RazorModule
from hf_backrazor.modules.own_calls import OwnCalls
from hf_backrazor.report import measure_saved_bytes

WIDTH, TOKENS = 32, (2, 16)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.compute(self.first(x)))

    def compute(self, x: Tensor) -> Tensor:
        return self.function(x)


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*TOKENS, WIDTH)


def gradients(model: nn.Module, *args: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    model(*args).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def helper(x: Tensor) -> Tensor:
    return relu(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "in a function": helper,
    "imported": relu,
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "in place": lambda x: x.add(0).relu_(),
    "torch.relu_": lambda x: torch.relu_(x + 0),
    "statement": lambda x: [h := x + 0, h.relu_()][0],
    "F.leaky_relu_": lambda x: F.leaky_relu_(x + 0, 0.1),
    "torch.sigmoid": torch.sigmoid,
    "F.sigmoid": F.sigmoid,
    "Tensor.sigmoid": Tensor.sigmoid,
    "torch.tanh": torch.tanh,
    "F.tanh": F.tanh,
    "Tensor.tanh": Tensor.tanh,
    "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "dropout": lambda x: F.dropout(input=x, p=0.3),
    "F.rms_norm": lambda x: F.rms_norm(x, (WIDTH,), eps=1e-5),
    "gate": lambda x: torch.sigmoid(x) * x.flip(-1),
    "product with a result": lambda x: F.silu(x).mul(other=x.flip(-1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_packed_however_code_calls_them(name: str) -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(Between(FUNCTIONS[name])).train(), tokens()
    dense, expected = measure_saved_bytes(plain, input=x), gradients(plain, x)
    razor = get_razor_model(copy.deepcopy(plain), RazorConfig.preset("lossless"))
    for _ in range(3):
        for found, grad in zip(gradients(razor, x), expected, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-4)
    torch.manual_seed(3)
    output = plain(x)
    torch.manual_seed(3)
    assert torch.equal(razor(x), output)
    assert "functional" in repr(razor)
    razor.remove_razor()
    packed = measure_saved_bytes(get_razor_model(razor), input=x)
    assert packed.by_module["0"] < 0.45 * dense.by_module["0"]
    assert measure_saved_bytes(razor, input=x).by_module == packed.by_module


def test_tensors_that_code_has_deleted_are_gone() -> None:
    gone: list[bool] = []

    def compute(h: Tensor) -> Tensor:
        h = h + 1
        y, known = F.relu(h), weakref.ref(h)
        del h
        gone.append(known() is None)
        return y

    model, x = get_razor_model(Between(compute)).train(), tokens()
    for _ in range(3):
        model(x).sum().backward()
    assert len(gone) == 3
    assert all(gone)


def modes() -> list[TorchFunctionMode]:
    return [m for m in torch.overrides._get_current_function_mode_stack() if isinstance(m, OwnCalls)]


def test_the_mode_is_off_where_nothing_is_called() -> None:
    on: list[bool] = []

    def compute(x: Tensor) -> Tensor:
        on.append(bool(modes()))
        return x * 2 + x * torch.ones(WIDTH)

    model, x = get_razor_model(nn.Sequential(Between(compute))).train(), tokens()
    assert not any(name in ("", "0") for name, _ in model.razor_modules())
    for _ in range(12):
        model(x).sum().backward()
    # Two looks in the first step: razor looks whether to compute the module again.
    assert [i for i, each in enumerate(on, start=1) if each] == [1, 2, 4, 8]
    assert [name for name, _ in model.razor_modules()] == ["0.first", "0.second"]
    assert model[0].razor_repr() == ""
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert not any(on[-2:])


def test_what_code_calls_later_only_is_found() -> None:
    model, x = Between(lambda x: x + 1), tokens()
    get_razor_model(model).train()
    for _ in range(5):
        model(x).sum().backward()
    assert model.kind == "other"
    model.function = F.silu
    for _ in range(8):
        model(x).sum().backward()
    assert model.kind == "inline"


def test_frozen_forwards_show_nothing_and_are_not_counted() -> None:
    model, x = Between(lambda x: x * x), tokens()
    model.requires_grad_(False)
    get_razor_model(model).train()
    for _ in range(3):
        model(x)
    assert model.razor_calls.forwards == 0
    model.requires_grad_(True)
    model.function = lambda x: F.silu(x) * x.flip(-1)
    model(x).sum().backward()
    assert list(model.razor_calls.kinds) == ["activation", "gate"]


class Around(nn.Module):
    """Code of its own around a module that has some as well."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.act, self.last = inner, nn.SiLU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.device("cpu"):  # a mode of its own
            hidden = self.act(self.inner(x))
        return F.silu(self.last(hidden))


@pytest.mark.parametrize("excluded", [["inner"], ["act"], ["inner", "first", "second"]])
def test_what_is_excluded_stays_dense_inside_of_code_that_is_replaced(excluded: list[str]) -> None:
    model, x = Around(Between()), tokens()
    types = [type(module) for module in model.modules()]
    dense = measure_saved_bytes(model, x=x).by_module
    get_razor_model(model, RazorConfig(exclude_modules=excluded))
    for _ in range(2):
        saved = measure_saved_bytes(model, x=x).by_module
        for name in excluded:
            name = name if name in ("inner", "act") else f"inner.{name}"
            assert not isinstance(model.get_submodule(name), RazorModule)
            assert saved.get(name, 0) == dense.get(name, 0), name
        assert saved[""] < 0.3 * dense[""]
    assert list(model.razor_calls.kinds) == ["activation"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert measure_saved_bytes(copied, x=x).by_module == saved
    model.train()
    model.extra = nn.Linear(WIDTH, WIDTH)
    model.train()
    assert measure_saved_bytes(model, x=x).by_module == saved
    del model.extra
    model.remove_razor()
    assert [type(module) for module in model.modules()] == types


def test_a_module_that_is_targeted_alone_takes_no_calls_of_others() -> None:
    model, x = Around(Between()), tokens()
    dense = measure_saved_bytes(model, x=x).by_module
    get_razor_model(model, RazorConfig(target_modules=["inner", "first", "second"]))
    saved = measure_saved_bytes(model, x=x).by_module
    assert saved["inner"] < 0.3 * dense["inner"]
    assert all(saved[name] == dense[name] for name in ("", "act", "last"))


def test_modes_of_others_see_the_functions() -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    model, x = get_razor_model(Between()).train(), tokens()
    for _ in range(3):
        names.clear()
        with Seen():
            model(x)
        assert "silu" in names


def test_threads_and_exceptions_leave_nothing_behind() -> None:
    def compute(x: Tensor) -> Tensor:
        if fails:
            raise ValueError("no")
        return F.silu(x)

    model, x, fails = get_razor_model(Between(compute)).train(), tokens(), True
    with pytest.raises(ValueError, match="no"):
        model(x)
    assert not modes()
    fails = False
    found: list[list[Tensor]] = []
    replicas = [copy.copy(model) for _ in range(2)]
    for replica in replicas:
        replica.__dict__ = {**model.__dict__}  # as DataParallel's
        assert replica.razor_calls is model.razor_calls

    def run(replica: nn.Module) -> None:
        found.append(list(torch.autograd.grad(replica(x).sum(), list(model.parameters()))))

    threads = [threading.Thread(target=run, args=(replica,)) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, *found))
    assert model.kind == "inline"


class GatedMLP(nn.Module):
    def __init__(self, act: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.act = copy.deepcopy(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("act", [nn.SiLU(), F.silu, nn.Sigmoid()], ids=["module", "function", "sigmoid"])
@pytest.mark.parametrize("first", ["estimate", "report", "step", "hooked step"])
def test_gates_are_known_before_the_forward_that_counts(act: Callable[[Tensor], Tensor], first: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.mlp = nn.Linear(WIDTH, WIDTH), GatedMLP(act)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.mlp(self.before(F.one_hot(input_ids, WIDTH).to(self.before.weight.dtype)))

    torch.manual_seed(0)
    model, ids = get_razor_model(Model().train()), torch.randint(0, WIDTH, TOKENS)
    model.main_input_name = "input_ids"
    if first == "hooked step":  # which cannot run twice
        model.mlp.up.register_forward_hook(lambda *_: None)
    if first == "estimate":
        figure = estimate_saved_bytes(model, TOKENS, labels=False).total
    elif first == "report":
        figure = model.memory_report(input_ids=ids).razor_bytes
    else:
        model(ids).sum().backward()
        figure = measure_saved_bytes(model, input_ids=ids).total
    assert not isinstance(act, nn.Module) or model.mlp.act.razor_gate.multiplied
    for _ in range(3):
        model(ids).sum().backward()
        assert measure_saved_bytes(model, input_ids=ids).total == figure


@pytest.mark.parametrize("act", [nn.SiLU(), F.silu], ids=["module", "function"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gates_under_checkpointing_from_the_first_step(act: Callable[[Tensor], Tensor], reentrant: bool) -> None:
    torch.manual_seed(0)
    mlp, x = GatedMLP(act).train(), tokens().requires_grad_()
    expected = torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))
    model = get_razor_model(nn.Sequential(mlp)).train()
    for _ in range(3):
        model.zero_grad()
        # Two forwards before a backward, as for contrastive losses.
        outputs = [checkpoint(model, x, use_reentrant=reentrant) for _ in range(2)]
        sum(output.square().sum() / 2 for output in outputs).backward()
        found = [p.grad for p in model.parameters()]
        flat = [torch.cat([grad.flatten() for grad in each]) for each in (found, expected)]
        assert F.cosine_similarity(*flat, dim=0) > 0.97


def small(kind: type[hf.PreTrainedConfig]) -> dict[str, int]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "num_key_value_heads": 2, "vocab_size": 100, "head_dim": 16, "use_cache": False}


def test_dropout_that_attention_calls_by_itself() -> None:
    config = hf.Starcoder2Config(**small(hf.Starcoder2Config), residual_dropout=0.1)
    torch.manual_seed(0)
    model, ids = hf.Starcoder2ForCausalLM(config).train(), torch.randint(0, 100, TOKENS)
    report = get_razor_model(model).memory_report(input_ids=ids, labels=ids)
    rows = {row.name: row for row in report.modules}
    for index in range(2):
        attention = model.model.layers[index].self_attn
        assert attention.kind == "attention"
        assert "q, k, v in 4 bits, functional dropout in 1 bit" in repr(attention)
        assert rows[f"model.layers.{index}.mlp"].razor_bytes <= TOKENS[0] * TOKENS[1] * 64 // 8
        assert rows[f"model.layers.{index}.self_attn"].line is None


def test_the_gate_of_attention() -> None:
    torch.manual_seed(0)
    config = hf.HrmTextConfig(**small(hf.HrmTextConfig))
    model, ids = hf.HrmTextForCausalLM(config).train(), torch.randint(0, 100, TOKENS)
    report = get_razor_model(model).memory_report(input_ids=ids, labels=ids)
    rows = [row for row in report.modules if row.name.endswith("self_attn")]
    assert rows
    assert all(row.kind == "attention" and row.line is None for row in rows)
    assert report.dense_bytes > 7 * report.razor_bytes


def test_what_losses_are_made_of_is_exact_in_the_models_own_code() -> None:
    model, x = Between(lambda x: torch.tanh(torch.sigmoid(x))), tokens()
    dense = measure_saved_bytes(model, x=x).by_module[""]
    get_razor_model(model)
    assert measure_saved_bytes(model, x=x).by_module[""] == dense
    assert "functional" not in repr(model)
