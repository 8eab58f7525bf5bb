"""Matrix optimizers on several processes: who owns which matrix, and how results reach the others.

What sends and receives is torch.distributed; nothing here knows a formula of an optimizer.
"""
