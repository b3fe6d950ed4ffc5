"""Where a LoRA adapter starts: its A along the directions in which the layers' inputs vary.

In W x + B A x with B = 0 at first, A decides what B gets to see of x. Random rows see mostly what
all inputs have in common. Here, for every linear layer, from forward passes alone,

    A <- c diag(lambda_1, ..., lambda_r)^(-1/2) V^T,   E[x x^T] v_k = lambda_k v_k, largest first

so that the r numbers in A x are uncorrelated and of one size, and c such that this is the root mean
square that A x has by peft's own initialisation: the steps' size stays right.

Measured (MiniLM, BBC topics at 32 tokens, 7,680 queries, two seeds, by the defaults): query and
value r=8 .66 -> .77, all linear layers r=8 .50 -> .83; film reviews at 30,000 queries, one to two
seeds: .61 -> .68 and .58 -> .60.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from zo_adapt.data.examples import as_data
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch
from zo_adapt.errors import AdapterError, ViewError
from zo_adapt.evaluation.objective import Objective, ObjectiveLike, as_objective, ready
from zo_adapt.interrupt import gradients_off, undone, uninterrupted
from zo_adapt.options import at_least_one
from zo_adapt.view.adapters import adapted_modules
from zo_adapt.view.shards import is_sharded

EXACT = 2048
"""Up to this width the whole matrix is kept: 32 MB."""
SPARE = 96
"""Directions of a sketch beyond twice those that are wanted."""


class Moment:
    """E[x x^T] of rows x, summed in fp64: whole where they are narrow, otherwise a sketch.

    A sketch keeps S = M Omega for a few random directions Omega, from which the leading eigenpairs
    of M follow (Nystroem; Tropp et al. 2017, arXiv 1706.05736): of a row of 14,336 numbers and rank
    8 it takes 13 MB in place of 1.6 GB.

    Args:
        width: Of a row.
        rank: How many eigenpairs are wanted at most.
        device: Where the rows are.
    """

    def __init__(self, width: int, rank: int, device: torch.device | str = "cpu") -> None:
        self._directions = _directions(width, 2 * rank + SPARE).to(device)
        self._total = torch.zeros_like(self._directions)
        self._squares = 0.0
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take rows (n, d) in."""
        rows = rows.to(torch.float64)
        self._total += rows.T @ (rows @ self._directions)
        self._squares += float(rows.square().sum())
        self.count += len(rows)

    @property
    def mean_square(self) -> float:
        """E |x|^2."""
        return self._squares / self.count

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The leading eigenvalues, largest first, and their eigenvectors as columns.

        As many as the rows span: beyond that an eigenvalue is rounding.
        """
        values, vectors = self._eigenpairs()
        known = int((values > 1e-9 * values[0]).sum())
        return values[: min(rank, known)], vectors[:, : min(rank, known)]

    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        omega, sketch = self._directions, self._total / self.count
        if len(sketch) <= EXACT:
            values, vectors = torch.linalg.eigh(sketch)
            return values.flip(0), vectors.flip(1)
        # A shift keeps the small matrix positive; it is taken off the eigenvalues again.
        shift = 1e-12 * float(torch.linalg.matrix_norm(sketch))
        sketch = sketch + shift * omega
        core = omega.T @ sketch
        root = torch.linalg.cholesky((core + core.T) / 2)
        factor = torch.linalg.solve_triangular(root, sketch.T, upper=False).T
        vectors, singular, _ = torch.linalg.svd(factor, full_matrices=False)
        return (singular.square() - shift).clamp_min(0.0), vectors


def _directions(width: int, count: int) -> Tensor:
    """All of them, or a few orthonormal ones at random."""
    if width <= EXACT:
        return torch.eye(width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(width, min(count, width), generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn)[0]
    return orthonormal


class LoraStart(NamedTuple):
    """What ``initialise_lora`` did.

    Args:
        layers: Names of the layers whose A it set.
        left: Names of adapted layers that it left as peft made them: embeddings, convolutions.
        queries: Forwards of one sample.
    """

    layers: tuple[str, ...]
    left: tuple[str, ...]
    queries: int


def initialise_lora(
    model: nn.Module,
    objective: ObjectiveLike,
    data: Any,
    *,
    rows: int = 128,
    batch_size: int = 8,
    seed: int = 0,
) -> LoraStart:
    """Set the A of every LoRA on a linear layer to where the inputs of its layer vary.

    A_k <- c v_k / sqrt(lambda_k), with the leading eigenpairs of the layer's E[x x^T] over ``rows``
    examples. The model computes what it did: B is zero. Call it before tuning, and save the adapter
    (``model.save_pretrained``): a trajectory replays from the weights that it leaves.

    Args:
        model: A peft model with LoRA, rsLoRA or DoRA adapters that have not been tuned yet.
        objective: Called on batches of the data, so that the layers see their inputs.
        data: Examples, as for ``minimize``.
        rows: Examples to look at; all if there are fewer.
        batch_size: Examples of a forward pass.
        seed: Of their choice.

    Returns:
        Which layers were set, which were not, and how many forwards of one sample it took.

    Raises:
        AdapterError: No LoRA on a linear layer, or one that has been tuned or is sharded.
        ViewError: The layers see NaN or infinity. As with the other, nothing is changed.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 2)), LoraConfig(
        ...     r=2, target_modules=["0"]))
        >>> start = initialise_lora(model, lambda batch: model(batch).sum(1), torch.randn(64, 6))
        >>> start.layers, start.queries
        (('base_model.model.0',), 64)
    """
    objective, examples = as_objective(objective), as_data(data)
    source = examples.source(objective.collate)
    count = min(at_least_one("rows", rows), len(source))
    batch = Samples(source, count, seed, examples.classes()).minibatch()
    return start_on(model, objective, batch.micro_batches(at_least_one("batch_size", batch_size)))


def start_on(model: nn.Module, objective: Objective, parts: Sequence[Batch]) -> LoraStart:
    """``initialise_lora`` on batches that there are already."""
    layers, left = _lora_layers(model)
    moments = {name: _moment_for(layer) for name, layer in layers.items()}
    with gradients_off(), ready(objective, model), _watched(layers, moments) as masks:
        for part in parts:
            masks.append(_mask(part.content))
            objective(part.content)
    # All are found before the first is written. A layer may not be on the way of these examples.
    starts = [
        (a, _aligned(name, a, moments[name]))
        for name, layer in layers.items()
        if moments[name].count
        for a in _factors(layer)
    ]
    with uninterrupted():
        for a, rows in starts:
            a[: len(rows)] = rows
    return LoraStart(tuple(layers), tuple(left), sum(map(len, parts)))


def _lora_layers(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    layers: dict[str, nn.Module] = {}
    left: list[str] = []
    for name, module in adapted_modules(model):
        if not (hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A")):
            continue
        if _factors(module):
            layers[name] = module
        else:
            left.append(name)
    if not layers:
        raise AdapterError(
            "the model has no LoRA on a linear layer; make one with peft's LoraConfig, or tune "
            "without initialise_lora"
        )
    if parts := [name for name, layer in layers.items() if any(map(is_sharded, _factors(layer)))]:
        raise AdapterError(
            f"the adapter of {parts[0]!r} lies in parts on several processes; call initialise_lora "
            "before the model is sharded, or leave the A that peft has drawn"
        )
    tuned = [name for name, layer in layers.items() if any(b.any() for b in _factors(layer, "B"))]
    if tuned:
        raise AdapterError(
            f"the adapter of {tuned[0]!r} has been tuned (its B is not zero): another A would "
            "change what the model computes; call initialise_lora before tuning, on an adapter "
            "with init_lora_weights=True"
        )
    return layers, left


def _factors(layer: nn.Module, which: str = "A") -> list[Tensor]:
    """A (or B) of the active adapters of a LoRA on a linear layer; none of other layers."""
    held = getattr(layer, f"lora_{which}", {})
    active = cast(list[str], layer.active_adapters)
    found = [held[name] for name in active if name in held]
    return [module.weight.detach() for module in found if isinstance(module, nn.Linear)]


def _moment_for(layer: nn.Module) -> Moment:
    factors = _factors(layer)
    return Moment(factors[0].shape[1], max(map(len, factors)), factors[0].device)


def _aligned(name: str, a: Tensor, moment: Moment) -> Tensor:
    """The leading directions, as the first rows of A; the others stay where there are too few."""
    if not math.isfinite(moment.mean_square):
        raise ViewError(f"the inputs of {name!r} hold NaN or infinity; load finite weights first")
    values, vectors = moment.leading(len(a))
    # An eigenvector has no sign: the largest part positive, so that machines agree.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    # peft draws A from +-1/sqrt(d), evenly: of mean square 1 / (3 d).
    usual = math.sqrt(moment.mean_square / (3 * a.shape[1]))
    return (usual * signs * vectors / values.sqrt()).T.to(a)


def _mask(content: Any) -> Tensor | None:
    """Which tokens of a batch are no padding."""
    mask = content.get("attention_mask") if isinstance(content, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextmanager
def _watched(
    layers: Mapping[str, nn.Module], moments: Mapping[str, Moment]
) -> Iterator[list[Tensor | None]]:
    """Inside, the layers' inputs are taken in; the list's last is the mask of the batch."""
    masks: list[Tensor | None] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            inputs, mask = given[0].detach(), masks[-1]
            if mask is not None and inputs.shape[:2] == mask.shape:
                inputs = inputs[mask.bool()]
            moments[name].add(inputs.reshape(-1, inputs.shape[-1]))

        return hook

    hooks = (layer.register_forward_pre_hook(watch(name)).remove for name, layer in layers.items())
    with undone(hooks):
        yield masks
