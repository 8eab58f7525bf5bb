"""The console script `stepladder`."""

import click

from stepladder.bench.cli import bench
from stepladder.bench.ladder.cli import ladder
from stepladder.bench.matrices import bench_matrices
from stepladder.bench.preconditioners import bench_preconditioners
from stepladder.bench.roots import bench_roots
from stepladder.cli.info import info
from stepladder.cli.plan import plan_command
from stepladder.cli.profile import profile


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stepladder")
def main() -> None:
    """Optimizer kernels: what runs here, and how fast."""


main.add_command(info)
main.add_command(bench)
main.add_command(bench_matrices)
main.add_command(bench_preconditioners)
main.add_command(bench_roots)
main.add_command(profile)
main.add_command(ladder)
main.add_command(plan_command, "plan")
