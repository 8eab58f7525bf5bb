"""Which parameter gets which algorithm: models as they are written in practice, attributes, globs, refusals."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stepladder as sl

WIDTH, HEADS, VOCABULARY = 12, 2, 20


class Conv1D(nn.Module):
    """As in GPT-2's published code: a linear layer whose weight is (in, out)."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(0.02 * torch.randn(width, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def linear(out: int, width: int) -> nn.Module:
    return nn.Linear(width, out)


class Attention(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.c_attn, self.c_proj = layer(3 * WIDTH, WIDTH), layer(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(layer), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": layer(4 * WIDTH, WIDTH), "c_proj": layer(WIDTH, 4 * WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT2(nn.Module):
    """`head` is "tied", "untied", or "functional": the embedding's weight without a module of its own."""

    def __init__(self, head: str = "tied", layer: Any = linear, layers: int = 2) -> None:
        super().__init__()
        parts = {"wte": nn.Embedding(VOCABULARY, WIDTH), "wpe": nn.Embedding(8, WIDTH)}
        self.transformer = nn.ModuleDict(parts)
        self.transformer["h"] = nn.ModuleList(Block(layer) for _ in range(layers))
        self.transformer["ln_f"] = nn.LayerNorm(WIDTH)
        if head != "functional":
            self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if head == "tied":
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[: tokens.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class ViT(nn.Module):
    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class BasicBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), BasicBlock(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))).mean((2, 3)))


def routes(groups: sl.ParamGroups) -> dict[str, tuple[str | None, str]]:
    return {route.name: (route.algorithm, route.reason) for route in groups.routes}


def names(groups: sl.ParamGroups, algorithm: str) -> set[str]:
    return {name for group in groups if group["algorithm"] == algorithm for name in group["param_names"]}


def weights(prefixes: list[str]) -> set[str]:
    return {f"{prefix}.weight" for prefix in prefixes}


def of_layers(*inner: str, layers: int = 2) -> list[str]:
    return [f"transformer.h.{i}.{name}" for i in range(layers) for name in inner]


HIDDEN = of_layers("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture(params=["gpt2", "gpt2 of Conv1D", "untied", "functional", "vit", "resnet", "transformer", "rnn"])
def model(request):
    return {
        "gpt2": GPT2,
        "gpt2 of Conv1D": lambda: GPT2(layer=Conv1D),
        "untied": lambda: GPT2("untied"),
        "functional": lambda: GPT2("functional"),
        "vit": ViT,
        "resnet": ResNet,
        "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        "rnn": lambda: nn.Sequential(nn.Embedding(9, 8), nn.LSTM(8, 6, 2), nn.Linear(6, 9)),
    }[request.param]()


def test_every_parameter_is_in_one_group(model):
    groups = sl.param_groups(model)
    parameters = dict(model.named_parameters())
    assert [route.name for route in groups.routes] == list(parameters)
    listed = [(name, p) for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)]
    assert {name: id(p) for name, p in listed} == {name: id(p) for name, p in parameters.items()}
    assert len(listed) == len(parameters)
    for group in groups:
        for name in group["param_names"]:
            assert routes(groups)[name][0] == group["algorithm"]
    algorithms = [group["algorithm"] for group in groups]
    assert algorithms == sorted(algorithms, key=lambda algorithm: algorithm != "muon")


@pytest.mark.parametrize("layer", [linear, Conv1D])
def test_gpt2_with_a_tied_head(layer):
    groups = sl.param_groups(GPT2("tied", layer))
    assert names(groups, "muon") == weights(HIDDEN)
    reasons = routes(groups)
    assert reasons["transformer.wte.weight"] == ("adamw", "Embedding, tied to lm_head.weight")
    assert reasons["transformer.wpe.weight"] == ("adamw", "Embedding")
    assert reasons["transformer.h.0.ln_1.weight"] == ("adamw", "LayerNorm")
    assert reasons["transformer.h.0.attn.c_attn.bias"] == ("adamw", "vector")
    assert reasons["transformer.h.1.mlp.c_proj.weight"][0] == "muon"
    assert "lm_head.weight" not in reasons


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("head", ["untied", "functional"])
def test_the_last_hidden_matrix_is_no_head(head, layers):
    """Without a module for the head, the last linear layer is the last block's."""
    groups = sl.param_groups(GPT2(head, layers=layers))
    hidden = of_layers("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", layers=layers)
    assert names(groups, "muon") == weights(hidden)
    if head == "untied":
        assert routes(groups)["lm_head.weight"] == ("adamw", "output head, by the name 'lm_head'")


def test_a_head_in_the_memory_of_the_embedding():
    """Tied by the data: two Parameter objects, which named_parameters() lists both."""
    model = GPT2("untied")
    model.lm_head.weight.data = model.transformer["wte"].weight.data
    reasons = routes(sl.param_groups(model, embeddings="lion"))
    assert reasons["lm_head.weight"] == ("lion", "Embedding, in the same memory as transformer.wte.weight")
    assert reasons["transformer.wte.weight"] == ("lion", "Embedding, in the same memory as lm_head.weight")


def test_views_of_one_buffer_are_not_tied():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    buffer = torch.randn(3, 4, 4)
    for layer, view in zip(model, buffer, strict=True):
        layer.weight.data = view
    assert [route.algorithm for route in sl.param_groups(model).routes] == ["adamw", "muon", "adamw"]


def test_vit():
    groups = sl.param_groups(ViT())
    blocks = [f"blocks.layers.{i}." for i in range(2)]
    inner = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert names(groups, "muon") == {block + name for block in blocks for name in inner}
    (fused,) = [group for group in groups if "split_sizes" in group]
    assert fused["split_sizes"] == (WIDTH, WIDTH, WIDTH)
    assert fused["param_names"] == [block + inner[0] for block in blocks]
    reasons = routes(groups)
    assert reasons["patch_embed.weight"] == ("adamw", "first convolution, of 3 input channels")
    assert reasons["cls_token"] == ("adamw", "vector")
    assert reasons["pos_embed"] == ("adamw", "embedding, by the name 'pos_embed'")
    assert reasons["head.weight"] == ("adamw", "output head, by the name 'head'")
    words = f"fused matrices of MultiheadAttention, split into 3 × {WIDTH} rows"
    assert reasons["blocks.layers.0.self_attn.in_proj_weight"] == ("muon", words)


def test_resnet():
    groups = sl.param_groups(ResNet())
    convolutions = ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]
    assert names(groups, "muon") == weights([*convolutions, "layer2.0", "layer2.1.conv1", "layer2.1.conv2"])
    reasons = routes(groups)
    assert reasons["conv1.weight"] == ("adamw", "first convolution, of 3 input channels")
    assert reasons["bn1.weight"] == ("adamw", "BatchNorm2d")
    assert reasons["fc.weight"] == ("adamw", "output head, the model's last linear layer")
    assert reasons["layer2.1.conv1.weight"] == ("muon", "convolution, 16 × 144")


def test_transformer_layers_have_no_head():
    groups = sl.param_groups(nn.TransformerDecoderLayer(8, 2, 16))
    matrices = ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    matrices += ["multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert names(groups, "muon") == set(matrices)


def test_attention_of_other_widths():
    """Keys and values of another width have parameters of their own; bias_k and bias_v are vectors."""
    groups = sl.param_groups(nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True))
    assert names(groups, "muon") == {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}
    assert all("split_sizes" not in group for group in groups)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_gates_of_recurrent_layers(kind, gates):
    groups = sl.param_groups(kind(5, 6))
    (group,) = [group for group in groups if group["algorithm"] == "muon"]
    assert group["split_sizes"] == (6,) * gates
    assert len(group["params"]) == 2


def test_convolutions():
    model = nn.Sequential(
        nn.Conv1d(8, 6, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ConvTranspose2d(12, 6, 3, groups=2),
        nn.Conv2d(6, 4, 1),
    )
    groups = sl.param_groups(model)
    reasons = routes(groups)
    assert reasons["0.weight"] == ("muon", "convolution, 6 × 24")
    assert reasons["1.weight"] == ("adamw", "depthwise convolution, a filter for each channel")
    assert reasons["2.weight"] == ("muon", "convolution, 12 × 36, split into 2 groups")
    assert reasons["3.weight"] == ("muon", "convolution, 12 × 27, split into 2 groups")
    assert reasons["4.weight"] == ("adamw", "output head, the model's last convolution, to 4 channels")
    first, second = (group for group in groups if group["algorithm"] == "muon")
    assert first.keys() - second.keys() == {"flatten"}
    assert second["num_heads"] == 2


def test_heads_by_name():
    """The last layer of each head, be it a sequence or one of several."""
    model = nn.ModuleDict(
        {
            "heads": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
            "classifier": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
            "trunk": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        }
    )
    groups = sl.param_groups(model)
    assert names(groups, "muon") == {"classifier.0.weight", "trunk.0.weight"}
    assert routes(groups)["heads.0.weight"] == ("adamw", "output head, by the name 'heads.0'")
    assert routes(groups)["classifier.2.weight"] == ("adamw", "output head, by the name 'classifier'")


@pytest.mark.parametrize("widths", [(16, 64, 64, 8), (8, 8, 8, 8)])
def test_perceptron(widths):
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
    groups = sl.param_groups(nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]))
    assert names(groups, "muon") == {"0.weight", "2.weight"}
    assert names(groups, "adamw") == {"4.weight"}
    assert names(sl.param_groups(nn.Sequential(*layers), head="muon"), "muon") == {"0.weight", "1.weight", "2.weight"}


class Own(nn.Module):
    """Parameters of its own."""

    def __init__(self, **shapes: Any) -> None:
        super().__init__()
        for name, shape in shapes.items():
            dtype = torch.complex64 if name == "spectrum" else torch.float32
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype)))


def test_parameters_of_their_own():
    model = Own(
        experts=(4, 6, 5), kernel=(4, 3, 2, 2), scalar=(), gain=(1, 6, 1), column=(6, 1), query=(1, 3, 5),
        relative_position_bias_table=(9, 2), mask_token=(2, 5), spectrum=(4, 4), empty=(0, 4), text_projection=(4, 5),
    )  # fmt: skip
    assert routes(sl.param_groups(model)) == {
        "experts": ("muon", "stack of 4 matrices"),
        "kernel": ("muon", "matrix, 4 × 12"),
        "scalar": ("adamw", "scalar"),
        "gain": ("adamw", "vector"),
        "column": ("adamw", "vector"),
        "query": ("adamw", "leading dimension of 1: broadcast over a batch"),
        "relative_position_bias_table": ("adamw", "embedding, by the name 'relative_position_bias_table'"),
        "mask_token": ("adamw", "embedding, by the name 'mask_token'"),
        "spectrum": ("adamw", "complex"),
        "empty": ("adamw", "vector"),
        "text_projection": ("muon", "matrix"),
    }


def test_other_peoples_embeddings_and_norms():
    """By the ends of their types' names."""

    class VocabularyEmbedding(Own):
        pass

    class RMSNorm2d(Own):
        pass

    class NormalizedLinear(Own):
        pass

    model = nn.Sequential(VocabularyEmbedding(weight=(9, 4)), RMSNorm2d(weight=(4, 1, 1)), NormalizedLinear(w=(4, 4)))
    assert [route.algorithm for route in sl.param_groups(model).routes] == ["adamw", "adamw", "muon"]
    assert sl.param_groups(nn.LayerNorm([3, 4, 5])).routes[0].reason == "LayerNorm"


def test_parametrized_modules():
    """Weight norm keeps a column of norms and a matrix, both of a module inside of the layer."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    for layer in model:
        nn.utils.parametrizations.weight_norm(layer)
    reasons = routes(sl.param_groups(model))
    assert reasons["0.parametrizations.weight.original1"] == ("adamw", "ParametrizedEmbedding")
    assert reasons["1.parametrizations.weight.original0"] == ("adamw", "vector")
    assert reasons["1.parametrizations.weight.original1"] == ("muon", "matrix")
    assert reasons["2.parametrizations.weight.original1"][1] == "output head, the model's last linear layer"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_wrappers_are_looked_through():
    model = GPT2()
    expected = routes(sl.param_groups(model))
    assert routes(sl.param_groups(nn.DataParallel(model), rules={"lm_head": "adamw"})) != expected
    assert routes(sl.param_groups(nn.DataParallel(model))) == expected
    model.transformer["h"][0].attn = torch.compile(model.transformer["h"][0].attn)
    assert routes(sl.param_groups(torch.compile(model))) == expected


def test_frozen_parameters_are_shown_and_left_out():
    model = GPT2("untied")
    model.transformer["wte"].requires_grad_(False)
    groups = sl.param_groups(model)
    assert routes(groups)["transformer.wte.weight"] == (None, "frozen: requires_grad is False")
    assert not any("transformer.wte.weight" in group["param_names"] for group in groups)
    assert "frozen" in str(groups)


def test_attributes():
    """Of a parameter, then of the nearest module, then globs; vectors are passed by where a module asks."""
    model = GPT2()
    first, second = model.transformer["h"]
    first.attn.c_proj.weight.stepladder_algorithm = "sgd"
    first.attn.stepladder_algorithm = "lion"
    first.stepladder_algorithm = "muon"
    second.mlp["c_fc"].stepladder_algorithm = "adamw"
    reasons = routes(sl.param_groups(model, rules={"transformer.h.*": "sgd"}))
    assert reasons["transformer.h.0.attn.c_proj.weight"] == (
        "sgd",
        "stepladder_algorithm of transformer.h.0.attn.c_proj.weight",
    )
    assert reasons["transformer.h.0.attn.c_attn.bias"] == ("lion", "stepladder_algorithm of transformer.h.0.attn")
    assert reasons["transformer.h.0.mlp.c_fc.weight"] == ("muon", "stepladder_algorithm of transformer.h.0")
    assert reasons["transformer.h.0.mlp.c_fc.bias"] == ("sgd", "rules['transformer.h.*']")
    assert reasons["transformer.h.1.mlp.c_fc.weight"][0] == "adamw"
    assert reasons["transformer.h.1.mlp.c_proj.weight"] == ("sgd", "rules['transformer.h.*']")
    assert reasons["transformer.wpe.weight"] == ("adamw", "Embedding")


def test_an_attribute_of_a_class():
    class Router(nn.Linear):
        stepladder_algorithm = "adamw"

    groups = sl.param_groups(nn.ModuleDict({"router": Router(4, 4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}))
    assert routes(groups)["router.weight"] == ("adamw", "stepladder_algorithm of router")


def test_rules():
    """The first that matches a parameter's name, or a module around it."""
    rules = {"*.1.attn": "lion", "*.c_attn.weight": "sgd", "transformer.wte": "muon", "*.h.0": "muon", "*ln*": "sgd"}
    reasons = routes(sl.param_groups(GPT2(), rules=rules))
    assert reasons["transformer.h.1.attn.c_attn.weight"] == ("lion", "rules['*.1.attn']")
    assert reasons["transformer.h.1.attn.c_attn.bias"] == ("lion", "rules['*.1.attn']")
    assert reasons["transformer.h.0.attn.c_attn.weight"] == ("sgd", "rules['*.c_attn.weight']")
    assert reasons["transformer.wte.weight"] == ("muon", "rules['transformer.wte'], tied to lm_head.weight")
    # Vectors are passed by where a rule asks for Muon.
    assert reasons["transformer.h.0.ln_1.weight"] == ("sgd", "rules['*ln*']")


def test_a_rule_finds_a_tied_parameter_by_any_name():
    assert routes(sl.param_groups(GPT2(), rules={"lm_head": "lion"}))["transformer.wte.weight"][0] == "lion"


def test_rules_with_options():
    rules = {"*.wte": {"lr": 0.3}, "*.c_attn": {"num_heads": 3}, "*.wpe.*": {"algorithm": "sgd", "lr": 0.1}}
    groups = sl.param_groups(GPT2(), rules=rules, muon={"lr": 0.02}, adamw={"lr": 1e-3, "betas": (0.9, 0.95)})
    by_name = {name: group for group in groups for name in group["param_names"]}

    def options(name: str) -> dict[str, Any]:
        return {key: value for key, value in by_name[name].items() if key not in ("params", "param_names")}

    assert options("transformer.wte.weight") == {"algorithm": "adamw", "lr": 0.3, "betas": (0.9, 0.95)}
    assert options("transformer.h.0.ln_1.weight") == {"algorithm": "adamw", "lr": 1e-3, "betas": (0.9, 0.95)}
    assert options("transformer.wpe.weight") == {"algorithm": "sgd", "lr": 0.1}
    assert options("transformer.h.1.attn.c_attn.weight") == {"algorithm": "muon", "lr": 0.02, "num_heads": 3}
    # Options of matrices alone pass vectors by.
    assert options("transformer.h.1.attn.c_attn.bias") == {"algorithm": "adamw", "lr": 1e-3, "betas": (0.9, 0.95)}
    assert options("transformer.h.1.mlp.c_fc.weight") == {"algorithm": "muon", "lr": 0.02}
    assert routes(groups)["transformer.wte.weight"][1] == "Embedding, tied to lm_head.weight; rules['*.wte']"


def test_embeddings_and_head():
    groups = sl.param_groups(GPT2("untied"), embeddings={"lr": 0.3}, head={"algorithm": "lion", "lr": 1e-4})
    assert names(groups, "lion") == {"lm_head.weight"}
    (group,) = [group for group in groups if group.get("lr") == 0.3]
    assert group["algorithm"] == "adamw"
    assert group["param_names"] == ["transformer.wte.weight", "transformer.wpe.weight"]


def test_split():
    sizes = (16, 10, 10)
    groups = sl.param_groups(GPT2("untied"), split={"*.0.attn.c_attn": 3, "*.c_attn": sizes, "lm_head": 2}, head="muon")
    splits = {name: group.get("split_sizes") for group in groups for name in group["param_names"]}
    assert splits["transformer.h.0.attn.c_attn.weight"] == (WIDTH,) * 3
    assert splits["transformer.h.1.attn.c_attn.weight"] == sizes
    assert splits["lm_head.weight"] == (VOCABULARY // 2,) * 2
    assert splits["transformer.h.0.mlp.c_fc.weight"] is splits["transformer.h.0.attn.c_attn.bias"] is None
    assert routes(groups)["transformer.h.1.attn.c_attn.weight"][1] == "matrix, split into 16 + 10 + 10 rows"


def test_vectors_without_decay():
    groups = sl.param_groups(GPT2(), decay_vectors=False, adamw={"weight_decay": 0.1}, muon={"weight_decay": 0.2})
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            matrix = group["algorithm"] == "muon"
            assert group["weight_decay"] == (0.2 if matrix else 0.0 if p.ndim == 1 else 0.1), name
    groups = sl.param_groups(GPT2(), decay_vectors=False, rules={"*.bias": {"weight_decay": 0.3}})
    (group,) = [group for group in groups if "transformer.h.0.mlp.c_fc.bias" in group["param_names"]]
    assert group["weight_decay"] == 0.3


def test_other_algorithms():
    """Elementwise algorithms need no words on the layout."""
    groups = sl.param_groups(ViT(), algorithm="lion", fallback="sgd")
    assert {group["algorithm"] for group in groups} == {"lion", "sgd"}
    assert len(groups) == 2
    assert all(group.keys() == {"params", "param_names", "algorithm"} for group in groups)


def test_the_table(capsys):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 9))
    groups = sl.param_groups(model, rules={"[1]*": "muon"}, print_table=True)
    printed = capsys.readouterr().out
    lines = [line.split() for line in str(groups).splitlines()]
    assert lines[0] == ["parameter", "shape", "algorithm", "reason"]
    assert lines[2] == ["0.weight", "9", "×", "4", "adamw", "Embedding"]
    assert lines[3] == ["1.weight", "4", "×", "4", "muon", "rules['[1]*']"]
    assert lines[5][:3] == ["2.bias", "9", "adamw"]
    assert "muon: 1 parameters, 16 elements; adamw: 3 parameters, 81 elements" in str(groups)
    assert "output head" in printed
    assert "1.weight" in printed
    assert "\x1b" not in str(groups)
    assert repr(groups) == "ParamGroups(muon: 1 parameters, 16 elements; adamw: 3 parameters, 81 elements)"


def test_copies_keep_the_reasons():
    groups = sl.param_groups(nn.Linear(4, 4))
    for copied in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert isinstance(copied, sl.ParamGroups)
        assert copied.routes == groups.routes
        assert [group["param_names"] for group in copied] == [group["param_names"] for group in groups]


def test_plain_optimizers_take_the_groups():
    """The names, too, stay with the groups."""
    model = GPT2()
    optimizer = sl.AdamW(sl.param_groups(model, algorithm="adamw", decay_vectors=False), lr=1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "transformer.wte.weight"


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, GPT2):
        tokens = torch.randint(VOCABULARY, (4, 9), generator=generator)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(7, (8,), generator=generator)
    return F.cross_entropy(model(images), labels)


@pytest.mark.parametrize("make", [GPT2, lambda: GPT2("untied", Conv1D), ViT, ResNet])
def test_one_line_makes_an_optimizer(make):
    """Each parameter is stepped by its algorithm, at its rate, and the loss falls."""
    torch.manual_seed(0)
    model = make()
    optimizer = sl.Muon(sl.param_groups(model, adamw={"lr": 3e-3}), lr=0.02)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    states = {"muon": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
    for group in optimizer.param_groups:
        assert group["lr"] == {"muon": 0.02, "adamw": 3e-3}[group["algorithm"]]
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert not torch.equal(p, before[name]), name
            assert optimizer.state[p].keys() == states[group["algorithm"]]


def test_one_line_makes_a_muonh():
    model = GPT2("untied")
    optimizer = sl.MuonH(sl.param_groups(model, algorithm="muonh"), lr=0.01)
    weight = model.transformer["h"][0].attn.c_attn.weight
    norm = torch.linalg.matrix_norm(weight.detach().double())
    loss_of(model).backward()
    optimizer.step()
    assert optimizer.state[weight].keys() == {"momentum_buffer", "radius"}
    assert torch.linalg.matrix_norm(weight.detach().double()) == pytest.approx(norm.item(), rel=1e-6)


def test_weights_stored_as_in_out():
    """The optimizer of a GPT-2 of Conv1D moves it as that of linear layers moves the transposed weights."""
    torch.manual_seed(0)
    models = GPT2(layer=Conv1D), GPT2()
    twin = dict(models[1].named_parameters())
    with torch.no_grad():
        for name, p in models[0].named_parameters():
            twin[name].copy_(p.T if name.removesuffix(".weight") in HIDDEN else p)
    groups = [sl.param_groups(model, split={"*.c_attn": 3}) for model in models]
    assert [g.get("fan_in_fan_out") for g in groups[0] if g["algorithm"] == "muon"] == [True, True]
    assert not any("fan_in_fan_out" in g for g in groups[1])
    reasons = [routes(g)["transformer.h.0.attn.c_attn.weight"][1] for g in groups]
    assert reasons[0] == "matrix, stored as (in, out), split into 3 × 12 columns"
    assert reasons[1] == "matrix, split into 3 × 12 rows"
    optimizers = [sl.Muon(g, lr=0.02, adjust_lr_fn="spectral", backend="reference") for g in groups]
    for model, optimizer in zip(models, optimizers, strict=True):
        model.double()
        loss_of(model).backward()
        optimizer.step()
    for name, p in models[0].named_parameters():
        if name.removesuffix(".weight") in HIDDEN:
            # The gradients are sums of up to a thousand terms in another order, and five steps lift a rounding by 485.
            torch.testing.assert_close(p.T, twin[name], rtol=0, atol=0.02 * 485 * 1000 * 2.0**-53)


def test_other_modules_of_that_name_are_stored_as_they_are():
    module = Conv1D(6, 4)
    model = nn.Sequential(module, nn.Linear(6, 6), nn.Linear(6, 2))
    assert sl.param_groups(model)[0].get("fan_in_fan_out") is True
    module.nf = 5
    assert not any("fan_in_fan_out" in group for group in sl.param_groups(model))


def test_fused_projections_are_stepped_apart():
    """The first update of an attention's projections is that of three matrices of their own, not of one."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2)
    optimizer = sl.Muon(sl.param_groups(attention), lr=1.0, weight_decay=0.0)
    before = attention.in_proj_weight.detach().clone()
    # Of very different sizes, which one iteration over all rows would keep.
    grad = torch.randn(3, 16, 16) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    attention.in_proj_weight.grad = grad.flatten(0, 1)
    optimizer.step()
    update = (before - attention.in_proj_weight.detach()).unflatten(0, (3, 16))
    expected = sl.ops.newton_schulz(grad, "jordan", 5)
    # Both round to bf16 in each of 5 steps, from inputs of other sizes.
    assert torch.linalg.matrix_norm(update - expected).max() <= 0.1 * torch.linalg.matrix_norm(expected).min()


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))


def marked(value: Any, name: str = "weight") -> nn.Module:
    model = nn.Linear(4, 4)
    getattr(model, name).stepladder_algorithm = value
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        ([1, 2], {}, TypeError, r"model must be a torch.nn.Module, got \[1, 2\]"),
        (nn.ReLU(), {}, ValueError, "model has nothing to train: of its 0 parameters"),
        (nn.Linear(2, 2).requires_grad_(False), {}, ValueError, "nothing to train: of its 2 parameters"),
        (lazy(), {}, ValueError, "model has parameter '1.weight' without a shape yet"),
        (None, {"algorithm": "adam"}, ValueError, "algorithm='adam' is unknown, expected one of 'muon'"),
        (None, {"algorithm": None}, TypeError, "algorithm must be one of 'muon'.*, got None"),
        (None, {"fallback": "muon"}, ValueError, "fallback='muon' takes matrices only, expected one of 'adamw'"),
        (None, {"embeddings": 3}, TypeError, "embeddings must be one of .*, got 3"),
        (None, {"head": {"algorithm": "x"}}, ValueError, r"head\['algorithm'\]='x' is unknown"),
        (None, {"head": {"params": []}}, ValueError, r"head=.*'params'"),
        (None, {"rules": {"*.ln_9": "sgd"}}, ValueError, r"rules\['\*.ln_9'\] decides for no parameter; the model has"),
        (None, {"rules": {"*": "sgd", "*.ln_f": "sgd"}}, ValueError, r"rules\['\*.ln_f'\] decides for no"),
        (None, {"rules": {"*.ln_f": "muon"}}, ValueError, r"rules\['\*.ln_f'\] decides for no"),
        (None, {"rules": {"*": "adam"}}, ValueError, r"rules\['\*'\]='adam' is unknown"),
        (None, {"rules": {3: "sgd"}}, TypeError, "rules must have globs as its keys, got 3"),
        (None, {"rules": ["*"]}, TypeError, r"rules must be a mapping whose keys are globs, got \['\*'\]"),
        (None, {"split": {"*.wte": 2}}, ValueError, r"split\['\*.wte'\] decides for no parameter with an algo"),
        (GPT2(layer=Conv1D), {"split": {"*.c_attn": 5}}, ValueError, r"does not divide the 36 columns of '.*c_attn"),
        (GPT2(layer=Conv1D), {"split": {"*.c_attn": (12,)}}, ValueError, r"adds up to 12, expected the 36 columns of"),
        (GPT2(layer=Conv1D), {"split": {"*.c_attn": "3"}}, TypeError, "equal parts or the columns of each part"),
        (None, {"split": {"*.c_attn": 5}}, ValueError, r"=5 does not divide the 36 rows of '.*c_attn.weight'"),
        (None, {"split": {"*.c_attn": (20, 20)}}, ValueError, r"=\(20, 20\) adds up to 40, expected the 36 rows"),
        (None, {"split": {"*.c_attn": (36, 0)}}, ValueError, r"=\(36, 0\) must be above 0"),
        (None, {"split": {"*.c_attn": "3"}}, TypeError, "must be a number of equal parts or .*, got '3'"),
        (None, {"split": {"*.c_attn": True}}, TypeError, "must have integers, got True"),
        (None, {"split": {"*.c_attn": (18.0, 18)}}, TypeError, "must have integers, got 18.0"),
        (None, {"adam": {"lr": 1}}, TypeError, "unexpected keyword argument 'adam'; algorithms are muon"),
        (None, {"adamw": 0.1}, TypeError, "adamw must be a mapping of options to values, got 0.1"),
        (None, {"lion": {"lr": 1}}, ValueError, "lion={'lr': 1} has no effect: .* are adamw, muon"),
        (None, {"muon": {"algorithm": "sgd"}}, ValueError, "muon={'algorithm': 'sgd'} sets 'algorithm', expected keys"),
        (None, {"adamw": {"momentum": 0.9}}, ValueError, "adamw={'momentum': 0.9} sets 'momentum', expected"),
        (marked("adam"), {}, ValueError, "stepladder_algorithm of weight='adam' is unknown"),
        (marked(1), {}, TypeError, "stepladder_algorithm of weight must be one of .*, got 1"),
        (marked("muon", "bias"), {}, ValueError, r"bias='muon' takes matrices only, got shape \(4,\)"),
    ],
)  # fmt: skip
def test_refusals(model, arguments, error, message):
    with pytest.raises(error, match=message):
        sl.param_groups(GPT2() if model is None else model, **arguments)
