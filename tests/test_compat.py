"""What razor uses that other libraries keep private: it is there, does what is expected, and stays in one file."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers.utils.hub import PushToHubMixin

import hf_backrazor
from hf_backrazor import compat

PACKAGE = Path(hf_backrazor.__file__).parent
COMPAT = PACKAGE / "compat.py"

# Private names that other files may use, and why: an attribute is read faster than a function is called that reads it,
# and a method is overridden where it is.
PERMITTED = {
    "what a module holds, without computing what is parametrized": ("_parameters", "_buffers", "_modules"),
    "of a tensor: how often it was written to, and what it is a view of": ("_version", "_base"),
    "what the forwards of torch's layers call on themselves, and razor's in their place": (
        *("_conv_forward", "_output_padding", "_check_input_dim", "_get_no_batch_dim"),
    ),
    "where a config of Transformers has the name of the attention function": ("_attn_implementation",),
    "overridden: a method of Transformers, and one of PEFT": ("_upload_modified_files", "_cast_input_dtype"),
    "operators in torch.ops.aten": (
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "_batch_norm_impl_index"),
        *("_log_softmax", "_reshape_alias", "_to_copy", "_unsafe_view"),
    ),
    "one of the methods that read a tensor's memory; if there is none, nothing is lost": ("_typed_storage",),
    "documented by Python": ("_replace",),
}


class TestPrivateNames:
    """No file but `compat.py` uses names that another library keeps private."""

    def test_are_used_in_one_file(self) -> None:
        trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
        own = {name for tree in trees.values() for name in _defined(tree)}
        # Of what another library's objects have as well, one file's is not another's.
        own -= {name for each in _foreign() for name in each}
        own |= set().union(*PERMITTED.values())
        found = [
            f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
            for path, tree in trees.items()
            if path != COMPAT
            for line, name in _used(tree)
            if name not in own.union(_defined(tree)) and not name.startswith("_razor")
        ]
        assert not found, "reach these through compat.py:\n" + "\n".join(found)

    def test_permitted_are_in_use(self) -> None:
        used = {name for path in PACKAGE.rglob("*.py") for _, name in _used(ast.parse(path.read_text("utf-8")))}
        assert set().union(*PERMITTED.values()) <= used

    @pytest.mark.parametrize(
        "code",
        [
            "import torch._dynamo",
            "from torch._guards import detect_fake_mode",
            "from torch.overrides import _pop_mode_temporarily",
            "torch._int_mm(x, y)",
            "x.untyped_storage()._cdata",
            "getattr(module, '_forward_hooks')",
            "'_old_forward' in module.__dict__",
        ],
    )
    def test_are_found(self, code: str) -> None:
        assert list(_used(ast.parse(code)))

    def test_every_one_is_called_here(self) -> None:
        public = {*_defined(ast.parse(COMPAT.read_text("utf-8")), private=False), *compat.__all__}
        here = ast.walk(ast.parse(Path(__file__).read_text("utf-8")))
        called = {node.attr for node in here if isinstance(node, ast.Attribute) and _text(node.value) == "compat"}
        assert public <= called


def _is_private(name: str) -> bool:
    return name.isidentifier() and name.startswith("_") and not name.startswith("__") and name != "_"


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _defined(tree: ast.Module, private: bool = True) -> Iterator[str]:
    """Names that a module defines: at its top level if they are public, else anywhere, attributes of `self` as well."""
    for node in ast.walk(tree) if private else tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = [each for target in targets for each in ast.walk(target)]
            names = [each.id for each in inside if isinstance(each, ast.Name)]
            names += [each.attr for each in inside if isinstance(each, ast.Attribute) and _text(each.value) == "self"]
        else:
            continue
        yield from (name for name in names if not name.startswith("_") or private)


def _foreign() -> Iterator[list[str]]:
    """Names that objects have which razor is given or extends."""
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=0, vocab_size=8))
    yield from map(dir, (torch, torch.ops.aten, Tensor, nn.Module(), nn.Conv2d, nn.InstanceNorm2d, model, model.config))
    yield dir(peft.tuners.lora.Linear)


def _used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private names that a module imports, reads as an attribute, or has as a string, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [part for each in node.names for part in each.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(each.name for each in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        else:
            continue
        yield from ((node.lineno, name) for name in names if _is_private(name))


class TestTensors:
    """What tensors and their storages tell."""

    def test_versions_and_bases(self) -> None:
        x = torch.zeros(2, 3)
        version = x._version
        view = x.view(6)
        view.add_(1)
        assert x._version == view._version == version + 1
        assert view._base is x
        assert x._base is None
        assert view.detach()._base is None

    def test_storages(self) -> None:
        x, y = torch.zeros(4), torch.zeros(4)
        assert compat.address_of(x.untyped_storage()) == compat.address_of(x[2:].untyped_storage())
        assert compat.address_of(x.untyped_storage()) != compat.address_of(y.untyped_storage())
        with compat.FakeTensorMode():
            x, y = torch.zeros(4), torch.zeros(4)
            assert compat.address_of(x.untyped_storage()) == compat.address_of(x[2:].untyped_storage())
            assert compat.address_of(x.untyped_storage()) != compat.address_of(y.untyped_storage())

    def test_parts_of_what_is_not_coalesced(self) -> None:
        x = torch.sparse_coo_tensor(torch.tensor([[0, 0, 2]]), torch.ones(3), (4,))
        indices, values = compat.indices_and_values(x)
        assert indices.shape == (1, 3)
        assert values.shape == (3,)

    def test_fakes(self) -> None:
        real = torch.zeros(2)
        with compat.FakeTensorMode() as mode:
            fake = torch.zeros(2)
            assert isinstance(fake, compat.FakeTensor)
            assert fake.fake_mode is mode
            assert compat.detect_fake_mode([fake]) is mode
            with compat.unset_fake_temporarily():
                assert type(torch.zeros(2)) is Tensor
        assert compat.is_fake(fake)
        assert not compat.is_fake(real)
        assert compat.detect_fake_mode([real]) is None

    def test_trees(self) -> None:
        leaves, tree = compat.tree_flatten(([1, 2], {"a": 3}))
        assert leaves == compat.tree_leaves(([1, 2], {"a": 3})) == [1, 2, 3]
        assert isinstance(tree, compat.TreeSpec)
        assert compat.tree_unflatten([4, 5, 6], tree) == ([4, 5], {"a": 6})
        assert compat.tree_map(lambda x: 2 * x, ([1], {"a": 3})) == ([2], {"a": 6})

    def test_wrapper(self) -> None:
        class Wrapper(Tensor):
            @classmethod
            def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                raise NotImplementedError

        x = compat.make_wrapper_tensor(Wrapper, (2, 3), (3, 1), 0, dtype=torch.float16, device=torch.device("cpu"))
        assert type(x) is Wrapper
        assert (x.shape, x.stride(), x.dtype, x.device.type) == ((2, 3), (3, 1), torch.float16, "cpu")

    def test_arguments_of_to(self) -> None:
        device, dtype, copies, order = compat.parse_to("cpu", torch.float16, memory_format=torch.channels_last)
        assert (device, dtype, bool(copies), order) == (
            *(torch.device("cpu"), torch.float16, False, torch.channels_last),
        )
        assert compat.parse_to(torch.float16)[:2] == (None, torch.float16)

    def test_order_in_memory(self) -> None:
        x = torch.zeros(2, 3, 4, 5)
        assert compat.suggest_memory_format(x) is torch.contiguous_format
        assert compat.suggest_memory_format(x.to(memory_format=torch.channels_last)) is torch.channels_last

    def test_products_of_integers(self) -> None:
        x, y = (torch.randint(-127, 128, (32, 32), dtype=torch.int8) for _ in range(2))
        assert torch.equal(compat.integer_product(x, y), x.int() @ y.int())
        assert isinstance(compat.has_integer_products(), bool)

    def test_assertion(self) -> None:
        compat.assert_on_device(torch.tensor(True), "as it should be")
        with pytest.raises(RuntimeError, match="not so"):
            compat.assert_on_device(torch.tensor(False), "not so")


class TestOperators:
    """What operators of torch tell and return."""

    def test_schema(self) -> None:
        written = compat.schema_of(torch.ops.aten.add_.Tensor)
        assert written.name == "aten::add_"
        assert written.is_mutable
        view, copied = compat.schema_of(torch.ops.aten.view.default), compat.schema_of(torch.ops.aten.mul.Tensor)
        assert view.returns[0].alias_info is not None
        assert not copied.is_mutable
        assert copied.returns[0].alias_info is None

    def test_permitted(self) -> None:
        aten, x = torch.ops.aten, torch.randn(2, 3, 4, 4)
        y = aten._adaptive_avg_pool2d(x, (2, 2))
        assert aten._adaptive_avg_pool2d_backward(torch.ones_like(y), x).shape == x.shape
        y, mean, *_ = aten._batch_norm_impl_index(x, None, None, None, None, True, 0.1, 1e-5, True)
        assert torch.equal(y, nn.functional.batch_norm(x, None, None, training=True))
        assert mean.shape == (3,)
        assert torch.equal(aten._log_softmax.default(x, -1, False), x.log_softmax(-1))
        assert aten._to_copy.default(x, dtype=torch.float64).dtype == torch.float64
        assert aten._unsafe_view.default(x, (6, 16)).shape == (6, 16)
        assert aten._reshape_alias.default(x, (96,), (1,)).data_ptr() == x.data_ptr()


class TestModes:
    """Who sees the functions of torch and its operators."""

    def test_of_functions(self) -> None:
        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        seen: list[Any] = []
        x = torch.zeros(2)
        assert compat.current_function_mode() is None
        with Mode() as mode:
            assert compat.current_function_mode() is mode
            assert compat.current_function_modes() == [mode]
            with compat.without_current_function_mode():
                assert compat.current_function_mode() is None
                torch.abs(x)
            with compat.DisableTorchFunction():
                torch.abs(x)
            assert not seen
            torch.abs(x)
        assert seen == [torch.abs]

    def test_of_subclasses(self) -> None:
        class Silent(Tensor):
            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                raise AssertionError("asked")

        assert not compat.leaves_functions_alone(Silent)
        assert compat.leaves_functions_alone(nn.Parameter)
        x = torch.zeros(2).as_subclass(Silent)
        with compat.DisableTorchFunctionSubclass():
            assert torch.equal(torch.add(x, 1), torch.ones(2))

    def test_of_operators(self) -> None:
        class Mode(compat.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        seen: list[Any] = []
        assert not compat.is_dispatcher_watched()
        with Mode():
            assert compat.is_dispatcher_watched()
            torch.zeros(2) + 1
        assert torch.ops.aten.add.Tensor in seen
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            assert compat.is_dispatcher_watched()
        assert not compat.is_dispatcher_watched()


class TestTransforms:
    """What code runs inside of."""

    def test_functorch(self) -> None:
        inside: list[bool] = []

        def function(x: Tensor) -> Tensor:
            inside.append(compat.in_functorch_transform())
            return x.sum()

        x = torch.ones(3)
        torch.func.grad(function)(x)
        with torch.autograd.forward_ad.dual_level():
            function(x)
        function(x)
        assert inside == [True, True, False]

    @pytest.mark.parametrize("legacy", [False, True])
    def test_batches(self, legacy: bool) -> None:
        found: list[bool] = []

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                found.append(compat.is_batched(grad))
                return grad

        x = torch.ones(2, requires_grad=True)
        y = Function.apply(x)
        if legacy:
            torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
        else:
            torch.func.vmap(lambda grad: found.append(compat.is_batched(grad)) or grad)(torch.eye(2))
        assert found == [True]
        assert not compat.is_batched(x)

    def test_checkpoint(self) -> None:
        inside: list[bool] = []

        def function(x: Tensor) -> Tensor:
            inside.append(compat.in_checkpoint())
            return x.sin().sum()

        x = torch.ones(3, requires_grad=True)
        checkpoint(function, x, use_reentrant=False).backward()
        with torch.autograd.graph.save_on_cpu():
            function(x)
        function(x)
        assert inside == [True, True, False, False]

    def test_which_nodes_run(self) -> None:
        found: list[bool] = []

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
                return x * y

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
                found.extend(compat.will_be_executed(node) for node, _ in ctx.next_functions)
                return grad, grad

        x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        inner = x.sin()
        loss = Function.apply(inner, y).sum()
        torch.autograd.grad(loss, inner, retain_graph=True)
        torch.autograd.grad(loss, y, retain_graph=True)
        loss.backward()
        assert found == [True, False, False, True, True, True]

    def test_frames(self) -> None:
        compiled: list[str] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            compiled.append(graph.code)
            return graph.forward

        @compat.no_frame_of_its_own
        def outer(x: Tensor) -> Tensor:
            return inner(x + 1)

        def inner(x: Tensor) -> Tensor:
            return x * 2

        function = torch.compile(outer, backend=backend)
        assert torch.equal(function(torch.ones(2)), torch.full((2,), 4.0))
        assert len(compiled) <= 1
        assert not any("add" in code for code in compiled)

    def test_cached_parametrizations(self) -> None:
        assert not compat.keeps_parametrized()
        with parametrize.cached():
            assert compat.keeps_parametrized()


class TestCompiler:
    """What the compiler records."""

    def test_traceable(self) -> None:
        traced: list[bool] = []

        @compat.traceable
        def scaled(module: nn.Module, x: Tensor, nothing: None, *, by: float, of: Tensor | None = None) -> Tensor:
            assert nothing is None
            assert of is None
            traced.append(compat.is_traced())
            size = {x.shape: 1.0}[x.shape]  # no size is a symbol, which no dictionary has
            return x * module.weight * module.factor * by * size + compat.traced_constant(table)

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight, self.factor = nn.Parameter(torch.full((3,), 2.0)), 3.0

            def forward(self, x: Tensor) -> Tensor:
                return scaled(self, x, None, by=5.0, of=None)

        table, module = torch.tensor([0.0, 1.0, 2.0]), Scaled()
        function = torch.compile(module, backend="aot_eager", fullgraph=True)
        for rows in (2, 4, 5):
            assert torch.equal(function(torch.ones(rows, 3)), 30 + table.expand(rows, 3))
        module.factor = 1.0  # an attribute that changes is seen
        function(torch.ones(2, 3)).sum().backward()
        assert torch.equal(module.weight.grad, torch.full((3,), 10.0))
        assert all(traced)
        assert not compat.is_traced()
        assert compat.traced_constant(table) is table

    def test_fixed_sizes(self) -> None:
        @torch.compile(backend="eager", fullgraph=True)
        def function(x: Tensor) -> Tensor:
            return x + 1

        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        for rows in (2, 4, 5, 6):
            x = torch.ones(rows)
            compat.fix_sizes({"x": (x,)})
            function(x)
        assert graphs["unique_graphs"] == before + 4

    def test_draws(self) -> None:
        state = torch.Generator().manual_seed(4).get_state()
        before = torch.get_rng_state()
        first, second = (compat.draw_from(state, torch.ops.aten.bernoulli.p, torch.empty(64), 0.5) for _ in range(2))
        assert torch.equal(first, second)
        assert 0 < first.sum() < 64
        assert torch.equal(torch.get_rng_state(), before)

    def test_who_is_compiled(self) -> None:
        found = []

        class Outer(nn.Module):
            @compat.no_frame_of_its_own
            def __call__(self, x: Tensor) -> Tensor:
                found.append(compat.is_compiled(self))
                return super().__call__(x)

            def forward(self, x: Tensor) -> Tensor:
                return x + 1

        module = Outer()
        module(torch.ones(2))
        torch.compile(module, backend="eager")(torch.ones(2))
        module.compile(backend="eager")
        module(torch.ones(2))
        assert found == [False, True, True]

    def test_code_of_its_own(self) -> None:
        def made() -> Any:
            @compat.code_of_its_own
            def function(x: Tensor) -> Tensor:
                return x + 1

            return function

        codes = [made().__code__, made().__code__]
        assert codes[0] is not codes[1]


class TestModules:
    """What modules and configs hold."""

    def test_layers_of_a_kind(self) -> None:
        assert isinstance(nn.BatchNorm3d(2), compat.AnyBatchNorm)
        assert isinstance(nn.ConvTranspose1d(2, 2, 1), compat.AnyConvolution)
        assert isinstance(nn.InstanceNorm1d(2), compat.AnyInstanceNorm)

    def test_contents(self) -> None:
        norm = nn.BatchNorm2d(2)
        assert norm._parameters["weight"] is norm.weight
        assert norm._buffers["running_mean"] is norm.running_mean
        assert nn.Sequential(norm)._modules == {"0": norm}

    def test_methods(self) -> None:
        x, layer = torch.randn(2, 3, 5, 5), nn.Conv2d(3, 4, 3)
        assert torch.equal(layer._conv_forward(x, layer.weight, layer.bias), layer(x))
        up = nn.ConvTranspose2d(3, 4, 3, stride=2)
        assert up._output_padding(x, [12, 12], [2, 2], [0, 0], [3, 3], 2, [1, 1]) == [1, 1]
        assert nn.InstanceNorm2d(3)._get_no_batch_dim() == 3
        for norm in (nn.InstanceNorm2d(3), nn.BatchNorm2d(3)):
            norm._check_input_dim(x)
            with pytest.raises(ValueError, match="expected"):
                norm._check_input_dim(x[0, 0])

    def test_replicas(self) -> None:
        module = nn.Linear(2, 2)
        replica = module._replicate_for_data_parallel()
        assert compat.is_replica(replica)
        assert not compat.is_replica(module)

    def test_hooks(self) -> None:
        layer, after, before = nn.Linear(2, 2), lambda *_: None, lambda *_: None
        layer.register_forward_hook(after)
        layer.register_forward_pre_hook(before)
        assert list(compat.forward_hooks(layer)) == [after, before]

    @pytest.mark.parametrize("reshards", [False, True])
    def test_fsdp(self, reshards: bool) -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            layer = torch.distributed.fsdp.fully_shard(nn.Linear(2, 2), mesh=mesh, reshard_after_forward=reshards)
            assert compat.reshards_after_forward(layer) is reshards
        finally:
            torch.distributed.destroy_process_group()

    def test_accelerate(self) -> None:
        layer = nn.Linear(2, 2)
        forward = layer.forward
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook())
        assert compat.ACCELERATE_HOOK in layer.__dict__
        assert layer.__dict__[compat.ACCELERATE_FORWARD] == forward

    def test_transformers(self) -> None:
        config = transformers.MixtralConfig(
            **{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 16},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2},
        )
        model = transformers.MixtralForCausalLM(config)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        for name in ("eager", "grouped_mm"):
            model.set_experts_implementation(name)
            assert compat.experts_implementation(model.config) == name
        assert compat.experts_implementation(SimpleNamespace()) == "eager"
        layer = model.model.layers[0]
        assert compat.takes_cache_when_checkpointed(layer) in (True, False)
        upload = inspect.signature(PushToHubMixin._upload_modified_files).parameters
        assert list(upload)[1:3] == ["working_dir", "repo_id"]

    def test_peft(self) -> None:
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"], inference_mode=False)
        )
        layer = model.base_model.model[0]
        assert compat.casts_for_adapters(type(layer))
        assert not compat.casts_for_adapters(nn.Linear)
        assert layer._cast_input_dtype(torch.zeros(2, dtype=torch.float16), torch.float32).dtype == torch.float32
