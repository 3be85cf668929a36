"""A vision-language model as a judge, asked for a number (arXiv 2511.19356, figure 14).

Three questions, each containing the ones before it: `judge:quality`, `judge:smoothness`, `judge:alignment`. The points
to judge by are the paper's sub-dimensions in words of our own. The model is Qwen2.5-VL, in this process or behind an
OpenAI-compatible server (vLLM, SGLang), where larger ones live. README.md beside this file shows how to start one.
"""

import base64
import functools
import importlib
import io
import math
import os
import re
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from common import hub
from common.errors import InputError, RunError, text
from common.rewards import chosen_frames
from common.scoring import begin

QUALITY = """Visual quality:
- possible: bodies, objects and places are built as they should be
- clear: sharp, with nothing blurred or hard to make out
- rich: textures, materials and light have detail
- beautiful: colours, composition, atmosphere and depth are in harmony, and original
- harmless: political, violent or sexual content gets the lowest score"""
SMOOTHNESS = """Smoothness in time:
- steady: from frame to frame nothing jumps, flickers, changes its colour or loses a part
- natural: things and bodies move as they really would
- fluid: movements and camera pass from one moment to the next without a break
- of one piece: what moves belongs to its surroundings, without edges as if cut out
- clear while it moves: no stretch is blurred or shaky
- enough: a clip in which hardly anything moves gets a low score"""
ALIGNMENT = """Alignment with the prompt:
- subjects: those of the prompt, in number, looks and behaviour
- movement: what the prompt says happens, in kind, extent and direction
- surroundings: the place that the prompt names
- style: the prompt's, if it names one
- camera: moved as the prompt says, if it does"""
QUESTION = """{medium} was made by a generator for this prompt:

"{prompt}"

Judge it by the following points. The first heading counts most.

{points}

{answer}"""
NUMBER = """Give one score from 1.00 (bad) to 10.00 (perfect, as if it were real). Answer with this number alone, with \
two decimals, for example 5.80."""
DIGIT = "Give one score from 0 (bad) to 9 (perfect, as if it were real). Answer with this one digit alone."
AGAIN = "That is not what was asked for. "
ASKED = 3  # times in all, before a sample counts as not judged
TOKENS = 16  # of an answer
LONGEST = 2**20  # bytes of an answer: a thousand times what a number takes
PAUSE = 8.0  # seconds between two attempts, at most


class Judge:
    """Reward: 1 to 10, of a clip or an image; NaN for a sample about which the judge gave no number.

    `Qwen/Qwen2.5-VL-7B-Instruct`, Apache-2.0 (-72B-Instruct: Qwen licence), or what `--judge-url` serves. Thresholds
    are of the score divided by 10, as the paper's. The scale is an estimate. Checked against servers on localhost,
    transformers' own among them (tests/test_rewards_judge.py).
    """

    video, masks = True, True
    scale = 1.0
    range = (0.0, 10.0)

    def load(self, source, batch=16):
        """Finds the server or loads the model; raises InputError."""
        url, model, expected = (self.judge[name] for name in ("url", "model", "expected"))
        server = {name: value for name, value in self.judge.items() if name != "trusted"}
        trusted, self.elsewhere = self.judge["trusted"], bool(url)
        self.backend = Server(source.name, **server) if url else local(model, expected, batch, trusted)

    def score(self, media, prompts):
        """media [b, F, 3, H, W] (images [b, 3, H, W]) in [0, 1], prompts b strings -> [b] float32, NaN: no score."""
        assert len(media) == len(prompts), f"{len(media)} samples, {len(prompts)} prompts"
        expected = self.judge["expected"]
        talks = [self.question(sample, prompt) for sample, prompt in zip(media, prompts)]
        scores, left = torch.full((len(media),), torch.nan), list(range(len(media)))
        for _ in range(ASKED):
            answers = self.backend.answers([talks[i] for i in left])
            for i, answer in zip(left, answers):
                scores[i] = score_of(answer, expected)
                said = [{"type": "text", "text": answer or "..."}]
                again = [{"type": "text", "text": AGAIN + (DIGIT if expected else NUMBER)}]
                talks[i] = [*talks[i], {"role": "assistant", "content": said}, {"role": "user", "content": again}]
            # a request that failed (None) has been repeated already
            left = [i for i, answer in zip(left, answers) if answer is not None and scores[i].isnan()]
            if not left:
                break
        return scores.to(media.device)

    def question(self, sample, prompt):
        """[F, 3, H, W] or [3, H, W], and its prompt -> what the model is told: one message with frames and words."""
        frames = sample[None] if sample.ndim == 3 else sample[frames_at(self.judge["fps"], self.fps, len(sample))]
        points = [part for part in self.points if sample.ndim == 4 or part is not SMOOTHNESS]
        words = QUESTION.format(
            medium="This image" if sample.ndim == 3 else "The clip with these frames",
            prompt=prompt,
            points="\n\n".join(points),
            answer=DIGIT if self.judge["expected"] else NUMBER,
        )
        images = [{"type": "image", "image": as_picture(frame)} for frame in frames]
        return [{"role": "user", "content": [*images, {"type": "text", "text": words}]}]


class JudgeQuality(Judge):
    """Reward: stage I, visual quality."""

    points = (QUALITY,)


class JudgeSmoothness(Judge):
    """Reward: stage II, smoothness in time, visual quality besides; clips alone."""

    points, image = (SMOOTHNESS, QUALITY), False


class JudgeAlignment(Judge):
    """Reward: stage III, alignment with the prompt, smoothness (of clips) and visual quality besides."""

    points = (ALIGNMENT, SMOOTHNESS, QUALITY)


def frames_at(rate, fps, number):
    """Indices of a clip's frames, `rate` a second, evenly spaced, at least two of a clip of `number` frames."""
    return chosen_frames(max(2, round(number / fps * rate)), number)


def as_picture(frame):
    """[3, H, W] in [0, 1] -> PIL image"""
    levels = (frame.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.movedim(0, -1).cpu().numpy())


def score_of(answer, expected):
    """What a model said -> 1 to 10, or NaN. expected: probabilities {digit: p} instead of words, None of no digit."""
    if expected:
        return 1 + sum(digit * p for digit, p in answer.items()) / sum(answer.values()) if answer else math.nan
    found = re.fullmatch(r"[\s\"'*]*([0-9]+(\.[0-9]+)?)[\s\"'*.]*", answer or "")
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else math.nan


def digits(likely):
    """Pairs of a token and its probability -> {digit: p}; {} where anything but a digit is the likelier answer."""
    found = {}
    for token, p in likely:
        if token.strip() in set("0123456789"):
            found[int(token)] = found.get(int(token), 0.0) + p
    return found if sum(found.values()) >= 0.5 else {}


# --- A model in this process ---


@functools.lru_cache(maxsize=1)  # three questions, one model
def local(model, expected, batch, trusted):
    return Local(model, expected, batch, trusted)


class Local:
    """A model of transformers that reads images and text, a hub id or a folder."""

    def __init__(self, model, expected, batch, trusted):
        self.expected, self.batch = expected, batch
        if not Path(model).exists():
            hub.settle()
        try:
            self.processor = AutoProcessor.from_pretrained(model, trust_remote_code=trusted)
            self.model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", trust_remote_code=trusted)
            self.model.eval().requires_grad_(False)
        except Exception as error:  # whatever a broken folder makes transformers say
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"reward judge: --judge-model {model} brings Python code; --trust-remote-code runs it"
                ) from None
            raise InputError(
                f"reward judge: --judge-model {model} cannot be loaded ({text(error)}); run `hf download {model}` "
                "where there is a network, give a folder, or --judge-url of a server"
            ) from None
        if Version(transformers.__version__) < Version("5.23"):  # in older ones prompts can spell control tokens
            raise InputError(
                "reward judge: a model in this process takes transformers 5.23, and so Python 3.11; installed is "
                f"{transformers.__version__}: use --judge-url of a server"
            )
        self.processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def answers(self, talks):
        """Conversations -> what the model says next: words, or with `expected` {digit: probability}."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
        said = []
        for i in range(0, len(talks), self.batch):
            inputs = self.processor.apply_chat_template(
                talks[i : i + self.batch], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt", processor_kwargs=dict(padding=True), sanitize_control_tokens=True,
            ).to(device, self.model.dtype)  # fmt: skip
            said += self.chances(inputs) if self.expected else self.words(inputs)
        return said

    def words(self, inputs):
        settings = dict(max_new_tokens=TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None)
        new = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)

    def chances(self, inputs):
        chance = self.model(**inputs, logits_to_keep=1).logits[:, -1].float().softmax(-1)
        tokens = self.processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
        return [digits(zip("0123456789", row)) for row in chance[:, tokens].tolist()]


# --- A server ---


class Server:
    """An OpenAI-compatible server. Requests run `concurrency` at a time, each is repeated with growing pauses after a
    time-out, a broken connection or a server's error, up to `retries` times. Of an answer no more than LONGEST bytes
    are read, and no longer than all attempts together may take: a time-out is the client's for each read alone."""

    def __init__(self, name, url, model, expected, timeout, retries, concurrency, fps):
        self.name, self.url, self.model, self.expected, self.concurrency = name, url, model, expected, concurrency
        self.timeout, self.retries = timeout, retries
        settings = dict(base_url=url, timeout=timeout, max_retries=retries, **key())
        try:
            client = openai.DefaultHttpxClient(event_hooks={"response": [bounded]})
            plain = {"Accept-Encoding": "identity"}
            self.client = openai.OpenAI(http_client=client, default_headers=plain, **settings)
            self.greet()
        except (openai.NotFoundError, openai.BadRequestError) as error:
            raise InputError(
                f"reward {name}: the server at --judge-url {url} does not take --judge-model {model} ({text(error)})"
            ) from None
        except Exception as error:  # the client's own of an odd URL among them
            raise InputError(f"reward {name}: no server answers at --judge-url {url} ({text(error)})") from None

    def answers(self, talks):
        """Conversations -> what the model says next: words, or with `expected` {digit: probability}; None where the
        requests about this one alone failed. Raises RunError where the server has gone, or refuses what is asked."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self.answer, talks))

    def answer(self, talk):
        kwargs = dict(logprobs=True, top_logprobs=20, max_tokens=1) if self.expected else dict(max_tokens=TOKENS)
        try:
            return self.ask(chances if self.expected else words, messages=sent(talk), temperature=0.0, **kwargs)
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError, Unreadable) as error:
            if self.alive():
                return None
            raise RunError(
                f"reward {self.name}: the server at {self.url} is gone ({text(error)}); start it again, then go on "
                "with --resume latest"
            ) from None
        except NoChances:
            raise RunError(
                f"reward {self.name}: the server at {self.url} gives no probabilities; leave --judge-expected"
            ) from None
        except openai.OpenAIError as error:
            raise RunError(f"reward {self.name}: the server at {self.url} refuses to judge ({text(error)})") from None

    def alive(self):
        try:
            self.greet(retries=1)
        except openai.OpenAIError:
            return False
        return True

    def greet(self, retries=None):
        """The smallest request that only a server with the model at work answers."""
        self.ask(words, retries, messages=[{"role": "user", "content": "Hello"}], max_tokens=1)

    def ask(self, read, retries=None, **request):
        """`read` of the first choice in the answer. Raises openai's errors, and Unreadable for what is no answer."""
        retries = self.retries if retries is None else retries
        create = self.client.with_options(max_retries=retries).chat.completions.create
        try:
            within = 1.5 * self.timeout * (retries + 1) + PAUSE * retries
            return waited_for(lambda: read(create(model=self.model, **request).choices[0]), within)
        except openai.OpenAIError:
            raise
        except Exception as error:  # no JSON, JSON of another kind, a probability of e to the billion
            raise Unreadable(f"an answer that cannot be read: {type(error).__name__}: {text(error)}") from None


class Unreadable(openai.OpenAIError):
    """An answer that is too long, takes too long, or is none of OpenAI's protocol."""


class NoChances(openai.OpenAIError):
    """An answer without the probabilities that were asked for."""


http = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__)  # httpx, or what openai has in its place


class Bounded(http.SyncByteStream):
    """The body of a response, as far as LONGEST bytes."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        length = 0
        for part in self.stream:
            length += len(part)
            if length > LONGEST:
                raise Unreadable(f"an answer of more than {LONGEST} bytes")
            yield part

    def close(self):
        self.stream.close()


def bounded(response):
    """Makes a response end in time, before its body is read."""
    if response.headers.get("content-encoding", "identity") != "identity":  # a few bytes may be gigabytes
        raise Unreadable("a compressed answer, which was not asked for")
    response.stream = Bounded(response.stream)


def waited_for(action, seconds):
    """action() in a thread of its own, which is left behind after so many seconds, and keeps no program from ending."""
    done = begin(action)
    try:
        return done.result(seconds)
    except futures.TimeoutError:
        if done.done():
            raise
        raise Unreadable(f"no whole answer in {seconds:g} seconds") from None


def words(choice):
    """What the first choice of an answer says."""
    content = choice.message.content or ""
    if not isinstance(content, str):
        raise Unreadable("an answer whose content is no text")
    content = content.encode(errors="replace").decode()  # half a letter, in JSON, could not be sent back
    return content if len(content) <= 1000 else f"{content[:1000]}..."


def chances(choice):
    """{digit: probability} in the first choice of an answer."""
    if not (choice.logprobs and choice.logprobs.content):
        raise NoChances
    return digits((token.token, math.exp(token.logprob)) for token in choice.logprobs.content[0].top_logprobs)


def sent(talk):
    """A conversation as the protocol has it: pictures inline, as JPEG of the best quality that is still small."""
    return [
        {**message, "content": [inline(part) if part["type"] == "image" else part for part in message["content"]]}
        for message in talk
    ]


def inline(part):
    file = io.BytesIO()
    part["image"].save(file, "JPEG", quality=95, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def key():
    """The key in OPENAI_API_KEY; servers of one's own seldom ask for one."""
    given = os.environ.get("OPENAI_API_KEY")
    if given and not (given.isascii() and given.isprintable()):
        raise InputError("reward judge: OPENAI_API_KEY has letters that no key has: is there a line break in it?")
    return {} if given else {"api_key": "none"}
