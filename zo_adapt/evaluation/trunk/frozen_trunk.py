"""Frozen-trunk reuse: what the layers below the first tuned one make of an example is made once.

With layers h_1 .. h_n of which the view holds weights of h_{k+1} .. h_n only,

    f(x) = head(h_n( .. h_{k+1}(a(x)))),    a(x) = h_k( .. h_1(embed(x)))

and a(x) is the same at every point that is probed. It is kept after the first evaluation of x, and
later ones cost the n - k tuned layers and the head: n / (n - k) times less, less the head's share.
Masks, position tables, norms and heads stay the model's own code, run as always.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from zo_adapt.errors import OptionError
from zo_adapt.evaluation.trunk.call import Call, Form, RefusedError, can_trim, cut, kind_of
from zo_adapt.evaluation.trunk.calls import Calls, Recorded, skipped
from zo_adapt.evaluation.trunk.keys import Keys, Rows
from zo_adapt.evaluation.trunk.store import Storage, Store
from zo_adapt.evaluation.trust import close, same_calls, tolerance_of
from zo_adapt.interrupt import is_from_handler
from zo_adapt.options import at_least_one, renamed
from zo_adapt.view.parameters import ParameterView

logger = logging.getLogger(__name__)
DEFAULT_BYTES = 2**30
LEAST_SHARE = 0.25
"""Share of the layers that must be frozen for the activations' memory to be spent unasked."""
LARGEST_FRUITLESS = 3
"""Changes of frozen tensors in a row, with nothing reused between them."""


class FrozenTrunk:
    """Keeps the activations that enter the first tuned layer, and answers from them.

    They are kept by the content of what the model is called with, row by row, not by the number of
    an example, so a collator that draws at random, rows in another order and repeated rows are
    right. A change of any frozen tensor that torch counts (``tensor._version``) forgets them all;
    tensors changed through ``.data`` or other back doors need ``forget()``.

    Nothing is taken on trust: the order in which the layers run is observed, and the first answers
    (for whole rows, and for rows cut to their length) are computed again without the trunk. Where
    the tuned layers' inputs or the objective's values differ by more than 1e-5 (fp32; 1e-2 in fp16
    and 5e-2 in bf16), the trunk is not used and ``why_not`` says why. These two evaluations are not
    queries: the optimizer does not see them.

    Rows padded on the right are reused in a batch of any width; rows padded on the left in batches
    of the same width, because positions may be counted from the left edge. Where it matters what
    stands in the padding, that is kept too and rows are reused in batches of the same width.

    Args:
        view: What is tuned; its model is cut before the first layer that the view holds weights of.
        max_bytes: Most bytes of activations, d * itemsize for each token; the longest unused make
            room when it is reached.
        storage: "device" (the model's), "host" or "disk" (memory-mapped, in the temporary folder).
        least: Smallest share of the layers that must be frozen, 0 .. 1.

    Attributes:
        why_not: Why nothing is reused, as a sentence; None while it is.

    Raises:
        OptionError: ``max_bytes`` below 1, or another storage.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from objectives import ClassificationLoss
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=4,
        ...                     num_attention_heads=2, intermediate_size=16)
        >>> model = BertForSequenceClassification(config)
        >>> trunk = FrozenTrunk(ParameterView.last_layers(model, 1))
        >>> loss = ClassificationLoss(model)
        >>> batch = loss.collate([{"input_ids": [2, 7], "label": 0}])
        >>> with torch.no_grad():
        ...     first, again = trunk.call(loss, batch), trunk.call(loss, batch)
        >>> trunk.why_not, trunk.rows, bool(torch.allclose(first, again))
        (None, 1, True)
        >>> FrozenTrunk(ParameterView.full(model)).why_not
        'the view holds weights of the first of 4 layers (bert.encoder.layer)'
    """

    def __init__(
        self,
        view: ParameterView,
        *,
        max_bytes: int = DEFAULT_BYTES,
        storage: Storage = "device",
        least: float = 0.0,
    ) -> None:
        if storage not in ("device", "host", "disk"):
            raise OptionError(f"storage={storage!r}; choose 'device', 'host' or 'disk'")
        self.view = view
        self._store = Store(at_least_one("max_bytes", max_bytes), storage)
        self.why_not: str | None = None
        self.layers = 0
        """Frozen layers that run once for each example."""
        self._verified: set[str] = set()
        self._shapes: dict[int, tuple[Any, ...] | None] = {}
        self._fruitless = 0
        try:
            self._cut = cut(view)
            layers = len(self._cut.frozen) + len(self._cut.tuned)
            if len(self._cut.frozen) < least * layers:
                raise RefusedError(f"only {len(self._cut.frozen)} of {layers} layers are frozen")
        except RefusedError as error:
            self.why_not = str(error)
            return
        self.layers = len(self._cut.frozen)
        self._keys = Keys(view.model is not None and can_trim(view.model))
        self._versions = self._now()

    @property
    def reason(self) -> str | None:
        """``why_not`` by its old name."""
        renamed("FrozenTrunk.reason", "FrozenTrunk.why_not")
        return self.why_not

    @property
    def rows(self) -> int:
        """Rows whose activations are kept."""
        return len(self._store)

    @property
    def nbytes(self) -> int:
        """Bytes that activations occupy."""
        return self._store.nbytes

    def forget(self) -> None:
        """Drop all activations; they are made anew when they are asked for."""
        self._store.clear()

    def call(
        self,
        function: Callable[[Any], Any],
        content: Any,
        note: Callable[[Call], None] = lambda call: None,
    ) -> Any:
        """``function(content)``, without running the frozen layers on what they have seen.

        Args:
            function: Runs the model in evaluation mode; with gradients enabled, all of it.
            content: A batch.
            note: Called with the model's call, where there was one and it was answered.
        """
        if self.why_not is None:
            self._notice_changes()
        if self.why_not is not None or torch.is_grad_enabled():
            return function(content)
        calls, failed, value = self._calls(serving=True), False, None
        try:
            with calls.observed():
                value = function(content)
        except Exception as error:
            if is_from_handler(error) or (not calls.served and calls.refusal is None):
                raise
            failed = True
        refusal, served = calls.refusal, {call.kind for call in calls.served}
        if failed or served - self._verified or (served and refusal is not None):
            if failed:
                refusal = refusal or "the model does not run without the frozen layers"
            value, refusal = self._checked(function, content, value, calls, refusal)
        if refusal is not None:
            self._refuse(refusal)
        elif served:
            self._trust(served)
            if not all(call.is_new for call in calls.served):
                self._fruitless = 0
            if len(calls.done) == 1:
                note(calls.done[0])
        return value

    def entering(
        self, function: Callable[[Any], Any], content: Mapping[str, Tensor], form: Form
    ) -> Tensor | None:
        """What enters the first tuned layer; None where calls like it were not checked yet.

        Args:
            function: Runs the model; called as far as the frozen layers, for rows that are new.
            content: What it is called with.
            form: How it calls the model.

        Raises:
            RefusedError: The rows cannot be kept.
        """
        if self.why_not is None:
            self._notice_changes()
        if self.why_not is not None or torch.is_grad_enabled():
            return None
        rows = self.rows_of(form, content)
        if not rows.keys or kind_of(rows) not in self._verified:
            return None
        if self._store.holds(rows.keys):
            self._fruitless = 0
        else:
            with suppress(Recorded), self._calls(serving=True, ending=True).observed():
                function(content)
            if not self._store.holds(rows.keys):
                raise RefusedError("there is no room for these rows")
        return self._store.get(rows, form.width, form.device)

    def rows_of(self, form: Form, content: Mapping[str, Tensor]) -> Rows:
        """The rows of a call of the model that is made here and now."""
        return self._keys.of(form.arguments(content))

    def skipping(self, entering: Tensor) -> AbstractContextManager[None]:
        """Inside, the frozen layers are not run: ``entering`` enters the first tuned one."""
        return skipped(self._cut, self._shapes, entering)

    def _checked(
        self,
        function: Callable[[Any], Any],
        content: Any,
        value: Any,
        calls: Calls,
        refusal: str | None,
    ) -> tuple[Any, str | None]:
        """The value, and why the trunk must be given up, if it must: then it is that without it."""
        plain = self._calls(serving=False)
        with plain.observed():
            expected = function(content)
        tolerance = tolerance_of(self._cut.kept)
        refusal = refusal or plain.refusal
        if refusal is None and not same_calls(calls.done, plain.done, tolerance):
            refusal = "what enters the tuned layers depends on the frozen ones in another way, too"
        if refusal is None and not close(value, expected, tolerance):
            refusal = "the objective's values differ when the frozen layers are not run"
        # Where all is well it is the trunk's own value that counts, as in every later call.
        return (value if refusal is None else expected), refusal

    def _trust(self, kinds: set[str]) -> None:
        if not self._verified:
            frozen, store = len(self._cut.frozen), self._store
            logger.info(
                "the first %d of %d layers of %r run once for each example, kept on %s (%d MiB)",
                frozen,
                frozen + len(self._cut.tuned),
                self._cut.path,
                store.storage,
                store.max_bytes >> 20,
            )
        self._verified |= kinds

    def _refuse(self, reason: str) -> None:
        self._store.clear()
        if self._keys.trims:
            # What is padded may be read after all (a first token, left-padded): keep that, too.
            self._keys = Keys(trims=False)
            self._verified.clear()
            return
        logger.info("the frozen layers are run every time: %s", reason)
        self.why_not = reason

    def _calls(self, *, serving: bool, ending: bool = False) -> Calls:
        return Calls(
            self._cut,
            self._store,
            self._keys,
            self._shapes,
            serving=serving,
            verified=frozenset(self._verified),
            ending=ending,
        )

    def _now(self) -> list[int]:
        return [tensor._version for tensor in self._cut.kept]

    def _notice_changes(self) -> None:
        versions = self._now()
        if versions == self._versions:
            return
        self._versions = versions
        self._store.clear()
        self._fruitless += 1
        if self._fruitless > LARGEST_FRUITLESS:
            self._refuse("frozen tensors change from one evaluation to the next")
