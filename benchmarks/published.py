"""The steps of the published MeZO-SVRG code, timed beside this project's."""

import contextlib
import importlib.util
import io
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LR = 1e-9


class Published:
    """The steps of the published code, its own source run as it is on a given model."""

    def __init__(self, path: Path, model: torch.nn.Module, data: dict[str, Tensor]) -> None:
        for name in (
            "datasets",
            "pytorch_lightning",
            "mezo_src.models",
            "mezo_src.modeling_roberta",
        ):
            if name not in sys.modules:  # imported by that file, but not used by its steps
                sys.modules[name] = types.ModuleType(name)
        lightning = sys.modules["pytorch_lightning"]
        lightning.LightningModule = torch.nn.Module  # type: ignore[attr-defined]
        for name in ("LightningDataModule", "Trainer", "seed_everything"):
            setattr(lightning, name, None)
        sys.modules["mezo_src.models"].RobertaModelForPromptFinetuning = None  # type: ignore[attr-defined]
        sys.modules["mezo_src.modeling_roberta"].RobertaConfig = None  # type: ignore[attr-defined]
        file = path / "models/llm_module.py"
        spec = importlib.util.spec_from_file_location("published", file)
        if spec is None or spec.loader is None or not file.exists():
            raise SystemExit(f"--reference {path} is no checkout of the published code: no {file}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # It seeds torch with an array of one number, which newer versions of numpy refuse.
        drawn = types.SimpleNamespace(randint=lambda high, size=1: int(np.random.randint(high)))  # noqa: NPY002
        module.np = types.SimpleNamespace(random=drawn)
        solver = module.GLUETransformer.__new__(module.GLUETransformer)
        torch.nn.Module.__init__(solver)
        solver.model, solver.params = model, list(model.named_parameters())
        solver.zero_order_eps, solver.learning_rate, solver.learning_rate_aux = 1e-3, LR, LR
        solver.z_std, solver.q, solver.lr_anneal = 1.0, 2, 1.0
        solver.batchsize_limit = len(data["labels"])
        for name in ("tr_loss", "tr_loss_minibatch", "time", "query", "proj_val", "lr_list"):
            setattr(solver, name, [])
        solver.memory_usage = []
        self._solver, self._data, self._count = solver, data, 0

    def mezo(self) -> None:
        """One step of MeZO, with the forward that it logs."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._solver.training_step_ZO(self._solver.model, self._data)

    def svrg(self) -> None:
        """One step of MeZO-SVRG, snapshot and minibatch steps in turn."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._solver.training_step_MeZO_SVRG(
                self._solver.model, self._data, 0, self._count, 10**9
            )
        self._count += 1
