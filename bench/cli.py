"""`stepladder bench`."""

import click


@click.command()
def bench() -> None:
    """Measure optimizers against torch.optim."""
