"""Which model families and which of peft's tuners can be tuned, and what is refused by which error.

All of ``FAMILIES`` x ``VIEWS`` and of ``TUNERS`` can be: a probe restores every bit, three steps
run, every tensor of the view that is read moves and no other does, and the trajectory replayed on a
fresh model gives the same weights. ``REFUSED`` lists what cannot, with the named error.

``python benchmarks/families.py`` prints the same as a table.
"""

from pathlib import Path

import peft
import pytest
import transformers
from many_families import FAMILIES, check
from many_views import REFUSED, TUNERS, VIEWS, mixture, tuner_of, view_of

from objectives import ClassificationLoss
from zo_adapt import MeZO, ParameterView, minimize
from zo_adapt.errors import AdapterError

pytestmark = [
    # peft reads an attribute of transformers by its former name
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::zo_adapt.errors.UnreadTensorWarning"),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str, view: str) -> None:
    check(lambda: view_of(family, view), FAMILIES[family][0], tmp_path)


@pytest.mark.parametrize("tuner", TUNERS)
def test_tuners(tmp_path: Path, tuner: str) -> None:
    try:
        TUNERS[tuner]()
    except AttributeError as missing:
        if missing.obj is not peft:
            raise
        pytest.skip(f"peft {peft.__version__} has no {missing.name}")
    check(*tuner_of(tuner), tmp_path)


def test_a_mixture_of_saved_adapters(tmp_path: Path) -> None:
    check(mixture(tmp_path), "next", tmp_path)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tuned_is_named(tmp_path: Path, case: str) -> None:
    make, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        check(make, "next", tmp_path)


@pytest.mark.parametrize(
    ("family", "tuner"), [("MPNet", "prefix"), ("Bart", "prefix"), ("Bart", "prompt")]
)
def test_a_family_that_peft_cannot_put_virtual_tokens_before_is_named(
    family: str, tuner: str
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "Bart":
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_labels": 2}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=50, **sizes)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    kind = peft.PrefixTuningConfig if tuner == "prefix" else peft.PromptTuningConfig
    tuned = peft.get_peft_model(model, kind(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(AdapterError, match="behind 2 virtual tokens"):
        minimize(
            ClassificationLoss(tuned),
            ParameterView.trainable(tuned),
            [{"input_ids": [5, 6, 7, 2], "label": row % 2} for row in range(8)],
            MeZO(displacement=0.1),
            batch_size=4,
            max_steps=1,
            progress=False,
        )
