"""The libraries that people train with, each with tiny models and beside the same loop written out."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from libraries import library
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stepladder as sl

OPTIMIZERS = sorted(name for name in sl.optim.__all__)
MATRIX = ("Muon", "MuonH", "SOAP", "Shampoo")
LIBRARIES = ("accelerate", "lightning", "pytorch_lightning", "timm", "torchvision", "transformers")


@pytest.fixture(autouse=True)
def _one_thread(_deterministic):
    """Models as small as these gain nothing from a second."""
    torch.set_num_threads(1)


def same(ours: nn.Module, theirs: nn.Module) -> None:
    """Every value of one model has the bits of the other's."""
    other = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, other[name]), name


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def muon(model: nn.Module, **options: Any) -> sl.Muon:
    return sl.Muon(sl.param_groups(model, adamw={"lr": 3e-3}, decay_vectors=False), lr=0.02, **options)


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda time: 0.9**time)


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, generator=generator), torch.randint(4, (4,), generator=generator)) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), y)


def test_import_takes_none_of_them():
    code = f"import sys, stepladder; print(sorted(set(sys.modules) & set({LIBRARIES})))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


# timm


@pytest.fixture
def timm() -> Any:
    timm = library("timm")
    library("timm.scheduler")
    sl.register_with_timm()
    return timm


def vit(timm: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **size | options)
    return model


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 3, 16, 16, generator=generator), torch.randint(4, (3,), generator=generator)


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, Any]:
    names = {param: name for name, param in model.named_parameters()}
    return {names[param]: group.get(key) for group in optimizer.param_groups for param in group["params"]}


def test_timm_lists_them_once(timm, caplog):
    registry = sys.modules["timm.optim._optim_factory"].default_registry
    create = registry.create_optimizer
    with caplog.at_level(logging.WARNING):
        sl.register_with_timm()
    assert caplog.records == []
    assert registry.create_optimizer is create
    assert timm.optim.list_optimizers("stepladder_*") == sorted(f"stepladder_{name.lower()}" for name in OPTIMIZERS)
    info = timm.optim.get_optimizer_info("stepladder_adamw")
    assert (info.has_eps, info.has_momentum, info.has_betas, info.second_order) == (True, False, True, False)
    assert info.description == "AdamW: Adam with decoupled weight decay."
    assert timm.optim.get_optimizer_info("stepladder_muon").has_momentum
    assert not timm.optim.get_optimizer_info("stepladder_lion").has_eps
    assert type(timm.optim.create_optimizer_v2(vit(timm), opt="muon")) is timm.optim.Muon


def test_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim._optim_factory", None)
    with pytest.raises(ImportError, match=r"register_with_timm\(\) needs timm .*stepladder\[frameworks\]"):
        sl.register_with_timm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_timm_constructs_and_steps(timm, name):
    model, twin = vit(timm), vit(timm)
    options = {"lr": 0.01, "weight_decay": 0.05}
    optimizer = timm.optim.create_optimizer_v2(model, opt=f"stepladder_{name.lower()}", **options)
    assert type(optimizer) is getattr(sl, name)
    before = copy.deepcopy(model)
    loss_of(model, *images()).backward()
    for _ in range(2 if name == "SOAP" else 1):  # its first step makes the bases, and no more
        optimizer.step()
    for key, value in before.named_parameters():
        assert not torch.equal(value, model.get_parameter(key)), key
    if hasattr(torch.optim, name) and name not in MATRIX:
        theirs = timm.optim.create_optimizer_v2(twin, opt=name.lower(), **options)
        assert type(theirs) is getattr(torch.optim, name)
        loss_of(twin, *images()).backward()
        theirs.step()
        # One step in another order of operations: four roundings, each half of 2⁻²² at a weight below 4 or less.
        largest = max(float(value.abs().max()) for value in twin.state_dict().values())
        assert largest < 4.0
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0.0, atol=4 * 2.0**-23)
        for ours, other in zip(optimizer.param_groups, theirs.param_groups, strict=True):
            keys = set(ours) & set(other) - {"params", "fused", "foreach"}
            assert {key: ours[key] for key in keys} == {key: other[key] for key in keys}


@pytest.mark.parametrize("name", MATRIX)
def test_timm_routes_as_param_groups_does(timm, name):
    model = vit(timm)
    options = {"lr": 0.02, "weight_decay": 0.05, "adamw": {"lr": 3e-3}}
    optimizer = timm.optim.create_optimizer_v2(model, opt=f"stepladder_{name.lower()}", **options)
    algorithms = by_name(model, optimizer, "algorithm")
    routes = sl.param_groups(model, algorithm=name.lower()).routes
    assert algorithms == {route.name: route.algorithm for route in routes}
    assert set(algorithms.values()) == {name.lower(), "adamw"}
    assert algorithms["head.weight"] == algorithms["patch_embed.proj.weight"] == "adamw"
    for key, decay in by_name(model, optimizer, "weight_decay").items():
        spared = model.get_parameter(key).ndim < 2 or key in model.no_weight_decay()
        if name == "MuonH" and algorithms[key] == "muonh":
            assert decay is None
        else:
            assert decay == (0.0 if spared else 0.05), key
    rates = by_name(model, optimizer, "lr")
    assert rates == {key: 3e-3 if algorithm == "adamw" else 0.02 for key, algorithm in algorithms.items()}


def test_timm_layer_decay_and_scheduler(timm):
    model, twin = vit(timm), vit(timm)
    scales = {"layer_decay": 0.5, "weight_decay": 0.05}
    optimizer = timm.optim.create_optimizer_v2(model, opt="stepladder_muon", lr=0.02, adamw={"lr": 3e-3}, **scales)
    theirs = by_name(twin, timm.optim.create_optimizer_v2(twin, opt="adamw", lr=3e-3, **scales), "lr_scale")
    assert by_name(model, optimizer, "lr_scale") == theirs
    assert len(set(theirs.values())) == 4
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=0)
    base = {key: 3e-3 if name == "adamw" else 0.02 for key, name in by_name(model, optimizer, "algorithm").items()}
    assert by_name(model, optimizer, "lr") == {key: base[key] * scale for key, scale in theirs.items()}
    scheduler.step(2)
    # Half of the cosine, down to timm's least rate of 0.
    expected = {key: 0.5 * base[key] * scale for key, scale in theirs.items()}
    assert by_name(model, optimizer, "lr") == pytest.approx(expected, rel=1e-12)


def test_timm_trains_as_a_bare_loop(timm):
    model, twin = vit(timm), vit(timm)
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="stepladder_muon", lr=0.02, weight_decay=0.05, momentum=0.95, adamw={"lr": 3e-3}
    )
    scheduler, epochs = timm.scheduler.create_scheduler_v2(optimizer, sched="step", num_epochs=6, decay_epochs=2)
    spared = {name: {"weight_decay": 0.0} for name in ("cls_token", "pos_embed")}
    groups = sl.param_groups(twin, decay_vectors=False, rules=spared, adamw={"lr": 3e-3, "weight_decay": 0.05})
    bare = sl.Muon(groups, lr=0.02, weight_decay=0.05)
    rates = [group["lr"] for group in bare.param_groups]
    for epoch in range(epochs):
        for group, rate in zip(bare.param_groups, rates, strict=True):
            group["lr"] = rate * 0.1 ** (epoch // 2)
        for net, own in ((model, optimizer), (twin, bare)):
            own.zero_grad()
            loss_of(net, *images()).backward()
            own.step()
        scheduler.step(epoch + 1)
    assert epochs == 6
    same(model, twin)


def test_timm_fallback_list_and_lookahead(timm):
    model = vit(timm)
    wrapped = timm.optim.create_optimizer_v2(
        model,
        opt="lookahead_stepladder_muon",
        lr=0.02,
        fallback_list=["*.qkv.*", "head.*"],
        fallback="lion",
        lion={"lr": 1e-4},
    )
    assert type(wrapped) is timm.optim.Lookahead
    algorithms = by_name(model, wrapped, "algorithm")
    assert {name for name, algorithm in algorithms.items() if algorithm == "muon"} == {
        f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert {rate for name, rate in by_name(model, wrapped, "lr").items() if algorithms[name] == "lion"} == {1e-4}


def test_timm_takes_groups_as_they_are(timm):
    model = vit(timm)
    expected = {route.name: route.algorithm for route in sl.param_groups(model).routes}
    for given in ((model, {"param_group_fn": sl.param_groups}), (sl.param_groups(model), {})):
        optimizer = timm.optim.create_optimizer_v2(given[0], opt="stepladder_muon", lr=0.02, **given[1])
        assert by_name(model, optimizer, "algorithm") == expected
    matrices = [model.get_parameter(name) for name, algorithm in expected.items() if algorithm == "muon"]
    for opt in ("stepladder_muon", "stepladder_muonh"):
        optimizer = timm.optim.create_optimizer_v2(matrices, opt=opt, lr=0.02)
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(matrices)]
    named = timm.optim.create_optimizer_v2(
        model, opt="stepladder_muon", weight_decay=0.1, param_group_fn=lambda module: module.named_parameters()
    )
    assert by_name(model, named, "algorithm") == expected
    assert set(by_name(model, named, "weight_decay").values()) == {0.1}


def test_timm_refuses(timm):
    model = vit(timm)
    with pytest.raises(ValueError, match=r"parameter of shape \(2, 2\) that is none of the model's trainable ones"):
        timm.optim.create_optimizer_v2(
            model, opt="stepladder_muon", param_group_fn=lambda _: [nn.Parameter(torch.zeros(2, 2))]
        )
    with pytest.raises(ValueError, match="dimension"):
        timm.optim.create_optimizer_v2(model.parameters(), opt="stepladder_muon")
    for opt in ("stepladder_nothing", "stepladder_", "stepladder_lookahead_muon"):
        with pytest.raises(ValueError, match="not found"):
            timm.optim.create_optimizer_v2(model, opt=opt)
    with pytest.raises(TypeError, match="adamw must be a mapping"):
        timm.optim.create_optimizer_v2(model, opt="stepladder_muon", adamw=3e-4)


# The Trainer of transformers


@pytest.fixture
def transformers() -> Any:
    return library("transformers")


def gpt2(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def tokens() -> list[dict[str, Tensor]]:
    rows = torch.randint(32, (40, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in rows]


def next_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def trainer(transformers: Any, folder: Any, *, save_steps: int = 0, **given: Any) -> Any:
    """Ten steps of four rows each, in order."""
    args = transformers.TrainingArguments(
        str(folder),
        max_steps=10,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rates: list[list[float]] = []

    class Rates(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    given.setdefault("model", None if "model_init" in given else gpt2(transformers))
    given |= {"train_dataset": tokens(), "callbacks": [Rates()], "compute_loss_func": next_token_loss}
    made = transformers.Trainer(args=args, **given)
    made.rates = rates
    return made


SPLIT = {"split": {"*.c_attn.weight": 3}, "adamw": {"lr": 3e-3, "weight_decay": 0.1}}


@pytest.mark.parametrize("way", ["factory", "optimizers", "model_init"])
def test_trainer_is_a_bare_loop(transformers, tmp_path, way):
    def given() -> dict[str, Any]:
        if way == "factory":
            return {"optimizer_cls_and_kwargs": sl.trainer_optimizer(sl.Muon, lr=0.02, **SPLIT)}
        if way == "model_init":
            own = sl.trainer_optimizer(sl.Muon, lr=0.02, **SPLIT)
            return {"optimizer_cls_and_kwargs": own, "model_init": lambda: gpt2(transformers)}
        model = gpt2(transformers)
        return {"model": model, "optimizers": (sl.Muon(groups(model), lr=0.02), None)}

    def groups(model: nn.Module) -> sl.ParamGroups:
        return sl.param_groups(model, decay_vectors=False, **SPLIT)

    made = trainer(transformers, tmp_path, **given())
    made.train()

    twin = gpt2(transformers)
    bare = sl.Muon(groups(twin), lr=0.02)
    scheduler = transformers.get_linear_schedule_with_warmup(bare, 2, 10)
    losses, rates = [], []
    rows = tokens()
    for start in range(0, 40, 4):
        x = torch.stack([row["input_ids"] for row in rows[start : start + 4]])
        loss = next_token_loss(twin(input_ids=x), x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        bare.step()
        scheduler.step()
        bare.zero_grad()
        losses.append(loss.item())
        rates.append([group["lr"] for group in bare.param_groups])
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert logged == losses
    same(made.model, twin)
    assert made.rates == rates
    assert len(rates[0]) == 4
    assert rates[0] == [0.01, 0.01, 0.0015, 0.0015]


def test_trainer_resumes(transformers, tmp_path):
    """Its checkpoints are read with weights_only=True."""
    own = sl.trainer_optimizer(sl.Muon, lr=0.02, **SPLIT)
    made, again = (trainer(transformers, tmp_path, save_steps=5, optimizer_cls_and_kwargs=own) for _ in range(2))
    made.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    same(again.model, made.model)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (made, again)]
    assert losses[0] == losses[1]
    assert again.rates == made.rates[5:]


def test_trainer_takes_an_elementwise_class(transformers, tmp_path):
    made_groups = []
    for cls in (sl.AdamW, torch.optim.AdamW):
        made = trainer(transformers, tmp_path / cls.__module__, optimizer_cls_and_kwargs=(cls, {"lr": 3e-3}))
        made.train()
        assert type(made.optimizer.optimizer) is cls
        assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.1, 0.0]
        made_groups.append(made.optimizer.param_groups)
    # What the rule makes of them is not the Trainer's.
    for ours, theirs in zip(*made_groups, strict=True):
        assert [p.shape for p in ours["params"]] == [p.shape for p in theirs["params"]]
        for key in ("lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            assert ours[key] == theirs[key], key


@pytest.mark.parametrize("given", [sl.AdamW, "muon", torch.optim.Muon, None])
def test_trainer_optimizer_refuses(given):
    with pytest.raises(TypeError, match=r"stepladder\.Muon, .*got .*needs no factory"):
        sl.trainer_optimizer(given, lr=0.02)


# Accelerate


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    accelerate = library("accelerate")
    state = sys.modules["accelerate.state"]
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    for shared in (state.AcceleratorState, state.GradientState):
        shared._reset_state()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_accelerate_is_a_bare_loop_and_resumes(accelerator, tmp_path, accumulated):
    own = accelerator(gradient_accumulation_steps=accumulated)

    def prepared() -> tuple[Any, Any, Any]:
        model = mlp()
        optimizer = muon(model)
        ready: tuple[Any, Any, Any] = own.prepare(model, optimizer, falling(optimizer))
        return ready

    def train(model: Any, optimizer: Any, scheduler: Any, data: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in data:
            with own.accumulate(model):
                own.backward(loss_of(model, x, y))
                if own.sync_gradients:
                    own.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                assert not optimizer.step_was_skipped

    data = batches()
    model, optimizer, scheduler = prepared()
    train(model, optimizer, scheduler, data[:4])
    own.save_state(str(tmp_path))
    train(model, optimizer, scheduler, data[4:])

    twin = mlp()
    bare = muon(twin)
    rates = falling(bare)
    for index, (x, y) in enumerate(data):
        (loss_of(twin, x, y) / accumulated).backward()
        if index % accumulated == accumulated - 1:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            bare.step()
            bare.zero_grad()
            rates.step()
    same(model, twin)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in bare.param_groups]

    own._models.clear(), own._optimizers.clear(), own._schedulers.clear()
    again = prepared()
    own.load_state(str(tmp_path))
    train(*again, data[4:])
    same(again[0], model)


@pytest.mark.parametrize("fused", [None, False])
def test_accelerate_sees_skipped_steps_that_the_scaler_skips(accelerator, fused):
    accelerator()
    model = mlp()
    scaler = torch.amp.GradScaler("cpu")
    own = library("accelerate.optimizer").AcceleratedOptimizer(muon(model, fused=fused), scaler=scaler)
    before = copy.deepcopy(model)
    (x, y), *_ = batches()
    (scaler.scale(loss_of(model, x, y)) * float("inf")).backward()
    own.step()
    same(model, before)
    assert own.step_was_skipped == (fused is False)


# Lightning


@pytest.fixture
def lightning() -> Any:
    return library("lightning")


def module(lightning: Any, **options: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = batch
            return loss_of(self.net, x.to(self.dtype), y)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = muon(self.net, **options)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling(optimizer), "interval": "step"}}

    return Module()


def fit(lightning: Any, model: Any, epochs: int = 1, resume: Any = None, **options: Any) -> Any:
    """Eight batches an epoch."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False} | quiet | options
    made = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **options)
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with warnings.catch_warnings():
        # Of workers for the loader, and of torch's own names that it still uses.
        warnings.simplefilter("ignore")
        made.fit(model, DataLoader(TensorDataset(x, y), batch_size=4), ckpt_path=resume)
    return made


@pytest.mark.parametrize(
    ("precision", "options", "own"),
    [
        ("32-true", {"gradient_clip_val": 0.5}, {}),
        ("32-true", {"accumulate_grad_batches": 2}, {"max_norm": 0.5}),
        ("bf16-true", {}, {}),
        ("bf16-mixed", {}, {"max_norm": 0.5}),
        ("bf16-mixed", {"gradient_clip_val": 0.5}, {"fused": False}),
    ],
)
def test_lightning_is_a_bare_loop(lightning, precision, options, own):
    model = module(lightning, **own)
    accumulated = options.get("accumulate_grad_batches", 1)
    made = fit(lightning, model, precision=precision, **options)

    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    twin = mlp().to(dtype)
    bare = muon(twin, **own)
    rates = falling(bare)
    for index, (x, y) in enumerate(batches()):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
            loss = loss_of(twin, x.to(dtype), y)
        (loss / accumulated).backward()
        if index % accumulated == accumulated - 1:
            if clip := options.get("gradient_clip_val"):
                # A norm over the parameters in the order of the groups.
                torch.nn.utils.clip_grad_norm_([p for group in bare.param_groups for p in group["params"]], clip)
            bare.step()
            bare.zero_grad()
            rates.step()
    same(model.net, twin)
    (optimizer,) = made.optimizers
    assert type(optimizer) is sl.Muon
    assert [group["algorithm"] for group in optimizer.param_groups] == ["muon", "adamw", "adamw"]
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in bare.param_groups]
    assert optimizer.grad_norm == bare.grad_norm


def test_lightning_resumes(lightning, tmp_path):
    whole = module(lightning)
    fit(lightning, whole, 2)
    half = module(lightning)
    fit(lightning, half).save_checkpoint(tmp_path / "half.ckpt")
    again = module(lightning)
    fit(lightning, again, 2, resume=tmp_path / "half.ckpt")
    same(again.net, whole.net)


def test_lightning_clips_in_mixed_precision_only_what_leaves_the_scale_to_it(lightning):
    """As it refuses torch's fused optimizers; docs/frameworks.md says so."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(lightning, module(lightning), precision="bf16-mixed", gradient_clip_val=0.5)
