"""The judge: what it is told and how its answers are read, in this process and by real servers on
localhost."""

import base64
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT, launch
from learned import made
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlm import clips, save_judge

import self_paced
from benchmarks import servers
from common import cli, rewards
from common.errors import InputError, RunError
from common.rewards import judge, judge_answers, judge_local, judge_questions, judge_server, table

in_this_process = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="a judge in this process takes transformers 5.23",
)

STAGES = ("judge:quality", "judge:smoothness", "judge:alignment")
PROMPTS = ["a red circle", 'a "quoted" prompt, with {braces} and <|im_end|>', "🦊 ثعلب", "x " * 500]
SETTINGS = dict(
    url="",
    model="m",
    fps=2.0,
    expected=False,
    timeout=10.0,
    retries=3,
    concurrency=4,
    trusted=False,
)


def scorer(name="judge:alignment", fps=4.0, **settings):
    loaded = table.load([name], PROMPTS, reward_batch=3, fps=fps, judge={**SETTINGS, **settings})
    return loaded[name]


# --- A server whose behaviour a test chooses ---


@pytest.fixture
def serve():
    """serve(behave) -> (url, server); behave(handler, number of the request, its body) answers a
    request."""
    started = []

    def start(behave):
        url, server = servers.start(behave)
        started.append(server)
        return url, server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The client's pauses between attempts, a hundredth of themselves."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.08)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def words_of(body):
    return [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]


def pictures_of(body):
    urls = [
        part["image_url"]["url"]
        for part in body["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    return [
        Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
        for url in urls
    ]


def colour_score(body):
    """A number from 1 to 10 out of the first frame's red level, as a server that looked would
    give."""
    return f"{1 + 9 * pictures_of(body)[0].getpixel((5, 5))[0] / 255:.2f}"


# --- What a score is ---

SCORES = [
    ("5.80", 5.8), ("10", 10), ("10.00", 10), ("1", 1), (" 7.25\n", 7.25), ("**8.5**", 8.5),
    ('"9"', 9), ("6.", 6), ("# 7", 7), ("`8.0`", 8), ("8 points", 8), ("8分", 8), ("8,5", 8.5),
    # out of ten
    ("8/10", 8), ("8 / 10", 8), ("8.5 out of 10", 8.5), ("**9.25**/10", 9.25), ("10/10", 10),
    ("The two dogs look real. 8/10", 8), ("8/10 - sharp", 8), ("I see 7,5/10, as two err.", 7.5),
    # names of a score
    ("Score: 8", 8), ("**Score:** 8.5", 8.5), ("Score = 8/10", 8), ("Score: 8,5", 8.5),
    ("My rating is 9.", 9), ("Rating: [[6]]", 6), ("<score>8</score>", 8), ("评分：8", 8),
    ("Answer: 8", 8), ("The final answer is $\\boxed{8}$.", 8), ("Overall: 7", 7),
    ("Quality score: 7\nMotion score: 5\nOverall score: 6", 6), ("Score: 7\nSCORE: 7.0", 7),
    ("Visual quality: 7/10\nMotion: 6/10\n\nScore: 6.5", 6.5), ("Score: 8\n\n1. Sharp", 8),
    ("Score: 8/10\nReason: 3 of the 4 cats", 8), ("Score: 8. The image shows two dog…", 8),
    # JSON
    ('{"score": 8}', 8), ('```json\n{"score": 8.25}\n```', 8.25),
    ('{"quality": 3, "overall_score": 6.5, "max": 10}', 6.5),
    ('Here it is:\n```\n{"rating": "7/10", "reason": "2 dogs"}\n```', 7),
    # sentences, scales and thoughts
    ("on a scale of 1 to 10 I give 7", 7), ("7 (on a scale from 1 to 10)", 7),
    ("On a scale of 1-10, I'd rate this image 7.5 out of 10.", 7.5), ("Score (1-10): 8", 8),
    ("I would give it a score of 6.75.", 6.75), ("It deserves a 9 for its light.", 9),
    ("<think>It may be 3 or 4.\nScore: 4</think>\n\n7.5", 7.5), ("hm, 3?</think>Score: 8", 8),
]  # fmt: skip
NO_SCORES = [
    "", None, "0.99", "10.01", "11", "-3", "nan", "inf", "1e1", "٧", "7.2.1", "8,500", "7½", "8e",
    "I cannot rate this.", "Score: good", "Score: -3", "Score: 0.8", "Score: 11", "no 2024 model",
    # several numbers, ranges, other totals
    "5 6", "7, 8", "7,8,9", "7-8", "7 to 8", "7 or 8", "between 7 and 8", "Score: 7-8",
    "Score: 7 or 8", "Score: 7\nScore: 8", "I'd give it 7, maybe 8", "7/10 for light, 5/10 else",
    "4/5", "Score: 4/5", "80%", "Score: 80%", "85/100", "Score: 85/100", "Score: 8 out of 9",
    "I give it a 7 for light and an 8 for motion", "8/10/2024", "8:30",
    # parts of a score
    "Quality: 7, motion: 6", "Quality score: 7\nMotion score: 5", "Sharpness: 8/10",
    # the scale, the question, other numbers
    "1 to 10", "Score: 1-10", "from 1.00 (bad) to 10.00 (perfect)", "1 = bad, 10 = perfect",
    judge_questions.NUMBER, "I see 2 dogs", "I give 2 reasons", "I will score 3 aspects: light",
    "2 out of 10 dogs are blurred", "I cannot give it 8", "I give it more than 5",
    # JSON that is cut, has two scores or none
    '{"score": 8', '{"score": 7, "score": 8}', '{"score": 7, "rating": 8}', '{"score": true}',
    '{"score": null}', '{"score": [7]}', '{"score": 80}', '{"score": 8} {"score": 9}',
    '{"quality": 7, "motion": 6}', "{" * 100_000,
    # thoughts, and answers that were cut
    "<think>Score: 8", "<think>I see 7</think>", "8…", "8.…", "8.5…", "Score: 8…", "Score: 8.…",
]  # fmt: skip


@pytest.mark.parametrize("answer, score", SCORES)
def test_the_common_forms_of_a_score_are_read(answer, score):
    assert judge_answers.score_in(answer) == score


@pytest.mark.parametrize("answer", NO_SCORES, ids=lambda answer: f"{answer!r:.40}")
def test_what_is_not_one_score_is_none(answer):
    assert math.isnan(judge_answers.score_in(answer))


@pytest.mark.parametrize(
    "part", ["9", "score ", "score:\t", "rate the ", "1 to ", "( ", "* ", "score is ", "\n", "1 ("]
)
def test_no_answer_takes_long_to_read(part):
    started = time.perf_counter()
    judge_answers.score_in((part * judge_server.LETTERS)[: judge_server.LETTERS])
    assert time.perf_counter() - started < 2


def test_the_expected_score_is_that_of_the_digits():
    likely = {0: 0.1, 4: 0.2, 9: 0.5}
    assert judge_questions.expected_score(likely) == pytest.approx(1 + (4 * 0.2 + 9 * 0.5) / 0.8)
    assert judge_questions.expected_score({9: 1.0}) == 10
    assert judge_questions.expected_score({0: 0.6}) == 1
    assert math.isnan(judge_questions.expected_score({}))
    assert judge_questions.digits([("7", 0.5), (" 7", 0.2), ("no", 0.1), ("10", 0.1)]) == {
        7: pytest.approx(0.7)
    }
    assert judge_questions.digits([("I", 0.6), ("7", 0.4)]) == {}


# --- What the judge is told ---


def test_questions_are_cumulative_and_carry_the_prompt():
    told = {}
    for name in STAGES:
        (message,) = question(name, clips(1)[0], PROMPTS[1])
        told[name] = message["content"][-1]["text"]
        assert PROMPTS[1] in told[name] and told[name].endswith("5.80.")
    for part, names in (
        (judge_questions.QUALITY, STAGES),
        (judge_questions.SMOOTHNESS, STAGES[1:]),
        (judge_questions.ALIGNMENT, STAGES[2:]),
    ):
        assert all((part in told[name]) == (name in names) for name in STAGES)


def question(name, sample, prompt, fps=4.0, **settings):
    made = getattr(judge, rewards.REWARDS[name].partition(":")[2])()
    made.judge, made.fps = {**SETTINGS, **settings}, fps
    return made.question(sample, prompt)


def test_an_image_is_not_asked_about_smoothness():
    (message,) = question("judge:alignment", clips(1)[0, 0], "p")
    *pictures, words = message["content"]
    assert (
        len(pictures) == 1
        and judge_questions.SMOOTHNESS not in words["text"]
        and "This image" in words["text"]
    )
    assert judge_questions.ALIGNMENT in words["text"] and judge_questions.QUALITY in words["text"]


@pytest.mark.parametrize(
    "rate, fps, number, at",
    [
        (2, 4, 8, [0, 2, 5, 7]),
        (4, 4, 8, list(range(8))),
        (100, 4, 3, [0, 1, 2]),
        (0.1, 4, 8, [0, 7]),
        (2, 16, 53, 7),
    ],
)
def test_frames_are_sampled_at_the_rate(rate, fps, number, at):
    found = judge_questions.frames_at(rate, fps, number)
    assert found == at if isinstance(at, list) else len(found) == at
    assert found[0] == 0 and found[-1] == number - 1


def test_frames_reach_the_model_as_they_are():
    sample = clips(1)[0]
    (message,) = question("judge:quality", sample, "p")
    pictures = [part["image"] for part in message["content"] if part["type"] == "image"]
    for picture, frame in zip(pictures, sample[[0, 2, 5, 7]]):
        assert picture.size == (64, 64)
        assert picture.getpixel((3, 60)) == tuple((frame[:, 60, 3] * 255).round().int().tolist())


# --- Servers ---


def test_the_happy_path(serve):
    url, server = serve(lambda handler, number, body: handler.say(colour_score(body)))
    media, prompts = clips(6), [PROMPTS[i % 4] for i in range(6)]
    for name in STAGES:
        server.asked.clear()
        score = scorer(name, url=url).score(media, prompts)
        expected = 1 + 9 * media[:, 0, 0, 0, 0]
        torch.testing.assert_close(score, expected, atol=0.06, rtol=0)  # JPEG, and two decimals
        assert score.dtype == torch.float32 and len(server.asked) == 6
        for _, body in server.asked:
            assert (
                body["model"] == "m"
                and body["temperature"] == 0
                and body["max_tokens"] == judge_questions.TOKENS
            )
            assert len(pictures_of(body)) == 4 and pictures_of(body)[0].size == (64, 64)
            assert sum(prompt in words_of(body)[0] for prompt in prompts[:4]) >= 1


def test_scores_do_not_depend_on_order_or_company(serve):
    url, _ = serve(
        lambda handler, number, body: (
            time.sleep(0.01 * (number % 3)),
            handler.say(colour_score(body)),
        )
    )
    media, prompts = clips(6), [f"prompt {i}" for i in range(6)]
    made = scorer(url=url)
    together = made.score(media, prompts)
    order = [3, 1, 5, 0, 2, 4]
    assert torch.equal(made.score(media[order], [prompts[i] for i in order]), together[order])
    assert torch.equal(
        torch.cat([made.score(media[i : i + 1], prompts[i : i + 1]) for i in range(6)]), together
    )


def test_requests_run_concurrently_but_no_more_than_allowed(serve):
    url, server = serve(lambda handler, number, body: (time.sleep(0.25), handler.say("5")))
    started = time.perf_counter()
    scorer(url=url, concurrency=4).score(clips(8), ["p"] * 8)
    assert server.most == 4
    assert time.perf_counter() - started < 8 * 0.25  # one after the other


def test_a_slow_answer_is_waited_for_and_one_too_slow_is_asked_again(serve):
    url, server = serve(
        lambda handler, number, body: (time.sleep(0.2 if number == 1 else 0), handler.say("7.5"))
    )
    assert (
        scorer(url=url, timeout=5.0).score(clips(1), ["p"]).tolist() == [7.5]
        and len(server.asked) == 1
    )
    url, server = serve(
        lambda handler, number, body: (time.sleep(1.5 if number == 1 else 0), handler.say("7.5"))
    )
    assert (
        scorer(url=url, timeout=0.5).score(clips(1), ["p"]).tolist() == [7.5]
        and len(server.asked) == 2
    )


@pytest.mark.parametrize("trouble", ["fail", "hang_up", "busy"])
def test_errors_and_disconnects_are_repeated(serve, trouble):
    def behave(handler, number, body):
        if number > 2:
            return handler.say("6.25")
        return handler.fail(429) if trouble == "busy" else getattr(handler, trouble)()

    url, server = serve(behave)
    assert scorer(url=url).score(clips(1), ["p"]).tolist() == [6.25] and len(server.asked) == 3


def test_half_an_answer_is_repeated(serve):
    def behave(handler, number, body):
        if number == 1:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            return handler.hang_up()
        return handler.say("4")

    url, server = serve(behave)
    assert scorer(url=url).score(clips(1), ["p"]).tolist() == [4.0] and len(server.asked) == 2


def test_garbage_is_asked_again_with_what_was_said(serve):
    said = ["A lovely clip!", "7 or 8", "8.0"]
    url, server = serve(lambda handler, number, body: handler.say(said[number - 1]))
    assert scorer(url=url).score(clips(1), ["p"]).tolist() == [8.0]
    messages = server.asked[-1][1]["messages"]
    assert [message["role"] for message in messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
    assert [m["content"][0]["text"] for m in messages[1::2]] == said[:2]
    assert messages[2]["content"][0]["text"] == judge_questions.AGAIN + judge_questions.NUMBER
    assert len(pictures_of(server.asked[-1][1])) == 4


def test_a_sample_that_gets_no_number_is_masked_and_no_other(serve):
    def behave(handler, number, body):
        handler.say("I would rather not." if "the third" in words_of(body)[0] else "5")

    url, server = serve(behave)
    score = scorer(url=url).score(clips(4), ["p", "p", "the third", "p"])
    assert score.isnan().tolist() == [False, False, True, False]
    assert len(server.asked) == 3 + judge.ASKED
    found = made("jpeg", scorers={"judge:alignment": judge.JudgeAlignment()})
    found.check({"judge:alignment": score[None]}, ["p"])


def test_a_sample_whose_requests_fail_is_masked_as_long_as_the_server_lives(serve):
    def behave(handler, number, body):
        return handler.fail() if "poison" in words_of(body)[0] else handler.say("5")

    url, server = serve(behave)
    score = scorer(url=url, retries=2).score(clips(3), ["p", "poison", "p"])
    assert score.isnan().tolist() == [False, True, False] and len(server.asked) == 2 + 3


def test_a_server_that_goes_away_stops_the_run_with_one_line(serve):
    url, server = serve(lambda handler, number, body: handler.say("5"))
    made = scorer(url=url, retries=2)
    server.shutdown(), server.server_close()
    with pytest.raises(
        RunError,
        match=r"judge:alignment: the server at --judge-url http\S+ is gone: .*--resume latest",
    ) as error:
        made.score(clips(5), ["p"] * 5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_stops_the_run_at_once(serve, status):
    url, server = serve(lambda handler, number, body: handler.fail(status))
    with pytest.raises(
        RunError, match=f"refuses to judge: answered {status} .*something went wrong"
    ):
        scorer(url=url).score(clips(1), ["p"])
    assert len(server.asked) == 1


def test_the_key_is_sent(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    url, server = serve(lambda handler, number, body: handler.say("5"))
    scorer(url=url).score(clips(1), ["p"])
    assert server.asked[0][0]["Authorization"] == "Bearer secret"


def test_expected_scores_of_a_server(serve):
    url, server = serve(
        lambda handler, number, body: handler.say("7", {"7": 0.5, "8": 0.3, "no": 0.1})
    )
    score = scorer(url=url, expected=True).score(clips(2), ["p", "q"])
    assert score.tolist() == pytest.approx([1 + (7 * 0.5 + 8 * 0.3) / 0.8] * 2)
    body = server.asked[0][1]
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["max_tokens"] == 1
    assert words_of(body)[0].endswith(judge_questions.DIGIT)
    url, _ = serve(lambda handler, number, body: handler.say("7"))
    with pytest.raises(RunError, match="gives no probabilities. Remove --judge-expected"):
        scorer(url=url, expected=True).score(clips(1), ["p"])


def free_url():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_no_server_at_the_url_is_said_before_any_rollout():
    with pytest.raises(InputError, match="--judge-model m at --judge-url http.*Connection refused"):
        scorer(url=free_url(), retries=0)


def test_a_model_that_is_not_served_is_said_before_any_rollout(serve):
    url, _ = serve(None)
    with pytest.raises(
        InputError, match="--judge-model Qwen at --judge-url .*something went wrong"
    ):
        scorer(url=url, model="Qwen")


def test_smoothness_of_images_is_refused(serve):
    url, _ = serve(None)
    with pytest.raises(InputError, match="judge:smoothness scores clips"):
        table.load(["judge:smoothness"], [], judge={**SETTINGS, "url": url}, clips=False)


# --- Servers that mean harm, or are something else ---


@pytest.mark.parametrize("harm", servers.HARM)
def test_an_answer_that_does_harm_costs_its_sample_a_moment_and_little_memory(serve, harm):
    """Every other request is answered: so the sample is masked, and the run goes on."""

    def behave(handler, number, body):
        return (
            servers.HARM[harm](handler)
            if "poison" in words_of(body)[0]
            else handler.say("5", {"5": 0.9, "6": 0.1})
        )

    url, server = serve(behave)
    made = scorer(url=url, timeout=0.5, retries=0, expected="chances" in harm)
    started = time.perf_counter()
    score = made.score(clips(2), ["p", "poison"])
    assert score.isnan().tolist() == [False, True]
    assert time.perf_counter() - started < 5 and server.written < 20 * 2**20


@pytest.mark.parametrize("harm", [name for name in servers.HARM if name not in servers.SPOKEN])
def test_a_server_that_does_nothing_else_is_refused_before_any_rollout(serve, harm):
    url, server = serve(None)
    server.greeting = servers.HARM[harm]
    with pytest.raises(InputError, match="reward judge:alignment: .*--judge-url http") as error:
        scorer(url=url, timeout=0.5, retries=0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://a\x00b/v1", "ftp://localhost/v1", "http://é:99999/v1", "//"]
)
def test_an_odd_url_is_one_line(url):
    with pytest.raises(
        InputError, match="--judge-model m at --judge-url .*protocol|does not load|Error"
    ):
        scorer(url=url, retries=0)


@pytest.mark.parametrize("key", ["schlüssel", "two\nlines", "\x1b[2J"])
def test_an_odd_key_is_one_line_that_does_not_show_it(serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    url, _ = serve(lambda handler, number, body: handler.say("5"))
    with pytest.raises(InputError, match="OPENAI_API_KEY: has letters that no key has") as error:
        scorer(url=url)
    assert key not in str(error.value)


# --- Why there is no score ---


PAGE = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
LOGIN = b"<!doctype html><html><body>Sign in to the campus network</body></html>"
TROUBLE = {  # what a server does, and what the line has to say
    "a gateway": (
        lambda h: h.raw(PAGE, 502, Content_Type="text/html"),
        "answered 502 Bad Gateway: '<html><head><title>502 Bad Gateway</title>.*' 2 times",
    ),
    "a busy server": (
        lambda h: h.raw(b"overloaded", 503, Content_Type="text/plain"),
        "answered 503 Service Unavailable: 'overloaded' 2 times",
    ),
    "too many requests": (
        lambda h: h.raw(b'{"error": "slow down"}', 429, Retry_After="0.01"),
        "answered 429 Too Many Requests: .*slow down.*Retry-After: 0.01. 2 times",
    ),
    "a pause of an hour": (
        lambda h: h.raw(b'{"error": "quota"}', 429, Retry_After="3600"),
        "answered 429 Too Many Requests: .*quota.*Retry-After: 3600",
    ),
    "a login page": (
        lambda h: h.raw(LOGIN, Content_Type="text/html"),
        "answered 200 OK, not a completion: '<!doctype html>.*campus network.*' 2 times",
    ),
    "a page that says it is JSON": (
        lambda h: h.raw(LOGIN), "answered 200 OK, not a completion: '<!doctype html>.*' 2 times",
    ),
    "an error in a 200": (
        lambda h: h.reply(200, {"error": {"message": "CUDA out of memory", "code": 500}}),
        "answered 200 OK, not a completion: .*CUDA out of memory.* 2 times",
    ),
    "half an answer": (
        lambda h: h.raw(b'{"choices": [{"message": {"content": "7'),
        "answered 200 OK, not a completion: .*choices.* 2 times",
    ),
    "no choices": (
        lambda h: h.reply(200, {"choices": []}),
        "answered 200 OK, not a completion: .*choices.* 2 times",
    ),
    "silence": (lambda h: time.sleep(2), "gave no whole answer in 0.5 seconds 2 times"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE)
def test_the_cause_of_a_failed_request_is_kept_and_told_once(serve, trouble, capsys):
    act, said = TROUBLE[trouble]
    url, server = serve(
        lambda handler, number, body: (
            act(handler) if "poison" in words_of(body)[0] else handler.say("5")
        )
    )
    name = "judge:alignment"
    found = made("jpeg", scorers={name: scorer(name, url=url, timeout=0.5, retries=1)})
    for _ in range(2):
        scores = found.score(clips(2), ["p", "poison"])
        assert scores[name].isnan().tolist() == [False, True]
        found.check({name: scores[name][None]}, ["p"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(said, lines[0]), lines
    assert lines[0].startswith(f"warning: reward {name}: a sample without a score is masked: ")
    # all samples of a rollout, and the sample of the try-out
    with pytest.raises(RunError, match=f"has no score for any of 1 samples: {said}"):
        found.check({name: scores[name][None, 1:]}, ["p"])
    with pytest.raises(InputError, match=f"{name} has no score for a first sample: {said}"):
        found.smoke_test(clips(1), "poison")


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_server_in_trouble_is_named_before_any_rollout(serve, trouble):
    act, said = TROUBLE[trouble]
    url, server = serve(None)
    server.greeting = act
    with pytest.raises(InputError, match=f"--judge-url {url}: {said}") as error:
        scorer(url=url, timeout=0.5, retries=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "status, advice", [(401, "Set OPENAI_API_KEY"), (404, "Check --judge-model, and that")]
)
def test_a_refusal_says_what_to_change_and_not_the_key(serve, monkeypatch, status, advice):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    url, server = serve(None)
    server.greeting = lambda handler: handler.raw(b'{"error": "bad: sk-secret"}', status)
    with pytest.raises(InputError, match=f"answered {status} .*bad: KEY.*{advice}") as error:
        scorer(url=url)
    assert "sk-secret" not in str(error.value)


def test_a_retry_after_is_waited_for(serve):
    def behave(handler, number, body):
        handler.raw(b"{}", 429, Retry_After="1") if number == 1 else handler.say("6")

    url, server = serve(behave)
    made_ready = scorer(url=url, timeout=0.3, retries=1)
    started = time.perf_counter()
    assert made_ready.score(clips(1), ["p"]).tolist() == [6.0]
    assert 1 <= time.perf_counter() - started


@pytest.mark.parametrize("said", ["a nice clip", "", "7 or 8", '{"quality": 7, "motion": 6}'])
def test_the_try_out_fails_without_a_score_and_quotes_the_answer(serve, said):
    url, _ = serve(lambda handler, number, body: handler.say(said))
    found = made("jpeg", scorers={"judge:quality": scorer("judge:quality", url=url)})
    quoted = re.escape(repr(said)) if said else "nothing that can be read"
    with pytest.raises(InputError, match=f"no score for a first sample: asked 3 times, .*{quoted}"):
        found.smoke_test(clips(1), "p")


def choice_of(content, finish="stop", **message):
    message = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning"])
def test_a_model_that_thinks_first_gets_the_tokens_for_it(serve, field):
    """Its thoughts come as text, or in the field of a server's parser."""

    def behave(handler, number, body):
        if body["max_tokens"] < 1000:
            thought = "<think>The clip" if field == "content" else None
            other = {} if field == "content" else {field: "The clip"}
            return handler.reply(200, choice_of(thought, finish="length", **other))
        thought = "<think>The clip shows 3 dogs" + " and more" * 500 + "</think>"
        if field == "content":
            return handler.reply(200, choice_of(f"{thought}\n\n7.5"))
        handler.reply(200, choice_of("\n\n7.5", **{field: thought}))

    url, server = serve(behave)
    found = scorer(url=url)
    assert found.score(clips(1), ["p"]).tolist() == [7.5] and len(server.asked) == 2
    assert found.score(clips(2), ["p", "q"]).tolist() == [7.5, 7.5] and len(server.asked) == 4


def test_thoughts_without_an_answer_are_quoted(serve):
    url, _ = serve(
        lambda handler, number, body: handler.reply(200, choice_of(None, reasoning="Score: 7"))
    )
    found = scorer(url=url)
    assert found.score(clips(1), ["p"]).isnan().all()
    assert "'<think>Score: 7'" in found.missing["no score"]


def test_a_number_at_the_limit_of_the_tokens_may_be_half_of_one(serve):
    url, _ = serve(
        lambda handler, number, body: handler.reply(200, choice_of("Score: 8", finish="length"))
    )
    assert scorer(url=url).score(clips(1), ["p"]).isnan().all()


@pytest.mark.parametrize(
    "proxy, value, said",
    [
        ("ALL_PROXY", "socks5://localhost:9", "needs the package socksio: pip install"),
        ("https_proxy", "socks5h://localhost:9", "needs the package socksio: pip install"),
        ("HTTP_PROXY", "socks4://localhost:9", "cannot be used .ValueError: Unknown scheme"),
        ("HTTPS_PROXY", "http://host:port", "cannot be used .InvalidURL: Invalid port"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(serve, monkeypatch, proxy, value, said):
    url, _ = serve(lambda handler, number, body: handler.say("5"))
    monkeypatch.setenv(proxy, value)
    with pytest.raises(InputError, match=f"--judge-url {url}: the proxy in {proxy} {said}.*unset"):
        scorer(url=url)


# --- A small random Qwen2.5-VL, in this process and behind transformers' own server ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its last layer tells nine clips and their prompts apart: the i-th makes it say i."""
    judge_local.local.cache_clear()
    folder = str(save_judge(tmp_path_factory.mktemp("judge")))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    talks = [
        question("judge:alignment", clip, prompt) for clip, prompt in zip(clips(9), PROMPTS * 3)
    ]
    states = torch.cat([by_hand(folder, talk, model, states=True) for talk in talks])  # [9, D]
    digits = AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids(
        list("123456789")
    )
    model.lm_head.weight.data[digits] = torch.linalg.pinv(states.double()).T.float()
    model.save_pretrained(folder)
    return folder


@in_this_process
def test_a_model_in_this_process_says_what_it_finds_likeliest(folder):
    """Against one forward pass for each sample alone, put together by hand."""
    media, prompts = clips(9), (PROMPTS * 3)[:9]
    found = scorer(model=folder).score(media, prompts)
    talks = [question("judge:alignment", clip, prompt) for clip, prompt in zip(media, prompts)]
    expected = [by_hand(folder, talk).argmax().item() + 1 for talk in talks]
    assert found.tolist() == expected and len(set(expected)) > 4


@in_this_process
def test_expected_scores_of_a_model_in_this_process(folder):
    media, prompts = clips(5), [PROMPTS[i % 4] for i in range(5)]
    judge_local.local.cache_clear()
    try:
        made = scorer(model=folder, expected=True)
        head = (
            made.backend.model.lm_head.weight.data
        )  # a random model seldom answers with a digit, this one often
        digits = made.backend.processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
        head.zero_()
        head[digits] = torch.randn(10, head.shape[1], generator=torch.Generator().manual_seed(0))
        found = made.score(media, prompts)
        for score, clip, prompt in zip(found.tolist(), media, prompts):
            talk = question("judge:alignment", clip, prompt, expected=True)
            logits = by_hand(folder, talk, made.backend.model, "0123456789")
            p = logits.softmax(0)
            if not math.isnan(score):
                assert score == pytest.approx(1 + (p * torch.arange(10)).sum().item(), abs=1e-3)
        assert found.isfinite().sum() > 1 and found[found.isfinite()].std() > 0.1
    finally:
        judge_local.local.cache_clear()


def by_hand(folder, talk, model=None, digits="123456789", states=False):
    """Logits of the digits after a conversation, [len(digits)]: the text written out, the pictures
    put in one by one. states: the last hidden state instead, [1, D]."""
    processor = AutoProcessor.from_pretrained(folder)
    model = model or AutoModelForImageTextToText.from_pretrained(folder)
    *pictures, words = talk[0]["content"]
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    text += (
        "<|vision_start|><|image_pad|><|vision_end|>" * len(pictures)
        + "{}<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(
        text=[text.format("")], images=[part["image"] for part in pictures], return_tensors="pt"
    )
    # the words as plain letters, whatever control tokens they spell
    plain = torch.tensor([processor.tokenizer.convert_tokens_to_ids(letters(words["text"]))])
    ids, end = (
        inputs["input_ids"],
        len(processor.tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids),
    )
    ids = torch.cat([ids[:, :-end], plain, ids[:, -end:]], 1)
    with torch.no_grad():
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=(ids == model.config.image_token_id).int(), output_hidden_states=True,
        )  # fmt: skip
    if states:
        return output.hidden_states[-1][:, -1]
    return output.logits[0, -1][processor.tokenizer.convert_tokens_to_ids(list(digits))]


def letters(text):
    """The byte-level letters of a text."""
    from tokenizers import normalizers, pre_tokenizers

    pairs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        normalizers.NFC().normalize_str(text)
    )
    return [letter for part, _ in pairs for letter in part]


@in_this_process
def test_a_model_that_is_not_there_is_said_before_any_rollout(tmp_path):
    judge_local.local.cache_clear()
    with pytest.raises(InputError, match="--judge-model .* does not load .*--judge-url"):
        scorer(model=str(tmp_path / "nothing"))


@pytest.mark.skipif(not in_this_process.args[0], reason="it is refused by older ones alone")
def test_a_release_whose_prompts_can_spell_control_tokens_is_refused(folder):
    with pytest.raises(InputError, match="needs transformers 5.23.*--judge-url"):
        scorer(model=str(folder))


@pytest.mark.long
@in_this_process
def test_transformers_own_server(folder):
    """`transformers serve` with the small model: what it answers is what the model in this process
    says."""
    port = free_url().rpartition(":")[2].removesuffix("/v1")
    command = [
        "-c",
        "from transformers.cli.transformers import main; main()",
        "serve",
        folder,
        "--port",
        port,
    ]
    process = subprocess.Popen(
        [sys.executable, *command, "--device", "cpu"], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )  # fmt: skip
    try:
        media, prompts = clips(3), ["a red circle", "b", "c"]
        deadline = time.time() + 120
        while True:
            try:
                served = scorer(url=f"http://localhost:{port}/v1", model=folder, retries=0)
                break
            except InputError as error:
                assert process.poll() is None and time.time() < deadline, error
                time.sleep(0.5)
        score = served.score(media, prompts)
        judge_local.local.cache_clear()
        assert (
            torch.equal(score, scorer(model=folder).score(media, prompts))
            and score.isfinite().all()
        )
    finally:
        process.kill()
        process.wait()


# --- A whole run ---


RUN = (
    "--steps 4 --save-every 100 --reward judge:quality judge:alignment --thresholds 0.5 0.5 "
    "--prompts-per-step 2 "
    "--group-size 3 --sampling-steps 3 --tracker none --eval-every 0 --sample-every 0 "
    "--judge-model m"
).split()


@pytest.mark.long
def test_a_run_whose_server_dies_ends_with_one_line_and_a_checkpoint_and_goes_on(
    serve, tmp_path, monkeypatch
):
    def words(name, *flags):
        return ["self_paced.py", *RUN, "--output", str(tmp_path / name), *flags]

    def train(name, *flags):
        monkeypatch.setattr(sys, "argv", words(name, *flags))
        self_paced.main(cli.parse(self_paced.Args, ""))

    def behave(handler, number, body):
        return (
            handler.say(colour_score(body)) if number <= 30 else handler.fail(503)
        )  # the third step of 12 requests

    url, server = serve(behave)
    server.alive = lambda: len(server.asked) <= 30
    command = [sys.executable, *words("run", "--judge-url", url, "--judge-retries", "1")]
    died = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert died.returncode == 1 and "Traceback" not in died.stderr
    (line,) = [line for line in died.stderr.splitlines() if line.startswith("error:")]
    assert (
        re.search(r"judge:\w+: the server at --judge-url .* is gone", line)
        and "--resume latest" in line
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]

    url, _ = serve(lambda handler, number, body: handler.say(colour_score(body)))
    train("run", "--judge-url", url, "--resume", "latest")
    train("whole", "--judge-url", url)
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if "second" not in k}
            for line in text.splitlines()
        ]
        for text in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole"))
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


@pytest.mark.long
def test_an_error_of_one_process_ends_both_with_a_checkpoint(serve, tmp_path):
    def behave(
        handler, number, body
    ):  # each process tries the rewards out, then has six requests a step
        return handler.fail(400) if number == 20 else handler.say(colour_score(body))

    url, _ = serve(behave)
    started = time.time()
    died = launch(
        2, str(ROOT / "self_paced.py"), *RUN, "--output", str(tmp_path / "run"), "--judge-url", url
    )
    assert died.returncode != 0 and time.time() - started < 60
    lines = [line for line in died.stderr.splitlines() if "error: reward judge" in line]
    assert any("refuses to judge" in line for line in lines) and any(
        "in another process" in line for line in lines
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000001"]
