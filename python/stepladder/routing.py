"""Which algorithm each parameter of a model gets, and why."""

from __future__ import annotations

import io
import numbers
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.nn.parameter import is_lazy

from stepladder.architecture import Architecture, Member, is_convolution, is_transposed, parts_by_structure
from stepladder.optim import SOAP, Muon, MuonH, Shampoo
from stepladder.optim.base import SHARED_OPTIONS
from stepladder.optim.mixed import ALGORITHMS as ELEMENTWISE
from stepladder.optim.mixed import Mixed, defaults_of

Group = dict[str, Any]
# An algorithm, or options of a group, the algorithm among them or not.
Choice = str | Mapping[str, Any]
# Those that are given matrices only, though Shampoo and SOAP could take any parameter.
OF_MATRICES: dict[str, type[Mixed]] = {cls.algorithm: cls for cls in (Muon, MuonH, Shampoo, SOAP)}
ALGORITHMS = (*OF_MATRICES, *ELEMENTWISE)
ATTRIBUTE = "stepladder_algorithm"
# Group keys that are decided here.
RESERVED = ("params", "param_names")


@dataclass(frozen=True)
class Route:
    """What was decided for one parameter.

    Attributes:
        name: As named_parameters() has it; of a tied parameter, the first name.
        shape: Its shape.
        algorithm: Its algorithm; None for a frozen parameter, which is in no group.
        reason: Why.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str | None
    reason: str


class ParamGroups(list[Group]):
    """The groups of a model, as every optimizer takes them, with the reasons for each parameter.

    `str()` gives the table as plain text, `rich.print()` in colour.

    Attributes:
        routes: One for each parameter of the model, frozen ones among them, in the order of registration.
    """

    def __init__(self, groups: Iterable[Group] = (), routes: Iterable[Route] = ()) -> None:
        super().__init__(groups)
        self.routes = list(routes)

    def table(self) -> Table:
        """Parameter, shape, algorithm and reason, a row for each parameter."""
        table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, caption=self.summary(), caption_justify="left")
        for column in ("parameter", "shape", "algorithm", "reason"):
            table.add_column(column)
        for route in self.routes:
            shape = " × ".join(map(str, route.shape)) or "scalar"
            # As a Text, since brackets in a name would be taken for markup.
            table.add_row(*map(Text, (route.name, shape, route.algorithm or "none", route.reason)))
        return table

    def summary(self) -> str:
        """How many parameters each algorithm has, and how many elements they have together."""
        counts: dict[str, tuple[int, int]] = {}
        for group in self:
            tensors, elements = counts.get(group["algorithm"], (0, 0))
            more = sum(p.numel() for p in group["params"])
            counts[group["algorithm"]] = tensors + len(group["params"]), elements + more
        return "; ".join(f"{name}: {n} parameters, {size:,} elements" for name, (n, size) in counts.items())

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=10_000, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")

    def __repr__(self) -> str:
        return f"ParamGroups({self.summary()})"


@dataclass(frozen=True)
class _Choice:
    """A Choice that was checked; `label` is the argument that it was given by."""

    label: str
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Decision:
    algorithm: str
    reason: str
    choice: _Choice
    keys: dict[str, Any]
    vector: bool


def param_groups(
    model: nn.Module,
    *,
    algorithm: str = "muon",
    fallback: str = "adamw",
    embeddings: Choice | None = None,
    head: Choice | None = None,
    rules: Mapping[str, Choice] | None = None,
    split: Mapping[str, int | Sequence[int]] | None = None,
    decay_vectors: bool = True,
    print_table: bool = False,
    **options: Mapping[str, Any],
) -> ParamGroups:
    """Decide for each parameter of a model which algorithm it gets: Muon for hidden matrices, AdamW for the rest.

    >>> optimizer = sl.Muon(sl.param_groups(model), lr=0.02)

    The first of these that speaks of a parameter decides:

    1. its attribute `stepladder_algorithm`,
    2. that attribute of the nearest module around it that has one,
    3. the first of `rules` that matches,
    4. the type of its module: embeddings (those tied to the output head are embeddings) and norms;
    5. its shape: with at most one dimension above 1 it is a vector;
    6. its part in the model: the output head is what is named so (`lm_head`, `head`, `classifier` …) or is the last
       linear layer outside of a stack of alike blocks, or a last convolution to at most 4 channels; a first
       convolution with at most 4 input channels reads pixels, as an embedding reads tokens; a depthwise convolution
       is a vector for each channel; position embeddings and class tokens are seen by their names, or by a
       leading dimension of 1;
    7. what is left are hidden matrices, for `algorithm`; all the others are for `fallback`.

    An attribute of a module, or a rule, that asks for an algorithm of matrices or has options of one passes vectors by.

    Args:
        model: Its parameters have their shapes already; wrappers for data parallelism and compilation are looked
            through, and their parts of the names dropped.
        algorithm: For hidden matrices: "muon", "muonh" (for `sl.MuonH`), "shampoo", "soap", or an elementwise one.
        fallback: "adamw", "lion", "sgd", or "momentum", which is SGD with a momentum of 0.9.
        embeddings: An algorithm, or a dict of options for their group ("algorithm" among them or not); None means
            `fallback`.
        head: Likewise, of the output head.
        rules: By globs for the full name of a parameter, or of a module around it; `*` takes dots too. The values
            are as for `embeddings`: `{"*.router.weight": "adamw", "*.q_proj": {"num_heads": 12}}`. A dict without
            "algorithm" leaves that open.
        split: By such globs, the rows of each of several matrices that stand below each other in one parameter,
            as in a fused projection, or a number of equal ones: `{"*.qkv": 3}`. nn.MultiheadAttention, nn.LSTM,
            nn.GRU and grouped convolutions need no entry. Of a Conv1D of transformers, which stores its weight as
            (in, out) and gets fan_in_fan_out=True, they are the columns.
        decay_vectors: False sets weight_decay=0 for vectors and norms.
        print_table: Print parameter, shape, algorithm and reason of each.
        options: For each algorithm what its groups are to have: `muon={"lr": 0.02}, adamw={"lr": 3e-4}`.

    Returns:
        Groups with "params", "param_names", "algorithm" and the options, those of `algorithm` first. Tied parameters
        are in them once, frozen ones are left out.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An unknown algorithm, a glob that matches nothing, sizes that do not add up, a parameter without
            shape yet, a vector whose own attribute asks for an algorithm of matrices, or nothing to train.

    The division is Jordan's: kellerjordan.github.io/posts/muon.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {reprlib.repr(model)}")
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise ValueError(f"model has parameter {name!r} without a shape yet: run a batch through it first")
    router = _Router(Architecture(model), algorithm, fallback, embeddings, head, rules, split)
    router.check_options(options)

    routes: list[Route] = []
    groups: dict[tuple[Any, ...], Group] = {}
    for member in router.architecture.members:
        name, shape, decision = member.places[0].name, tuple(member.param.shape), router.decide(member)
        if not member.param.requires_grad:
            routes.append(Route(name, shape, None, "frozen: requires_grad is False"))
            continue
        routes.append(Route(name, shape, decision.algorithm, decision.reason))
        keys = decision.keys | ({"weight_decay": 0.0} if decision.vector and not decay_vectors else {})
        label = decision.choice.label if decision.choice.options else None
        group = groups.setdefault(
            (decision.algorithm, label, *sorted(keys.items())),
            {"params": [], "param_names": [], "algorithm": decision.algorithm}
            | dict(options.get(decision.algorithm, {}))
            | keys
            | dict(decision.choice.options),
        )
        group["params"].append(member.param)
        group["param_names"].append(name)
    router.check_globs()
    if not groups:
        raise ValueError(f"model has nothing to train: of its {len(routes)} parameters none has requires_grad=True")

    result = ParamGroups(sorted(groups.values(), key=lambda group: group["algorithm"] != algorithm), routes)
    if print_table:
        Console().print(result.table())
    return result


class _Router:
    """Decides for one parameter after the other."""

    def __init__(
        self,
        architecture: Architecture,
        algorithm: str,
        fallback: str,
        embeddings: Choice | None,
        head: Choice | None,
        rules: Mapping[str, Choice] | None,
        split: Mapping[str, int | Sequence[int]] | None,
    ) -> None:
        self.architecture = architecture
        self.algorithm, self.fallback = _known("algorithm", algorithm), _known("fallback", fallback)
        if fallback in OF_MATRICES:
            elementwise = ", ".join(map(repr, ELEMENTWISE))
            raise ValueError(f"fallback={fallback!r} takes matrices only, expected one of {elementwise}")
        kinds = {"embedding": ("embeddings", embeddings), "head": ("head", head)}
        self.kinds = {kind: _choice(*given) for kind, given in kinds.items() if given[1] is not None}
        self.rules = {glob: _choice(f"rules[{glob!r}]", value) for glob, value in _globs("rules", rules).items()}
        self.split = _globs("split", split)
        self.used: set[str] = set()

        choices = [*self.kinds.values(), *self.rules.values(), *self._attributes()]
        self.asked = {algorithm, fallback} | {choice.algorithm for choice in choices if choice.algorithm}

    def _attributes(self) -> Iterator[_Choice]:
        for path, module in self.architecture.modules.items():
            if choice := _attribute(module, path or "the model"):
                yield choice
        for member in self.architecture.members:
            if choice := _attribute(member.param, member.places[0].name):
                if _passes_by(choice, member):
                    shape = tuple(member.param.shape)
                    raise ValueError(f"{choice.label}={choice.algorithm!r} takes matrices only, got shape {shape}")
                yield choice

    def check_options(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse options for what is no algorithm, or for one that is asked for nowhere."""
        for name, given in options.items():
            if name not in ALGORITHMS:
                known = ", ".join(ALGORITHMS)
                raise TypeError(f"param_groups() got an unexpected keyword argument {name!r}; algorithms are {known}")
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} must be a mapping of options to values, got {given!r}")
            known_keys = OF_MATRICES[name].hyper_keys() if name in OF_MATRICES else set(defaults_of(name))
            if unknown := sorted(set(given) - known_keys - {"maximize", *SHARED_OPTIONS}):
                words = ", ".join(map(repr, unknown))
                raise ValueError(f"{name}={given!r} sets {words}, expected keys out of {', '.join(sorted(known_keys))}")
            if name not in self.asked:
                asked = ", ".join(sorted(self.asked))
                raise ValueError(f"{name}={given!r} has no effect: the algorithms asked for are {asked}")

    def check_globs(self) -> None:
        """Refuse globs that decided nothing."""
        for argument, globs in (("rules", self.rules), ("split", self.split)):
            for glob in globs:
                if f"{argument}[{glob!r}]" not in self.used:
                    what = "parameter" + " with an algorithm of matrices that it could split" * (argument == "split")
                    names = ", ".join(repr(member.places[0].name) for member in self.architecture.members[:3])
                    raise ValueError(f"{argument}[{glob!r}] decides for no {what}; the model has {names} …")

    def decide(self, member: Member) -> _Decision:
        kind, reason = self.architecture.purpose(member)
        choice = self._asked_for(member)
        if choice and choice.algorithm:
            algorithm, reason = choice.algorithm, choice.label + member.tied
        else:
            if choice:
                reason += f"; {choice.label}"
            given = self.kinds.get(kind, _Choice(""))
            algorithm = given.algorithm or (self.algorithm if kind == "matrix" else self.fallback)
            if algorithm in OF_MATRICES and member.is_vector:
                algorithm = self.fallback
            choice = choice or given
        keys: dict[str, Any] = {}
        if algorithm in OF_MATRICES:
            keys = self._keys(member, OF_MATRICES[algorithm].hyper_keys())
            reason += _in_words(keys)
        return _Decision(algorithm, reason, choice, keys, kind == "vector" or member.is_vector)

    def _asked_for(self, member: Member) -> _Choice | None:
        """What an attribute or a rule asks for."""
        if own := _attribute(member.param, member.places[0].name):
            return own
        for place in member.places:
            for path in reversed(place.around):
                choice = _attribute(self.architecture.modules[path], path or "the model")
                if choice and not _passes_by(choice, member):
                    return choice
        for glob, choice in self.rules.items():
            if not _passes_by(choice, member) and _matches(glob, member):
                self.used.add(choice.label)
                return choice
        return None

    def _keys(self, member: Member, taken: set[str]) -> dict[str, Any]:
        """What an algorithm of matrices has to know of a parameter's layout: nothing, if it takes no such keys."""
        shape = member.param.shape
        keys: dict[str, Any] = {}
        if "split_sizes" not in taken:
            return keys
        if len(shape) == 3 and is_convolution(member):
            keys["flatten"] = True
        rows, name = shape[0] if len(shape) != 3 or keys else shape[1], member.places[0].name
        if is_transposed(member):
            keys["fan_in_fan_out"] = True
            rows = shape[1]
        glob = next((glob for glob in self.split if _matches(glob, member)), None)
        parts = parts_by_structure(member)
        if glob is not None:
            label = f"split[{glob!r}]"
            self.used.add(label)
            keys["split_sizes"] = _sizes(label, self.split[glob], name, rows, _lines(keys))
        elif parts > 1 and is_convolution(member):
            keys["num_heads"] = parts
        elif parts > 1:
            keys["split_sizes"] = (rows // parts,) * parts
        return keys


def _known(label: str, algorithm: Any) -> str:
    known = ", ".join(map(repr, ALGORITHMS))
    if not isinstance(algorithm, str):
        raise TypeError(f"{label} must be one of {known}, got {algorithm!r}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{label}={algorithm!r} is unknown, expected one of {known}")
    return algorithm


def _choice(label: str, given: Any) -> _Choice:
    if not isinstance(given, Mapping):
        return _Choice(label, _known(label, given))
    _check_keys(label, given, RESERVED)
    options = {key: value for key, value in given.items() if key != "algorithm"}
    algorithm = _known(f"{label}['algorithm']", given["algorithm"]) if "algorithm" in given else None
    return _Choice(label, algorithm, options)


def _attribute(owner: Any, name: str) -> _Choice | None:
    asked, label = getattr(owner, ATTRIBUTE, None), f"{ATTRIBUTE} of {name}"
    return None if asked is None else _Choice(label, _known(label, asked))


def _passes_by(choice: _Choice, member: Member) -> bool:
    """Whether a choice is about matrices, by its algorithm or by its options, and the parameter is none."""
    elementwise = {key for name in ELEMENTWISE for key in defaults_of(name)} | {"maximize", *SHARED_OPTIONS}
    known = set[str]().union(*(family.hyper_keys() for family in OF_MATRICES.values()))
    of_matrices = set(choice.options) & known - elementwise
    return member.is_vector and (choice.algorithm in OF_MATRICES or (choice.algorithm is None and bool(of_matrices)))


def _check_keys(label: str, given: Mapping[str, Any], reserved: Sequence[str]) -> None:
    if refused := [key for key in given if key in reserved]:
        raise ValueError(f"{label}={given!r} sets {', '.join(map(repr, refused))}, expected options of a group only")


def _globs(argument: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{argument} must be a mapping whose keys are globs, got {given!r}")
    for glob in given or ():
        if not isinstance(glob, str):
            raise TypeError(f"{argument} must have globs as its keys, got {glob!r}")
    return dict(given or {})


def _matches(glob: str, member: Member) -> bool:
    return any(fnmatchcase(path, glob) for place in member.places for path in (place.name, *place.around) if path)


def _sizes(label: str, given: Any, name: str, rows: int, lines: str) -> tuple[int, ...]:
    equal = isinstance(given, numbers.Integral)
    sizes = [given] if equal else given
    if not isinstance(sizes, (tuple, list)) or not sizes:
        raise TypeError(f"{label} must be a number of equal parts or the {lines} of each part, got {given!r}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"{label} must have integers, got {size!r}")
        if size < 1:
            raise ValueError(f"{label}={given!r} must be above 0")
    if equal and rows % given:
        raise ValueError(f"{label}={given!r} does not divide the {rows} {lines} of {name!r}")
    if not equal and sum(sizes) != rows:
        raise ValueError(f"{label}={given!r} adds up to {sum(sizes)}, expected the {rows} {lines} of {name!r}")
    return (rows // int(given),) * int(given) if equal else tuple(map(int, sizes))


def _lines(keys: Mapping[str, Any]) -> str:
    """What the rows of the matrix are in the parameter."""
    return "columns" if keys.get("fan_in_fan_out") else "rows"


def _in_words(keys: Mapping[str, Any]) -> str:
    sizes = keys.get("split_sizes", ())
    if len(set(sizes)) == 1:
        return f", split into {len(sizes)} × {sizes[0]} {_lines(keys)}"
    if sizes:
        return f", split into {' + '.join(map(str, sizes))} {_lines(keys)}"
    return f", split into {keys['num_heads']} groups" if "num_heads" in keys else ""
