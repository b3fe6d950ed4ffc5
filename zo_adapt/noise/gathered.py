"""Rows of a table, shifted as they are looked up: of an embedding, what a batch reads of it.

out_i = decay * W_r + sum_k c_k z(s_k)_r,    r = ids_i

The very bits that these rows have where the whole table is shifted, for the bytes and the noise of
the rows alone. On NVIDIA GPUs one kernel does it, elsewhere torch operations do.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from zo_adapt.noise import philox
from zo_adapt.noise.accumulate import arithmetic
from zo_adapt.noise.distributions import Noise
from zo_adapt.noise.entries import DIRECTION_STREAM
from zo_adapt.noise.factors import Factors, Wanted, coefficients, split
from zo_adapt.noise.low_rank import Matrices, torch_products
from zo_adapt.noise.sums import Sums


class Gathered:
    """Shifted rows of one tensor.

    Args:
        noise: Of the directions.
        weight: The table W, (n, width), of any dtype that is tuned.
        key: The tensor's noise key.
        sum: Which of the sums is added, by its index.

    Example:
        >>> from zo_adapt.noise.distributions import RADEMACHER
        >>> from zo_adapt.noise.sums import Sum, Sums
        >>> rows = Gathered(RADEMACHER, torch.zeros(9, 2), key=7, sum=0)
        >>> rows(torch.tensor([4, 4]), Sums([Sum([(1, 0.5)])])).abs()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """

    def __init__(self, noise: Noise, weight: Tensor, key: int, sum: int) -> None:
        self.weight = weight
        self._noise, self._key, self._sum = noise, key, sum
        self._kernel: Callable[[Tensor, Sums], Tensor] | None = None
        self._matrices = noise.matrices(weight.shape)
        if self._matrices is not None:
            wanted = Wanted(key, self._matrices, sum)
            self._factors = Factors(noise, [wanted], weight.device)
        elif weight.is_cuda and importlib.util.find_spec("triton") is not None:
            from zo_adapt.noise.triton_gathered import GatheredOnCUDA

            self._kernel = GatheredOnCUDA(noise, weight, key, sum)

    @torch.no_grad()
    def __call__(self, ids: Tensor, sums: Sums) -> Tensor:
        """The rows of these numbers, (*ids.shape, width)."""
        if self._kernel is not None:
            return self._kernel(ids, sums)
        if ids.device.type != "cpu":  # where finding repeated rows would wait for the device
            return self._shifted(ids.flatten(), sums).view(*ids.shape, -1)
        found, places = ids.unique(return_inverse=True)
        return self._shifted(found, sums)[places]

    def _shifted(self, ids: Tensor, sums: Sums) -> Tensor:
        """Rows of these numbers, (n, width)."""
        if self._matrices is not None:
            return self._with_factors(ids.long(), sums, self._matrices)
        terms, decay = sums.sums[self._sum]
        width, per_block = self.weight.shape[1], self._noise.entries.per_block
        total = self.weight[ids].to(arithmetic(self.weight.dtype))
        if decay != 1.0:
            total *= decay
        first = ids.long()[:, None] * width
        # A row that does not begin where a block does reaches into one more.
        blocks = width // per_block if width % per_block == 0 else -(-width // per_block) + 1
        numbers = first // per_block + torch.arange(blocks, device=ids.device)
        keys = torch.full_like(numbers, philox.signed(self._key)).flatten()
        columns = first % per_block + torch.arange(width, device=ids.device)
        for seed, coefficient in terms:
            words = philox.words_torch(seed, keys, DIRECTION_STREAM, numbers.flatten())
            values = self._noise.entries.from_torch_words(words).view(len(ids), blocks * per_block)
            total += values.gather(1, columns).to(total.dtype) * coefficient
        return total.to(self.weight.dtype)

    def _with_factors(self, ids: Tensor, sums: Sums, of: Matrices) -> Tensor:
        decay, factors = coefficients(sums, self._sum, self.weight.device)
        total = self.weight[ids].to(arithmetic(self.weight.dtype)) * decay
        total = total.to(arithmetic(self.weight.dtype))
        every_a, every_b = split(self._factors(sums), of)
        columns = torch.arange(of.width, device=ids.device)
        for a, b, coefficient in zip(every_a, every_b, factors, strict=True):
            z = torch_products(a, b, of, ids[:, None], columns)
            total += z.to(total.dtype) * coefficient.to(total.dtype)
        return total.to(self.weight.dtype)
