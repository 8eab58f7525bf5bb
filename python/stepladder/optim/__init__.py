"""Thin wrappers around the kernels, one file for each optimizer."""

from stepladder.optim.adagrad import Adagrad
from stepladder.optim.adam import Adam
from stepladder.optim.adamw import AdamW
from stepladder.optim.lamb import LAMB
from stepladder.optim.lars import LARS
from stepladder.optim.lion import Lion
from stepladder.optim.muon import Muon
from stepladder.optim.muonh import MuonH
from stepladder.optim.rmsprop import RMSprop
from stepladder.optim.sgd import SGD
from stepladder.optim.shampoo import Shampoo
from stepladder.optim.signsgd import SignSGD
from stepladder.optim.soap import SOAP

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
    "RMSprop",
    "Shampoo",
    "SignSGD",
]
