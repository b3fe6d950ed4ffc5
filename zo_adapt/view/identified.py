"""What tells a view, and its weights, from others: by hashes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from zo_adapt.noise.distributions import Noise
from zo_adapt.view.group import Group
from zo_adapt.view.identity import fingerprint_of, hash_of, hash_of_frozen
from zo_adapt.view.inspection import Inspection
from zo_adapt.view.shards import Shards


class Identified:
    """Base of a view: its hashes.

    Of a model in parts they are the work of all processes, each of which must ask.
    """

    tensors: dict[str, Tensor]
    model: nn.Module | None
    groups: Sequence[Group]
    noise: Noise
    inspection: Inspection
    shards: Shards
    _group_of: Mapping[str, int]
    _known: tuple[str, str | None] | None = None
    """Hashes of the weights and of the base, while they are kept."""

    def fingerprint(self) -> str:
        """sha256 of names, shapes, dtypes, noise and groups: which view this is."""
        return fingerprint_of(self.tensors, self.noise.name, self.groups, self._group_of)

    def hash(self) -> str:
        """sha256 of the tensors' bits in row-major order: which weights these are."""
        return hash_of(self.tensors) if self._known is None else self._known[0]

    def base_hash(self) -> str | None:
        """sha256 of the model's frozen weights: which base this is. None where there are none."""
        if self._known is not None:
            return self._known[1]
        return hash_of_frozen(self.model, self.inspection)

    @contextmanager
    def hashes_kept(self) -> Iterator[None]:
        """Inside, where no weight changes, one process may ask for the hashes alone.

        Of a sharded model they are made on the way in, by all processes that hold parts.
        """
        self._known = (self.hash(), self.base_hash()) if self.shards.is_any else None
        try:
            yield
        finally:
            self._known = None

    def has_base(self, begun: str) -> bool:
        """Whether the hash in a file is of this base; True where no weights are frozen."""
        here = self.base_hash()
        if here is None or begun == here or self._known is not None:
            return here is None or begun == here
        return begun == hash_of_frozen(self.model, self.inspection, scaled=False)
