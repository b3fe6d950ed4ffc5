"""What a step on a language model costs beside its forwards, in time and in memory.

Floor: for n queries the model itself needs n / b forwards of b rows, or one ``generate`` of all n
prompts; "/ forwards" is against these, of the same model in the same process. A first-order step on
the same adapter stands beside (AdamW with checkpointing).

    python benchmarks/llm.py --sizes 135M 1B 3B 8B --output llm.json

CUDA: decoders of Llama's kind in bf16, eager forwards. CPU: a tiny one, fp32. Random weights, LoRA
r=16 on every linear layer, random tokens; prompts of unlike lengths, nearly no text ends early.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from decoders import SIZES, Size, Texts, alike, decoder, free, prompts, word_tokenizer

from objectives import CausalLMLoss, GenerationReward
from zo_adapt import MeZO, MeZOSVRG, ParameterView
from zo_adapt.data.samples import Samples
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.loops.run import Run
from zo_adapt.optimizers.optimizer import Optimizer
from zo_adapt.optimizers.schedule import Budget
from zo_adapt.term import Shift, Term

WORKS = ("generation", "lora", "full", "full, Gaussian", "adamw")


class Timed(NamedTuple):
    """Seconds of a call, and the peak of allocated memory in GiB (0 on a CPU)."""

    seconds: float
    peak: float = 0.0


def timed(call: Callable[[], object], args: argparse.Namespace, warm: int = 2) -> Timed:
    """Calls in a row, as a run makes them; the peak is that of all, capturing included."""
    on_gpu, seconds = args.device == "cuda", []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    for _ in range(args.repeats):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    # The steps of an optimizer may differ in their queries: the mean goes with the mean of these.
    middle = statistics.fmean if isinstance(call, Steps) else statistics.median
    return Timed(middle(seconds), peak)


class Steps:
    """Steps of a run; called, one more.

    Args:
        objective: What is asked.
        view: What is tuned.
        optimizer: Started here.
        data: As for ``minimize``.
        batch: Rows of a minibatch.
        options: Of the evaluator.
    """

    def __init__(
        self,
        objective: Any,
        view: ParameterView,
        optimizer: Optimizer,
        data: Any,
        batch: int,
        options: EvaluationOptions | None = None,
    ) -> None:
        self.evaluator = LocalEvaluator(objective, view, options, batch_size=batch)
        samples = Samples(as_source(data, objective.collate), batch, 0)
        self._run = Run(optimizer, self.evaluator, samples, Budget(10**9, None), 0)
        self._made: list[int] = []

    def __call__(self) -> None:
        before = self.evaluator.queries
        self._run.step()
        self._made.append(self.evaluator.queries - before)

    def queries(self, calls: int) -> float:
        """Of each of the last so many steps; the first measures how far steps go, too."""
        return statistics.fmean(self._made[-calls:])


def generation(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The default step on rewards of text: one call, one at a time, and the model's own call."""
    model, texts = decoder(SIZES[name], args.device, lora=True), Texts()
    tokenizer = word_tokenizer(SIZES[name].vocabulary)
    reward = GenerationReward(model, tokenizer, texts, max_new_tokens=args.new_tokens)
    view = ParameterView.trainable(model)
    data, rows = prompts(args, SIZES[name].vocabulary), []
    step = Steps(reward, view, MeZO(), data, args.batch)
    step()
    step()
    batch = reward.collate(data * int(step.queries(1) // args.batch))

    def plain() -> Tensor:
        written: Tensor = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=args.new_tokens,
            do_sample=False,
            pad_token_id=2,
        )
        return written

    with torch.no_grad():
        base = timed(plain, args)
    found = timed(step, args)
    tokens = step.queries(args.repeats) * args.new_tokens
    why_not = step.evaluator.plan.why_not.get("joint", "")
    rows.append(row(name, "generation, default step", found, base, 1, tokens, why_not))
    if name in args.alone:
        rows.append(one_share(name, reward, view, texts, args))
    return rows


def one_share(
    name: str, reward: GenerationReward, view: ParameterView, texts: Texts, args: argparse.Namespace
) -> dict[str, Any]:
    """Eight points on four prompts: together and one at a time, in time and to the token."""
    examples = as_source(prompts(args, SIZES[name].vocabulary), reward.collate)
    share, far = Batch(examples, range(4)), 10 * view.displacement
    probes = [Probe(Shift((Term(k, far),)), share) for k in range(8)]
    seconds, written = [], []
    for joint_rows in ("auto", "off"):
        evaluator = LocalEvaluator(reward, view, EvaluationOptions(joint_rows=joint_rows))
        evaluator.evaluate(probes[:2])
        texts.written.clear()
        call = partial(evaluator.evaluate, probes)
        seconds.append(timed(call, argparse.Namespace(device=args.device, repeats=1), warm=0))
        written.append(list(texts.written))
    rows = share.content.select_rows([*range(4)] * 8)
    whole, parts = reward.generate(rows).ids, reward.generate(share.content).ids * 8
    note = f"{alike(*written)}; at one point, 32 rows or 4: {alike(whole, parts)}"
    tokens = len(rows) * args.new_tokens
    return row(name, "generation, a share alone", seconds[1], seconds[0], 1, tokens, note)


def tokens_of(args: argparse.Namespace, size: Size) -> dict[str, Tensor]:
    """Random tokens, no padding."""
    generator = torch.Generator().manual_seed(0)
    shape = args.batch, args.tokens
    ids = torch.randint(3, size.vocabulary, shape, generator=generator).to(args.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def losses(name: str, work: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps on the loss of an adapter, or of all weights."""
    is_full = work.startswith("full")
    model = decoder(SIZES[name], args.device, lora=not is_full)
    data, loss, rows = tokens_of(args, SIZES[name]), CausalLMLoss(model), []
    options = EvaluationOptions(cuda_graphs=args.graphs, joint_rows=args.joint_rows or "auto")

    def forward() -> None:
        with torch.no_grad(), loss.evaluating():
            loss(data)

    base = timed(forward, args)
    noise = "gaussian" if work == "full, Gaussian" else "lowrank"
    view = ParameterView.full(model, noise=noise) if is_full else ParameterView.trainable(model)
    optimizers: list[Optimizer] = [MeZO(), MeZOSVRG()]
    for optimizer in optimizers if work != "adamw" else ():
        step = Steps(loss, view, optimizer, data, args.batch, options)
        found, label = timed(step, args), f"{work}, {type(optimizer).__name__}()"
        queries, why_not = step.queries(args.repeats), step.evaluator.plan.why_not.get("joint", "")
        count, tokens = queries / args.batch, queries * args.tokens
        rows.append(row(name, label, found, base, count, tokens, why_not))
        del step
        free()
    if work == "adamw":
        found = timed(first_order(model, data), args)
        rows.append(
            row(name, "lora, AdamW, checkpointing", found, base, 1, args.batch * args.tokens)
        )
    return rows


def first_order(model: Any, data: dict[str, Tensor]) -> Callable[[], None]:
    """AdamW on the adapter, activations recomputed."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    tuned = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(tuned, lr=1e-4)

    def step() -> None:
        model.train()  # checkpoints are made in training mode alone
        model(**data, labels=data["input_ids"], use_cache=False).loss.backward()
        adamw.step()
        adamw.zero_grad()
        model.eval()

    return step


def row(
    name: str,
    work: str,
    found: Timed,
    base: Timed,
    count: float,
    tokens: float,
    note: str = "",
) -> dict[str, Any]:
    """One line of the table; ``count`` forwards are what the step needs."""
    made = {"model": name, "step": work} | {
        "seconds": found.seconds,
        "ratio": found.seconds / (count * base.seconds),
        "tokens/s": tokens / found.seconds,
        "peak GiB": found.peak,
        "memory ratio": found.peak / base.peak if base.peak else None,
        "note": note,
    }
    print(json.dumps(made), flush=True)
    return made


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model; one that does not fit into memory says so."""
    found: list[dict[str, Any]] = []
    for work in args.rows:
        try:
            found += generation(name, args) if work == "generation" else losses(name, work, args)
        except torch.OutOfMemoryError:
            print(json.dumps({"model": name, "step": work, "note": "out of memory"}), flush=True)
        free()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    usual = ["135M", "1B", "3B", "8B"] if on_gpu else ["tiny"]
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=usual)
    parser.add_argument("--rows", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--alone", nargs="*", default=usual[:1], help="generation one at a time")
    parser.add_argument("--graphs", choices=("auto", "on", "off"), default="auto", help="of losses")
    parser.add_argument("--joint-rows", type=int, help="of losses that share a forward")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of a text whose loss is taken")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    found = [each for name in args.sizes for each in measure(name, args)]
    print(
        "\n| model | step | s | / forwards | tokens/s | peak GiB | / forward's | |",
        "|---" * 8 + "|",
        sep="\n",
    )
    for each in found:
        memory = each["memory ratio"]
        shown = f"{each['peak GiB']:.2f} | {memory:.2f}" if memory else "- | -"
        print(
            f"| {each['model']} | {each['step']} | {each['seconds']:.3f} | {each['ratio']:.2f} | "
            f"{each['tokens/s']:.0f} | {shown} | {each['note']} |"
        )
    if args.output:
        result = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "versions": [each.__version__ for each in (torch, transformers, peft)],
            "settings": {k: str(v) for k, v in vars(args).items()},
            "rows": found,
        }
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
