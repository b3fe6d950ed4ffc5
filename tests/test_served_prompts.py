"""What is tuned beside a model that is served: mixtures of adapters, texts, the sampling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import fake_server
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from test_generation import a_tokenizer, prompts
from tiny_models import tiny_config, tiny_model, token_rows

from objectives import CausalLMLoss, GenerationReward
from zo_adapt import (
    AdapterMixture,
    AskTell,
    MeZO,
    OpenAIServer,
    ParameterView,
    PeftServer,
    ServedEvaluator,
    VLLMServer,
    answered_by,
    minimize,
    served_lora,
)
from zo_adapt.errors import NotServableError, OptionError, ServerReplyError
from zo_adapt.serve import http
from zo_adapt.serve.protocol import Candidate

GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
ROWS = [{"input_ids": row} for row in token_rows(6, 9)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.001)


def saved(folder: Path, seed: int, family: str = "llama", **options: Any) -> Path:
    """An adapter with numbers in both factors."""
    lora = LoraConfig(task_type="CAUSAL_LM", **{"r": 2, "target_modules": ["q_proj"]} | options)
    model = served_lora(tiny_config(family), lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    return folder


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


class TestMixture:
    @pytest.mark.parametrize(
        "family, one, other",
        [
            ("llama", {}, {}),
            ("llama", {"r": 3, "lora_alpha": 5}, {"target_modules": ["q_proj", "v_proj"]}),
            ("llama", {"use_rslora": True}, {"target_modules": ["o_proj"], "r": 1}),
            ("gpt2", GPT2, GPT2 | {"r": 3}),
            ("llama", {"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"]}),
        ],
        ids=["alike", "ranks and layers", "scales", "transposed", "embeddings"],
    )
    def test_is_the_sum_that_peft_makes(
        self, tmp_path: Path, family: str, one: dict[str, Any], other: dict[str, Any]
    ) -> None:
        folders = [
            saved(tmp_path / "a", 1, family, **one),
            saved(tmp_path / "b", 2, family, **other),
        ]
        base = tiny_model(family, "causal")
        mixture, server, loss = AdapterMixture(folders), PeftServer(base), CausalLMLoss(base)
        for weights in ([1.0, 0.0], [0.0, 1.0], [0.7, -0.4]):
            with mixture.answering(server, weights):
                there = np.asarray(loss(ROWS))
            whole: Any = PeftModel.from_pretrained(tiny_model(family, "causal"), folders[0], "a")
            whole.load_adapter(folders[1], "b")
            with torch.no_grad():
                for name, p in whole.named_parameters():
                    if ".lora_B." in name or ".lora_embedding_B." in name:
                        p.mul_(weights[0] if ".a." in f"{name}." else weights[1])
            whole.base_model.set_adapter(["a", "b"])
            here = CausalLMLoss(whole.eval())(ROWS).detach().numpy()
            assert there == pytest.approx(here, rel=2e-5)
        assert server.loaded() == []

    def test_weights_and_sampling_are_tuned(self, tmp_path: Path) -> None:
        """The first adapter alone is the answer: its texts are the target."""
        folders = [saved(tmp_path / name, seed) for seed, name in enumerate("ab")]
        base = tiny_model("llama", "causal")
        server, mixture, loss = PeftServer(base), AdapterMixture(folders), CausalLMLoss(base)
        with mixture.answering(server, [1.0, 0.0]):
            wanted = float(loss(ROWS).mean())

        def distance(x: Any) -> float:
            with mixture.answering(server, x["weights"]):
                return abs(float(loss(ROWS).mean()) - wanted) + abs(float(x["t"][0]) - 0.5)

        start = {"weights": np.array([0.3, 0.3]), "t": np.array([1.0])}
        asker = AskTell(MeZO(displacement=0.7), start, max_queries=150, bounds={"t": (0.1, 2.0)})
        before = distance(start)
        while candidates := asker.ask():
            asker.tell([distance(x) for x in candidates])
        assert asker.best is not None and asker.best.value < 0.3 * before

    def test_behind_a_server(self, tmp_path: Path) -> None:
        folders = [saved(tmp_path / name, seed) for seed, name in enumerate("ab")]
        mixture = AdapterMixture(folders)
        loss = CausalLMLoss(served_lora(tiny_config("llama"), folders[0]))
        with fake_server() as fake, VLLMServer(fake.url, place=tmp_path) as server:
            values = []
            for weights in ([0.0, 0.0], [1.0, 0.0], [0.5, 0.5]):
                with mixture.answering(server, weights):
                    values.append(float(loss(ROWS).mean()))
            with answered_by(server):
                assert float(loss(ROWS).mean()) == pytest.approx(values[0])
            assert len(set(values)) == 3 and not fake.loaded and len(set(fake.ever)) == 3
        with fake_server() as fake, VLLMServer(fake.url, rank=2, place=tmp_path) as server:
            with (
                pytest.raises(NotServableError, match=r"rank 4.*up to 2"),
                mixture.answering(server, [1, 1]),
            ):
                raise AssertionError("not reached")
            assert not fake.ever

    def test_a_server_that_dies_inside_hides_no_error(self, tmp_path: Path) -> None:
        mixture = AdapterMixture([saved(tmp_path / "a", 1)])
        with fake_server() as fake, VLLMServer(fake.url, place=tmp_path) as server:
            with (
                pytest.raises(ZeroDivisionError),
                mixture.answering(server, [1.0]),
            ):
                fake.faults.keeps = True
                raise ZeroDivisionError
            fake.faults.keeps = False

    @pytest.mark.parametrize(
        "options, said",
        [
            ({"use_dora": True}, "DoRA"),
            ({"rank_pattern": {"v_proj": 1}, "target_modules": ["q_proj", "v_proj"]}, "ranks"),
            ({"bias": "lora_only"}, "biases"),
        ],
    )
    def test_refuses(self, tmp_path: Path, options: dict[str, Any], said: str) -> None:
        config = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"]} | options)
        get_peft_model(tiny_model("llama", "causal"), config).save_pretrained(tmp_path)
        with pytest.raises(NotServableError, match=said):
            AdapterMixture([tmp_path])

    def test_refuses_what_is_no_lora_or_nothing(self, tmp_path: Path) -> None:
        config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
        get_peft_model(tiny_model("llama", "causal"), config).save_pretrained(tmp_path / "ia3")
        with pytest.raises(NotServableError, match="IA3"):
            AdapterMixture([tmp_path / "ia3"])
        for folders in ([], [tmp_path / "none"]):
            with pytest.raises(OptionError, match="folder"):
                AdapterMixture(folders)
        mixture = AdapterMixture([saved(tmp_path / "a", 1)])
        for weights in ([1.0, 2.0], [float("nan")], []):
            with pytest.raises(OptionError, match="1 finite"):
                mixture.at(weights)

    def test_a_slot_is_of_one_configuration(self, tmp_path: Path) -> None:
        """The same tensors under another scale are another adapter."""
        server = PeftServer(tiny_model("llama", "causal"))
        mixture, values = AdapterMixture([saved(tmp_path, 1)]), []
        for alpha in (2, 8, 2):
            config = mixture.config | {"lora_alpha": alpha}
            server.load(Candidate(f"c{len(values)}", mixture.at([1.0])), config)
            values.append(server.score([f"c{len(values)}"], [[5, 6, 7]])[0].log_probs.tolist())
            server.unload([f"c{len(values) - 1}"])
        assert values[0][1:] == values[2][1:] != values[1][1:]


class TestAnyEndpoint:
    @pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
    @pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
    def test_writes_as_the_model_that_is_behind_it(self, chat: bool, sampled: bool) -> None:
        options = {"do_sample": True, "temperature": 1.0, "seed": 3} if sampled else {}
        reward = GenerationReward(None, a_tokenizer(), lengths, max_new_tokens=6, **options)
        rows = prompts(6)
        with fake_server() as fake:
            found = []
            # Seeds are cut to what any server takes, so that vLLM's own draw others.
            other = OpenAIServer(a_tokenizer(), fake.url) if sampled else VLLMServer(fake.url)
            for server in (OpenAIServer(a_tokenizer(), fake.url, chat=chat), other):
                with answered_by(server):
                    found.append(reward.generate(rows).texts)
                server.close()
            assert [t.split() for t in found[0]] == [t.split() for t in found[1]]
            sent = [body for path, body in fake.requests if ("chat" in path) is chat]
            assert {body["model"] for body in sent} == {"toy"}

    def test_words_of_a_prompt_are_tuned(self) -> None:
        """The endings of prompts are chosen by weights; steps, so ranks."""
        reward = GenerationReward(None, a_tokenizer(), lengths, max_new_tokens=6)
        words = [f"w{i}" for i in range(3, 11)]

        def instruction(weights: np.ndarray) -> str:
            return " ".join(words[i] for i in np.argsort(weights) if weights[i] > 0)

        with fake_server() as fake, OpenAIServer(a_tokenizer(), fake.url) as server:

            def value(weights: np.ndarray) -> float:
                rows = [{"prompt": f"{row['prompt']} {instruction(weights)}"} for row in prompts(2)]
                with answered_by(server):
                    return float(reward(rows).mean())

            values = [value(np.eye(8)[i]) for i in range(8)]
            start = np.full(8, 0.1)
            optimizer = MeZO(displacement=1.0, shaping="ranks")
            asker = AskTell(optimizer, start, max_queries=30, maximize=True)
            while candidates := asker.ask():
                asker.tell([value(x) for x in candidates])
            assert asker.best is not None and asker.best.value >= min(values)
            assert asker.best.value == value(asker.best.x)

    def test_what_it_cannot_do_is_named(self) -> None:
        model = served_lora(
            tiny_config("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        )
        reward = GenerationReward(None, a_tokenizer(), lengths, max_new_tokens=2)
        with pytest.raises(NotServableError, match="given no model"):
            reward(prompts(2))
        with fake_server() as fake, OpenAIServer(a_tokenizer(), fake.url) as server:
            with answered_by(server), pytest.raises(NotServableError, match="no scores"):
                CausalLMLoss(model)(ROWS)
            with pytest.raises(NotServableError, match="takes no adapters"):
                minimize(
                    GenerationReward(model, a_tokenizer(), lengths, max_new_tokens=2),
                    ParameterView.trainable(model),
                    prompts(4),
                    batch_size=2,
                    max_steps=1,
                    progress=False,
                    evaluation=ServedEvaluator(server),
                )
            fake.faults.refuses = "x"
            with pytest.raises(ServerReplyError, match="no adapter named"):
                server.generate(["a"], [[5]], None)  # type: ignore[arg-type]

    def test_a_token_and_another_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(http.TOKEN, "secret")
        reward = GenerationReward(None, a_tokenizer(), lengths, max_new_tokens=2)
        with fake_server() as fake, OpenAIServer(a_tokenizer(), fake.url + "/v1/") as server:
            with answered_by(server):
                reward(prompts(2))
            assert {head["Authorization"] for head in fake.headers} == {"Bearer secret"}
        with pytest.raises(OptionError, match="remote=True"):
            OpenAIServer(a_tokenizer(), "https://api.example.com/v1")
