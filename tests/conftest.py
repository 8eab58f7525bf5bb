import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True, scope="session")
def _quiet_processors():
    # The suite shares its machine; spinning OpenMP workers of idle processes would slow its neighbours.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
