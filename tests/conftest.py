import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_globals():
    """Every test starts from one seed, and leaves torch's global settings as it found them."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
    torch.set_num_threads(threads)
