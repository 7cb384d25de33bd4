"""Which layers: the linear layers of a model, and those that a user or a default selects."""

import difflib
import fnmatch
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import flag, instance, require
from ..errors import ArgumentError, Notice
from . import experts
from .adapters import adapter_layers
from .spread import tied

# A component of an MLP's name, below a numbered block: GPT-2, GPT-NeoX, Llama, Qwen, Mistral,
# OLMo, Gemma say `mlp`; OPT and BERT have its matrices in the block itself, XLM a list of MLPs.
MLP = re.compile(
    r"\.\d+\.(?:(?:.*\.)?(?:mlp|mlp_block|ffn|ff|feed_forward|feedforward)\."
    r"|(?:fc[12]|(?:intermediate|output)\.dense)$)|\.(?:mlps|ffns)\.\d+\.|\.shared_experts?\."
)
# What a default leaves out: choices between experts, and what text does not run through.
ROUTER = re.compile(r"(?:^|\.)(?:gate|router|wg|shared_expert_gate|router\.\w+|gate\.\w+)$")
TOWER = re.compile(r"(?:^|[._])(?:vision|visual|image|audio|speech)(?:[._]|$)")
EXPERTS = re.compile(r"(?:^|\.)experts\.")


@dataclass(frozen=True)
class Layer:
    """A tracked linear layer: y = W x (+ b) with W [O,I].

    `also`: further modules with the very same parameters, whose gradients are added to its own:
    linear layers, and embeddings, whose rows are those of W (a tied head).
    `expert`: of routed experts, which one; its name is `<module>.<parameter>.<expert>`.
    `share`: of the tokens, how many come here, as far as the configuration says.
    """

    name: str
    I: int
    O: int
    bias: bool
    also: tuple[str, ...] = ()
    expert: int | None = None
    share: float = 1.0

    @property
    def module(self) -> str:
        """The module that computes it."""
        return self.name if self.expert is None else self.name.rsplit(".", 2)[0]

    @property
    def parameter(self) -> str | None:
        """Of an expert, the parameter of its module that holds its matrix."""
        return None if self.expert is None else self.name.rsplit(".", 2)[1]

    @property
    def J(self) -> int:
        """Inputs with the constant 1 of a bias."""
        return self.I + self.bias


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer that can be tracked, by name: `nn.Linear`, Hugging Face's `Conv1D`, and each
    matrix of routed experts.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = Layer(
                name, module.in_features, module.out_features, module.bias is not None
            )
        elif is_conv1d(module):
            I, O = module.weight.shape
            found[name] = Layer(name, I, O, module.bias is not None)
        elif experts.is_experts(module):
            share = experts.share(module, model)
            for parameter, (I, O, bias) in experts.matrices(module).items():
                for e in range(int(module.num_experts)):
                    of = f"{name}.{parameter}.{e}"
                    found[of] = Layer(of, I, O, bias, expert=e, share=share)
    return found


def select_layers(
    model: nn.Module, patterns: str | Sequence[str] | None = None, *, shared: bool = False
) -> list[Layer]:
    """The layers that `patterns` name, in the model's order.

    Args:
        model: any module.
        patterns: None or "mlp" for the MLP matrices of every block (the paper's choice; of a model
            of which only a part trains, those that train; of an adapter, all that it is made of);
            "all" for every linear layer; else
            names or globs, e.g. "*.attn.c_attn". A layer of exactly that name comes first.
        shared: take modules with the very same parameters as one layer.

    Raises:
        ArgumentError: there are no patterns, one matches no layer (names the nearest ones), the
            default would leave out most of what it stands for, or parameters are shared.
    """
    instance("model", model, nn.Module, "a torch module")
    flag("shared", shared)
    layers = linear_layers(model)
    if isinstance(patterns, str):
        patterns = [patterns]
    named = isinstance(patterns, list | tuple) and all(isinstance(x, str) for x in patterns)
    require(patterns is None or named, "layers", patterns, "names or globs, or None for the MLPs")
    if patterns is not None and not patterns:
        raise ArgumentError(
            "layers: the list is empty; give names or globs, or None for the MLPs of every block"
        )
    names: set[str] = set()
    for pattern in ["mlp"] if patterns is None else patterns:
        if pattern in layers:
            matched = {pattern}
        elif pattern == "all":
            matched = set(layers)
        elif pattern == "mlp":
            matched = _mlps(model, layers)
        else:
            matched = set(fnmatch.filter(layers, pattern))
        if not matched:
            raise ArgumentError(_no_layer(pattern, list(layers)))
        names |= matched
    chosen = [layer for name, layer in layers.items() if name in names]
    return _distinct(model, chosen, shared, everything=patterns is not None and "all" in patterns)


def parameter_counts(model: nn.Module, layers: Sequence[Layer]) -> tuple[int, int]:
    """How many parameters these layers have, and how many the model has."""
    return sum(x.O * x.J for x in layers), sum(p.numel() for p in model.parameters())


def _no_layer(pattern: str, names: list[str]) -> str:
    """What to say where nothing matches."""
    if not names:
        return f"layers: no linear layer matches {pattern!r}; the model has none at all"
    if pattern == "mlp":
        return (
            "layers: no linear layer of this model has a name of an MLP's matrices, which are the "
            f"default. Name the layers you want, e.g. {', '.join(names[:3])}"
        )
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"layers: no linear layer matches {pattern!r}; the nearest are {', '.join(near)}"


def _mlps(model: nn.Module, layers: dict[str, Layer]) -> set[str]:
    """The default: matrices of MLPs that train, without routers, and without towers of images; of a
    model with an adapter, all linear layers of that.
    """
    if (adapter := adapter_layers(model, layers)) is not None:
        return {*adapter}
    found = {
        name
        for name, layer in layers.items()
        if layer.expert is not None or (MLP.search(name) and not ROUTER.search(name))
    }
    found = {name for name in found if not TOWER.search(name)} or found
    trained = {n for n in found if any(p.requires_grad for p in parameters_of(model, layers[n]))}
    found = trained or found
    modules = {layer.module for layer in layers.values()}
    fused = [
        (n, p)
        for n, p in model.named_parameters()
        if p.ndim > 1 and EXPERTS.search(n) and n.rpartition(".")[0] not in modules
    ]
    if fused:
        raise ArgumentError(
            f"layers: {sum(p.numel() for _, p in fused):,} parameters of this model's MLPs are "
            f"experts in one tensor ({fused[0][0]}), which are not linear layers: there is no "
            "default. Name the layers you want"
            + (f", e.g. {', '.join(sorted(found)[:3])}" if found else "")
        )
    return found


def parameters_of(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    """The parameters that a layer is, or is a part of: W, and b if it has one."""
    module = model.get_submodule(layer.module)
    if layer.parameter is not None:
        return experts.parameters(module, layer.parameter)
    return list(module.parameters(recurse=False))


def _distinct(model: nn.Module, chosen: list[Layer], shared: bool, everything: bool) -> list[Layer]:
    """One layer for every parameter: those that share one are merged, left out, or refused."""
    users: dict[int, list[str]] = {}
    copies, held = tied(model), dict(model.named_parameters(remove_duplicate=False))
    same = {id(held[n]): held[of] for n, of in copies.items() if n in held and of in held}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            users.setdefault(id(same.get(id(p), p)), []).append(module_name)
    names = {layer.name for layer in chosen}
    result: dict[str, Layer] = {}
    for layer in chosen:
        own = parameters_of(model, layer)
        # A module that goes by several names is one.
        modules: dict[int, str] = {}
        for u in (u for p in own for u in users[id(same.get(id(p), p))]):
            modules.setdefault(id(model.get_submodule(u)), u)
        others = sorted({*modules.values()} - {layer.module})
        if not others:
            result[layer.name] = layer
        elif any(layer.name in kept.also for kept in result.values()):
            continue
        elif shared and layer.expert is None and _equal(model, own, others):
            linear = linear_layers(model)
            if not all(
                (linear[u].I, linear[u].O) == (layer.I, layer.O)
                if u in linear
                else is_embedding(model.get_submodule(u))
                for u in others
            ):
                raise ArgumentError(_tied(layer.name, others, "cannot be tracked together with it"))
            result[layer.name] = Layer(layer.name, layer.I, layer.O, layer.bias, tuple(others))
        elif everything and not names & {*others}:
            warnings.warn(
                f"layer {layer.name} has the parameters of {', '.join(others)} and is left out",
                Notice,
                stacklevel=3,
            )
        else:
            raise ArgumentError(
                _tied(layer.name, others, "shared_parameters=True adds the gradients of equals")
            )
    return list(result.values())


def _equal(model: nn.Module, own: list[nn.Parameter], others: list[str]) -> bool:
    """Whether other modules have these parameters, and no others."""
    every = (model.get_submodule(other).parameters(recurse=False) for other in others)
    return all({*map(id, own)} == {*map(id, theirs)} for theirs in every)


def _tied(name: str, others: list[str], what: str) -> str:
    return (
        f"layer {name} shares a parameter with {', '.join(others)}: its gradient alone is not that "
        f"of the parameter ({what}); leave it out of `layers`"
    )


def weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W [O,I] of a linear layer, and b in fp32, if it has one."""
    W, b = module.weight, module.bias
    assert isinstance(W, Tensor)
    return W.t() if is_conv1d(module) else W, b.float() if isinstance(b, Tensor) else None


@torch.no_grad()
def is_product(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether y [...,O] is W x + b of every row x [...,I], as far as y's dtype tells: one bool."""
    W, b = weights(module)
    with torch.autocast(x.device.type, enabled=False):
        error = (nn.functional.linear(x.float(), W.float(), b) - y.float()).abs()
    slack = max(1e-3, 8 * torch.finfo(y.dtype).eps) * y.abs().max()
    return (error <= slack).all()


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks up rows of its weight, and the gradient of each is what arrives."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a layer computes W x + b by the code of `nn.Linear` or `Conv1D` itself (or W^T x, by
    that of `nn.Embedding`).
    """
    if type(module).forward is nn.Linear.forward or is_embedding(module):
        return True
    return is_conv1d(module) and type(module).__module__ == "transformers.pytorch_utils"


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's `Conv1D`: a linear layer with a transposed weight."""
    # No transformers module can exist before transformers is imported.
    if "transformers" not in sys.modules:
        return False
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
