"""How large the house is: files that a LoRA step crosses, loose modules, arrows, parameters, lines.

python benchmarks/structure.py                  # of the checkout that holds this file
python benchmarks/structure.py --tree FOLDER    # of another, to compare
"""

import argparse
import ast
import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def arrows(package: Path) -> set[tuple[str, str]]:
    """Pairs (room, room it imports from); a loose module is a room."""
    found = set()
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zo_adapt."):
                other = str(node.module).split(".")[1]
                if parts[0] not in (other, "__init__"):
                    found.add((parts[0], other))
    return found


def lines(folder: Path) -> int:
    """Lines of Python below a folder."""
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def crossed(package: Path) -> list[str]:
    """Files of the package with a function that one default step of a LoRA adapter runs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    from objectives import ClassificationLoss
    from zo_adapt import MeZO, ParameterView, minimize

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = get_peft_model(BertForSequenceClassification(config), LoraConfig(task_type="SEQ_CLS"))
    examples = [{"input_ids": [2, 5 + i % 2, 7], "labels": i % 2} for i in range(32)]
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_code.co_filename)

    def after(step: Any) -> None:
        sys.setprofile(note if step.step == 2 else None)  # the third step: nothing is set up in it

    view, optimizer = ParameterView.trainable(model), MeZO()
    torch.set_num_threads(1)
    minimize(
        ClassificationLoss(model), view, examples, optimizer,
        batch_size=16, max_steps=3, progress=False, callback=after,
    )  # fmt: skip
    sys.setprofile(None)
    inside = [Path(name) for name in seen if Path(name).is_relative_to(package)]
    return sorted(str(path.relative_to(package)) for path in inside)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    tree = parser.parse_args().tree.resolve()
    sys.path.insert(0, str(tree))
    package = tree / "zo_adapt"
    files = crossed(package)

    from zo_adapt import minimize

    print(f"files crossed by a LoRA step: {len(files)} ({', '.join(files)})")
    print(f"loose modules: {len([p for p in package.glob('*.py') if p.stem != '__init__'])}")
    print(f"arrows between rooms: {len(arrows(package))}")
    print(f"parameters of minimize: {len(inspect.signature(minimize).parameters)}")
    print(f"lines: {lines(package)} in zo_adapt, {lines(tree / 'objectives')} in objectives")


if __name__ == "__main__":
    main()
