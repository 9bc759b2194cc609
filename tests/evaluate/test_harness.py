"""Tasks of lm-eval give the scores that the model's likelihoods and continuations make, on any mesh."""

import importlib.util
import math
from pathlib import Path

import pytest
from judging import RUN, judging
from local_tasks import TASK, made

from llmjax.errors import DATA, Refused
from llmjax.evaluate.generate import Sampling
from llmjax.evaluate.likelihood import windows

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (the extra evaluate)", allow_module_level=True)

from lm_eval import utils

from llmjax.evaluate import harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> harness.Loaded:
    return harness.load(made(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def alone(tasks) -> harness.Scores:
    with judging() as judge:
        return harness.scores(tasks, judge)


def test_scores_follow_from_likelihoods(tasks, alone):
    documents = list(tasks["tasks"]["local_rolling"].eval_docs)
    right, nats, bytes_, words, same = 0, 0.0, 0, 0, 0
    choice = tasks["tasks"]["local_choice"]
    with judging() as judge:
        choice.build_all_requests()
        asked = [instance.args for instance in choice.instances]
        values = [value for value, _ in judge.log_likelihoods(asked)]
        for n, document in enumerate(documents):
            four = values[4 * n : 4 * n + 4]
            right += four.index(max(four)) == document["answer"]
            text = 3 * document["question"]
            nats, bytes_, words = nats - judge.rolling([text])[0], bytes_ + len(text), words + len(text.split())
            written = judge.continuations([document["question"]], Sampling(tokens=4), (".",))[0]
            same += written == document["choices"][document["answer"]]
    assert alone["local_choice"]["acc"][0] == right / 10
    assert alone["local_rolling"]["bits_per_byte"][0] == pytest.approx(nats / bytes_ / math.log(2), rel=1e-6)
    assert alone["local_rolling"]["word_perplexity"][0] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert alone["local_written"]["exact_match"][0] == same / 10
    assert alone["local_choice"]["acc"][1] == pytest.approx(math.sqrt(right / 10 * (1 - right / 10) / 9))


def test_eight_devices_score_as_one_does(tasks, alone):
    with judging("fsdp_tp", 8) as judge:
        found = harness.scores(tasks, judge)
    assert found.keys() == alone.keys() == {"local_choice", "local_rolling", "local_written"}
    for task, metrics in alone.items():
        for metric, (value, _) in metrics.items():
            assert found[task][metric][0] == pytest.approx(value, rel=1e-5)


def test_the_same_questions_are_asked_each_time(tasks, alone):
    with judging() as judge:
        assert harness.scores(tasks, judge) == alone


def test_a_limit_asks_fewer(tasks):
    with judging() as judge:
        found = harness.ask(judge.program, judge.tokenizer, tasks, 3, judge.model, lambda: False)
    assert 3 * found["task/local_choice/acc"] == pytest.approx(round(3 * found["task/local_choice/acc"]))
    assert {"task/local_choice/acc_stderr", "task/local_rolling/bits_per_byte"} <= found.keys()


def test_whoever_is_to_stop_gets_no_scores(tasks):
    with judging(stop=lambda: True) as judge:
        assert harness.scores(tasks, judge) is None


def test_our_windows_are_lm_evals():
    for length in range(2, 40):
        tokens = list(range(length))
        theirs = utils.get_rolling_token_windows(tokens[1:], tokens[0], 8, 1)
        assert windows(tokens, 8) == [utils.make_disjoint_window(pair) for pair in theirs]


@pytest.mark.parametrize(
    ("options", "how", "stop"),
    [
        ({"until": ["\n", "."], "max_gen_toks": 8}, Sampling(tokens=8), ("\n", ".")),
        ({"until": "\n", "temperature": 0.7, "top_p": 0.9}, Sampling(256, 0.7, 0, 0.9), ("\n",)),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, Sampling(256), ()),
    ],
)
def test_options_of_a_continuation_are_lm_evals(options, how, stop):
    assert harness.asked(options) == (how, stop)


def test_what_a_shorter_text_leaves_is_written_up_to_half_the_model(tasks):
    with judging() as judge:
        written = judge.continuations(["a"], Sampling(tokens=10_000), ())
    assert 0 < len(written[0]) <= RUN.sequence // 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.yaml", None, "nowhere.yaml, which is no file: give a task file"),
        ("open.yaml", "task: [", "open.yaml, which cannot be loaded"),
        ("list.yaml", "- 1", "list.yaml, which cannot be loaded"),
        ("other.yaml", "name: x", "other.yaml, which cannot be loaded"),
        ("gone.yaml", TASK.format(name="x", data="/nowhere.jsonl", folder="/nowhere", more=""), "cannot be loaded"),
    ],
)
def test_a_task_file_that_is_none_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(Refused, match=message) as refused:
        harness.load([str(path)])
    assert refused.value.code == DATA and "\n" not in str(refused.value)


def test_a_task_whose_data_lacks_something_is_refused(tmp_path):
    path, data = Path(made(tmp_path)[0]), tmp_path / "questions.jsonl"
    text = path.read_text()
    path.write_text(text.replace("{{question}}", "{{questions}}"))
    with pytest.raises(Refused, match=r"cannot be loaded \(UndefinedError: 'questions' is undefined"):
        harness.load([str(path)])
    path.write_text(text.replace("{{question}}", "{{choices[answer]}}"))
    data.write_text(data.read_text() + '{"question": "?", "choices": ["a"], "answer": 3}\n')
    with (
        judging() as judge,
        pytest.raises(Refused, match=r"lm-eval cannot ask local_choice \(UndefinedError") as refused,
    ):
        harness.scores(harness.load([str(path)]), judge)
    assert refused.value.code == DATA


def test_a_task_that_lm_eval_does_not_have_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="no task named 'hellaswagg': did you mean hellaswag"):
        harness.load(["hellaswagg"])


def test_a_task_named_twice_is_refused(tmp_path):
    path = made(tmp_path)[0]
    with pytest.raises(Refused, match="tasks has local_choice twice"):
        harness.load([path, path])
