"""Virtual tokens before every text, at any point: a few thousand numbers, and no file to load."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zo_adapt.errors import NotServableError
from zo_adapt.serve.protocol import Limits
from zo_adapt.term import Shift
from zo_adapt.view.parameters import ParameterView

PROMPT = "prompt_embeddings"
"""peft's name of the virtual tokens, and that of the one tensor of such a candidate."""
KIND = "PROMPT_TUNING"
_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


class SoftPrompt:
    """The virtual tokens that a view holds: one tensor of (tokens, width).

    Args:
        view: Of peft's prompt tuning (``served_prompt``), or of one such tensor.

    Raises:
        NotServableError: The view holds something else.
    """

    def __init__(self, view: ParameterView) -> None:
        self.view = view
        shapes = [tuple(tensor.shape) for tensor in view.tensors.values()]
        if len(shapes) != 1 or len(shapes[0]) != 2:
            raise NotServableError(
                f"the view holds tensors of the shapes {shapes}; a soft prompt is one tensor of "
                "(tokens, width)"
            )
        (self._name,) = view.tensors
        self.config = {"peft_type": KIND, "num_virtual_tokens": shapes[0][0]}
        self.modules = ["soft prompt"]

    def at(self, points: Sequence[Shift]) -> list[dict[str, Tensor]]:
        """The tensor at every point, bit for bit that of ``view.shifted``, on the CPU."""
        moving = self.view.stack(points)
        here = self.view.tensors[self._name].detach()
        rows = moving[self._name] if self._name in moving else here.expand(len(points), -1, -1)
        return [{PROMPT: row.detach().to("cpu", copy=True).contiguous()} for row in rows]

    def zero(self) -> None:
        """There is no prompt that changes nothing."""

    def check(self, limits: Limits) -> None:
        """Refuse a server that reads no embeddings."""
        if not limits.prompts:
            raise NotServableError(
                "this server reads no embeddings; start it with --enable-prompt-embeds, and give "
                "VLLMServer(url, embeddings=embedding_table(folder))"
            )


def embedding_table(folder: str | Path) -> Tensor:
    """The input embeddings of a saved model, (vocabulary, width), of its safetensors alone.

    Raises:
        NotServableError: There are none.
    """
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in list(tensors.keys()):
                if name.endswith(_TABLES):
                    found: Tensor = tensors.get_tensor(name)
                    return found
    raise NotServableError(f"no input embeddings in the safetensors files of {folder}")


def begun_with(
    texts: Sequence[int], table: Tensor, tokens: int, *, first: int | None = None
) -> Tensor:
    """Virtual tokens that begin as those of a text, repeated or cut to their number.

    Args:
        texts: Token ids.
        table: The model's input embeddings.
        tokens: How many.
        first: The token that begins texts (``tokenizer.bos_token_id``), put first. Much of a causal
            model's attention goes to its first token; a word there is a weak place for it, which
            noise of a hundredth moves elsewhere, and every value jumps.
    """
    ids = torch.tensor(list(texts))
    ids = ids.repeat(-(-tokens // len(texts)))
    if first is not None:
        ids = torch.cat([torch.tensor([first]), ids])
    return table[ids[:tokens]].clone().float()
