"""A network sharded by FSDP2: torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import stepladder as sl

dist.init_process_group()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = sl.AdamW(model.parameters(), lr=1e-2, max_norm=10.0)

torch.manual_seed(dist.get_rank())  # from here on every rank draws other data
for step in range(201):
    x = torch.randn(64, 8)
    loss = (model(x) - x.sin().sum(dim=1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}, norm of the gradient {optimizer.grad_norm:.3f}")
dist.barrier()  # gloo's threads give back the last tensors meanwhile, for which the interpreter must not be ending
dist.destroy_process_group()
