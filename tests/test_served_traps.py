"""What goes wrong with served models: each trap has a name, and nothing is left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import Fake, fake_server
from peft import LoraConfig, get_peft_model
from test_generation import a_tokenizer
from test_served import QUIET, hollow, objective_of, texts, tune
from tiny_models import tiny_config, tiny_model

from objectives import CausalLMLoss
from zo_adapt import (
    MeZO,
    OpenAIServer,
    ParameterView,
    ServedEvaluator,
    VLLMServer,
    ZOConfig,
    ZOTrainer,
    minimize,
    served_lora,
)
from zo_adapt.errors import (
    NotServableError,
    OptionError,
    SelfTestError,
    ServedModelError,
    ServerReplyError,
)
from zo_adapt.serve import http
from zo_adapt.serve.peft_server import PeftServer
from zo_adapt.serve.protocol import Writing
from zo_adapt.serve.start_command import main

Connect = Callable[..., VLLMServer]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.001)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        yield server


@pytest.fixture
def connected(fake: Fake, tmp_path: Path) -> Iterator[Connect]:
    """Makes clients of the fake, which are closed at the end."""
    made: list[VLLMServer] = []

    def connect(**options: Any) -> VLLMServer:
        made.append(VLLMServer(fake.url, place=tmp_path / "folders", **options))
        return made[-1]

    yield connect
    for server in made:
        server.close()


def with_config(**options: Any) -> Any:
    """A whole model with an adapter of any kind."""
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    return get_peft_model(tiny_model("llama", "causal"), LoraConfig(**given)).eval()


def view_of_lora(model: Any) -> ParameterView:
    return ParameterView.matching(model, "lora_")


NOT_SERVABLE = [
    ({"use_dora": True}, "DoRA"),
    ({"bias": "lora_only"}, "tuned biases"),
    ({"bias": "all"}, "tuned biases"),
    ({"lora_bias": True}, "LoRA with biases"),
    ({"modules_to_save": ["lm_head"]}, "saved beside"),
    ({"modules_to_save": ["norm"]}, "saved beside"),
    ({"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}, "target_parameters"),
    ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
    ({"rank_pattern": {"v_proj": 1}}, "ranks that differ"),
    ({"alpha_pattern": {"v_proj": 1}}, "scales that differ"),
    ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ({"target_modules": ["embed_tokens"]}, "input embedding"),
    ({"init_lora_weights": "pissa"}, "moved the base"),
    ({"init_lora_weights": "olora"}, "moved the base"),
    ({"r": 9}, "rank 9.*up to 8"),
    ({"target_modules": ["q_proj", "o_proj"]}, "o_proj.*adapts"),
]
SERVABLE = [
    {"use_rslora": True},
    {"lora_alpha": 3},
    {"init_lora_weights": "gaussian"},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"exclude_modules": ["v_proj"]},
    {"target_modules": r".*\.q_proj"},
    {"r": 8},
]


class TestAdapters:
    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
    @pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
    @pytest.mark.parametrize("options, said", NOT_SERVABLE, ids=lambda value: str(value)[:40])
    def test_what_vllm_cannot_run_is_named_before_any_work(
        self, fake: Fake, connected: Connect, options: dict[str, Any], said: str
    ) -> None:
        model = with_config(**options)
        server = connected(rank=8, target_modules=["q_proj", "v_proj"])
        with pytest.raises(NotServableError, match=said):
            minimize(
                CausalLMLoss(model),
                view_of_lora(model),
                texts(),
                MeZO(lr=1e-3),
                max_steps=1,
                evaluation=ServedEvaluator(server),
                **QUIET,
            )
        assert not fake.requests

    @pytest.mark.parametrize("options", SERVABLE, ids=lambda value: str(value)[:40])
    def test_the_rest_is_served(
        self, fake: Fake, connected: Connect, options: dict[str, Any]
    ) -> None:
        model = with_config(**options)
        server = connected(rank=8, target_modules=["q_proj", "v_proj"])
        assert tune(model, server, steps=1, self_test=True).steps == 1
        assert fake.ever and not fake.loaded
        assert tune(model, PeftServer(model), steps=1, self_test=True).steps == 1


class TestSelfTest:
    @pytest.mark.parametrize(
        "kind, faults, part, said",
        [
            ("loss", {"of_its_own": 0.5}, 2, "whose B is zero"),
            ("loss", {"uneven": 0.5}, 3, "under two names"),
            ("loss", {"keeps": True}, 6, "cannot be unloaded .*in use"),
            ("loss", {"lists": True}, 7, "left on the server"),
            ("verbalizer", {"lies": "positive"}, 1, "above 0"),
            ("verbalizer", {"lies": "nan"}, 1, "not finite"),
            ("verbalizer", {"lies": "null"}, 1, "cannot be read"),
            ("verbalizer", {"lies": "words"}, 1, "cannot be read"),
            ("verbalizer", {"of_its_own": 0.5}, 2, "whose B is zero"),
            ("verbalizer", {"uneven": 0.5}, 3, "under two names"),
            ("verbalizer", {"ignores": True}, 4, "not applied"),
            ("greedy", {"ignores": True}, 4, "not applied"),
            ("greedy", {"dies_after": 3}, 2, "a text cannot be scored"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_refuses_by_name(
        self,
        fake: Fake,
        connected: Connect,
        kind: str,
        faults: dict[str, Any],
        part: int,
        said: str,
    ) -> None:
        for name, value in faults.items():
            setattr(fake.faults, name, value)
        model = hollow()
        objective, rows = objective_of(kind, model)
        view = ParameterView.trainable(model)
        before = view.hash()
        with pytest.raises(SelfTestError, match=rf"self-test \d .*{said}") as raised:
            minimize(
                objective, view, rows, max_steps=1, evaluation=ServedEvaluator(connected()), **QUIET
            )
        assert "dies_after" in faults or f"self-test {part} " in str(raised.value)
        assert view.hash() == before
        fake.faults.keeps = False


@pytest.mark.parametrize(
    "kind, lies, said",
    [
        ("loss", "tokens", "other tokens"),
        ("loss", "short", "prompt_logprobs"),
        ("loss", "positive", "above 0"),
        ("loss", "null", "cannot be read"),
        ("loss", "words", "cannot be read"),
        ("loss", "cut", "answered 200"),
        ("greedy", "long", "8 tokens where at most 5"),
        ("greedy", "cut", "answered 200"),
        ("verbalizer", "cut", "answered 200"),
        ("verbalizer", "positive", "above 0"),
        ("verbalizer", "null", "cannot be read"),
        ("verbalizer", "words", "cannot be read"),
        ("greedy", "words", "cannot be read"),
        ("greedy", "null", "cannot be read"),
        ("greedy", "positive", "tokens below 0"),
        ("sampled", "positive", "tokens below 0"),
        ("sampled", "long", "8 tokens where at most 5"),
        ("soft match", "positive", "above 0"),
    ],
)
def test_lies_in_the_middle_of_a_run(
    fake: Fake, connected: Connect, kind: str, lies: str, said: str
) -> None:
    model = hollow()
    objective, rows = objective_of(kind, model)
    view, kept = ParameterView.trainable(model), []

    def lie(step: Any) -> None:
        kept.append(view.hash())
        fake.faults.lies = lies

    with pytest.raises(ServerReplyError, match=said):
        minimize(
            objective,
            view,
            rows,
            MeZO(lr=1e-3),
            max_steps=4,
            callback=lie,
            evaluation=ServedEvaluator(connected()),
            **QUIET,
        )
    assert len(kept) == 1 and view.hash() == kept[0] and not fake.loaded


RUN = """
import sys
from test_served import CausalLMLoss, MeZO, ParameterView, QUIET, ServedEvaluator, VLLMServer
from test_served import hollow, minimize, texts
url, place, path = sys.argv[1:]
minimize(
    CausalLMLoss(model := hollow()), ParameterView.trainable(model), texts(), MeZO(lr=1e-3),
    max_steps=40, trajectory=path, resume=True,
    evaluation=ServedEvaluator(VLLMServer(url, place=place)), **QUIET,
)
"""


def test_a_killed_run_goes_on_as_if_nothing_had_been(fake: Fake, tmp_path: Path) -> None:
    def whole(name: str) -> tuple[str, bytes]:
        view = ParameterView.trainable(model := hollow())
        with VLLMServer(fake.url, place=tmp_path) as server:
            minimize(
                CausalLMLoss(model),
                view,
                texts(),
                MeZO(lr=1e-3),
                max_steps=40,
                trajectory=tmp_path / name,
                resume=True,
                evaluation=ServedEvaluator(server),
                **QUIET,
            )
        return view.hash(), (tmp_path / name).read_bytes()

    fake.faults.slow = 0.005
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, fake.url, str(tmp_path), str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(here)},
    )
    while child.poll() is None and not (fake.completions > 100 and fake.loaded):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    fake.faults.slow = 0.0
    assert fake.loaded  # of the client that is dead
    assert whole("killed") == whole("whole")
    assert not fake.loaded and not list(tmp_path.rglob("*.safetensors"))


def test_a_trainer_goes_on_from_a_checkpoint(
    fake: Fake, connected: Connect, tmp_path: Path
) -> None:
    def trained(folder: str, resume: str | None = None) -> str:
        model = hollow()
        settings: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = ZOConfig(
            str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            optimizer="mezo",
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            **settings,
        )
        trainer = ZOTrainer(
            model,
            args,
            train_dataset=texts(),
            objective=CausalLMLoss(model),
            evaluator=ServedEvaluator(connected()),
        )
        trainer.train(resume_from_checkpoint=resume)
        assert not fake.loaded
        return ParameterView.trainable(model).hash()

    whole = trained("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    assert trained("again", str(tmp_path / "again" / "checkpoint-2")) == whole


class TestToken:
    @pytest.mark.parametrize("status", [400, 401, 403, 500])
    def test_is_never_said(
        self,
        fake: Fake,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
        status: int,
    ) -> None:
        monkeypatch.setenv(http.TOKEN, "hf_very-secret\n")
        caplog.set_level(0)
        server = VLLMServer(fake.url, place=tmp_path)
        tune(hollow(), server, steps=1, trajectory=tmp_path / "run")
        assert {head["Authorization"] for head in fake.headers} == {"Bearer hf_very-secret"}
        fake.faults.echoes = status
        with pytest.raises(ServedModelError) as raised:
            tune(hollow(), server, steps=1)
        server.close()
        said = f"{raised.value!r} {raised.value.__cause__!r} {caplog.text}"
        assert "secret" not in said and (http.TOKEN in said) is (status in (401, 403))
        assert b"secret" not in (tmp_path / "run").read_bytes()

    @pytest.mark.parametrize("token", ["one\ntwo", "schlüssel", "a\tb"])
    def test_that_cannot_be_sent_is_refused(
        self, fake: Fake, monkeypatch: pytest.MonkeyPatch, token: str
    ) -> None:
        monkeypatch.setenv(http.TOKEN, token)
        with pytest.raises(OptionError, match=http.TOKEN) as raised:
            http.Connection(fake.url)
        assert token not in str(raised.value) and not fake.requests


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://127.0.0.1:port",
        "http://localhost.example.com",
        "http://127.0.0.1\\@example.com",
        "http://2130706433",
        "http://[::ffff:8.8.8.8]:8000",
        "http://192.168.0.1:8000",
        "ftp://me:secret@127.0.0.1",
        "http://me:secret@127.0.0.1:port",
        "",
        None,
    ],
)
def test_what_is_no_address_of_this_machine(url: Any) -> None:
    with pytest.raises(OptionError) as raised:
        VLLMServer(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "hollow"])
def test_a_function_that_runs_the_model_itself_is_refused(whole: bool) -> None:
    model = with_config() if whole else hollow()

    def own_loss(batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(**batch, labels=batch["input_ids"]).loss
        return found

    with pytest.raises(NotServableError, match="this process"):
        minimize(
            own_loss,
            view_of_lora(model),
            {"input_ids": torch.ones(8, 4, dtype=torch.long)},
            max_steps=1,
            evaluation=ServedEvaluator(PeftServer(tiny_model("llama", "causal"))),
            **QUIET,
        )


class TestWriting:
    @pytest.mark.parametrize(
        "more, said",
        [
            ({"num_beams": 2}, "num_beams"),
            ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
            ({"suppress_tokens": [5]}, "suppress_tokens"),
        ],
    )
    def test_options_that_a_server_would_ignore_are_refused(
        self, fake: Fake, connected: Connect, more: dict[str, Any], said: str
    ) -> None:
        for server in (connected(), OpenAIServer(a_tokenizer(), fake.url)):
            with pytest.raises(NotServableError, match=said):
                server.generate([""], [[5, 6]], Writing(3, more=more))
            server.close()
        assert not fake.requests

    def test_those_it_knows_have_its_names(self, fake: Fake, connected: Connect) -> None:
        more = {"min_new_tokens": 2, "repetition_penalty": 1.2, "num_beams": 1, "min_p": None}
        connected().generate([""], [[5, 6]], Writing(3, more=more))
        body = fake.requests[-1][1]
        assert (body["min_tokens"], body["repetition_penalty"]) == (2, 1.2)
        assert not {"num_beams", "min_p", "min_new_tokens"} & body.keys()


class TestCommand:
    def test_of_a_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["some/model", "--rank", "9", "--targets", "o_proj", "--cpu"]) == 0
        said = capsys.readouterr().out
        for part in ("--model some/model", "--max-lora-rank 16", "--lora-target-modules o_proj"):
            assert part in said
        assert "VLLM_CPU_KVCACHE_SPACE" in said and "127.0.0.1" in said

    @pytest.mark.parametrize(
        "words, said",
        [
            (["--rank", "2"], "has rank 4"),
            (["--adapters", "0"], "adapters=0"),
            (["--targets", "lm_head"], "lm_head"),
            (["--rank", "0"], "rank=0"),
        ],
    )
    def test_refused(
        self, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        served_lora(tiny_config("llama"), lora).save_pretrained(tmp_path)  # type: ignore[operator]
        with pytest.raises(SystemExit) as raised:
            main([str(tmp_path), "--model", "base", *words])
        assert raised.value.code == 2 and re.search(said, capsys.readouterr().err)

    def test_a_folder_that_is_not_there(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main([str(tmp_path / "none")])
        assert "no folder" in capsys.readouterr().err
