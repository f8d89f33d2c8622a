"""The CPU's layouts of a linear layer beside PyTorch's own."""

import platform

import pytest
import torch
import torch.nn.functional as F

from dmc.model.linear import Linear

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="layouts of x86 CPUs")


@pytest.mark.parametrize("rounded, held", [(None, "blocked"), (torch.bfloat16, "fp16"), (torch.float16, "fp16")])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(32, 48), (33, 97), (128, 7)])
def test_the_same_product(rounded, held, bias, inputs, outputs):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    weight = weight if rounded is None else weight.to(rounded).float()
    added = torch.randn(outputs, generator=generator) if bias else None
    linear = Linear(weight, added)
    assert linear.held == held
    torch.testing.assert_close(linear.dense(), weight, rtol=0, atol=2.0**-25 if linear.held == "fp16" else 0)
    for shape in ((1,), (3,), (70,), (2, 5), (0,)):
        x = torch.randn(*shape, inputs, generator=generator)
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        torch.testing.assert_close(linear(x), exact.float(), rtol=1e-5, atol=1e-5)


def test_values_that_fp16_lacks_stay_fp32():
    weight = torch.ones(4, 8)
    assert Linear(weight).held == "fp16"
    for value in (1e5, 1 + 2.0**-12):
        other = weight.clone()
        other[2, 3] = value
        assert Linear(other).held == "blocked"
    other[2, 3] = 1e-8  # next to 0: both are
    assert Linear(other).held == "fp16"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(32, 48), (33, 97)])
def test_bf16(inputs, outputs, bias):
    """Sums are not in bf16: the error is the rounding of the result, as where the CPU has no layout for it."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outputs, inputs, generator=generator) * 0.05).bfloat16()
    added = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    linear = Linear(weight, added)
    blocked = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert linear.held == ("blocked" if blocked else "plain")
    assert torch.equal(linear.dense(), weight)
    for shape in ((1,), (70,), (2, 5), (0,)):
        x = torch.randn(*shape, inputs, generator=generator).bfloat16()
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        got = linear(x)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=2.0**-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_stay_as_they_are(dtype):
    linear = Linear(torch.randn(5, 6).to(dtype))
    assert linear.held == "plain" and linear(torch.randn(2, 6).to(dtype)).dtype == dtype
