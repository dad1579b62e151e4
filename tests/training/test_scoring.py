"""Likelihoods and answers of a run, as the evaluation harness asks for them."""

import sys
import types

import jax
import numpy as np
import pytest

from revnet_jax.config import language_model
from revnet_jax.errors import UserError
from revnet_jax.training import scoring
from revnet_jax.training.harness import _options, harness_model
from revnet_jax.training.loop import train
from revnet_jax.training.restore import restore_run
from revnet_jax.training.scoring import Scorer, windows_of

LETTERS = "abcdefgh"
END = 7
CONTEXT = 12


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("scoring")
    rng = np.random.default_rng(0)
    (path / "text").write_text("".join(rng.choice(list(LETTERS), 2_000)))
    config = language_model()
    config.update_from_flattened_dict(
        {
            "num_steps": 5,
            "batch_size": 8,
            "eval_batch_size": 8,
            "data.name": "characters",
            "data.dir": str(path / "text"),
            "data.vocab_size": 8,
            "data.end_token": END,
            "data.context": CONTEXT,
            "data.eval_batches": 1,
            "model.layers": 2,
            "model.width": 16,
            "model.heads": 2,
            "model.kv_heads": 1,
            "model.hidden": 16,
            # Streams on a grid would differ by one of its steps between programs of two lengths,
            # wherever a sum of floats lies between two points.
            "model.grid": False,
            "schedule.learning_rate": 0.05,
            "schedule.warmup_steps": 1,
        }
    )
    train(config, path / "run")
    return path / "run"


@pytest.fixture(scope="module")
def naive(workdir):
    """`naive(tokens)`: the log probabilities of the token after each, one sequence, unpadded."""
    run = restore_run(workdir)
    logits_of = jax.jit(run.task.network.logits)

    def log_probabilities(tokens):
        logits = logits_of(run.variables, np.asarray([tokens], np.int32))[0]
        logits = np.asarray(logits, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    with jax.default_matmul_precision("float32"):
        yield log_probabilities


@pytest.fixture
def model(workdir, monkeypatch):
    """The adapter, on a stand-in for the base class of the harness."""
    module = types.ModuleType("lm_eval.api.model")
    module.LM = type("LM", (), {})
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", types.ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    monkeypatch.setattr(scoring, "_SHORTEST", 2)
    found = harness_model(workdir, batch_size=3)
    assert isinstance(found, module.LM)
    return found


def requests(*arguments):
    return [types.SimpleNamespace(args=args) for args in arguments]


def tokens_of(text):
    return [LETTERS.index(letter) for letter in text]


@pytest.mark.parametrize("until", [None, [], "b"])
def test_options_that_are_null_count_as_absent(until):
    given = {"until": until, "max_gen_toks": None, "do_sample": True, "temperature": None}
    assert _options(given, 0) == {
        "until": ["b"] if until else [],
        **{"num_tokens": 256, "temperature": 1.0, "top_p": 1.0, "seed": 0},
    }


def test_windows_score_each_token_once_with_the_most_before_it():
    cut = lambda n, first, context: [
        ("".join(map(str, window.tokens)), window.scored)
        for window in windows_of(range(n), first, context)
    ]
    assert cut(9, 1, 4) == [("01234", 4), ("45678", 4)]
    assert cut(8, 1, 4) == [("01234", 4), ("34567", 3)]
    assert cut(8, 6, 4) == [("34567", 2)]  # of what comes before, as much as fits
    assert cut(8, 2, 20) == [("01234567", 6)]
    assert cut(3, 3, 4) == []


@pytest.mark.thorough
def test_continuations_equal_a_naive_evaluation(model, naive):
    pairs = [("abc", "de"), ("a", "b"), ("hgfedcba", "abcd"), ("", "abc"), ("abcabcabcabc", "fg")]
    greedy = LETTERS[int(np.argmax(naive(tokens_of("gaf"))[-1]))]
    pairs += [("gaf", greedy), ("abc", "")]
    expected = []
    for before, after in pairs:
        whole = ([END] if not before else tokens_of(before)) + tokens_of(after)
        seen = whole[-(CONTEXT + 1) :]
        found = naive(seen[:-1])[-len(after) :] if after else np.zeros((0, 8))
        picked = tokens_of(after)
        nats = sum(found[i, token] for i, token in enumerate(picked))
        expected.append((nats, all(np.argmax(found[i]) == t for i, t in enumerate(picked))))
    got = model.loglikelihood(requests(*pairs))
    assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in expected]
    assert got[5][1] is True
    assert got[6] == (0.0, True)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in expected], rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_rolling_likelihoods_equal_a_naive_evaluation(model, naive):
    texts = ["a", "abcdefg", "gfedcbaabcdefgfedcbaabcdefgab", "gfedcbaabcde"]
    expected = []
    for text in texts:
        tokens, nats, done = [END, *tokens_of(text)], 0.0, 1
        while done < len(tokens):
            end = min(len(tokens), done + CONTEXT)
            start = max(0, end - 1 - CONTEXT)
            found = naive(tokens[start : end - 1])
            nats += sum(found[i - 1 - start, tokens[i]] for i in range(done, end))
            done = end
        expected.append(nats)
    got = model.loglikelihood_rolling(requests(*[(text,) for text in texts]))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.thorough
def test_few_lengths_are_compiled(workdir, monkeypatch):
    monkeypatch.setattr(scoring, "_SHORTEST", 2)
    scorer, shapes = Scorer(workdir, batch_size=2), set()
    likelihoods = scorer._log_likelihoods

    def noted(variables, batch):
        shapes.add(batch["token_BT"].shape)
        return likelihoods(variables, batch)

    monkeypatch.setattr(scorer, "_log_likelihoods", noted)
    scorer.texts([LETTERS[:n] for n in range(1, 8)] + ["ab" * 8])
    assert shapes == {(2, 2), (2, 4), (2, 8), (2, CONTEXT)}


@pytest.mark.thorough
def test_answers_equal_naive_greedy_decoding(model, naive):
    def decode(prompt, most):
        tokens, text = tokens_of(prompt) or [END], ""
        while len(text) < most and len(tokens) < CONTEXT + 1:
            token = int(np.argmax(naive(tokens)[-1]))
            if token == END:
                break
            tokens, text = [*tokens, token], text + LETTERS[token]
        return text

    prompts = ["abc", "", "gfe", "fab"]
    whole = [decode(prompt, 6) for prompt in prompts]
    assert any(len(text) == 6 for text in whole)
    got = model.generate_until(requests(*[(p, {"max_gen_toks": 6}) for p in prompts]))
    assert got == whole
    longest = max(range(4), key=lambda i: len(whole[i]))
    stop, text = whole[longest][2:4], whole[longest]
    for until in ([stop, "x"], stop):
        options = {"until": until, "max_gen_toks": 6, "temperature": 0.0}
        assert model.generate_until(requests((prompts[longest], options))) == [
            text[: text.index(stop)]
        ]
    # The start of a prompt that leaves no room is cut off.
    cut = ("ab" * 9)[-(CONTEXT - 4) :]
    got = model.generate_until(
        requests(("ab" * 9, {"max_gen_toks": 4}), (cut, {"max_gen_toks": 4}))
    )
    assert got[0] == got[1] == decode(cut, 4)
    sampled = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 8}
    twice = [model.generate_until(requests(*[("abc", sampled)] * 5)) for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(set(twice[0])) > 1


def test_mistakes_are_one_line(workdir, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"harness cannot be imported .*: pip install 'lm_eval>="):
        harness_model(workdir)
    scorer = Scorer(workdir)
    scorer.prefix = None
    with pytest.raises(UserError, match="got a text with nothing before it, expected one token"):
        scorer.texts(["abc"])
    with pytest.raises(UserError, match="got 'z' in the prompt 'az'"):
        scorer.continuations([("a", "z")])


@pytest.mark.lm_eval
def test_the_harness_itself(workdir, tmp_path, monkeypatch):
    """On a task from a file, without a network."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs the package lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lines.jsonl").write_text('{"q": "abc", "a": "de"}\n{"q": "ga", "a": "f"}\n')
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lines.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    model = harness_model(workdir)
    found = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    scores = Scorer(workdir).continuations([("abc", "de"), ("ga", "f")])
    expected = np.exp(-np.mean([score.nats for score in scores]))
    assert found["results"]["letters"]["perplexity,none"] == pytest.approx(expected, rel=1e-5)
