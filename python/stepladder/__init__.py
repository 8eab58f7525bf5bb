"""stepladder: hand-written optimizer kernels, a faster drop-in for torch.optim.

>>> import stepladder as sl
>>> optimizer = sl.AdamW(model.parameters(), lr=3e-4)
"""

from importlib.metadata import version as _version

# torch first: its OpenMP runtime then serves the kernels too.
import torch as _torch  # noqa: F401

from stepladder import ops, reference
from stepladder.accelerate import accelerate
from stepladder.frameworks import register_with_timm, trainer_optimizer
from stepladder.optim import (
    LAMB,
    LARS,
    SGD,
    SOAP,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    Muon,
    MuonH,
    RMSprop,
    Shampoo,
    SignSGD,
)
from stepladder.qk_clip import qk_clip_
from stepladder.routing import ParamGroups, param_groups

__version__ = _version("stepladder")

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "SOAP",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Muon",
    "MuonH",
    "ParamGroups",
    "RMSprop",
    "Shampoo",
    "SignSGD",
    "accelerate",
    "ops",
    "param_groups",
    "qk_clip_",
    "reference",
    "register_with_timm",
    "trainer_optimizer",
]
