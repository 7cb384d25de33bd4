"""Which layers: a model's linear layers, other parameters that can be tracked, and those of them
that a user or a default selects.
"""

import difflib
import fnmatch
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..checks import flag, instance, require
from ..errors import ArgumentError, Notice
from . import dora, experts, ia3
from .adapters import adapter_layers
from .products import is_conv1d, is_embedding
from .spread import is_spread, tied
from .weights import is_packed, is_sharded

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
Kind = Literal["linear", "convolution", "embedding", "vector"]
# What may follow a pattern: how the covariance of output gradients is taken, whole or its diagonal.
SIDES = {"dense": False, "diagonal": True}


@dataclass(frozen=True)
class Layer:
    """A tracked layer: y = W x (+ b) with W [O,I].

    `kind`: of others than linear layers, what x is. A convolution reads patches, an embedding [V,d]
    rows of one 1 (I = V, O = d); a vector, the scale or bias of a norm, the bias of a linear layer,
    IA3's or DoRA's, is an [O,1] that reads a constant 1, and its name is `<module>.<parameter>`.
    `diagonal`: the covariance of output gradients is its diagonal.

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
    kind: Kind = "linear"
    diagonal: bool = False

    @property
    def module(self) -> str:
        """The module that computes it."""
        if self.kind == "vector":
            return ia3.split(self.name) or self.name.rpartition(".")[0]
        return self.name if self.expert is None else self.name.rsplit(".", 2)[0]

    @property
    def parameter(self) -> str | None:
        """Of an expert, the parameter of its module that holds its matrix; of a vector, itself."""
        if self.kind == "vector":
            return self.name.removeprefix(f"{self.module}.")
        return None if self.expert is None else self.name.rsplit(".", 2)[1]

    @property
    def J(self) -> int:
        """Inputs with the constant 1 of a bias."""
        return self.I + self.bias

    @property
    def read(self) -> int:
        """Numbers that hold a row of inputs: of an embedding, where its one 1 stands."""
        return 1 if self.kind == "embedding" else self.I

    @property
    def turned(self) -> tuple[int, int]:
        """Inputs and outputs that eigenvectors turn; 0 where a covariance is diagonal."""
        return 0 if self.kind == "embedding" else self.J, 0 if self.diagonal else self.O

    @property
    def covariance_sizes(self) -> tuple[int, int]:
        """Numbers in the covariances of inputs and of output gradients."""
        J, O = self.turned
        return J * J or self.J, O * O or self.O


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


def other_layers(model: nn.Module) -> dict[str, Layer]:
    """What can be tracked beside linear layers, by name: convolutions (`nn.Conv1d`, `nn.Conv2d`),
    embeddings, and vectors: parameters [d] of modules without children, biases of linear layers,
    IA3's.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            O, *patch = module.weight.shape
            I = math.prod(patch)
            found[name] = Layer(name, I, O, module.bias is not None, kind="convolution")
        elif isinstance(module, nn.Embedding):
            V, d = module.weight.shape
            found[name] = Layer(name, V, d, False, kind="embedding")
        elif ia3.is_ia3(module):
            for of, d in ia3.vectors(name, module).items():
                found[of] = Layer(of, 1, d, False, kind="vector", diagonal=True)
        elif next(module.children(), None) is None:
            for parameter, p in module.named_parameters(recurse=False):
                if p.ndim == 1 and p.is_floating_point():
                    of = f"{name}.{parameter}" if name else parameter
                    found[of] = Layer(of, 1, len(p), False, kind="vector", diagonal=True)
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
            names or globs, e.g. "*.attn.c_attn". A layer of exactly that name comes first. A glob
            that matches no linear layer is one of `other_layers`. With ":diagonal" behind it, the
            covariance of output gradients is taken as its diagonal; with ":dense" as a whole, of
            vectors too.
        shared: take modules with the very same parameters as one layer.

    Raises:
        ArgumentError: there are no patterns, one matches no layer (names the nearest ones), the
            default would leave out most of what it stands for, or parameters are shared.
    """
    instance("model", model, nn.Module, "a torch module")
    flag("shared", shared)
    layers, others = linear_layers(model), other_layers(model)
    if isinstance(patterns, str):
        patterns = [patterns]
    named = isinstance(patterns, list | tuple) and all(isinstance(x, str) for x in patterns)
    require(patterns is None or named, "layers", patterns, "names or globs, or None for the MLPs")
    if patterns is not None and not patterns:
        raise ArgumentError(
            "layers: the list is empty; give names or globs, or None for the MLPs of every block"
        )
    sides: dict[str, bool | None] = {}
    for given in ["mlp"] if patterns is None else patterns:
        pattern, _, side = given.rpartition(":")
        if side not in SIDES:
            pattern, side = given, ""
        if pattern in layers or pattern in others:
            matched = {pattern}
        elif pattern == "all":
            matched = set(layers)
        elif pattern == "mlp":
            matched = _mlps(model, layers, others)
        else:
            matched = {*(fnmatch.filter(layers, pattern) or fnmatch.filter(others, pattern))}
        if not matched:
            raise ArgumentError(_no_layer(pattern, list(layers), list(others)))
        for name in matched:
            sides[name] = SIDES.get(side, sides.get(name))
    every, order = layers | others, {name: at for at, (name, _) in enumerate(model.named_modules())}
    chosen = [
        layer if sides[name] is None else replace(layer, diagonal=bool(sides[name]))
        for name, layer in every.items()
        if name in sides
    ]
    chosen.sort(key=lambda x: order[x.module])
    _check_kinds(model, chosen)
    return _distinct(model, chosen, shared, everything=patterns is not None and "all" in patterns)


def _check_kinds(model: nn.Module, chosen: list[Layer]) -> None:
    """Refuse what is no layer of its own: blocks of a matrix, a part of another layer; and what is
    not linear in a model that is not in one place.
    """
    whole = {x.name for x in chosen if x.kind != "vector"}
    apart = is_sharded(model) or is_spread(model)
    if others := [x for x in chosen if x.kind != "linear"] if apart else []:
        raise ArgumentError(
            f"layer {others[0].name} ({others[0].kind}) is no linear layer, and the model is "
            "sharded over processes or spread by a device_map, where no others are tracked; leave "
            "it out of `layers`"
        )
    for layer in chosen:
        module = model.get_submodule(layer.module)
        if layer.kind == "convolution" and module.groups != 1:
            raise ArgumentError(
                f"layer {layer.name} is a convolution in {module.groups} groups: its weight is so "
                "many matrices, which are not tracked; leave it out of `layers`"
            )
        if layer.kind == "vector" and layer.module in whole:
            raise ArgumentError(
                f"layer {layer.name} is a part of layer {layer.module}, which is tracked as a "
                "whole: leave one of them out of `layers`"
            )


def parameter_counts(model: nn.Module, layers: Sequence[Layer]) -> tuple[int, int]:
    """How many parameters these layers have, and how many the model has."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    for x in linear_layers(model).values():
        # Two numbers of four bits are one of what lies in memory.
        if x.expert is None and is_packed(W := model.get_submodule(x.name).weight):
            sizes[id(W)] = x.O * x.I
    return sum(x.O * x.J for x in layers), sum(sizes.values())


def _no_layer(pattern: str, names: list[str], others: list[str]) -> str:
    """What to say where nothing matches."""
    if not names:
        other = f": {', '.join(others[:3])} can be named" if others else ""
        return f"layers: no linear layer matches {pattern!r}; the model has none at all{other}"
    if pattern == "mlp":
        return (
            "layers: no linear layer of this model has a name of an MLP's matrices, which are the "
            f"default. Name the layers you want, e.g. {', '.join(names[:3])}"
        )
    near = difflib.get_close_matches(pattern, names + others, n=3, cutoff=0.3) or names[:3]
    return f"layers: no layer matches {pattern!r}; the nearest are {', '.join(near)}"


def _mlps(model: nn.Module, layers: dict[str, Layer], others: dict[str, Layer]) -> set[str]:
    """The default: matrices of MLPs that train, without routers, and without towers of images; of a
    model with an adapter, all linear layers of that, IA3's vectors, DoRA's magnitudes.
    """
    own = [*layers, *(name for name in others if ia3.split(name) or dora.HELD in name)]
    if (adapter := adapter_layers(model, own)) is not None:
        return {*adapter}
    found = {
        name
        for name, layer in layers.items()
        if layer.expert is not None or (MLP.search(name) and not ROUTER.search(name))
    }
    found = {name for name in found if not TOWER.search(name)} or found
    if made := sorted(n for n in found if is_parametrized(model.get_submodule(layers[n].module))):
        warnings.warn(
            f"{len(made)} layers have a weight that is made of other parameters (the first is "
            f"{made[0]}) and are left out; one that is named is tracked by that weight's gradient",
            Notice,
            stacklevel=3,
        )
        found -= {*made}
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
    if layer.kind == "vector":
        return [module.get_parameter(str(layer.parameter))]
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
        holder = layer.name.rpartition(".")[0] if layer.kind == "vector" else layer.module
        others = sorted({*modules.values()} - {layer.module, holder})
        if not others:
            result[layer.name] = layer
        elif any(layer.name in kept.also for kept in result.values()):
            continue
        elif shared and layer.expert is None and _equal(model, own, others):
            linear = linear_layers(model)
            if layer.kind != "linear" or not all(
                (linear[u].I, linear[u].O) == (layer.I, layer.O)
                if u in linear
                else is_embedding(model.get_submodule(u))
                for u in others
            ):
                both = [u for u in others if u in linear] if layer.kind == "embedding" else []
                what = f"name {both[0]}, which is both" if both else "cannot be tracked together"
                raise ArgumentError(_tied(layer.name, others, what))
            result[layer.name] = replace(layer, also=tuple(others))
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
