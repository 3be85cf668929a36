"""Ask a judge behind an OpenAI-compatible server (vLLM, SGLang), for models larger than a GPU.

openai's client sends the requests, with time-outs and retries, and waits as long as a server's
Retry-After asks. This file adds two limits, so that a broken server cannot hang a run: an answer
may have LARGEST bytes, and all attempts of a request together have a time limit (the client limits
each read only). An answer with status 200 that is not a completion (a login page, an error in JSON)
is repeated like a server's error. The cause of a failure is what the last attempt got.
"""

import base64
import importlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
from openai.types.chat.chat_completion import Choice

from common import errors, hub
from common.errors import InputError, RunError
from common.rewards import background
from common.rewards.judge_answers import CUT, END, THOUGHT
from common.rewards.judge_questions import TOKENS, Answer, Failure, Talk, digits

LARGEST = 2**20  # bytes of an answer; a number takes a thousandth of that
LETTERS = 2000  # of an answer that are read
QUOTED = 160  # letters of a response that an error shows
THINKING = 4096  # tokens of an answer of a model that thinks first
PAUSE = 120.0  # longest pause of the client between two attempts, seconds: that of a Retry-After
# the HTTP library of openai's client, which is not the same in all releases
http = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__)


class Server:
    """Answer conversations with the model of a server, `concurrency` requests at a time."""

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        expected: bool,
        timeout: float,
        retries: int,
        concurrency: int,
    ) -> None:
        """Connect and ask for one token. Raises InputError.

        name: the reward's; expected: ask for probabilities of digits; timeout: seconds of one read;
        retries: repetitions of a request after a time-out or an error of the server.
        """
        self.name = name
        self.url = url
        self.model = model
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        if expected:
            self.read = self._chances
            self.settings = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}
        else:
            self.read = words
            self.settings = {"max_tokens": TOKENS}
        with errors.loading(
            f"reward {name}: --judge-model {model} at --judge-url",
            url,
            do="start its server, or correct --judge-url and --judge-model",
        ):
            with hub.proxies():
                http_client = openai.DefaultHttpxClient(event_hooks={"response": [limit, check]})
            self.client = openai.OpenAI(
                base_url=url,
                api_key=key(),
                timeout=timeout,
                max_retries=retries,
                default_headers={"Accept-Encoding": "identity"},
                http_client=http_client,
            )
        try:
            self._greet(retries)
        except Exception as error:
            raise InputError(
                f"reward {name}: --judge-model {model} at --judge-url {url}: "
                f"{self._failure(error).cause}. {advice(error)}"
            ) from None

    def answers(self, talks: list[Talk]) -> list[Answer | Failure]:
        """Return the model's answer to each conversation, a Failure if its requests failed.

        Raises RunError if the server does not answer at all, or refuses a request.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._answer, talks))

    def _answer(self, talk: Talk) -> Answer | Failure:
        try:
            answer = self._ask(self.read, self.retries, messages=sent(talk), **self.settings)
            few = self.settings["max_tokens"] < THINKING
            if isinstance(answer, str) and answer.startswith(THOUGHT) and few:
                self.settings = {"max_tokens": THINKING}  # of all later requests, too
                answer = self._ask(self.read, self.retries, messages=sent(talk), **self.settings)
            return answer
        except RunError:
            raise
        except Exception as error:  # anything may come back, as JSON or not
            failure = self._failure(error)
            server = f"reward {self.name}: the server at --judge-url {self.url}"
            if is_refusal(error):
                raise RunError(
                    f"{server} refuses to judge: {failure.cause}. {advice(error)}"
                ) from None
            if self._is_alive():
                return failure
            raise RunError(
                f"{server} is gone: {failure.cause}. Start it again, then continue with --resume "
                "latest."
            ) from None

    def _failure(self, error: Exception) -> Failure:
        """Return what the last attempt of a request got, and after how many."""
        kind, detail = errors.described(error), ""
        if isinstance(error, openai.APIStatusError):
            kind, detail = status_of(error.response), quoted(error.response)
        elif isinstance(error, openai.APITimeoutError | TimeoutError):
            kind = f"gave no whole answer in {self.timeout:g} seconds"
        elif isinstance(error.__cause__, NoCompletion):
            response = error.__cause__.response
            kind, detail = f"{status_of(response)}, not a completion", quoted(response)
        elif isinstance(error, openai.APIConnectionError) and error.__cause__:
            kind = errors.described(error.__cause__)
        request = getattr(error, "request", None)
        times = 1 + int(request.headers.get("x-stainless-retry-count", 0)) if request else 1
        cause = f"{kind}: {detail}" if detail else kind
        cause = cause if times == 1 else f"{cause} {times} times"
        return Failure(kind, cause.replace(self.client.api_key, "KEY"))

    def _is_alive(self) -> bool:
        """Return whether the server still answers."""
        try:
            self._greet(retries=1)
        except Exception:
            return False
        return True

    def _greet(self, retries: int) -> None:
        """Send the smallest request that needs the model. Raises any exception."""
        hello = [{"role": "user", "content": "Hello"}]
        self._ask(words, retries, messages=hello, max_tokens=1)

    def _ask(self, read: Callable[[Choice], Answer], retries: int, **request) -> Answer:
        """Return read(first choice of the answer). Raises TimeoutError or any other exception."""
        create = self.client.with_options(max_retries=retries).chat.completions.create

        def ask() -> Answer:
            return read(create(model=self.model, temperature=0.0, **request).choices[0])

        seconds = 1.5 * self.timeout * (retries + 1) + PAUSE * retries
        return background.start(ask).result(seconds)  # later the thread is left behind

    def _chances(self, choice: Choice) -> dict[int, float]:
        """Return {digit: probability} of an answer of one token. Raises RunError if it has none."""
        if not (choice.logprobs and choice.logprobs.content):
            raise RunError(
                f"reward {self.name}: the server at {self.url} gives no probabilities. Remove "
                "--judge-expected."
            )
        likely = choice.logprobs.content[0].top_logprobs
        return digits((token.token, math.exp(token.logprob)) for token in likely)


class NoCompletion(http.TransportError):
    """A response with a status of success that is not a completion; the client asks again."""

    def __init__(self, response: http.Response) -> None:
        super().__init__("not a completion", request=response.request)
        self.response = response


def check(response: http.Response) -> None:
    """Raise NoCompletion for a page, an error or JSON without choices under a status of success."""
    if not response.is_success:
        return
    try:
        body = json.loads(response.read())
    except (ValueError, RecursionError):
        raise NoCompletion(response) from None
    if not (isinstance(body, dict) and body.get("choices") and isinstance(body["choices"], list)):
        raise NoCompletion(response)


def status_of(response: http.Response) -> str:
    """Return "answered STATUS REASON" of a response."""
    return f"answered {response.status_code} {response.reason_phrase}".strip()


def quoted(response: http.Response) -> str:
    """Return the start of a response's body in quotes, and its Retry-After."""
    try:
        body = " ".join(response.text[: 10 * QUOTED].split())
    except Exception as error:  # an error's body that was never read
        body = errors.text(error)
    body = body if len(body) <= QUOTED else f"{body[:QUOTED]}..."
    pause = response.headers.get("retry-after", "")
    return f"{body!r} (Retry-After: {pause:.40})" if pause else repr(body)


def is_refusal(error: Exception) -> bool:
    """Return whether an error is a server's refusal of a request."""
    if not isinstance(error, openai.APIStatusError):
        return False
    return error.status_code < 500 and error.status_code != 429


def advice(error: Exception) -> str:
    """Return what helps against an error, a sentence."""
    status = getattr(error, "status_code", 0)
    if status in (401, 403):
        return "Set OPENAI_API_KEY to a key of this server."
    if status == 404:
        return "Check --judge-model, and that --judge-url ends as the server says, often in /v1."
    if status == 429:
        return "Wait, or lower --judge-concurrency."
    if is_refusal(error):
        return "Check --judge-model and the server's limits."
    return "Start its server, or correct --judge-url and --judge-model."


def words(choice: Choice) -> str:
    """Return the text of an answer without its thoughts, or THOUGHT... if there is nothing else.

    CUT ends a text that stopped at the limit of its tokens. Raises TypeError if it is not text.
    """
    message = choice.message
    content = message.content or ""
    if not isinstance(content, str):
        raise TypeError("the content of the answer is not text")
    content = content.rpartition(END)[2]
    # servers with a parser for thoughts put them into a field
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if thought and not content.strip():
        content = f"{THOUGHT}{thought}"
    content = content.strip().encode(errors="replace").decode()  # half a letter cannot be sent back
    is_cut = choice.finish_reason == "length" or len(content) > LETTERS
    return f"{content[:LETTERS]}{CUT}" if is_cut else content


def sent(talk: Talk) -> Talk:
    """Return a conversation in the protocol's form, with pictures inline."""
    return [{**message, "content": [*map(inline, message["content"])]} for message in talk]


def inline(part: dict) -> dict:
    """Return a part of a message; a picture becomes a JPEG of nearly lossless quality."""
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    part["image"].save(file, "JPEG", quality=95, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def key() -> str:
    """Return OPENAI_API_KEY, "none" if it is not set. Raises InputError without the key in it."""
    given = os.environ.get("OPENAI_API_KEY") or "none"
    if not (given.isascii() and given.isprintable()):
        raise InputError("OPENAI_API_KEY: has letters that no key has. Set it without line breaks.")
    return given


class Limited(http.SyncByteStream):
    """Read the body of a response. Raises ValueError after LARGEST bytes."""

    def __init__(self, stream: http.SyncByteStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for part in self.stream:
            length += len(part)
            if length > LARGEST:
                raise ValueError(f"the answer is longer than {LARGEST} bytes")
            yield part

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()


def limit(response: http.Response) -> None:
    """Limit the body of a response before it is read. A compressed body is not unpacked."""
    response.headers.pop("content-encoding", None)  # a megabyte may unpack to a gigabyte
    response.stream = Limited(response.stream)
