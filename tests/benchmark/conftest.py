import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture
def unfused_attention():
    """The fused attention of torch fails in bfloat16 if ATEN_CPU_CAPABILITY is below that of a processor with AMX."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
