"""What the parameters of a model are for: embeddings, norms, output heads, hidden matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

# Channels of an image: gray, colour, colour with transparency.
IMAGE_CHANNELS = 4
# Projections that stand below each other in one parameter: the type, its parameters' prefixes, how many.
FUSED: tuple[tuple[type[nn.Module], tuple[str, ...], int], ...] = (
    (nn.MultiheadAttention, ("in_proj_weight",), 3),
    (nn.LSTM, ("weight_ih", "weight_hh"), 4),
    (nn.LSTMCell, ("weight_ih", "weight_hh"), 4),
    (nn.GRU, ("weight_ih", "weight_hh"), 3),
    (nn.GRUCell, ("weight_ih", "weight_hh"), 3),
)

_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList)
# Their linear layers are hidden ones, be there one layer or many.
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
# What torch.compile and activation checkpointing put into the names.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_HEAD = re.compile(r"(.*_)?(head|heads|classifier|unembed|logits)|embed_out|score")
_EMBEDDING = re.compile(r".*(embed|position|token).*|(.*_)?pos(_.*)?")


class Place(NamedTuple):
    """One occurrence of a parameter.

    Attributes:
        name: As named_parameters() has it, without the parts that wrappers put in.
        path: Of the module that owns it; a parametrized one is owned by the module it was taken from.
        module: That module.
        leaf: The last part of the name.
    """

    name: str
    path: str
    module: nn.Module
    leaf: str

    @property
    def around(self) -> list[str]:
        """The paths of the modules around it, the model's own "" first."""
        parts = self.name.split(".")
        return [".".join(parts[:depth]) for depth in range(len(parts))]


class Purpose(NamedTuple):
    """What a parameter is for: "vector", "embedding", "head", "other" or "matrix", and how that is seen."""

    kind: str
    reason: str


@dataclass
class Member:
    """A parameter and all of its places.

    Attributes:
        param: The parameter.
        places: Where it stands; several where it is tied.
        twins: Places of other Parameter objects over the same memory.
    """

    param: nn.Parameter
    places: list[Place]
    twins: list[Place]

    @property
    def is_vector(self) -> bool:
        """At most one dimension is above 1, so that orthogonalising it would only normalise it."""
        return self.param.numel() <= max(self.param.shape, default=1)

    @property
    def tied(self) -> str:
        """What a reason has to say of the other places."""
        others = [place.name for place in self.places[1:]]
        words = f", tied to {', '.join(others)}" if others else ""
        return words + "".join(f", in the same memory as {place.name}" for place in self.twins)


class Architecture:
    """A model's parameters in the order of registration, tied ones once, and what can be told of them.

    Args:
        model: Wrappers for data parallelism and compilation are looked through.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = unwrapped(model).named_modules(remove_duplicate=False)
        self.modules = {clean(path): module for path, module in modules}
        self.members = list(self._members())
        linear = [path for path, module in self.modules.items() if _is_linear(module)]
        convolutions = [path for path, module in self.modules.items() if isinstance(module, _CONVOLUTIONS)]
        self.heads = self._heads(linear, convolutions)
        # Filters on pixels read the input, as an embedding does.
        self.first = next(iter(convolutions), None)
        if self.first is not None and self.modules[self.first].in_channels > IMAGE_CHANNELS:
            self.first = None

    def _members(self) -> Iterator[Member]:
        members: dict[int, Member] = {}
        memory: dict[tuple[object, ...], list[Member]] = {}
        for path, module in self.modules.items():
            for leaf, param in module._parameters.items():
                if param is None:
                    continue
                place = self._place(path, module, leaf)
                if id(param) in members:
                    members[id(param)].places.append(place)
                    continue
                members[id(param)] = member = Member(param, [place], [])
                # Other kinds of tensors, and those without data, have no address.
                if type(param) is nn.Parameter and param.device.type != "meta" and param.numel():
                    key = (param.device, param.untyped_storage().data_ptr(), param.storage_offset(), param.numel())
                    memory.setdefault(key, []).append(member)
        for sharing in memory.values():
            for member in sharing:
                member.twins.extend(place for other in sharing if other is not member for place in other.places)
        yield from members.values()

    def _place(self, path: str, module: nn.Module, leaf: str) -> Place:
        name = f"{path}.{leaf}" if path else leaf
        parametrized = re.fullmatch(r"(?:(.*)\.)?parametrizations\.([^.]+)", path)
        if parametrized:
            owner = parametrized[1] or ""
            return Place(name, owner, self.modules[owner], parametrized[2])
        return Place(name, path, module, leaf)

    def _heads(self, linear: list[str], convolutions: list[str]) -> dict[str, str]:
        """Why each module that is an output head is one."""
        heads = {}
        named: dict[str, str] = {}
        for path in (path for path in self.modules if path in {*linear, *convolutions}):
            parts = path.split(".")
            index = next((i for i, part in enumerate(parts) if _HEAD.fullmatch(part)), None)
            if index is None or self._in_stack(".".join(parts[:index])):
                continue
            top = ".".join(parts[: index + 1])
            if isinstance(self.modules[top], (nn.ModuleList, nn.ModuleDict)):
                top = ".".join(parts[: index + 2])
            named[top] = path  # the last one under this name
        for top, path in named.items():
            heads[path] = f"output head, by the name {top!r}"
        if linear and not self._in_stack(linear[-1]):
            heads.setdefault(linear[-1], "output head, the model's last linear layer")
        if convolutions and not self._in_stack(convolutions[-1]):
            channels = self.modules[convolutions[-1]].out_channels
            if channels <= IMAGE_CHANNELS:
                heads.setdefault(convolutions[-1], f"output head, the model's last convolution, to {channels} channels")
        return heads

    def _in_stack(self, path: str) -> bool:
        """Whether a layer belongs to a stack of blocks of one kind, as the hidden layers of a transformer do."""
        parts = path.split(".") if path else []
        for depth in range(len(parts)):
            container = self.modules[".".join(parts[:depth])]
            if isinstance(container, _BLOCKS):
                return True
            inner = ".".join(parts[depth + 1 :])
            if not isinstance(container, _CONTAINERS) or not inner:
                continue
            block, layer = self.modules[".".join(parts[: depth + 1])], self.modules[path]
            siblings = [".".join([*parts[:depth], key]) for key in container._modules if key != parts[depth]]
            if not siblings or any(
                type(self.modules[sibling]) is type(block) and _alike(layer, self.modules.get(f"{sibling}.{inner}"))
                for sibling in siblings
            ):
                return True
        return False

    def purpose(self, member: Member) -> Purpose:
        """What a parameter is for, by the type of its module, then its name, then its shape."""
        param, places = member.param, [*member.places, *member.twins]
        tied = member.tied
        for place in places:
            kind = type(place.module).__name__
            if isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)) or kind.endswith(("Embedding", "Embeddings")):
                return Purpose("embedding", f"{kind}{tied}")
            if isinstance(place.module, _NORMS) or re.search(r"Norm(\dd)?$", kind):
                return Purpose("vector", f"{kind}{tied}")
        if member.is_vector:
            return Purpose("vector", ("scalar" if param.ndim == 0 else "vector") + tied)
        for place in places:
            if place.path in self.heads:
                return Purpose("head", self.heads[place.path] + tied)
            if isinstance(place.module, _CONVOLUTIONS):
                if place.path == self.first:
                    channels = place.module.in_channels
                    return Purpose("other", f"first convolution, of {channels} input channels{tied}")
                if place.module.in_channels == place.module.groups > 1:
                    return Purpose("other", f"depthwise convolution, a filter for each channel{tied}")
            elif _EMBEDDING.fullmatch(place.leaf):
                return Purpose("embedding", f"embedding, by the name {place.leaf!r}{tied}")
            elif param.ndim > 2 and param.shape[0] == 1:
                return Purpose("other", f"leading dimension of 1: broadcast over a batch{tied}")
        if param.is_complex():
            return Purpose("other", f"complex{tied}")
        return Purpose("matrix", _shape_in_words(member) + tied)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers for data parallelism and compilation."""
    while True:
        inner = model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None
        inner = inner or model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def parts_by_structure(member: Member) -> int:
    """How many matrices of equal size stand below each other in a parameter, as far as its module tells."""
    module, leaf = member.places[0].module, member.places[0].leaf
    if isinstance(module, _CONVOLUTIONS) and leaf == "weight":
        return int(module.groups)
    for kind, prefixes, parts in FUSED:
        if isinstance(module, kind) and leaf.startswith(prefixes):
            return parts
    return 1


def is_convolution(member: Member) -> bool:
    return isinstance(member.places[0].module, _CONVOLUTIONS)


def is_transposed(member: Member) -> bool:
    """Whether a matrix is stored as (in, out), as the Conv1D of GPT-2's published code does."""
    return _is_conv1d(member.places[0].module) and member.places[0].leaf == "weight"


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer to `nf` features, with a weight [in, nf]."""
    weight, features = module._parameters.get("weight"), getattr(module, "nf", None)
    return type(module).__name__ == "Conv1D" and weight is not None and weight.shape[1:] == (features,)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _alike(layer: nn.Module, other: nn.Module | None) -> bool:
    first, second = getattr(layer, "weight", None), getattr(other, "weight", None)
    return isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape


def _shape_in_words(member: Member) -> str:
    shape = member.param.shape
    if is_convolution(member):
        return f"convolution, {shape[0]} × {shape[1:].numel()}"
    if parts_by_structure(member) > 1:
        return f"fused matrices of {type(member.places[0].module).__name__}"
    if len(shape) == 3:
        return f"stack of {shape[0]} matrices"
    if is_transposed(member):
        return "matrix, stored as (in, out)"
    return "matrix" if len(shape) == 2 else f"matrix, {shape[0]} × {shape[1:].numel()}"
