"""The speedrun ladder: optimizers race to one loss, each at its best learning rate."""
