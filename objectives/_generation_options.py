"""What a user may say of generation, and the tokens that end a text."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from zo_adapt.errors import OptionError
from zo_adapt.options import positive

GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""What counts as not set: a model's own settings would be reported as unused."""
_OWN = ("max_new_tokens", "do_sample", "pad_token_id", "eos_token_id")


def special_tokens(model: nn.Module, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that end a text, and one to pad with: any will do, since the mask is read."""
    config = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    ends = [] if end is None else [end] if isinstance(end, int) else [int(token) for token in end]
    for pad in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), *ends):
        if pad is not None:
            return ends, int(pad)
    return ends, 0


def sampling_options(temperature: float, top_p: float, top_k: int) -> dict[str, Any]:
    """What shapes the distribution that is drawn from.

    Raises:
        OptionError: A number outside its range.
    """
    positive("temperature", temperature)
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p={top_p}; choose 0 < top_p <= 1")
    if not isinstance(top_k, int) or top_k < 0:
        raise OptionError(f"top_k={top_k}; choose an integer >= 0, 0 for no limit")
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k}


def checked_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """More options of the generation.

    Raises:
        OptionError: One that this class sets itself, or that ``GenerationConfig`` does not have.
    """
    known = vars(GenerationConfig())
    for name in given:
        if name in _OWN:
            raise OptionError(
                f"generation_kwargs has {name!r}, which GenerationReward sets itself: by its "
                "arguments, and by the tokens of the tokenizer and the model"
            )
        if name not in known:
            raise OptionError(f"generation_kwargs has {name!r}, which GenerationConfig has not")
    if given.get("num_return_sequences") not in (None, 1):
        raise OptionError(
            f"num_return_sequences={given['num_return_sequences']}; leave it 1: a reward is of one "
            "text for each prompt"
        )
    return dict(given)


def sequences_of(output: Any) -> Tensor:
    """The texts of what a ``generate`` returns: ids, or ids and more, by name or first of several.

    Raises:
        OptionError: There are no ids.
    """
    found = output.get("sequences") if isinstance(output, Mapping) else output
    found = found[0] if isinstance(found, tuple) and found else found
    found = getattr(found, "sequences", found)
    if not isinstance(found, Tensor):
        raise OptionError(
            f"generate returned {type(output).__name__}; it must return token ids, or an output "
            "with sequences"
        )
    return found


def check_count(written: Tensor, prompts: Tensor) -> None:
    """Refuse another number of texts than one for each prompt."""
    if len(written) != len(prompts):
        raise OptionError(
            f"generate returned {len(written)} texts for {len(prompts)} prompts; leave "
            "num_return_sequences=1"
        )


class Ending:
    """Where a text ends."""

    def __init__(self, ends: Sequence[int], stops: Sequence[str], tokenizer: Any) -> None:
        self._ends, self.stops, self._tokenizer = ends, stops, tokenizer

    def cut(self, ids: list[int]) -> list[int]:
        """A text without what was written while others of its batch went on."""
        ends = [place for place, token in enumerate(ids) if token in self._ends]
        ids = ids[: ends[0] + 1] if ends else ids
        if not self.stops:
            return ids
        return ids[: bisect_left(range(len(ids)), True, key=lambda n: self._stopped(ids[:n]))]

    def _stopped(self, ids: list[int]) -> bool:
        text = self._tokenizer.decode(ids)
        return any(stop in text for stop in self.stops)
