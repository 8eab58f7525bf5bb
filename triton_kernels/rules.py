"""Every rule in Triton, by the names of csrc/rules/rules.def."""

from __future__ import annotations

from stepladder.triton_kernels.adagrad import ADAGRAD
from stepladder.triton_kernels.adam import ADAM, ADAM_AMSGRAD
from stepladder.triton_kernels.adamw import ADAMW, ADAMW_AMSGRAD
from stepladder.triton_kernels.lamb import LAMB
from stepladder.triton_kernels.lars import LARS
from stepladder.triton_kernels.lion import LION
from stepladder.triton_kernels.rmsprop import (
    RMSPROP,
    RMSPROP_CENTERED,
    RMSPROP_CENTERED_MOMENTUM,
    RMSPROP_MOMENTUM,
)
from stepladder.triton_kernels.rule import Rule
from stepladder.triton_kernels.sgd import MOMENTUM, SGD
from stepladder.triton_kernels.signsgd import SIGNSGD, SIGNUM

RULES: dict[str, Rule] = {
    "sgd": SGD,
    "momentum": MOMENTUM,
    "adagrad": ADAGRAD,
    "rmsprop": RMSPROP,
    "rmsprop_momentum": RMSPROP_MOMENTUM,
    "rmsprop_centered": RMSPROP_CENTERED,
    "rmsprop_centered_momentum": RMSPROP_CENTERED_MOMENTUM,
    "adam": ADAM,
    "adam_amsgrad": ADAM_AMSGRAD,
    "adamw": ADAMW,
    "adamw_amsgrad": ADAMW_AMSGRAD,
    "signsgd": SIGNSGD,
    "signum": SIGNUM,
    "lion": LION,
    "lars": LARS,
    "lamb": LAMB,
}
