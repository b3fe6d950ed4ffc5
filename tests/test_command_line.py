"""The command line: what could be tuned, and a run from a file to an adapter with a card."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from page_models import classifier, tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification

from zo_adapt_cli import main
from zo_adapt_cli.examples import read_lines

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory'")
TASKS = {
    "soft-accuracy": "classification",
    "loss": "classification",
    "accuracy": "classification",
    "f1": "classification",
    "causal-lm": "causal",
    "exact-match": "causal",
}


def saved(folder: Path, head: str) -> str:
    tiny_model("llama" if head == "causal" else "bert", head).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def lines(path: Path, head: str, count: int = 40) -> str:
    """Texts of which the first word says the label, or the answer."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        word = "ab"[i % 2]
        text = f"{word} {'cd'[i // 2 % 2]} {'abcd'[i % 4]}"
        rows.append(
            {"prompt": text + " ", "completion": word}
            if head == "causal"
            else {"text": text, "label": ["no", "yes"][i % 2]}
        )
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return str(path)


def tune(tmp_path: Path, objective: str, *more: str, view: str = "lora") -> Path:
    torch.manual_seed(0)  # of the model that is tuned
    head = TASKS[objective]
    model, data = saved(tmp_path / "base", head), lines(tmp_path / "d.jsonl", head)
    command = (
        f"tune --model {model} --data {data} --objective {objective} --view {view} "
        f"--output_dir {tmp_path / 'out'} --max_queries 400 --use_cpu --disable_tqdm true "
        f"--save_strategy no {' '.join(more)}"
    )
    main(command.split())
    return tmp_path / "out" / ("adapter" if view == "lora" else "model")


@pytest.mark.parametrize("objective", TASKS)
def test_a_run_ends_with_an_adapter_and_a_card(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tune(tmp_path, objective)
    card = (folder / "README.md").read_text()
    assert card.startswith("---"), "peft's own card comes first"
    assert f"| objective | {objective} |" in card
    assert "32 examples tuned on, 8 held out" in card
    assert re.search(r"; displacement [\d.e-]+, found by forward passes \|", card)
    assert "queries (forwards of one sample)" in card
    assert (folder / "adapter_model.safetensors").exists()
    assert "->" in capsys.readouterr().out
    assert (tmp_path / "out" / "trajectory.zot").exists()


@pytest.mark.parametrize("view", ["lora", "last-layers", "full"])
def test_what_is_saved_is_what_was_tuned(view: str, tmp_path: Path) -> None:
    folder = tune(tmp_path, "loss", "--layers", "1", view=view)
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    if view == "lora":
        after: Any = PeftModel.from_pretrained(before, folder)
        assert any(p.any() for name, p in after.named_parameters() if "lora_B" in name)
    else:
        after = AutoModelForSequenceClassification.from_pretrained(folder)
        pairs = zip(after.parameters(), before.parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs)
        assert after.config.id2label == {0: "no", 1: "yes"}
    assert "| labels | 0: no, 1: yes |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("rows", [None, 0, 5])
def test_an_adapter_starts_where_the_texts_are_unless_it_is_not_to(
    rows: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = () if rows is None else ("--lora_start_rows", str(rows))
    folder = tune(tmp_path, "loss", "--disable_tqdm", "false", *more)
    taken = 32 if rows is None else rows  # of 128 those that there are
    said = f"from the inputs of {taken} examples: {taken} forwards of one sample"
    assert (said in capsys.readouterr().err) == bool(taken)
    card = (folder / "README.md").read_text()
    assert (f" steps; {taken} more for the adapter's A |" in card) == bool(taken)
    assert (tmp_path / "out" / "initial_adapter").exists() == bool(taken)


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    saving = ("--save_strategy", "steps", "--save_steps", "1", "--displacement", "0.25")
    folder = tune(tmp_path, "loss", *saving)
    whole = load_file(folder / "adapter_model.safetensors")
    shutil.rmtree(folder)
    first, *later = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert later
    for checkpoint in later:  # as if it had been killed after its first step
        shutil.rmtree(checkpoint)
    tune(tmp_path, "loss", *saving, "--resume_from_checkpoint", "true")
    again = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    saved_first = load_file(first / "adapter_model.safetensors")
    assert any(not torch.equal(whole[name], saved_first[name]) for name in whole)
    assert "steps; " not in (folder / "README.md").read_text(), "A was made before"


def test_other_views_have_no_such_start_and_may_be_spelled_as_in_python(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no LoRA on a linear layer"):
        tune(tmp_path, "loss", "--lora_start_rows", "8", view="last_layers")
    folder = tune(tmp_path, "soft-accuracy", "--layers", "1", view="last_layers")
    assert "| view | last-layers: " in (folder / "README.md").read_text()


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    file = tmp_path / "rows.jsonl"
    for end in ("\n", "\r\n"):
        text = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_bytes(text.encode())
        assert read_lines(file) == rows


def test_faults_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 0}\n{"text": ')
    with pytest.raises(SystemExit, match="line 2"):
        main(["tune", "--model", "none", "--data", str(tmp_path / "broken.jsonl")])
    (tmp_path / "fields.jsonl").write_text('{"words": "a"}\n' * 4)
    with pytest.raises(SystemExit, match="needs 'text'"):
        model = saved(tmp_path / "base", "classification")
        main(["tune", "--model", model, "--data", str(tmp_path / "fields.jsonl")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["tune", "--model", "none"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3, "and not a line for each of Trainer's options"
    assert said[-1] == "zo-adapt tune: error: --data is needed"
    with pytest.raises(SystemExit, match="no command 'tone'"):
        main(["tone"])


def test_info_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", saved(tmp_path, "classification")])
    said = capsys.readouterr().out
    model = tiny_model("bert")
    assert f"{sum(p.numel() for p in model.parameters()):,} weights" in said
    assert "LoRA, r=8" in said
    assert "last 2 and head" in said
    assert "128 queries" in said


def test_info_of_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = classifier()
    adapter.save_pretrained(tmp_path)
    main(["info", str(tmp_path)])
    said = capsys.readouterr().out
    count = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert f"{count:,} scalars" in said
    assert "r=2, on ['query', 'value']" in said


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zo_adapt", "--help"], capture_output=True, text=True, check=True
    )
    assert "zo-adapt info MODEL_OR_ADAPTER" in done.stdout
