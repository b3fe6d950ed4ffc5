"""Models behind a server: the same run as here, every trap named, nothing left behind."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import Fake, embeddings, fake_server
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_candidates import with_lora
from test_generation import a_tokenizer
from tiny_models import tiny_config, tiny_model, token_rows

from objectives import (
    CausalLMLoss,
    ClassificationLoss,
    ExactMatch,
    GenerationReward,
    VerbalizerLoss,
)
from zo_adapt import MeZO, MeZOSVRG, ParameterView, ZOConfig, ZOTrainer, minimize
from zo_adapt.data.sources import Batch, as_source
from zo_adapt.errors import (
    NotServableError,
    OptionError,
    SelfTestError,
    ServedModelError,
    ServerLostError,
    ServerReplyError,
)
from zo_adapt.evaluation.local import LocalEvaluator
from zo_adapt.evaluation.options import EvaluationOptions
from zo_adapt.evaluation.protocol import Probe
from zo_adapt.serve import http
from zo_adapt.serve.evaluator import ServedEvaluator
from zo_adapt.serve.loaded_adapters import Folders
from zo_adapt.serve.peft_server import PeftServer
from zo_adapt.serve.pool import ServerPool
from zo_adapt.serve.protocol import Writing
from zo_adapt.serve.skeleton import served_lora, served_prompt
from zo_adapt.serve.soft_prompt import begun_with
from zo_adapt.serve.start_command import main
from zo_adapt.serve.vllm_server import VLLMServer
from zo_adapt.term import HERE, Shift, Term

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4}
FAMILIES = ("llama", "gpt2", "opt", "qwen2")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.001)


_servers: list[VLLMServer] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while _servers:
        _servers.pop().close()


def vllm(url: str, **options: Any) -> VLLMServer:
    _servers.append(VLLMServer(url, **options))
    return _servers[-1]


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        yield server


def texts(rows: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": row} for row in token_rows(rows, 9)]


def labelled(rows: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": row, "label": i % 2} for i, row in enumerate(token_rows(rows, 9))]


def with_completions(rows: int = 8) -> list[dict[str, Any]]:
    return [
        {"input_ids": row, "labels": [-100] * (len(row) - 1) + row[-1:]}
        for row in token_rows(rows, 9)
    ]


def hollow(**options: Any) -> Any:
    """An adapter here, its base on the fake server."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    return served_lora(tiny_config("llama"), lora)


def seeded_lora(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return with_lora(family)


def tune(model: Any, server: Any, steps: int = 4, **options: Any) -> Any:
    view = ParameterView.trainable(model)
    evaluator = ServedEvaluator(server, self_test=options.pop("self_test", False))
    return minimize(
        CausalLMLoss(model),
        view,
        texts(),
        options.pop("optimizer", MeZO(lr=1e-3)),
        max_steps=steps,
        evaluation=evaluator,
        **QUIET | options,
    )


def probes(source: Any) -> list[Probe]:
    first, second = Batch(source, range(4)), Batch(source, range(4, 8))
    shift = Shift((Term(1, 0.05),))
    return [
        Probe(HERE, first),
        Probe(shift, first),
        Probe(Shift((Term(2, -0.05), Term(3, 0.02)), 0.9), second),
        Probe(shift, second),
    ]


def objective_of(kind: str, model: Any) -> tuple[Any, list[dict[str, Any]]]:
    if kind == "loss":
        return CausalLMLoss(model), texts()
    if kind == "token":
        return CausalLMLoss(model, reduction="token"), with_completions()
    if kind == "verbalizer":
        return VerbalizerLoss(model, [7, 9, 11]), labelled()
    if kind == "match":
        return ExactMatch(model), with_completions()
    if kind == "soft match":
        return ExactMatch(CausalLMLoss(model), softness=0.5), with_completions()
    if kind == "sum":
        return CausalLMLoss(model) + 0.5 * CausalLMLoss(model, reduction="sum"), texts()

    def reward(completion_ids: Any, **columns: Any) -> list[float]:
        return [float(np.mean(ids)) for ids in completion_ids]

    prompts = [
        {"prompt": " ".join(f"w{t}" for t in row), "id": i}
        for i, row in enumerate(token_rows(8, 9))
    ]
    sampled = {"do_sample": True, "seed": 5} if kind == "sampled" else {}
    if kind == "stops":
        sampled = {"generation_kwargs": {"stop_strings": ["w7", "w9 w1"]}}
    tokenizer = a_tokenizer()
    tokenizer.add_tokens("abcdef")  # transformers looks at how this text goes on with each token
    return GenerationReward(model, tokenizer, reward, max_new_tokens=5, **sampled), prompts


KINDS = ("loss", "token", "verbalizer", "match", "soft match", "sum", "greedy", "stops")


class TestInProcess:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_the_values_of_the_model_itself(self, family: str, kind: str) -> None:
        model = with_lora(family)
        with torch.no_grad():
            for index, (name, p) in enumerate(model.named_parameters()):
                if "lora_B" in name:
                    p.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(index))
        objective, rows = objective_of(kind, model)
        view, source = ParameterView.trainable(model), as_source(rows, objective.collate)
        before, names = view.hash(), [name for name, _ in model.named_parameters()]
        random = torch.get_rng_state()
        served = ServedEvaluator(PeftServer(model), self_test=False).bound_to(
            objective, view, EvaluationOptions(), batch_size=4
        )
        there = served.evaluate(probes(source))
        here = LocalEvaluator(objective, view, EvaluationOptions(joint_rows="off"))
        for one, other in zip(there, here.evaluate(probes(source)), strict=True):
            assert one.value == pytest.approx(other.value, rel=2e-5, abs=2e-6)
            assert np.shape(one.per_example) == np.shape(other.per_example)
        assert served.queries == here.queries == 16
        assert view.hash() == before
        assert [name for name, _ in model.named_parameters()] == names
        assert torch.equal(torch.get_rng_state(), random)

    def test_sampled_texts_are_a_function_of_their_seeds(self) -> None:
        server = PeftServer(with_lora("llama"))
        writing = Writing(6, temperature=1.0)
        one = server.generate(["", ""], [[5, 6], [7, 8]], writing, [1, 2])
        other = server.generate(["", ""], [[7, 8], [5, 6]], writing, [2, 1])
        assert one == other[::-1] and one != server.generate([""] * 2, [[5, 6], [7, 8]], writing)

    def test_a_run_moves_as_one_without_a_server(self) -> None:
        found = []
        for server in (None, PeftServer):
            model = seeded_lora("llama")
            view = ParameterView.trainable(model)
            by = EvaluationOptions() if server is None else ServedEvaluator(server(model))
            result = minimize(
                CausalLMLoss(model),
                view,
                texts(),
                max_steps=6,
                evaluation=by,
                metrics={"match": ExactMatch(model, softness=1.0)},
                **QUIET,
            )
            found.append((view.snapshot(), result))
        (one, local), (other, served) = found
        assert local.queries == served.queries
        assert served.metrics["match"] == pytest.approx(local.metrics["match"], rel=1e-3)
        moved = max(float(t.abs().max()) for t in one.values())
        for name, tensor in one.items():
            assert float((tensor - other[name]).abs().max()) < 1e-2 * moved

    def test_a_base_without_an_adapter_will_do(self) -> None:
        base = tiny_model("llama", "causal")
        server = PeftServer(base)
        model = hollow()
        result = tune(model, server, self_test=True)
        assert result.steps == 4 and not hasattr(base, "peft_config")

    def test_limits_are_kept_to(self) -> None:
        model = with_lora("llama")
        server = PeftServer(model, adapters=2)
        result = tune(model, server, optimizer=MeZOSVRG(lr=1e-3))
        assert result.steps == 4 and result.evaluation.candidates == 2

    def test_refuses_a_loss_that_runs_the_model_itself(self) -> None:
        model = with_lora("gpt2")
        sequence = ClassificationLoss(model)
        with pytest.raises(NotServableError, match="ClassificationLoss runs the model itself"):
            minimize(
                sequence,
                ParameterView.trainable(model),
                labelled(),
                max_steps=1,
                evaluation=ServedEvaluator(PeftServer(model)),
                **QUIET,
            )

    def test_refuses_a_function_that_asks_nothing(self) -> None:
        model = with_lora("gpt2")
        with pytest.raises(NotServableError, match="asked the served model nothing"):
            minimize(
                lambda batch: 1.0,
                ParameterView.trainable(model),
                torch.zeros(8, 2),
                max_steps=1,
                evaluation=ServedEvaluator(PeftServer(model)),
                **QUIET,
            )

    @pytest.mark.filterwarnings(
        "ignore:Model has `tie_word_embeddings=True`:UserWarning"
    )  # peft 0.18
    @pytest.mark.parametrize(
        "options, said",
        [
            ({"use_dora": True}, "DoRA"),
            ({"bias": "lora_only"}, "biases"),
            ({"modules_to_save": ["lm_head"]}, "saved beside|no matrix"),
            ({"use_qalora": True}, "QA-LoRA"),
        ],
    )
    def test_refuses_adapters_it_cannot_run(self, options: dict[str, Any], said: str) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        model = get_peft_model(tiny_model("llama", "causal"), config).eval()
        with pytest.raises(NotServableError, match=said):
            tune(model, PeftServer(model))


class TestServer:
    def test_a_run_leaves_nothing_behind(self, fake: Fake, tmp_path: Path) -> None:
        server = vllm(fake.url, place=tmp_path)
        result = tune(hollow(), server, self_test=True, optimizer=MeZOSVRG(lr=1e-3))
        server.close()
        assert result.steps == 4
        assert not fake.loaded and len(set(fake.ever)) == len(fake.ever)
        assert fake.most <= 8 and set(fake.modes) == {0o700}
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_the_same_run_twice_and_resumed(self, fake: Fake, tmp_path: Path) -> None:
        ends = []
        for name, steps in (("whole", [6]), ("parts", [3, 6])):
            for until in steps:
                model = hollow()
                view = ParameterView.trainable(model)

                def stop(step: Any, until: int = until) -> None:
                    if step.step == until:
                        raise StopIteration

                minimize(
                    CausalLMLoss(model),
                    view,
                    texts(),
                    MeZOSVRG(lr=1e-3),
                    max_steps=6,
                    evaluation=ServedEvaluator(vllm(fake.url)),
                    callback=stop,
                    trajectory=tmp_path / name,
                    resume=True,
                    **QUIET,
                )
            ends.append(view.hash())
        assert ends[0] == ends[1]
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()

    @pytest.mark.parametrize("kind", ["verbalizer", "soft match", "greedy", "sampled"])
    def test_other_objectives(self, fake: Fake, kind: str) -> None:
        model = hollow()
        objective, rows = objective_of(kind, model)
        values = []
        for _ in range(2):
            model = hollow()
            objective, rows = objective_of(kind, model)
            result = minimize(
                objective,
                ParameterView.trainable(model),
                rows,
                MeZO(lr=1e-3),
                max_steps=2,
                evaluation=ServedEvaluator(vllm(fake.url)),
                **QUIET,
            )
            values.append([step.value for step in result.history])
        assert values[0] == values[1] and len(values[0]) == 2

    def test_an_old_server_chooses_as_well(self, fake: Fake) -> None:
        server, found = vllm(fake.url), []
        for old in (False, True):
            fake.faults.old = old
            found.append(server.choose(["", ""], [[5, 6], [7]], [9, 11, 13]))
        assert found[0].shape == (2, 3) and np.array_equal(*found)

    @pytest.mark.parametrize("faults", [{"busy": 3}, {"lost": 2}, {"shuffled": True}])
    def test_survives(self, fake: Fake, faults: dict[str, Any]) -> None:
        wanted = tune(hollow(), vllm(fake.url))
        for name, value in faults.items():
            setattr(fake.faults, name, value)
        found = tune(hollow(), vllm(fake.url))
        assert [step.value for step in found.history] == [step.value for step in wanted.history]
        assert not fake.loaded

    def test_dies_in_the_middle_of_a_step(self, fake: Fake, tmp_path: Path) -> None:
        model = hollow()
        view = ParameterView.trainable(model)
        kept: dict[int, Any] = {}

        def keep(step: Any) -> None:
            kept[step.step] = view.hash()

        fake.faults.dies_after = 20
        with pytest.raises(ServedModelError, match=r"out of memory|in vain"):
            minimize(
                CausalLMLoss(model),
                view,
                texts(),
                MeZO(lr=1e-3),
                max_steps=6,
                callback=keep,
                evaluation=ServedEvaluator(vllm(fake.url), self_test=False),
                trajectory=tmp_path / "run",
                **QUIET,
            )
        assert view.hash() == kept[max(kept)]
        with fake_server() as again:
            found = [
                minimize(
                    CausalLMLoss(model),
                    ParameterView.trainable(model),
                    texts(),
                    MeZO(lr=1e-3),
                    max_steps=6,
                    trajectory=tmp_path / name,
                    resume=True,
                    evaluation=ServedEvaluator(vllm(again.url), self_test=False),
                    **QUIET,
                )
                for name in ("run", "other")
                for model in [hollow()]
            ]
        assert [s.value for s in found[0].history] == [s.value for s in found[1].history]

    def test_gives_nan_in_the_middle_of_a_run(self, fake: Fake) -> None:
        def lie(step: Any) -> None:
            fake.faults.lies = "nan"

        model = hollow()
        view = ParameterView.trainable(model)
        result = tune(model, vllm(fake.url), callback=lie)
        assert result.steps == 1 and "not finite" in result.message and not fake.loaded
        assert all(bool(tensor.isfinite().all()) for tensor in view.tensors.values())

    def test_is_slow(self, fake: Fake) -> None:
        fake.faults.slow = 0.5
        with pytest.raises(ServerLostError, match=r"did not answer in time.*raise timeout"):
            tune(hollow(), vllm(fake.url, timeout=0.1))

    @pytest.mark.parametrize(
        "faults, part, said",
        [
            ({"lies": "tokens"}, 1, "other tokens"),
            ({"lies": "short"}, 1, "prompt_logprobs"),
            ({"lies": "nan"}, 1, "not finite"),
            ({"lies": "positive"}, 1, "above 0"),
            ({"misnumbered": True}, 1, "answered 2 texts"),
            ({"ignores": True}, 4, "not applied"),
            ({"leaves_out": "v_proj"}, 4, "adapter of v_proj: it is not applied there"),
            ({"stale": True}, 4, "not applied"),
            ({"company": True}, 4, "order of the texts"),
            ({"swaps": True}, 1, "cannot be scored"),
            ({"coarse": 2.0}, 5, "rounding"),
            ({"sticky": True}, 6, "stale"),
        ],
        ids=lambda value: str(value)[:24],
    )
    def test_self_test_refuses(
        self, fake: Fake, faults: dict[str, Any], part: int, said: str
    ) -> None:
        for name, value in faults.items():
            setattr(fake.faults, name, value)
        with pytest.raises(SelfTestError, match=f"self-test {part} .*{said}"):
            tune(hollow(), vllm(fake.url), self_test=True)
        assert not fake.loaded

    def test_a_coarse_server_is_perturbed_further(self, fake: Fake) -> None:
        fake.faults.coarse = 2e-2
        model = hollow()
        view = ParameterView.trainable(model)
        evaluator = ServedEvaluator(vllm(fake.url))
        optimizer = MeZO(lr=1e-3)
        minimize(
            CausalLMLoss(model),
            view,
            texts(),
            optimizer,
            max_steps=1,
            evaluation=evaluator,
            **QUIET,
        )
        report = evaluator.report
        assert report is not None and report.raised > 0 and report.signal >= 0.9
        assert "times the usual one" in str(report)
        assert optimizer.perturbation_scale >= report.perturbation_scale

    def test_names_a_refused_load(self, fake: Fake) -> None:
        fake.faults.refuses = "LoRA rank 4 is greater than max_lora_rank 2"
        with pytest.raises(ServerReplyError, match="rank 4 is greater"):
            tune(hollow(), vllm(fake.url))
        fake.faults.refuses, fake.faults.no_runtime = "", True
        with pytest.raises(NotServableError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            tune(hollow(), vllm(fake.url))

    @pytest.mark.parametrize("kind", ["loss", "greedy"])
    def test_nothing_is_asked_after_a_refused_load(self, fake: Fake, kind: str) -> None:
        fake.faults.refuses, fake.faults.spins = "rank 4 is greater", 60.0
        model = hollow()
        loss, rows = objective_of(kind, model)
        with pytest.raises(ServerReplyError, match="rank 4 is greater"):
            minimize(
                loss,
                ParameterView.trainable(model),
                rows,
                MeZO(lr=1e-3),
                max_steps=1,
                evaluation=ServedEvaluator(vllm(fake.url), self_test=False),
                **QUIET,
            )
        assert not any(path.endswith("completions") for path, _ in fake.requests)

    @pytest.mark.parametrize("replicas", [2, 3])
    @pytest.mark.parametrize("self_test", [True, False])
    def test_a_data_parallel_server_is_named(
        self, fake: Fake, replicas: int, self_test: bool
    ) -> None:
        fake.faults.replicas = replicas
        with pytest.raises(SelfTestError if self_test else ServerReplyError, match="one replica"):
            tune(hollow(), vllm(fake.url), self_test=self_test)
        assert not fake.loaded

    @pytest.mark.parametrize("tokens, is_found", [(192, True), (256, True), (257, False)])
    def test_a_cache_that_knows_no_adapters_is_found(
        self, fake: Fake, tokens: int, is_found: bool
    ) -> None:
        fake.faults.caches, fake.faults.positions = tokens, 512
        if is_found:
            with pytest.raises(SelfTestError, match="not applied"):
                tune(hollow(), vllm(fake.url), self_test=True)
        else:  # no text of this run is as long
            tune(hollow(), vllm(fake.url), self_test=True)
        assert not fake.loaded

    def test_other_names_of_the_base_are_no_adapters(self, fake: Fake) -> None:
        fake.faults.aliases = ("toy-latest", "gpt-4")
        fake.loaded["of another"] = np.zeros((64, 64))
        server = vllm(fake.url)
        assert server.model == "toy" and server.loaded() == ["of another"]
        aliased = tune(hollow(), server, self_test=True)
        server.close()
        assert set(fake.loaded) == {"of another"}
        with fake_server() as plain:
            assert aliased.value == tune(hollow(), vllm(plain.url)).value

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_base_in_bf16_is_perturbed_further(self, family: str) -> None:
        model = seeded_lora(family)
        view = ParameterView.trainable(model)
        base = model.to(torch.bfloat16)
        for parameter in view.tensors.values():
            parameter.data = parameter.data.float()
        evaluator = ServedEvaluator(PeftServer(base))
        optimizer = MeZO(lr=1e-3)
        minimize(
            CausalLMLoss(model),
            view,
            texts(),
            optimizer,
            max_steps=1,
            evaluation=evaluator,
            **QUIET,
        )
        report = evaluator.report
        assert report is not None and report.signal >= 0.9
        assert optimizer.perturbation_scale >= report.perturbation_scale > 0

    @pytest.mark.parametrize(
        "options, said",
        [({"rank": 2}, "rank 4.*up to 2"), ({"target_modules": ["q_proj"]}, "v_proj")],
    )
    def test_names_what_does_not_fit_before_any_work(
        self, fake: Fake, options: dict[str, Any], said: str
    ) -> None:
        server = vllm(fake.url, **options)
        with pytest.raises(NotServableError, match=said):
            tune(hollow(), server)
        assert not fake.requests

    def test_is_not_there(self) -> None:
        with pytest.raises(ServerLostError, match="asked 6 times in vain"):
            vllm("http://127.0.0.1:9")

    @pytest.mark.parametrize(
        "url",
        [
            "http://example.com:8000",
            "http://0.0.0.0:8000",
            "http://127.0.0.1.example.com",
            "http://u:p@127.0.0.1",
            "http://127.0.0.1/?key=secret",
            "ftp://127.0.0.1",
            "127.0.0.1",
        ],
    )
    def test_is_of_this_machine(self, url: str) -> None:
        with pytest.raises(OptionError):
            vllm(url)

    def test_the_token_is_of_the_environment(
        self, fake: Fake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(http.TOKEN, "secret")
        tune(hollow(), vllm(fake.url), steps=1)
        assert {head["Authorization"] for head in fake.headers} == {"Bearer secret"}


class TestPool:
    def test_several_servers_as_one(self, fake: Fake) -> None:
        with fake_server() as other:
            wanted = tune(hollow(), vllm(fake.url))
            before = len(fake.ever)
            pool = ServerPool([vllm(fake.url, adapters=1), vllm(other.url, adapters=1)])
            found = tune(hollow(), pool, self_test=True)
            assert len(fake.ever) > before and other.ever
            assert [s.value for s in found.history] == [s.value for s in wanted.history]
            assert not fake.loaded and not other.loaded and other.most == 1

    def test_unloads_what_it_can_reach(self, fake: Fake) -> None:
        with fake_server() as other:
            pool = ServerPool([vllm(fake.url, adapters=1), vllm(other.url, adapters=1)])
            other.faults.dies_after = 0
            with pytest.raises(ServedModelError):
                tune(hollow(), pool)
            assert not fake.loaded

    def test_writes_and_chooses(self, fake: Fake) -> None:
        with fake_server() as other:
            pool = ServerPool([vllm(fake.url), vllm(other.url)])
            texts = [[5, 6], [7], [8, 9]]
            assert np.array_equal(
                pool.choose([""] * 3, texts, [3, 4]), vllm(fake.url).choose([""] * 3, texts, [3, 4])
            )
            writing = Writing(4)
            assert pool.generate([""] * 3, texts, writing) == vllm(fake.url).generate(
                [""] * 3, texts, writing
            )


class TestSoftPrompts:
    def probes_of(self, source: Any) -> list[Probe]:
        return [
            Probe(HERE, Batch(source, range(4))),
            Probe(Shift((Term(1, 0.3),)), Batch(source, range(4))),
            Probe(Shift((Term(2, 0.3),), 0.9), Batch(source, range(4, 8))),
        ]

    @pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft, of generate
    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
    @pytest.mark.parametrize("kind", ["loss", "verbalizer", "greedy"])
    def test_in_process_as_by_peft(self, family: str, kind: str) -> None:
        base = tiny_model(family, "causal")
        empty = served_prompt(tiny_config(family), 3, seed=4)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        whole: Any = get_peft_model(tiny_model(family, "causal"), config).eval()
        start = empty.prompt_encoder["default"].embedding.weight.detach()
        whole.prompt_encoder["default"].embedding.weight.data.copy_(start)
        found = []
        for model, server in ((empty, PeftServer(base)), (whole, None)):
            objective, rows = objective_of(kind, model)
            view, source = ParameterView.trainable(model), as_source(rows, objective.collate)
            options = EvaluationOptions(joint_rows="off", reuse_trunk="off")
            evaluator: Any = (
                LocalEvaluator(objective, view, options)
                if server is None
                else ServedEvaluator(server, self_test=False).bound_to(objective, view, options)
            )
            found.append([one.value for one in evaluator.evaluate(self.probes_of(source))])
        assert found[0] == pytest.approx(found[1], rel=1e-5)

    def test_a_run_behind_a_server(self, fake: Fake) -> None:
        table = torch.from_numpy(embeddings())
        ends = []
        for _ in range(2):
            model = served_prompt(tiny_config("llama"), 3, start=table[:3].float())
            evaluator = ServedEvaluator(vllm(fake.url, embeddings=table))
            result = minimize(
                VerbalizerLoss(model, [7, 9]),
                ParameterView.trainable(model),
                labelled(),
                max_steps=3,
                evaluation=evaluator,
                **QUIET,
            )
            ends.append([step.value for step in result.history])
        assert ends[0] == ends[1] and len(set(ends[0])) == 3
        assert not fake.ever and any("prompt_embeds" in body for _, body in fake.requests)

    def test_is_saved_as_peft_saves_it(self, tmp_path: Path) -> None:
        model: Any = served_prompt(tiny_config("llama"), 3, seed=2)
        model.save_pretrained(tmp_path)
        whole = PeftModel.from_pretrained(tiny_model("llama", "causal"), tmp_path)
        found = whole.prompt_encoder["default"].embedding.weight
        assert torch.equal(found, model.prompt_encoder["default"].embedding.weight)

    @pytest.mark.parametrize(
        "tokens, first, wanted",
        [(5, None, [5, 6, 7, 5, 6]), (5, 1, [1, 5, 6, 7, 5]), (2, 1, [1, 5]), (1, None, [5])],
    )
    def test_begins_as_a_text(self, tokens: int, first: int | None, wanted: list[int]) -> None:
        table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
        found = begun_with([5, 6, 7], table, tokens, first=first)
        assert torch.equal(found, table[wanted].float())

    def test_needs_a_server_that_reads_embeddings(self, fake: Fake) -> None:
        model = served_prompt(tiny_config("llama"), 3)
        with pytest.raises(NotServableError, match="--enable-prompt-embeds"):
            tune(model, vllm(fake.url))


class TestTrainer:
    @pytest.mark.parametrize("whole", [True, False], ids=["whole", "hollow"])
    def test_trains_by_a_server(self, fake: Fake, tmp_path: Path, whole: bool) -> None:
        model = with_lora("llama") if whole else hollow()
        server = PeftServer(model) if whole else vllm(fake.url)
        loss = CausalLMLoss(model)
        args = ZOConfig(
            str(tmp_path),
            max_steps=3,
            optimizer="mezo",
            learning_rate=1e-3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=4,
            save_steps=2,
            logging_steps=1,
        )
        trainer = ZOTrainer(
            model,
            args,
            train_dataset=texts(),
            objective=loss,
            metrics={"own": loss},
            evaluator=ServedEvaluator(server),
        )
        found = trainer.train().metrics
        assert found["queries"] == trainer.queries > 0 and not fake.loaded
        assert any("own" in entry for entry in trainer.state.log_history)
        assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()

    def test_needs_an_objective(self, tmp_path: Path) -> None:
        model = with_lora("llama")
        with pytest.raises(OptionError, match="without an objective"):
            ZOTrainer(
                model,
                ZOConfig(str(tmp_path), use_cpu=True),
                train_dataset=texts(),
                evaluator=ServedEvaluator(PeftServer(model)),
            )


class TestCommand:
    def test_of_an_adapter(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        hollow().save_pretrained(tmp_path)
        assert main([str(tmp_path), "--model", "some/base", "--port", "8123"]) == 0
        said = capsys.readouterr().out.split()
        assert said[0] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        for option, value in (
            ("--model", "some/base"),
            ("--port", "8123"),
            ("--host", "127.0.0.1"),
            ("--max-lora-rank", "8"),
            ("--dtype", "float32"),
            ("--lora-target-modules", "q_proj"),
        ):
            assert said[said.index(option) + 1] == value
        assert said[-1] == "v_proj"

    @pytest.mark.parametrize(
        "config, said",
        [
            ({"peft_type": "IA3"}, "type IA3"),
            ({"r": 1024, "target_modules": ["q_proj"]}, "rank 1024"),
            ({"r": 2, "target_modules": "all-linear"}, "--targets"),
            ({"r": 2, "target_modules": ["lm_head"]}, "lm_head"),
            ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
            ({"target_modules": ["q_proj"], "bias": "all"}, "biases"),
            ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "saved beside"),
        ],
    )
    def test_refused(
        self,
        tmp_path: Path,
        config: dict[str, Any],
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        text = json.dumps({"base_model_name_or_path": "b", "peft_type": "LORA"} | config)
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(SystemExit):
            main([str(tmp_path)])
        assert said in capsys.readouterr().err


class TestFolders:
    def test_removed_after_a_kill(self, tmp_path: Path) -> None:
        code = (
            "import os, signal, sys\nimport torch\n"
            "from zo_adapt.serve.loaded_adapters import Folders\n"
            "f = Folders(sys.argv[1]); f.write('x', {'a': torch.zeros(1)}, {})\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
        assert list(tmp_path.rglob("adapter_model.safetensors"))
        living = Folders(tmp_path)
        living.write("y", {"a": torch.zeros(1)}, {"r": 1})
        Folders(tmp_path).close()
        found = list(tmp_path.rglob("adapter_model.safetensors"))
        assert [path.parent.name for path in found] == ["y"]
        assert (found[0].parent.stat().st_mode & 0o777) == 0o700
        assert json.loads((found[0].parent / "adapter_config.json").read_text()) == {"r": 1}
        living.close()

    def test_adapters_of_a_killed_client_are_unloaded_at_the_next_start(
        self, fake: Fake, tmp_path: Path
    ) -> None:
        code = (
            "import os, signal, sys\n"
            "from peft import LoraConfig\n"
            "from zo_adapt import VLLMServer, ParameterView, served_lora\n"
            "from zo_adapt.serve.adapter import ServedAdapter\n"
            "from zo_adapt.serve.protocol import Candidate\n"
            "from zo_adapt.term import HERE\n"
            "from tiny_models import tiny_config\n"
            "lora = LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM')\n"
            "view = ParameterView.trainable(served_lora(tiny_config('llama'), lora))\n"
            "adapter = ServedAdapter(view)\n"
            "server = VLLMServer(sys.argv[1], place=sys.argv[2])\n"
            "for name in ('a', 'b', 'c'):\n"
            "    server.load(Candidate(name, adapter.at([HERE])[0]), adapter.config)\n"
            "server.unload(['b'])\n"
            "print('loaded', flush=True)\n"
            "sys.stdin.read()\n"
        )
        folder = str(Path(__file__).parent)
        child = subprocess.Popen(
            [sys.executable, "-c", code, fake.url, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path])},
        )
        try:
            assert child.stdout is not None and child.stdout.readline() == b"loaded\n"
            vllm(fake.url, place=tmp_path)
            assert set(fake.loaded) == {"a", "c"}  # of a client that lives
        finally:
            child.kill()
            child.communicate()
        with fake_server() as other:
            vllm(other.url, place=tmp_path)
        assert set(fake.loaded) == {"a", "c"}  # of another server nothing is asked
        vllm(fake.url, place=tmp_path)
        assert not fake.loaded and not list(tmp_path.rglob("*.loaded"))

    def left(self, fake: Fake, tmp_path: Path, names: Sequence[str]) -> Path:
        """The list of a client that is dead, and what it has left on the server."""
        Folders(tmp_path).close()
        (root,) = tmp_path.iterdir()
        file = root / "999999999-1-abc.loaded"
        file.write_text("\n".join([fake.url, *names]))
        fake.loaded |= dict.fromkeys([*names, "of another"], np.zeros(()))
        return file

    def test_a_server_that_does_not_unload_is_asked_at_the_start_after(
        self, fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = self.left(fake, tmp_path, ["a", "b"])
        fake.faults.keeps = True
        vllm(fake.url, place=tmp_path)
        assert file.exists() and "was not unloaded" in caplog.text
        fake.faults.keeps = False
        vllm(fake.url, place=tmp_path)
        assert set(fake.loaded) == {"of another"} and not file.exists()

    def test_what_a_new_server_does_not_have_is_forgotten(self, fake: Fake, tmp_path: Path) -> None:
        file = self.left(fake, tmp_path, ["a", "b"])
        fake.loaded.clear()
        vllm(fake.url, place=tmp_path)
        assert not file.exists() and not fake.requests

    def test_a_run_leaves_no_list(self, fake: Fake, tmp_path: Path) -> None:
        server = vllm(fake.url, place=tmp_path)
        tune(hollow(), server)
        assert not list(tmp_path.rglob("*.loaded")) and not fake.loaded

    def test_nothing_but_safetensors(self, tmp_path: Path) -> None:
        folders = Folders(tmp_path)
        path = folders.write("x", {"a": torch.ones(2)}, {})
        names = sorted(os.listdir(path))
        folders.close()
        assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_hollow_model_has_the_view_of_a_whole_one(tmp_path: Path) -> None:
    whole = with_lora("llama")
    whole.save_pretrained(tmp_path)
    empty = served_lora(tiny_config("llama"), tmp_path)
    one, other = ParameterView.trainable(whole), ParameterView.trainable(empty)
    assert one.fingerprint() == other.fingerprint() and one.hash() == other.hash()
    assert one.displacement == other.displacement


def test_a_start_that_moves_the_base_is_refused(fake: Fake) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(NotServableError, match="pissa"):
        served_lora(tiny_config("llama"), lora)
    model: Any = get_peft_model(tiny_model("llama", "causal"), lora).eval()
    with pytest.raises(NotServableError, match="moved the base"):
        tune(model, vllm(fake.url))
    assert tune(model, PeftServer(model), steps=1).steps == 1


def test_import_loads_no_http() -> None:
    code = "import sys, zo_adapt; print([m for m in ('httpx', 'httpx2') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_an_evaluator_is_copied_for_each_objective() -> None:
    model = with_lora("gpt2")
    evaluator = ServedEvaluator(PeftServer(model), self_test=False)
    view = ParameterView.trainable(model)
    one = evaluator.bound_to(CausalLMLoss(model), view, EvaluationOptions())
    assert copy.copy(one) is not one and one is not evaluator and one.queries == 0
    with pytest.raises(NotServableError, match="no objective and no view"):
        evaluator.evaluate([])
