"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): Adam with decoupled weight decay."""

from functools import partial

from stepladder.reference.adam import adam

adamw = partial(adam, decoupled=True)
