"""Runs that are killed again and again: one for every way of evaluating.

Each is a function of a folder, which begins the run there or goes on with it, and writes the final
weights when it is through. With a tiny model nothing is downloaded; the real one is MiniLM on
BBC news.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from objectives import F1, Accuracy, ClassificationLoss, GenerationReward
from zo_adapt import EvaluationOptions, MeZO, MeZOSVRG, ParameterView, ZOConfig, ZOTrainer, minimize

TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
FORK = get_context("fork")  # a child starts at once: nothing is imported again
FINAL = "final.safetensors"
Source = Callable[[], tuple[Any, list[dict[str, Any]]]]
Life = Callable[[Path], None]


class KillError(Exception):
    """A life failed, or a run that was killed ended elsewhere."""


def tiny() -> tuple[Any, list[dict[str, Any]]]:
    """A model and data that need no download."""
    config = transformers.BertConfig(**TINY, intermediate_size=32, initializer_range=0.3)
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": [2, *range(5 + i % 2, 8 + i % 5)], "labels": i % 2} for i in range(64)]
    return model, rows


def real() -> tuple[Any, list[dict[str, Any]]]:
    """MiniLM and BBC news, 32 tokens of a text."""
    from support import real_data

    folder, corpus = str(real_data.minilm_folder()), real_data.bbc()
    split = real_data.balanced_split(corpus.texts, corpus.labels, 128, 5, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(split.train_texts, truncation=True, max_length=32)["input_ids"]
    labelled = zip(tokens, split.train_labels, strict=True)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    return model, [{"input_ids": ids, "labels": label} for ids, label in labelled]


def lora(model: Any, dtype: torch.dtype = torch.float32) -> ParameterView:
    """A view of an adapter of rank 8."""
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    adapted = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    return ParameterView.trainable(adapted)


VIEWS: dict[str, Callable[[Any], ParameterView]] = {
    "LoRA": lora,
    "bf16 LoRA": lambda model: lora(model, torch.bfloat16),
    "last layers": lambda model: ParameterView.last_layers(model, 1),
    "full": lambda model: ParameterView.full(model, scratch="layer"),
    "low rank": lambda model: ParameterView.full(model, noise="lowrank"),
}


def by_minimize(
    folder: Path,
    source: Source,
    view: str = "LoRA",
    objective: Callable[[Any], Any] = ClassificationLoss,
    evaluation: EvaluationOptions | None = None,
    metrics: bool = False,
    steps: int = 20,
    interval: int = 2,
) -> None:
    """One life of a run of ``minimize``."""
    torch.manual_seed(0)
    model, examples = source()
    tuned = VIEWS[view](model)
    minimize(
        objective(tuned.model),
        tuned,
        examples,
        MeZOSVRG(snapshot_interval=interval, num_directions=2),
        batch_size=6,
        max_steps=steps,
        trajectory=folder / "run.zot",
        resume=True,
        progress=False,
        evaluation=evaluation or EvaluationOptions(),
        metrics={"accuracy": Accuracy(tuned.model)} if metrics else None,
    )
    finish(tuned, folder)


def by_trainer(folder: Path, source: Source, view: str, steps: int = 10) -> None:
    """One life of a training by ZOTrainer that saves every few steps."""
    torch.manual_seed(0)
    model, examples = source()
    tuned = VIEWS[view](model)
    args = ZOConfig(
        str(folder),
        max_steps=steps,
        save_steps=2,
        save_total_limit=2,
        per_device_train_batch_size=6,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ZOTrainer(
        tuned.model,
        args,
        train_dataset=Dataset.from_list(examples),
        data_collator=ClassificationLoss(tuned.model).collate,
        view=tuned,
        zo_optimizer=MeZO(num_directions=2),
    )
    trainer.remove_callback(transformers.PrinterCallback)  # figures of no use here
    begun = any(folder.glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=True if begun else None)
    finish(tuned, folder)


def written(folder: Path, steps: int = 20) -> None:
    """One life of a run on a reward of generated text, by a tiny model with real generation."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **TINY, intermediate_size=32, initializer_range=0.3, pad_token_id=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="w2", pad_token="w1"
    )
    view = ParameterView.matching(model, r"layers\.2")
    minimize(
        GenerationReward(model, tokenizer, mean_id, max_new_tokens=4, do_sample=True),
        view,
        [{"prompt": " ".join(f"w{3 + j}" for j in range(i % 5 + 1))} for i in range(16)],
        MeZO(),
        batch_size=4,
        max_steps=steps,
        trajectory=folder / "run.zot",
        resume=True,
        progress=False,
    )
    finish(view, folder)


def mean_id(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward."""
    return [sum(ids) / (1 + len(ids)) for ids in completion_ids]


def finish(view: ParameterView, folder: Path) -> None:
    """Write the final weights, whole or not at all."""
    weights = {name: tensor.detach().contiguous() for name, tensor in view.tensors.items()}
    save_file(weights, folder / "new.safetensors")
    os.replace(folder / "new.safetensors", folder / FINAL)


def ways(source: Source) -> dict[str, Life]:
    """Every way of evaluating, by name."""
    apart = EvaluationOptions(joint_rows="off")
    run, training = partial(by_minimize, source=source), partial(by_trainer, source=source)
    return {
        "LoRA, joint": partial(run, evaluation=EvaluationOptions(joint_rows=64)),
        "LoRA, one at a time": partial(run, evaluation=apart),
        "LoRA, far from a snapshot": partial(run, interval=18),
        "last layers, trunk": partial(
            run, view="last layers", evaluation=EvaluationOptions(reuse_trunk="on")
        ),
        "full, layer by layer": partial(run, view="full"),
        "full, low rank": partial(run, view="low rank"),
        "bf16 LoRA": partial(run, view="bf16 LoRA"),
        "LoRA, F1 and metrics": partial(run, objective=F1, metrics=True, evaluation=apart),
        "generation reward": written,
        "ZOTrainer, bf16 LoRA": partial(training, view="bf16 LoRA"),
        "ZOTrainer, last layers": partial(training, view="last layers"),
        "ZOTrainer, full": partial(training, view="full"),
    }


def spend(life: Life, kills: int, folder: Path, moments: random.Random) -> int:
    """Kill a run so many times, begun anew where it ends before, and compare every end.

    Returns:
        How many runs were brought to their end, each equal to the one that was never stopped.

    Raises:
        KillError: A life failed by itself, or a run ended elsewhere.
    """
    whole, spent, runs = folder / "whole", 0, 0
    whole.mkdir(parents=True)
    began = time.perf_counter()
    _lived(_begun(life, whole))
    once = time.perf_counter() - began
    while spent < kills:
        runs += 1
        parts = folder / f"run{runs}"
        parts.mkdir()
        while not (parts / FINAL).exists():
            child = _begun(life, parts)
            # Short lives, so that a run is killed many times; long enough to move on.
            child.join(moments.uniform(0.0, 0.5 * once) if spent < kills else None)
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                spent += 1
            else:
                _lived(child)
        compare(whole, parts)
    return runs


def _begun(life: Life, folder: Path) -> Any:
    child = FORK.Process(target=life, args=(folder,))
    child.start()
    return child


def _lived(child: Any) -> None:
    child.join()
    if child.exitcode != 0:
        raise KillError(f"a life ended with exit code {child.exitcode}")


def compare(whole: Path, parts: Path) -> None:
    """Refuse a run that ended with other bits.

    Raises:
        KillError: Weights or trajectories differ.
    """
    one, other = (load_file(folder / FINAL) for folder in (whole, parts))
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            raise KillError(f"{name} differs after the kills")
    for path in whole.glob("*.zot"):
        if path.read_bytes() != (parts / path.name).read_bytes():
            raise KillError("the trajectories differ after the kills")
