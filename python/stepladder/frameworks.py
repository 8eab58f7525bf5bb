"""Factories by which timm and the Trainer of transformers construct these optimizers for a model.

Neither library is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from stepladder import optim
from stepladder.optim.base import Group, Optimizer
from stepladder.optim.mixed import Mixed
from stepladder.routing import ALGORITHMS, OF_MATRICES, param_groups

PREFIX = "stepladder_"
# What param_groups() takes by name. The algorithm is the optimizer's own.
_ROUTING = {
    name
    for name, parameter in inspect.signature(param_groups).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "algorithm"
}


def trainer_optimizer(optimizer: type[Mixed], **options: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """An optimizer of matrices for the Trainer of transformers, which constructs it for the model that it trains.

    >>> Trainer(model, args, optimizer_cls_and_kwargs=sl.trainer_optimizer(sl.Muon, lr=0.02, adamw={"lr": 3e-4}))

    The groups are those of `stepladder.param_groups`. The Trainer hands the learning rate and the weight decay of its
    arguments to no optimizer that is given this way. One whose parameters are all alike needs no factory:
    `optimizer_cls_and_kwargs=(sl.AdamW, {"lr": 3e-4})`.

    Args:
        optimizer: The class: `sl.Muon`, `sl.MuonH`, `sl.Shampoo` or `sl.SOAP`.
        options: Arguments of the class, and of `stepladder.param_groups`: `fallback`, `rules`, `split`, and options of
            an algorithm as in `adamw={"lr": 3e-4}`. `decay_vectors` is False here if it is not given, as the Trainer
            has no decay for biases and norms.

    Returns:
        What `optimizer_cls_and_kwargs` takes.

    Raises:
        TypeError: `optimizer` is something else.
    """
    if not (isinstance(optimizer, type) and optimizer in OF_MATRICES.values()):
        known = ", ".join(f"stepladder.{cls.__name__}" for cls in OF_MATRICES.values())
        raise TypeError(
            f"optimizer must be one of the classes {known}, got {optimizer!r}; a class of torch.optim.Optimizer with "
            "the same rule for every parameter needs no factory: optimizer_cls_and_kwargs=(cls, {'lr': ...})"
        )

    def factory() -> Callable[..., Mixed]:
        return functools.partial(_routed, optimizer)

    return factory, {"decay_vectors": False} | options


def register_with_timm() -> None:
    """Register every optimizer of this package with timm, by its name in lower case: "stepladder_adamw" and so on.

    >>> sl.register_with_timm()
    >>> optimizer = timm.optim.create_optimizer_v2(model, opt="stepladder_muon", lr=0.02, weight_decay=0.05)

    Of a model, Muon, MuonH, Shampoo and SOAP get the hidden matrices, as `stepladder.param_groups` decides, within the
    groups that timm makes for weight decay and layer decay; its arguments may be given too: `adamw={"lr": 3e-4}`,
    `rules`, `split` and so on. As in `sl.Muon(sl.param_groups(model), lr=0.02)`, `lr` is that of the matrices, and the
    other groups have the rate of their own algorithm. What timm's `fallback_list` matches is no hidden matrix. Groups
    that have an `algorithm`, and parameters in place of a model, are taken as they are.

    Defaults that timm has for an optimizer of torch hold for ours: `momentum=0.9` wherever there is one, SGD's
    `nesterov=True`, RMSprop's `alpha=0.9`, Adagrad's `eps=1e-8`. MuonH has no decay of matrices, whatever the
    `weight_decay`.

    A second call changes nothing. timm reads "_" in a name as the end of a wrapper's, as in "lookahead_sgd", and would
    take "stepladder_muon" for its own "muon": the registry's `create_optimizer` is replaced by one that does not.

    Raises:
        ImportError: timm is not installed, or has no registry of optimizers.
    """
    try:
        factory: Any = importlib.import_module("timm.optim._optim_factory")
        registry, info = factory.default_registry, factory.OptimInfo
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"register_with_timm() needs timm >= 1.0.31: {error}; pip install 'stepladder[frameworks]'"
        ) from error
    families: list[type[Optimizer]] = [getattr(optim, name) for name in optim.__all__]
    names = {family: family.__name__.lower() for family in families}
    if all(PREFIX + name in registry.list_optimizers() for name in names.values()):
        return
    existing = registry.list_optimizers()
    for family, name in names.items():
        own = registry.get_optimizer_info(name) if name in existing else None
        takes = inspect.signature(family).parameters
        # timm splits at "_", so it finds the name that has none.
        registry.register(
            info(
                name=_unsplit(name),
                opt_class=functools.partial(_for_timm, family) if issubclass(family, Mixed) else family,
                description=(family.__doc__ or family.__name__).splitlines()[0],
                has_eps="eps" in takes,
                has_momentum="momentum" in takes,
                has_betas="betas" in takes,
                defaults=own.defaults if own and own.opt_class is getattr(torch.optim, family.__name__, None) else None,
            )
        )
        registry.register_alias(PREFIX + name, _unsplit(name))
    create = registry.create_optimizer
    routed = {name for family, name in names.items() if issubclass(family, Mixed)}

    @functools.wraps(create)
    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **options: Any) -> Any:
        before, found, name = opt.lower().rpartition(PREFIX)
        if not found:
            return create(model_or_params, opt, *args, **options)
        if name in routed and isinstance(model_or_params, nn.Module):
            options["model"] = model_or_params
        return create(model_or_params, before + _unsplit(name), *args, **options)

    registry.create_optimizer = create_optimizer


def _unsplit(name: str) -> str:
    return (PREFIX + name).replace("_", "-")


def _for_timm(family: type[Mixed], params: Iterable[Any], model: nn.Module | None = None, **options: Any) -> Mixed:
    """What timm calls with the groups that it has made of a model, or with the parameters that it was given."""
    given = list(params)
    if model is None or any(isinstance(group, dict) and "algorithm" in group for group in given):
        if options.get("weight_decay") == 0 and "weight_decay" not in inspect.signature(family).parameters:
            # timm names a decay in any case.
            del options["weight_decay"]
        return family(given, **options)
    if not all(isinstance(group, dict) for group in given):
        given = [{"params": given}]
    # In a group, it holds for every algorithm.
    decay = {key: options.pop(key) for key in ("weight_decay",) if key in options}
    return _routed(family, model, [decay | group for group in given], **options)


def _routed(family: type[Mixed], model: nn.Module, groups: list[Group] | None = None, **options: Any) -> Mixed:
    """An optimizer over the parameters of `groups`, or all of the model's, each with what param_groups() decides."""
    # An optimizer's own momentum is a number, the options of the algorithm of that name are not.
    routing = {
        key: value
        for key, value in options.items()
        if key in _ROUTING or (key in ALGORITHMS and (key != "momentum" or isinstance(value, Mapping)))
    }
    routes = param_groups(model, algorithm=family.algorithm, **routing)
    divided = list(routes) if groups is None else _divided(family, routes, groups, routing)
    return family(divided, **{key: value for key, value in options.items() if key not in routing})


def _divided(family: type[Mixed], routes: list[Group], groups: list[Group], routing: dict[str, Any]) -> list[Group]:
    """The given groups, divided by algorithm and options; matrices first."""
    fallback = routing.get("fallback", "adamw")
    others = {"algorithm": fallback} | dict(routing.get(fallback, {}))
    places = {
        param: (route, name)
        for route in routes
        for param, name in zip(route["params"], route["param_names"], strict=True)
    }
    divided: list[Group] = []
    for group in groups:
        own = {key: value for key, value in group.items() if key not in ("params", "use_fallback")}
        pieces: dict[int, Group] = {}
        for item in group["params"]:
            param = item[1] if isinstance(item, tuple) else item
            if param not in places:
                raise ValueError(
                    f"a group has a parameter of shape {tuple(param.shape)} that is none of the model's trainable ones"
                )
            route, name = places[param]
            if group.get("use_fallback") and route["algorithm"] == family.algorithm:
                route = others
            if id(route) not in pieces:
                pieces[id(route)] = _merged(family, route, own)
                divided.append(pieces[id(route)])
            piece = pieces[id(route)]
            piece["params"].append(param)
            piece["param_names"].append(name)
    return sorted(divided, key=lambda group: bool(group["algorithm"] != family.algorithm))


def _merged(family: type[Mixed], route: Group, own: Group) -> Group:
    """The keys of both, without parameters. A group without decay stays so; else what names an algorithm decides."""
    merged = route | own | {"params": [], "param_names": []}
    if own.get("weight_decay") and "weight_decay" in route:
        merged["weight_decay"] = route["weight_decay"]
    if route["algorithm"] == family.algorithm and "weight_decay" not in family.hyper_keys():
        merged.pop("weight_decay", None)
    return merged
