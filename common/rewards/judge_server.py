"""Ask a judge behind an OpenAI-compatible server (vLLM, SGLang), for models larger than a GPU.

openai's client sends the requests, with time-outs and retries. This file adds two limits, so that a
broken server cannot hang a run: an answer may have LARGEST bytes, and all attempts of a request
together have a time limit (the client limits each read only).
"""

import base64
import importlib
import io
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
from openai.types.chat.chat_completion import Choice

from common import errors
from common.errors import InputError, RunError
from common.rewards import background
from common.rewards.judge_questions import TOKENS, Answer, Talk, digits

LARGEST = 2**20  # bytes of an answer; a number takes a thousandth of that
PAUSE = 8.0  # longest pause of the client between two attempts, seconds
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
            self.client = openai.OpenAI(
                base_url=url,
                api_key=key(),
                timeout=timeout,
                max_retries=retries,
                default_headers={"Accept-Encoding": "identity"},
                http_client=openai.DefaultHttpxClient(event_hooks={"response": [limit]}),
            )
            self._greet(retries)

    def answers(self, talks: list[Talk]) -> list[Answer | None]:
        """Return the model's answer to each conversation, None if its requests failed.

        Raises RunError if the server does not answer at all, or refuses a request.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._answer, talks))

    def _answer(self, talk: Talk) -> Answer | None:
        try:
            return self._ask(self.read, self.retries, messages=sent(talk), **self.settings)
        except RunError:
            raise
        except Exception as error:  # anything may come back, as JSON or not
            said = errors.text(error)
            if is_refusal(error):
                raise RunError(
                    f"reward {self.name}: the server at {self.url} refuses to judge ({said}). "
                    "Check --judge-model and the server's limits."
                ) from None
            if self._is_alive():
                return None
            raise RunError(
                f"reward {self.name}: the server at {self.url} is gone ({said}). Start it again, "
                "then continue with --resume latest."
            ) from None

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


def is_refusal(error: Exception) -> bool:
    """Return whether an error is a server's refusal of a request."""
    if not isinstance(error, openai.APIStatusError):
        return False
    return error.status_code < 500 and error.status_code != 429


def words(choice: Choice) -> str:
    """Return the text of an answer, cut at 1000 letters. Raises TypeError if it is not text."""
    content = choice.message.content or ""
    if not isinstance(content, str):
        raise TypeError("the content of the answer is not text")
    return content.encode(errors="replace").decode()[:1000]  # half a letter cannot be sent back


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
