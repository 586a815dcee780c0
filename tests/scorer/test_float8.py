"""8-bit linear layers: rounding within its bounds, and the product against float64."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scorer.engine.float8 import LARGEST, Float8Linear, quantize_rows
from scorer.errors import ConfigurationError

DEVICES = ["cpu"]
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
    DEVICES.append("cuda")
RELATIVE, SMALLEST = 2.0**-4, 2.0**-10
"""Half a unit in the last of e4m3's four significant bits; half of its smallest number, in units of the scale."""


def make_matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def restored(matrix):
    values, scale = quantize_rows(matrix)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (len(matrix), 1))
    return values.double() * scale.double()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("spread", [1, 30], ids=["normal", "six decades"])
    def test_is_within_half_a_unit_in_the_last_place(self, spread, dtype, device):
        matrix = (make_matrix(50, 64).sign() * make_matrix(50, 64, 1).mul(spread**0.5).exp()).clamp(-6e4, 6e4)
        matrix = matrix.to(device, dtype)
        scale = matrix.double().abs().amax(1, keepdim=True) / LARGEST
        bound = (matrix.double().abs() * RELATIVE).maximum(scale * SMALLEST) * (1 + 1e-6)
        assert ((restored(matrix) - matrix.double()).abs() <= bound).all()

    def test_keeps_each_rows_largest_element(self, device):
        matrix = make_matrix(50, 64).to(device)
        where = matrix.abs().argmax(1, keepdim=True)
        found, expected = (values.gather(1, where) for values in (restored(matrix), matrix.double()))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("power", [-100, 100])
    def test_does_not_see_powers_of_two(self, power, device):
        """Rows of 1e30 and of 1e-30 are as exact as any; each has its own scale."""
        matrix = make_matrix(4, 64).to(device)
        scaled = matrix.clone()
        scaled[1::2] *= 2.0**power
        first, second = (quantize_rows(values)[0].float() for values in (matrix, scaled))
        assert torch.equal(first, second)

    def test_a_row_of_zeros_stays_one(self, device):
        assert (restored(torch.zeros(3, 32, device=device)) == 0).all()

    def test_what_is_too_small_for_a_scale_becomes_zero(self, device):
        assert (restored(torch.full((3, 32), 1e-44, device=device)) == 0).all()


class Operands(TorchDispatchMode):
    """Remembers the strides of what is multiplied in 8 bits."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_mm.default:
            self.strides.append((args[0].stride(), args[1].stride()))
        return function(*args, **(kwargs or {}))


class TestProduct:
    @pytest.mark.parametrize("is_transposed", [False, True])
    def test_has_its_operands_lie_as_a_gpu_wants_them(self, is_transposed, device):
        """The first by rows, the second by columns; a CPU takes any."""
        weight = make_matrix(96, 48).t() if is_transposed else make_matrix(48, 96)
        hidden = make_matrix(20, 96).to(device)
        with Operands() as operands:
            found = Float8Linear(weight.to(device))(hidden.view(4, 5, 96).transpose(0, 1))
        assert operands.strides == [((96, 1), (1, 96))]
        expected = Float8Linear(weight.contiguous().to(device))(hidden).view(4, 5, 48).transpose(0, 1)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("rows", [1, 5, 64])
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_equals_float64_over_the_rounded_operands(self, rows, has_bias, device):
        """Then all that is left is bfloat16's half unit (2^-9) of the result, and float32 sums."""
        hidden, weight, bias = make_matrix(rows, 96), make_matrix(48, 96, 1), make_matrix(1, 48, 2)[0].bfloat16()
        layer = Float8Linear(weight, bias if has_bias else None).to(device)
        found = layer(hidden.to(device)).double().cpu()
        exact = restored(hidden) @ restored(weight).T + (bias.double() if has_bias else 0)
        slack = 1e-3 if device == "cuda" else 1e-5  # a GPU sums in fewer bits
        size = restored(hidden).abs() @ restored(weight).abs().T
        assert ((found - exact).abs() <= exact.abs() * 2**-8 + size * slack).all()

    def test_is_within_the_bound_of_rounding_both_operands(self, device):
        hidden, weight = make_matrix(20, 96), make_matrix(48, 96, 1)
        found = Float8Linear(weight).to(device)(hidden.to(device)).double().cpu()
        exact = hidden.double() @ weight.double().T
        size = hidden.double().abs() @ weight.double().abs().T
        assert ((found - exact).abs() <= size * 0.13).all()  # (1 + 1/16)^2 - 1, and what is small beside its row
        assert (found - exact).norm() / exact.norm() < 0.05

    def test_keeps_leading_dimensions_and_gives_bfloat16(self, device):
        layer = Float8Linear(make_matrix(48, 32)).to(device)
        for shape in ((2, 3, 32), (0, 32), (32,)):
            found = layer(torch.zeros(shape, device=device, dtype=torch.bfloat16))
            assert (found.shape, found.dtype) == ((*shape[:-1], 48), torch.bfloat16)

    def test_is_the_same_for_a_row_whatever_the_others_are(self):
        layer, hidden = Float8Linear(make_matrix(48, 32)), make_matrix(7, 32)
        changed = hidden.clone()
        changed[1:] *= 1e6
        assert torch.equal(layer(hidden)[0], layer(changed)[0])

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite_shows_in_its_row_and_in_no_other(self, value, device):
        hidden = make_matrix(5, 32)
        hidden[2, 7] = value
        found = Float8Linear(make_matrix(48, 32, 1), make_matrix(1, 48, 2)[0]).to(device)(hidden.to(device))
        assert found[2].isnan().all()
        assert found[[0, 1, 3, 4]].isfinite().all()

    def test_a_product_too_large_for_its_dtype_is_infinite(self, device):
        found = Float8Linear(torch.ones(16, 32)).to(device)(torch.full((1, 32), 1e38, device=device))
        assert (found == torch.inf).all()

    def test_zeros_give_the_bias(self, device):
        bias = make_matrix(1, 48)[0]
        found = Float8Linear(make_matrix(48, 32), bias).to(device)(torch.zeros(2, 32, device=device))
        assert (found.cpu() == bias.bfloat16()).all()

    def test_saves_and_loads(self):
        first, second = (Float8Linear(make_matrix(48, 32, seed), torch.zeros(48)) for seed in (0, 1))
        second.load_state_dict(first.state_dict())
        hidden = make_matrix(3, 32, 2)
        np.testing.assert_array_equal(first(hidden).float(), second(hidden).float())


@pytest.mark.parametrize("shape", [(48, 40), (50_265, 32), (8, 32)])
def test_odd_dimensions_are_refused(shape):
    with pytest.raises(ConfigurationError, match=r"multiples of 16: leave this layer as it is"):
        Float8Linear(torch.zeros(shape))
