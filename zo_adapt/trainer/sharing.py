"""Trainer where several processes share its steps instead of training on batches of their own.

What Trainer gives every process a part of in training (the batches) all have whole here, and what
it would average or wrap for gradients is left as in one process. Its evaluation is shared out by
Accelerate, as always.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist

from zo_adapt.evaluation.workers import Workers
from zo_adapt.ranks.carried_errors import Stopped
from zo_adapt.ranks.group import Ranks
from zo_adapt.ranks.launched import find_ranks


class SharedSteps:
    """For Trainer: under a launcher the processes share each step, on one batch."""

    args: Any
    accelerator: Any
    state: Any
    _ranks: Ranks | None = None

    def find_ranks(self) -> Ranks | None:
        """The processes that share the run; messages wait as long as ``ddp_timeout`` says."""
        self._ranks = find_ranks(Workers(timeout=self.args.ddp_timeout))
        return self._ranks

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes."""
        return self._ranks is None or self._ranks.is_first

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, Trainer takes the processes for one, and its files are there at the end."""
        if self.args.world_size == 1:
            yield
            return
        accelerator = self.accelerator
        whole = partial(accelerator.prepare_model, evaluation_mode=True)  # no DDP around it
        accelerator.prepare_model, self.args.shares_steps = whole, True
        try:
            yield
            if self._ranks is not None:
                self._ranks.close(Stopped())
        except BaseException as error:
            if self._ranks is not None:
                self._ranks.close(error)
            raise
        finally:
            del accelerator.prepare_model
            self.args.shares_steps = False

    @contextmanager
    def loading_whole(self) -> Iterator[None]:
        """Inside, a data loader gives every process all batches."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            yield
            return
        own = type(accelerator).prepare_data_loader
        accelerator.prepare_data_loader = partial(own, _OneProcess(accelerator))
        try:
            yield
        finally:
            del accelerator.prepare_data_loader

    def _get_num_items_in_batch(self, *_: Any) -> None:
        """Not asked for: the objective counts, and no process has other items."""
        return

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted // self.accelerator.num_processes

    def _save_rng_state(self, output_dir: str) -> None:
        if self.is_first_rank:
            super()._save_rng_state(output_dir)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        self.wait_for_files()
        super()._load_best_model()  # type: ignore[misc]

    def wait_for_files(self) -> None:
        """Wait until rank 0 has written what it has to write."""
        if self._ranks is not None:
            dist.barrier()


class _OneProcess:
    """An accelerator that seems to be the only one."""

    num_processes, process_index, dispatch_batches = 1, 0, False

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)
